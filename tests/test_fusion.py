"""Networks whose convolutions do what surrounds them, against the networks themselves."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional

from igstore.acceleration import accelerate, convolutions
from igstore.acceleration.activations import keep_results, simplify_batch_norm
from igstore.acceleration.convolutions import Convolution, use_convolutions
from igstore.acceleration.fusion import fuse

pytestmark = pytest.mark.skipif(
    not convolutions.available(), reason="the kernel is not compiled, or not for this processor"
)

# Rounding of some 1e-5 of the largest number; what is left out, or done twice, is off by 1.
TOLERANCE = 1e-3


class Network(nn.Module):
    """Two convolutions, a batch norm, and what is made of them."""

    def __init__(self, make: Callable[[Network, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(16, 16, 1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.relu6 = nn.ReLU6()
        self.dropout = nn.Dropout()
        self.identity = nn.Identity()
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)
        self.norm.running_mean = torch.randn(16)
        self.make = make
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.make(self, x)


def fused(network: nn.Module, image: Tensor) -> nn.Module:
    """As `accelerate` does it."""
    network = copy.deepcopy(network)
    keep_results(network)
    simplify_batch_norm(network)
    use_convolutions(network, image)
    return fuse(network, image)


def assert_same(found: nn.Module, wanted: nn.Module, shape: tuple[int, ...] = (3, 16, 9, 11)) -> None:
    """Outputs and gradients, for more images than the one that was looked at; twice, as nothing may have changed."""
    torch.manual_seed(2)
    x = torch.randn(shape, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    expected = copy.deepcopy(wanted).double()(exact.clone())
    gradient = torch.randn(expected.shape)
    (expected_gradient,) = torch.autograd.grad(expected, exact, gradient.double())
    for _ in range(2):
        outputs = found(x.clone())
        (found_gradient,) = torch.autograd.grad(outputs, x, gradient)
        for one, other in ((outputs, expected), (found_gradient, expected_gradient)):
            assert float((one - other).detach().abs().max()) <= TOLERANCE * float(other.detach().abs().max())


def called(network: nn.Module) -> list[str]:
    """What a graph calls, in order."""
    assert isinstance(network, fx.GraphModule)
    names = []
    for node in network.graph.nodes:
        if node.op == "call_module":
            names.append(type(network.get_submodule(node.target)).__name__)
        elif node.op.startswith("call"):
            names.append(getattr(node.target, "__name__", node.target))
    return [name for name in names if name != "getitem"]


ONE, TWO = ["Convolution"], ["Convolution", "Convolution"]


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        (lambda n, x: n.relu(n.first(x)), ONE),
        (lambda n, x: functional.relu(n.second(n.first(x).relu_())), TWO),
        (lambda n, x: torch.relu(n.identity(n.first(x))), ONE),
        (lambda n, x: n.relu6(n.first(x)), ONE),
        (lambda n, x: n.first(x) + x, ONE),
        (lambda n, x: torch.add(x, n.second(x)).relu(), ONE),
        (lambda n, x: n.relu(n.first(x).add_(x)), ONE),
        # either convolution may add the other's outputs: the later one does
        (lambda n, x: n.relu(n.first(x) + n.second(x)), TWO),
        (lambda n, x: n.relu(n.second(x) + n.first(x)), TWO),
        (lambda n, x: n.second(n.relu(n.first(x))) + x, TWO),
        (lambda n, x: n.first(n.relu(n.norm(x))), ONE),
        (lambda n, x: n.first(n.relu(n.norm(n.second(x) + x))), TWO),
        (lambda n, x: torch.cat([n.first(x), functional.max_pool2d(x, 3, 1, 1), n.second(x)], 1),
         ["Convolution", "max_pool2d", "Convolution", "cat"]),
        # what else reads the outputs needs them as they were
        (lambda n, x: (lambda y: n.relu6(y) * y)(n.first(x)), ["Convolution", "Clamp", "mul"]),
        (lambda n, x: (lambda y: (y + x) * y)(n.first(x)), ["Convolution", "add", "mul"]),
        # a sum that is of another shape, of more than tensors, or there only afterwards
        (lambda n, x: n.first(x) + x[:1, :, :1], ["Convolution", "add"]),
        (lambda n, x: n.first(x) + 1, ["Convolution", "add"]),
        (lambda n, x: torch.add(n.first(x), x, alpha=2), ["Convolution", "add"]),
        (lambda n, x: n.first(x) + x.abs(), ["Convolution", "abs", "add"]),
        (lambda n, x: (lambda y: y + y)(n.first(x)), ["Convolution", "add"]),
        # other activations, and batch norms without one, with another one, or before a larger filter
        (lambda n, x: functional.leaky_relu(n.first(x)), ["Convolution", "leaky_relu"]),
        (lambda n, x: n.first(n.norm(x)), ["ScaleAndShift", "Convolution"]),
        (lambda n, x: n.first(n.relu6(n.norm(x))), ["ScaleAndShift", "Clamp", "Convolution"]),
        (lambda n, x: n.second(n.relu(n.norm(x))), ["ScaleAndShift", "ReLU", "Convolution"]),
        (lambda n, x: (lambda y: n.first(y) * y)(n.relu(n.norm(x))), ["ScaleAndShift", "ReLU", "Convolution", "mul"]),
        # one convolution in two places
        (lambda n, x: n.relu(n.first(n.first(x))), ["Convolution", "Convolution", "ReLU"]),
        # what is added is changed in place afterwards
        (lambda n, x: (lambda y: n.first(x).add(y) * y.mul_(2))(n.norm(x)),
         ["ScaleAndShift", "Convolution", "mul_", "mul"]),
    ],
)  # fmt: skip
def test_what_convolutions_take_over(make, calls):
    network = Network(make)
    found = fused(network, torch.randn(1, 16, 9, 11))
    assert called(found) == calls
    assert_same(found, network)


def test_gradients_of_several_readers_are_added_by_the_convolutions():
    def make(network: Network, x: Tensor) -> Tensor:
        y = network.norm(x)
        return torch.cat([network.first(y), network.second(y), functional.avg_pool2d(y, 3, 1, 1)], 1)

    network = Network(make)
    found = fused(network, torch.randn(1, 16, 9, 11))
    modules = [module for module in found.modules() if isinstance(module, Convolution)]
    assert [module.passes_on for module in modules] == [True, True]
    assert_same(found, network)
    assert_same(copy.deepcopy(found), network)


def test_shapes_alone():
    found = fused(Network(lambda n, x: n.relu(n.second(n.first(x)) + x)), torch.randn(1, 16, 9, 11)).to("meta")
    x = torch.empty(2, 16, 9, 11, device="meta", requires_grad=True)
    outputs = found(x)
    assert (outputs.shape, outputs.device.type) == (x.shape, "meta")
    assert torch.autograd.grad(outputs.sum(), x)[0].shape == x.shape


def test_no_graph(caplog):
    def make(network: Network, x: Tensor) -> Tensor:
        y = network.first(x)
        return network.relu(y) if bool(y.detach().sum() > 0) else network.relu6(y)

    caplog.set_level(logging.INFO)
    network = Network(make)
    found = fused(network, torch.randn(1, 16, 9, 11))
    assert type(found) is Network
    assert "the network's graph cannot be had" in caplog.text
    assert_same(found, network)


def test_nothing_to_take_over():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    assert fuse(network, torch.zeros(1, 1, 4, 4)) is network


@pytest.mark.parametrize(
    ("failing", "message"),
    [("wrong", "it would change gradients by"), ("raising", "RuntimeError: one of the variables")],
)
def test_a_wrong_gradient_leaves_the_network_as_it_is(monkeypatch, caplog, failing, message):
    """Outputs alone would not show it."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            if failing == "raising":
                raise RuntimeError("one of the variables has been modified by an inplace operation")
            return 2 * gradient

    network = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Flatten())
    forward = Convolution.forward
    monkeypatch.setattr(Convolution, "forward", lambda self, *given: forward(self, Doubled.apply(given[0]), *given[1:]))
    fast = accelerate(network, torch.zeros(1, 16, 8, 8))
    assert not isinstance(fast, fx.GraphModule)
    assert [type(module) for module in fast.children()] == [nn.Conv2d, nn.ReLU, nn.Flatten]
    assert f"without own convolutions ({message}" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "densenet121",
        "googlenet",
        "mnasnet0_5",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "regnet_y_400mf",
        "resnet18",
        "resnet50",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "vgg11_bn",
    ],
)
def test_torchvision_networks(name):
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    network = torchvision.models.get_model(name, weights=None, num_classes=10, **options).eval()
    fast = accelerate(network, torch.zeros(1, 3, 96, 96))
    assert any(isinstance(module, Convolution) for module in fast.modules())
    x = torch.randn(2, 3, 96, 96, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    outputs, expected = fast(x.clone()), network.double()(exact.clone())
    (gradient,) = torch.autograd.grad(outputs[:, 3].sum(), x)
    (wanted,) = torch.autograd.grad(expected[:, 3].sum(), exact)
    assert float((outputs - expected).detach().norm() / expected.detach().norm()) < 1e-4
    # where rounding moves a unit across 0 its gradient comes or goes: float32 alone does that, too
    assert float((gradient - wanted).norm() / wanted.norm()) < 5e-2


def test_half_precision_has_convolutions_of_torch():
    """Ours are float32's; under autocast torch's own would get what they give, and give what they get, in float16."""
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 64, 3))
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.float16):
        fast = accelerate(network, torch.zeros(1, 3, 12, 12))
        outputs = fast(x)
    assert outputs.dtype == torch.float16
    assert not any(isinstance(module, Convolution) for module in fast.modules())
    assert torch.autograd.grad(outputs.sum(), x)[0].isfinite().all()
