"""`igstore report`: an evaluation as one page for people, its figures as pictures and numbers beside it. No torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igstore import cli, files
from igstore.cli import add_options
from igstore.datasets import MaskedImages
from igstore.errors import UserError, option
from igstore.evaluate import Evaluation
from igstore.evaluation import RESULTS, Findings, results_json, settings_sha256
from igstore.reporting import page, sections
from igstore.schema import as_path, several
from igstore.storage import StoreReader

Path_ = str | os.PathLike[str]

_LEDE = (
    "how much each block of an image speaks for a class. Here models are shown only the blocks that hold the top p% of "
    "that (top), or all the others (bottom), or as many blocks at random: what do they still recognise?"
)


def make_report(
    results: Path_ | Evaluation, out: Path_ = "report.html", *, stores: Path_ | Sequence[Path_] = (), images: Any = None
) -> list[Path]:
    """Write what `evaluate` found as a page that is complete in itself, and a folder with its figures beside it.

    The same results and stores make the same bytes.

    Parameters
    ----------
    results
        The folder that ``evaluate(..., out=results)`` wrote, or what it returned.
    out
        The page. The folder is called after it: ``report_files`` for ``report.html``. It gets every figure as PNG, its
        numbers as CSV, and in ``classes.csv`` and ``images.csv`` all of what the page shows the extremes of.
    stores
        Stores that were evaluated, to show pictures from.
    images
        Where the pixels are, for stores without; as `masked_view`.

    Returns
    -------
    The files written, the page first.

    Raises
    ------
    UserError
        There are no results, a store is not one of theirs, matplotlib is missing, or the page cannot be written.
    DamagedStoreError
        The results contradict each other.

    >>> from igstore import evaluate
    >>> found = evaluate("toy.zarr", p=[90, 50], out="found")
    >>> page, *beside = make_report("found", "page.html", stores=["toy.zarr"])
    >>> page.name, sorted({path.suffix for path in beside})
    ('page.html', ['.csv', '.png'])
    """
    out = as_path("out", out)
    stores = several("stores", stores, str | os.PathLike | StoreReader, "a path, URL or reader")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{option('out')} is {out}; it must be an HTML file, such as {out / 'report.html'}")
    if isinstance(results, Evaluation):
        findings = Findings(results.rows, results.predictions)
        results_sha256 = hashlib.sha256(results_json(results.rows)).hexdigest()
    elif isinstance(results, str | os.PathLike):
        findings = Findings.read(Path(results))
        results_sha256 = files.checksum(Path(results) / RESULTS)["sha256"]
    else:
        raise UserError(
            f"{option('results')} is a {type(results).__name__}; it must be what evaluate returned, or the folder that "
            "it wrote"
        )
    beside = sections.Beside(out.with_name(f"{out.stem}_files"))
    material = sections.Material(findings, _sources(findings, stores, images), beside)
    parts = {
        "At a glance": sections.glance(material),
        "Accuracy": sections.accuracy(material),
        "Tables": sections.tables(material),
        "What is visible": sections.visible(material),
        "Completeness": sections.completeness(material),
        "Classes": sections.classes(material),
        "Images": sections.images(material),
        "Provenance": sections.provenance(material, results_sha256),
    }
    title = f"Masked images: {', '.join(dict.fromkeys(row.model for row in findings.rows))}"
    contents = {out: page.page(title, f"{_who_says(findings)} {_LEDE}", parts).encode()}
    contents |= {beside.folder / name: content for name, content in beside.files.items()}
    try:
        for path, content in contents.items():
            files.write_atomically(path, content)
    except OSError as error:
        raise UserError(f"the report cannot be written to {out}: {error.strerror or error}") from error
    return list(contents)


def _who_says(findings: Findings) -> str:
    """What made the maps, as the subject of a sentence and its verb."""
    made = dict.fromkeys(row.method if row.is_imported else "Integrated Gradients" for row in findings.rows)
    *others, last = made
    return f"{', '.join(others)} and {last} say" if others else f"{last} says"


def _sources(findings: Findings, stores: Sequence[Path_], images: Any) -> dict[str, MaskedImages]:
    sources = {}
    for store in stores:
        source = MaskedImages(store, images)
        settings = settings_sha256(source.reader.spec)
        cells = {row.cell for row in findings.rows if row.store_settings_sha256 == settings}
        if not cells:
            names = ", ".join(sorted({row.store for row in findings.rows}))
            raise UserError(f"{store} is not the store of these results, which are of {names}: its settings differ")
        source.check(*cells)
        source.check_pixels()
        sources[settings] = source
    return sources


def parser() -> cli.Parser:
    """The options of the command."""
    parser = cli.Parser("report", "Make a page of what igstore evaluate --out wrote, with figures, tables and images.")
    parser.add_argument("results", metavar="RESULTS", help="the folder that igstore evaluate --out wrote")
    parser.add_argument("--out", metavar="HTML", help="the page to write; figures go beside it")
    parser.add_argument(
        "--store", dest="stores", nargs="+", metavar="STORE", help="evaluated stores, to show images from"
    )
    add_options(parser, "images")
    return parser.of(make_report)


def main(argv: Sequence[str]) -> int:
    """``igstore report RESULTS``."""
    options, output = parser().parse(argv)
    if Path(options.out).exists():
        output.note(f"note: {options.out} is there, and is replaced")
    page, *beside = make_report(**vars(options))
    said = f"{page}: open it in a browser; {len(beside)} figures and tables in {beside[0].parent}"
    output.summary({"page": page, "files": beside}, [said])
    return cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
