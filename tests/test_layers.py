"""The division of the package: one concept a module, imports point down, and no torch where none is needed."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up: a module imports only from those before it. Of other folders it imports their faces alone.
# A plus marks the modules that need torch; workers of dask and readers of stores import all others.
LAYERS = """
igstore                errors _faces schema
igstore.machine        limits freed_memory devices+ transfer+ compiled torch_settings+
igstore.files          access atomic locks mapping names all_or_nothing servers cache remote sources
igstore.masks          blocks selection fills options
igstore.cli            commands progress text output running parser options
igstore.images         imagenet preparation labels image_list
igstore.storage        layout arrays zarr_metadata zarr_form hdf5_layout hdf5_form reader staging concurrency writer
igstore.storage        integrity consistency copies hdf5_writer interchange
igstore.models         normalisation+ weights+ networks+ classifier+ adapters+ sources+ loading+
igstore.acceleration   activations+ choices+ convolutions+ fusion+ guard+ accelerator+ stem+ lines.kernels+
igstore.acceleration   lines.points+ lines.filters+ lines.graph+ lines.launches+ lines.reference+ lines.steps+
igstore.acceleration   lines.scales+ lines.tracing+ lines.integral+
igstore.attribution    quadrature engine+ learned_rules baselines memory+ attributor+
igstore.datasets       pixels masked_images xarray_views masked_imagenet+ masked_batches+
igstore.evaluation     results inference+ tables results_folder findings
igstore.building       plan+ parts decoding shards+ worker+ processes+ dask_client cluster+ recomputation+ import_source
igstore.building       import_attributor+ repair ranking builder+ placement+ dry_run+
igstore.calibration    fitting profiles+ subject+
igstore.reporting      charts figures summaries pictures page sections
igstore                info build calibrate rank evaluate curves report show view verify export merge imported
igstore                completion
"""

PLACES = [
    (f"{folder}.{name.rstrip('+')}", name.endswith("+"))
    for folder, *names in map(str.split, LAYERS.strip().splitlines())
    for name in names
]
MODULES = [module for module, _ in PLACES]
WITHOUT_TORCH = [module for module, needs_torch in PLACES if not needs_torch]
FOLDERS = list(dict.fromkeys(".".join(module.split(".")[:2]) for module in MODULES if module.count(".") > 1))


def dotted(path: Path) -> str:
    """The name under which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def folder_of(module: str) -> str:
    """The face of the folder that a module is in; "igstore" for those at the top."""
    return next((folder for folder in FOLDERS if f"{module}.".startswith(f"{folder}.")), "igstore")


def imported(path: Path) -> set[str]:
    """The modules and faces of igstore's that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            own = folder_of(dotted(path))
            if node.module == "igstore" or (node.module.startswith(own) and own != "igstore"):
                found |= within & {*MODULES, *FOLDERS} or {node.module} - {own}  # what is compiled needs no place
            else:
                found.add(node.module)
    return {name for name in found if name.startswith("igstore.")}


def test_every_module_has_its_place():
    files = [dotted(path) for path in (ROOT / "igstore").rglob("*.py") if not path.stem.startswith("__")]
    assert sorted(files) == sorted(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    folder, before = folder_of(module), MODULES[: MODULES.index(module)]
    below = {folder_of(other) for other in before} - {folder}
    neighbours = {other for other in before if folder_of(other) in (folder, "igstore")}
    assert imported(ROOT / f"{module.replace('.', '/')}.py") <= below | neighbours


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").rglob("*.py")), ids=dotted)
def test_pipelines_use_public_names(path):
    assert {folder_of(name) for name in imported(path) - set(FOLDERS)} <= {"igstore"}
    names = re.findall(r"^ *from igstore\S* import \(?([^)\n]*)", path.read_text(), re.M)
    assert not [name for line in names for name in line.split(", ") if name.startswith("_")]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_face_offers_what_its_folder_has(folder):
    face = importlib.import_module(folder)
    assert face.__doc__
    assert face.__all__ == dir(face)
    for name in face.__all__:
        assert not name.startswith("_")
        assert folder_of(getattr(getattr(face, name), "__module__", folder) or folder) in (folder, "igstore")
    with pytest.raises(AttributeError, match="nothing_like_it"):
        face.nothing_like_it  # noqa: B018


def test_contributing_lists_every_module():
    text, listed, folder = (ROOT / "CONTRIBUTING.md").read_text(), set(), ""
    for indent, name, kind in re.findall(r"^    (  |    )(\w+)(\.py|/) +\S", text, re.M):
        if len(indent) == 4:
            listed.add(f"igstore.{folder}.{name}")
        elif kind == "/":
            folder = name
        else:
            listed.add(f"igstore.{name}")
    files = {module for module in MODULES if module.count(".") < 3} | {"igstore.acceleration.lines"}
    assert files <= listed


@pytest.mark.parametrize("modules", [WITHOUT_TORCH, []], ids=["readers", "the package itself"])
def test_readers_need_no_torch(modules):
    lines = ["import sys, igstore", *(f"import {module}" for module in modules)]
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
