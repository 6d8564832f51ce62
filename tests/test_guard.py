"""What accelerating must not change: networks whose code does more than a graph of modules says, held against torch."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from igstore.acceleration import accelerate, convolutions, hoist_stem
from igstore.acceleration.convolutions import Convolution
from igstore.acceleration.guard import Guard, pictures
from igstore.models import copied

needs_kernel = pytest.mark.skipif(
    not convolutions.available(), reason="the kernel is not compiled, or not for this processor"
)
SIDE = 24


class Turned(Function):
    """A gradient of its own, as in domain-adversarial training and straight-through estimators."""

    @staticmethod
    def forward(context, x):
        return x * 1.0

    @staticmethod
    def backward(context, gradient):
        return -gradient


class Network(nn.Module):
    """Convolutions that the kernel has, batch norms that fold, and a body in between."""

    def __init__(self, body: Callable[[Network, Tensor], Tensor], n_classes: int = 5) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 16, 3, padding=1)
            self.norm = nn.BatchNorm2d(16)
            self.second = nn.Conv2d(16, 16, 3, padding=1)
            self.third = nn.Conv2d(16, 16, 1)
            self.head = nn.Linear(16, n_classes)
            self.place = nn.Parameter(torch.randn(1, 16, SIDE, SIDE))
            nn.init.uniform_(self.norm.running_var, 0.5, 2)
            nn.init.uniform_(self.norm.running_mean, -1, 1)
        self.body = body
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(x)))
        return self.head(self.body(self, x).mean((2, 3)))


def without_gradients(network: Network, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = torch.sigmoid(network.third(x))
    return functional.relu(network.second(x)) * scale


def a_little_without_gradients(network: Network, x: Tensor) -> Tensor:
    with torch.no_grad():
        shift = 0.005 * network.third(x)  # of which a comparison of gradients could see nothing
    return functional.relu(network.second(x) + shift)


def switched_off(network: Network, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    scale = torch.sigmoid(network.third(x))
    torch.set_grad_enabled(True)
    return functional.relu(network.second(x)) * scale


@torch.no_grad()
def decorated(network: Network, x: Tensor) -> Tensor:
    return torch.sigmoid(network.third(x))


def in_inference_mode(network: Network, x: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = torch.sigmoid(network.third(x))
    return functional.relu(network.second(x)) * scale.clone()


def in_half_precision(network: Network, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = functional.relu(network.second(x))
    return functional.relu(network.third(y.float()))


def in_full_precision_within_half(network: Network, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = functional.relu(network.second(x))
        y = network.third(y)
    return y.float().relu()


def clipped_by_a_hook(network: Network, x: Tensor) -> Tensor:
    y = network.second(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    return functional.relu(y)


def with_a_gradient_of_its_own(network: Network, x: Tensor) -> Tensor:
    return functional.relu(network.second(x)) + 0.3 * Turned.apply(network.third(x))


def in_place_for_its_effect(network: Network, x: Tensor) -> Tensor:
    y = network.second(x)
    y.mul_(3)
    y.relu_()
    return y + network.third(x)


def what_is_added_changes_in_place(network: Network, x: Tensor) -> Tensor:
    y = network.second(x)
    z = network.third(x)
    y.mul_(2)
    return functional.relu(z + y)


def by_the_numbers(network: Network, x: Tensor) -> Tensor:
    y = network.second(x)
    return functional.relu(y) if bool(y.detach().mean() > -1e9) else y


def by_the_mode(network: Network, x: Tensor) -> Tensor:
    y = network.second(x)
    return functional.relu(y) * (1.5 if torch.is_grad_enabled() and y.requires_grad else 1.0)


def with_a_constant_part(network: Network, x: Tensor) -> Tensor:
    return functional.relu(network.second(x)) * torch.sigmoid(network.third(x)).detach()


def behind_the_back_of_gradients(network: Network, x: Tensor) -> Tensor:
    y = network.second(x) * 1.0
    y.data.mul_(1.3)
    return functional.relu(y)


def by_strides(network: Network, x: Tensor) -> Tensor:
    y = network.second(x)
    return functional.relu(y.as_strided(y.shape, (16 * SIDE * SIDE, SIDE * SIDE, SIDE, 1)))


def by_the_layout(network: Network, x: Tensor) -> Tensor:
    y = network.second(x)
    return functional.relu(y) if y.is_contiguous() else y


def with_a_view_of_another_order(network: Network, x: Tensor) -> Tensor:
    y = network.second(x).permute(0, 2, 3, 1).contiguous()
    return functional.relu(y.view(len(x), -1, 16)).transpose(1, 2).view(len(x), 16, SIDE, SIDE)


def with_a_weight_that_is_used_twice(network: Network, x: Tensor) -> Tensor:
    again = functional.conv2d(x, network.second.weight, padding=1)
    return functional.relu(network.norm(network.second(x))) + functional.relu(again)


def with_the_numbers_of_a_batch_norm(network: Network, x: Tensor) -> Tensor:
    return functional.relu(network.second(x) * network.norm.running_var[:, None, None])


def with_gradients_within(network: Network, x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(network.third(z).square().sum(), z)
    return functional.relu(network.second(x)) * torch.sigmoid(gradient)


def with_gradients_of_gradients(network: Network, x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x if x.requires_grad else x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network.third(z).square().sum(), z, create_graph=True)
    return functional.relu(network.second(x) + 0.1 * gradient)


def checkpointed(network: Network, x: Tensor) -> Tensor:
    return checkpoint(lambda y: functional.relu(network.second(y)), x, use_reentrant=False)


def mapped(network: Network, x: Tensor) -> Tensor:
    return functional.relu(torch.vmap(lambda y: network.second(y[None])[0])(x))


def of_frequencies(network: Network, x: Tensor) -> Tensor:
    return functional.relu(torch.fft.irfft2(torch.fft.rfft2(network.second(x)).conj(), s=(SIDE, SIDE)))


def by_the_largest(network: Network, x: Tensor) -> Tensor:
    y = network.second(x)
    return functional.relu(y) / (1 + y.flatten(1).norm(p=float("inf"), dim=1))[:, None, None, None]


BODIES = [
    by_the_mode,
    with_a_constant_part,
    behind_the_back_of_gradients,
    by_strides,
    by_the_layout,
    with_a_view_of_another_order,
    with_a_weight_that_is_used_twice,
    with_the_numbers_of_a_batch_norm,
    with_gradients_within,
    with_gradients_of_gradients,
    checkpointed,
    mapped,
    of_frequencies,
    by_the_largest,
    without_gradients,
    a_little_without_gradients,
    switched_off,
    lambda network, x: functional.relu(network.second(x)) * decorated(network, x),
    in_inference_mode,
    in_half_precision,
    in_full_precision_within_half,
    clipped_by_a_hook,
    with_a_gradient_of_its_own,
    in_place_for_its_effect,
    what_is_added_changes_in_place,
    by_the_numbers,
    # of one image it has the shape of the convolution's outputs; of more it has not
    lambda network, x: functional.relu(network.place + network.second(x)),
    lambda network, x: functional.relu(network.second(x) + network.place),
    lambda network, x: functional.relu(network.second(x)) + network.place.sum(),
]
NAMES = [getattr(body, "__name__", "") for body in BODIES]


def answers(network: nn.Module, x: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    outputs = network(leaf.clone())
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(seed))
    (gradient,) = torch.autograd.grad((outputs * weights).sum(), leaf)
    return outputs.detach(), gradient


def images(count: int, seed: int = 2) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def assert_same_answers(fast: nn.Module, network: nn.Module, x: Tensor, tolerance: float = 2e-3) -> None:
    """The tolerance is that of float32: nothing here is deep, and what is wrong is wrong by a tenth or more."""
    for found, expected in zip(answers(fast, x), answers(network, x), strict=True):
        assert float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("body", BODIES, ids=NAMES)
def test_forward_passes_that_a_graph_cannot_say(body, count, capfd):
    network = Network(body)
    probe = torch.zeros(1, 3, SIDE, SIDE)
    fast = hoist_stem(accelerate(network, probe), probe)
    assert torch.is_grad_enabled()
    # bfloat16 within makes of the last bit of float32 a whole one of its own
    tolerance = 2e-2 if "precision" in body.__name__ else 2e-3
    assert_same_answers(fast, network, images(count), tolerance)
    assert "Traceback" not in capfd.readouterr().err


def test_a_small_part_without_gradients_is_not_forgotten():
    """Too small for a comparison; so the graph is not used at all."""
    network = Network(a_little_without_gradients)
    fast = accelerate(network, torch.zeros(1, 3, SIDE, SIDE))
    assert type(fast) is Network


# --- Hooks


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("name", ["", "first", "norm", "second", "third", "head"])
@pytest.mark.parametrize(
    "kind",
    [
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_forward_hook",
        "register_forward_pre_hook",
    ],
)
def test_hooks_stay(kind, name, control):
    def body(network: Network, x: Tensor) -> Tensor:
        y = functional.relu(network.second(x))
        if control and bool(y.detach().sum() > -1e9):
            y = y * 2
        return functional.relu(network.third(y)) + x

    network = Network(body)
    hooks = {
        "register_full_backward_hook": lambda module, given, _: tuple(
            None if one is None else 3 * one for one in given
        ),
        "register_full_backward_pre_hook": lambda module, made: tuple(3 * one for one in made),
        "register_forward_hook": lambda module, given, made: made.tanh(),
        "register_forward_pre_hook": lambda module, given: tuple(one.sin() for one in given),
    }
    getattr(network.get_submodule(name), kind)(hooks[kind])
    probe = torch.zeros(1, 3, SIDE, SIDE)
    fast = hoist_stem(accelerate(network, probe), probe)
    assert_same_answers(fast, network, images(2))


def test_an_own_forward_of_one_module_stays():
    network = Network(lambda network, x: functional.relu(network.third(network.second(x))))
    own = network.second.forward
    network.second.forward = lambda x: own(x).sin()
    probe = torch.zeros(1, 3, SIDE, SIDE)
    assert_same_answers(hoist_stem(accelerate(network, probe), probe), network, images(2))


# --- Logits


@pytest.mark.parametrize("masked", [-1e9, -1e4, float("-inf"), 1e30])
def test_masked_logits_hide_nothing(masked):
    """Their size is not that of the others, which is what differences are measured by."""

    class Masked(Network):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            allowed = torch.arange(logits.shape[1]) < 2
            return logits.masked_fill(~allowed, masked)

    network = Masked(lambda network, x: functional.relu(network.second(x)))
    guard = Guard(network, pictures(torch.zeros(1, 3, SIDE, SIDE)))
    assert guard.objection(copy.deepcopy(network)) is None
    wrong = copy.deepcopy(network)
    wrong.second.weight.mul_(1.05)
    assert "it would change" in str(guard.objection(wrong))


@pytest.mark.parametrize("masked", [-1e9, float("-inf"), float("nan")])
@pytest.mark.parametrize(
    "body", [without_gradients, switched_off, in_half_precision, clipped_by_a_hook, with_a_gradient_of_its_own]
)
def test_networks_with_masked_logits(body, masked):
    class Masked(Network):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x), torch.full((len(x), 3), masked)], dim=1)

    class Unmasked(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)[:, :5]

    network = Masked(body)
    probe = torch.zeros(1, 3, SIDE, SIDE)
    fast = hoist_stem(accelerate(network, probe), probe)
    tolerance = 2e-2 if "precision" in body.__name__ else 2e-3
    assert_same_answers(Unmasked(fast), Unmasked(network), images(2), tolerance)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_logits_of_any_size_are_compared(size):
    class Scaled(Network):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return torch.cat([logits[:, :1] * size, logits[:, 1:]], dim=1)

    network = Scaled(lambda network, x: functional.relu(network.second(x)))
    guard = Guard(network, pictures(torch.zeros(1, 3, SIDE, SIDE)))
    assert guard.objection(copy.deepcopy(network)) is None
    for row in (0, 1):
        wrong = copy.deepcopy(network)
        wrong.head.weight[row] *= -1
        assert guard.objection(wrong) is not None


def test_gradients_are_compared_where_outputs_are_the_same():
    network = Network(lambda network, x: functional.relu(network.second(x)))
    wrong = Network(lambda network, x: functional.relu(network.second(x)) * 1.0 + 0.0 * network.second(x))
    guard = Guard(network, pictures(torch.zeros(1, 3, SIDE, SIDE)))
    assert guard.objection(wrong) is None
    wrong.body = lambda network, x: functional.relu(network.second(x).detach() * 0.1 + network.second(x) * 0.9)
    assert "it would change gradients by 1.0e-01" in str(guard.objection(wrong))


@needs_kernel
def test_gradients_that_are_no_numbers_on_even_pictures_are_not_compared():
    """The square root of a spread of 0 has none."""

    class Normalised(Network):
        def forward(self, x: Tensor) -> Tensor:
            spread = x.var(dim=(2, 3), keepdim=True).sqrt()
            return super().forward((x - x.mean(dim=(2, 3), keepdim=True)) / (spread + 1e-3))

    network = Normalised(lambda network, x: functional.relu(network.second(x)))
    fast = accelerate(network, torch.zeros(1, 3, SIDE, SIDE))
    assert any(isinstance(module, Convolution) for module in fast.modules())
    assert_same_answers(fast, network, images(2))


def test_a_network_without_gradients_is_left_alone(caplog):
    class Off(Network):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    network = Off(lambda network, x: functional.relu(network.second(x)))
    fast = accelerate(network, torch.zeros(1, 3, SIDE, SIDE))
    assert type(fast.second) is nn.Conv2d
    assert "no gradients" in caplog.text
    assert torch.equal(fast(images(2)), network(images(2)))


# --- Layouts and shapes


class Tutorial(nn.Module):
    """As torch's own tutorial writes a classifier: `view` wants the layout that channels last is not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv1 = nn.Conv2d(3, width, 5)
            self.conv2 = nn.Conv2d(width, 2 * width, 5)
            self.fc = nn.Linear(2 * width * 9, 10)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        return self.fc(x.view(-1, 2 * self.width * 9))


@pytest.mark.parametrize("width", [6, 16])
@pytest.mark.parametrize("graph", [True, False])
def test_a_view_of_the_last_map(width, graph):
    network = Tutorial(width).eval().requires_grad_(False)
    if not graph:
        network.register_forward_hook(lambda module, given, made: made)
    fast = accelerate(network, torch.zeros(1, 3, 24, 24))
    assert_same_answers(fast, network, images(3))
    if graph and width == 16 and convolutions.available():
        assert any(isinstance(module, Convolution) for module in fast.modules())


def test_filters_of_five_dimensions():
    class Lambda(Network):
        def __init__(self) -> None:
            super().__init__(lambda network, x: network.deep(network.second(x)[:, None])[:, 0])
            self.deep = nn.Conv3d(1, 1, (1, 3, 3), padding=(0, 1, 1)).requires_grad_(False)

    network = Lambda()
    fast = accelerate(network, torch.zeros(1, 3, SIDE, SIDE))
    assert_same_answers(fast, network, images(2))


def test_a_network_that_takes_one_image_at_a_time(caplog):
    class Single(Network):
        def forward(self, x: Tensor) -> Tensor:
            x = functional.relu(self.second(functional.relu(self.norm(self.first(x)))))
            return self.head(x.mean((2, 3)).reshape(1, -1))

    network = Single(lambda network, x: x)
    fast = accelerate(network, torch.zeros(1, 3, SIDE, SIDE))
    assert_same_answers(fast, network, images(1))


# --- Weights that are made anew each time


def weight_norm(network: Network) -> None:
    network.second = parametrizations.weight_norm(network.second)


def spectral_norm(network: Network) -> None:
    network.second = parametrizations.spectral_norm(network.second)


def older_weight_norm(network: Network) -> None:
    network.second = nn.utils.weight_norm(network.second)


def older_spectral_norm(network: Network) -> None:
    network.second = nn.utils.spectral_norm(network.second)


def pruned(network: Network) -> None:
    prune.l1_unstructured(network.second, "weight", 0.5)


def pruned_twice(network: Network) -> None:
    prune.l1_unstructured(network.second, "weight", 0.3)
    prune.random_structured(network.second, "weight", amount=2, dim=0)


def orthogonal(network: Network) -> None:
    network.second = parametrizations.orthogonal(network.second)


def pruned_bias(network: Network) -> None:
    prune.l1_unstructured(network.first, "bias", 0.5)


MADE_ANEW = [
    weight_norm,
    spectral_norm,
    older_weight_norm,
    older_spectral_norm,
    pruned,
    pruned_twice,
    orthogonal,
    pruned_bias,
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*weight_norm.*:DeprecationWarning")
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("change", MADE_ANEW, ids=lambda change: change.__name__)
def test_weights_that_are_made_anew_each_time(change, used):
    def body(network: Network, x: Tensor) -> Tensor:
        return functional.relu(network.norm(network.second(x)))

    network = Network(body)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network.requires_grad_(True)
        change(network)
    network.eval()
    if used:
        network(images(1))  # leaves a weight with a history behind, which deepcopy refuses
    probe = torch.zeros(1, 3, SIDE, SIDE)
    fast = hoist_stem(accelerate(network, probe), probe)
    assert_same_answers(fast, network, images(2))
    assert_same_answers(copied(network), network, images(2))


# --- Other kinds of networks


@pytest.mark.parametrize(
    "compile_network", [torch.jit.script, lambda network: torch.jit.trace(network, images(1))], ids=["script", "trace"]
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_torchscript(compile_network):
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    ).eval()
    compiled = compile_network(network)
    fast = accelerate(compiled, torch.zeros(1, 3, SIDE, SIDE))
    assert_same_answers(fast, network, images(2))
    assert all(parameter.requires_grad for parameter in compiled.parameters())


def test_a_stem_that_is_not_affine_stays():
    class Squashing(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.tanh())

    network = nn.Sequential(Squashing(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 22 * 22, 5)).requires_grad_(
        False
    )
    assert hoist_stem(network, torch.zeros(1, 3, SIDE, SIDE)) is network


@needs_kernel
def test_nothing_is_said_where_all_goes_well(caplog):
    caplog.set_level(logging.INFO)
    network = Network(lambda network, x: functional.relu(network.second(x)))
    fast = accelerate(network, torch.zeros(1, 3, SIDE, SIDE))
    assert any(isinstance(module, Convolution) for module in fast.modules())
    assert not caplog.records
