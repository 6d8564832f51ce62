"""From given maps to a store's variables: what the model says of the images, and how complete the maps are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from igstore.attribution import (
    Attributions,
    Attributor,
    completeness_error,
    logits,
    numerics,
    reduce_channels,
    select_output,
)
from igstore.building.import_source import GivenMaps
from igstore.errors import UserError
from igstore.models import Classifier
from igstore.schema import IMPORTED, BuildSpec


class Importer(Attributor):
    """An `Attributor` that computes outputs, and takes the maps from elsewhere.

    Parameters
    ----------
    classifier, spec, device, batch_size
        As `Attributor`; the spec's method is ``imported``.
    maps
        The maps.
    """

    def __init__(
        self,
        classifier: Classifier,
        spec: BuildSpec,
        *,
        device: torch.device,
        batch_size: int | None = None,
        maps: GivenMaps,
    ) -> None:
        super().__init__(classifier, spec, device=device, batch_size=batch_size)
        self._given = maps

    def check_method(self, spec: BuildSpec) -> None:
        """Raise `UserError` unless the spec says that the maps are imported."""
        if spec.method != IMPORTED:
            raise UserError(f"method is {spec.method!r}; for maps that are given it must be {IMPORTED}")

    def explain(
        self, x: torch.Tensor, baselines: torch.Tensor, targets: torch.Tensor, image_ids: Sequence[str]
    ) -> Attributions:
        """The given maps, with the network's outputs.

        The completeness error is what it is for any map: by how much its sum misses f(x) - f(b). Methods other than
        Integrated Gradients need not make it small.
        """
        given = torch.from_numpy(self._given.read(image_ids))  # float64 (image, channel, y, x)
        with numerics(self.spec.precision, self.device):
            output, baseline_output = (
                select_output(logits(self.network, inputs, self.batch_size), targets, self.spec.output).double().cpu()
                for inputs in (x, baselines)
            )
        return Attributions(
            maps=reduce_channels(given, self.spec.reduce).float(),
            output=output,
            baseline_output=baseline_output,
            completeness_error=completeness_error(given.sum(dim=(1, 2, 3)), output - baseline_output),
            n_steps=torch.zeros(len(given), dtype=torch.int64),
        )
