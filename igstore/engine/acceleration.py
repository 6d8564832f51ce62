"""A copy of a network that gives the same outputs faster: frozen, folded, channels last, with faster convolutions."""

from __future__ import annotations

import copy
import logging
import sys
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from igstore.engine.winograd import use_winograd
from igstore.errors import ModelError

logger = logging.getLogger(__name__)

# Folding reorders a few float32 operations; more than this, relative to the size of the logits, is a mistake.
_TOLERANCE = 1e-3


def accelerate(network: nn.Module, probe: Tensor) -> nn.Module:
    """A copy of `network` on the probe's device, in evaluation mode, for gradients with respect to its input.

    Parameters are frozen, batch norms that follow a convolution are folded into it, and convolutions run channels last.
    On a CPU other batch norms are simplified, uneven padding is folded into depthwise kernels, and 3x3 convolutions go
    by Winograd's algorithm.
    A network whose folded form disagrees with it on a random image is left as it is, with a line in the log.

    Parameters
    ----------
    network
        Left as it is.
    probe
        One image (1, channel, y, x) of the right size, on the device to use.

    Raises
    ------
    ModelError
        The network fails on an image of this size.
    """
    plain = copy.deepcopy(network).to(probe.device).eval().requires_grad_(False)
    plain = plain.to(memory_format=torch.channels_last)
    image = torch.randn(probe.shape, generator=torch.Generator().manual_seed(0)).to(probe)
    try:
        expected = _outputs(plain, image)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        size = " x ".join(map(str, probe.shape[1:]))
        raise ModelError(f"the network fails on an image of {size}: {error}") from error
    folded = copy.deepcopy(plain)
    fold_batch_norm(folded, image)
    if probe.device.type == "cpu":
        simplify_batch_norm(folded)
        fold_uneven_padding(folded, image)
        use_winograd(folded, image)
    difference = (_outputs(folded, image) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    if not difference <= _TOLERANCE:
        logger.warning(
            "the network is left unfolded: folding would change the outputs by %.1e of their size",
            float(difference),
        )
        return plain
    return folded


def _outputs(network: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        result = network(image.clone())
    if not isinstance(result, Tensor):
        raise ModelError(
            f"the network returns {type(result).__name__}; a classifier returns a tensor (image, class): wrap it in a "
            "module that selects that tensor"
        )
    return result.float()


def fold_batch_norm(network: nn.Module, image: Tensor) -> None:
    """Fold each batch norm of `network` that reads a convolution's output into that convolution, in place.

    The algebra: ``gamma (w * x + b - mean) / sqrt(var + eps) + beta`` is a convolution with other weights and bias.
    Which batch norm reads which convolution is seen while `image` (1, channel, y, x) passes through, so that nothing
    about the network's code is assumed; that the convolution's output is read by nothing else is not seen, so the
    caller compares outputs.
    """
    for norm, convolution in _norms_after_convolutions(network, image).items():
        if norm.running_mean is None or norm.running_var is None:
            continue  # normalises by the batch's own statistics, which no weights can stand for
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        convolution.requires_grad_(False)
        _replace(network, norm, _after(norm))


class ScaleAndShift(nn.Module):
    """``scale x + shift`` of (image, channel, y, x), both a number a channel: a batch norm in evaluation mode."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", shift[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """One multiplication a number, forwards and backwards."""
        return torch.addcmul(self.shift, x, self.scale)


def simplify_batch_norm(network: nn.Module) -> None:
    """Replace the batch norms of `network` that could not be folded, in place.

    The backward pass of a batch norm reads what it normalised, which only its parameters' gradients need; the one of a
    multiplication does not.
    """
    for norm in list(network.modules()):
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
            continue
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale
        shift = shift if norm.bias is None else shift + norm.bias
        _replace(network, norm, nn.Sequential(ScaleAndShift(scale, shift), _after(norm)))


def fold_uneven_padding(network: nn.Module, image: Tensor) -> None:
    """Fold the padding of timm's `Conv2dSame` into its kernel where it is depthwise, in place.

    TensorFlow pads an even side for stride 2 by one pixel more at the end than at the start, which takes a copy of all
    that comes in, and another one of its gradient. It is the same to pad the start as much as the end and to give the
    kernel that many zeros at its start; a depthwise convolution waits for memory, not for multiplications.

    How much is padded goes by the size of `image` (1, channel, y, x), so the network is for images of that size.
    """
    same = getattr(sys.modules.get("timm.layers"), "Conv2dSame", None)  # none where nobody has made a network of timm's
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    # not its subclasses, which may do more than it does
    depthwise = [one for one in convolutions if type(one) is same and one.groups == one.in_channels]
    if not depthwise:
        return
    seen: dict[nn.Module, set[torch.Size]] = {module: set() for module in depthwise}

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[module].add(inputs[0].shape[2:])

    with ExitStack() as hooks:
        for module in depthwise:
            hooks.callback(module.register_forward_pre_hook(look).remove)
        _outputs(network, image)
    for module in depthwise:
        if len(seen[module]) != 1 or module.dilation != (1, 1):
            continue
        sides = list(zip(*seen[module], module.kernel_size, module.stride, strict=True))
        missing = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size, kernel, stride in sides]
        uneven_y, uneven_x = (n % 2 for n in missing)  # the end's share is n // 2 + n % 2
        kernel = nn.functional.pad(module.weight, (uneven_x, 0, uneven_y, 0))
        padding = tuple(n // 2 + n % 2 for n in missing)
        even = nn.Conv2d(
            module.in_channels,
            module.out_channels,
            tuple(kernel.shape[2:]),  # type: ignore[arg-type]  # (y, x)
            module.stride,  # type: ignore[arg-type]
            padding,
            groups=module.groups,
            device="meta",  # its random weights would only be replaced
        )
        even.weight = nn.Parameter(kernel.contiguous(memory_format=torch.channels_last), requires_grad=False)
        even.bias = module.bias
        _replace(network, module, even)


def _norms_after_convolutions(network: nn.Module, image: Tensor) -> dict[nn.BatchNorm2d, nn.Conv2d]:
    sources: dict[int, tuple[nn.Conv2d, Tensor, int]] = {}  # keeping the tensor keeps its id unique
    calls: dict[nn.Module, int] = {}
    pairs: dict[nn.BatchNorm2d, nn.Conv2d] = {}

    def convolved(module: nn.Module, _: object, made: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            sources[id(made)] = (module, made, made._version)

    def normalises(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[module] = calls.get(module, 0) + 1
        source = sources.get(id(inputs[0]))
        # another version means an in-place operation between the two
        if isinstance(module, nn.BatchNorm2d) and source is not None and source[2] == inputs[0]._version:
            pairs[module] = source[0]

    with ExitStack() as hooks:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                hooks.callback(module.register_forward_hook(convolved).remove)
            elif isinstance(module, nn.BatchNorm2d):
                hooks.callback(module.register_forward_pre_hook(normalises).remove)
        _outputs(network, image)
    # a module that is called twice would be scaled for both calls
    return {norm: source for norm, source in pairs.items() if calls[norm] == calls[source] == 1}


def _after(norm: nn.BatchNorm2d) -> nn.Module:
    """What a folded batch norm leaves behind: nothing, or the activation that timm's batch norms end with."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    tail = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    return nn.Sequential(*tail)


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(root.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
