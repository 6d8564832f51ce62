from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as npst
from networks import InPlace, Linear, Quadratic, Smooth
from torch import nn

from igstore.attribution import METHODS, completeness_error, integrated_gradients, numerics, rule
from igstore.attribution.engine import to_float16
from igstore.errors import ModelError, UserError


def images(n: int = 3, size: int = 13, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 3, size, size, generator=generator, dtype=dtype)
    b = torch.randn(n, 3, size, size, generator=generator, dtype=dtype)
    return x, b


def frozen(network: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    return network.eval().requires_grad_(False).to(dtype)


TARGETS = torch.tensor([4, 0, 6])


@pytest.mark.parametrize("method", ["riemann_right", "riemann_left", "riemann_middle", "gausslegendre"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_equal_to_captum_in_float64(method, batch_size):
    network = frozen(Smooth())
    x, b = images()
    # captum rounds its weights to float32: 1/16 survives that, Gauss-Legendre's weights do not
    n_steps = 16
    ours = integrated_gradients(
        network, x, b, TARGETS, method=method, n_steps=n_steps, reduce="none", batch_size=batch_size
    )
    captum, delta = IntegratedGradients(network).attribute(
        x, b, target=TARGETS, n_steps=n_steps, method=method, return_convergence_delta=True
    )
    rounding = 2.0**-24 * float(captum.abs().max()) if method == "gausslegendre" else 0
    torch.testing.assert_close(ours.maps, captum, rtol=0, atol=1e-10 + rounding)
    change = ours.output - ours.baseline_output
    torch.testing.assert_close(ours.completeness_error, delta.abs() / change.abs(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("baselines", ["different", "the same"])
@pytest.mark.parametrize("method", ["riemann_right", "riemann_left", "riemann_trapezoid"])
@pytest.mark.parametrize("output", ["logit", "probability"])
def test_outputs_are_those_of_the_network(output, method, baselines):
    network = frozen(Smooth())
    x, b = images()
    if baselines == "the same":
        b = b[:1].repeat(3, 1, 1, 1)
    # 3 steps of 3 images in batches of 4, so that images are cut
    ours = integrated_gradients(network, x, b, TARGETS, method=method, n_steps=3, output=output, batch_size=4)
    with torch.no_grad():
        f_x, f_b = network(x), network(b)
    if output == "probability":
        f_x, f_b = f_x.softmax(1), f_b.softmax(1)
    torch.testing.assert_close(ours.output, f_x[range(3), TARGETS])
    torch.testing.assert_close(ours.baseline_output, f_b[range(3), TARGETS])


def test_probability_is_attributed_as_captum_attributes_a_softmax():
    network = frozen(Smooth())
    x, b = images()
    ours = integrated_gradients(network, x, b, TARGETS, n_steps=8, output="probability", reduce="none")
    captum = IntegratedGradients(nn.Sequential(network, nn.Softmax(1))).attribute(
        x, b, target=TARGETS, n_steps=8, method="riemann_right"
    )
    torch.testing.assert_close(ours.maps, captum, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_steps", [2, 3, 10])
def test_a_linear_model_is_exact_for_every_rule(method, n_steps):
    network = frozen(Linear())
    x, b = images(size=6)
    targets = torch.tensor([0, 3, 4])
    ours = integrated_gradients(network, x, b, targets, method=method, n_steps=n_steps, reduce="none")
    torch.testing.assert_close(ours.maps, network.weight[targets] * (x - b), rtol=0, atol=1e-12)
    assert (ours.completeness_error < 1e-12).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_quadratic_model_is_as_the_rules_first_moment_says(method):
    """The gradient is linear in alpha, so the quadrature is known: 2 (k+1) (x-b) (b + E[alpha] (x-b))."""
    network = frozen(Quadratic())
    x, b = images(size=5)
    targets = torch.tensor([0, 1, 2])
    alphas, weights = rule(method, 6)
    expected = 2 * (targets + 1)[:, None, None, None] * (x - b) * (b + float(weights @ alphas) * (x - b))
    ours = integrated_gradients(network, x, b, targets, method=method, n_steps=6, reduce="none")
    torch.testing.assert_close(ours.maps, expected, rtol=0, atol=1e-11)


def test_one_right_hand_step_is_gradient_times_difference():
    network = frozen(Smooth())
    x, b = images()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(leaf)[range(3), TARGETS].sum(), leaf)
    ours = integrated_gradients(network, x, b, TARGETS, n_steps=1, reduce="none")
    torch.testing.assert_close(ours.maps, gradient * (x - b), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("reduce", "formula"),
    [
        ("sum", lambda a: a.sum(1)),
        ("positive", lambda a: np.maximum(a, 0).sum(1)),
        ("absolute", lambda a: np.abs(a).sum(1)),
        ("none", lambda a: a),
    ],
)
def test_channels_are_reduced_after_the_integral(reduce, formula):
    network = frozen(Smooth())
    x, b = images()
    whole = integrated_gradients(network, x, b, TARGETS, n_steps=4, reduce="none")
    ours = integrated_gradients(network, x, b, TARGETS, n_steps=4, reduce=reduce)
    np.testing.assert_allclose(ours.maps.numpy(), formula(whole.maps.numpy()), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.completeness_error, whole.completeness_error)


def test_the_batch_an_image_is_in_does_not_matter():
    network = frozen(Smooth())
    x, b = images()
    together = integrated_gradients(network, x, b, TARGETS, n_steps=7, batch_size=4)
    for i in range(3):
        alone = integrated_gradients(network, x[[i]], b[[i]], TARGETS[[i]], n_steps=7, batch_size=4)
        torch.testing.assert_close(together.maps[[i]], alone.maps, rtol=0, atol=1e-12)


def test_a_network_that_writes_to_its_input_is_attributed_right():
    network, twin = frozen(InPlace()), frozen(nn.Sequential(nn.ReLU(), Smooth()))
    twin[1].load_state_dict(network.inner.state_dict())
    x, b = images()
    kept = x.clone()
    ours = integrated_gradients(network, x, b, TARGETS, n_steps=5)
    theirs = integrated_gradients(twin, x, b, TARGETS, n_steps=5)
    torch.testing.assert_close(ours.maps, theirs.maps, rtol=0, atol=0)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("total", "difference", "expected"), [(1.5, 1.0, 0.5), (0.0, 0.0, 0.0), (1.0, 0.0, np.inf), (-1.0, -2.0, 0.5)]
)
def test_completeness_error(total, difference, expected):
    assert completeness_error(torch.tensor(total), torch.tensor(difference)) == expected


class Scaled(nn.Module):
    """Another network's logits times a factor, in float32 whatever precision comes before."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x):
        return self.inner(x).float() * self.factor


def test_float16_gradients_survive_outputs_whose_gradients_are_tiny_or_huge():
    x, b = images(dtype=torch.float32)
    for size in (1e-7, 1e4):
        network = frozen(Scaled(Smooth(), size), torch.float32)
        exact = integrated_gradients(network, x, b, TARGETS, n_steps=6).maps
        rough = integrated_gradients(network, x, b, TARGETS, n_steps=6, precision="float16").maps
        # 10 mantissa bits a step of the network; an unscaled gradient would vanish or overflow instead
        assert ((rough - exact).norm() / exact.norm()) < 0.02


def test_precisions_of_other_devices_are_refused():
    with pytest.raises(UserError, match="float32"), numerics("tf32", torch.device("cpu")):
        pass


def test_numerics_leaves_the_global_settings_as_they_were():
    def settings() -> tuple[bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, cudnn.deterministic

    def fail_inside() -> None:
        with numerics("float32", torch.device("cpu")):
            assert settings() == (False, False, True)
            raise ZeroDivisionError

    before = settings()
    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert settings() == before == (True, False, False)


class Wrong(nn.Module):
    def __init__(self, result) -> None:
        super().__init__()
        self.result = result

    def forward(self, x):
        return self.result(x)


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (lambda x: x, r"\(3, 3, 13, 13\)"),
        (lambda x: (x.sum((2, 3)),), "tuple"),
        (lambda x: x.sum((2, 3))[:1], r"\(1, 3\)"),
    ],
    ids=["feature map", "tuple", "wrong batch"],
)
def test_a_network_that_is_no_classifier_is_refused(result, says):
    x, b = images()
    with pytest.raises(ModelError, match=says):
        integrated_gradients(Wrong(result), x, b, TARGETS)


def stored_form(maps):
    """As `to_float16`, of NumPy's arrays."""
    return [found.numpy() for found in to_float16(torch.from_numpy(maps))]


class TestFloat16:
    @given(
        npst.arrays(
            np.float32,
            st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
            elements=st.floats(-(2.0**100), 2.0**100, width=32),
        )
    )
    def test_scale_is_the_power_of_two_that_the_schema_asks_for(self, maps):
        stored, scale = stored_form(maps)
        assert stored.dtype == np.float16
        assert scale.dtype == np.float32
        for image, kept, factor in zip(maps, stored, scale, strict=True):
            largest = np.abs(image).max()
            assert np.frexp(factor)[0] == 0.5  # a power of two
            if largest == 0:
                assert factor == 1
                assert not kept.any()
            else:
                assert 1 <= largest / factor < 2
                # float16 has 11 significant bits, and the largest value lies in [1, 2); 2**-24 is its smallest step
                error = np.abs(kept.astype(np.float64) * factor - image)
                assert (error <= np.maximum(np.abs(image) * 2.0**-11, np.float64(factor) * 2.0**-25)).all()

    def test_tiny_maps_keep_their_precision(self):
        maps = np.random.default_rng(0).standard_normal((1, 20, 20)).astype(np.float32)
        stored, _ = stored_form(maps)
        tiny, scale = stored_form(maps * np.float32(2.0**-100))
        np.testing.assert_array_equal(stored, tiny)
        assert scale[0] == stored_form(maps)[1][0] * 2.0**-100


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu():
    network = frozen(Smooth(), torch.float32)
    x, b = images(dtype=torch.float32)
    cpu = integrated_gradients(network, x, b, TARGETS, n_steps=20).maps
    gpu = integrated_gradients(network.cuda(), x.cuda(), b.cuda(), TARGETS.cuda(), n_steps=20).maps.cpu()
    assert (cpu - gpu).norm() / cpu.norm() < 1e-5  # float32 rounding; tf32 would be near 3e-4


def test_batches_are_of_one_size():
    """A small one at the end would take longer an item."""
    seen = []

    class Counting(torch.nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x.flatten(1)[:, :2] ** 2

    x = torch.rand(2, 1, 2, 2)
    integrated_gradients(Counting(), x, torch.zeros_like(x), torch.tensor([0, 1]), n_steps=9, batch_size=8)
    assert seen == [1, 6, 6, 6]  # the baseline, and eighteen pairs
