"""The division of the package: one concept a module, imports point down, and no torch where none is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "igstore"

# From the bottom up: a module imports only from those before it.
LAYERS = """
errors schema files progress cli commands completion parts
quadrature blocks masks memory acceleration stem imagenet images normalisation weights baselines
models attribution layout given_maps hdf5
cache sources arrays zarr_form hdf5_form reader store
contents integrity repair
staging presence decoding pixels masking schedulers
views dataset batches
devices provenance plan attributor importer shards worker processes cluster proportions results tables results_folder
info rank recompute verify
appearing copies hdf5_writer interchange export merge
builder hiring forecast build imported
showing probability evaluate show view
charts curves findings figures summaries page sections report
""".split()

# What dask workers and readers of stores import.
WITHOUT_TORCH = """
errors schema files progress cli commands completion parts schedulers build
imported given_maps evaluate quadrature blocks masks imagenet images baselines layout
cache sources arrays zarr_form hdf5_form reader store
contents integrity repair staging presence decoding pixels masking views info rank verify
hdf5 appearing copies hdf5_writer interchange export merge
show view proportions results tables
results_folder charts curves findings figures summaries page sections report
""".split()


def imported(module: str) -> set[str]:
    """The package's modules that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "igstore":
            found |= {alias.name for alias in node.names if (PACKAGE / f"{alias.name}.py").exists()}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("igstore."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("igstore.")}
    return found


def test_every_module_has_its_place():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert sorted(modules) == sorted(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_imports_point_down(module):
    below = set(LAYERS[: LAYERS.index(module)])
    assert imported(module) <= below


@pytest.mark.parametrize("modules", [WITHOUT_TORCH, []], ids=["readers", "the package itself"])
def test_readers_need_no_torch(modules):
    lines = ["import sys, igstore", *(f"import igstore.{module}" for module in modules)]
    lines += ["igstore.open_store, igstore.rank_store, igstore.masked_view"] if modules else []
    lines += ["sys.exit(','.join(name for name in ('torch', 'torchvision', 'captum') if name in sys.modules) or 0)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_public_names_are_where_they_are_said_to_be():
    import igstore

    for name in igstore.__all__:
        # the module `evaluate` stands for its function, whichever was imported first
        assert getattr(igstore, name).__name__.rpartition(".")[2] == name
        assert callable(getattr(igstore, name))
    with pytest.raises(AttributeError, match="nothing_like_it"):
        igstore.nothing_like_it  # noqa: B018
