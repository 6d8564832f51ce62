"""Who attributes, as the options say: this process, one for each of several devices, or the workers of a cluster."""

from __future__ import annotations

from functools import partial

from igstore.attribution import check_precision
from igstore.building.builder import Hire
from igstore.building.cluster import Cluster, Order
from igstore.building.plan import Build
from igstore.building.processes import Processes
from igstore.building.worker import Worker
from igstore.machine import find_devices
from igstore.schema import whole_number

_MOST_AT_ONCE = 2**31 - 1


def check_sizes(batch_size: int | None, workers: int | None) -> None:
    """Raise `UserError` unless each is None, or a number of things that there can be at once."""
    for name, value in (("batch_size", batch_size), ("workers", workers)):
        if value is not None:
            whole_number(name, value, 1, _MOST_AT_ONCE)


def choose_workers(
    build: Build,
    *,
    scheduler: str | None,
    device: str,
    batch_size: int | None,
    workers: int | None,
) -> Hire:
    """What gives those who attribute `build` when there is something to do.

    Parameters
    ----------
    build
        What to build.
    scheduler, device, batch_size, workers
        As `build_store`.

    Raises
    ------
    UserError
        There are no such devices, they do not have the precision that is asked for, or a cluster would not find the
        model or the images.
    """
    check_sizes(batch_size, workers)
    if scheduler is not None:
        order = Order.of(build, device=device, batch_size=batch_size, workers=workers)
        return lambda _: Cluster(order, scheduler=scheduler)
    devices = find_devices(device)
    for one in devices:
        check_precision(build.spec.precision, one)
    if len(devices) == 1:
        return partial(Worker, device=devices[0], batch_size=batch_size, workers=workers)
    return partial(Processes, devices=devices, batch_size=batch_size, workers=workers)
