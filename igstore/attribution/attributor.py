"""From pixels to a store's variables: a classifier and a build's settings, applied to a few images at a time."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from igstore.acceleration import OnLines, accelerate, hoist_stem, is_out_of_memory
from igstore.attribution.baselines import CONSTANT_BASELINES, baseline_pixels
from igstore.attribution.engine import Attributions, integrated_gradients, logits, numerics, select_output, to_float16
from igstore.attribution.memory import available_memory, gradient_bytes
from igstore.attribution.quadrature import rule
from igstore.errors import IgstoreError, ModelError, OutOfMemoryError, UserError
from igstore.machine import freed_memory_kept, fresh_torch, to_device, to_host
from igstore.models import Classifier, first_line, normalise
from igstore.schema import BUILT, FAILED, BuildSpec
from igstore.storage import layout

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]

logger = logging.getLogger(__name__)

# Batches beyond these gain nothing: a CPU is busy with 32 pairs, a large GPU is with 256.
_LARGEST_BATCH = {"cpu": 32, "cuda": 256}
_LARGEST_BATCH_ON_LINES = 512

# Batches after which all that is compiled, chosen or captured when it is first used is there.
_WARM_UP = {"cpu": 1, "cuda": 3}

_REASON = np.dtype("<U200")  # a fixed width, so that units concatenate; longer reasons are cut

# Two outputs for one image that differ by more, relative to the size of the logits, are not rounding.
_NOISE = {"tf32": 1e-2, "float16": 1e-2}
_FLOAT32_NOISE = 1e-3


class Attributor:
    """Applies one classifier with one build's settings, on one device.

    Parameters
    ----------
    classifier, spec
        What to attribute and how; the network is copied, never changed.
    device
        Where to compute.
    batch_size
        (image, step) pairs per gradient evaluation; None sizes it to the memory that is free, and halves it when that
        runs out.

    Attributes
    ----------
    n_classes
        How many the network tells apart.

    Raises
    ------
    UserError
        The spec's precision does not exist on this device, or its method needs more steps.
    ModelError
        The network fails on images of this size, or does not return (image, class).
    OutOfMemoryError
        The device has not even memory for one image.
    """

    def __init__(
        self, classifier: Classifier, spec: BuildSpec, *, device: torch.device, batch_size: int | None = None
    ) -> None:
        self.check_method(spec)
        self.spec = spec
        self.device = device
        self._classifier = classifier
        self._may_shrink = batch_size is None
        self._finished = 0.0  # when the last results were there
        self.batch_size = batch_size or 1
        height, width = spec.preprocessing.crop
        probe = torch.zeros(1, 3, height, width, dtype=torch.float32, device=device)
        # whether a rewritten network is the same shows in float32 alone
        with self._failures(), numerics("float32", device):
            mixed = spec.precision == "mixed"
            self.network = accelerate(classifier.network, probe, own_convolutions=not mixed)
            lines = OnLines.of(self.network, self._pictures()) if mixed else None
            self.network = lines or hoist_stem(self.network, probe)
        with self._failures(), numerics(spec.precision, device):
            self.n_classes = logits(self.network, probe, 1).shape[1]
            if self._may_shrink:
                self.batch_size = self._fitting_batch(probe)

    def check_method(self, spec: BuildSpec) -> None:
        """Raise `UserError` unless the spec's method exists, with so many steps."""
        rule(spec.quadrature, spec.n_steps)

    def check_labels(self, labels: NDArray[np.int32], image_ids: Sequence[str]) -> None:
        """Raise `UserError`, naming the image, unless all labels, int32 (image,), are the network's classes or -1."""
        wrong = np.flatnonzero(labels >= self.n_classes)
        if len(wrong):
            raise UserError(
                f"image {image_ids[wrong[0]]} has class index {labels[wrong[0]]}, but the network has {self.n_classes} "
                f"classes (0 to {self.n_classes - 1}): the labels are another data set's"
            )

    def __call__(
        self, pixels: NDArray[np.uint8], labels: NDArray[np.int32], image_ids: Sequence[str], reasons: Sequence[str]
    ) -> Arrays:
        """Attribute a few images.

        Parameters
        ----------
        pixels
            uint8 (image, channel, y, x).
        labels
            int32 (image,), -1 where unknown.
        image_ids
            One an image.
        reasons
            Why an image could not be read, "" where it could; those that could not are left alone.

        Returns
        -------
        Arrays, first dimension image: every computed variable of the store, and for the shard's record ``reason``
        ("" or why the image failed, which it also does where its map or outputs are not finite), ``in_top5`` (bool: the
        label is among the five highest logits of the unmasked image), ``batch_size`` and ``seconds``. Of images that
        failed, variables hold what they hold before they are built.

        Raises
        ------
        UserError
            As `check_labels`.
        ModelError
            The network fails, or gives another output when it sees an image again.
        OutOfMemoryError
            Batches of the size asked for, or of one, do not fit.
        """
        return self.submit(pixels, labels, image_ids, reasons)()

    def submit(
        self, pixels: NDArray[np.uint8], labels: NDArray[np.int32], image_ids: Sequence[str], reasons: Sequence[str]
    ) -> Callable[[], Arrays]:
        """As a call, but it returns once the device has been told what to do: a function that waits for the results.

        On a GPU the next images can be submitted before the results of these are asked for, so that it never idles.
        Results are to be asked for in order. On a CPU all is done at once.
        """
        self.check_labels(labels, image_ids)
        started = time.monotonic()
        count = len(pixels)
        arrays = layout.unbuilt(self.spec, count, omitted=["pixels"]) | {
            "reason": np.array(reasons, dtype=_REASON),
            "in_top5": np.zeros(count, bool),
        }
        readable = arrays["reason"] == ""
        good = _selection(readable)
        wait: Callable[[], Arrays] = dict
        if readable.any():
            ids = [image_id for image_id, is_readable in zip(image_ids, readable, strict=True) if is_readable]
            wait = self._submit_shrinking(pixels[good], labels[good], ids)
        batch_size = self.batch_size

        def result() -> Arrays:
            attributed = wait()
            if attributed:
                built = _selection(attributed["reason"] == "")
                arrays["reason"][good] = attributed.pop("reason")
                to_fill = _selection(arrays["reason"] == "")
                for name, values in attributed.items():
                    arrays[name][to_fill] = values[built]
            arrays["status"] = np.where(arrays["reason"] == "", BUILT, FAILED).astype(np.uint8)
            if self.spec.pixels:
                arrays["pixels"] = pixels
            arrays["batch_size"] = np.full(count, batch_size, np.int32)
            # while those before were under way, the device had not begun
            seconds = time.monotonic() - max(started, self._finished)
            self._finished = time.monotonic()
            arrays["seconds"] = np.full(count, seconds / count)
            return arrays

        return result

    def measure_speed(self) -> float:
        """Gradient evaluations a second, from a few batches on a grey image, of which the first only warm up."""
        height, width = self.spec.preprocessing.crop
        n_steps = min(self.spec.n_steps, self.batch_size)
        n_images = self.batch_size // n_steps
        grey = np.full((n_images, 3, height, width), 128, np.uint8)
        for _ in range(_WARM_UP[self.device.type] + 1):
            started = time.monotonic()
            with fresh_torch(self.device), self._failures(), freed_memory_kept():
                pixels = self._normalise(grey)
                integrated_gradients(
                    self.network,
                    pixels,
                    torch.zeros_like(pixels),
                    torch.zeros(n_images, dtype=torch.int64, device=self.device),
                    n_steps=n_steps,
                    output=self.spec.output,
                    precision=self.spec.precision,
                    batch_size=self.batch_size,
                ).maps.cpu()
            seconds = time.monotonic() - started
        return n_images * n_steps / seconds

    def _submit_shrinking(
        self, pixels: NDArray[np.uint8], labels: NDArray[np.int32], image_ids: Sequence[str]
    ) -> Callable[[], Arrays]:
        while True:
            try:
                with fresh_torch(self.device), self._failures(), freed_memory_kept():
                    return self._submit(pixels, labels, image_ids)
            except OutOfMemoryError:
                if not self._may_shrink or self.batch_size == 1:
                    raise
            # outside the handler, so that the failed batch's tensors are free
            self.batch_size = max(1, self.batch_size // 2)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            logger.warning("out of memory on %s: going on with batches of %d", self.device, self.batch_size)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """What torch, or the code of a network, raises comes out as igstore's own error."""
        try:
            yield
        except IgstoreError:
            raise
        except (Exception, SystemExit) as error:  # networks may raise anything
            if is_out_of_memory(error):
                raise OutOfMemoryError(
                    f"out of memory on {self.device} with batches of {self.batch_size}: give a smaller --batch-size, "
                    "or leave it out to have it fitted"
                ) from error
            raise ModelError(f"the network failed ({type(error).__name__}: {first_line(error)})") from error

    def _submit(
        self, pixels: NDArray[np.uint8], labels: NDArray[np.int32], image_ids: Sequence[str]
    ) -> Callable[[], Arrays]:
        """Have the device begin; the function that is returned waits for it. The host waits for nothing before."""
        spec = self.spec
        x = self._normalise(pixels)
        baselines = self._baselines(pixels, image_ids)
        label = to_device(labels.astype(np.int64), self.device)
        with numerics(spec.precision, self.device):
            scores = logits(self.network, x, self.batch_size).float()  # (image, class)
        target = label if spec.target == "label" else scores.argmax(dim=1)
        found = self.explain(x, baselines, target, image_ids)
        top5 = scores.topk(min(5, self.n_classes), dim=1).indices
        common = {
            "target": target,
            "prediction": scores.argmax(dim=1),
            "in_top5": (top5 == label[:, None]).any(dim=1),
            "first_output": select_output(scores, target, spec.output).double(),
            "size": scores.abs().amax(dim=1).double() if spec.output == "logit" else torch.ones_like(target).double(),
        }
        wait = to_host(common | _stored(found))
        noise = _NOISE.get(spec.precision, _FLOAT32_NOISE)

        def result() -> Arrays:
            with self._failures():
                arrays = wait()
            first, size, finite = (arrays.pop(name) for name in ("first_output", "size", "finite"))
            arrays["reason"] = np.where(finite, "", "its attribution or output is not finite").astype(_REASON)
            again = ~finite & (spec.precision == "mixed")  # float16 has numbers up to 65504 only
            ids = np.array(image_ids, object)
            _check_same(first[~again], arrays["output"][~again], noise * size[~again], ids[~again].tolist())
            if again.any():
                exact = self._in_float32()(pixels[again], labels[again], ids[again].tolist(), [""] * int(again.sum()))
                for name in arrays:
                    arrays[name][again] = exact[name]
            return arrays

        return result

    def explain(
        self, x: torch.Tensor, baselines: torch.Tensor, targets: torch.Tensor, image_ids: Sequence[str]
    ) -> Attributions:
        """The maps of a few normalised images (image, 3, y, x), and the network's outputs for their targets."""
        spec = self.spec
        return integrated_gradients(
            self.network,
            x,
            baselines,
            targets,
            method=spec.quadrature,
            n_steps=spec.n_steps,
            output=spec.output,
            reduce=spec.reduce,
            precision=spec.precision,
            batch_size=self.batch_size,
        )

    def _in_float32(self) -> Attributor:
        """The same in float32; it is made anew each time, which is seldom."""
        spec = dataclasses.replace(self.spec, precision="float32")
        return Attributor(self._classifier, spec, device=self.device)

    def _pictures(self) -> torch.Tensor:
        """A few pictures, normalised (image, 3, y, x), that are neither noise nor flat."""
        height, width = self.spec.preprocessing.crop
        generator = np.random.default_rng(0)
        coarse = generator.integers(0, 256, (4, 3, 8, 8)).astype(np.float32)
        smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), (height, width), mode="bicubic")
        grain = torch.from_numpy(generator.normal(0, 8, (4, 3, height, width)).astype(np.float32))
        return self._normalise((smooth + grain).clamp(0, 255).numpy())

    def _fitting_batch(self, probe: torch.Tensor) -> int:
        """The largest power of two of pairs that half of the free memory holds, up to what the device can use."""
        device = self.device.type
        if isinstance(self.network, OnLines) and device == "cuda":
            largest, n_bytes = min(_LARGEST_BATCH_ON_LINES, self.network.most_points), self._line_bytes(probe)
        else:
            largest, n_bytes = _LARGEST_BATCH[device], gradient_bytes(self.network, probe)
        fitting = available_memory(self.device) // 2 // n_bytes
        return max(1, min(largest, 1 << (fitting.bit_length() - 1) if fitting else 1))

    def _line_bytes(self, probe: torch.Tensor) -> int:
        """Bytes that a point of a line takes, measured: kernels keep what torch's autograd does not know of."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        steps = 16
        target = torch.zeros(1, dtype=torch.int64, device=self.device)
        integrated_gradients(
            self.network, probe, torch.zeros_like(probe), target, n_steps=steps, precision="mixed", batch_size=steps
        )
        return max(1, (torch.cuda.max_memory_allocated(self.device) - before) // steps)

    def _normalise(self, pixels: NDArray[np.uint8] | NDArray[np.float32]) -> torch.Tensor:
        on_device = to_device(pixels, self.device)
        return normalise(on_device, self.spec.preprocessing).contiguous(memory_format=torch.channels_last)

    def _baselines(self, pixels: NDArray[np.uint8], image_ids: Sequence[str]) -> torch.Tensor:
        """Normalised, (image, 3, y, x); the same for all images, it is one, expanded."""
        spec = self.spec
        is_constant = spec.baseline in CONSTANT_BASELINES
        some = slice(1 if is_constant else None)
        made = baseline_pixels(
            spec.baseline, pixels[some], mean=spec.preprocessing.mean, image_ids=image_ids[some], seed=spec.seed
        )
        return self._normalise(made).expand(len(pixels), -1, -1, -1)


def _stored(found: Attributions) -> dict[str, torch.Tensor]:
    """What a store keeps of attributions, by variable, and ``finite``: of which images all of it is."""
    finite = found.maps.isfinite().flatten(1).all(dim=1)
    finite &= found.output.isfinite() & found.baseline_output.isfinite()
    shape = (-1, *(1,) * (found.maps.ndim - 1))
    attribution, scale = to_float16(torch.where(finite.view(shape), found.maps, 0.0).contiguous())
    return {
        "attribution": attribution,
        "scale": scale,
        "output": found.output,
        "baseline_output": found.baseline_output,
        "completeness_error": found.completeness_error,
        "n_steps": found.n_steps,
        "finite": finite,
    }


def _selection(mask: NDArray[np.bool_]) -> NDArray[np.bool_] | slice:
    """What picks the images where a mask is true; all of them without a copy."""
    return slice(None) if mask.all() else mask


def _check_same(first: Floats, second: Floats, noise: Floats, image_ids: Sequence[str]) -> None:
    """Raise unless the network gave the same for the images, up to `noise`, when it saw them again; (image,) each."""
    with np.errstate(invalid="ignore"):  # infinity less infinity
        near = np.abs(first - second) <= noise
    different = ~(near | np.isclose(first, second, rtol=0, atol=0, equal_nan=True))
    if different.any():
        image = int(different.argmax())
        raise ModelError(
            f"the network gives {first[image]:.4g} and then {second[image]:.4g} for image {image_ids[image]}: "
            "something in its forward pass is random, so its maps would be too; switch that off (where nothing is, the "
            "network amplifies float32's rounding, and its maps would mean little)"
        )
