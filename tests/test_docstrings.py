"""What the docstrings say: everything public is described, and every example in the package gives what it says."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import igstore

PACKAGE = Path(igstore.__file__).parent
WITH_EXAMPLES = sorted(path.stem for path in PACKAGE.glob("*.py") if ">>>" in path.read_text())
WITHOUT_EXAMPLE = {
    "Classifier": "its functions have",
    "IgstoreError": "a base class",
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where the examples are: a folder with the store that they read, and with two labelled photographs."""
    random = np.random.default_rng(0)
    pictures = [
        (f"picture_{index}", Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)), index)
        for index in range(4)
    ]
    igstore.build_store(igstore.load_classifier("networks:Smooth", crop=24), pictures, tmp_path / "toy.zarr", n_steps=2)
    for wnid, name in (("n02123045", "cat"), ("n02109961", "dog")):
        (tmp_path / "photographs" / wnid).mkdir(parents=True)
        pictures[0][1].save(tmp_path / "photographs" / wnid / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name, place):
    module = importlib.import_module(f"igstore.{name}")
    tests = [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]
    assert tests
    said: list[str] = []
    for test in tests:
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("name", igstore.__all__)
def test_everything_public_is_described(name):
    thing = getattr(igstore, name)
    said = inspect.getdoc(thing) or ""
    parameters = inspect.signature(thing).parameters
    if not issubclass(thing, Exception) if inspect.isclass(thing) else True:
        missing = [one for one in parameters if f"{one}" not in said.replace(",", " ").split()]
        assert not missing
    assert (">>>" in said) != (name in WITHOUT_EXAMPLE)
