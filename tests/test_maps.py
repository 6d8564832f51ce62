"""Maps of every kind of picture against float64: no acceleration may make them worse than plain torch's are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exact import exactly_integrated, integrated
from PIL import Image
from torch import nn

from igstore.acceleration.choices import called_before_choices
from igstore.attribution import Attributor
from igstore.models import Classifier, classifier_from_module, load_classifier
from igstore.schema import BuildSpec, Preprocessing
from pipelines.bench.agreement import mask_iou

# Plain float32 itself has less on white pictures, whose places differ by less than it can tell: there it is the bar.
LEAST_IOU = 0.99
# Two results of float32 that are rounded otherwise differ in a few blocks.
BESIDE_FLOAT32 = 0.005


def made_picture(size: tuple[int, int], seed: int) -> np.ndarray:
    """As photographs are, with shades, edges, and grain of every size: uint8 (channel, y, x)."""
    random = np.random.default_rng(seed)
    y, x = (np.fft.fftfreq(side) for side in size)
    spectrum = np.fft.fft2(random.normal(size=(3, *size))) / (np.hypot(y[:, None], x) + 1 / max(size))
    waves = np.fft.ifft2(spectrum).real
    waves = waves / waves.std() * 50 + 120
    waves[:, size[0] // 4 : size[0] // 2, size[1] // 3 :] += 60  # an edge
    return waves.clip(0, 255).astype(np.uint8)


def photograph(size: tuple[int, int], folder: Path, number: int) -> np.ndarray:
    """A real one, cut to size."""
    file = sorted(folder.glob("*/*.JPEG"))[97 * number + 13]
    image = Image.open(file).convert("RGB").resize(size[::-1])
    return np.asarray(image).transpose(2, 0, 1).copy()


def variants(picture: np.ndarray, smaller: np.ndarray) -> dict[str, np.ndarray]:
    """The picture itself, more than half of it painted over, one on white, and nothing but white."""
    painted = picture.copy()
    painted[:, : int(0.55 * picture.shape[1])] = np.array([120, 160, 200], np.uint8)[:, None, None]
    white = np.full_like(picture, 255)
    on_white = white.copy()
    top, left = ((whole - part) // 2 for whole, part in zip(picture.shape[1:], smaller.shape[1:], strict=True))
    on_white[:, top : top + smaller.shape[1], left : left + smaller.shape[2]] = smaller
    return {"as it is": picture, "painted over": painted, "on white": on_white, "white": white}


def assert_as_exact_as_float32(
    classifier: Classifier, pictures: dict[str, np.ndarray], n_steps: int, exactly: nn.Module | None = None
) -> None:
    """`exactly` is another network that computes the same, for float64."""
    pixels = np.stack(list(pictures.values()))
    spec = BuildSpec(
        model=classifier.name,
        weights=classifier.weights,
        weights_sha256=classifier.weights_sha256,
        preprocessing=classifier.preprocessing,
        images_fingerprint="",
        n_steps=n_steps,
    )
    attributor = Attributor(classifier, spec, device=torch.device("cpu"), batch_size=n_steps)
    found = attributor(pixels, np.full(len(pixels), -1, np.int16), list(pictures), [""] * len(pixels))
    ours = found["attribution"].astype(np.float32) * found["scale"][:, None, None]
    settings = (pixels, classifier.preprocessing, torch.from_numpy(found["target"].astype(np.int64)), n_steps)
    exact = exactly_integrated(exactly or classifier.network, *settings)
    found_iou, plain_iou = mask_iou(ours, exact), np.ones(len(pixels))
    for layout in (torch.contiguous_format, torch.channels_last):  # which torch rounds differently
        plain = integrated(classifier.network, *settings, torch.float32, layout)
        plain_iou = np.minimum(plain_iou, mask_iou(plain, exact))
        wrong = [
            f"{name}: {our:.4f}, plain torch {their:.4f}"
            for name, our, their in zip(pictures, found_iou, plain_iou, strict=True)
            if our < min(LEAST_IOU, their - BESIDE_FLOAT32)
        ]
        if not wrong:
            return
    pytest.fail("; ".join(wrong))


def made_pictures(classifier: Classifier) -> dict[str, np.ndarray]:
    height, width = classifier.preprocessing.crop
    return variants(made_picture((height, width), 1), made_picture((height // 2, width // 2), 2))


# Small, so that it is quick. All of them have max pooling, and Inception and GoogLeNet have 1x7, 7x1 and 5x5 filters.
SMALL = {"squeezenet1_1": 112, "googlenet": 112, "inception_v3": 139}


@pytest.mark.parametrize("name", SMALL)
def test_small_pictures(name):
    classifier = load_classifier(name, "random:0", crop=SMALL[name])
    assert_as_exact_as_float32(classifier, made_pictures(classifier), n_steps=2)


class Chooser(nn.Module):
    """Ways to choose the largest that are no module: a graph of modules would not show them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Conv2d(inputs, 32, 3, padding=1) for inputs in (3, 32, 32, 32)]
            for layer in layers:
                nn.init.kaiming_normal_(layer.weight)
                nn.init.normal_(layer.bias, std=0.1)
            self.layers = nn.ModuleList(layers)
            self.head = nn.Linear(32 * 64, 10)
        self.way = way
        self.eval()

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "max_pool2d":
            return nn.functional.max_pool2d(x, 2)
        if self.way == "adaptive_max_pool2d":
            return nn.functional.adaptive_max_pool2d(x, (x.shape[2] // 2, x.shape[3] // 2))
        patches = nn.functional.unfold(x, 2, stride=2).unflatten(1, (x.shape[1], 4))
        chosen = {
            "norm": lambda: patches.norm(p=float("inf"), dim=2),
            "max": lambda: patches.max(dim=2).values,
            "sort": lambda: patches.sort(dim=2, stable=True, descending=True).values[:, :, 0],
            "argmax": lambda: patches.gather(2, patches.argmax(dim=2, keepdim=True))[:, :, 0],
        }[self.way]()
        return chosen.unflatten(2, (x.shape[2] // 2, x.shape[3] // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third, fourth = self.layers
        x = nn.functional.relu(second(nn.functional.relu(first(x))))
        x = self.pool(x)
        x = self.pool(nn.functional.relu(fourth(nn.functional.relu(third(x)))))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 8).flatten(1))


@pytest.mark.parametrize("way", ["max_pool2d", "adaptive_max_pool2d", "max", "sort", "argmax", "norm"])
def test_ways_to_choose(way):
    """The network that pools is the reference for all: they choose the same."""
    preprocessing = Preprocessing(resize=None, crop=(64, 64), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    classifier = classifier_from_module(Chooser(way), preprocessing=preprocessing)
    pictures = made_pictures(classifier)
    pooling = classifier_from_module(Chooser("max_pool2d"), preprocessing=preprocessing)
    assert_as_exact_as_float32(classifier, pictures, 4, exactly=pooling.network)


CHOOSING = {
    "max_pool2d": lambda x: nn.functional.max_pool2d(x, 2),
    "max_pool3d": lambda x: nn.functional.max_pool3d(x[:, None], 2),
    "amax": lambda x: x.amax((2, 3)),
    "maximum": lambda x: torch.maximum(x, x.flip(2)),
    "median": lambda x: x.flatten(2).median(2).values,
    "quantile": lambda x: x.flatten(2).quantile(0.5, dim=2),
    "topk": lambda x: x.flatten(1).topk(3).values,
    "where": lambda x: torch.where(x > x.flip(2), x, -x),
    "mask": lambda x: x * (x > 0.1),
    "round": torch.round,
    "norm of infinite order": lambda x: x.flatten(2).norm(p=float("inf"), dim=2),
    "distance of infinite order": lambda x: torch.cdist(x, x.flip(2), p=float("inf")),
    "grid_sample": lambda x: nn.functional.grid_sample(x, x.permute(0, 2, 3, 1)[..., :2], align_corners=False),
    "branch": lambda x: x if float(x.mean()) > 0 else -x,
}
SMOOTH = {
    "relu": torch.relu,
    "softmax": lambda x: x.softmax(1),
    "norm": lambda x: x.flatten(2).norm(dim=2),
    "clamp": lambda x: x.clamp(-1, 1),
    "avg_pool2d": lambda x: nn.functional.avg_pool2d(x, 2),
    "masked_fill": lambda x: x.masked_fill(torch.eye(8, dtype=torch.bool), float("-inf")).softmax(3),
    "embedding": lambda x: x + torch.arange(8.0),
}


@pytest.mark.parametrize("operation", [*CHOOSING, *SMOOTH])
def test_what_chooses(operation):
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after((CHOOSING | SMOOTH)[operation](self.before(x)).flatten(1).sum(1, keepdim=True))

    network = Network()
    found = called_before_choices(network, torch.randn(1, 3, 8, 8), [network.before, network.after])
    assert found == ({network.before} if operation in CHOOSING else set())


# --- Real photographs at full size, and every family of networks


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "name",
    [
        "efficientnet_lite0",
        "vgg16",
        "vgg11_bn",
        "squeezenet1_1",
        "inception_v3",
        "googlenet",
        "resnet50",
        "densenet121",
        "mobilenet_v3_small",
    ],
)
def test_photographs(name, number, imagenet_val):
    classifier = load_classifier(name, None if name.startswith("efficientnet") else "random:0")
    height, width = classifier.preprocessing.crop
    pictures = variants(
        photograph((height, width), imagenet_val, number), photograph((height // 2, width // 2), imagenet_val, number)
    )
    assert_as_exact_as_float32(classifier, pictures, n_steps=2 if name == "vgg16" else 4)
