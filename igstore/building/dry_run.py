"""What a build would do, and how long it would take."""

from __future__ import annotations

from dataclasses import dataclass

from igstore import cli, machine
from igstore.attribution import Attributor
from igstore.building.builder import begun_store
from igstore.building.parts import Part
from igstore.building.plan import Build
from igstore.machine import find_devices
from igstore.storage import layout


@dataclass(frozen=True)
class Forecast:
    """What a build would do.

    Attributes
    ----------
    store
        Folder of the store.
    n_images, n_left, n_shards, shard_size
        Images in all, those that are not built yet, shards in all, and images a shard; of the part, where it is one.
    n_bytes
        Size on disk of the whole store, without rankings.
    evaluations, rate, seconds
        Gradient evaluations to come, how many a second were measured, and so the time to come.
    device, batch_size
        What they were measured on, and how many at a time; with several devices, the first was measured.
    """

    store: str
    n_images: int
    n_left: int
    n_shards: int
    shard_size: int
    n_bytes: int
    evaluations: int
    rate: float
    seconds: float
    device: str
    batch_size: int

    def lines(self) -> list[str]:
        """The forecast for people."""
        return [
            f"would build  {self.store}: {self.n_left} of {self.n_images} images, "
            f"{self.n_shards} shards of {self.shard_size}",
            f"size         {cli.size(self.n_bytes)} on disk",
            f"time         about {cli.duration(self.seconds)}: {self.evaluations} gradient evaluations at "
            f"{self.rate:.1f} a second on {self.device}, {self.batch_size} at a time",
        ]


def forecast(build: Build, *, part: Part, device: str, batch_size: int | None) -> Forecast:
    """What a build would do: images, shards, bytes, and time from a short measurement; parameters as `build_store`."""
    store = begun_store(build)
    records = store.records if store else {}
    n_shards = layout.shard_count(build.n_images, build.spec.shard_size)
    bounds = {
        shard: layout.shard_bounds(shard, build.n_images, build.spec.shard_size) for shard in part.shards(n_shards)
    }
    sizes = {shard: last - first for shard, (first, last) in bounds.items()}
    # a short last shard is built again where the store grows
    left = sum(
        size for shard, size in sizes.items() if shard not in records or records[shard]["images"][1] < bounds[shard][1]
    )
    devices = find_devices(device)
    attributor = Attributor(build.classifier, build.spec, device=devices[0], batch_size=batch_size)
    rate = attributor.measure_speed() * len(devices)
    evaluations = left * build.spec.n_steps
    return Forecast(
        store=str(build.path),
        n_images=sum(sizes.values()),
        n_left=left,
        n_shards=len(sizes),
        shard_size=build.spec.shard_size,
        n_bytes=sum(sizes.values()) * layout.image_bytes(build.spec),
        evaluations=evaluations,
        rate=rate,
        seconds=evaluations / rate,
        device=machine.device_name(devices[0]) if len(devices) == 1 else f"{len(devices)} devices",
        batch_size=attributor.batch_size,
    )
