"""What the docstrings say: everything public is described, and every example in the package gives what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import igstore

PACKAGE = Path(igstore.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>>" in path.read_text()
)
WITHOUT_EXAMPLE = {
    "Classifier": "its functions have",
    "Evaluation": "evaluate has",
    "IgstoreError": "a base class",
    "StoreInfo": "store_info has",
    "merge_stores": "two stores are no short example",
}
RESULTS = {"Evaluation", "StoreInfo"}  # made by igstore: their attributes are described
CANNOT_FAIL = {"Classifier", *RESULTS}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where the examples are: a folder with the store that they read, and with two labelled photographs."""
    random = np.random.default_rng(0)
    pictures = [
        (f"picture_{index}", Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)), index)
        for index in range(4)
    ]
    classifier = igstore.load_classifier("shufflenet_v2_x0_5", "random", crop=24)
    igstore.build_store(classifier, pictures, tmp_path / "toy.zarr", n_steps=2)
    for wnid, name in (("n02123045", "cat"), ("n02109961", "dog")):
        (tmp_path / "photographs" / wnid).mkdir(parents=True)
        pictures[0][1].save(tmp_path / "photographs" / wnid / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name, place):
    module = importlib.import_module(name)
    tests = [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]
    assert tests
    said: list[str] = []
    for test in tests:
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert not said, "".join(said)


def entries(said: str, section: str) -> list[str]:
    """The names that a section of a NumPy docstring describes, each with a line of description at least."""
    _, _, rest = said.partition(f"\n{section}\n{'-' * len(section)}\n")
    text, *_ = re.split(r"\n\n(?=\S.*\n---)|\n\n>>>", rest)
    names: list[str] = []
    for heading, described in re.findall(r"^(\w[^\n]*)\n((?:    .*\n?|\n(?=    ))*)", text, re.MULTILINE):
        assert described.strip(), f"{heading} is not described"
        names += heading.split(", ")
    return names


@pytest.mark.parametrize("name", igstore.__all__)
def test_everything_public_is_described(name):
    thing = getattr(igstore, name)
    said = inspect.getdoc(thing) or ""
    if not (inspect.isclass(thing) and issubclass(thing, Exception)):
        section = "Attributes" if name in RESULTS else "Parameters"
        assert sorted(entries(said, section)) == sorted(inspect.signature(thing).parameters)
        assert bool(entries(said, "Raises")) != (name in CANNOT_FAIL)
    assert (">>>" in said) != (name in WITHOUT_EXAMPLE)


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("A sum.\n\nParameters\n----------\nfirst\n    One.\n\nRaises\n------\nUserError\n    No.", ["first"]),
        ("A sum.\n\nParameters\n----------\nfirst, second\n    Both.", ["first", "second"]),
        ("A sum of first and second.", []),
    ],
)
def test_only_what_has_an_entry_counts_as_described(said, fault):
    assert entries(said, "Parameters") == fault


def test_the_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    pytest.importorskip("furo")
    root = PACKAGE.parent
    pages = shutil.copytree(root, tmp_path / "checkout", ignore=only_what_pages_are_made_of)
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "pipelines/docs", "site"]
    done = subprocess.run(sphinx, cwd=pages, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    page = (pages / "site" / "api.html").read_text()
    for name in igstore.__all__:
        assert f'{name}"' in page, f"api.md does not list {name}"


def only_what_pages_are_made_of(folder: str, names: list[str]) -> list[str]:
    """For `copytree`: leave out what is hidden, what tests and builds leave behind, and what is large."""
    left_out = {"tests", "demo", "site", "notebooks", "build", "__pycache__"}
    return [name for name in names if name in left_out or name.startswith(".") or name.endswith(".zarr")]
