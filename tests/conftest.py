"""What all tests share: where real images are, if they are here."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def imagenet_val() -> Path:
    """Real validation images, ``<wnid>/*.JPEG``, 227x227."""
    folder = SHARED / "imagenet" / "val"
    if not folder.is_dir():
        pytest.skip("needs ../shared/imagenet/val")
    return folder


@pytest.fixture(scope="session")
def imagenet_originals() -> Path:
    """Real files as found in the wild, ``<wnid>/*.JPEG``."""
    folder = SHARED / "imagenet" / "originals"
    if not folder.is_dir():
        pytest.skip("needs ../shared/imagenet/originals")
    return folder
