"""Carrying out a build: check it, make room for it, attribute what is missing, finish.

Decoding runs ahead in threads, attribution in the main thread, writing behind in a thread of its own, so that the
accelerator waits for neither. What is finished is kept: `igstore.staging` says how. What was finished and has been
damaged since is found by its checksums, and built again.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from igstore import cli, layout, provenance, staging
from igstore.attribution import check_precision
from igstore.attributor import Arrays, Attributor
from igstore.decoding import Decoder, Job
from igstore.devices import find_device
from igstore.errors import SettingsMismatchError, StoreExistsError, UserError
from igstore.images import ImageList, Split, as_image_list, find_images
from igstore.models import Classifier, classifier_from_module, load_classifier
from igstore.presence import at_work, writing
from igstore.progress import Progress
from igstore.rank import rank_store
from igstore.reader import StoreReader
from igstore.repair import repair_store
from igstore.schema import BUILT, FAILED, UNKNOWN_LABEL, BuildSpec, Preprocessing
from igstore.shards import ShardWriter
from igstore.store import check_there, create_store, extend_store, finish_store, write_shard

logger = logging.getLogger(__name__)

# Gradient evaluations in a unit, the work that a kill can cost: under a minute on two cores, about a second on a GPU.
_UNIT_EVALUATIONS = {"cpu": 200, "cuda": 5000}


@dataclass(frozen=True)
class Build:
    """A build that has been checked and not begun: the first `n_images` of `images` go into the store at `path`."""

    classifier: Classifier
    images: ImageList
    n_images: int
    spec: BuildSpec
    path: Path
    device: torch.device


def plan_build(
    model: str | Classifier | torch.nn.Module,
    images: Any,
    store: str | os.PathLike[str],
    *,
    weights: str | None,
    preprocessing: Preprocessing | None,
    split: Split,
    labels: str | os.PathLike[str] | None,
    limit: int | None,
    device: str,
    settings: dict[str, Any],
) -> Build:
    """Check what can be checked before work begins; parameters as `build_store`, `settings` as `BuildSpec`."""
    if isinstance(images, (str, os.PathLike)):
        listed = find_images(images, split=split, labels=labels)
    elif labels is not None:
        raise UserError("labels goes with images given as a path; otherwise each image brings its own")
    else:
        listed = as_image_list(images)
    if not len(listed):
        raise UserError("the list of images is empty")
    classifier = _classifier(model, weights, preprocessing, listed)
    spec = BuildSpec(
        model=classifier.name,
        weights=classifier.weights,
        weights_sha256=classifier.weights_sha256,
        preprocessing=classifier.preprocessing,
        images_fingerprint=listed.fingerprint,
        **settings,
    )
    chosen = listed.head(limit) if limit is not None else listed
    if spec.target == "label" and (chosen.labels == UNKNOWN_LABEL).any():
        first = chosen.ids[int(np.argmax(chosen.labels == UNKNOWN_LABEL))]
        raise UserError(f"image {first} has no label, which target=label needs; give labels, or use target=prediction")
    on = find_device(device)
    check_precision(spec.precision, on)
    return Build(classifier, listed, len(chosen), spec, Path(store), on)


def _classifier(
    model: str | Classifier | torch.nn.Module,
    weights: str | None,
    preprocessing: Preprocessing | None,
    images: ImageList,
) -> Classifier:
    if isinstance(model, str):
        model = load_classifier(model, weights)
    elif weights is not None:
        raise UserError("weights goes with a model given by name; a network brings its own")
    if isinstance(model, Classifier):
        return model if preprocessing is None else dataclasses.replace(model, preprocessing=preprocessing)
    if not isinstance(model, torch.nn.Module):
        raise UserError(f"model is a {type(model).__name__}; it must be a name, a Classifier or a torch.nn.Module")
    if preprocessing is None:
        width, height = images.read(0).size
        preprocessing = Preprocessing(resize=None, crop=(height, width), mean=(0, 0, 0), std=(1, 1, 1))
    return classifier_from_module(model, preprocessing=preprocessing)


def run_build(
    build: Build, *, batch_size: int | None, workers: int | None, rank: bool, overwrite: bool, show_progress: bool
) -> None:
    """Carry out a planned build; parameters as `build_store`."""
    if not overwrite and build.path.is_dir():
        repair_store(build.path, build.spec, build.images, _attributes(build), show_progress=show_progress)
    there = None if overwrite else _begun_store(build)
    if there is None or _has_work(build, there):
        # before anything is written, since a network may turn out not to be a classifier of such images
        attributor = Attributor(build.classifier, build.spec, device=build.device, batch_size=batch_size)
        attributor.check_labels(build.images.labels[: build.n_images], build.images.ids)
        _make_room(build, overwrite=overwrite)
        with (
            at_work(build.path) as presence,
            Decoder(build.images, build.spec.preprocessing, workers) as decoder,
        ):
            if presence.others:
                logger.warning(
                    "somebody else is at work at %s: %s; going on beside them, and a shard is written by whoever has "
                    "it first",
                    build.path,
                    ", ".join(presence.others),
                )
            _work(build, attributor, decoder, show_progress=show_progress)
            presence.sweep()
    elif staging.leftovers(build.path):
        with at_work(build.path) as presence:
            staging.discard_units(build.path, 0, there.n_images)
            presence.sweep()
    if rank and build.spec.reduce != "none":
        rank_store(build.path, show_progress=show_progress)


def _work(build: Build, attributor: Attributor, decoder: Decoder, *, show_progress: bool) -> None:
    """Attribute what is not built yet, or failed, and say so in the store when all is done."""
    started = time.monotonic()
    store = StoreReader(build.path)
    jobs = _jobs(build, store)
    for shard, record in store.records.items():
        if record["failed"]:
            _retry_failed(build, store, shard, attributor, decoder)
    _attribute_all(build, store, jobs, attributor, decoder, show_progress=show_progress)
    store = check_there(build.path, build.spec, store.n_images)
    if store.is_complete:
        staging.discard_units(build.path, 0, store.n_images)  # that somebody else kept of a shard that we finished
    if store.is_complete and not store.attributes["complete"]:
        seconds = time.monotonic() - started + store.attributes["wall_seconds"]
        finish_store(build.path, {"complete": True, "wall_seconds": round(seconds, 1), **provenance.versions()})


def _begun_store(build: Build) -> StoreReader | None:
    """The store that an earlier run of this build began; None where there is none yet."""
    if not (build.path / "zarr.json").exists():
        return None
    store = StoreReader(build.path)
    differences = store.spec.differences(build.spec)
    if differences:
        listing = "; ".join(f"{name} is {theirs} there and {ours} here" for name, theirs, ours in differences)
        raise SettingsMismatchError(
            f"{build.path} was made with other settings: {listing}. Give the same, another --store, or --overwrite"
        )
    return store


def _has_work(build: Build, store: StoreReader) -> bool:
    is_done = store.is_complete and store.attributes["complete"]
    return not is_done or bool(store.failed) or build.n_images > store.n_images


def _make_room(build: Build, *, overwrite: bool) -> None:
    """Create the store, or extend the one that was begun."""
    path, images = build.path, build.images.head(build.n_images)
    if overwrite and (path / "zarr.json").exists():
        StoreReader(path)  # raises where this is not a store, so that nothing else is ever removed
        with at_work(path) as presence:
            if presence.others:
                raise UserError(
                    f"{path} is not overwritten: somebody is at work there ({', '.join(presence.others)}); "
                    "wait for them, or end that first"
                )
            shutil.rmtree(path)
    if not (path / "zarr.json").exists():
        try:
            create_store(path, build.spec, image_ids=images.ids, labels=images.labels, attributes=_attributes(build))
        except StoreExistsError:
            if _begun_store(build) is None:
                raise
            # somebody else began the same build at the same time
    elif len(images) > StoreReader(path).n_images:
        extend_store(path, image_ids=images.ids, labels=images.labels)


def _attributes(build: Build) -> dict[str, Any]:
    """What a new store says of itself, besides its settings."""
    return {
        "complete": False,
        "wall_seconds": 0.0,
        "class_names": list(build.images.class_names or ()),
        "wnids": list(build.images.wnids or ()),
        "device": provenance.device_name(build.device),
        **provenance.versions(),
    }


def _jobs(build: Build, store: StoreReader) -> list[Job]:
    """The units of every shard that is not finished, in order."""
    step = max(1, _UNIT_EVALUATIONS[build.device.type] // build.spec.n_steps)
    return [
        Job(shard, start, min(start + step, last))
        for shard in store.missing_shards
        for first, last in [layout.shard_bounds(shard, store.n_images, store.shard_size)]
        for start in range(first, last, step)
    ]


def _attribute_all(
    build: Build, store: StoreReader, jobs: list[Job], attributor: Attributor, decoder: Decoder, *, show_progress: bool
) -> None:
    before = sum(last - first for first, last in (record["images"] for record in store.records.values()))
    evaluations, errors = 0, np.zeros(0, np.float32)
    started = time.monotonic()
    with (
        ShardWriter(build.path, build.spec, store.image_ids, provenance.runtime(build.device)) as writer,
        Progress(store.n_images, done=before, label=build.spec.model, show=show_progress) as progress,
    ):

        def missing() -> Iterator[Job]:
            """The units that are neither staged nor, by somebody else since this build began, in a finished shard."""
            for job in jobs:
                staged = staging.load_unit(build.path, build.spec, job.first, len(job))
                # a unit in which an image failed is done again whole, in the same batches
                if staged is not None and not (staged["status"] == FAILED).any():
                    writer.add(job, staged, is_staged=True)
                elif store.record(job.shard) is None:
                    yield job
                    continue
                progress.skip(len(job))

        for job, pixels, reasons in decoder.decode(missing()):
            arrays = attributor(pixels, *_listed(build, job), reasons)
            writer.add(job, arrays, is_staged=False)
            evaluations += int(arrays["n_steps"].sum())
            errors = np.append(errors, arrays["completeness_error"][arrays["status"] == BUILT])
            rate = evaluations / (time.monotonic() - started)
            median = f"{np.median(errors):.3f}" if len(errors) else "-"
            progress.advance(len(job), f"{rate:.1f} gradients/s, median completeness error {median}")


def _listed(build: Build, job: Job) -> tuple[NDArray[np.int16], Sequence[str]]:
    return build.images.labels[job.first : job.last], build.images.ids[job.first : job.last]


def _retry_failed(build: Build, store: StoreReader, shard: int, attributor: Attributor, decoder: Decoder) -> None:
    """Try the failed images of a finished shard again, and write it anew if that changed anything."""
    record = store.records[shard]
    first, last = record["images"]
    jobs = [Job(shard, first + place, first + place + 1) for place in _failed_places(store, first, last)]
    changed: dict[int, Arrays] = {}
    for job, pixels, reasons in decoder.decode(jobs):
        arrays = attributor(pixels, *_listed(build, job), reasons)
        if str(arrays["reason"][0]) != record["failed"].get(build.images.ids[job.first]):
            changed[job.first - first] = arrays
    if not changed:
        return
    names = [name for name in layout.variables(build.spec) if name not in layout.LISTED]
    whole = {name: store.array(name).read(range(first, last)) for name in names}
    failed = dict(record["failed"])
    for place, arrays in changed.items():
        for name in names:
            whole[name][place] = arrays[name][0]
        failed.pop(build.images.ids[first + place], None)
        if reason := str(arrays["reason"][0]):
            failed[build.images.ids[first + place]] = reason
    in_top5 = record["in_top5"] + sum(int(arrays["in_top5"][0]) for arrays in changed.values())
    kept = {name: value for name, value in record.items() if name not in ("shard", "images", "files")}
    kept |= {"failed": failed, "in_top5": in_top5, "evaluations": int(whole["n_steps"].sum())}
    with writing(build.path):
        write_shard(build.path, build.spec, store.n_images, shard, whole, kept)


def _failed_places(store: StoreReader, first: int, last: int) -> list[int]:
    return np.flatnonzero(store.status[first:last] == FAILED).tolist()


def forecast(build: Build, batch_size: int | None) -> list[str]:
    """What a build would do: images, shards, bytes, and time from a short measurement."""
    store = _begun_store(build)
    done = store.n_images - len(store.not_built) if store else 0
    left = max(0, build.n_images - done)
    attributor = Attributor(build.classifier, build.spec, device=build.device, batch_size=batch_size)
    rate = attributor.measure_speed()
    evaluations = left * build.spec.n_steps
    n_bytes = build.n_images * layout.image_bytes(build.spec)
    shards = layout.shard_count(build.n_images, build.spec.shard_size)
    return [
        f"would build  {build.path}: {left} of {build.n_images} images, {shards} shards of {build.spec.shard_size}",
        f"size         {cli.size(n_bytes)} on disk",
        f"time         about {cli.duration(evaluations / rate)}: {evaluations} gradient evaluations at {rate:.1f} a "
        f"second on {provenance.device_name(build.device)}, {attributor.batch_size} at a time",
    ]
