"""A classifier and the images that rules are fitted to, on one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from igstore.attribution import Attributor, baseline_pixels, integrated_gradients, logits, numerics, select_output
from igstore.building import chosen_classifier, listed_images
from igstore.calibration.profiles import MapsAt, path_maps
from igstore.errors import ImageError, UserError, option
from igstore.images import ImageList, prepare
from igstore.machine import find_device
from igstore.models import adapted, normalise
from igstore.schema import UNKNOWN_LABEL, BuildSpec, LearnedRule, Preprocessing


class Subject:
    """Some images of a list, as a classifier is shown them; parameters as `learn_rules`.

    Attributes
    ----------
    spec
        The settings of a build of these images.
    n_images
        How many could be read.
    """

    def __init__(
        self,
        model: Any,
        images: Any,
        *,
        n_images: int,
        weights: str | None,
        preprocessing: Preprocessing | Mapping[str, Any] | None,
        split: Any,
        labels: Any,
        settings: dict[str, Any],
        device: str,
        batch_size: int | None,
    ) -> None:
        on = find_device(device)
        listed = listed_images(images, split=split, labels=labels)
        classifier, listed = chosen_classifier(model, weights, preprocessing, listed)
        classifier = adapted(classifier, settings["output"])
        self.spec = spec = BuildSpec(
            model=classifier.name,
            weights=classifier.weights,
            weights_sha256=classifier.weights_sha256,
            preprocessing=classifier.preprocessing,
            images_fingerprint=listed.fingerprint,
            **settings,
        )
        pixels, places = _spread(listed, spec.preprocessing, n_images)
        if not places:
            raise UserError(f"none of the {n_images} images that were tried can be read: {listed.ids[0]} is the first")
        self.n_images = len(places)
        attributor = Attributor(classifier, spec, device=on, batch_size=batch_size)
        self._network, self._batch_size = attributor.network, attributor.batch_size
        ids = [listed.ids[place] for place in places]
        attributor.check_labels(listed.labels[places], ids)
        start = baseline_pixels(spec.baseline, pixels, mean=spec.preprocessing.mean, image_ids=ids, seed=spec.seed)
        self._x, self._start = (
            normalise(torch.as_tensor(each, device=on), spec.preprocessing).contiguous(
                memory_format=torch.channels_last
            )
            for each in (pixels, start)
        )
        with numerics("float32", on):
            self._target = logits(self._network, self._x, self._batch_size).argmax(dim=1)
        if spec.target == "label":
            self._target = torch.as_tensor(listed.labels[places].astype(np.int64), device=on)
            if (self._target == UNKNOWN_LABEL).any():
                unknown = ids[int((self._target == UNKNOWN_LABEL).int().argmax())]
                raise UserError(
                    f"image {unknown} has no label, which {option('target', 'label')} needs; give {option('labels')}, "
                    f"or {option('target', 'prediction')}"
                )

    def path(self, image: int) -> MapsAt:
        """The maps along the path of an image."""
        start, target = self._start[image], self._target[image]

        def maps_at(alphas: NDArray[np.float64]) -> Tensor:
            def select(scores: Tensor) -> Tensor:
                return select_output(scores, target.expand(len(scores)), self.spec.output)

            with numerics("float32", start.device):
                return path_maps(self._network, start, self._x[image] - start, select, self._batch_size)(alphas)

        return maps_at

    def maps(self, images: NDArray[np.intp], method: Any, n_steps: int) -> NDArray[np.float32]:
        """The maps of some images by a rule, float32 (image, y, x)."""
        chosen = torch.as_tensor(images, device=self._x.device)
        found = integrated_gradients(
            self._network,
            *(each[chosen] for each in (self._x, self._start, self._target)),
            method=method,
            n_steps=n_steps,
            output=self.spec.output,
            batch_size=self._batch_size,
        )
        maps: NDArray[np.float32] = found.maps.cpu().numpy()
        return maps

    def rule(self, nodes: NDArray[np.float64], weights: NDArray[np.float64], n_images: int) -> LearnedRule:
        """A rule that was fitted to so many of the images, and has not been judged."""
        spec = self.spec
        return LearnedRule(
            nodes=tuple(nodes.tolist()),
            weights=tuple(weights.tolist()),
            model=spec.model,
            model_weights=spec.weights,
            model_weights_sha256=spec.weights_sha256,
            baseline=spec.baseline,
            target=spec.target,
            output=spec.output,
            n_images=n_images,
            images_fingerprint=spec.images_fingerprint,
            iou=0.0,
            iou_error=0.0,
        )


def _spread(images: ImageList, preprocessing: Preprocessing, count: int) -> tuple[NDArray[np.uint8], list[int]]:
    """The pixels (image, channel, y, x) of `count` images, evenly spread over the list, and their places in it.

    Those that cannot be read are left out.
    """
    pixels, places = [], []
    for place in np.unique(np.linspace(0, len(images) - 1, count).round().astype(int)).tolist():
        try:
            pixels.append(prepare(images.read(place), preprocessing))
        except ImageError:
            continue
        places.append(place)
    return np.stack(pixels) if pixels else np.zeros((0, 3, 1, 1), np.uint8), places
