"""A copy of a network that gives the same outputs faster: frozen, folded, channels last, with faster convolutions."""

from __future__ import annotations

import copy
import logging
import sys

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from igstore.engine.activations import after, keep_results, simplify_batch_norm
from igstore.engine.convolutions import use_convolutions
from igstore.engine.fusion import fuse
from igstore.engine.modules import input_sizes, readers, replace
from igstore.errors import ModelError

logger = logging.getLogger(__name__)

# Folding reorders a few float32 operations; more than this, relative to the size of the logits, is a mistake.
_TOLERANCE = 1e-3
# The same of the gradient, relative to its length. Where rounding moves an output of a ReLU across 0, it jumps.
_GRADIENT_TOLERANCE = 0.1


def accelerate(network: nn.Module, probe: Tensor, *, own_convolutions: bool = True) -> nn.Module:
    """A copy of `network` on the probe's device, in evaluation mode, for gradients with respect to its input.

    Parameters are frozen, batch norms that follow a convolution are folded into it, and convolutions run channels last.
    On a CPU other batch norms are simplified, uneven padding is folded into depthwise kernels, and convolutions are
    igstore's own, with the activations and sums beside them (`igstore.engine.fusion`), but under autocast.
    A network whose folded form disagrees with it on a random image, in outputs or gradient, is left as it is, with a
    line in the log.

    Parameters
    ----------
    network
        Left as it is.
    probe
        One image (1, channel, y, x) of the right size, on the device to use.
    own_convolutions
        Whether convolutions on a CPU may be igstore's own.

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
    keep_results(folded)
    simplify_batch_norm(folded)
    if probe.device.type == "cpu":
        fold_uneven_padding(folded, image)
        if own_convolutions and not torch.is_autocast_enabled("cpu"):
            use_convolutions(folded, image)
            folded = fuse(folded, image)
    difference = _difference(_outputs(folded, image), expected)
    if not difference <= _TOLERANCE:
        logger.warning(
            "the network is left unfolded: folding would change the outputs by %.1e of their size", difference
        )
        return plain
    if isinstance(folded, fx.GraphModule):
        difference = _gradient_difference(folded, plain, image)
        if not difference <= _GRADIENT_TOLERANCE:
            logger.warning(
                "the network is left unfolded: folding would change gradients by %.1e of their size", difference
            )
            return plain
    return folded


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _gradient_difference(network: nn.Module, expected: nn.Module, image: Tensor) -> float:
    """Of the gradients of some sum of the outputs, relative to the length of the one that is expected."""

    def gradient(of: nn.Module) -> Tensor:
        leaf = image.clone().requires_grad_()
        outputs = of(leaf.clone())
        weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1)).to(outputs)
        (found,) = torch.autograd.grad((outputs * weights).sum(), leaf)
        return found

    wanted = gradient(expected)
    try:
        return float((gradient(network) - wanted).norm() / wanted.norm().clamp(min=1e-30))
    except RuntimeError as error:  # torch has seen a tensor change that another one's gradient needs
        logger.info("the gradient of the folded network fails: %s", error)
        return float("inf")


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
    Which batch norm reads which convolution is seen while `image` (1, channel, y, x) passes through; that nothing else
    reads the convolution's output is not, so the caller compares outputs.
    """
    for norm, convolution in readers(network, image, nn.Conv2d, nn.BatchNorm2d).items():
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
        replace(network, norm, after(norm))


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
    for module, seen in input_sizes(network, image, depthwise).items():
        if len(seen) != 1 or module.dilation != (1, 1):
            continue
        sides = list(zip(*seen, module.kernel_size, module.stride, strict=True))
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
        replace(network, module, even)
