from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from networks import Smooth
from torch import nn

from igstore.acceleration import accelerate
from igstore.acceleration.accelerator import fold_uneven_padding
from igstore.acceleration.activations import Clamp, ScaleAndShift, keep_results
from igstore.attribution import gradient_bytes
from igstore.errors import ModelError


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def with_statistics(network: nn.Module) -> nn.Module:
    """Batch norms as training leaves them: fresh ones are nearly the identity, and folding them would prove nothing."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
            ):
                with torch.no_grad():
                    values.copy_(torch.rand(values.shape, generator=generator) * (high - low) + low)
    return network.eval()


def output_and_gradient(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    output = network(leaf.clone())
    return output.detach(), torch.autograd.grad(output[:, 3].sum(), leaf)[0]


# How many norms cannot be folded: half of a DenseNet's follow a concatenation, which no convolution made.
# Those of timm's networks end in an activation.
CASES = {
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), 0),
    "densenet121": (lambda: torchvision.models.densenet121(weights=None), 62),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(weights=None), 0),
    "timm's efficientnet_lite0": (lambda: timm.create_model("tf_efficientnet_lite0"), 0),
    "timm's densenet121": (lambda: timm.create_model("densenet121"), 62),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_stay_and_the_network_is_left_alone(case, kernels):
    make, left = CASES[case]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = with_statistics(make()).double()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    # in float64, where rounding does not move an activation across a ReLU's kink
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fast = accelerate(network, x[:1])
    assert norms(fast) == 0
    assert sum(isinstance(module, ScaleAndShift) for module in fast.modules()) == left
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    output, gradient = output_and_gradient(network, x)
    fast_output, fast_gradient = output_and_gradient(fast, x)
    assert (fast_output - output).norm() / output.norm() < 1e-10
    assert (fast_gradient - gradient).norm() / gradient.norm() < 1e-10
    assert norms(network) > 0
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


class Shared(nn.Module):
    """Ways in which folding a norm into the convolution before it would be wrong."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, track_running_stats=way != "batch statistics")
        self.other = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        if self.way == "in place between":
            torch.relu_(y)
        z = self.norm(y)
        if self.way == "read twice":
            z = z + y
        if self.way == "two norms":
            z = z + self.other(y)
        if self.way == "called twice":
            z = z + self.conv(x.flip(3))
        return z.mean((2, 3))


@pytest.mark.parametrize(
    "way", ["plain", "in place between", "read twice", "two norms", "called twice", "batch statistics"]
)
def test_a_norm_is_folded_only_where_that_is_right(way, caplog):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = with_statistics(Shared(way)) if way != "batch statistics" else Shared(way).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    fast = accelerate(network, x[:1])
    torch.testing.assert_close(fast(x), network(x), rtol=1e-5, atol=1e-6)
    assert isinstance(fast.norm, nn.Identity) == (way == "plain")
    if way in ("read twice", "two norms"):
        assert "without batch norms folded" in caplog.text


def same_convolutions(network: nn.Module) -> int:
    return sum(isinstance(module, timm.layers.Conv2dSame) for module in network.modules())


@pytest.mark.parametrize("size", [(16, 16), (15, 22), (7, 8), (3, 3)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (4, 2), (3, 1), (2, 3), ((3, 5), (2, 1))])
def test_uneven_padding_is_folded_exactly(size, kernel, stride):
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(timm.layers.Conv2dSame(6, 12, kernel, stride, groups=6), nn.Flatten())
    network.requires_grad_(False)
    x = torch.randn(4, 6, *size, generator=generator)
    expected = output_and_gradient(network, x)
    fold_uneven_padding(network, x[:1])
    assert same_convolutions(network) == 0
    for made, plain in zip(output_and_gradient(network, x), expected, strict=True):
        # the same products, but zeros among them may change the order in which a vector unit adds them
        torch.testing.assert_close(made, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "convolution",
    [
        timm.layers.Conv2dSame(6, 6, 3, 2),  # dense: a larger kernel would cost more than it saves
        timm.layers.Conv2dSame(6, 6, 3, 2, dilation=2, groups=6),
        # a subclass that does more
        type("Own", (timm.layers.Conv2dSame,), {"forward": lambda self, x: x + 1})(6, 6, 3, 2, groups=6),
        type("Own", (timm.layers.Conv2dSame,), {"_conv_forward": lambda self, x, *_: x})(6, 6, 3, 2, groups=6),
    ],
)
def test_other_uneven_padding_is_left_alone(convolution):
    network = nn.Sequential(convolution, nn.Flatten())
    fold_uneven_padding(network, torch.randn(1, 6, 12, 12))
    assert same_convolutions(network) == 1


def test_uneven_padding_of_two_sizes_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = timm.layers.Conv2dSame(6, 6, 3, 2, groups=6)

        def forward(self, x):
            return self.convolution(self.convolution(x)).flatten(1)

    network = Twice()
    fold_uneven_padding(network, torch.randn(1, 6, 12, 12))
    assert same_convolutions(network) == 1


def test_a_network_for_another_size_is_refused_with_the_size():
    with pytest.raises(ModelError, match="3 x 8 x 8"):
        accelerate(nn.Sequential(nn.Flatten(), nn.Linear(3 * 7 * 7, 2)), torch.zeros(1, 3, 8, 8))


def test_a_network_of_two_outputs_is_refused():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ModelError, match="tuple"):
        accelerate(Two(), torch.zeros(1, 3, 8, 8))


def test_gradient_bytes_count_what_autograd_keeps():
    network = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Tanh(), nn.Flatten(), nn.Linear(16 * 100, 2)).requires_grad_(False)
    # the convolution keeps its input, tanh its output; a frozen linear layer keeps only its weights, which all share
    kept = 3 * 100 * 4 + 16 * 100 * 4
    probe = 3 * 100 * 4
    assert gradient_bytes(network, torch.zeros(1, 3, 10, 10)) == 2 * (kept + probe)


def test_gradient_bytes_grow_with_the_network():
    small, large = (
        gradient_bytes(Smooth(), torch.zeros(1, 3, 16, 16)),
        gradient_bytes(Smooth(), torch.zeros(1, 3, 64, 64)),
    )
    assert large > 10 * small


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told to keep memory")
@pytest.mark.parametrize(
    "keep",
    [
        "context = freed_memory_kept(); context.__enter__()",
        "keep_freed_memory(2**29)",
        "keep_freed_memory(2**29)\nwith freed_memory_kept(): pass  # which leaves it as it was",
    ],
)
def test_freed_memory_is_used_again_without_asking_the_system(keep):
    # in a process of its own, whose memory no other test has been through
    program = f"""
import resource, torch
from igstore.machine.freed_memory import freed_memory_kept, keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(10 << 20)  # 40 MiB, which is 10,240 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(page_faults())
{keep}
page_faults()  # after some of them there is room that fits the next
print(page_faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 10 * after


# --- ReLU6 and hard tanh


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(-0.5, 0.25, inplace=True)])
def test_activations_that_keep_their_results_alone(activation):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 8, 3), activation, nn.Flatten())
    x = torch.randn(2, 3, 9, 9) * 8
    x.requires_grad_()
    with torch.no_grad():
        network[0].weight[0] = 0
        network[0].bias[0] = 6.0  # at the bound, where the gradient is 0
        network[0].bias[1] = float("inf")
    expected = network(x)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    keep_results(network)
    assert [type(module) for module in network] == [nn.Conv2d, Clamp, nn.Conv2d, Clamp, nn.Flatten]
    found = network(x)
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], wanted)


def test_activations_leave_alone_what_torch_would_not_overwrite():
    clamp = Clamp(0.0, 6.0, inplace=True)
    leaf = torch.randn(4, requires_grad=True)
    before = leaf.detach().clone()
    clamp(leaf).sum().backward()
    assert torch.equal(leaf.detach(), before)
    assert torch.equal(leaf.grad, ((before > 0) & (before < 6)).float())
    whole = torch.randn(2, 4)
    clamp(whole[0])
    assert bool((whole < 0).any())
    free = torch.randn(4)
    assert clamp(free) is free  # nothing is kept twice


def test_only_torchs_own_activations_are_replaced():
    class Counting(nn.ReLU6):
        pass

    network = nn.Sequential(Counting(), nn.ReLU())
    keep_results(network)
    assert [type(module) for module in network] == [Counting, nn.ReLU]
