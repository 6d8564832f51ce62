"""`igstore show`: a picture of what the masks do to some images, as in the article's Figures 3 to 5. Needs no torch."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from igstore import cli, files
from igstore.cli import add_options
from igstore.datasets import Images, MaskedImages
from igstore.errors import UserError, option
from igstore.files import as_seen
from igstore.masks import MaskOptions, options_of_each
from igstore.reporting import picture_of
from igstore.schema import BUILT, Fill, Order, Score, Select
from igstore.storage import StoreReader

_FEW = 4  # images of a picture, where none are asked for


def show_store(
    store: str | os.PathLike[str] | StoreReader,
    image: Sequence[str] | None = None,
    p: float | Sequence[float] = (90, 70, 50, 30),
    *,
    select: Select = MaskOptions.select,
    score: Score = MaskOptions.score,
    block: int = MaskOptions.block,
    fill: Fill = MaskOptions.fill,
    order: Order = MaskOptions.order,
    seed: int = MaskOptions.seed,
    images: Any = None,
) -> Image.Image:
    """A picture of some images of a store: as they are, their attributions, and for each p what either side shows.

    Parameters
    ----------
    store
        Its path, or a reader of it.
    image
        The ids of the images to show, in this order; None is four, evenly spread over those that are built.
    p
        One percentage or several, from left to right.
    select
        What p is a percentage of: ``"mass"``, the image's total score, or ``"count"``, its blocks.
    score, block
        The ranking: the score of a block (``"positive"``, ``"absolute"`` or ``"signed"``), and its side in pixels.
    fill
        What a hidden pixel becomes: ``"black"``, the model's ``"mean"`` colour, the ``"image_mean"``, a ``"blur"`` or
        ``"noise"``.
    order
        ``"attribution"``, or the control ``"random"``: as many blocks, chosen at random.
    seed
        Of the random order and of the noise.
    images
        Where the pixels are, for a store without; as `masked_view`.

    Returns
    -------
    An RGB picture. Every panel has the size of the store's pixels, times a whole number where those are small.

    Raises
    ------
    UserError
        There is no such image, or it is not built, or as `masked_view`.

    >>> picture = show_store("toy.zarr", ["picture_0", "picture_3"], p=[90, 50])
    >>> picture.mode
    'RGB'
    """
    cells = options_of_each(p, select=select, score=score, block=block, fill=fill, order=order, seed=seed)
    source = MaskedImages(store, images)
    source.check(*cells)
    source.check_pixels()
    return picture_of(source, _spread(source.built, _FEW) if image is None else _find(source, image), cells)


def _spread(images: Images, n: int) -> Images:
    """At most `n` of `images`, evenly spread, the first and the last among them."""
    places = np.unique(np.linspace(0, len(images) - 1, n).round().astype(int))
    spread: Images = images[places]
    return spread


def _find(source: MaskedImages, given: Any) -> Images:
    store = source.reader
    if isinstance(given, str):
        raise UserError(f"{option('image')} is {given!r}; give a list of ids: [{given!r}]")
    ids = np.asarray(given, dtype=object).tolist()  # of a list, or a column of a table
    if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
        raise UserError(
            f"{option('image')} is {given!r:.80}; it must be ids of images, such as {store.image_ids[0]!r}, in a list"
        )
    if not ids:
        raise UserError(f"{option('image')} is empty; give at least one id, or leave it out")
    numbers = {as_seen(name): number for number, name in enumerate(store.image_ids)}
    ids = [as_seen(name) for name in ids]
    for name in ids:
        if name not in numbers:
            close = [known for known in numbers if name in known][:5] or get_close_matches(name, numbers, 5)
            near = f"; is it {', '.join(close)}?" if close else f"; the first one is {store.image_ids[0]}"
            raise UserError(f"{source.where} has no image {name!r}{near}")
        if store.status[numbers[name]] != BUILT:
            why = store.failed.get(name, "run `igstore build` with the store's settings to go on")
            raise UserError(f"image {name} of {source.where} is not built: {why}")
    return np.array([numbers[name] for name in ids])


# The command


def parser() -> cli.Parser:
    """The options of the command."""
    parser = cli.Parser("show", "Draw what the masks do to some images: what is kept, and what is left, for each p.")
    parser.add_argument("store", metavar="STORE", help="a ranked store")
    parser.add_argument("--image", nargs="+", metavar="ID", help="these images (default: a few, evenly spread)")
    add_options(parser, "p", nargs="+")
    add_options(parser, "select", "score", "block", "fill", "order", "seed", "images")
    parser.add_argument("--out", metavar="PNG", default="show.png", help="the picture to write")
    return parser.of(show_store)


def main(argv: Sequence[str]) -> int:
    """``igstore show STORE``."""
    parsed, output = parser().parse(argv)
    options = vars(parsed)
    out = Path(options.pop("out"))
    if out.suffix.lower() != ".png":
        raise UserError(f"{option('out')} is {out}; it must be a PNG file: {out.with_suffix('.png')}")
    if out.exists():
        output.note(f"note: {out} is there, and is replaced")
    picture = show_store(**options)
    data = io.BytesIO()
    picture.save(data, "png")
    try:
        files.write_atomically(out, data.getbuffer())
    except OSError as error:
        raise UserError(f"the picture cannot be written to {out}: {error.strerror or error}") from error
    size = {"width": picture.width, "height": picture.height}
    output.summary({"picture": out, **size}, [f"{out}: {picture.width}x{picture.height} pixels"])
    return cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
