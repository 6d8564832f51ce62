"""Names that a store records choose no code and no file: what a user has not typed is neither imported nor read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stores import make_store

import igstore
from igstore import UserError, cli, evaluate, insertion_deletion, verify_store
from igstore.__main__ import main

CODE = """
from pathlib import Path
import torch

Path(__file__).with_name("it has run").touch()

def network():
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 5)).eval()
"""


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: what somebody has sent, unpacked."""
    (tmp_path / "readme.py").write_text(CODE)
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text(CODE)
    (tmp_path / "package/inner.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("readme", "package", "package.inner"):
        sys.modules.pop(name, None)


def ran(archive: Path) -> list[Path]:
    return [*archive.rglob("it has run"), *archive.rglob("*.pyc")]


OPTIONS = {"evaluate": "--models", "curves": "--model", "verify": "--model"}
COMMANDS: dict[str, list[str]] = {
    "evaluate": ["evaluate", "shared.zarr"],
    "curves": ["curves", "shared.zarr"],
    "verify": ["verify", "shared.zarr", "--recompute", "1"],
}


@pytest.mark.parametrize("name", ["readme:network", "package:network", "package.inner:network", "os:getcwd"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_store_s_own_code_is_not_run_and_one_is_told_what_to_type(archive, capsys, command, name):
    make_store(archive / "shared.zarr", 4, model=name)
    assert main(COMMANDS[command]) == cli.MISUSED
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{OPTIONS[command]} {name}" in said
    assert "no store chooses code" in said
    assert ran(archive) == []
    assert not {"readme", "package"} & sys.modules.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_user_types_is_run(archive, command):
    make_store(archive / "shared.zarr", 4, model="readme:network")
    main([*COMMANDS[command], OPTIONS[command], "readme:network"])
    assert (archive / "it has run").exists()


# Everything else that opens a store whose model is code, and which therefore does not need it.
OTHERS = [
    ["info", "shared.zarr"],
    ["verify", "shared.zarr"],
    ["rank", "shared.zarr", "--score", "absolute"],
    ["show", "shared.zarr", "--p", "50"],
    ["view", "shared.zarr", "--save", "page"],
    ["export", "shared.zarr", "copy.zarr"],
    ["merge", "shared.zarr", "shared.zarr", "--out", "merged.zarr"],
]


@pytest.mark.parametrize("argv", OTHERS, ids=lambda argv: argv[0])
def test_other_commands_never_look_for_it(archive, argv):
    make_store(archive / "shared.zarr", 4, model="readme:network")
    # made-up maps are no model's, which verify says
    assert main([*argv, "--quiet"]) == (cli.FAILED if argv[0] == "verify" else cli.DONE)
    assert ran(archive) == []


ACTS: dict[str, Callable[[Path], object]] = {
    "evaluate": lambda path: evaluate(path, p=50),
    "curves": lambda path: insertion_deletion(path, steps=1),
    "verify": lambda path: verify_store(path, recompute=1),
}


@pytest.mark.parametrize("weights", ["trained.pth", "{here}/trained.pth", "../{name}/trained.pth", "trained"])
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_a_store_s_weights_are_no_file_of_this_machine(archive, monkeypatch, act, weights):
    """Though one of that name holds the very weights that the store records."""
    classifier = igstore.load_classifier("shufflenet_v2_x0_5", "random:3")
    for name in ("trained.pth", "trained"):
        torch.save(classifier.network.state_dict(), archive / name)
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(archive / "hub"))
    read = []
    monkeypatch.setattr(
        "igstore.models.sources.load_weights", lambda network, file, name: read.append(file) or "0" * 64
    )
    recorded = weights.format(here=archive, name=archive.name)
    path = make_store(archive / "shared.zarr", 4, model="shufflenet_v2_x0_5", weights=recorded)
    with pytest.raises(UserError, match="give weights"):
        act(path)
    assert read == []
