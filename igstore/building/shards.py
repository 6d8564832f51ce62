"""From units to shards: units are staged as they come, and a shard is written when all of its units are there.

Builders that were started on one store by mistake all stage and collect units; the first to have a shard's writes it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igstore.building.decoding import Job
from igstore.files import Folder
from igstore.schema import BuildSpec
from igstore.storage import check_in_place, layout, staging, write_shard

Arrays = dict[str, NDArray[Any]]

_WRITES_BEHIND = 2  # units that may wait for the disk, so that memory stays bounded


class ShardWriter:
    """Writes behind the work, in one thread of its own; a context manager.

    An error in the thread is raised by the next `add`, or on leaving the context, which waits for what was given.

    Parameters
    ----------
    store, spec
        The store, held by this process, which is `at_work` there.
    image_ids, labels
        All of its images.
    runtime
        What else every record says: device and versions.
    """

    def __init__(
        self,
        store: Folder,
        spec: BuildSpec,
        image_ids: Sequence[str],
        labels: NDArray[np.integer[Any]],
        runtime: dict[str, Any],
    ) -> None:
        self._store = store
        self._spec = spec
        self._listed = layout.listed(spec, image_ids, labels)
        self._n_images = len(image_ids)
        self._runtime = runtime
        self._given_up = threading.Event()
        self._thread = ThreadPoolExecutor(1, "write")
        self._pending: deque[Future[None]] = deque()
        self._units: dict[int, dict[int, Arrays]] = {}  # by shard, by first image

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._given_up.set()
        self._thread.shutdown(wait=True)
        if kind is None:
            for future in self._pending:
                future.result()

    def add(self, job: Job, arrays: Arrays, *, is_staged: bool) -> None:
        """Take a unit's arrays, as `Attributor` returns them; waits only where the disk is behind."""
        while self._pending and (self._pending[0].done() or len(self._pending) > _WRITES_BEHIND):
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._add, job, arrays, is_staged))

    def listed(self, first: int, last: int) -> Arrays:
        """What the store lists of images `first` to `last` (exclusive), by variable."""
        return {name: values[first:last] for name, values in self._listed.items()}

    def _add(self, job: Job, arrays: Arrays, is_staged: bool) -> None:
        check_in_place(self._store)
        if not is_staged:
            staging.save_unit(self._store, self._spec, job.first, arrays)
        units = self._units.setdefault(job.shard, {})
        units[job.first] = arrays
        first, last = layout.shard_bounds(job.shard, self._n_images, self._spec.shard_size)
        if sum(len(unit["status"]) for unit in units.values()) == last - first:
            self._write(job.shard, first, last, self._units.pop(job.shard))

    def _write(self, shard: int, first: int, last: int, units: dict[int, Arrays]) -> None:
        in_order = [units[start] for start in sorted(units)]
        whole = {name: np.concatenate([unit[name] for unit in in_order]) for name in in_order[0]}
        reasons, in_top5 = whole.pop("reason"), whole.pop("in_top5")
        batch_sizes, seconds = whole.pop("batch_size"), whole.pop("seconds")
        listed = self.listed(first, last)
        ids = listed["image_id"].tolist()
        record = {
            "failed": {image_id: str(reason) for image_id, reason in zip(ids, reasons, strict=True) if reason},
            "in_top5": int(in_top5.sum()),
            "evaluations": int(whole["n_steps"].sum()),
            "batch_size": np.unique(batch_sizes).tolist(),
            "seconds": round(float(seconds.sum()), 3),
            **self._runtime,
        }
        write_shard(self._store, self._spec, self._n_images, shard, whole | listed, record, given_up=self._given_up)
        staging.discard_units(self._store, first, last)
