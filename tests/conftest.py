"""What all tests share: where real images are, if they are here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from igstore.machine import kernels_allowed

IMAGENET = Path(os.environ.get("IGSTORE_TEST_IMAGES") or Path(__file__).resolve().parents[2] / "shared" / "imagenet")


def folder_of_images(name: str) -> Path:
    """A folder of real images; the test is skipped where it is absent."""
    folder = IMAGENET / name
    if not folder.is_dir():
        pytest.skip(f"needs the folder {name} in $IGSTORE_TEST_IMAGES, or in ../shared/imagenet")
    return folder


@pytest.fixture(scope="session")
def imagenet_val() -> Path:
    """Real validation images, ``<wnid>/*.JPEG``, 227x227."""
    return folder_of_images("val")


@pytest.fixture(scope="session")
def imagenet_originals() -> Path:
    """Real files as found in the wild, ``<wnid>/*.JPEG``."""
    return folder_of_images("originals")


@pytest.fixture(params=["1", "0"], ids=["kernels", "no kernels"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled kernels, where they are, and without."""
    if request.param == "1" and not kernels_allowed():
        pytest.skip("IGSTORE_KERNELS=0 rules them out")
    monkeypatch.setenv("IGSTORE_KERNELS", request.param)
