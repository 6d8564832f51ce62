"""`igstore export`: a finished store in other forms, for sharing and for other programs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igstore import cli
from igstore.cli import Progress
from igstore.errors import UserError, option
from igstore.files import appearing
from igstore.schema import Compress, as_path, check_choice
from igstore.storage import (
    StoreReader,
    check_finished,
    check_sealed,
    layout,
    write_copy,
    write_hdf5,
    write_quantus,
    write_virelay,
)


@dataclass(frozen=True)
class Format:
    """A form that a store can be given.

    Parameters
    ----------
    purpose
        What it is, in a few words.
    write
        Called as ``write(store, out, progress=progress, **options)``: a finished store's reader, and an empty folder or
        file that it fills; it counts the store's images on `progress`.
    options
        Names of the options of `export_store` that it takes; it gets those that were given.
    is_file
        Whether it fills a file.
    """

    purpose: str
    write: Callable[..., None]
    options: frozenset[str] = frozenset()
    is_file: bool = False


def _write_ranks(store: StoreReader, out: Path, *, progress: Progress, compress: Compress | None = None) -> None:
    if not store.rankings:
        raise UserError(f"{store.where} has no ranking to export; make one with `igstore rank {store.where}`")
    write_copy(store, out, omit=layout.OMISSIBLE, compress=compress, progress=progress)


FORMATS = {
    "zarr": Format("a copy of the store", write_copy, frozenset({"compress"})),
    "ranks": Format("a copy without maps and pixels, to share more widely", _write_ranks, frozenset({"compress"})),
    "hdf5": Format("one HDF5 file", write_hdf5, is_file=True),
    "quantus": Format("a folder of arrays for Quantus's metrics", write_quantus),
    "virelay": Format("a project of ViRelAy's", write_virelay),
}


def export_store(
    store: str | os.PathLike[str] | StoreReader,
    out: str | os.PathLike[str],
    *,
    format: str = "zarr",  # noqa: A002
    compress: Compress | None = None,
    show_progress: bool = False,
) -> Path:
    """Write a finished store in another form. It appears at `out` whole, or not at all.

    Parameters
    ----------
    store
        Its path, its URL or a reader of it, in any form.
    out
        The file or folder to make; nothing must be there.
    format
        ``"zarr"``, a copy, which is also the way back from HDF5 and from a compressed store; ``"ranks"``, one without
        maps and pixels, with which whoever has the images can do everything but look at the maps and rank anew;
        ``"hdf5"``, one file that h5py and xarray read; ``"quantus"`` and ``"virelay"``, what those programs take, as
        `igstore.storage.interchange` says.
    compress
        ``"zstd"`` compresses the image-shaped arrays of Zarr formats, one image at a time.
    show_progress
        A progress bar on stderr.

    Returns
    -------
    Where it is.

    Raises
    ------
    UserError
        The store has unfinished shards or rankings, an option does not go with the format, or `out` cannot be made.
    StoreExistsError
        There is something at `out`.
    DamagedStoreError
        A shard of the store is not what its record says; nothing damaged is passed on.

    >>> from igstore import keep_mask
    >>> export_store("toy.zarr", "thin.zarr", format="ranks").name
    'thin.zarr'
    >>> keep_mask("thin.zarr", p=50).sizes["image"]
    4
    """
    check_choice("format", format, FORMATS)
    given: dict[str, Any] = {"compress": compress}
    given = {name: value for name, value in given.items() if value is not None}
    chosen, target = FORMATS[format], as_path("out", out)
    for name in given.keys() - chosen.options:
        able = [other for other, one in FORMATS.items() if name in one.options]
        raise UserError(f"{option(name)} does not go with {option('format')} {format}; it goes with {', '.join(able)}")
    if compress is not None:
        check_choice("compress", compress, Compress)
    reader = StoreReader.of(store)
    check_sealed(reader)
    check_finished(reader)
    with (
        appearing(target, is_file=chosen.is_file) as making,
        Progress(reader.n_images, label=f"export {format}", show=show_progress) as progress,
    ):
        chosen.write(reader, making, progress=progress, **given)
    return target


def parser() -> cli.Parser:
    """The options of the command."""
    parser = cli.Parser("export", "Write a finished store in another form. What is interrupted leaves nothing.")
    parser.add_argument("store", metavar="STORE", help="path or URL of the store, in any form")
    parser.add_argument("out", metavar="OUT", help="file or folder to make")
    purposes = "; ".join(f"{name}, {one.purpose}" for name, one in FORMATS.items())
    parser.add_argument("--format", choices=list(FORMATS), help=purposes)
    parser.add_argument(
        "--compress",
        choices=cli.choices_of(Compress),
        help="compress each image's arrays, for stores that are sent far",
    )
    return parser.of(export_store)


def main(argv: Sequence[str]) -> int:
    """``igstore export STORE OUT --format zarr|ranks|hdf5``."""
    options, output = parser().parse(argv)
    out = export_store(**vars(options), show_progress=output.show_progress)
    n_bytes = _size(out)
    output.summary({"path": out, "format": options.format, "bytes": n_bytes}, [f"{out}: {cli.size(n_bytes)}"])
    return cli.DONE


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
