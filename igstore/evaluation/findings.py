"""What an evaluation says of its images: read from its folder, case by case, class by class, image by image. No torch.

A *case* is one model that was shown one kind of masks: a panel of a chart, a section of the report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from igstore.errors import DamagedStoreError, StoreNotFoundError
from igstore.evaluation.results import NOT_SHOWN, Pairing, Row
from igstore.evaluation.results_folder import PREDICTIONS, RESULTS, read_rows
from igstore.evaluation.tables import by_p, kinds, lines, store_names
from igstore.files import NOT_THERE, reading
from igstore.masks import MaskOptions
from igstore.schema import IMAGE, UNKNOWN_LABEL, Keep, Order

KEEPS: tuple[Keep, Keep] = ("top", "bottom")


@dataclass(frozen=True, eq=False)
class Case:
    """One model under one kind of masks.

    Attributes
    ----------
    label
        The model, and what else tells it from the others of the same masks.
    masks
        Whose masks, and of which kind, in a sentence.
    rows
        For each p, keep and order that was evaluated.
    """

    label: str
    masks: str
    rows: Sequence[Row]

    def side(self, keep: Keep, order: Order = "attribution") -> dict[float, Row]:
        """The rows of one side of the cut by p, in ascending order."""
        found = by_p(row for row in self.rows if (row.keep, row.order) == (keep, order))
        return dict(sorted(found.items()))

    @property
    def both_sides(self) -> dict[float, dict[Keep, Row]]:
        """The rows of top and bottom by p, in ascending order, where there are both."""
        top, bottom = self.side("top"), self.side("bottom")
        return {p: {"top": top[p], "bottom": bottom[p]} for p in top if p in bottom}


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of the labelled images of a case under some of its masks.

    Attributes
    ----------
    images, labels
        Places among the predictions' images, and class indices, (image,).
    unmasked
        The class index predicted of the unmasked image, (image,).
    predicted, visible
        The class index predicted under each mask, and the share of pixels visible, 0 to 1, (mask, image).
    """

    images: NDArray[np.intp]
    labels: NDArray[np.int32]
    unmasked: NDArray[np.int32]
    predicted: NDArray[np.int32]
    visible: NDArray[np.float32]

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether it is the label that is predicted, (mask, image)."""
        right: NDArray[np.bool_] = self.predicted == self.labels
        return right


@dataclass(frozen=True, eq=False)
class ByClass:
    """How many images of each class are right on one side of the cut.

    Attributes
    ----------
    classes, images
        Class indices, and how many labelled images each has, (class,).
    unmasked
        How many of them are right unmasked, (class,).
    correct
        How many are right at each p, in ascending order, (p, class).
    """

    classes: NDArray[np.intp]
    images: NDArray[np.intp]
    unmasked: NDArray[np.intp]
    correct: NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Contrast:
    """An image that is classified right from one side of the cut alone.

    Attributes
    ----------
    image_id, label, unmasked
        The image, its class index, and the one predicted of it unmasked.
    every_p
        Where only this side is right.
    cell
        The mask of this side at the most telling of these p, that of the fewest pixels: the smallest for ``top``,
        the largest for ``bottom``.
    predicted, visible
        At that p, the class index predicted from either side, and the share of pixels visible there, 0 to 1.
    """

    image_id: str
    label: int
    unmasked: int
    every_p: tuple[float, ...]
    cell: MaskOptions
    predicted: dict[Keep, int]
    visible: dict[Keep, float]


@dataclass(frozen=True, eq=False)
class Findings:
    """What `evaluate` wrote.

    Attributes
    ----------
    rows, predictions
        As `Evaluation`.
    """

    rows: Sequence[Row]
    predictions: xr.Dataset

    @classmethod
    def read(cls, results: Path) -> Findings:
        """The findings in the folder `results`.

        Raises
        ------
        StoreNotFoundError
            There are none.
        DamagedStoreError
            They are not those of this igstore's `evaluate`, or its files contradict each other.
        """
        rows = read_rows(results)
        if not rows:
            raise StoreNotFoundError(
                f"{results} holds no results; make them with `igstore evaluate STORE --out {results}`"
            )
        path = results / PREDICTIONS
        try:
            with reading(path):
                findings = cls(rows, xr.open_zarr(path, consolidated=False, zarr_format=3).load())
            findings.check()
        except (*NOT_THERE, DamagedStoreError, KeyError, ValueError) as error:
            raise DamagedStoreError(
                f"{path} does not go with {results / RESULTS} ({error!r}); run `igstore evaluate` again"
            ) from error
        return findings

    def check(self) -> None:
        """Raise `KeyError` unless there are predictions for every row."""
        for name in ("prediction", "visible", "unmasked", "completeness_error", "steps_spent", "label", IMAGE):
            _ = self.predictions[name]
        for row in self.rows:
            self._place(row)

    @cached_property
    def cases(self) -> dict[str, list[Case]]:
        """The cases of each kind of masks, in the order of the rows."""
        return {
            masks: [Case(label, masks, rows) for label, rows in lines(of_masks, orders_apart=False).items()]
            for masks, of_masks in kinds(self.rows).items()
        }

    @cached_property
    def stores(self) -> dict[str, Row]:
        """One row of each store, by what to call the store."""
        return store_names(self.rows)

    @property
    def integrated(self) -> dict[str, Row]:
        """Of those stores, the ones that igstore built: their maps are complete, but for errors."""
        return {name: row for name, row in self.stores.items() if not row.is_imported}

    def class_name(self, index: int) -> str:
        """What a class is called."""
        names = self.predictions.attrs.get("class_names", ())
        return str(names[index]) if 0 <= index < len(names) else f"class {index}"

    @cached_property
    def _pairs(self) -> dict[tuple[Any, ...], int]:
        return _places(self.predictions, Pairing)

    @cached_property
    def _cells(self) -> dict[tuple[Any, ...], int]:
        return _places(self.predictions, MaskOptions)

    def _place(self, row: Row) -> tuple[int, int]:
        """Where a row's images are among the predictions: pair and cell."""
        cell = tuple(getattr(row, name) for name in _names(MaskOptions))
        return self._pairs[row.pairing], self._cells[cell]

    def outcome(self, rows: Sequence[Row]) -> Outcome:
        """What became of the labelled images under the masks of these rows, all of one case."""
        pair = self._place(rows[0])[0]
        cells = [self._place(row)[1] for row in rows]
        unmasked, labels = self.predictions.unmasked.values[pair], self.predictions.label.values
        images = np.flatnonzero((unmasked != NOT_SHOWN) & (labels != UNKNOWN_LABEL))
        return Outcome(
            images=images,
            labels=labels[images],
            unmasked=unmasked[images],
            predicted=self.predictions.prediction.values[pair][cells][:, images],
            visible=self.predictions.visible.values[pair][cells][:, images],
        )

    def completeness(self, row: Row) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        """Completeness errors and steps spent of all images of the row's store."""
        pair, _ = self._place(row)
        shown = self.predictions.unmasked.values[pair] != NOT_SHOWN
        errors: NDArray[np.float32] = self.predictions.completeness_error.values[pair][shown]
        steps: NDArray[np.int16] = self.predictions.steps_spent.values[pair][shown]
        return errors, steps

    def by_class(self, case: Case, keep: Keep) -> ByClass:
        """How many images of each class are right on one side of the cut, of a case that has that side."""
        outcome = self.outcome(list(case.side(keep).values()))
        classes, places = np.unique(outcome.labels, return_inverse=True)
        right = [outcome.unmasked == outcome.labels, *outcome.right]
        counts = np.stack([np.bincount(places[of], minlength=len(classes)) for of in right])
        return ByClass(classes.astype(np.intp), np.bincount(places), counts[0], counts[1:])

    def contrasts(self, case: Case, keep: Keep) -> list[Contrast]:
        """The images that are right from this side alone at some p, those with the fewest pixels visible first."""
        both = case.both_sides
        if not both:
            return []
        sides = {side: self.outcome([rows[side] for rows in both.values()]) for side in KEEPS}
        own, other = sides[keep], sides["bottom" if keep == "top" else "top"]
        alone = own.right & ~other.right  # (p, image)
        every_p = list(both)
        ids = self.predictions[IMAGE].values  # which asking for copies
        found = []
        for image in np.flatnonzero(alone.any(axis=0)).tolist():
            at = np.flatnonzero(alone[:, image]).tolist()
            most = at[0] if keep == "top" else at[-1]
            found.append(
                Contrast(
                    image_id=str(ids[own.images[image]]),
                    label=int(own.labels[image]),
                    unmasked=int(own.unmasked[image]),
                    every_p=tuple(every_p[place] for place in at),
                    cell=both[every_p[most]][keep].cell,
                    predicted={side: int(of_side.predicted[most, image]) for side, of_side in sides.items()},
                    visible={side: float(of_side.visible[most, image]) for side, of_side in sides.items()},
                )
            )
        return sorted(found, key=lambda contrast: contrast.visible[keep])


def _names(kind: type[Pairing] | type[MaskOptions]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _places(predictions: xr.Dataset, kind: type[Pairing] | type[MaskOptions]) -> dict[tuple[Any, ...], int]:
    """The place of each pair, or of each cell, by the values of its fields."""
    columns = [predictions[name].values.tolist() for name in _names(kind)]
    return {values: place for place, values in enumerate(zip(*columns, strict=True))}
