"""The Integrated Gradients engine: batches of (image, step) pairs in, one map per image out.

Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks", 2017:
``IG_i(x) = (x_i - b_i) * integral over alpha in [0, 1] of df/dx_i (b + alpha (x - b))``,
the integral taken by one of `igstore.attribution.quadrature`'s rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from igstore.acceleration import Hoisted, OnLines
from igstore.attribution.quadrature import rule
from igstore.errors import ModelError, UserError, option
from igstore.machine import fresh_torch
from igstore.models import scores_of
from igstore.schema import (
    DEFAULT_METHOD,
    BuildSpec,
    FormerPrecision,
    LearnedRule,
    Method,
    Output,
    Precision,
    Reduce,
    check_choice,
    whole_number,
)

# float16 gradients below 6e-5 lose bits and below 6e-8 vanish, so the output is scaled before differentiating;
# when that overflows, the batch is done again with a smaller scale.
_FLOAT16_SCALES = (2.0**14, 2.0**8, 2.0**2, 1.0)

# With fewer steps, a stem taken out of the path costs more memory, for its outputs on all the images, than time.
FEWEST_STEPS = 16


@dataclass(frozen=True)
class Attributions:
    """What `integrated_gradients` finds for a batch; tensors on the inputs' device.

    Attributes
    ----------
    maps
        (image, y, x), or (image, channel, y, x) for ``reduce="none"``, in the inputs' dtype.
    output, baseline_output
        f(x) and f(b) of the target, float64 (image,).
    completeness_error
        ``|sum of the attributions - (f(x) - f(b))| / |f(x) - f(b)|``, float64 (image,); 0 if both are 0, inf if only
        the denominator is. The sum is that of the signed attributions, whatever `reduce` is.
    n_steps
        Gradient evaluations spent on each image, int64 (image,).
    """

    maps: Tensor
    output: Tensor
    baseline_output: Tensor
    completeness_error: Tensor
    n_steps: Tensor


def check_precision(precision: Precision | FormerPrecision, device: torch.device) -> None:
    """Raise `UserError` where `device` has no such arithmetic."""
    check_choice("precision", precision, Precision)
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"{option('precision')} tf32 is a mode of CUDA devices; the device is {device}: use float32")


@contextmanager
def numerics(precision: Precision | FormerPrecision, device: torch.device) -> Iterator[None]:
    """Fix the arithmetic of everything inside, whatever the caller has set in torch, which is restored afterwards.

    It is as `igstore.machine.fresh_torch` says, with tf32 or float16 autocast where that is the precision.
    """
    check_precision(precision, device)
    with ExitStack() as stack:
        stack.enter_context(fresh_torch(device, tf32=precision == "tf32"))
        if precision == "float16":
            stack.enter_context(torch.autocast(device.type, dtype=torch.float16))
        yield


def logits(network: nn.Module, inputs: Tensor, batch_size: int) -> Tensor:
    """The network's outputs on normalised `inputs` (image, channel, y, x), without gradients: (image, class).

    Raises
    ------
    ModelError
        The network does not return one row of class scores per image.
    """
    with torch.no_grad():
        return torch.cat([scores_of(network, inputs[i : i + batch_size]) for i in range(0, len(inputs), batch_size)])


def select_output(scores: Tensor, targets: Tensor, output: Output) -> Tensor:
    """The target's logit or probability, (image,), from logits (image, class) and class indices (image,).

    The probability is the softmax over the classes, or of one output alone, whose softmax is 1, its sigmoid.
    """
    # half precision has too few bits for a softmax over a thousand classes
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    if output == "probability":
        scores = scores.sigmoid() if scores.shape[1] == 1 else scores.softmax(dim=1)
    return scores.gather(1, targets[:, None])[:, 0]


def _baseline_logits(network: nn.Module, baselines: Tensor, batch_size: int) -> Tensor:
    """As `logits`; of baselines that are all the same, once."""
    # to compare them the host would wait for a GPU, which an expanded tensor spares it
    if baselines.stride(0) == 0 or (baselines.device.type == "cpu" and bool((baselines == baselines[:1]).all())):
        return logits(network, baselines[:1], batch_size).expand(len(baselines), -1)
    return logits(network, baselines, batch_size)


def _gradient(
    network: nn.Module, points: Tensor, targets: Tensor, output: Output, scaled: bool
) -> tuple[Tensor, Tensor]:
    """d output / d points, in the points' dtype, (pair, channel, y, x), and the output, (pair,)."""
    for scale in _FLOAT16_SCALES if scaled else (1.0,):
        leaf = points.detach().requires_grad_()
        selected = select_output(scores_of(network, leaf), targets, output)
        total = selected.sum() * scale
        found = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
        if found is None:
            raise ModelError(
                "the network's outputs have no gradient with respect to its input: its forward pass switches gradients "
                "off, or is quantised"
            )
        gradient: Tensor = found
        if not scaled or gradient.isfinite().all():
            break
    return gradient / scale if scaled else gradient, selected.detach()


def reduce_channels(attributions: Tensor, reduce: Reduce) -> Tensor:
    """(image, channel, y, x) to (image, y, x): the sum over channels of a, of max(a, 0) or of |a|; "none" keeps all."""
    if reduce == "none":
        return attributions
    if reduce == "positive":
        attributions = attributions.clamp(min=0)
    elif reduce == "absolute":
        attributions = attributions.abs()
    return attributions.sum(dim=1)


def completeness_error(total: Tensor, difference: Tensor) -> Tensor:
    """``|total - difference| / |difference|``; 0 where both are 0, inf where only the difference is."""
    gap = (total - difference).abs()
    return torch.where(gap == 0, gap, gap / difference.abs())


def integrated_gradients(
    network: nn.Module,
    inputs: Tensor,
    baselines: Tensor,
    targets: Tensor,
    *,
    method: Method | LearnedRule = DEFAULT_METHOD,
    n_steps: int = BuildSpec.n_steps,
    output: Output = BuildSpec.output,
    reduce: Reduce = BuildSpec.reduce,
    precision: Precision | FormerPrecision = BuildSpec.precision,
    batch_size: int = 16,
) -> Attributions:
    """Integrated Gradients of `network` along the straight path from `baselines` to `inputs`.

    Pairs of different images share batches, so the batch size is free of the number of steps. IG does not change under
    an affine change of the input, so inputs may be pixels or normalised, as long as `network` takes them.

    Parameters
    ----------
    network
        In evaluation mode; maps (pair, channel, y, x) to logits (pair, class). The stem of a `Hoisted` one runs once
        an image, from `FEWEST_STEPS` steps on.
    inputs, baselines
        (image, channel, y, x), floating point, one dtype, on one device.
    targets
        Class indices, int64 (image,).
    method, n_steps
        A rule of `igstore.attribution.quadrature` and its number of gradient evaluations m.
    output
        What f is: the target's logit or its softmax probability; of a network with one output, the sigmoid of that.
    reduce
        How channels become one map: ``sum`` of a, of max(a, 0) (``positive``), of abs(a) (``absolute``), or ``none``.
    precision
        ``float32`` (tf32 off); ``mixed``, of an `igstore.acceleration.OnLines` alone (forward passes as exact
        as float32, backward passes in float16; of other networks it is float32); ``tf32`` (CUDA only); or ``float16``
        (autocast, scaled gradients; sums stay float32).
    batch_size
        (image, step) pairs per gradient evaluation, at most.

    Returns
    -------
    Attributions

    Raises
    ------
    UserError
        Unknown method, output, reduction or precision; too few steps.
    ModelError
        The network does not return (pair, class).

    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5))  # linear, so one step is exact
    >>> inputs = torch.rand(2, 3, 8, 8)
    >>> found = integrated_gradients(network, inputs, torch.zeros_like(inputs), torch.tensor([0, 4]), n_steps=1)
    >>> tuple(found.maps.shape), bool((found.completeness_error < 1e-3).all())
    ((2, 8, 8), True)
    """
    check_choice("output", output, Output)
    check_choice("reduce", reduce, Reduce)
    batch_size = whole_number("batch_size", batch_size, 1)
    _check_tensors(network, inputs, baselines, targets)
    alphas, weights = rule(method, n_steps)
    stem: nn.Module = nn.Identity()
    body = network
    if isinstance(network, Hoisted) and n_steps >= FEWEST_STEPS:
        stem, body = network.stem, network.body
    lines = network if precision == "mixed" and isinstance(network, OnLines) else None
    if isinstance(network, OnLines):
        body = network.network
    with numerics(precision, inputs.device):
        # what was made in inference mode can have no gradient
        inputs, baselines = (one.clone() if one.is_inference() else one for one in (inputs, baselines))
        f_x = torch.full(targets.shape, torch.nan, dtype=torch.float64, device=inputs.device)
        f_b = select_output(_baseline_logits(network, baselines, batch_size), targets, output).double()
        with _full_precision(inputs.device), torch.no_grad():
            first = stem(baselines)
            difference = stem(inputs) - first  # the path, where the body sees it
        sums = torch.zeros_like(difference)  # weighted sums of gradients

        def select(scores: Tensor, some: Tensor) -> Tensor:
            return select_output(scores, some, output)

        if lines is not None:
            lines.add_gradients(sums, f_x, alphas, weights, first, difference, targets, select, batch_size)
        else:
            _add_gradients(sums, f_x, alphas, weights, body, first, difference, targets, output, batch_size)
        if alphas[-1] != 1:  # the path ended before the images
            f_x = select_output(logits(network, inputs, batch_size), targets, output).double()
        attributions = (inputs - baselines) * _transpose(stem, inputs, sums)  # (image, channel, y, x)
        return Attributions(
            maps=reduce_channels(attributions, reduce),
            output=f_x,
            baseline_output=f_b,
            completeness_error=completeness_error(attributions.flatten(1).sum(dim=1, dtype=torch.float64), f_x - f_b),
            n_steps=torch.full_like(targets, n_steps),
        )


def _check_tensors(network: Any, inputs: Any, baselines: Any, targets: Any) -> None:
    """Raise `UserError` unless there is a network, images and baselines of one shape, and a class index for each."""
    if not isinstance(network, nn.Module):
        raise UserError(f"the network is a {type(network).__name__}; it must be a torch.nn.Module")
    for name, tensor in (("inputs", inputs), ("baselines", baselines)):
        if not isinstance(tensor, Tensor) or tensor.ndim != 4 or not tensor.is_floating_point():
            raise UserError(
                f"{name} must be a floating-point tensor (image, channel, y, x); it is {_described(tensor)}"
            )
    if inputs.shape != baselines.shape:
        raise UserError(
            f"inputs are {tuple(inputs.shape)} and baselines {tuple(baselines.shape)}; both must be the same"
        )
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.shape != inputs.shape[:1]:
        raise UserError(f"targets must be class indices, int64 ({len(inputs)},); they are {_described(targets)}")


def _described(value: Any) -> str:
    is_tensor = isinstance(value, Tensor)
    return f"{value.dtype} {tuple(value.shape)}" if is_tensor else f"a {type(value).__name__}"


def _full_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def _transpose(stem: nn.Module, inputs: Tensor, gradients: Tensor) -> Tensor:
    """The gradients at the inputs, from those at the outputs of an affine `stem`."""
    leaf = inputs.detach().requires_grad_()
    with _full_precision(inputs.device), torch.enable_grad():
        (at_inputs,) = torch.autograd.grad(stem(leaf), leaf, gradients)
    return at_inputs


def _add_gradients(
    sums: Tensor,
    f_x: Tensor,
    alphas: NDArray[np.float64],
    weights: NDArray[np.float64],
    network: nn.Module,
    start: Tensor,
    difference: Tensor,
    targets: Tensor,
    output: Output,
    batch_size: int,
) -> None:
    """``sums[i] += sum over h of weights[h] * df/dx(start[i] + alphas[h] difference[i])`` for each image i.

    Where the last alpha is 1, ``f_x[i]`` becomes the output there.
    """
    scaled = torch.is_autocast_enabled(sums.device.type)
    m, dtype, device = len(alphas), sums.dtype, sums.device
    # (pair,), in the order of images; on the device at once, so that nothing in the loop waits for it
    image = torch.arange(len(sums), device=device).repeat_interleave(m)
    alpha = torch.tensor(alphas, dtype=dtype, device=device).repeat(len(sums))[:, None, None, None]
    weight = torch.tensor(weights, dtype=dtype, device=device).repeat(len(sums))[:, None, None, None]
    count = -(-len(image) // batch_size)
    batch_size = -(-len(image) // count)  # as many batches, of one size: a small one takes longer an item
    for begin in range(0, len(image), batch_size):
        end = min(begin + batch_size, len(image))
        # the batch's part of every image that it has steps of
        parts = [
            (place, slice(max(begin, place * m), min(end, (place + 1) * m)))
            for place in range(begin // m, (end - 1) // m + 1)
        ]
        points = torch.cat([torch.addcmul(start[i, None], alpha[part], difference[i, None]) for i, part in parts])
        gradients, outputs = _gradient(network, points, targets[image[begin:end]], output, scaled)
        gradients = gradients * weight[begin:end]
        # one sum an image is deterministic on every device; index_add_ on CUDA is not
        total = torch.empty_like(gradients[0])  # laid out as they are: between layouts a sum takes 20 times as long
        for i, part in parts:
            sums[i] += torch.sum(gradients[part.start - begin : part.stop - begin], dim=0, out=total)
            if alphas[-1] == 1 and part.stop % m == 0:
                f_x[i] = outputs[part.stop - 1 - begin]


def to_float16(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps as float16 with a power-of-two scale per image, so that their size does not decide their precision.

    Parameters
    ----------
    maps
        (image, ...), finite float32.

    Returns
    -------
    maps, scale
        float16 (image, ...), the maps divided by their scale, and float32 (image,), the power of two that brings the
        largest absolute value into [1, 2); 1 for an all-zero map.
    """
    largest = maps.abs().flatten(1).amax(dim=1)
    _, exponent = torch.frexp(largest)  # largest = f * 2**exponent with f in [0.5, 1)
    # a power of two in float64 is exact on every device once it is rounded to float32
    scale = torch.where(largest > 0, torch.exp2(exponent.double() - 1), 1.0).float()
    return (maps / scale.view(-1, *(1,) * (maps.ndim - 1))).half(), scale
