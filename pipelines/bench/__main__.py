"""The command ``python -m pipelines.bench``: a table of contents of the benchmarks, each a module with a ``main``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from igstore import cli
from igstore.errors import UserError

BENCHMARKS = {
    "engine": "Integrated Gradients against captum, and against the machine's limit",
    "reader": "masked images a second, against ImageFolder, and raw ones against np.memmap",
    "rank": "images ranked a second, and peak memory, up to a store of full size",
    "quadrature": "what a step buys: error against gradient evaluations, for every rule",
    "evaluate": "all cells of an evaluation against a bare loop of as many forward passes",
    "gpu": "everything that a GPU is to be measured for, in parts, to one JSON file",
    "commands": "every command on 50,000 small images, and how it grows with them",
    "startup": "import time, start of `igstore info`, bytes an image, peak memory of a build",
}
_PEERS = ("captum", "h5py", "matplotlib")


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        cli.say("usage: python -m pipelines.bench BENCHMARK ... (BENCHMARK --help lists its options)", "")
        cli.say(*(f"  {name:<10} {purpose}" for name, purpose in BENCHMARKS.items()))
        return cli.DONE if argv else cli.MISUSED
    if argv[0] not in BENCHMARKS:
        raise UserError(f"there is no benchmark {argv[0]!r}; there are {', '.join(BENCHMARKS)}")
    try:
        benchmark = importlib.import_module(f"pipelines.bench.{argv[0]}")
    except ModuleNotFoundError as error:
        if error.name not in _PEERS:
            raise
        raise UserError(f"{argv[0]} needs {error.name}: pip install 'igstore[bench]'") from None
    return int(benchmark.main(argv[1:]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``python -m pipelines.bench BENCHMARK ...`` and return its exit status."""
    return cli.run(_dispatch, argv)


if __name__ == "__main__":
    raise SystemExit(main())
