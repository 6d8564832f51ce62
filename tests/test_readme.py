"""What the README says works: its commands and its Python, on a tiny store; and its links lead somewhere."""

from __future__ import annotations

import math
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
from igstore.cli import module_of
from pipelines import masks_figure
from pipelines.figure import draw

SVG = "{http://www.w3.org/2000/svg}"

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


def table_of_accuracies() -> dict[str, list[float]]:
    """The README's numbers by line, in the order of p = 90, 70, 50, 30."""
    lines = README.partition("| p | 90 | 70 | 50 | 30 |")[2].partition("\n\n")[0].splitlines()[2:]
    return {name.strip(): [float(cell) for cell in cells] for name, *cells in (line.split("|")[1:-1] for line in lines)}


def points(figure: ElementTree.Element) -> dict[str, list[tuple[float, float]]]:
    """The points (p, accuracy) that each line of the figure is drawn through, by its colour."""

    def ends(group: ElementTree.Element) -> list[tuple[float, float]]:
        path = group.find(f"{SVG}path")
        drawn = re.findall(r"[ML] (\S+) (\S+)", "" if path is None else path.get("d"))
        return [(float(x), float(y)) for x, y in drawn]

    axes: dict[str, tuple[list[float], list[float]]] = {"x": ([], []), "y": ([], [])}
    found = {}
    for group in figure.iter(f"{SVG}g"):
        kind = re.search(r"-([xy])tick_\d+$|-(line2d)_\d+$", group.get("id", ""))
        if kind and kind[1]:
            (grid, *_) = (ends(one) for one in group.iter(f"{SVG}g") if ends(one))
            (number,) = (float(text.text) for text in group.iter(f"{SVG}text"))
            axes[kind[1]][0].append(grid[0][0] if kind[1] == "x" else grid[0][1])
            axes[kind[1]][1].append(number)
        elif kind and len(ends(group)) == 4:
            colour = re.search(r"stroke: var\(--c-(\w+)\)", group.find(f"{SVG}path").get("style"))[1]
            found[colour] = ends(group)
    to_p, to_accuracy = (np.polyfit(*axis, 1) for axis in axes.values())
    return {
        colour: [(float(np.polyval(to_p, x)), float(np.polyval(to_accuracy, y))) for x, y in line]
        for colour, line in found.items()
    }


def test_the_figure_shows_the_numbers_of_the_table():
    figure = ElementTree.parse(ROOT / "pipelines" / "figures" / "accuracy.svg").getroot()
    lines, table = points(figure), table_of_accuracies()
    for colour, name in (("d55e00", "keep top"), ("0072b2", "keep bottom")):
        drawn = np.array(sorted(lines[colour], reverse=True))
        np.testing.assert_allclose(drawn, np.transpose([[90, 70, 50, 30], table[name]]), atol=0.051)  # one decimal


def test_the_words_say_the_numbers_of_the_table():
    table = table_of_accuracies()
    top, bottom, visible = (table[name] for name in ("keep top", "keep bottom", "pixels in the top set, %"))
    said = re.sub(r"\s+", " ", README)
    assert f"from {top[0]:.0f} to {top[3]:.0f} percent with the top p% shown" in said
    assert f"from {bottom[0]:.0f} to {bottom[3]:.0f} with it hidden" in said
    shown, rest = math.floor(visible[0] + 0.5), math.floor(100 - visible[3] + 0.5)
    assert f"The {shown}% of the pixels that hold 90% of the attribution are worth {top[0]:.0f}% top-1" in said
    assert f"the {rest}% of the pixels that hold the last 70% are worth {bottom[3]:.0f}%" in said
    assert f"here they are {top[2]}% and {bottom[2]}%" in said


def test_the_picture_of_masks_is_what_the_code_draws():
    pytest.importorskip("timm")
    try:
        drawn = masks_figure.draw()
    except igstore.IgstoreError as error:
        pytest.skip(str(error))  # the weights are a package of their own
    committed = Image.open(ROOT / "pipelines" / "figures" / "masks.png")
    assert committed.size == drawn.size
    difference = np.abs(np.asarray(committed, np.int16) - np.asarray(drawn, np.int16))
    assert difference.mean() < 1  # rounding elsewhere may change a few blocks; another picture differs by 30 and more


def test_the_figure_is_drawn_from_an_evaluation(here, tmp_path):
    igstore.evaluate("resnet50.zarr", p=[90, 50], out=tmp_path / "found")
    drawn = ElementTree.fromstring(draw(tmp_path / "found"))
    committed = ElementTree.parse(ROOT / "pipelines" / "figures" / "accuracy.svg").getroot()
    for figure in (drawn, committed):
        assert figure.tag == f"{SVG}svg"
        words = set(" ".join(figure.itertext()).split())
        assert {"90", "50", "top-1", "unmasked"} <= words
        assert "prefers-color-scheme:" in " ".join(words)
