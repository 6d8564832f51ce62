"""One process with one device, which builds the shards that it is given.

Decoding runs ahead in threads, attribution in the main thread, writing behind in a thread of its own, so that the
accelerator waits for neither. What is finished is kept: `igstore.storage.staging` says how.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from igstore import cli, machine
from igstore.attribution import Arrays, Attributor
from igstore.building.decoding import Decoder, Job
from igstore.building.plan import Build
from igstore.building.shards import ShardWriter
from igstore.files import Folder
from igstore.machine import free_memory, one_behind
from igstore.models import Classifier
from igstore.schema import BUILT, FAILED
from igstore.storage import StoreReader, hold, layout, staging, write_shard

logger = logging.getLogger(__name__)

_COPIES = 3  # of the parameters, while a network is made faster

# Gradient evaluations in a unit, the work that a kill can cost: under a minute on two cores, about a second on a GPU.
_UNIT_EVALUATIONS = {"cpu": 200, "cuda": 10000}


@dataclass(frozen=True)
class Advance:
    """Some images more are done.

    Attributes
    ----------
    n_images
        How many.
    evaluations
        Gradient evaluations that it took; None where they turned out to be done already.
    errors
        float32, the completeness errors of those that did not fail.
    """

    n_images: int
    evaluations: int | None = None
    errors: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))


Report = Callable[[Advance], None]


class Workers(Protocol):
    """Whoever builds shards: one worker here, several processes, or a cluster's."""

    def attribute(self, shards: Sequence[int], report: Report) -> None:
        """Build `shards`, of a store that is there; `report` hears of every image once."""


def _say_if_short_of_memory(classifier: Classifier) -> None:
    """Say so where a network's parameters alone may be more than there is room for, before the system kills us."""
    n_bytes = sum(parameter.nbytes for parameter in classifier.network.parameters())
    free = free_memory()
    if free < _COPIES * n_bytes:
        logger.warning(
            "%s has %s of parameters, of which %d copies are made, and %s of memory is free: the system may end this "
            "process; allow it more memory",
            *(classifier.name, cli.size(n_bytes), _COPIES, cli.size(free)),
        )


def _with_job(job: Job, wait: Callable[[], Arrays]) -> tuple[Job, Arrays]:
    return job, wait()


class Worker:
    """Builds shards in this process; a context manager.

    Parameters
    ----------
    build
        What to build. Its labels must be the network's classes.
    device
        Where to compute.
    batch_size
        As `Attributor` takes it.
    workers
        Threads that decode images, as `Decoder` takes them.
    attributor
        What makes the maps: `Attributor`, or another that is made with the same arguments.

    Raises
    ------
    UserError, ModelError, OutOfMemoryError
        As `Attributor`: before anything is written, since a network may turn out not to be a classifier of such images.
    """

    def __init__(
        self,
        build: Build,
        *,
        device: torch.device,
        batch_size: int | None,
        workers: int | None,
        attributor: Callable[..., Attributor] = Attributor,
    ) -> None:
        self._build = build
        if device.type == "cpu":
            _say_if_short_of_memory(build.classifier)
        self._attributor = attributor(build.classifier, build.spec, device=device, batch_size=batch_size)
        if batch_size is None and self._attributor.batch_size == 1:
            logger.warning("little memory is free on %s: batches of 1", device)
        layout.check_classes(build.spec, self._attributor.n_classes - 1)
        self._attributor.check_labels(build.images.labels[: build.n_images], build.images.ids)
        self._decoder = Decoder(build.images, build.spec.preprocessing, workers)
        self._unit = max(1, _UNIT_EVALUATIONS[device.type] // max(1, build.spec.n_steps))  # images
        self._runtime = machine.runtime(device)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._decoder.__exit__(*error)

    def attribute(self, shards: Iterable[int], report: Report) -> None:
        """Build `shards` of the store, which this process is `at_work` at.

        Of a shard that is finished, the images that failed are tried again.

        Parameters
        ----------
        shards
            Their numbers, asked for when the work on those before is nearly done.
        report
            Hears of every image once.
        """
        images, spec = self._build.images, self._build.spec
        with hold(self._build.path) as folder:
            store = StoreReader(folder.path)
            listed = images.ids[: store.n_images], images.labels[: store.n_images]
            with ShardWriter(folder, spec, *listed, self._runtime) as writer:
                submitted = self._submitted(self._jobs(shards, folder, store, writer, report))
                for job, arrays in one_behind(submitted, self._attributor.device):
                    writer.add(job, arrays, is_staged=False)
                    errors = arrays["completeness_error"][arrays["status"] == BUILT]
                    report(Advance(len(job), int(arrays["n_steps"].sum()), errors))

    def _submitted(self, jobs: Iterable[Job]) -> Iterator[Callable[[], tuple[Job, Arrays]]]:
        """Of each job in order, once the device has it, a function that waits for its arrays."""
        for job, pixels, reasons in self._decoder.decode(jobs):
            wait = self._attributor.submit(pixels, *self._listed(job), reasons)
            yield partial(_with_job, job, wait)

    def _jobs(
        self, shards: Iterable[int], folder: Folder, store: StoreReader, writer: ShardWriter, report: Report
    ) -> Iterator[Job]:
        """The units that are neither staged nor, by somebody else since this build began, in a finished shard."""
        for shard in shards:
            record = store.record(shard)
            if record is not None:
                if record["failed"]:
                    self._retry_failed(folder, shard, record, writer)
                report(Advance(record["images"][1] - record["images"][0]))
                continue
            for job in self._units(shard, *store.bounds(shard)):
                staged = staging.load_unit(folder, store.spec, job.first, len(job), partial(self._pixels, job))
                # a unit in which an image failed is done again whole, in the same batches
                if staged is not None and not (staged["status"] == FAILED).any():
                    writer.add(job, staged, is_staged=True)
                elif store.record(shard) is None:
                    yield job
                    continue
                report(Advance(len(job)))

    def _units(self, shard: int, first: int, last: int) -> Iterator[Job]:
        for start in range(first, last, self._unit):
            yield Job(shard, start, min(start + self._unit, last))

    def _pixels(self, job: Job) -> NDArray[np.uint8]:
        ((_, pixels, _),) = self._decoder.decode([job])
        return pixels

    def _listed(self, job: Job) -> tuple[NDArray[np.int32], Sequence[str]]:
        images = self._build.images
        return images.labels[job.first : job.last], images.ids[job.first : job.last]

    def _retry_failed(self, folder: Folder, shard: int, record: dict[str, Any], writer: ShardWriter) -> None:
        """Try the failed images of a finished shard again, and write it anew if that changed anything."""
        ids, store = self._build.images.ids, StoreReader(folder.path)
        first, last = record["images"]
        failed = np.flatnonzero(store.status[first:last] == FAILED).tolist()
        jobs = [Job(shard, first + place, first + place + 1) for place in failed]
        changed: dict[int, Arrays] = {}
        for job, pixels, reasons in self._decoder.decode(jobs):
            arrays = self._attributor(pixels, *self._listed(job), reasons)
            if str(arrays["reason"][0]) != record["failed"].get(ids[job.first]):
                changed[job.first - first] = arrays
        if not changed:
            return
        names = [name for name in store.variables if name not in layout.LISTED]
        whole = {name: np.array(store.values(name, shard, record)) for name in names}
        reasons_by_id = dict(record["failed"])
        for place, arrays in changed.items():
            for name in names:
                whole[name][place] = arrays[name][0]
            reasons_by_id.pop(ids[first + place], None)
            if reason := str(arrays["reason"][0]):
                reasons_by_id[ids[first + place]] = reason
        kept = {name: value for name, value in record.items() if name not in ("shard", "images", "files")}
        kept |= {"failed": reasons_by_id, "evaluations": int(whole["n_steps"].sum())}
        if "in_top5" in record:  # not known of shards that a merge has mixed
            kept["in_top5"] += sum(int(arrays["in_top5"][0]) for arrays in changed.values())
        whole |= writer.listed(first, last)
        write_shard(folder, store.spec, store.n_images, shard, whole, kept, instead_of=record)
