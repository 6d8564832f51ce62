"""The probability of every image's target under every mask, as a classifier gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from igstore.adapters import adapted
from igstore.attribution import numerics
from igstore.batches import MaskedBatch, MaskedBatches
from igstore.engine.acceleration import accelerate
from igstore.errors import ModelError, UserError
from igstore.masks import MaskOptions
from igstore.models import Classifier
from igstore.progress import Progress
from igstore.reporting.showing import scores_of
from igstore.storage.reader import StoreReader

_BATCH = {"cpu": 32, "cuda": 128}  # images; larger batches gain nothing


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
    found = []
    for cell in cells:
        scores = scores_of(network, batch.masked(cell, classifier.preprocessing), classifier.name)
        if targets.max() >= scores.shape[1]:
            raise UserError(
                f"an image's target is class {targets.max()}, but {classifier.name} has {scores.shape[1]} classes: "
                "it is a model for another data set"
            )
        target = torch.as_tensor(targets.astype(np.int64), device=scores.device)[:, None]
        found.append(scores.softmax(dim=1).gather(1, target)[:, 0])
    probabilities = torch.stack(found)  # (cell, image)
    if not probabilities.isfinite().all():
        raise ModelError(f"{classifier.name} gives outputs that are not finite")
    return probabilities.cpu().numpy()
