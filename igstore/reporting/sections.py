"""The sections of a report: findings in the order in which people ask about them. Needs no torch."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from igstore import __version__
from igstore.cli import csv_text
from igstore.datasets import MaskedImages
from igstore.evaluation import KEEPS, PAIRING_FIELDS, Case, Contrast, Findings, article_tables
from igstore.reporting import figures, page, summaries
from igstore.reporting.charts import Chart
from igstore.reporting.pictures import Panel, heat_map, picture_of
from igstore.schema import Keep

Parts = list[str]  # pieces of HTML

_FEW = 6  # images shown that only one side gets right

_SIDES: dict[Keep, str] = {
    "top": "Right from the important pixels alone (keep top)",
    "bottom": "Right from the unimportant pixels alone (keep bottom)",
}


class Beside:
    """The files of the folder beside the page.

    Attributes
    ----------
    folder
        Where it is to be.
    files
        What is to be in it, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, bytes] = {}

    def figure(self, chart: Chart, caption: str) -> str:
        """Put a chart's picture and numbers there, and return the chart for the page."""
        self.files[f"{chart.name}.png"] = chart.png()
        self.files[f"{chart.name}.csv"] = chart.csv().encode()
        return page.figure(chart, caption, self.folder.name)

    def table(self, name: str, records: Sequence[dict[str, Any]], words: str) -> str:
        """Put records there as CSV, and return a paragraph that links to them; nothing where there are none."""
        if not records:
            return ""
        content = csv_text(list(records[0]), map(dict.values, records))
        self.files[f"{name}.csv"] = content.encode()
        return page.download(words, f"{self.folder.name}/{name}.csv")

    def picture(self, name: str, content: Image.Image, words: str) -> str:
        """Put a picture there, and return a paragraph that links to it."""
        data = io.BytesIO()
        content.save(data, "png")
        self.files[f"{name}.png"] = data.getvalue()
        return page.download(words, f"{self.folder.name}/{name}.png")


@dataclass(frozen=True, eq=False)
class Material:
    """What the sections are made of.

    Attributes
    ----------
    findings
        What they are about.
    sources
        The stores that are at hand, by the sha256 of their settings.
    beside
        Where their files go.
    """

    findings: Findings
    sources: Mapping[str, MaskedImages]
    beside: Beside


def glance(material: Material) -> Parts:
    """A few numbers for who reads no further."""
    tables = (summaries.at_a_glance(cases) for cases in material.findings.cases.values())
    return [page.table(table) for table in tables if table]


def accuracy(material: Material) -> Parts:
    """Accuracy by p, and by the share of the pixels that are visible."""
    caption = "Top-1 accuracy by p. Bands are Wilson's 95% intervals."
    if any(row.order == "random" for row in material.findings.rows):
        caption += " Either side and its random control show the same number of blocks of each image."
    parts = []
    for number, (masks, cases) in enumerate(material.findings.cases.items(), start=1):
        parts += [
            page.subsection(masks),
            material.beside.figure(figures.accuracy_by_p(cases, _numbered("accuracy_by_p", number)), caption),
            material.beside.figure(
                figures.accuracy_by_visible(cases, _numbered("accuracy_by_visible", number)),
                "The fair comparison: the same accuracies by the share of the pixels that are visible, so that points "
                "above each other saw the same amount of image.",
            ),
        ]
    return parts


def tables(material: Material) -> Parts:
    """The article's."""
    return [page.table(table) for table in article_tables(material.findings.rows)]


def visible(material: Material) -> Parts:
    """Pixels visible by p."""
    parts = []
    for number, (masks, cases) in enumerate(material.findings.cases.items(), start=1):
        chart = figures.visible_by_p(material.findings, cases, _numbered("visible_by_p", number))
        caption = (
            "Pixels left visible by p: the mean over images, and a band that holds the middle half of them. p% of the "
            "attribution is not p% of the pixels."
        )
        parts += [page.subsection(masks), material.beside.figure(chart, caption)]
    return parts


def completeness(material: Material) -> Parts:
    """How good the maps are, and what they cost."""
    findings, parts = material.findings, []
    if findings.integrated:
        caption = "How many images have a completeness error of at most so much; further left is better."
        parts.append(material.beside.figure(figures.completeness(findings, "completeness"), caption))
        parts.append(page.table(summaries.effort(findings)))
    others = [f"{name} ({row.method})" for name, row in findings.stores.items() if row.is_imported]
    if others:
        parts.append(
            page.paragraph(
                f"Imported, and not scored: {', '.join(others)}. Whether the sum of a map should be the output on the "
                "image minus the output on the baseline, it is for what made the map to say."
            )
        )
    return parts


def classes(material: Material) -> Parts:
    """The classes at either end."""
    parts = []
    for number, case in enumerate(_cases(material.findings)):
        tables = [table for keep in KEEPS if (table := summaries.classes(material.findings, case, keep))]
        if tables:
            parts.append(page.folded(_title(case), *map(page.table, tables), is_open=number == 0))
    records = [record for case in _cases(material.findings) for record in _class_records(material.findings, case)]
    every = material.beside.table("classes", records, "Every class, on either side, at every p:")
    return [*parts, every] if parts else []


def _class_records(findings: Findings, case: Case) -> Iterator[dict[str, Any]]:
    for keep in KEEPS:
        side = case.side(keep)
        if not side:
            continue
        counts = findings.by_class(case, keep)
        for place, number in enumerate(counts.classes.tolist()):
            for p, correct in zip(side, counts.correct[:, place].tolist(), strict=True):
                yield {
                    "model": case.label,
                    "masks": case.masks,
                    "keep": keep,
                    "p": p,
                    "class": number,
                    "name": findings.class_name(number),
                    "images": int(counts.images[place]),
                    "correct": correct,
                    "correct_unmasked": int(counts.unmasked[place]),
                }


def images(material: Material) -> Parts:
    """The images that only one side gets right, with pictures of them where their store is at hand."""
    findings, parts, records = material.findings, [], []
    for number, case in enumerate(_cases(findings), start=1):
        table = summaries.sides(case)
        if table is None:
            continue
        inner = [page.table(table)]
        for keep in KEEPS:
            contrasts = findings.contrasts(case, keep)
            records += [_image_record(findings, case, keep, contrast) for contrast in contrasts]
            inner.append(page.subsection(_SIDES[keep], *_contrasts(material, case, keep, contrasts, number)))
        parts.append(page.folded(_title(case), *inner, is_open=number == 1))
    if parts and not material.sources:
        parts.insert(0, page.paragraph("To see the images, make this page with --store STORE, the store evaluated."))
    return [*parts, material.beside.table("images", records, "Every image that only one side gets right:")]


def _image_record(findings: Findings, case: Case, keep: Keep, contrast: Contrast) -> dict[str, Any]:
    return {
        "model": case.label,
        "masks": case.masks,
        "image": contrast.image_id,
        "class": contrast.label,
        "name": findings.class_name(contrast.label),
        "right_alone": keep,
        "every_p": " ".join(f"{p:g}" for p in contrast.every_p),
        "p": contrast.cell.p,
        **{f"predicted_{side}": predicted for side, predicted in contrast.predicted.items()},
        **{f"visible_{side}": share for side, share in contrast.visible.items()},
    }


def _contrasts(material: Material, case: Case, keep: Keep, contrasts: Sequence[Contrast], number: int) -> Parts:
    shown = contrasts[:_FEW]
    if not shown:
        return [page.paragraph("None, at any p.")]
    words = f"{len(contrasts)} {'image' if len(contrasts) == 1 else 'images'} at some p"
    if len(contrasts) > len(shown):
        words += f"; these are the {len(shown)} with the fewest pixels visible"
    source = material.sources.get(case.rows[0].store_settings_sha256)
    cards = [_card(material.findings, keep, contrast, source) for contrast in shown]
    parts = [page.paragraph(f"{words}."), page.cards(cards, with_pictures=source is not None)]
    if source:
        every_image = np.array([_number(source, contrast) for contrast in shown])
        cells = [rows[keep].cell for rows in reversed(case.both_sides.values())]
        picture = picture_of(source, every_image, cells)
        parts.append(material.beside.picture(_numbered(f"images_{keep}", number), picture, "These images at every p:"))
    return parts


def _card(findings: Findings, keep: Keep, contrast: Contrast, source: MaskedImages | None) -> str:
    other: Keep = "bottom" if keep == "top" else "top"
    visible = {side: f"{side} ({100 * share:.1f}% visible)" for side, share in contrast.visible.items()}
    unmasked = "right, too" if contrast.unmasked == contrast.label else findings.class_name(contrast.unmasked)
    words = [
        f"At p={contrast.cell.p:g}, {visible[keep]} is right; {visible[other]} is taken for "
        f"{findings.class_name(contrast.predicted[other])}. Unmasked: {unmasked}.",
    ]
    others = [p for p in reversed(contrast.every_p) if p != contrast.cell.p]
    if others:
        words.append(f"Right alone at p={', '.join(f'{p:g}' for p in others)}, too.")
    pictures = _pictures(source, contrast) if source else []
    return page.card(findings.class_name(contrast.label), contrast.image_id, words, pictures)


def _pictures(source: MaskedImages, contrast: Contrast) -> list[Panel]:
    image, cell = np.array([_number(source, contrast)]), contrast.cell
    attribution = source.reader.array("attribution").read(image)[0]  # (y, x) or (channel, y, x)
    panels = [
        Panel("original", source.pixels(image)[0].transpose(1, 2, 0)),
        Panel("attribution", heat_map(attribution, cell.block)),
    ]
    for keep in KEEPS:
        pixels, _ = source.masked(image, dataclasses.replace(cell, keep=keep))
        panels.append(Panel(f"{keep}, p={cell.p:g}", pixels[0].transpose(1, 2, 0)))
    return panels


def _number(source: MaskedImages, contrast: Contrast) -> int:
    """The image's number in the store."""
    return source.reader.image_ids.index(contrast.image_id)


def provenance(material: Material, results_sha256: str) -> Parts:
    """What made the masks, what they were shown to, and what made this page."""
    pairs = dict.fromkeys(row.pairing for row in material.findings.rows)
    names = [name.replace("_", " ") for name in PAIRING_FIELDS]
    parts = []
    for values in pairs:
        content = dict(zip(names, map(str, values), strict=True))
        parts.append(page.subsection(f"{content['model']} on {content['store']}", page.facts(content)))
    made = {"results.json, sha256": results_sha256, "page made by": f"igstore {__version__}"}
    return [*parts, page.subsection("This page", page.facts(made))]


def _cases(findings: Findings) -> Iterator[Case]:
    return chain.from_iterable(findings.cases.values())


def _title(case: Case) -> str:
    return f"{case.label}. {case.masks}"


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}_{number}"
