"""How far a long job is: a bar on a terminal; in a log file a line at once, and then one now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

_LOG_SECONDS = 30.0


class Progress:
    """Counts items that are done, with a few figures beside the count.

    Parameters
    ----------
    total
        Items in all.
    done
        Items that were done before this run; they do not count for the rate.
    label
        What is being done.
    show
        Whether to print anything, on stderr.
    patience
        Seconds in which nothing is shown, for jobs that are often done by then.
    """

    def __init__(self, total: int, *, done: int = 0, label: str, show: bool = True, patience: float = 0) -> None:
        self._total, self._before, self._count = total, done, done
        self._label, self._show = label, show
        self._patience = patience
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None
        if show and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=label, unit="image", dynamic_ncols=True, delay=patience)
        elif patience == 0:
            self._say()  # the first items may take long, and a job that says nothing looks as if it hangs

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def skip(self, items: int) -> None:
        """Count `items` that turn out to be done already."""
        self._before += items
        self._count += items
        if self._bar is not None:
            self._bar.initial += items
            self._bar.update(items)

    def advance(self, items: int, figures: str = "") -> None:
        """Count `items` more, and show `figures` beside the count."""
        self._count += items
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(items)
            return
        now = time.monotonic()
        finished = self._count >= self._total
        is_due = finished or now - self._last_line >= _LOG_SECONDS
        if is_due and now - self._start >= self._patience:
            self._last_line = now
            rate = (self._count - self._before) / max(now - self._start, 1e-9)
            left = [] if finished else [f"{(self._total - self._count) / max(rate, 1e-9):.0f} s left"]
            self._say(f"{rate:.2f} images/s", *left, *filter(None, [figures]))

    def _say(self, *figures: str) -> None:
        if self._show:
            line = ", ".join([f"{self._label}: {self._count}/{self._total} images", *figures])
            print(line, file=sys.stderr, flush=True)  # noqa: T201
