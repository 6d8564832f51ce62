"""Gradients along lines: against float64 autograd, NumPy one-liners, and the kernels in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from igstore.acceleration import OnLines, accelerate
from igstore.acceleration.lines import integral, reference
from igstore.acceleration.lines.points import joined, packed, points_of, split, unpacked
from igstore.acceleration.lines.steps import Affine, Concatenate, Convolve, MaxPool, MeanPool, Torch
from igstore.attribution import Attributor, integrated_gradients
from igstore.images import prepare
from igstore.models import classifier_from_module, load_classifier
from igstore.schema import Preprocessing
from pipelines.bench.agreement import mask_iou
from pipelines.bench.engine import spec
from pipelines.bench.pictures import smooth_pictures

CPU = torch.device("cpu")


class EveryStep(nn.Module):
    """A network that has every kind of step, and strides, paddings and filters of several shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.second = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.down, self.across = nn.Conv2d(32, 48, 1, stride=2), nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=False)
        self.wide, self.tall = nn.Conv2d(48, 20, (1, 7), padding=(0, 3)), nn.Conv2d(48, 28, (5, 3), padding=(2, 1))
        self.norm, self.each = nn.BatchNorm2d(48), nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.more, self.fewer, self.last = nn.Conv2d(48, 64, 1), nn.Conv2d(64, 16, 1), nn.Conv2d(80, 32, 3, stride=2)
        self.linear = nn.Linear(32, 10)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.stem(x * 2 + 1)), 3, 2, 1)
        x = functional.relu(self.first(x))
        x = functional.relu(self.second(x) + x)
        y = functional.relu(self.down(x) + self.across(x))
        y = functional.relu(self.norm(torch.cat([functional.relu(self.wide(y)), self.tall(y)], 1)))
        y = functional.relu6(self.more(y * torch.sigmoid(self.each(y))))
        y = functional.avg_pool2d(functional.max_pool2d(y, 2), 3, 1, 1)
        z = torch.cat([y, self.fewer(y)], 1)
        w = torch.cat([y, self.fewer(y), functional.relu(y)], 1)[:, :80]
        y = functional.relu(self.last(functional.pad(z + w, (0, 1, 0, 1))))
        return self.linear(functional.adaptive_avg_pool2d(y, 1).flatten(1))


def on_lines(network: nn.Module, side: int) -> OnLines:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(3, 3, side, side, generator=generator)
    fast = accelerate(network.eval(), pictures[:1], own_convolutions=False)
    found = OnLines.of(fast, pictures)
    assert found is not None
    return found


def job(side: int, images: int = 2, seed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs, baselines = (torch.randn(images, 3, side, side, generator=generator) for _ in range(2))
    return {"inputs": inputs, "baselines": baselines, "targets": torch.arange(images) + 3}


def exact(network: nn.Module, given: dict[str, Tensor], n_steps: int, **options: str) -> Tensor:
    """The maps in float64."""
    double = {name: one.double() if one.is_floating_point() else one for name, one in given.items()}
    network = accelerate(network.eval(), double["inputs"][:1].float(), own_convolutions=False).double()
    return integrated_gradients(network, **double, n_steps=n_steps, reduce="none", **options).maps


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# Gradients are float16, whose 11 bits are rounded at each of some twenty layers, at random: 20**0.5 * 2**-12 is 1e-3.
NEAR = 4e-3


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_maps_are_those_of_float64(output):
    network, given = EveryStep(), job(36)
    lines = on_lines(network, 36)
    kinds = {type(step) for step in lines.lines.steps}
    assert {Affine, Concatenate, Convolve, MaxPool, MeanPool, Torch} <= kinds
    found = integrated_gradients(
        lines, **given, n_steps=20, reduce="none", output=output, precision="mixed", batch_size=64
    )
    assert difference(found.maps, exact(network, given, 20, output=output)) < NEAR
    double = accelerate(network, given["inputs"][:1], own_convolutions=False).double()
    scores = double(given["inputs"].double())
    scores = scores.softmax(dim=1) if output == "probability" else scores
    expected = scores.gather(1, given["targets"][:, None])[:, 0]
    torch.testing.assert_close(found.output, expected, rtol=1e-5, atol=1e-6)  # forwards it is as good as float32


@pytest.mark.parametrize("method", ["riemann_left", "riemann_trapezoid", "gausslegendre"])
@pytest.mark.parametrize("n_steps", [3, 8])
def test_any_rule(method, n_steps):
    network, given = EveryStep(), job(24)
    found = integrated_gradients(
        on_lines(network, 24), **given, n_steps=n_steps, method=method, reduce="none", precision="mixed", batch_size=8
    )
    assert difference(found.maps, exact(network, given, n_steps, method=method)) < NEAR


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 8, 100])
def test_batches_change_nothing_but_the_order_of_sums(batch_size):
    lines, given = on_lines(EveryStep(), 24), job(24, images=5)
    whole, parts = (
        integrated_gradients(lines, **given, n_steps=4, reduce="none", precision="mixed", batch_size=size)
        for size in (20, batch_size)
    )
    # a batch of some of an image's points has other references
    assert difference(parts.maps, whole.maps) < (1e-6 if batch_size >= 4 else NEAR)
    torch.testing.assert_close(parts.output, whole.output, rtol=1e-5, atol=1e-6)


def test_batches_are_no_larger_than_offsets_reach():
    lines, given = on_lines(EveryStep(), 24), job(24, images=3)
    whole = integrated_gradients(lines, **given, n_steps=4, precision="mixed", batch_size=12).maps
    assert lines.most_points == (2**31 - 1) // (2 * 16 * 24 * 24)  # the stem's outputs are largest, and pairs are two
    seen = []
    integrate = lines.lines.integrate
    lines.lines.integrate = lambda path, select: seen.append(len(path.points)) or integrate(path, select)
    lines.most_points = 5
    assert difference(integrated_gradients(lines, **given, n_steps=4, precision="mixed").maps, whole) < 1e-6
    assert seen == [4, 4, 4]


def test_scores_without_gradients_are_the_networks():
    lines, given = on_lines(EveryStep(), 24), job(24, images=4)
    points = points_of([np.zeros(1)] * 4, CPU)
    assert (points.n_references, points.n_others) == (4, 0)
    layout = integral._Layout.of((), 4, np.zeros(1), np.zeros(1), CPU)
    found = lines.lines.scores(layout.path(given["inputs"], torch.zeros_like(given["inputs"])))
    torch.testing.assert_close(found, lines(given["inputs"]), rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60, unique=True))
def test_points_between_two_references_are_on_their_line(numbers):
    alphas = np.sort(numbers) / 1000
    points = points_of([alphas, alphas[:1]], CPU)
    order = points.order.numpy()
    assert sorted(order) == list(range(len(alphas) + 1))
    references = order[: points.n_references]
    assert {0, len(alphas) - 1, len(alphas)} <= set(references)  # first and last of each image
    line = points.line(torch.tensor(np.concatenate([alphas, alphas[:1]])[references]))
    np.testing.assert_allclose(line.numpy(), alphas[order[points.n_references :]], atol=1e-6)


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_bits(channels, seed):
    passes = np.random.default_rng(seed).random((3, 2, channels)) < 0.5
    bits = packed(torch.from_numpy(passes))
    np.testing.assert_array_equal(bits.numpy(), np.packbits(passes, axis=-1, bitorder="little"))
    np.testing.assert_array_equal(unpacked(bits, channels).numpy(), passes)


def test_pairs_are_as_good_as_float32():
    values = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    error = (joined(split(values)) - values).abs() / values.abs().clamp(min=2.0**-3)
    assert float(error.max()) < 2.0**-21  # two halves have 22 bits; below 2**-3 the low one has fewer


def test_networks_without_convolutions_on_lines_are_computed_in_float32():
    network = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    assert OnLines.of(network.requires_grad_(False), torch.randn(2, 3, 24, 24)) is None
    classifier = classifier_from_module(network, preprocessing=Preprocessing(resize=None, crop=(24, 24)), name="small")
    pixels = smooth_pictures(2, (24, 24))
    found = [
        Attributor(classifier, spec(classifier, 4, precision), device=CPU)(
            pixels, np.full(2, -1, np.int32), ["a", "b"], ["", ""]
        )["attribution"]
        for precision in ("float32", "mixed")
    ]
    np.testing.assert_array_equal(*found)


def test_what_float16_cannot_hold_is_computed_in_float32(monkeypatch):
    classifier = classifier_from_module(
        EveryStep().eval(), preprocessing=Preprocessing(resize=None, crop=(24, 24)), name="every step"
    )
    pixels, unknown = smooth_pictures(3, (24, 24)), np.full(3, -1, np.int32)
    rough, plain = (
        Attributor(classifier, spec(classifier, 4, precision), device=CPU) for precision in ("mixed", "float32")
    )
    expected = plain(pixels, unknown, ["a", "b", "c"], [""] * 3)
    add = OnLines.add_gradients

    def overflowing(self: OnLines, sums: Tensor, f_x: Tensor, *rest: object) -> None:
        add(self, sums, f_x, *rest)
        sums[1, 0, 0, 0] = torch.inf  # on the way back
        f_x[2] = torch.nan  # on the way forward

    monkeypatch.setattr(OnLines, "add_gradients", overflowing)
    found = rough(pixels, unknown, ["a", "b", "c"], [""] * 3)
    assert found["reason"].tolist() == [""] * 3
    for image in (1, 2):
        one, other = (arrays["attribution"][image].astype(np.float32) for arrays in (found, expected))
        assert np.linalg.norm(one - other) < 1e-3 * np.linalg.norm(other)  # as stored, with 11 bits
    np.testing.assert_allclose(found["output"], expected["output"], rtol=1e-5)


def test_masks_of_real_weights_are_those_of_float32(imagenet_val):
    """Rounded to float16 throughout, they would share 0.92 of their blocks."""
    classifier = load_classifier("efficientnet_lite0")
    files = sorted(imagenet_val.rglob("*.JPEG"))[::300][:2]
    pixels = np.stack([prepare(Image.open(file), classifier.preprocessing) for file in files])
    maps = []
    for precision in ("float32", "mixed"):
        attributor = Attributor(classifier, spec(classifier, 20, precision), device=CPU)
        found = attributor(pixels, np.full(2, -1, np.int32), ["a", "b"], ["", ""])
        maps.append(found["attribution"].astype(np.float32))
    assert mask_iou(*maps).min() >= 0.99
    assert mask_iou(*maps).mean() >= 0.995


# --- The kernels, in Triton's interpreter, which runs on CPUs

_KERNELS = """
import sys
import numpy as np
import torch
from igstore.attribution.engine import integrated_gradients
from igstore.acceleration.lines import integral, launches
sys.path.insert(0, sys.argv[1])
from test_lines import EveryStep, job, on_lines
assert integral._operations(torch.device("cpu")) is launches
lines = on_lines(EveryStep(), 18)
given = job(18)
found = integrated_gradients(lines, **given, n_steps=9, reduce="none", precision="mixed", batch_size=18)
layout = integral._Layout.of((), 2, np.zeros(1), np.zeros(1), torch.device("cpu"))
scores = lines.lines.scores(layout.path(given["inputs"], torch.zeros_like(given["inputs"])))
torch.save({"maps": found.maps, "output": found.output, "scores": scores}, sys.argv[2])
"""


def test_kernels_compute_what_the_reference_does(tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", _KERNELS, os.path.dirname(__file__), str(tmp_path / "found.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    assert integral._operations(CPU) is reference
    lines, given = on_lines(EveryStep(), 18), job(18)
    expected = integrated_gradients(lines, **given, n_steps=9, reduce="none", precision="mixed", batch_size=18)
    # the same numbers, rounded at the same places; their sums are in another order
    assert difference(found["maps"], expected.maps) < 1e-3
    torch.testing.assert_close(found["output"], expected.output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["scores"], lines(given["inputs"]), rtol=1e-5, atol=1e-5)
