"""Timing by turns: every contender once, then all again, in one process, so that a slow minute slows them all."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from igstore import cli


@dataclass(frozen=True)
class Rounds:
    """What taking turns gave.

    Attributes
    ----------
    seconds
        Of every contender, in each round.
    results
        What every contender returned, first when it warmed up, then in each round.
    """

    seconds: Mapping[str, Sequence[float]]
    results: Mapping[str, Sequence[Any]]

    def median(self, name: str) -> float:
        """Seconds that a contender took, the median over rounds."""
        return statistics.median(self.seconds[name])

    def times_as_long(self, name: str, other: str) -> float:
        """How many times as long `name` took as `other`: the median over rounds of the ratio within a round."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    @property
    def count(self) -> int:
        """How many rounds there were."""
        return len(next(iter(self.seconds.values())))


def take_turns(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    seconds: float,
    before: Callable[[str], object] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Rounds:
    """Time contenders by turns, after each has warmed up once.

    Parameters
    ----------
    contenders
        Functions that do the same work and return when it is done: on a GPU, when the results are on the host.
    repeats
        Rounds to run.
    seconds
        No further round begins that would end after so many seconds, warming up apart; the first one always runs.
    before
        Called with its name before every run, and not timed.
    clock
        Seconds since some moment.
    """
    results: dict[str, list[Any]] = {}
    for name, run in contenders.items():
        before(name)
        results[name] = [run()]
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    began = clock()
    for _ in range(repeats):
        round_began = clock()
        for name, run in contenders.items():
            before(name)
            started = clock()
            results[name].append(run())
            taken[name].append(clock() - started)
        now = clock()
        if (now - began) + (now - round_began) > seconds:
            break
    return Rounds(taken, results)


def add_options(parser: argparse.ArgumentParser, *, seconds: float) -> None:
    """Add ``--repeats`` and ``--seconds``, the arguments of `take_turns`, to a benchmark's options."""
    parser.add_argument("--repeats", type=cli.positive, default=3, metavar="N", help="rounds, of which the median")
    parser.add_argument(
        "--seconds", type=float, default=seconds, metavar="S", help="no round begins that would end later than this"
    )
