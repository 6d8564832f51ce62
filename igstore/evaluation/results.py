"""What an evaluation finds: from predicted classes to accuracies, one row for each model and mask. Needs no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from igstore.cli import printable
from igstore.masks import MaskOptions
from igstore.schema import IMAGE, UNKNOWN_LABEL, BuildSpec, Fill, Keep, Order, Score, Select

NOT_SHOWN = -1  # the predicted class of an image that a store does not have


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Which store's masked images were shown to which model.

    Attributes
    ----------
    store
        The name of its folder, without where it is.
    store_model, store_weights, store_weights_sha256
        The model that made the masks.
    store_settings_sha256
        Of everything that decides what the store's maps are; see `settings_sha256`.
    baseline, target, output, method, n_steps, reduce
        Of those settings, the ones that a reader asks for first.
    model, weights, weights_sha256
        The model that the images were shown to.
    precision, device, igstore_version, torch_version
        What computed its outputs, and in which arithmetic.
    """

    store: str
    store_model: str
    store_weights: str
    store_weights_sha256: str
    store_settings_sha256: str
    baseline: str
    target: str
    output: str
    method: str
    n_steps: int
    reduce: str
    model: str
    weights: str
    weights_sha256: str
    precision: str = "float32"
    device: str
    igstore_version: str
    torch_version: str

    def __post_init__(self) -> None:
        for name in PAIRING_FIELDS:  # some of these words come from a store, which may be anybody's
            value = getattr(self, name)
            object.__setattr__(self, name, printable(value) if isinstance(value, str) else value)

    @property
    def pairing(self) -> tuple[Any, ...]:
        """The values of these fields."""
        return tuple(getattr(self, name) for name in PAIRING_FIELDS)

    @property
    def is_imported(self) -> bool:
        """Whether the store's maps were made elsewhere: Integrated Gradients of igstore's take a step at least."""
        return self.n_steps == 0

    @property
    def is_own(self) -> bool:
        """Whether the model was shown the masks that it made itself."""
        return self.weights_sha256 == self.store_weights_sha256


PAIRING_FIELDS = tuple(field.name for field in dataclasses.fields(Pairing))


@dataclass(frozen=True, kw_only=True)
class Row(Pairing):
    """One model under one mask. Accuracies, intervals and visible shares are in percent.

    Attributes
    ----------
    p, keep, select, score, block, fill, order, seed
        The mask, as `MaskOptions`.
    n
        Labelled images; all figures are of these.
    correct, top1, low, high
        Images whose label is the highest output, in number and percent, and its Wilson 95% interval.
    top5
        Images whose label is among the five highest outputs.
    original_top1, original_low, original_high, original_top5
        The same, of the same pixels unmasked.
    visible
        Share of the model's input pixels that the mask leaves visible, the mean over images.
    only_this, only_opposite, mcnemar_p
        Against the other `keep` with all else equal: images that are right under this one alone, under the other one
        alone, and the p-value of McNemar's test; None where the other one was not evaluated.
    """

    p: float
    keep: Keep
    select: Select
    score: Score
    block: int
    fill: Fill
    order: Order
    seed: int
    n: int
    correct: int
    top1: float
    low: float
    high: float
    top5: float
    original_top1: float
    original_low: float
    original_high: float
    original_top5: float
    visible: float
    only_this: int | None
    only_opposite: int | None
    mcnemar_p: float | None

    @property
    def identity(self) -> tuple[Any, ...]:
        """What the row is of, by what it is and not by what it is called: no other row has the same."""
        return (self.store_settings_sha256, self.model, self.weights_sha256, self.cell)

    @property
    def cell(self) -> MaskOptions:
        """The mask."""
        return MaskOptions(**{name: getattr(self, name) for name in _CELL_FIELDS})


_CELL_FIELDS = tuple(field.name for field in dataclasses.fields(MaskOptions))


@dataclass(frozen=True, eq=False)
class Shown:
    """What one model made of one store's images, unmasked and under every mask.

    Attributes
    ----------
    pairing
        The model and the store.
    image_ids, labels
        Of the images shown, in the store's order; int32 (image,), -1 where unknown.
    prediction
        int32 (1 + cell, image): the class of the highest output; first of the unmasked images.
    in_top5
        bool (1 + cell, image): the label is among the five highest outputs.
    visible
        float64 (1 + cell, image), 0 to 1: the share of pixels left visible.
    completeness_error, steps_spent
        float32 and int16 (image,): of the store's maps, its `completeness_error` and `n_steps`.
    class_names
        By class index; empty where the store does not know them.
    """

    pairing: Pairing
    image_ids: Sequence[str]
    labels: NDArray[np.int32]
    prediction: NDArray[np.int32]
    in_top5: NDArray[np.bool_]
    visible: NDArray[np.float64]
    completeness_error: NDArray[np.float32]
    steps_spent: NDArray[np.int16]
    class_names: Sequence[str]


def settings_sha256(spec: BuildSpec) -> str:
    """Sha256 in hexadecimal of a store's settings: equal for stores that hold the same maps, wherever they are.

    And in whatever version of the format: the first one's number is taken for all.
    """
    settings = spec.to_attributes() | {"format_version": 1}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def measure(shown: Shown, cells: Sequence[MaskOptions]) -> list[Row]:
    """The rows of one model and store, one for each cell, in the order of `cells`."""
    from scipy.stats import binomtest  # slow to import

    labelled = shown.labels != UNKNOWN_LABEL
    n = int(labelled.sum())
    correct = (shown.prediction == shown.labels)[:, labelled]  # (1 + cell, image)
    top1, top5, visible = (
        (100 * flags.sum(axis=1) / n).tolist()
        for flags in (correct, shown.in_top5[:, labelled], shown.visible[:, labelled])
    )  # percent, (1 + cell,)
    intervals = [
        [100 * bound for bound in binomtest(int(right.sum()), n).proportion_ci(method="wilson")] for right in correct
    ]
    places = {cell: place for place, cell in enumerate(cells, start=1)}
    rows = []
    for cell, place in places.items():
        opposite = places.get(dataclasses.replace(cell, keep="top" if cell.keep == "bottom" else "bottom"))
        only_this = only_opposite = p_value = None
        if opposite is not None:
            only_this = int((correct[place] & ~correct[opposite]).sum())
            only_opposite = int((correct[opposite] & ~correct[place]).sum())
            # McNemar's exact test: of the images that one of the two alone gets right, half are expected for each
            differing = only_this + only_opposite
            p_value = float(binomtest(only_this, differing).pvalue) if differing else 1.0
        rows.append(
            Row(
                **dataclasses.asdict(shown.pairing),
                **dataclasses.asdict(cell),
                n=n,
                correct=int(correct[place].sum()),
                top1=top1[place],
                low=intervals[place][0],
                high=intervals[place][1],
                top5=top5[place],
                original_top1=top1[0],
                original_low=intervals[0][0],
                original_high=intervals[0][1],
                original_top5=top5[0],
                visible=visible[place],
                only_this=only_this,
                only_opposite=only_opposite,
                mcnemar_p=p_value,
            )
        )
    return rows


def predictions(every: Sequence[Shown], cells: Sequence[MaskOptions]) -> xr.Dataset:
    """What became of every image in every cell, for every model and store.

    Returns
    -------
    Dataset of ``prediction``, int32, and ``visible``, float32, the share of pixels left visible (both: pair, cell,
    image); and of ``unmasked``, int32, ``completeness_error``, float32, and ``steps_spent``, int16 (all: pair, image).
    A pair is a model and a store; its coordinates are the fields of `Pairing`. A cell is a mask; its coordinates are
    the fields of `MaskOptions`. ``image`` is the id, and ``label`` the class index, -1 where unknown. Images are those
    of all stores, sorted by id; where a store lacks an image, predictions are -1, steps 0 and the others NaN. Its
    attribute ``class_names`` lists the names of the classes, where they are known.
    """
    ids = np.unique(np.concatenate([np.asarray(shown.image_ids, dtype=np.str_) for shown in every]))
    places = [np.searchsorted(ids, np.asarray(shown.image_ids, dtype=np.str_)) for shown in every]
    labels = np.full(len(ids), UNKNOWN_LABEL, np.int32)
    for shown, of_shown in zip(every, places, strict=True):
        labels[of_shown] = shown.labels

    def joined(values: Sequence[NDArray[Any]], dtype: type[np.generic], lacking: float) -> NDArray[Any]:
        whole = np.full((len(every), *values[0].shape[:-1], len(ids)), lacking, dtype)  # (pair, [cell,] image)
        for pair, of_shown in enumerate(places):
            whole[pair][..., of_shown] = values[pair]
        return whole

    describe = {"description": f"class index of the highest output; {NOT_SHOWN} where the store lacks the image"}
    masked, unmasked = ("pair", "cell", IMAGE), ("pair", IMAGE)
    return xr.Dataset(
        {
            "prediction": (masked, joined([shown.prediction[1:] for shown in every], np.int32, NOT_SHOWN), describe),
            "visible": (
                masked,
                joined([shown.visible[1:] for shown in every], np.float32, np.nan),
                {"description": "share of the model's input pixels that the mask leaves visible, 0 to 1"},
            ),
            "unmasked": (unmasked, joined([shown.prediction[0] for shown in every], np.int32, NOT_SHOWN), describe),
            "completeness_error": (
                unmasked,
                joined([shown.completeness_error for shown in every], np.float32, np.nan),
                {"description": "completeness error of the store's map, relative"},
            ),
            "steps_spent": (
                unmasked,
                joined([shown.steps_spent for shown in every], np.int16, 0),
                {"description": "gradient evaluations behind the store's map"},
            ),
        },
        {
            IMAGE: ids.astype(object),
            "label": (IMAGE, labels, {"description": f"class index, {UNKNOWN_LABEL} unknown"}),
            **_coordinates("pair", [dataclasses.asdict(shown.pairing) for shown in every]),
            **_coordinates("cell", [dataclasses.asdict(cell) for cell in cells]),
        },
        {"class_names": max((list(shown.class_names) for shown in every), key=len)},
    )


def _coordinates(dim: str, records: Sequence[dict[str, Any]]) -> dict[str, tuple[str, NDArray[Any]]]:
    columns = {name: np.array([record[name] for record in records]) for name in records[0]}
    # Zarr has no stable type for NumPy's strings of fixed length
    return {
        name: (dim, column.astype(object) if column.dtype.kind == "U" else column) for name, column in columns.items()
    }
