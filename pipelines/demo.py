"""`make demo`: the main job on what the package registry holds, EfficientNet-Lite0's weights and foolbox's photographs.

Attributes the 20 labelled photographs, ranks their blocks, shows them masked, prints the article's tables and writes
the report; run again, it finds the store finished.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import igstore
from igstore import cli
from igstore.evaluation import article_tables
from igstore.images import synsets
from igstore.info import describe

_PHOTOGRAPH = re.compile(r"foolbox/data/imagenet_\d\d_(\d+)\.jpg")


def lay_out_photographs(folder: Path) -> int:
    """Copy foolbox's ImageNet photographs to ``folder/<wnid>/``, without importing foolbox; how many there are.

    Raises
    ------
    UserError
        foolbox is not installed.
    """
    try:
        files = importlib.metadata.distribution("foolbox").files or []
    except importlib.metadata.PackageNotFoundError:
        raise igstore.UserError("the demo's photographs come with foolbox: pip install 'igstore[demo]'") from None
    wnids = [wnid for wnid, _ in synsets()]
    count = 0
    for file in files:
        if match := _PHOTOGRAPH.fullmatch(str(file)):
            home = folder / wnids[int(match[1])]
            home.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(file.locate()), home / file.name)
            count += 1
    return count


def main(argv: Sequence[str]) -> int:
    """``python -m pipelines.demo [--out DIR] [--n-steps M]``."""
    parser = cli.BareParser(prog="python -m pipelines.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything the demo makes")
    parser.add_argument("--n-steps", type=cli.positive, default=50, help="gradient evaluations an image")
    options = parser.parse_args(argv)
    photographs, store = options.out / "photographs", options.out / "efficientnet_lite0.zarr"
    count = lay_out_photographs(photographs)
    cli.say(f"{count} photographs, EfficientNet-Lite0, {options.n_steps} steps each: a minute or two on a CPU")
    info = igstore.build_store(
        "efficientnet_lite0", photographs, store, target="label", n_steps=options.n_steps, show_progress=True
    )
    cli.say("", *describe(info), "")
    results = options.out / "results"
    evaluation = igstore.evaluate(store, out=results, overwrite=True, show_progress=True)
    for table in article_tables(evaluation.rows):
        cli.say(table.text(), "")
    page = options.out / "report.html"
    igstore.make_report(results, page, stores=[store])
    cli.say(
        f"{count} photographs say little; the point is that this is the whole way.",
        f"open this    {page}",
        f"look closer  {Path(sys.executable).parent / 'igstore'} view {store}",
        f"use it       MaskedImageNet({str(store)!r}, p=50, keep='bottom')",
    )
    return cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
