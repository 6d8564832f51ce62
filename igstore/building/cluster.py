"""The workers of a dask.distributed cluster: each shard is a task, and goes to another worker when one dies.

Workers are told names (`Order`): each loads the network and lists the images itself, once, and makes sure that they are
the client's. All see the store and the images at the same paths.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from igstore.building.dask_client import connect
from igstore.building.plan import Build, Names, absolute, plan_build
from igstore.building.worker import Advance, Report, Worker
from igstore.errors import IgstoreError, SettingsMismatchError, UserError, option
from igstore.machine import find_device
from igstore.schema import BuildSpec
from igstore.storage import at_work

logger = logging.getLogger(__name__)

_GPU = "GPU"  # what workers call the resource, as in `dask worker --resources GPU=1`
_RETRIES = 2  # after errors; how many workers may die on a task, the scheduler's configuration says

_FOUND_BY_PLAN = ("model", "weights", "weights_sha256", "preprocessing", "images_fingerprint")


@dataclass(frozen=True)
class Order:
    """What a worker must know to build shards: names and settings, no network and no images.

    Parameters
    ----------
    names
        Of the model and the images.
    store
        Absolute path of the store.
    n_images
        How many of the images are built.
    spec
        What the worker must come to, too.
    device, batch_size, workers
        As `build_store`.
    """

    names: Names
    store: str
    n_images: int
    spec: BuildSpec
    device: str
    batch_size: int | None
    workers: int | None

    @classmethod
    def of(cls, build: Build, *, device: str, batch_size: int | None, workers: int | None) -> Order:
        """The order for `build`.

        Raises
        ------
        UserError
            The network or the images have no name that would find them on another machine.
        """
        if build.names is None:
            raise UserError(
                f"{option('scheduler')} needs a model given by name, package.module:function for one of your own, and "
                "images given by path: workers load them themselves"
            )
        if device == "all" or "," in device:
            raise UserError(
                f"{option('device')} is {device}, which with {option('scheduler')} is each worker's one device; start "
                "one worker a GPU, and leave it out"
            )
        return cls(build.names, absolute(build.path), build.n_images, build.spec, device, batch_size, workers)


class Cluster:
    """Builds shards as tasks on a cluster; a context manager.

    Where any worker declares the resource GPU, each task asks for one of it, and other workers get none.

    Parameters
    ----------
    order
        What to build.
    scheduler
        Address of the scheduler.

    Raises
    ------
    UserError
        On entering the context: no scheduler answers, or a worker does not find what the client has found.
    IgstoreError
        What fails in a task again and again; or several workers have died on it, or the scheduler is gone.
    """

    def __init__(self, order: Order, *, scheduler: str) -> None:
        self._order = order
        self._scheduler = scheduler

    def __enter__(self) -> Cluster:
        with ExitStack() as context:
            self._client = context.enter_context(connect(self._scheduler))
            context.callback(self._dismiss)
            if not self._client.scheduler_info()["workers"]:
                logger.warning("the scheduler at %s has no workers yet: waiting for one", self._scheduler)
                self._client.wait_for_workers(1)
            self._compute(_make_ready, [()], lambda _: None)
            self._context = context.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def attribute(self, shards: Sequence[int], report: Report) -> None:
        """As `Worker.attribute`; `report` hears of the images of a shard together."""

        def report_all(advances: list[Advance]) -> None:
            for advance in advances:
                report(advance)

        self._compute(_build_shard, [(shard,) for shard in shards], report_all)

    def _compute(self, task: Callable[..., Any], calls: Sequence[tuple[Any, ...]], take: Callable[[Any], None]) -> None:
        """Call `task` with the order and each of `calls` on workers, and `take` with each result as it comes."""
        from distributed import KilledWorker, as_completed

        workers = self._client.scheduler_info()["workers"].values()
        resources = {_GPU: 1} if any(_GPU in worker["resources"] for worker in workers) else None
        submit = functools.partial(
            self._client.submit, task, self._order, resources=resources, retries=_RETRIES, pure=False
        )
        futures = [submit(*call) for call in calls]
        try:
            for _, result in as_completed(futures, with_results=True, loop=self._client.loop):
                take(result)
        except KilledWorker as error:
            raise IgstoreError(
                f"workers die, the last being {error.last_worker.address}: their logs say why"
            ) from error
        except CancelledError as error:
            raise IgstoreError(
                f"the scheduler at {self._scheduler} is gone; what was finished is kept: run the same command again to "
                "go on"
            ) from error
        finally:
            self._client.cancel(futures)

    def _dismiss(self) -> None:
        if self._client.status == "running":
            self._client.run(_forget, on_error="ignore")


# What workers do. One task at a time computes, even where a worker runs several: they would share its device.

_computing = threading.Lock()


def _make_ready(order: Order) -> None:
    with _computing:
        _worker(order)


def _build_shard(order: Order, shard: int) -> list[Advance]:
    advances: list[Advance] = []
    with _computing, at_work(Path(order.store)):
        _worker(order).attribute([shard], advances.append)
    return advances


@functools.lru_cache(maxsize=1)
def _worker(order: Order) -> Worker:
    """The worker of this process for that order: the network loaded, the images listed."""
    settings = {field.name: getattr(order.spec, field.name) for field in dataclasses.fields(BuildSpec)}
    build = plan_build(
        **vars(order.names),
        store=order.store,
        preprocessing=order.spec.preprocessing,
        limit=order.n_images,
        **{name: value for name, value in settings.items() if name not in _FOUND_BY_PLAN},
    )
    differences = build.spec.differences(order.spec)
    if differences:
        listing = "; ".join(f"{name} is {ours} here and {theirs} there" for name, ours, theirs in differences)
        raise SettingsMismatchError(
            f"the worker on {socket.gethostname()} does not find what the client has found: {listing}. All must see "
            "the same images and weights, at the same paths"
        )
    return Worker(build, device=find_device(order.device), batch_size=order.batch_size, workers=order.workers)


def _forget() -> None:
    """Free what the worker of this process holds."""
    _worker.cache_clear()
    torch.cuda.empty_cache()
