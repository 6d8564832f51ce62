"""The README's picture of masks: an image, its attribution, the top half of that, the rest, and the random control.

The image is drawn here, so that the repository holds nobody's photograph; the network takes it for a wall clock.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import igstore
from igstore import cli
from igstore.images import synsets
from igstore.reporting import heat_map

MODEL, P, N_STEPS = "efficientnet_lite0", 50, 50

_SIDE = 896  # pixels in which it is drawn, then made smaller
_INK, _FACE, _WOOD, _RED = (25, 23, 22), (240, 234, 218), np.array([92, 52, 24]), (178, 34, 28)
_GAP, _TEXT, _LINE = 8, 16, 21  # pixels between panels, of letters, and from one line to the next


def clock() -> Image.Image:
    """A clock on a wall, 512x512; the same every time."""
    picture = Image.fromarray(_wall())
    draw = ImageDraw.Draw(picture)
    centre, radius, rim = np.array([466, 448]), 322, 60

    def disc(radius: float, shift: float = 0) -> list[float]:
        return [*(centre - radius + shift), *(centre + radius + shift)]

    def at(turn: float, length: float) -> tuple[float, float]:
        """`turn` of the whole circle from 12 on, `length` from the centre."""
        x, y = centre + length * np.array([math.sin(2 * math.pi * turn), -math.cos(2 * math.pi * turn)])
        return float(x), float(y)

    shadow = Image.new("L", picture.size)
    ImageDraw.Draw(shadow).ellipse(disc(radius, 37), fill=150)
    picture.paste((40, 32, 26), mask=shadow.filter(ImageFilter.GaussianBlur(22)))
    for ring in range(rim):
        wood = _WOOD * (0.6 + 0.9 * math.sin(math.pi * ring / rim))
        draw.ellipse(disc(radius - ring), fill=tuple(map(int, wood)))
    face = radius - rim
    draw.ellipse(disc(face), fill=_FACE)
    for minute in range(60):
        length, width = (44, 12) if minute % 5 == 0 else (18, 4)
        draw.line([at(minute / 60, face - 16), at(minute / 60, face - 16 - length)], _INK, width)
    for hour in range(1, 13):
        draw.text(at(hour / 12, face - 104), str(hour), _INK, ImageFont.load_default(64), anchor="mm")
    for turn, reach, colour, width in (
        ((10 + 9 / 60) / 12, 0.5, _INK, 20),
        (9 / 60, 0.74, _INK, 13),
        (34 / 60, 0.8, _RED, 5),
    ):
        draw.line([at(turn, -50), at(turn, reach * face)], colour, width)
    draw.ellipse(disc(18), fill=_INK)
    return picture.resize((512, 512), Image.Resampling.LANCZOS)


def _wall() -> Any:
    """Plaster in light from the upper left, uint8 (y, x, 3)."""
    y, x = np.mgrid[:_SIDE, :_SIDE] / _SIDE
    light = 1.1 - 0.55 * np.hypot(x - 0.25, y - 0.2)
    coarse = np.random.default_rng(0).integers(0, 256, (_SIDE // 4, _SIDE // 4), dtype=np.uint8)
    grain = Image.fromarray(coarse).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    grey = np.asarray(grain.filter(ImageFilter.GaussianBlur(2)), np.float64)[..., np.newaxis] - 127
    return (np.array([176, 160, 138]) * light[..., np.newaxis] + 0.12 * grey).clip(0, 255).astype(np.uint8)


def draw() -> Image.Image:
    """The five panels in a row; above each what it is, what the network takes it for, and how sure it is of that."""
    classifier = igstore.load_classifier(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "clock.zarr"
        igstore.build_store(classifier, [("clock", clock(), None)], store, n_steps=N_STEPS)
        names = [name for _, name in synsets()]
        opened = igstore.open_store(store).isel(image=0).load()
        panels = {"the image": {"p": 0, "keep": "bottom"}}
        panels[f"the top {P}%"] = {"p": P, "keep": "top"}
        panels["the rest"] = {"p": P, "keep": "bottom"}
        panels["as many at random"] = {"p": P, "keep": "top", "order": "random"}
        drawn: list[tuple[str, str, Any]] = []
        for title, mask in panels.items():
            options: dict[str, Any] = mask
            inputs, _, visible = igstore.MaskedImageNet(store, return_mask=True, **options)[0]
            with torch.no_grad():
                probability, index = classifier.network(inputs[None]).softmax(dim=1)[0].max(dim=0)
            pixels = np.where(visible.numpy(), opened.pixels.values, 0).transpose(1, 2, 0).astype(np.uint8)
            drawn.append((title, f"{names[int(index)]}, {100 * float(probability):.0f}%", pixels))
        drawn.insert(1, ("its attribution", "for (orange) and against (blue)", heat_map(opened.attribution.values, 3)))
    return _side_by_side(drawn)


def _side_by_side(panels: Sequence[tuple[str, str, Any]]) -> Image.Image:
    height, width, _ = panels[0][2].shape
    whole = Image.new("RGB", (len(panels) * (width + _GAP) - _GAP, 2 * _LINE + height), "white")
    font = ImageFont.load_default(_TEXT)
    for number, (title, words, pixels) in enumerate(panels):
        left = number * (width + _GAP)
        for line, (text, colour) in enumerate(((title, "black"), (words, "dimgrey"))):
            ImageDraw.Draw(whole).text((left, line * _LINE), text, colour, font)
        whole.paste(Image.fromarray(pixels), (left, 2 * _LINE))
    return whole


def main(argv: Sequence[str]) -> int:
    """``python -m pipelines.masks_figure [--out FILE]``."""
    parser = cli.BareParser(prog="python -m pipelines.masks_figure", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures" / "masks.png")
    options = parser.parse_args(argv)
    draw().save(options.out, optimize=True)
    cli.say(str(options.out))
    return cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main, sys.argv[1:]))
