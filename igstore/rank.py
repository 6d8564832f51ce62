"""`igstore rank`: rank the blocks of every map of a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from igstore import cli
from igstore.building import rank_store
from igstore.cli import add_options
from igstore.storage import StoreReader


def parser() -> cli.Parser:
    """The options of the command."""
    parser = cli.Parser(
        "rank", "Rank the blocks of every attribution map of a store. The same command again ranks what is new."
    )
    parser.add_argument("store", metavar="STORE", type=Path, help="folder of the store")
    add_options(parser, "block", "score")
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="a dask.distributed scheduler such as tcp://host:8786 to compute on, instead of threads of this machine",
    )
    return parser.of(rank_store)


def main(argv: Sequence[str]) -> int:
    """``igstore rank STORE``."""
    options, output = parser().parse(argv)
    summary = rank_store(**vars(options), show_progress=output.show_progress)
    lines = [f"ranks/{summary.name}: {summary.ranked} images ranked, {summary.unchanged} unchanged"]
    if summary.missing_shards:
        missing, n_shards = len(summary.missing_shards), StoreReader(options.store).n_shards
        lines += [
            f"shards that are not built, and so have no ranks: {missing} of {n_shards}; build on, then rank again"
        ]
    output.summary(summary, lines)
    return cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
