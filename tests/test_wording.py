"""Mistakes are named as whoever makes them knows things: options on the command line, parameters in Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from networks import Smooth
from PIL import Image
from stores import make_store
from torch import nn

import igstore
from igstore import Preprocessing, build_store, classifier_from_module, cli, store_info
from igstore.__main__ import main
from igstore.cli import COMMANDS, module_of
from igstore.errors import IgstoreError, UserError, call, command_line, option
from igstore.images import find_images

NETWORK = "networks:Smooth"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with photographs, a store of their model without pixels, and an unlabelled folder."""
    for number in range(3):
        home = tmp_path / "photographs" / "n01440764"
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((30, 30, 3), 60 * number, np.uint8)).save(home / f"p{number}.png")
    (tmp_path / "flat").mkdir()
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(tmp_path / "flat" / "one.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    make_store(tmp_path / "bare.zarr", 4, pixels=False)
    make_store(tmp_path / "toy.zarr", 4)
    np.save("maps.npy", np.zeros((3, 24, 24), np.float32))
    return tmp_path


def said(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says of a mistake, in one line."""
    capsys.readouterr()
    assert cli.run(_dispatch, arguments.split()) == cli.MISUSED
    err = capsys.readouterr().err
    notes = [line for line in err.splitlines() if line.startswith("maps in the order of")]
    assert err.count("\n") == 1 + len(notes), err
    return err


def _dispatch(argv: Any) -> int:
    return int(module_of(argv[0]).main(argv[1:]))


BUILD = f"build --model {NETWORK} --data photographs --crop 24"

# A command line, and what it must say
MISTAKES = {
    "evaluate bare.zarr --models networks:Smooth": "give --images PATH",
    "show bare.zarr": "give --images PATH",
    "curves bare.zarr": "give --images PATH",
    f"{BUILD} --n-steps 40000": "--n-steps is 40000",
    f"{BUILD} --seed -3": "--seed is -3",
    f"{BUILD} --device tpu": "--device is 'tpu'",
    f"{BUILD} --precision tf32 --device cpu": "--precision tf32 is",
    f"{BUILD} --part 9/8": "--part is 9/8",
    f"{BUILD} --part nine": "--part is 'nine'",
    f"{BUILD} --part 1/2 --overwrite": "--overwrite and --part 1/2 do not go together",
    f"{BUILD} --resize 3": "--resize is 3 and --crop 24x24",
    f"{BUILD} --shard-size 9999999": "--shard-size is 9999999",
    f"{BUILD} --weights nowhere.pth": "nowhere.pth",
    f"build --model {NETWORK} --data flat --crop 24 --target label": "which --target label needs; give --labels, or",
    f"build --model {NETWORK} --data photographs --store flat --crop 24": "give another --store, or remove it",
    "build --model resnet50 --weights nowhere --data photographs": "--weights is 'nowhere'",
    f"import maps.npy --made-by x --images photographs --model {NETWORK} --crop 25": "the maps are 24x24 pixels",
    f"import maps.npy --made-by x --images photographs --model {NETWORK} --crop 24 --reduce none": "--reduce is none",
    "rank toy.zarr --block 9999999999": "--block is 9999999999",
    "show toy.zarr --p 101": "--p is 101",
    "show toy.zarr --image nobody": "has no image 'nobody'",
    "show toy.zarr --out picture.jpg": "--out is picture.jpg",
    "evaluate toy.zarr --p 101 --models networks:Smooth": "--p is 101",
    f"evaluate toy.zarr --models {NETWORK} --weights a b": "2 weights for 1 models",
    "evaluate toy.zarr": "give --weights for it, or name a model yourself: --models",
    "evaluate toy.zarr --device tpu": "--device is 'tpu'",
    "curves toy.zarr --steps 9999": "--steps is 9999",
    "report photographs --out page.pdf": "--out is page.pdf",
    "export toy.zarr out.h5 --format hdf5 --compress zstd": "--compress does not go with --format hdf5",
    "export toy.zarr toy.zarr": "toy.zarr",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=str)
def test_messages_on_the_command_line_name_its_options(arguments, here, capsys):
    line = said(arguments, capsys)
    assert MISTAKES[arguments] in line
    parser = module_of(arguments.split()[0]).parser()
    for action in parser._actions:  # and never what Python calls them
        if action.option_strings and "_" in action.dest:
            assert f" {action.dest} " not in f" {line} "
        assert f" {action.dest}=" not in line


def in_python(here: Path) -> dict[str, tuple[Callable[[], object], str]]:
    images = find_images("photographs")
    small = Preprocessing(crop=24)
    net = Smooth().eval()
    return {
        "pixels": (lambda: igstore.masked_view("bare.zarr"), "give images=PATH"),
        "target": (
            lambda: build_store(net, find_images("flat"), "x.zarr", preprocessing=small, target="label"),
            "which target=label needs; give labels, or target=prediction",
        ),
        "steps": (lambda: build_store(net, images, "x.zarr", preprocessing=small, n_steps=0), "^n_steps is 0"),
        "store": (lambda: build_store(net, images, "flat", preprocessing=small), "give another store, or remove it"),
        "p": (lambda: igstore.keep_mask("toy.zarr", p=101), "^p is 101"),
        "weights": (lambda: igstore.load_classifier("resnet50", "nowhere"), "^weights is 'nowhere'"),
        "labels": (lambda: find_images("flat", labels=here / "none.csv"), "cannot be read"),
    }


@pytest.mark.parametrize("mistake", ["pixels", "target", "steps", "store", "p", "weights", "labels"])
def test_messages_in_python_name_its_parameters(mistake, here):
    function, message = in_python(here)[mistake]
    cli.run(module_of("show").main, ["toy.zarr", "--p", "101"])  # leaves nothing behind
    with pytest.raises(UserError, match=message) as caught:
        function()
    assert "--" not in str(caught.value)


def test_names_are_those_of_the_command_that_runs():
    with command_line():
        call({"images": "--data"})
        with command_line():
            assert option("images") == "images"
            call({"images": "--images"})
            assert option("images", "PATH") == "--images PATH"
        assert option("images") == "--data"
    assert option("images", "PATH") == "images=PATH"
    call({"images": "--data"})  # no command runs
    assert option("images") == "images"


# --- Options that are none


@pytest.mark.parametrize(
    ("arguments", "given", "meant"),
    [
        ("build", "--modl", "--model"),
        ("build --model resnet50 --data .", "--n-step", "--n-steps"),
        ("build --model resnet50 --data .", "--n_steps", "--n-steps"),
        ("build --model resnet50 --data .", "--nsteps=5", "--n-steps"),
        ("build --model resnet50", "--images", "--data"),
        ("build --model resnet50 --data .", "--overwrit", "--overwrite"),
        ("build --model resnet50 --data .", "--Crop", "--crop"),
        ("evaluate toy.zarr", "--model", "--models"),
        ("evaluate toy.zarr", "--ouput", "--out"),
        ("show toy.zarr", "--images-of", "--images"),
        ("import maps.npy", "--madeby", "--made-by"),
        ("verify toy.zarr", "--images", "--data"),
        ("rank toy.zarr", "--blocks", "--block"),
        ("report out", "--stores", "--store"),
        ("curves toy.zarr", "--step", "--steps"),
        ("export toy.zarr x", "--formt", "--format"),
        ("merge a b", "--output", "--out"),
        ("info toy.zarr", "--jsn", "--json"),
    ],
    ids=str,
)
def test_a_slip_of_the_pen_is_understood(arguments, given, meant, here, capsys):
    line = said(f"{arguments} {given} 5", capsys)
    assert f"there is no option {given.partition('=')[0]}; did you mean {meant}?" in line


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_what_is_like_nothing_gets_no_guess(command, capsys, here):
    assert "there is no option --zzz (`igstore" in said(f"{command} --zzz", capsys)


def test_negative_numbers_and_what_follows_two_dashes_are_no_options(here, capsys):
    assert (
        cli.run(module_of("show").main, ["--seed", "-5", "--order", "random", "--p", "50", "--", "toy.zarr"])
        == cli.DONE
    )
    assert main(["info", "--", "--no-such-store.zarr"]) == cli.MISUSED
    assert "there is no store at --no-such-store.zarr" in capsys.readouterr().err


# --- What is at hand is looked at before anything is fetched


@pytest.mark.parametrize(
    "arguments",
    [
        "build --model resnet50 --data nowhere --dry-run",
        "build --model resnet50 --data nowhere",
        "build --model resnet50 --data photographs --device cuda:99",
        "import maps.npy --made-by x --images nowhere --model resnet50",
        "evaluate toy.zarr --models resnet50 --images nowhere",
        "evaluate toy.zarr --models resnet50 --score absolute",
        "curves toy.zarr --model resnet50 --images nowhere",
    ],
    ids=str,
)
def test_nothing_is_fetched_for_what_cannot_work(arguments, here, monkeypatch, capsys):
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("too early")

    monkeypatch.setattr("igstore.models.loading.load_classifier", fetch)
    assert cli.run(_dispatch, arguments.split()) == cli.MISUSED
    assert capsys.readouterr().err.startswith("igstore: ")


class Counting(BaseHTTPRequestHandler):
    """Breaks off whatever is asked, and counts."""

    asked = 0

    def handle(self) -> None:
        type(self).asked += 1

    def log_message(self, *_: object) -> None:
        pass


def test_timm_without_a_network_is_one_line_at_once(here):
    pytest.importorskip("timm")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(here / "hf")}
    environment = {name: value for name, value in environment.items() if "proxy" not in name.lower()} | {
        "PYTHONPATH": os.pathsep.join([str(Path(igstore.__file__).parents[1])])
    }
    command = [sys.executable, "-m", "igstore", "build", "--model", "timm:resnet10t", "--data", "photographs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    server.shutdown()
    server.server_close()
    assert done.returncode == cli.MISUSED
    assert done.stderr.count("\n") == 1
    assert "timm:resnet10t's weights are not on this machine, and " in done.stderr
    assert "give --weights /path/to/model.safetensors" in done.stderr
    assert Counting.asked <= 2


# --- What is taken for what it plainly is


def test_a_device_and_weights_of_torch_s_own(here):
    info = build_store(
        Smooth().eval(),
        find_images("photographs"),
        "x.zarr",
        preprocessing=Preprocessing(crop=24),
        n_steps=1,
        device=torch.device("cpu"),
    )
    assert info.n_built == 3
    enum = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    with pytest.raises(IgstoreError, match="IMAGENET1K_V1") as caught:
        igstore.load_classifier("squeezenet1_1", enum) and pytest.skip("the weights are here")
    assert "squeezenet1_1's weights IMAGENET1K_V1" in str(caught.value)
    with pytest.raises(
        UserError, match=r"weights is 'SqueezeNet1_1_Weights.IMAGENET1K_V1', which is no file; for resnet18"
    ):
        igstore.load_classifier("resnet18", enum)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "store": (lambda: igstore.open_store(3), "the store is a int; it must be a path, a URL or a StoreReader"),
    "a data set for a store": (lambda: igstore.evaluate(igstore.open_store("toy.zarr")), "stores is a Dataset"),
    "out": (lambda: igstore.export_store("toy.zarr", None), "out is None; it must be a path"),
    "image numbers": (
        lambda: igstore.show_store("toy.zarr", [0, 1]),
        r"image is \[0, 1\]; it must be ids of images, such as",
    ),
    "an image number": (lambda: igstore.show_store("toy.zarr", 0), "image is 0; it must be ids"),
    "stores": (lambda: igstore.merge_stores("toy.zarr", "x"), "one store cannot be merged"),
    "preprocessing": (
        lambda: classifier_from_module(nn.Identity(), preprocessing=torchvision.transforms.CenterCrop(3)),  # type: ignore[arg-type]
        "preprocessing is a CenterCrop; it must be igstore.Preprocessing",
    ),
    "a network by name": (
        lambda: igstore.load_classifier(nn.Identity()),
        "the model is a Identity.*classifier_from_module",
    ),
    "a state dict": (lambda: igstore.load_classifier("resnet18", {}), "weights is a dict.*classifier_from_module"),
    "device": (lambda: igstore.evaluate("toy.zarr", models=[nn.Identity()], device=3), "device is 3; it must be auto"),
    "batches' device": (
        lambda: igstore.MaskedBatches("toy.zarr", [igstore.MaskOptions()], device="gpu"),
        "device is 'gpu'; it must be one of torch's",
    ),
    "cells": (lambda: igstore.MaskedBatches("toy.zarr", [50]), "it must be MaskOptions, or several in a list"),
    "models": (
        lambda: igstore.evaluate("toy.zarr", models=3),
        "models is 3; it must be a name, a Classifier or a network",
    ),
    "targets": (
        lambda: igstore.integrated_gradients(nn.Flatten(), torch.rand(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), 2),
        "targets must be class indices, int64",
    ),
    "inputs": (
        lambda: igstore.integrated_gradients(
            nn.Flatten(), np.zeros((1, 3, 4, 4)), torch.zeros(1, 3, 4, 4), torch.tensor([1])
        ),
        "inputs must be a floating-point tensor",
    ),
    "baselines": (
        lambda: igstore.integrated_gradients(
            nn.Flatten(), torch.rand(1, 3, 4, 4), torch.zeros(3, 4, 4), torch.tensor([1])
        ),
        "baselines must be a floating-point tensor",
    ),
    "images": (lambda: find_images(None), "images is None; it must be a path"),
    "made_by": (
        lambda: igstore.import_maps(np.zeros((1, 4, 4)), nn.Identity(), [], "x", made_by=None),
        "made_by is None",
    ),
    "part": (
        lambda: build_store(
            Smooth().eval(), find_images("photographs"), "x", preprocessing=Preprocessing(crop=24), part=2
        ),
        "part is 2",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_it_plainly_is_not(what, here):
    function, message = WRONG[what]
    with pytest.raises(UserError, match=message):
        function()


def test_one_for_a_list_of_one(here):
    one = igstore.show_store("toy.zarr", ["image_0001"], p=50)
    ids = igstore.open_store("toy.zarr").image[[1]]
    assert igstore.show_store("toy.zarr", ids, p=50).tobytes() == one.tobytes()
    assert igstore.MaskedBatches("toy.zarr", igstore.MaskOptions(), networks=Preprocessing(crop=24))


# --- Work that is kept


def test_work_that_an_interruption_keeps_is_said(here, capsys):
    class Tired(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.left = Smooth().eval(), 60

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.left -= len(x)
            if self.left < 0:
                raise KeyboardInterrupt
            return self.inner(x)

    images = [(f"p{n}", np.full((20, 20, 3), n, np.uint8), None) for n in range(8)]
    settings: dict[str, Any] = {
        "preprocessing": Preprocessing(crop=20),
        "n_steps": 100,
        "device": "cpu",
        "batch_size": 10,
    }
    tired = Tired()
    tired.left = 650
    with pytest.raises(KeyboardInterrupt):
        build_store(tired, images, "work.zarr", **settings)
    info = store_info("work.zarr")
    assert info.n_built == 0
    assert 0 < info.n_kept < 8
    assert main(["info", "work.zarr"]) == cli.DONE
    assert f"kept         {info.n_kept} of the missing images are done" in capsys.readouterr().out
    assert main(["info", "work.zarr", "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["n_kept"] == info.n_kept
