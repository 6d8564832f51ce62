"""Pictures of what the masks do to images, as in the article's Figures 3 to 5. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from igstore.datasets import Images, MaskedImages
from igstore.masks import MaskOptions, block_sums, expand
from igstore.schema import Keep
from igstore.storage import StoreReader

Rgb = NDArray[np.uint8]  # (y, x, 3)

_KEEPS: tuple[Keep, Keep] = ("top", "bottom")  # one row of panels each

# Okabe and Ito's vermillion and blue, which colour-blind readers tell apart too
FOR_TARGET, AGAINST_TARGET = (213, 94, 0), (0, 114, 178)
_FULL_COLOUR = 0.99  # the quantile of an image's absolute values from which the colour is full; the viewer has the same

# pixels of the picture
_PANEL = 200  # panels are at least so wide and high: small images are enlarged by a whole number
_MARGIN, _GAP = 24, 8
_TITLE, _TEXT = 20, 14  # height of letters
_TITLE_ROW, _TEXT_ROW = 30, 22
_INK, _FAINT, _LINE, _PAPER = (20, 20, 20), (95, 95, 95), (205, 205, 205), (255, 255, 255)


@dataclass(frozen=True, eq=False)
class Panel:
    """A picture (y, x, 3) and what is written above it."""

    caption: str
    pixels: Rgb


@dataclass(frozen=True, eq=False)
class Strip:
    """One image: two lines about it, and a row of panels for each side of the cut."""

    title: str
    subtitle: str
    rows: tuple[Sequence[Panel], Sequence[Panel]]


def picture_of(source: MaskedImages, images: Images, cells: Sequence[MaskOptions]) -> Image.Image:
    """As `show_store`, of images by their number in the store, under masks that differ in p alone; of both sides."""
    strips = [_strip(source, image, cells) for image in images.tolist()]
    return _draw(strips, _notes(source.reader, cells[0]))


# What is shown of an image


def heat_map(attribution: NDArray[np.floating[Any]], block: int = 1) -> Rgb:
    """An attribution as colours: vermillion where it speaks for the target, blue where it speaks against it.

    Parameters
    ----------
    attribution
        (y, x) or (channel, y, x), finite, at any scale.
    block
        Side in pixels of the squares that it is summed over.

    Returns
    -------
    uint8 (y, x, 3): white at 0, and from the 99th percentile of the absolute values the full colour.
    """
    sums = block_sums(attribution[np.newaxis], block, "signed")[0]  # (block_y, block_x)
    strength = np.abs(sums)
    full = np.quantile(strength, _FULL_COLOUR) or strength.max() or 1.0
    strength = np.minimum(strength / full, 1.0)[..., np.newaxis]
    colour = np.where(sums[..., np.newaxis] > 0, FOR_TARGET, AGAINST_TARGET)
    blocks = np.rint(255 + (colour - 255) * strength).astype(np.uint8).transpose(2, 0, 1)  # (3, block_y, block_x)
    height, width = attribution.shape[-2:]
    return expand(blocks, height, width, block).transpose(1, 2, 0)


def _strip(source: MaskedImages, image: int, cells: Sequence[MaskOptions]) -> Strip:
    one = np.array([image])
    attribution = source.reader.array("attribution").read(one)[0]  # (y, x) or (channel, y, x)
    leading = {
        "top": Panel("original", source.pixels(one)[0].transpose(1, 2, 0)),
        "bottom": Panel("attribution", heat_map(attribution, cells[0].block)),
    }
    rows = []
    for keep in _KEEPS:
        row = [leading[keep]]
        for cell in cells:
            pixels, visible = source.masked(one, dataclasses.replace(cell, keep=keep))
            caption = f"{keep}, p={cell.p:g}: {_percent(visible[0].mean())} visible"
            row.append(Panel(caption, pixels[0].transpose(1, 2, 0)))
        rows.append(row)
    return Strip(source.ids(one)[0], _classes(source, image), (rows[0], rows[1]))


def _classes(source: MaskedImages, image: int) -> str:
    label, predicted, target = (int(source.reader.scalars(name)[image]) for name in ("label", "prediction", "target"))
    names, _ = source.class_lists()

    def name(index: int) -> str:
        return str(names[index]) if 0 <= index < len(names) else f"class {index}"

    verdict = "" if label < 0 else " (right)" if predicted == label else " (wrong)"
    parts = [
        "no label" if label < 0 else f"label: {name(label)}",
        f"predicted, unmasked: {name(predicted)}{verdict}",
    ]
    if target not in (label, predicted):
        parts.append(f"attributed: {name(target)}")
    elif 0 <= label != predicted:
        parts.append(f"attributed: the {'label' if target == label else 'prediction'}")
    return " · ".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"


def _notes(store: StoreReader, cell: MaskOptions) -> list[str]:
    spec = store.spec
    rules = {
        "mass": f"the fewest {cell.block}x{cell.block} blocks that hold p% of the image's {cell.score} attribution",
        "count": f"the p% of {cell.block}x{cell.block} blocks with the most {cell.score} attribution",
    }
    rule = rules.get(
        cell.select, f"the top p% by {cell.select} of {cell.block}x{cell.block} blocks, {cell.score} scores"
    )
    if cell.order == "random":
        rule = f"the control: as many random blocks as {rule} are"
    return [
        f"top shows {rule}; bottom shows the rest. What is hidden is filled with {cell.fill.replace('_', ' ')}.",
        "Attribution: vermillion speaks for the attributed class, blue against it; "
        f"sums over blocks, full colour from the image's {100 * _FULL_COLOUR:.0f}th percentile.",
        f"{spec.model}, weights {spec.weights}; {spec.made_by}, "
        f"baseline {spec.baseline}, of the {spec.target}'s {spec.output}.",
    ]


# How it is drawn


def _draw(strips: Sequence[Strip], notes: Sequence[str]) -> Image.Image:
    height, width, _ = strips[0].rows[0][0].pixels.shape
    zoom = max(1, -(-_PANEL // min(height, width)))
    height, width = zoom * height, zoom * width
    columns = len(strips[0].rows[0])
    inner = columns * width + (columns - 1) * _GAP
    strip_height = _TITLE_ROW + _TEXT_ROW + 2 * (_TEXT_ROW + height + _GAP)
    text, title = ImageFont.load_default(_TEXT), ImageFont.load_default(_TITLE)
    lines = [line for note in notes for line in _wrap(note, text, inner)]
    size = (
        2 * _MARGIN + inner,
        2 * _MARGIN + len(strips) * (strip_height + _MARGIN) + len(lines) * _TEXT_ROW,
    )
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    y = _MARGIN
    for strip in strips:
        draw.text((_MARGIN, y), _fit(strip.title, title, inner), _INK, title)
        y += _TITLE_ROW
        draw.text((_MARGIN, y), _fit(strip.subtitle, text, inner), _INK, text)
        y += _TEXT_ROW + _GAP // 2
        for row in strip.rows:
            for column, panel in enumerate(row):
                x = _MARGIN + column * (width + _GAP)
                draw.text((x, y), _fit(panel.caption, text, width), _FAINT, text)
                picture = Image.fromarray(panel.pixels).resize((width, height), Image.Resampling.NEAREST)
                draw.rectangle((x - 1, y + _TEXT_ROW - 1, x + width, y + _TEXT_ROW + height), outline=_LINE)
                canvas.paste(picture, (x, y + _TEXT_ROW))
            y += _TEXT_ROW + height + _GAP
        y += _MARGIN - _GAP // 2
    for line in lines:
        draw.text((_MARGIN, y), line, _FAINT, text)
        y += _TEXT_ROW
    return canvas


def _printable(line: str) -> str:
    # line breaks, above all, which Pillow measures and draws as such
    return "".join(letter if letter.isprintable() else " " for letter in line)


def _fit(line: str, font: Any, width: int) -> str:
    """`line`, cut where it would be wider than `width` pixels."""
    line = _printable(line)
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"


def _wrap(note: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in _printable(note).split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [_fit(line, font, width) for line in lines if line]
