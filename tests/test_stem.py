from __future__ import annotations

import logging

import numpy as np
import pytest
import timm
import torch
import torchvision
from networks import Smooth
from torch import nn

from igstore.acceleration import Hoisted, accelerate, hoist_stem
from igstore.attribution import Attributor, engine, integrated_gradients
from igstore.models import Classifier
from igstore.schema import BuildSpec, Preprocessing

NETWORKS = {
    "resnet18": lambda: torchvision.models.resnet18(weights=None),
    "densenet121": lambda: torchvision.models.densenet121(weights=None),
    "timm's efficientnet_lite0": lambda: timm.create_model("tf_efficientnet_lite0"),
}


@pytest.fixture(autouse=True)
def from_the_first_step_on(monkeypatch):
    monkeypatch.setattr(engine, "FEWEST_STEPS", 1)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)


def images(count, size, dtype=torch.float64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("folded", [False, True], ids=["as it is", "accelerated"])
def test_attributions_are_those_of_the_whole_network(name, folded):
    network = seeded(NETWORKS[name]).double()
    x = images(2, 64)
    if folded:
        network = accelerate(network, x[:1])
    hoisted = hoist_stem(network, x[:1])
    assert isinstance(hoisted, Hoisted)
    settings = {"baselines": 0.3 * images(2, 64).flip(3), "targets": torch.tensor([3, 7]), "n_steps": 3}
    # in float64, where rounding does not move an activation across a ReLU's kink; 5 splits the steps of an image
    expected = integrated_gradients(network, x, batch_size=4, reduce="none", **settings)
    found = integrated_gradients(hoisted, x, batch_size=5, reduce="none", **settings)
    assert (found.maps - expected.maps).norm() < 1e-10 * expected.maps.norm()
    torch.testing.assert_close(found.output, expected.output)
    torch.testing.assert_close(found.completeness_error, expected.completeness_error)


def test_under_autocast_the_stem_stays_in_float32():
    network = seeded(Smooth)
    x = images(2, 20, torch.float32)
    settings = {"baselines": torch.zeros_like(x), "targets": torch.tensor([0, 1]), "n_steps": 4}
    expected = integrated_gradients(network, x, **settings).maps
    found = integrated_gradients(hoist_stem(network, x[:1]), x, precision="float16", **settings).maps
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 5e-3 * expected.norm()  # float16 has 11 bits


def test_the_stem_runs_once_an_image_not_once_a_step():
    hoisted = hoist_stem(seeded(Smooth), images(1, 20, torch.float32))
    seen = []
    hoisted.stem.register_forward_hook(lambda module, inputs, made: seen.append(len(made)))
    x = images(2, 20, torch.float32)
    # one b, since all are the same, for its output; x and b for the path; x for the way back
    integrated_gradients(hoisted, x, torch.zeros_like(x), torch.tensor([0, 1]), n_steps=30)
    assert sum(seen) == 1 + 3 * len(x)


def test_for_few_steps_the_stem_stays_in_the_path(monkeypatch):
    monkeypatch.setattr(engine, "FEWEST_STEPS", 5)
    x = images(2, 20, torch.float32)
    hoisted = hoist_stem(seeded(Smooth), x[:1])
    seen = []
    hoisted.stem.register_forward_hook(lambda module, inputs, made: seen.append(len(made)))
    integrated_gradients(hoisted, x, torch.zeros_like(x), torch.tensor([0, 1]), n_steps=4)
    assert sum(seen) == 1 + 4 * len(x)


class Odd(nn.Module):
    """Networks whose first convolution has to stay where it is."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(3, 40 if way == "much larger" else 3, 3, padding=1)

    def forward(self, x):
        if self.way == "read before":
            return (self.conv(x) + x).mean((2, 3))
        if self.way == "a pixel looked at":  # which no random image shows
            return self.conv(x).mean((2, 3)) + torch.where(x[:, :1, 0, 0] > 100, 1.0, 0.0)
        if self.way == "its size looked at":
            return self.conv(x).sum((2, 3)) / x.shape[2]
        if self.way == "changed before":
            return self.conv(x * 2).relu().mean((2, 3))
        if self.way == "changed in place":
            return self.conv(x.mul_(2)).relu().mean((2, 3))
        if self.way == "called twice":
            return self.conv(self.conv(x)).relu().mean((2, 3))
        return self.conv(x).relu().mean((2, 3))


@pytest.mark.parametrize(
    "way",
    [
        "read before",
        "a pixel looked at",
        "its size looked at",
        "changed before",
        "changed in place",
        "called twice",
        "much larger",
        "no convolution",
    ],
)
def test_where_the_stem_cannot_be_taken_out_the_network_stays_whole(way, caplog):
    caplog.set_level(logging.INFO, logger="igstore.acceleration.stem")
    network = seeded(lambda: Odd(way)) if way != "no convolution" else nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    assert hoist_stem(network, images(1, 8, torch.float32)) is network
    assert caplog.text


def test_a_body_that_does_not_run_alone_keeps_its_stem(caplog):
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, stride=2)

        def forward(self, x):
            return self.conv(x).relu().mean((2, 3)) / self.conv.weight.abs().sum()

    caplog.set_level(logging.INFO, logger="igstore.acceleration.stem")
    network = seeded(Strict)
    assert hoist_stem(network, images(1, 8, torch.float32)) is network
    assert "stays in the path: AttributeError" in caplog.text


def test_parameters_are_shared_and_the_network_is_left_alone():
    network = seeded(NETWORKS["resnet18"])
    x = images(1, 64, torch.float32)
    before = network(x)
    hoisted = hoist_stem(network, x)
    assert hoisted.stem is network.conv1
    assert {id(parameter) for parameter in hoisted.parameters()} == {
        id(parameter) for parameter in network.parameters()
    }
    assert torch.equal(network(x), before)
    torch.testing.assert_close(hoisted(x), before)


def test_an_attributor_takes_the_stem_out():
    preprocessing = Preprocessing(resize=None, crop=(20, 20))
    network = seeded(Smooth)
    classifier = Classifier("smooth", network, "none", "0" * 64, preprocessing)
    spec = BuildSpec(
        model="smooth",
        weights="none",
        weights_sha256="0" * 64,
        preprocessing=preprocessing,
        images_fingerprint="",
        n_steps=4,
    )
    attributor = Attributor(classifier, spec, device=torch.device("cpu"))
    assert isinstance(attributor.network, Hoisted)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 20, 20), dtype=np.uint8)
    found = attributor(pixels, np.array([0, 1], np.int16), ["a", "b"], ["", ""])
    assert (found["status"] == 1).all()
