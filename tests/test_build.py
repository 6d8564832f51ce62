from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import xarray as xr
from captum.attr import IntegratedGradients
from networks import Smooth
from PIL import Image
from torch import nn
from torchvision import transforms

from igstore import Preprocessing, build_store, classifier_from_module, cli, load_classifier, store_info
from igstore.build import main
from igstore.errors import SettingsMismatchError, UserError
from igstore.storage import StoreReader

N_CLASSES = 7
PREPROCESSING = Preprocessing(resize=18, crop=(16, 16))
SETTINGS = {"preprocessing": PREPROCESSING, "n_steps": 40, "shard_size": 8, "rank": False}


def random_images(n: int) -> list[tuple[str, np.ndarray, int]]:
    random = np.random.default_rng(0)
    return [(f"image_{i:03d}", random.integers(0, 256, (20, 22, 3), dtype=np.uint8), i % N_CLASSES) for i in range(n)]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return Smooth(N_CLASSES).eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.zarr"


def assert_same(left: Path, right: Path, *, places: slice = slice(None)) -> None:
    one, other = xr.open_zarr(left), xr.open_zarr(right)
    assert set(one.variables) == set(other.variables)
    for name in other.variables:
        np.testing.assert_array_equal(one[name][places], other[name][places], err_msg=str(name))


def reference_inputs(images) -> torch.Tensor:
    """What torchvision's own pipeline makes of the images."""
    pipeline = transforms.Compose(
        [
            transforms.Resize(18),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize(PREPROCESSING.mean, PREPROCESSING.std),
        ]
    )
    return torch.stack([pipeline(Image.fromarray(pixels)) for _, pixels, _ in images])


def test_a_store_holds_what_captum_and_torchvision_say(path, network):
    images = random_images(11)
    info = build_store(network, images, path, **SETTINGS, baseline="mean")
    store = xr.open_zarr(path)
    x = reference_inputs(images)
    with torch.no_grad():
        logits = network(x)
    prediction = logits.argmax(1)
    # captum's default baseline, zero after normalisation, is the mean colour
    captum = IntegratedGradients(network).attribute(x, target=prediction, n_steps=40, method="riemann_right").sum(1)
    ours = store["attribution"].astype("float32") * store["scale"]
    largest = captum.abs().amax((1, 2))
    # float16 keeps 11 bits of values up to the largest, and float32 sums differ by less
    np.testing.assert_allclose(ours / largest.numpy()[:, None, None], captum / largest[:, None, None], atol=2.0**-11)
    np.testing.assert_array_equal(store["prediction"], prediction)
    np.testing.assert_array_equal(store["target"], prediction)
    np.testing.assert_allclose(store["output"], logits.amax(1), rtol=1e-5)
    zero = torch.zeros(1, 3, 16, 16)
    with torch.no_grad():
        np.testing.assert_allclose(store["baseline_output"], network(zero)[0][prediction], rtol=1e-5)
    np.testing.assert_array_equal(store["label"], [label for _, _, label in images])
    pixels = [transforms.CenterCrop(16)(transforms.Resize(18)(Image.fromarray(image))) for _, image, _ in images]
    np.testing.assert_array_equal(store["pixels"], np.stack([np.asarray(image).transpose(2, 0, 1) for image in pixels]))
    top5 = logits.topk(5).indices == torch.tensor([label for _, _, label in images])[:, None]
    assert info.top5 == pytest.approx(100 * top5.any(1).float().mean().item())
    assert info.top1 == pytest.approx(100 * (prediction == torch.tensor(store["label"].values)).float().mean().item())
    assert (info.n_built, info.n_failed, info.n_missing) == (11, 0, 0)
    assert info.evaluations == 11 * 40


@pytest.mark.parametrize(
    ("baseline", "value"), [("black", 0.0), ("white", 255.0), ("mean", None)], ids=["black", "white", "mean"]
)
def test_baselines_are_named_in_pixel_space(path, network, baseline, value):
    build_store(network, random_images(2), path, **SETTINGS, baseline=baseline)
    mean, std = (torch.tensor(values)[:, None, None] for values in (PREPROCESSING.mean, PREPROCESSING.std))
    colour = mean if value is None else torch.full((3, 1, 1), value / 255)
    b = ((colour - mean) / std).expand(3, 16, 16)
    with torch.no_grad():
        expected = network(b[None])[0]
    store = xr.open_zarr(path)
    np.testing.assert_allclose(store["baseline_output"], expected[store["target"].values], rtol=1e-4, atol=1e-5)


def test_a_noise_baseline_depends_on_the_seed_and_the_image_alone(tmp_path, network):
    images = random_images(6)
    for name, chosen, seed in (("all", images, 0), ("some", images[3:], 0), ("other", images, 1)):
        build_store(network, chosen, tmp_path / name, **SETTINGS, baseline="noise", seed=seed)
    everything, some, other = (
        xr.open_zarr(tmp_path / name)["baseline_output"].values for name in ("all", "some", "other")
    )
    np.testing.assert_allclose(everything[3:], some, rtol=1e-5)
    assert (everything != other).all()


def test_the_label_is_attributed_on_request(path, network):
    build_store(network, random_images(9), path, **SETTINGS, target="label")
    store = xr.open_zarr(path)
    np.testing.assert_array_equal(store["target"], store["label"])
    assert (store["target"] != store["prediction"]).any()


@pytest.mark.parametrize("reduce", ["positive", "absolute", "none"])
def test_reductions(tmp_path, network, reduce):
    build_store(network, random_images(3), tmp_path / "none", **SETTINGS, reduce="none")
    whole = xr.open_zarr(tmp_path / "none")
    assert whole["attribution"].dims == ("image", "channel", "y", "x")
    if reduce == "none":
        return
    build_store(network, random_images(3), tmp_path / "reduced", **SETTINGS, reduce=reduce)
    reduced = xr.open_zarr(tmp_path / "reduced")
    values = whole["attribution"].astype("float64") * whole["scale"]
    expected = (values.clip(min=0) if reduce == "positive" else abs(values)).sum("channel")
    ours = reduced["attribution"].astype("float64") * reduced["scale"]
    # three values and their sum, each rounded to float16's 11 bits of at most the map's largest value
    largest = expected.max(("y", "x"))
    assert float((abs(ours - expected) / largest).max()) < 4 * 2.0**-11


def test_without_pixels_the_store_has_none(path, network):
    build_store(network, random_images(3), path, **SETTINGS, pixels=False)
    assert "pixels" not in xr.open_zarr(path)
    assert not (path / "pixels").exists()


def test_any_image_list_and_any_number_of_classes(tmp_path, network):
    """A torchvision data set gives the store that the same images give as a sequence."""
    images = random_images(14)
    root = tmp_path / "folder"
    for name, pixels, label in images:
        home = root / f"class_{label}"
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(home / f"{name}.png")
    build_store(network, torchvision.datasets.ImageFolder(root), tmp_path / "dataset", **SETTINGS)
    build_store(network, images, tmp_path / "sequence", **SETTINGS)
    assert_same(tmp_path / "dataset", tmp_path / "sequence")


def test_a_bare_network_sees_the_images_as_they_are(path, network):
    images = random_images(2)
    build_store(network, images, path, n_steps=2, rank=False)
    np.testing.assert_array_equal(xr.open_zarr(path)["pixels"][1], images[1][1].transpose(2, 0, 1))


@pytest.mark.parametrize("rank", [True, False])
def test_ranks_are_made_on_request(path, network, rank):
    build_store(network, random_images(3), path, **SETTINGS | {"rank": rank})
    assert (path / "ranks/positive-3/rank/zarr.json").exists() == rank


class TestGoingOn:
    def test_a_finished_build_does_nothing(self, path, network):
        build_store(network, random_images(9), path, **SETTINGS)
        before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
        build_store(network, random_images(9), path, **SETTINGS)
        assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()} == before

    def test_a_larger_limit_extends_the_store(self, tmp_path, network):
        images = random_images(21)
        build_store(network, images, tmp_path / "grown", **SETTINGS, limit=11)
        kept = (tmp_path / "grown/attribution/c/0/0/0").stat().st_mtime_ns
        build_store(network, images, tmp_path / "grown", **SETTINGS)
        build_store(network, images, tmp_path / "whole", **SETTINGS)
        assert_same(tmp_path / "grown", tmp_path / "whole")
        assert (tmp_path / "grown/attribution/c/0/0/0").stat().st_mtime_ns == kept

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"n_steps": 41}, "n_steps is 40 there and 41 here"),
            ({"baseline": "white"}, "baseline"),
            ({"target": "label"}, "target"),
            ({"output": "probability"}, "output"),
            ({"method": "gausslegendre"}, "method"),
            ({"precision": "float16"}, "precision"),
            ({"precision": "mixed"}, "precision"),
            ({"reduce": "absolute"}, "reduce"),
            ({"pixels": False}, "pixels"),
            ({"shard_size": 9}, "shard_size"),
            ({"seed": 1}, "seed"),
            ({"preprocessing": Preprocessing(resize=17, crop=(16, 16))}, "resize is 18 there and 17 here"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_other_settings_are_refused_by_name_and_value(self, path, network, change, field):
        build_store(network, random_images(3), path, **SETTINGS)
        before = (path / "zarr.json").read_bytes()
        with pytest.raises(SettingsMismatchError, match=field):
            build_store(network, random_images(3), path, **SETTINGS | change)
        assert (path / "zarr.json").read_bytes() == before

    def test_other_images_and_weights_are_refused(self, path, network):
        build_store(network, random_images(3), path, **SETTINGS)
        with pytest.raises(SettingsMismatchError, match="images_fingerprint"):
            build_store(network, random_images(4), path, **SETTINGS)
        with pytest.raises(SettingsMismatchError, match="weights_sha256"):
            build_store(Smooth(N_CLASSES, seed=1), random_images(3), path, **SETTINGS)

    def test_overwrite_begins_anew_but_removes_nothing_foreign(self, path, network):
        build_store(network, random_images(3), path, **SETTINGS)
        build_store(network, random_images(4), path, **SETTINGS, overwrite=True)
        assert store_info(path).n_images == 4
        (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
        with pytest.raises(UserError):
            build_store(network, random_images(4), path, **SETTINGS, overwrite=True)
        assert path.exists()

    def test_the_callers_network_is_left_alone(self, tmp_path, network):
        mine = Smooth(N_CLASSES).train()
        build_store(mine, random_images(2), tmp_path / "mine", **SETTINGS)
        assert mine.training
        assert all(parameter.requires_grad for parameter in mine.parameters())
        assert_same(tmp_path / "mine", tmp_path / "mine")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A flat folder of labelled PNG files, one of them broken."""
    root = tmp_path / "images"
    root.mkdir()
    with (root / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "class_index"])
        for name, pixels, label in random_images(40):
            Image.fromarray(pixels).save(root / f"{name}.png")
            table.writerow([f"{name}.png", label])
    (root / "image_003.png").write_bytes(b"not a picture")
    return root


COMMAND = ["--model", "networks:demo_network", "--crop", "16", "--resize", "18", "--n-steps", "40", "--shard-size", "8"]


class TestCommand:
    def test_a_broken_image_is_recorded_and_tried_again(self, folder, path, capsys, monkeypatch):
        monkeypatch.chdir(Path(__file__).parent)
        arguments = [*COMMAND, "--data", str(folder), "--store", str(path)]
        assert main(arguments) == 3
        assert "image_003" in capsys.readouterr().out
        store = StoreReader(path)
        assert store.status.tolist() == [1, 1, 1, 2] + [1] * 36
        assert list(store.failed) == ["image_003"]
        assert main(arguments) == 3  # still broken: nothing changes
        Image.fromarray(random_images(4)[3][1]).save(folder / "image_003.png")
        assert main(arguments) == 0
        whole = path.with_name("whole.zarr")
        assert main([*COMMAND, "--data", str(folder), "--store", str(whole)]) == 0
        # another batch, so float32 rounding: equal to float16's last bit
        one, other = xr.open_zarr(path), xr.open_zarr(whole)
        np.testing.assert_allclose(
            one["attribution"] * one["scale"], other["attribution"] * other["scale"], rtol=2e-3, atol=1e-6
        )
        for name in ("pixels", "status", "prediction"):
            np.testing.assert_array_equal(one[name], other[name])
        assert store_info(path).top5 == store_info(whole).top5

    def test_a_dry_run_writes_nothing_and_says_what_would_be_done(self, folder, path, capsys, monkeypatch):
        monkeypatch.chdir(Path(__file__).parent)
        assert main([*COMMAND, "--data", str(folder), "--store", str(path), "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert "40 of 40 images, 5 shards" in said
        assert "1600 gradient evaluations" in said
        assert not path.exists()

    def test_imagenet_dir_is_enough(self, folder, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(str(Path(__file__).parent))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("IMAGENET_DIR", str(folder))
        assert main([*COMMAND, "--limit", "2"]) == 0
        assert store_info(tmp_path / "networks-demo_network.zarr").n_built == 2

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--model", "resnet51"], "resnet50"),
            (["--model", "resnet50", "--weights", "nowhere.pth"], "nowhere.pth"),
            (["--model", "networks:demo_network", "--n-steps", "0"], "at least 1"),
            (["--model", "networks:demo_network", "--method", "simpson"], "riemann_right"),
            (["--model", "networks:demo_network", "--crop", "16", "--device", "tpu"], "cuda:N"),
            (["--model", "networks:demo_network", "--crop", "16", "--precision", "tf32"], "float32"),
            (["--model", "networks:demo_network", "--crop", "16", "--data", "/nowhere"], "/nowhere"),
            (["--model", "networks:demo_network", "--resize", "10", "--crop", "16"], "give --resize 16 or more"),
            (["--model", "networks:demo_network", "--crop", "257"], "give --resize 257 or more"),
            (["--model", "networks:demo_network", "--frobnicate"], "--frobnicate"),
            ([], "--model"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_a_mistake_is_one_line_and_status_2(self, folder, path, arguments, says, capsys, monkeypatch):
        given = [*arguments] if "--data" in arguments else [*arguments, "--data", str(folder)]
        monkeypatch.syspath_prepend(str(Path(__file__).parent))
        assert cli.run(main, [*given, "--store", str(path)]) == 2
        message = capsys.readouterr().err
        assert says in message
        # where data is looked for and not found, the rest says how to lay it out
        assert len(message.strip().splitlines()) == 1 or says == "/nowhere"
        assert not path.exists()

    def test_the_module_is_the_command(self):
        done = subprocess.run([sys.executable, "-m", "igstore.build"], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("igstore: the following arguments are required: --model")


# --- Images that a network cannot be shown as they are


def of_sizes(*sizes: tuple[int, int]) -> list[tuple[str, np.ndarray, int]]:
    return [(f"p{number:03d}", np.full((*size, 3), 90, np.uint8), number % 5) for number, size in enumerate(sizes)]


def as_folder(tmp_path: Path, images: list[tuple[str, np.ndarray, int]]) -> torchvision.datasets.ImageFolder:
    for name, pixels, label in images:
        (tmp_path / "images" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / str(label) / f"{name}.png")
    return torchvision.datasets.ImageFolder(tmp_path / "images")


def as_path(tmp_path: Path, images: list[tuple[str, np.ndarray, int]]) -> Path:
    (tmp_path / "images").mkdir()
    for name, pixels, _ in images:
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("given_as", [lambda _, images: images, as_folder, as_path], ids=["list", "folder", "path"])
def test_sizes_that_differ_need_a_preprocessing(given_as, tmp_path, network):
    mixed = given_as(tmp_path, of_sizes((16, 16), (16, 16), (40, 20), (12, 30)))
    with pytest.raises(
        UserError, match=r"not of one size \(p000 is 16x16 pixels, p002 is 40x20 pixels\).*preprocessing="
    ):
        build_store(network, mixed, tmp_path / "store.zarr", n_steps=2)
    assert not (tmp_path / "store.zarr").exists()
    info = build_store(network, mixed, tmp_path / "store.zarr", n_steps=2, preprocessing=PREPROCESSING)
    assert info.n_built == 4


@pytest.mark.parametrize("given_as", [lambda _, images: images, as_folder, as_path], ids=["list", "folder", "path"])
def test_equal_sizes_need_none_and_a_stray_image_fails_alone(given_as, tmp_path, network):
    tmp_path.joinpath("a").mkdir()
    plain = given_as(tmp_path / "a", of_sizes(*[(16, 18)] * 5))
    info = build_store(network, plain, tmp_path / "plain.zarr", n_steps=2)
    assert (info.n_built, info.settings["crop"], info.settings["resize"]) == (5, [16, 18], None)
    sizes = [(16, 18)] * 150
    sizes[1] = (40, 40)  # a place that nobody looks at before the work
    tmp_path.joinpath("b").mkdir()
    info = build_store(network, given_as(tmp_path / "b", of_sizes(*sizes)), tmp_path / "stray.zarr", n_steps=1)
    assert info.n_built == 149
    assert info.failed == {"p001": "is 40x40 pixels, and the others 16x18: give a preprocessing for all"}


def test_the_first_image_may_be_broken(tmp_path, network):
    folder = as_path(tmp_path, of_sizes(*[(16, 18)] * 4))
    (folder / "p000.png").write_bytes(b"no image")
    info = build_store(network, folder, tmp_path / "store.zarr", n_steps=1)
    assert (info.n_built, info.n_failed, info.settings["crop"]) == (3, 1, [16, 18])
    for file in folder.iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="no image can be read, so nothing says what the network is to be shown"):
        build_store(network, folder, tmp_path / "other.zarr", n_steps=1)


def test_a_resize_below_the_crop_is_refused(tmp_path, network):
    small = Preprocessing(resize=10, crop=(16, 16))
    images = of_sizes(*[(16, 16)] * 3)
    message = "resize is 10 and crop 16x16, so every image would get a black margin; give resize=16 or more"
    for make in (
        lambda: build_store(network, images, tmp_path / "store.zarr", preprocessing=small),
        lambda: classifier_from_module(network, preprocessing=small),
        lambda: load_classifier("networks:demo_network", resize=10, crop=16),
        lambda: load_classifier("squeezenet1_1", "random:0", resize=10, crop=16),
    ):
        with pytest.raises(UserError, match=message):
            make()
    with pytest.raises(UserError, match="resize is 100 and crop 224x224"):
        load_classifier("squeezenet1_1", "random:0", resize=100)
    assert not (tmp_path / "store.zarr").exists()


@pytest.mark.parametrize(
    ("size", "preprocessing", "is_small"),
    [
        ((20, 30), Preprocessing(resize=16, crop=(16, 22)), False),
        ((20, 22), Preprocessing(resize=16, crop=(16, 22)), True),  # 16x17
        ((30, 20), Preprocessing(resize=16, crop=(16, 22)), True),
        ((20, 30), Preprocessing(resize=None, crop=(16, 22)), False),
        ((20, 20), Preprocessing(resize=None, crop=(16, 22)), True),
    ],
    ids=str,
)
def test_a_black_margin_is_not_made_without_a_word(size, preprocessing, is_small, path, network, caplog):
    build_store(network, of_sizes(*[size] * 3), path, n_steps=1, preprocessing=preprocessing, workers=1)
    said = [record.getMessage() for record in caplog.records if "black margin" in record.getMessage()]
    assert len(said) == is_small
    assert StoreReader(path).array("pixels").read([0]).min() == (0 if is_small else 90)
    assert not is_small or said[0].startswith("image p000 is ")


def test_a_build_that_was_killed_goes_on_to_the_same_store(folder, tmp_path):
    """SIGKILL after the first staged units; the whole file system is what the next process finds."""

    def start(path: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "igstore.build", *COMMAND, "--data", str(folder), "--store", str(path)],
            cwd=Path(__file__).parent,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "IGSTORE_TEST_SLOW": "0.03"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    killed, whole = tmp_path / "killed.zarr", tmp_path / "whole.zarr"
    process = start(killed)
    deadline = time.monotonic() + 60
    while not ((killed / "records/00000.json").exists() and list((killed / "staging").glob("*.npz"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not StoreReader(killed).is_complete
    undisturbed = start(whole)
    assert start(killed).wait() == 3
    assert undisturbed.wait() == 3
    assert_same(killed, whole)
    assert not (killed / "staging").exists()
    assert not list(killed.rglob("*.partial*"))
    assert json.loads((killed / "zarr.json").read_text())["attributes"]["complete"]


def test_single_fields_of_a_named_models_preprocessing(path, network, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    whole = load_classifier("networks:demo_network").preprocessing
    fields = {"resize": 18, "crop": (16, 14)}
    info = build_store("networks:demo_network", random_images(2), path, preprocessing=fields, n_steps=2, rank=False)
    assert info.n_built == 2
    assert StoreReader(path).spec.preprocessing == replace(whole, **fields)
    for model, more in ((network, {}), (classifier_from_module(network, preprocessing=PREPROCESSING), {"limit": 1})):
        with pytest.raises(UserError, match=r"preprocessing is a dict.*give igstore.Preprocessing"):
            build_store(model, random_images(2), path, preprocessing=fields, **more)
    with pytest.raises(UserError, match="resize is 10 and crop 16x16"):
        build_store("networks:demo_network", random_images(2), path, preprocessing={"resize": 10, "crop": 16})


def test_named_models_bring_their_preprocessing(network):
    classifier = classifier_from_module(network, preprocessing=PREPROCESSING, name="smooth")
    assert classifier.preprocessing == PREPROCESSING
