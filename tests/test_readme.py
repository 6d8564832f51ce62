"""What the README says works: its commands and its Python, on a tiny store; and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import xarray
from PIL import Image

import igstore
from igstore import cli
from igstore.__main__ import main
from igstore.commands import module_of
from pipelines.figure import draw

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
OUTSIDE_FENCES = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
COMMANDS = re.findall(r"^    (\S.*)$", OUTSIDE_FENCES, re.MULTILINE)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
DOWNLOADS = "python -m igstore.build --model resnet50"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a store by the README's name, of a small network and four pictures."""
    folder = tmp_path_factory.mktemp("readme")
    random = np.random.default_rng(0)
    pictures = [
        (f"picture_{index}", Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)), index)
        for index in range(4)
    ]
    classifier = igstore.load_classifier("shufflenet_v2_x0_5", "random", crop=24)
    igstore.build_store(classifier, pictures, folder / "resnet50.zarr", n_steps=2)
    return folder


@pytest.fixture
def here(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_it_begins_with_the_two_commands_of_make():
    assert COMMANDS[:2] == ["make demo", "make test"]
    targets = (ROOT / "Makefile").read_text()
    assert re.search("^demo:", targets, re.MULTILINE)
    assert re.search("^test:", targets, re.MULTILINE)


def test_the_main_job_would_begin():
    assert DOWNLOADS in COMMANDS
    options, _ = module_of("build").parser().parse(shlex.split(DOWNLOADS)[3:])
    assert options.model == "resnet50"


# In the README's order: what one makes, a later one reads.
@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("igstore") and " view " not in line])
def test_command(line, here, capsys):
    assert main(shlex.split(line)[1:]) == cli.DONE
    assert capsys.readouterr().out


def test_command_that_serves(here, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (line,) = (line for line in COMMANDS if line.startswith("igstore view "))
    view = subprocess.Popen(
        [sys.executable, "-m", *shlex.split(line), "--json"], stdout=subprocess.PIPE, text=True, cwd=here
    )
    try:
        assert '"url": "http://127.0.0.1:' in view.stdout.readline()
    finally:
        view.send_signal(signal.SIGINT)
        assert view.wait(60) == cli.DONE
        view.stdout.close()


def test_every_command_is_accounted_for():
    rest = [line for line in COMMANDS if not line.startswith("igstore ")]
    assert rest == ["make demo", "make test", "pip install .", "export IMAGENET_DIR=/data/imagenet", DOWNLOADS]


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.strip().splitlines()[-1])
def test_python(code, here):
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    if "dataset" in names:
        assert names["image"].shape == (3, 24, 24)
        assert names["label"] == 0
    else:
        assert names["store"].sizes == names["raw"].sizes


def test_the_table_of_variables_is_the_stores(here):
    table = README.partition("| variable |")[2].partition("\n\n")[0].splitlines()[2:]
    said = {}
    for row in table:
        names, dims, dtype = (cell.strip() for cell in row.split("|")[1:4])
        said |= {name.strip("` "): (tuple(dims.split(", ")), dtype) for name in names.split(",")}
    found = xarray.open_zarr("resnet50.zarr")
    ranks = xarray.open_zarr("resnet50.zarr", group="ranks/positive-3")
    for name, (dims, dtype) in said.items():
        group, _, variable = name.rpartition("/")
        array = (ranks if group else found)[variable]
        assert array.dims == dims
        assert dtype in ("string", str(array.dtype))
    assert len(said) == len(found.variables) + len(ranks.variables)


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_figure_is_drawn_from_an_evaluation(here, tmp_path):
    igstore.evaluate("resnet50.zarr", p=[90, 50], out=tmp_path / "found")
    drawn = ElementTree.fromstring(draw(tmp_path / "found"))
    committed = ElementTree.parse(ROOT / "pipelines" / "figures" / "accuracy.svg").getroot()
    for figure in (drawn, committed):
        assert figure.tag == "{http://www.w3.org/2000/svg}svg"
        words = set(" ".join(figure.itertext()).split())
        assert {"90", "50", "top-1", "unmasked"} <= words
        assert "prefers-color-scheme:" in " ".join(words)
