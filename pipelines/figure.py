"""The README's figure: accuracy against p, drawn from an evaluation as `igstore evaluate --out` writes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from igstore import cli, files
from igstore.evaluation import Findings
from igstore.reporting import accuracy_by_p

# A picture of its own, so it brings its background and is as legible on a dark page as on a light one.
_STYLE = """<style>
  svg {
    color: #1b1d1f; --paper: #ffffff; --rule: #d4d7da;
    --c-d55e00: #d55e00; --c-0072b2: #0072b2; --c-6f7378: #6f7378;
  }
  @media (prefers-color-scheme: dark) {
    svg {
      color: #e8eaec; --paper: #14171a; --rule: #3a4046;
      --c-d55e00: #f58442; --c-0072b2: #56b4e9; --c-6f7378: #a9afb5;
    }
  }
</style><rect width="100%" height="100%" fill="var(--paper)"/>"""


def draw(results: Path) -> str:
    """Accuracy by p of the first case of an evaluation, as an SVG file's text."""
    cases, *_ = Findings.read(results).cases.values()
    drawing = accuracy_by_p(cases, "accuracy").svg()
    head, body = drawing.split(">", 1)
    head = head.replace(' aria-hidden="true"', ' xmlns="http://www.w3.org/2000/svg" role="img"')
    return f"{head}>{_STYLE}{body}\n"


def main(argv: Sequence[str]) -> int:
    """``python -m pipelines.figure RESULTS``."""
    parser = cli.BareParser(prog="python -m pipelines.figure", description=__doc__)
    parser.add_argument("results", type=Path, help="the folder that igstore evaluate --out wrote")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures" / "accuracy.svg")
    options = parser.parse_args(argv)
    files.write_atomically(options.out, draw(options.results).encode())
    cli.say(str(options.out))
    return cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
