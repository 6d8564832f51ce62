"""Attributing some images of a store again, to see whether its maps are those of the model that it names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from igstore.attribution import Attributor
from igstore.datasets import find_pixels, open_pixels
from igstore.errors import UserError, option
from igstore.machine import find_device
from igstore.masks import mask_overlaps
from igstore.models import Classifier, adapted, recorded_classifier
from igstore.schema import BUILT, IMPORTED, whole_number
from igstore.storage import Finding, StoreReader

_BATCH = 16  # images in memory at a time
# Other batches, threads or devices of one precision stay above it. Where forward passes are rounded, two roundings
# agree about as well as one does with float32: 0.954 in tf32 and 0.912 in float16, measured with EfficientNet-Lite0.
_LEAST_IOU = {"float32": 0.99, "mixed": 0.98, "tf32": 0.92, "float16": 0.86}
# Relative to the output, or to 1 if it is smaller.
_OUTPUT_ERROR = {"float32": 1e-3, "mixed": 1e-3, "tf32": 1e-2, "float16": 1e-2}


class Recomputation:
    """Built images of a store, chosen at random, to be attributed again; parameters and errors as `verify_store`.

    What may be wrong with the parameters is found before anything is computed.
    """

    def __init__(
        self,
        store: StoreReader,
        count: int,
        *,
        images: Any,
        model: str | Classifier | None,
        weights: str | None,
        device: str,
        seed: int,
    ) -> None:
        seed = whole_number("seed", seed, 0)
        store.array("attribution")  # raises where a thin copy leaves it out
        if store.spec.method == IMPORTED:
            raise UserError(
                f"the maps of {store.where} were made by {store.spec.maps_by}, and imported: igstore cannot make them "
                f"again; leave {option('recompute')} out"
            )
        if store.spec.max_steps is not None:
            raise UserError(
                f"an earlier version built {store.where} and doubled the steps of some images, which this igstore "
                f"cannot do; leave {option('recompute')} out"
            )
        built = np.flatnonzero(store.status == BUILT)
        self._store = store
        self._chosen = np.sort(np.random.default_rng(seed).choice(built, min(count, len(built)), replace=False))
        self._source = open_pixels(store, find_pixels(images))
        classifier = recorded_classifier(store.spec, store.where, parameter="model", model=model, weights=weights)
        shown = adapted(classifier, store.spec.output)
        self._attributor = Attributor(shown, store.spec, device=find_device(device))

    def findings(self) -> Iterator[Finding]:
        """What differs: an output by more than rounding, the masks at p=50 by more than 1% of their blocks."""
        store, chosen = self._store, self._chosen
        overlaps = np.ones(len(chosen))
        for start in range(0, len(chosen), _BATCH):
            batch = slice(start, start + _BATCH)
            images = chosen[batch]
            ids = [store.image_ids[image] for image in images]
            again = self._attributor(self._source.read(images), store.scalars("label")[images], ids, [""] * len(ids))
            overlaps[batch] = mask_overlaps(again["attribution"], store.array("attribution").read(images))
            error = _OUTPUT_ERROR[store.spec.precision]
            same = np.isclose(again["output"], store.scalars("output")[images], rtol=error, atol=error)
            for image in images[~same].tolist():
                problem = f"holds another output for image {store.image_ids[image]} than the model gives now"
                yield self._finding(image, "output", problem)
        if overlaps.size and overlaps.mean() < _LEAST_IOU[store.spec.precision]:
            least = int(chosen[overlaps.argmin()])
            problem = (
                f"holds other maps than the model gives now: masks at p=50 of {len(chosen)} images overlap by "
                f"{overlaps.mean():.3f} on average, by {overlaps.min():.3f} for image {store.image_ids[least]}"
            )
            yield self._finding(least, "attribution", problem)

    def _finding(self, image: int, array: str, problem: str) -> Finding:
        shard = image // self._store.shard_size
        return Finding(problem, self._store.shard_files(shard)[array], shard, array)
