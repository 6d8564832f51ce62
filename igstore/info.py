"""`igstore info`: what a store holds, what made it, and what is missing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from igstore import cli
from igstore.files import Folder, LocalFiles
from igstore.schema import BUILT, IMPORTED, LEARNED, UNKNOWN_LABEL, names_code
from igstore.storage import StoreReader, ZarrForm, kept_images

_FEW = 10  # names listed before "and so on"


@dataclass(frozen=True)
class StoreInfo:
    """A store's contents in figures. Printed, or shown by a notebook, it is what `igstore info` prints.

    Attributes
    ----------
    path, settings, versions
        Where it is, the attributes of its `BuildSpec`, and the version of each library that made it.
    n_images, n_built, n_failed, n_missing
        Listed images, and how many of them are built, failed, or in no finished shard; n_images is their sum.
    n_kept
        Images that are done in shards that are not: a build is at work on them, or will resume with them.
    n_shards
        How many files of `shard_size` images each array is divided into.
    failed
        The reason why each failed image failed, by id.
    missing_shards
        Numbers of the shards that are not finished.
    n_labelled, top1, top5
        Built images with a label, and the share of them, in percent, whose label is the model's first, or among its
        first five, on the unmasked image; None where there is none. The second is also None where a merge has mixed
        shards, whose records count such images.
    completeness_median, completeness_p90, within_5_percent
        Of the built images' completeness errors: median, 90th percentile, and percent of images at 0.05 or below.
    n_zero_maps
        Built images whose map is 0 everywhere, so that there is nothing to rank; None where older stores do not say it.
    n_same_output
        Built images whose target has the same output as on the baseline, so that the map should sum to 0.
    n_steps_mean, evaluations
        Gradient evaluations an image, on average, and in all.
    n_bytes
        Size on disk of everything that finished shards hold, rankings included.
    wall_seconds, devices
        Time spent attributing, and what on.
    rankings
        Finished shards of each ranking, by name.
    omitted
        Variables that an export left out.
    """

    path: str
    settings: dict[str, Any]
    versions: dict[str, str]
    n_images: int
    n_built: int
    n_failed: int
    n_missing: int
    n_kept: int
    n_shards: int
    failed: dict[str, str]
    missing_shards: list[int]
    n_labelled: int
    top1: float | None
    top5: float | None
    completeness_median: float | None
    completeness_p90: float | None
    within_5_percent: float | None
    n_zero_maps: int | None
    n_same_output: int
    n_steps_mean: float | None
    evaluations: int
    n_bytes: int
    wall_seconds: float
    devices: list[str]
    rankings: dict[str, int]
    omitted: tuple[str, ...]

    def __repr__(self) -> str:
        return "\n".join(map(cli.printable, describe(self)))

    @property
    def is_complete(self) -> bool:
        """Whether every listed image is built or failed."""
        return self.n_missing == 0


def store_info(path: str | os.PathLike[str]) -> StoreInfo:
    """Read a store's figures; needs neither torch nor the maps.

    Parameters
    ----------
    path
        Folder or URL of the store.

    Raises
    ------
    StoreNotFoundError
        There is no store at `path`.
    SettingsMismatchError
        It is not a store of this format version.

    >>> info = store_info("toy.zarr")
    >>> info.n_built, info.is_complete, sorted(info.rankings)
    (4, True, ['positive-3'])
    """
    store = StoreReader.of(path)
    records = [store.records[shard] for shard in sorted(store.records)]
    rankings = {name: store.ranking(name).records for name in store.rankings}
    built = store.status == BUILT
    labelled = built & (store.scalars("label") != UNKNOWN_LABEL)
    n_labelled = int(labelled.sum())
    correct = store.scalars("prediction")[labelled] == store.scalars("label")[labelled]
    errors = store.scalars("completeness_error")[built]
    failed = store.failed
    in_top5 = [record["in_top5"] for record in records if "in_top5" in record]
    ranked = [record for of_ranking in rankings.values() for record in of_ranking.values()]
    return StoreInfo(
        path=store.where,
        settings=store.spec.to_attributes(),
        versions=store.attributes.get("versions", {}),
        n_images=store.n_images,
        n_built=int(built.sum()),
        n_failed=len(failed),
        n_missing=len(store.not_built),
        n_kept=_kept(store),
        n_shards=store.n_shards,
        failed=failed,
        missing_shards=store.missing_shards,
        n_labelled=n_labelled,
        top1=_percent(correct),
        top5=100 * sum(in_top5) / n_labelled if n_labelled and len(in_top5) == len(records) else None,
        completeness_median=float(np.median(errors)) if len(errors) else None,
        completeness_p90=float(np.quantile(errors, 0.9, method="higher")) if len(errors) else None,
        within_5_percent=_percent(errors <= 0.05),
        n_zero_maps=store.zero_maps,
        n_same_output=int((store.scalars("output") == store.scalars("baseline_output"))[built].sum()),
        n_steps_mean=float(store.scalars("n_steps")[built].mean()) if built.any() else None,
        evaluations=sum(record.get("evaluations", 0) for record in records),
        n_bytes=sum(file["bytes"] for record in [*records, *ranked] for file in record["files"].values()),
        wall_seconds=sum(record.get("seconds", 0) for record in records),
        devices=sorted({record["device"] for record in records if "device" in record}),
        rankings={name: len(of_ranking) for name, of_ranking in rankings.items()},
        omitted=store.omitted,
    )


def _kept(store: StoreReader) -> int:
    is_local = isinstance(store.form, ZarrForm) and isinstance(store.form.source, LocalFiles)
    if not is_local or not store.missing_shards:
        return 0
    with Folder(store.root) as folder:
        return kept_images(folder, store.spec)


def _percent(flags: NDArray[np.bool_]) -> float | None:
    return 100 * float(flags.mean()) if len(flags) else None


def describe(info: StoreInfo) -> list[str]:
    """A store's figures as lines for people."""
    settings = info.settings
    height, width = settings["crop"]
    steps = f"{settings['n_steps']} steps"
    if settings["max_error"] is not None:  # of a store that an earlier version built
        steps += f", doubled up to {settings['max_steps']} while the completeness error exceeds {settings['max_error']}"
    made = f"{settings['method']}, {steps}"
    if settings["method"] == LEARNED:
        rule = settings["learned_rule"]
        made = f"{made}, fitted to {rule['n_images']} images and {rule['model']} (IoU {rule['iou']:.3f})"
    if settings["method"] == IMPORTED:
        made = f"imported, made by {settings['maps_by']} (sha256 {settings['maps_sha256'][:12]})"
    lines = [
        f"store        {info.path}",
        f"model        {settings['model']}, weights {settings['weights']} (sha256 {settings['weights_sha256'][:12]})",
        f"input        resize {settings['resize']}, crop {height}x{width}, {settings['interpolation']}",
        f"attribution  {made}, baseline {settings['baseline']}, target {settings['target']}, "
        f"output {settings['output']}, reduce {settings['reduce']}, {settings['precision']}",
        f"images       {info.n_images}: {info.n_built} built, {info.n_failed} failed, {info.n_missing} missing; "
        f"{info.n_shards} shard{'s' * (info.n_shards != 1)}",
    ]
    if info.n_kept:
        lines.append(
            f"kept         {info.n_kept} of the missing images are done, in shards that are not: run the same command "
            "again to go on with them"
        )
    if info.top1 is not None:
        top5 = "not known" if info.top5 is None else f"{info.top5:.2f}%"
        lines.append(f"unmasked     top-1 {info.top1:.2f}%, top-5 {top5} of {info.n_labelled} labelled images")
    if info.completeness_median is not None and settings["method"] == IMPORTED:
        lines.append(
            f"completeness not scored: it is for {settings['maps_by']} to say whether a map should sum to f(x) - f(b) "
            f"(sums miss it by {info.completeness_median:.3f} of it, the median)"
        )
    elif info.completeness_median is not None:
        lines.append(
            f"completeness median error {info.completeness_median:.3f}, 90% below {info.completeness_p90:.3f}; "
            f"{info.within_5_percent:.1f}% of images within 5%"
        )
    if info.completeness_median is not None:
        lines += _degenerate(info)
        lines.append(
            f"work         {info.evaluations} gradient evaluations, {info.n_steps_mean:.1f} an image, "
            f"{cli.duration(info.wall_seconds)} on {', '.join(info.devices)}"
        )
        pixels = "with pixels" if settings["pixels"] and "pixels" not in info.omitted else "without pixels"
        each = cli.size(info.n_bytes / (info.n_built + info.n_failed))
        lines.append(f"size         {cli.size(info.n_bytes)}, {each} an image {pixels}")
    if info.omitted:
        lines.append(f"left out     {', '.join(info.omitted)}")
    ranked = [
        name if shards == info.n_shards else f"{name} ({shards} of {info.n_shards} shards)"
        for name, shards in info.rankings.items()
    ]
    lines.append(f"rankings     {', '.join(ranked) or 'none'}")
    lines += _listed("missing     ", [f"shard {shard}" for shard in info.missing_shards])
    lines += _listed("failed      ", [f"{image}: {reason}" for image, reason in info.failed.items()])
    return lines


def next_command(info: StoreInfo) -> str:
    """What to type once a store is complete, as a line for people."""
    model = info.settings["model"]
    named = f" --models {model}" if names_code(model) else ""
    return f"next         igstore evaluate {info.path}{named}"


def _degenerate(info: StoreInfo) -> list[str]:
    """What makes figures look better than the maps are."""
    lines = []
    if info.n_zero_maps:
        lines.append(
            f"zero maps    {info.n_zero_maps} of {info.n_built} images have an attribution of 0 everywhere: nothing to "
            "rank or mask, and the gradient says nothing"
        )
    if info.n_same_output:
        lines.append(
            f"same output  {info.n_same_output} of {info.n_built} images have the output of their baseline, so that a "
            "completeness error of 0 says nothing"
        )
    return lines


def _listed(title: str, items: Sequence[str]) -> list[str]:
    more = [f"{' ' * len(title)} and {len(items) - _FEW} more"] if len(items) > _FEW else []
    heads = [title, *[" " * len(title)] * _FEW]
    return [f"{head} {item}" for head, item in zip(heads, items[:_FEW], strict=False)] + more


def parser() -> cli.Parser:
    """The options of the command."""
    parser = cli.Parser("info", "Say what a store holds, what made it, and what is missing.")
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    return parser


def main(argv: Sequence[str]) -> int:
    """``igstore info STORE``."""
    options, output = parser().parse(argv)
    info = store_info(options.store)
    output.result(info, describe(info))
    return cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
