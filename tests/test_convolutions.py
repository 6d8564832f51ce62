"""Convolutions, and what surrounds them, against torch's in float64."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

from igstore.acceleration import accelerate, convolutions
from igstore.acceleration.convolutions import Convolution, fits, use_convolutions
from igstore.errors import ModelError, UserError
from igstore.machine import kernels_allowed
from pipelines.bench.floor import count_work

SOURCE = Path(convolutions.__file__).with_name("_convolutions.cpp")
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

# The algorithm's transforms multiply by up to 8 and divide by up to 24, which leaves some 1e-5 of the largest output
# where a direct convolution leaves 1e-6; a wrong tile or channel is wrong by 1.
TOLERANCE = 1e-4

needs_kernel = pytest.mark.skipif(
    not convolutions.available(), reason="the kernel is not compiled, or not for this processor"
)


def test_kernel_is_there_where_it_can_be():
    """Tests of a kernel that failed to compile would all be skipped."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if COMPILER is None or " avx2 " not in flags or " fma " not in flags or not kernels_allowed():
        pytest.skip("needs a C++ compiler, a processor with AVX2, and no IGSTORE_KERNELS=0")
    assert convolutions.available()


def convolution(
    channels: int,
    out_channels: int,
    padding: int | tuple[int, int] = 1,
    *,
    taps: int | tuple[int, int] = 3,
    bias: bool = True,
    seed: int = 0,
) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(channels, out_channels, taps, padding=padding, bias=bias).requires_grad_(False)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert float((found.double() - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


@needs_kernel
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("count", "channels", "out_channels", "size", "taps", "padding"),
    [
        (1, 16, 16, (4, 4), (3, 3), (1, 1)),  # one tile
        (2, 16, 48, (9, 14), (3, 3), (1, 1)),  # tiles that hang over at the bottom and right; a group that is not full
        (1, 32, 16, (12, 7), (3, 3), (0, 0)),
        (3, 48, 80, (11, 5), (3, 3), (2, 2)),
        (2, 32, 32, (10, 9), (3, 3), (0, 2)),
        (1, 512, 256, (7, 7), (3, 3), (1, 1)),  # few tiles and many channels: divided by channels
        (9, 64, 32, (30, 26), (3, 3), (1, 1)),  # more tiles than go through the stages together
        (2, 640, 640, (40, 4), (3, 3), (1, 1)),  # filters beyond the shared cache
        (2, 80, 192, (13, 13), (3, 3), (0, 0)),
        (2, 16, 48, (5, 13), (1, 3), (0, 1)),
        (2, 48, 16, (13, 5), (3, 1), (1, 0)),
        (2, 16, 32, (9, 17), (1, 7), (0, 3)),
        (2, 160, 192, (17, 17), (7, 1), (3, 0)),
        (1, 32, 32, (20, 9), (7, 1), (0, 0)),
        (1, 16, 16, (6, 9), (1, 7), (0, 6)),
        (2, 48, 64, (11, 14), (5, 5), (2, 2)),
        (1, 16, 16, (9, 9), (5, 5), (0, 4)),
        (2, 48, 80, (9, 7), (1, 1), (0, 0)),  # groups that are not full
        (5, 32, 64, (31, 17), (1, 1), (0, 0)),  # more pixels than are multiplied together
        (1, 1024, 256, (4, 4), (1, 1), (0, 0)),  # few pixels and many channels: divided by channels
        (1, 2560, 2048, (7, 7), (1, 1), (0, 0)),  # filters beyond the shared cache
    ],
)
def test_outputs_and_gradients_are_those_of_torch(count, channels, out_channels, size, taps, padding, direct):
    of_torch = convolution(channels, out_channels, padding, taps=taps)
    x = torch.randn(count, channels, *size, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    outputs = Convolution(of_torch, direct=direct)(x)
    expected = nn.functional.conv2d(exact, of_torch.weight.double(), of_torch.bias.double(), padding=padding)
    assert_close(outputs.detach(), expected.detach())
    gradient = torch.randn(expected.shape)
    (found,) = torch.autograd.grad(outputs, x, gradient)
    (wanted,) = torch.autograd.grad(expected, exact, gradient.double())
    assert_close(found, wanted)


SURROUNDINGS = [(-math.inf, math.inf), (0.0, math.inf), (-0.25, 0.5)]


@needs_kernel
@pytest.mark.parametrize("passes_on", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("bounds", SURROUNDINGS)
@pytest.mark.parametrize(
    ("taps", "stride", "size", "scales", "directly"),
    [
        (1, 1, (9, 15), False, False),
        (1, 1, (9, 15), True, False),
        (1, 2, (9, 14), False, False),
        (1, (3, 1), (9, 14), False, False),
        (3, 1, (9, 14), False, False),
        (3, 1, (9, 14), False, True),
    ],
)
def test_what_surrounds_a_convolution(taps, stride, size, scales, directly, bounds, adds, passes_on):
    torch.manual_seed(1)
    direct = nn.Conv2d(48, 80, taps, stride=stride, padding=taps // 2).requires_grad_(False)
    module = Convolution(direct, direct=directly)
    module.bounds, module.passes_on = bounds, passes_on
    x = torch.randn(3, 48, *size, requires_grad=True)
    exact = read = x.detach().double().requires_grad_()
    if scales:
        module.scale, module.shift = torch.randn(48), torch.randn(48)
        scale, shift = (one.double()[:, None, None] for one in (module.scale, module.shift))
        read = nn.functional.relu(scale * exact + shift)
    expected = nn.functional.conv2d(
        read, direct.weight.double(), direct.bias.double(), stride=stride, padding=taps // 2
    )
    addend = torch.randn(expected.shape, requires_grad=True) if adds else None
    exact_addend = addend.detach().double().requires_grad_() if addend is not None else None
    expected = (expected if exact_addend is None else expected + exact_addend).clamp(*bounds)
    gradient, other = torch.randn(expected.shape), torch.randn(x.shape)
    found = module(x, addend)
    outputs, passed_on = found if passes_on else (found, x.detach())
    assert_close(outputs.detach(), expected.detach())
    assert torch.equal(passed_on, x)
    sums = [(outputs * gradient).sum(), (expected * gradient.double()).sum()]
    if passes_on:
        sums = [sums[0] + (passed_on * other).sum(), sums[1] + (exact * other.double()).sum()]
    of = [one for one in (x, addend) if one is not None]
    exactly_of = [one for one in (exact, exact_addend) if one is not None]
    for one, wanted in zip(torch.autograd.grad(sums[0], of), torch.autograd.grad(sums[1], exactly_of), strict=True):
        assert_close(one, wanted)


@needs_kernel
def test_only_what_is_passed_on_has_a_gradient():
    module = Convolution(convolution(16, 16))
    module.passes_on = True
    x = torch.randn(1, 16, 8, 8, requires_grad=True)
    _, passed_on = module(x)
    (gradient,) = torch.autograd.grad((3 * passed_on).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 3.0))


@needs_kernel
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("wrong", [torch.zeros(1, 32, 8, 7), torch.zeros(1, 32, 8, 8, dtype=torch.float64)])
def test_addends_of_another_shape_or_type(wrong, taps):
    module = Convolution(convolution(16, 32, taps // 2, taps=taps))
    with pytest.raises(ModelError, match=r"expected float32 of shape \(1, 32, 8, 8\)"):
        module(torch.zeros(1, 16, 8, 8), wrong)


@needs_kernel
def test_values_at_the_bounds_pass_no_gradient():
    """As torch has it: its ReLU has the gradient 0 at 0, its ReLU6 at 6 too."""
    direct = convolution(16, 16, 0, taps=1)
    direct.weight.zero_()
    direct.bias.copy_(torch.tensor([0.0, 6.0, 3.0, -1.0, 7.0, -0.0, 1e-45, 5.9999995, *(0.0,) * 8]))
    module = Convolution(direct)
    module.bounds = (0.0, 6.0)
    addend = torch.zeros(1, 16, 4, 4, requires_grad=True)
    outputs = module(torch.zeros(1, 16, 4, 4, requires_grad=True), addend)
    (gradient,) = torch.autograd.grad(outputs.sum(), addend)
    assert gradient[0, :, 0, 0].tolist() == [0, 0, 1, 0, 0, 0, 1, 1, *(0,) * 8]
    assert outputs[0, :8, 0, 0].tolist() == [0, 6, 3, 0, 6, 0, direct.bias[6], direct.bias[7]]


@needs_kernel
def test_without_bias_and_in_any_layout():
    direct = convolution(16, 32, bias=False)
    module = Convolution(direct)
    x = torch.randn(2, 16, 10, 8)
    expected = nn.functional.conv2d(x.double(), direct.weight.double(), padding=1)
    assert_close(module(x), expected)
    assert torch.equal(module(x.contiguous(memory_format=torch.channels_last)), module(x))
    assert_close(module(x[..., ::2]), nn.functional.conv2d(x[..., ::2].double(), direct.weight.double(), padding=1))


@needs_kernel
def test_a_filter_of_one_tap_moves_the_image():
    direct = convolution(16, 16, bias=False)
    direct.weight.zero_()
    direct.weight[torch.arange(16), torch.arange(16).flip(0), 0, 2] = 1.0  # up and to the right, channels turned round
    x = torch.randn(1, 16, 8, 8)
    moved = torch.zeros_like(x)
    moved[:, :, 1:, :-1] = x.flip(1)[:, :, :-1, 1:]
    assert_close(Convolution(direct)(x), moved.double())


@needs_kernel
@pytest.mark.parametrize("direct", [False, True])
def test_same_bits_whatever_the_threads_and_the_company(direct):
    module = Convolution(convolution(64, 96), direct=direct)
    x = torch.randn(5, 64, 17, 23)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(module(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)
    assert torch.equal(torch.cat([module(image[None]) for image in x]), found[0])


@needs_kernel
@pytest.mark.parametrize("direct", [False, True])
def test_nothing_of_it_is_left_over(direct):
    """A channel, image or tile that is not written would hold what was in memory before: torch fills it with NaN."""
    module = Convolution(convolution(16, 48), direct=direct)
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(torch.empty(5).isnan().all())
        for size in (5, 6, 7, 8):
            x = torch.randn(3, 16, size, size, requires_grad=True)
            outputs = module(x)
            assert bool(outputs.isfinite().all())
            (gradient,) = torch.autograd.grad(outputs.sum(), x)
            assert bool(gradient.isfinite().all())
    finally:
        torch.use_deterministic_algorithms(False)


def even_pictures(size: tuple[int, int], channels: int) -> dict[str, torch.Tensor]:
    """Pictures in which many places look the same, float32 (channel, y, x), every channel with values of its own."""
    values = torch.rand(6, channels, 1, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = values[0].expand(channels, *size)
    y, x = (torch.arange(side) for side in size)
    half = torch.where(y[:, None] < size[0] // 2, plain, torch.randn(channels, *size))
    patch = plain.clone()
    patch[:, size[0] // 3 : size[0] // 2, size[1] // 4 : -3] = values[1]
    return {
        "plain": plain,
        "half": half,
        "patch": patch,
        "stripes": values[x % 6, :, 0, 0].T[:, None].expand(channels, *size),
        "zero": torch.zeros(channels, *size),
    }


@needs_kernel
@pytest.mark.parametrize("picture", even_pictures((8, 8), 1))
@pytest.mark.parametrize(
    ("channels", "out_channels", "size", "taps", "padding"),
    [
        (16, 32, (23, 31), (3, 3), (1, 1)),
        (64, 48, (56, 60), (3, 3), (0, 0)),
        (48, 64, (35, 35), (5, 5), (2, 2)),
        (32, 32, (17, 17), (1, 7), (0, 3)),
        (32, 32, (17, 17), (7, 1), (3, 0)),
        (16, 16, (75, 9), (3, 1), (1, 0)),
        (16, 16, (9, 113), (1, 3), (0, 1)),
        (256, 64, (14, 14), (1, 1), (0, 0)),
    ],
)
def test_what_is_equal_stays_equal(channels, out_channels, size, taps, padding, picture):
    """Of places whose surroundings are the same, to the last bit: max pooling sees any difference."""
    of_torch = convolution(channels, out_channels, padding, taps=taps)
    x = even_pictures(size, channels)[picture][None]
    found = Convolution(of_torch, direct=True)(x)[0].flatten(1)
    surroundings = nn.functional.unfold(nn.functional.pad(x, (*padding[1:] * 2, *padding[:1] * 2)), taps)[0]
    kinds, kind = torch.unique(surroundings, dim=1, return_inverse=True)
    assert kinds.shape[1] < surroundings.shape[1] / 1.3  # there are many such places
    first = torch.zeros(kinds.shape[1], dtype=torch.int64).scatter_(0, kind.flip(0), torch.arange(len(kind)).flip(0))
    assert torch.equal(found, found[:, first[kind]])


@needs_kernel
def test_filters_of_another_form_are_refused():
    module = Convolution(convolution(16, 32))
    filters = module.filters()
    module.direct = True
    assert module.filters().shape != filters.shape
    with pytest.raises(ModelError, match="expected filters of shape"):
        torch.ops.igstore.convolve(torch.zeros(1, 16, 8, 8), filters, 32, [3, 3], [1, 1], direct=True)


@needs_kernel
def test_no_images_and_wrong_ones():
    module = Convolution(convolution(16, 32))
    assert module(torch.zeros(0, 16, 8, 8)).shape == (0, 32, 8, 8)
    for wrong in (torch.zeros(1, 8, 8, 8), torch.zeros(16, 8, 8), torch.zeros(1, 16, 8, 8, dtype=torch.float64)):
        with pytest.raises(ModelError, match=r"takes float32 \(image, 16, y, x\); it is given torch"):
            module(wrong)


@needs_kernel
def test_shapes_alone():
    module = Convolution(convolution(16, 48, padding=0)).to("meta")
    x = torch.empty(2, 16, 9, 14, device="meta", requires_grad=True)
    outputs = module(x)
    assert (outputs.shape, outputs.device.type) == ((2, 48, 7, 12), "meta")
    assert torch.autograd.grad(outputs.sum(), x)[0].shape == x.shape


@needs_kernel
def test_benchmark_counts_what_is_multiplied():
    network = Convolution(convolution(16, 32, bias=False))
    flops, n_bytes = count_work(network, (16, 8, 12), batch_size=1, item_bytes=4)
    products = 36 * 2 * 3 * 16 * 32  # of 2 by 3 tiles, forwards and as many backwards
    assert flops == 2 * 2 * products
    assert n_bytes == 4 * 2 * (16 * 8 * 12 + 32 * 8 * 12 + 9 * 16 * 32)
    # a direct convolution has four times as many, as the tiles are full
    direct, _ = count_work(convolution(16, 32, bias=False), (16, 8, 12), batch_size=1, item_bytes=4)
    assert direct == 4 * flops
    flops, _ = count_work(
        Convolution(convolution(16, 32, bias=False), direct=True), (16, 8, 12), batch_size=1, item_bytes=4
    )
    assert flops == 2 * products + direct / 2
    row = Convolution(convolution(16, 32, (0, 3), taps=(1, 7)))
    flops, _ = count_work(row, (16, 8, 12), batch_size=1, item_bytes=4)
    assert flops == 2 * 2 * 10 * 8 * 3 * 16 * 32  # ten products of each of 8 by 3 tiles


# --- Which convolutions


def _changed(**change: object) -> nn.Conv2d:
    settings = {"in_channels": 16, "out_channels": 32, "kernel_size": 3, "padding": 1}
    return nn.Conv2d(**(settings | change))  # type: ignore[arg-type]


class _Subclass(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("module", "size", "fit"),
    [
        (_changed(), (56, 56), True),
        (_changed(bias=False), (8, 7), True),
        (_changed(padding=0), (35, 35), True),
        (_changed(padding=2), (16, 16), True),
        (_changed(), (7, 7), True),
        (_changed(), (5, 5), False),  # four tiles of 16 outputs for 25
        (_changed(), (2, 2), False),
        (_changed(padding=0), (4, 4), False),
        (_changed(padding=0), (2, 2), False),  # no output at all
        (_changed(), (0, 0), False),
        (_changed(in_channels=3), (56, 56), False),
        (_changed(out_channels=24), (56, 56), False),
        (_changed(kernel_size=1, padding=0), (56, 56), True),
        (_changed(kernel_size=1, padding=0, stride=2), (56, 56), True),
        (_changed(kernel_size=1, padding=0), (4, 4), True),
        (_changed(kernel_size=1, padding=0), (1, 1), False),  # all filters are read for a single pixel
        (_changed(kernel_size=1, padding=1), (56, 56), False),
        (_changed(kernel_size=1, padding=0, in_channels=24), (56, 56), False),
        (_changed(kernel_size=(1, 3), padding=(0, 1)), (8, 8), True),
        (_changed(kernel_size=(3, 1), padding=(1, 0)), (8, 8), True),
        (_changed(kernel_size=(3, 1), padding=(1, 0)), (7, 8), False),  # two tiles for seven outputs save too little
        (_changed(kernel_size=(1, 7), padding=(0, 3)), (17, 17), True),
        (_changed(kernel_size=(7, 1), padding=(3, 0)), (17, 17), True),
        (_changed(kernel_size=5, padding=2), (35, 35), True),
        (_changed(kernel_size=7, padding=3), (56, 56), False),
        (_changed(kernel_size=(1, 5), padding=(0, 2)), (56, 56), False),
        (_changed(stride=2), (56, 56), False),
        (_changed(groups=16), (56, 56), False),
        (_changed(dilation=2), (56, 56), False),
        (_changed(padding=(0, 1)), (56, 56), True),
        (_changed(padding=3), (56, 56), False),  # backwards it would have to cut
        (_changed(padding="same"), (56, 56), False),
        (_changed(padding_mode="reflect"), (56, 56), False),
        (_changed().double(), (56, 56), False),
        (_Subclass(16, 32, 3, padding=1), (56, 56), False),
        (nn.Linear(16, 32), (56, 56), False),
    ],
)
def test_convolutions_that_fit(module, size, fit):
    assert fits(module, *size) is fit


class _Network(nn.Module):
    """One convolution twice, at two sizes, one called by name, one not at all, and one as ever."""

    def __init__(self) -> None:
        super().__init__()
        self.often = convolution(16, 16, seed=1)
        self.named = convolution(16, 16, seed=2)
        self.never = convolution(16, 16, seed=3)
        self.plain = convolution(16, 16, seed=4)
        self.again = self.plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.plain(x))
        x = self.named(input=self.often(x))
        return self.often(x[..., :5, :5]).mean((2, 3))


@needs_kernel
def test_only_what_gains_is_replaced():
    network = _Network()
    image = torch.randn(1, 16, 16, 16)
    expected = network(image)
    use_convolutions(network, image)
    replaced = [name for name, module in network.named_modules(remove_duplicate=False) if type(module) is Convolution]
    assert replaced == ["plain", "again"]
    assert network.plain is network.again
    assert_close(network(image), expected.double())


@needs_kernel
def test_accelerated_networks_have_it_on_cpus():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, bias=False),
        nn.BatchNorm2d(32),
        nn.Flatten(),
        nn.LazyLinear(5),
    )
    probe = torch.zeros(1, 3, 20, 20)
    network(probe)
    fast = accelerate(network, probe)
    assert [type(module) for module in fast.children()][2] is Convolution
    x = torch.randn(2, 3, 20, 20)
    assert_close(fast(x), network.eval().double()(x.double()).detach())


# --- Where it cannot be


def _in_another_process(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, paths)]
    env = os.environ | {"IGSTORE_KERNELS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_without_the_kernel_convolutions_stay():
    code = """
import sys
sys.modules["igstore.acceleration._convolutions"] = None
import torch
from torch import nn
from igstore.acceleration.accelerator import accelerate
from igstore.acceleration import convolutions
network = accelerate(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Flatten()), torch.zeros(1, 16, 12, 12))
print(convolutions.available(), type(network[0]).__name__)
"""
    done = _in_another_process(code)
    assert done.stdout == "False Conv2d\n", done.stderr
    assert "igstore was installed without a C++ compiler; install it again" in done.stderr


@needs_kernel
def test_the_switch_rules_the_kernel_out(monkeypatch, caplog):
    image = torch.zeros(1, 16, 12, 12)
    kinds = {}
    for value in ("1", "0", ""):
        monkeypatch.setenv("IGSTORE_KERNELS", value)
        network = nn.Sequential(convolution(16, 16))
        use_convolutions(network, image)
        kinds[value] = type(network[0])
    assert kinds == {"1": Convolution, "0": nn.Conv2d, "": Convolution}
    assert not caplog.records  # who rules it out knows
    monkeypatch.setenv("IGSTORE_KERNELS", "off")
    with pytest.raises(UserError, match="IGSTORE_KERNELS is 'off'; it must be 0"):
        use_convolutions(network, image)


def test_processors_without_the_instructions(monkeypatch, caplog):
    monkeypatch.setattr(convolutions, "_COMPILED", True)
    monkeypatch.setattr(convolutions, "_GROUP", 0)
    network = nn.Sequential(convolution(16, 16))
    use_convolutions(network, torch.zeros(1, 16, 12, 12))
    assert type(network[0]) is nn.Conv2d
    assert not caplog.records  # there is nothing to be done about it


@needs_kernel
def test_instructions_of_other_processors(tmp_path):
    """The kernel for processors without AVX-512, where this one has it."""
    if COMPILER is None or " avx512f " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs a C++ compiler and a processor with AVX-512")
    built = tmp_path / "_convolutions.so"
    command = [COMPILER, "-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC", "-DWITHOUT_AVX512"]
    command += ["-I", sysconfig.get_paths()["include"], str(SOURCE), "-o", str(built)]
    subprocess.run(command, check=True, timeout=120)
    code = """
import importlib.machinery, importlib.util, itertools, sys
import torch
from torch import nn
loader = importlib.machinery.ExtensionFileLoader("igstore.acceleration._convolutions", sys.argv[1])
spec = importlib.util.spec_from_file_location("igstore.acceleration._convolutions", sys.argv[1], loader=loader)
module = importlib.util.module_from_spec(spec)
loader.exec_module(module)
import igstore.acceleration
igstore.acceleration._convolutions = sys.modules["igstore.acceleration._convolutions"] = module
from igstore.acceleration import convolutions
assert convolutions._GROUP == 16, convolutions._GROUP
torch.manual_seed(0)
cases = ((16, 48, 9, 3, 1), (128, 64, 28, 3, 1), (512, 256, 7, 3, 1), (32, 16, 17, (1, 7), (0, 3)), (16, 32, 12, 5, 2),
         (48, 80, 15, 1, 0))
for (channels, out_channels, size, taps, padding), directly in itertools.product(cases, (False, True)):
    direct = nn.Conv2d(channels, out_channels, taps, padding=padding).requires_grad_(False)
    x = torch.randn(2, channels, size, size)
    expected = nn.functional.conv2d(x.double(), direct.weight.double(), direct.bias.double(), padding=padding)
    module = convolutions.Convolution(direct, direct=directly)
    addend = torch.randn(expected.shape)
    module.bounds = (0.0, 2.0)
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = nn.functional.conv2d(exact, direct.weight.double(), direct.bias.double(), padding=padding) + addend
    expected = expected.clamp(0.0, 2.0)
    outputs = module(x, addend)
    gradient = torch.randn(expected.shape)
    (found,) = torch.autograd.grad(outputs, x, gradient)
    (wanted,) = torch.autograd.grad(expected, exact, gradient.double())
    for one, other in ((outputs, expected), (found, wanted)):
        print(float((one - other).detach().abs().max() / other.detach().abs().max()))
"""
    done = _in_another_process(code, built)
    assert done.returncode == 0, done.stderr
    differences = [float(line) for line in done.stdout.split()]
    assert len(differences) == 24
    assert max(differences) < TOLERANCE
