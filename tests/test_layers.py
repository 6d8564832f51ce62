"""The division of the package: one concept a module, imports point down, and no torch where none is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "igstore"
MODULES = {path.stem: path for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__")}

# From the bottom up: a module imports only from those before it.
LAYERS = """
errors compiled locks names reading wording limits schema files addresses progress cli option_groups commands
completion parts
freed_memory quadrature fitting blocks masks memory ambient modules weights choices convolutions activations fusion
guard acceleration transfer
points filters reference kernels launches steps graph scales tracing integral stem
imagenet images normalisation baselines models adapters attribution layout zarr_metadata given_maps hdf5
mapped cache servers remote sources arrays zarr_form hdf5_form reader staging presence store learned_rules
contents integrity repair
decoding pixels masking schedulers
views dataset batches
devices provenance plan attributor importer shards worker processes cluster results texts tables
results_folder
info rank recompute verify
appearing copies hdf5_writer interchange export merge
builder hiring forecast build imported
profiles subject calibrate
showing probability evaluate show view
charts curves findings figures summaries page sections report
""".split()

# What dask workers and readers of stores import.
WITHOUT_TORCH = """
errors compiled locks names reading wording limits schema files addresses progress cli option_groups commands
completion parts
schedulers
build imported calibrate given_maps evaluate freed_memory quadrature fitting blocks masks imagenet images baselines
layout zarr_metadata mapped cache servers remote sources arrays zarr_form hdf5_form reader staging presence store
learned_rules
contents integrity repair decoding pixels masking views info rank verify
hdf5 appearing copies hdf5_writer interchange export merge
show view results texts tables
results_folder charts curves findings figures summaries page sections report
""".split()


def dotted(module: str) -> str:
    """The name under which a module is imported."""
    return ".".join(MODULES[module].relative_to(PACKAGE.parent).with_suffix("").parts)


def imported(module: str) -> set[str]:
    """The package's modules that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "igstore":
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in MODULES if dotted(name) in names}


def test_every_module_has_its_place():
    assert sorted(MODULES) == sorted(LAYERS)
    assert len(MODULES) == sum(not path.stem.startswith("__") for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", LAYERS)
def test_imports_point_down(module):
    below = set(LAYERS[: LAYERS.index(module)])
    assert imported(module) <= below


@pytest.mark.parametrize("modules", [WITHOUT_TORCH, []], ids=["readers", "the package itself"])
def test_readers_need_no_torch(modules):
    lines = ["import sys, igstore", *(f"import {dotted(module)}" for module in modules)]
    lines += ["igstore.open_store, igstore.rank_store, igstore.masked_view"] if modules else []
    lines += ["sys.exit(','.join(name for name in ('torch', 'torchvision', 'captum') if name in sys.modules) or 0)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_public_names_are_where_they_are_said_to_be():
    import igstore

    for name in igstore.__all__:
        assert getattr(igstore, name).__name__ == name
        assert callable(getattr(igstore, name))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        igstore.nothing_like_it  # noqa: B018
