"""Networks are shown a store's images, unmasked and under every mask: predicted classes and probabilities."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from igstore import machine
from igstore.acceleration import accelerate, is_out_of_memory
from igstore.attribution import logits, numerics
from igstore.cli import Progress
from igstore.datasets import MaskedBatch, MaskedBatches
from igstore.errors import ModelError, UserError
from igstore.evaluation.results import Pairing, Shown, settings_sha256
from igstore.machine import one_behind, to_device, to_host
from igstore.masks import MaskOptions
from igstore.models import Classifier, adapted
from igstore.schema import BUILT, UNKNOWN_LABEL, ForwardPrecision, whole_number
from igstore.storage import StoreReader

_BATCH = {"cpu": 32, "cuda": 128}  # images; larger batches gain nothing

# predicted class, whether the label is in the top five, visible share: (1 + cell, image), first the unmasked images
_Views = tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.float64]]


class ShowingPlan:
    """What to show to whom: a store's images under some masks, to some classifiers. Checks what can be checked.

    Parameters
    ----------
    store
        Ranked for every mask.
    classifiers
        Each gets its own normalisation, and the images at its own input size.
    cells
        The masks.
    images
        Where the pixels are, for a store without; as `MaskedBatches`.
    limit
        Only the first so many built images; None is all.
    batch_size
        Images at once; None is a good number for the device.
    device
        Where to compute.

    Raises
    ------
    UserError
        No image has a label, `limit` or `batch_size` is below 1, or as `MaskedBatches`.
    """

    def __init__(
        self,
        store: StoreReader,
        classifiers: Sequence[Classifier],
        cells: Sequence[MaskOptions],
        *,
        images: Any,
        limit: int | None,
        batch_size: int | None,
        device: torch.device,
    ) -> None:
        limit = None if limit is None else whole_number("limit", limit, 1)
        self.store = store
        self.classifiers = classifiers
        self.cells = cells
        self.device = device
        self.images = np.flatnonzero(store.status == BUILT)[:limit]
        self.batches = MaskedBatches(
            store,
            cells,
            networks=[classifier.preprocessing for classifier in classifiers],
            images=images,
            where=np.isin(np.arange(store.n_images), self.images),
            device=device,
            batch_size=_BATCH[device.type] if batch_size is None else batch_size,
        )
        self.labels = store.scalars("label")[self.images]
        if (self.labels == UNKNOWN_LABEL).all():
            raise UserError(f"no image of {store.where} has a label, so there is no accuracy to measure")


def show(plans: Sequence[ShowingPlan], *, precision: ForwardPrecision, show_progress: bool) -> list[Shown]:
    """Carry out plans on one device: the classes that each classifier predicts for each store's images.

    Raises
    ------
    UserError
        A label is not one of a network's classes, or the memory does not suffice.
    ModelError
        A network does not classify such images, or its outputs are not finite.
    """
    n_images = sum(len(plan.images) for plan in plans)
    shown = []
    # all of them first, so that one that does not work is found before the work begins
    networks = {
        classifier: _prepared(classifier, precision, plan.device) for plan in plans for classifier in plan.classifiers
    }
    with (
        numerics("tf32" if precision == "tf32" else "float32", plans[0].device),
        Progress(n_images, label="evaluate", show=show_progress) as progress,
    ):
        for plan in plans:
            shown += _show(plan, networks, precision, progress)
    return shown


def _prepared(classifier: Classifier, precision: ForwardPrecision, device: torch.device) -> nn.Module:
    with numerics("float32", device):
        probe = torch.zeros(1, 3, *classifier.preprocessing.crop, device=device)
        network = accelerate(adapted(classifier, "logit").network, probe, own_convolutions=precision == "float32")
    return _InFloat16(network) if precision == "float16" else network


class _InFloat16(nn.Module):
    """A network whose own numbers are float16: to cast them in each pass, as autocast does, takes longer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = network.half()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self._network(inputs.half())
        return outputs


def _show(
    plan: ShowingPlan, networks: dict[Classifier, nn.Module], precision: ForwardPrecision, progress: Progress
) -> list[Shown]:
    views: list[list[_Views]] = [[] for _ in plan.classifiers]
    with torch.inference_mode():
        for of_batch in one_behind(_submitted(plan, networks, progress), plan.device):
            for of_classifier, found in zip(views, of_batch, strict=True):
                of_classifier.append(found)
    ids = [plan.store.image_ids[image] for image in plan.images.tolist()]
    errors, steps = (plan.store.scalars(name)[plan.images] for name in ("completeness_error", "n_steps"))
    names = plan.store.attributes.get("class_names", ())
    shown = []
    for classifier, of_classifier in zip(plan.classifiers, views, strict=True):
        prediction, in_top5, visible = (np.hstack(arrays) for arrays in zip(*of_classifier, strict=True))
        pairing = _pairing(plan.store, classifier, precision, plan.device)
        shown.append(Shown(pairing, ids, plan.labels, prediction, in_top5, visible, errors, steps, names))
    return shown


def _submitted(
    plan: ShowingPlan, networks: dict[Classifier, nn.Module], progress: Progress
) -> Iterator[Callable[[], list[_Views]]]:
    """Of each batch, once the device has it, a function that waits for what each classifier makes of it."""
    for batch in plan.batches:
        waits = [_view(batch, classifier, networks[classifier], plan.cells) for classifier in plan.classifiers]

        def wait(waits: list[Callable[[], _Views]] = waits, count: int = len(batch)) -> list[_Views]:
            found = [wait() for wait in waits]
            progress.advance(count)
            return found

        yield wait


def _view(
    batch: MaskedBatch, classifier: Classifier, network: nn.Module, cells: Sequence[MaskOptions]
) -> Callable[[], _Views]:
    own = classifier.preprocessing
    inputs = itertools.chain([batch.unmasked(own)], (batch.masked(cell, own) for cell in cells))
    scores = torch.stack([_scores(network, images, classifier.name) for images in inputs])  # (1 + cell, image, class)
    n_classes = scores.shape[2]
    if batch.labels.max() >= n_classes:
        raise UserError(
            f"an image has class index {batch.labels.max()}, but {classifier.name} has {n_classes} classes (0 to "
            f"{n_classes - 1}): it is a model for another data set"
        )
    labels = to_device(batch.labels, scores.device)[:, None]
    in_host = to_host(
        {
            "finite": scores.isfinite().all(),
            "prediction": scores.argmax(dim=2).int(),
            "in_top5": (scores.topk(min(5, n_classes), dim=2).indices == labels).any(dim=2),
            "visible": torch.stack([batch.visible(cell, own) for cell in cells]),
        }
    )

    def wait() -> _Views:
        found = in_host()
        if not found["finite"]:
            raise ModelError(f"{classifier.name} gives outputs that are not finite")
        visible = np.vstack([np.ones((1, found["visible"].shape[1])), found["visible"]])
        return found["prediction"], found["in_top5"], visible

    return wait


def _scores(network: nn.Module, inputs: Tensor, name: str) -> Tensor:
    """The network's float32 outputs (image, class)."""
    try:
        return logits(network, inputs.contiguous(memory_format=torch.channels_last), len(inputs)).float()
    except Exception as error:  # cuDNN and the CPU have words of their own for it
        if is_out_of_memory(error):
            raise UserError(f"{name} runs out of memory on {len(inputs)} images; give a smaller batch size") from error
        raise


def _pairing(store: StoreReader, classifier: Classifier, precision: ForwardPrecision, device: torch.device) -> Pairing:
    spec, versions = store.spec, machine.versions()["versions"]
    return Pairing(
        store=store.where.rpartition("/")[2],
        store_model=spec.model,
        store_weights=spec.weights,
        store_weights_sha256=spec.weights_sha256,
        store_settings_sha256=settings_sha256(spec),
        baseline=spec.baseline,
        target=spec.target,
        output=spec.output,
        method=spec.maps_by or spec.rule_name,
        n_steps=spec.n_steps,
        reduce=spec.reduce,
        model=classifier.name,
        weights=classifier.weights,
        weights_sha256=classifier.weights_sha256,
        precision=precision,
        device=machine.device_name(device),
        igstore_version=versions["igstore"],
        torch_version=versions["torch"],
    )


def target_probabilities(
    store: StoreReader,
    shown: NDArray[np.int64],
    classifier: Classifier,
    cells: Sequence[MaskOptions],
    *,
    images: Any,
    device: torch.device,
    batch_size: int | None,
    label: str,
    show_progress: bool,
) -> NDArray[np.float32]:
    """What the softmax of a classifier's outputs gives the class that was attributed, in float32.

    Parameters
    ----------
    store
        Ranked for every mask.
    shown
        The numbers of the images, ascending, all of them built.
    classifier
        Who is shown them, at its own input size and normalisation.
    cells
        The masks.
    images
        Where the pixels are, for a store without; as `MaskedBatches`.
    device
        Where to compute.
    batch_size
        Images at once; None is a good number for the device.
    label, show_progress
        What to call it on a progress bar, and whether to show one.

    Returns
    -------
    float32 (cell, image).

    Raises
    ------
    UserError
        A target is none of the classifier's classes, or as `MaskedBatches`.
    ModelError
        The network does not classify such images, or its outputs are not finite.
    """
    batches = MaskedBatches(
        store,
        cells,
        networks=[classifier.preprocessing],
        images=images,
        where=np.isin(np.arange(store.n_images), shown),
        device=device,
        batch_size=_BATCH[device.type] if batch_size is None else batch_size,
    )
    targets = store.scalars("target")
    found = []
    with numerics("float32", device), Progress(len(shown), label=label, show=show_progress) as progress:
        whole = adapted(classifier, "probability").network
        network = accelerate(whole, torch.zeros(1, 3, *classifier.preprocessing.crop).to(device))
        for batch in batches:
            found.append(_of_batch(batch, targets[batch.images], classifier, network, cells))
            progress.advance(len(batch))
    return np.concatenate(found, axis=1)


def _of_batch(
    batch: MaskedBatch,
    targets: NDArray[np.int32],
    classifier: Classifier,
    network: nn.Module,
    cells: Sequence[MaskOptions],
) -> NDArray[np.float32]:
    inputs = (batch.masked(cell, classifier.preprocessing) for cell in cells)
    scores = torch.stack([_scores(network, images, classifier.name) for images in inputs])  # (cell, image, class)
    if targets.max() >= scores.shape[2]:
        raise UserError(
            f"an image's target is class {targets.max()}, but {classifier.name} has {scores.shape[2]} classes: it is a "
            "model for another data set"
        )
    target = to_device(targets.astype(np.int64), scores.device)
    probabilities = scores.softmax(dim=2)[:, torch.arange(len(target), device=target.device), target]  # (cell, image)
    if not probabilities.isfinite().all():
        raise ModelError(f"{classifier.name} gives outputs that are not finite")
    return probabilities.cpu().numpy()
