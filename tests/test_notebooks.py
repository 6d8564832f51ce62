"""The notebooks: they run from the first cell to the last on a small demo store, and are committed without outputs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import igstore

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

nbformat = pytest.importorskip("nbformat")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """As in a checkout after `make demo`, but of few photographs and few steps: ``demo/`` beside ``notebooks/``."""
    from pipelines.demo import lay_out_photographs

    folder = tmp_path_factory.mktemp("checkout")
    try:
        igstore.load_classifier("efficientnet_lite0")
        lay_out_photographs(folder / "photographs")
    except igstore.UserError as error:
        pytest.skip(str(error))
    for home in sorted((folder / "photographs").iterdir())[9:]:  # more than a batch of the quick start's
        shutil.rmtree(home)
    store = folder / "demo" / "efficientnet_lite0.zarr"
    igstore.build_store("efficientnet_lite0", folder / "photographs", store, target="label", n_steps=6)
    (folder / "notebooks").mkdir()
    return folder


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["article", "quickstart", "your_own_model"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            compile(cell.source, str(path), "exec")
        for words in ("/tmp", "/home", "/root", "/work"):
            assert words not in cell.source


@pytest.mark.timeout(600)  # many processes share the cores when all tests run
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the kernel's own, of the event loop that it runs in
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, place, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(place / "notebooks")}}).execute()
    pictures = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 2
    if path.stem == "quickstart":
        said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
        found = igstore.evaluate(
            place / "demo" / "efficientnet_lite0.zarr", p=[0, 30, 50], keep="bottom", order="attribution"
        )
        right = {f"{row.p:g}": row.top1 for row in found.rows}
        assert said.split("\n")[-4:-1] == [f"without the top {p:>2}%: {right[p]:.0f}% right" for p in ("0", "30", "50")]
    assert not [
        output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"
    ]
