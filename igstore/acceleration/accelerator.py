"""A copy of a network that gives the same outputs faster: frozen, folded, channels last, with faster convolutions.

Each of these is a *lever*: a function that changes a copy of a network in place or returns another one. The guard
(`igstore.acceleration.guard`) compares answers and gradients. Where all levers together change them, each is tried
after the ones that passed, and those that change an answer are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from igstore.acceleration.activations import after, is_fixed, keep_results, simplify_batch_norm
from igstore.acceleration.convolutions import use_convolutions, use_winograd
from igstore.acceleration.fusion import fuse
from igstore.acceleration.guard import Guard, pictures
from igstore.machine import fresh_torch
from igstore.models import copied, frozen, input_sizes, is_plain, readers, replace, timm_layers

logger = logging.getLogger(__name__)

# Of a copy of a network, and images of the size to come: changes it in place, or returns what takes its place.
_Lever = Callable[[nn.Module, Tensor], nn.Module | None]


def accelerate(network: nn.Module, probe: Tensor, *, own_convolutions: bool = True) -> nn.Module:
    """A copy of `network` on the probe's device, in evaluation mode, for gradients with respect to its input.

    Parameters are frozen, batch norms that follow a convolution are folded into it, and convolutions run channels last.
    On a CPU other batch norms are simplified, uneven padding is folded into depthwise kernels, and convolutions are
    igstore's own, with the activations and sums beside them (`igstore.acceleration.fusion`), but under autocast.
    A step that cannot be done, or that changes outputs or gradients by more than rounding on noise, on a picture with
    even parts or on white, is left out, with a line in the log.

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
        The network fails on an image of this size, or does not return (image, class).
    """
    device = probe.device.type
    kinds = _levers(device, own_convolutions=own_convolutions and not torch.is_autocast_enabled(device))
    # compared on the CPU, whose convolutions are direct: cuDNN's break ties in even parts of a picture
    with fresh_torch():
        plain = frozen(copied(network).cpu())
        images = pictures(probe.cpu())
        guard = Guard(plain, images)
        if not guard.has_gradients:
            logger.warning("the network has no gradients with respect to its input, so it is left as it is")
            return plain.to(probe.device)
        changed, objection = _try(plain, list(kinds.values()), guard, images)
        if changed is None:
            logger.info("the network cannot be accelerated in every way: %s", objection)
            changed = _as_far_as_possible(plain, kinds, guard, images)
        return changed.to(probe.device)


def _levers(device: str, *, own_convolutions: bool) -> dict[str, _Lever]:
    """What to do to a network on a device, in this order."""
    levers: dict[str, _Lever] = {
        "batch norms folded": lambda network, images: fold_batch_norm(network, images[:1]),
        "activations that keep less": lambda network, _: keep_results(network),
        "batch norms simplified": lambda network, _: simplify_batch_norm(network),
    }
    if device == "cpu":
        levers["padding folded"] = lambda network, images: fold_uneven_padding(network, images[:1])
    if device == "cpu" and own_convolutions:
        levers |= {
            "own convolutions": lambda network, images: use_convolutions(network, images[:1]),
            "Winograd's algorithm forwards": lambda network, _: use_winograd(network),
            "fusion": fuse,
        }
    return levers | {"channels last": lambda network, _: put_channels_last(network)}


def _try(
    plain: nn.Module, levers: Sequence[_Lever], guard: Guard, images: Tensor
) -> tuple[nn.Module | None, str | None]:
    """A copy of `plain` with some levers pulled; or None, and why not."""
    try:
        changed = copied(plain, sharing_tensors=True)
        for lever in levers:
            changed = lever(changed, images) or changed
        objection = guard.objection(changed)
    except Exception as error:  # what the code of a network does with other modules or layouts is anyone's guess
        objection = f"{type(error).__name__}: {error}"
    return (changed, None) if objection is None else (None, objection)


def _as_far_as_possible(plain: nn.Module, levers: dict[str, _Lever], guard: Guard, images: Tensor) -> nn.Module:
    """`plain` with each lever pulled that it does not object to after those before."""
    best = plain
    pulled: list[_Lever] = []
    for name, lever in levers.items():
        changed, objection = _try(plain, [*pulled, lever], guard, images)
        if changed is None:
            logger.warning("gradients may take longer than they need: without %s (%s)", name, objection)
        else:
            best, pulled = changed, [*pulled, lever]
    return best


def put_channels_last(network: nn.Module) -> None:
    """Give the filters of `network` that layout, in place, and thereby what passes through its convolutions."""
    made: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 4:
                if id(parameter) not in made:
                    last = parameter.detach().contiguous(memory_format=torch.channels_last)
                    made[id(parameter)] = nn.Parameter(last, requires_grad=False)
                module._parameters[name] = made[id(parameter)]


def fold_batch_norm(network: nn.Module, image: Tensor) -> None:
    """Fold each batch norm of `network` that reads a convolution's output into that convolution, in place.

    The algebra: ``gamma (w * x + b - mean) / sqrt(var + eps) + beta`` is a convolution with other weights and bias.
    Which batch norm reads which convolution is seen while `image` (1, channel, y, x) passes through; that nothing else
    reads the convolution's output is not, so the caller compares outputs.
    """
    for norm, convolution in readers(network, image, nn.Conv2d, nn.BatchNorm2d).items():
        if not is_fixed(norm) or not is_plain(convolution, [nn.Conv2d, *timm_layers("Conv2dSame")]):
            continue
        assert norm.running_mean is not None
        assert norm.running_var is not None
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
    convolutions = [module for module in network.modules() if is_plain(module, timm_layers("Conv2dSame"))]
    depthwise = [one for one in convolutions if isinstance(one, nn.Conv2d) and one.groups == one.in_channels]
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
