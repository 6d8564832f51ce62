"""From pixels to a store's variables: a classifier and a build's settings, applied to a few images at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from igstore.attribution import Attributions, integrated_gradients, logits, numerics, select_output, to_float16
from igstore.engine.acceleration import accelerate
from igstore.engine.ambient import fresh_torch
from igstore.engine.baselines import baseline_pixels
from igstore.engine.guard import is_out_of_memory
from igstore.engine.lines.integral import OnLines
from igstore.engine.memory import available_memory, gradient_bytes
from igstore.engine.stem import hoist_stem
from igstore.engine.weights import first_line
from igstore.errors import IgstoreError, ModelError, OutOfMemoryError, UserError
from igstore.freed_memory import freed_memory_kept
from igstore.models import Classifier
from igstore.normalisation import normalise
from igstore.quadrature import rule
from igstore.schema import BUILT, FAILED, BuildSpec
from igstore.storage import layout

Arrays = dict[str, NDArray[Any]]

logger = logging.getLogger(__name__)

# Batches beyond these gain nothing: a CPU is busy with 32 pairs, a large GPU is with 256.
_LARGEST_BATCH = {"cpu": 32, "cuda": 256}

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
        self._may_shrink = batch_size is None
        self.batch_size = batch_size or 1
        height, width = spec.preprocessing.crop
        probe = torch.zeros(1, 3, height, width, device=device)
        # whether a rewritten network is the same shows in float32 alone
        with self._failures(), numerics("float32", device):
            mixed = spec.precision == "mixed"
            self.network = accelerate(classifier.network, probe, own_convolutions=not mixed)
            lines = OnLines.of(self.network, self._pictures()) if mixed else None
            self.network = lines or hoist_stem(self.network, probe)
        with self._failures(), numerics(spec.precision, device):
            self.n_classes = logits(self.network, probe, 1).shape[1]
            if self._may_shrink:
                self.batch_size = _fitting_batch(self.network, probe)

    def check_method(self, spec: BuildSpec) -> None:
        """Raise `UserError` unless the spec's method exists, with so many steps."""
        rule(spec.method, spec.n_steps)

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
        self.check_labels(labels, image_ids)
        started = time.monotonic()
        count = len(pixels)
        arrays = layout.unbuilt(self.spec, count) | {
            "reason": np.array(reasons, dtype=_REASON),
            "in_top5": np.zeros(count, bool),
        }
        good = arrays["reason"] == ""
        if good.any():
            ids = [image_id for image_id, readable in zip(image_ids, good, strict=True) if readable]
            attributed = self._attribute_shrinking(pixels[good], labels[good], ids)
            built = attributed["reason"] == ""
            arrays["reason"][good] = attributed.pop("reason")
            for name, values in attributed.items():
                arrays[name][arrays["reason"] == ""] = values[built]
        arrays["status"] = np.where(arrays["reason"] == "", BUILT, FAILED).astype(np.uint8)
        if self.spec.pixels:
            arrays["pixels"] = pixels
        arrays["batch_size"] = np.full(count, self.batch_size, np.int32)
        arrays["seconds"] = np.full(count, (time.monotonic() - started) / count)
        return arrays

    def measure_speed(self) -> float:
        """Gradient evaluations a second, from two batches on a grey image, the first of which only warms up."""
        height, width = self.spec.preprocessing.crop
        pixels = np.full((1, 3, height, width), 128, np.uint8)
        for _ in range(2):
            started = time.monotonic()
            with fresh_torch(self.device), self._failures(), freed_memory_kept():
                grey = self._normalise(pixels)
                integrated_gradients(
                    self.network,
                    grey,
                    torch.zeros_like(grey),
                    torch.zeros(1, dtype=torch.int64, device=self.device),
                    n_steps=self.batch_size,
                    output=self.spec.output,
                    precision=self.spec.precision,
                    batch_size=self.batch_size,
                ).maps.cpu()
            seconds = time.monotonic() - started
        return self.batch_size / seconds

    def _attribute_shrinking(
        self, pixels: NDArray[np.uint8], labels: NDArray[np.int32], image_ids: Sequence[str]
    ) -> Arrays:
        while True:
            try:
                with fresh_torch(self.device), self._failures(), freed_memory_kept():
                    return self._attribute(pixels, labels, image_ids)
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

    def _attribute(self, pixels: NDArray[np.uint8], labels: NDArray[np.int32], image_ids: Sequence[str]) -> Arrays:
        spec = self.spec
        x = self._normalise(pixels)
        baselines = baseline_pixels(
            spec.baseline, pixels, mean=spec.preprocessing.mean, image_ids=image_ids, seed=spec.seed
        )
        with numerics(spec.precision, self.device):
            scores = logits(self.network, x, self.batch_size).float()  # (image, class)
        prediction = scores.argmax(dim=1)
        label = torch.as_tensor(labels.astype(np.int64), device=self.device)
        target = label if spec.target == "label" else prediction
        found = self.explain(x, self._normalise(baselines), target, image_ids)
        size = scores.abs().amax(dim=1) if spec.output == "logit" else torch.ones(len(scores))
        noise = _NOISE.get(spec.precision, _FLOAT32_NOISE) * size
        _check_same(select_output(scores, target, spec.output), found.output, noise, image_ids)
        maps = found.maps.contiguous().cpu().numpy()
        finite = np.isfinite(maps).reshape(len(maps), -1).all(axis=1)
        finite &= (found.output.isfinite() & found.baseline_output.isfinite()).cpu().numpy()
        maps[~finite] = 0
        attribution, scale = to_float16(maps)
        top5 = scores.topk(min(5, self.n_classes), dim=1).indices
        return {
            "attribution": attribution,
            "scale": scale,
            "target": target.cpu().numpy(),
            "prediction": prediction.cpu().numpy(),
            "output": found.output.cpu().numpy(),
            "baseline_output": found.baseline_output.cpu().numpy(),
            "completeness_error": found.completeness_error.cpu().numpy(),
            "n_steps": found.n_steps.cpu().numpy(),
            "reason": np.where(finite, "", "its attribution or output is not finite").astype(_REASON),
            "in_top5": (top5 == label[:, None]).any(dim=1).cpu().numpy(),
        }

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
            method=spec.method,  # type: ignore[arg-type]  # one of its rules, as `check_method` saw
            n_steps=spec.n_steps,
            output=spec.output,
            reduce=spec.reduce,
            precision=spec.precision,
            batch_size=self.batch_size,
        )

    def _pictures(self) -> torch.Tensor:
        """A few pictures, normalised (image, 3, y, x), that are neither noise nor flat."""
        height, width = self.spec.preprocessing.crop
        generator = np.random.default_rng(0)
        coarse = generator.integers(0, 256, (4, 3, 8, 8)).astype(np.float32)
        smooth = torch.nn.functional.interpolate(torch.from_numpy(coarse), (height, width), mode="bicubic")
        grain = torch.from_numpy(generator.normal(0, 8, (4, 3, height, width)).astype(np.float32))
        return self._normalise((smooth + grain).clamp(0, 255).numpy())

    def _normalise(self, pixels: NDArray[np.uint8] | NDArray[np.float32]) -> torch.Tensor:
        on_device = torch.as_tensor(np.ascontiguousarray(pixels), device=self.device)
        return normalise(on_device, self.spec.preprocessing).contiguous(memory_format=torch.channels_last)


def _check_same(first: torch.Tensor, second: torch.Tensor, noise: torch.Tensor, image_ids: Sequence[str]) -> None:
    """Raise unless the network gave the same for the images, up to `noise`, when it saw them again; (image,) each."""
    first, second, noise = (each.double().cpu() for each in (first, second, noise))
    finite = first.isfinite() & second.isfinite()
    same = torch.where(finite, (first - second).abs() <= noise, torch.isclose(first, second, equal_nan=True))
    different = ~same.numpy()
    if different.any():
        image = int(different.argmax())
        raise ModelError(
            f"the network gives {first[image]:.4g} and then {second[image]:.4g} for image {image_ids[image]}: "
            "something in its forward pass is random, so its maps would be too; switch that off (or, where nothing is, it "
            "amplifies float32's rounding, and its maps would mean little)"
        )


def _fitting_batch(network: torch.nn.Module, probe: torch.Tensor) -> int:
    """The largest power of two of pairs that half of the free memory holds, up to what the device can use."""
    largest = _LARGEST_BATCH[probe.device.type]
    fitting = available_memory(probe.device) // 2 // gradient_bytes(network, probe)
    return max(1, min(largest, 1 << (fitting.bit_length() - 1) if fitting else 1))
