"""`igstore build`: images in, Integrated Gradients, a finished store out. The main job of the project.

torch is imported when the work begins, so that wrong options and ``--help`` do not wait for it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igstore import cli
from igstore.building.parts import Part
from igstore.errors import UserError
from igstore.images import Split, find_images
from igstore.info import StoreInfo, describe, next_command, store_info
from igstore.learned_rules import METHOD_CHOICES, with_rule
from igstore.schema import (
    Baseline,
    BuildSpec,
    Interpolation,
    Output,
    Precision,
    Preprocessing,
    Reduce,
    Target,
)
from igstore.storage.reader import StoreReader
from igstore.wording import option

if TYPE_CHECKING:
    import torch

    from igstore.models import Classifier


def build_store(
    model: str | Classifier | torch.nn.Module,
    images: Any,
    store: str | os.PathLike[str],
    *,
    weights: str | None = None,
    preprocessing: Preprocessing | None = None,
    split: Split = "val",
    labels: str | os.PathLike[str] | None = None,
    baseline: Baseline = "black",
    target: Target = "prediction",
    output: Output = "logit",
    method: str = "riemann_right",
    n_steps: int = 50,
    max_error: float | None = None,
    max_steps: int | None = None,
    precision: Precision = "float32",
    reduce: Reduce = "sum",
    pixels: bool = True,
    shard_size: int = 500,
    seed: int = 0,
    limit: int | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    part: str | None = None,
    scheduler: str | None = None,
    rank: bool = True,
    overwrite: bool = False,
    show_progress: bool = False,
) -> StoreInfo:
    """Attribute every image of a list with one model, into a store. The same call again goes on where it stopped.

    Parameters
    ----------
    model
        A name as `load_classifier` takes it, a `Classifier`, or any network in evaluation mode that maps normalised
        (image, 3, y, x) to logits (image, class). One output is taken for the logit of class 1 against class 0, and
        a network of one channel is shown the mean over the colours.
    images
        A path as `find_images` takes it, an `ImageList`, a torchvision-style data set without transform, or a sequence
        of (id, PIL image or uint8 array (y, x, 3), label or None).
    store
        Folder of the store, conventionally ``NAME.zarr``.
    weights
        As `load_classifier` takes it; only with a name.
    preprocessing
        Replaces the model's own. For a bare network the default is the size that all images have, and ``pixels / 255``.
    split, labels
        As `find_images` takes them; only with a path.
    baseline, target, output, method, n_steps, max_error, max_steps, precision, reduce, pixels, shard_size, seed
        The settings of `BuildSpec`, which decide what the maps are. The method may also be ``learned:FILE``: a rule of
        a file that `learn_rules` made, which holds rules for some numbers of steps.
    limit
        Only the first so many images by id. A larger limit later extends the store; a smaller one leaves it as it is.
    device
        ``auto`` (a CUDA device where there is one), ``cpu``, ``cuda`` or ``cuda:N``; a list of these such as
        ``cuda:0,cuda:2``, or ``all`` CUDA devices: then a process for each takes shards as it needs them.
    batch_size
        (image, step) pairs per gradient evaluation; None fits it to the free memory.
    workers
        Threads that decode images, of each process; None is one a core, at most 16 in all.
    part
        ``I/N``, I from 1 to N: build every N-th shard, beginning with the I-th, beside other jobs that build the other
        parts and see the same file system. Whichever finds all shards done finishes the store.
    scheduler
        Address of a dask.distributed scheduler, whose workers build the shards instead of this process. `model` must be
        a name and `images` a path, which workers find for themselves, and they must see the store at its path.
    rank
        Rank the 3x3 blocks at the end (`rank_store`).
    overwrite
        Remove a store that is there and begin anew.
    show_progress
        A progress bar on stderr.

    Returns
    -------
    StoreInfo
        What the store holds now; `failed` lists the images that could not be read or attributed.

    Raises
    ------
    UserError
        A setting is wrong, the store was made with other settings, or something else is in its place.
    ModelError
        The network is not a classifier of such images.

    >>> import numpy as np, torch
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5))
    >>> images = [("grey", np.full((8, 8, 3), 128, np.uint8), 3), ("unknown", np.full((8, 8, 3), 200, np.uint8), None)]
    >>> info = build_store(network, images, "own.zarr", n_steps=10)
    >>> info.n_built, info.n_labelled
    (2, 1)
    """
    from igstore.building.builder import run_build
    from igstore.building.hiring import choose_workers
    from igstore.building.plan import plan_build

    settings = {
        "baseline": baseline,
        "target": target,
        "output": output,
        "method": method,
        "n_steps": n_steps,
        "max_error": max_error,
        "max_steps": max_steps,
        "precision": precision,
        "reduce": reduce,
        "pixels": pixels,
        "shard_size": shard_size,
        "seed": seed,
    }
    build = plan_build(
        model,
        images,
        store,
        weights=weights,
        preprocessing=preprocessing,
        split=split,
        labels=labels,
        limit=limit,
        overwrite=overwrite,
        settings=with_rule(settings),
    )
    hire = choose_workers(
        build,
        scheduler=scheduler,
        device=device,
        batch_size=batch_size,
        workers=workers,
        model=model,
        weights=weights,
        images=images,
        split=split,
        labels=labels,
    )
    run_build(
        build,
        hire,
        part=_part(part, overwrite=overwrite),
        scheduler=scheduler,
        rank=rank,
        overwrite=overwrite,
        show_progress=show_progress,
    )
    return store_info(build.path)


def parser() -> cli.Parser:
    """The options of the command."""
    parser = cli.Parser(
        "build",
        "Attribute every image of a data set with Integrated Gradients, into a Zarr store. "
        "Run the same command again after any interruption: it goes on where it stopped.",
    )
    what = parser.add_argument_group("what to attribute")
    what.add_argument(
        "--model",
        metavar="NAME",
        required=True,
        help="torchvision name, timm:NAME, efficientnet_lite0|1|2, or package.module:function",
    )
    what.add_argument(
        "--weights",
        metavar="W",
        help="torchvision's name of them, a file, or random[:SEED] (default: IMAGENET1K_V1 where it exists)",
    )
    what.add_argument(
        "--data",
        dest="images",
        metavar="PATH",
        default=os.environ.get("IMAGENET_DIR"),
        help="ImageNet's root, a folder WNID/*.JPEG, or a flat folder (default: $IMAGENET_DIR)",
    )
    what.add_argument("--split", default="val", choices=cli.choices_of(Split), help="which part of ImageNet's root")
    what.add_argument(
        "--labels", metavar="CSV", help="CSV with columns file and wnid or class_index, for a flat folder"
    )
    what.add_argument(
        "--limit",
        type=cli.positive,
        metavar="N",
        help="only the first N images by id; a larger N later extends the store",
    )
    where = parser.add_argument_group("where to")
    where.add_argument("--store", metavar="STORE", help="folder of the store (default: MODEL.zarr)")
    where.add_argument("--shard-size", type=cli.positive, default=500, metavar="N", help="images a shard")
    where.add_argument(
        "--no-pixels",
        dest="pixels",
        action="store_false",
        help="leave the images' pixels out: smaller, and no redistribution of the data set",
    )
    where.add_argument("--no-rank", dest="rank", action="store_false", help="do not rank the blocks at the end")
    where.add_argument("--overwrite", action="store_true", help="remove the store that is there and begin anew")
    where.add_argument(
        "--dry-run", action="store_true", help="say what would be done, with an estimate of the time, and stop"
    )
    how = parser.add_argument_group("Integrated Gradients")
    how.add_argument("--n-steps", type=cli.positive, default=50, metavar="M", help="gradient evaluations an image")
    how.add_argument(
        "--method",
        default="riemann_right",
        choices=METHOD_CHOICES,
        help="quadrature rule; FILE is what `igstore calibrate` made",
    )
    how.add_argument(
        "--baseline", default="black", choices=cli.choices_of(Baseline), help="where the path begins, in pixel space"
    )
    how.add_argument("--target", default="prediction", choices=cli.choices_of(Target), help="class that is attributed")
    how.add_argument("--output", default="logit", choices=cli.choices_of(Output), help="what is attributed")
    how.add_argument(
        "--max-error", type=float, metavar="E", help="double the steps while the completeness error exceeds E"
    )
    how.add_argument("--max-steps", type=cli.positive, metavar="M", help="but not beyond M steps")
    how.add_argument("--reduce", default="sum", choices=cli.choices_of(Reduce), help="how channels become one map")
    how.add_argument(
        "--precision",
        default="float32",
        choices=cli.choices_of(Precision),
        help="arithmetic of the gradients: float32; mixed, for GPUs, several times as fast, whose masks at p=50 share "
        "0.995 of their blocks with float32's; tf32 and float16 share 0.95 and 0.91 to 0.97",
    )
    how.add_argument("--seed", type=int, default=0, help="of the noise baseline")
    pictures = parser.add_argument_group("preprocessing, where it is not the one that comes with the weights")
    pictures.add_argument("--resize", type=cli.positive, metavar="PX", help="length of the shorter side")
    pictures.add_argument("--crop", type=cli.positive, metavar="PX", help="side of the centre crop")
    pictures.add_argument("--interpolation", choices=cli.choices_of(Interpolation), help="of the resize")
    pictures.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="in [0, 1]")
    pictures.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="in [0, 1]")
    machine = parser.add_argument_group("the machine, or several; pipelines/CLUSTER.md says more")
    machine.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:N, a list such as cuda:0,cuda:2, or all GPUs: a process for each",
    )
    machine.add_argument(
        "--part",
        metavar="I/N",
        help="build every N-th shard from the I-th on, as one of N jobs that share a file system; the last finishes",
    )
    machine.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="a dask.distributed scheduler such as tcp://host:8786, whose workers build the shards",
    )
    machine.add_argument(
        "--batch-size",
        type=_batch_size,
        default="auto",
        metavar="auto|N",
        help="(image, step) pairs a gradient evaluation",
    )
    machine.add_argument(
        "--workers",
        type=cli.positive,
        metavar="N",
        help="threads that decode images, of each process (default: one a core, at most 16 in all)",
    )
    return parser


def _batch_size(text: str) -> int | None:
    return None if text == "auto" else cli.positive(text)


def main(argv: Sequence[str]) -> int:
    """``igstore build --model NAME [--data PATH] [--store PATH] ...``."""
    parsed, output = parser().parse(argv)
    options = vars(parsed)
    if options["images"] is None:
        raise UserError("no images: give --data PATH, or set IMAGENET_DIR; data/README.md says how to lay ImageNet out")
    from igstore.building.builder import run_build
    from igstore.building.devices import find_devices
    from igstore.building.forecast import forecast
    from igstore.building.hiring import choose_workers
    from igstore.building.plan import plan_build
    from igstore.models import load_classifier

    part = _part(options["part"], overwrite=options["overwrite"])
    if options["dry_run"] and options["scheduler"]:
        raise UserError("--dry-run measures this machine, and --scheduler leaves the work to others; leave one out")
    names = {field.name for field in dataclasses.fields(BuildSpec)} - {"model", "weights"}
    settings = with_rule({name: value for name, value in options.items() if name in names})
    preprocessing = {name: options[name] for name in ("resize", "crop", "interpolation", "mean", "std")}
    # what is at hand first: weights may have to be fetched from far
    listed = find_images(options["images"], split=options["split"], labels=options["labels"])
    if not options["scheduler"]:
        find_devices(options["device"])
    build = plan_build(
        load_classifier(options["model"], options["weights"], **preprocessing),
        listed,
        options["store"] or options["model"].replace(":", "-").replace("/", "-") + ".zarr",
        weights=None,
        preprocessing=None,
        split="val",
        labels=None,
        limit=options["limit"],
        overwrite=options["overwrite"],
        settings=settings,
    )
    if options["dry_run"]:
        expected = forecast(build, part=part, device=options["device"], batch_size=options["batch_size"])
        output.result(expected, expected.lines())
        return cli.DONE
    handed_on = ("device", "batch_size", "workers", "model", "weights", "images", "split", "labels")
    hire = choose_workers(build, scheduler=options["scheduler"], **{name: options[name] for name in handed_on})
    run = {name: options[name] for name in ("scheduler", "rank", "overwrite")}
    run_build(build, hire, part=part, **run, show_progress=output.show_progress)
    if build.spec.pixels:
        output.note(
            "note: the store holds the images' pixels, so whoever shares it redistributes them; "
            "--no-pixels leaves them out"
        )
    info = store_info(build.path)
    output.summary(info, [*describe(info), *_next(info, part)])
    return cli.SOME_IMAGES_FAILED if _failed(build.path, part) else cli.DONE


def _failed(path: Path, part: Part) -> bool:
    """Whether images of the part's own shards failed: what other parts meet must not depend on who is first."""
    reader = StoreReader(path)
    records = [reader.records.get(shard) for shard in part.shards(reader.n_shards)]
    return any(record["failed"] for record in records if record)


def _part(text: str | None, *, overwrite: bool) -> Part:
    if text is None:
        return Part()
    if overwrite:
        raise UserError(
            f"{option('overwrite')} and {option('part')} {text} do not go together: each part would remove what the "
            "others have built; remove "
            "the store first, then start the parts"
        )
    return Part.parse(text)


def _next(info: StoreInfo, part: Part) -> list[str]:
    if info.is_complete:
        return [next_command(info)]
    missing = len(info.missing_shards)
    return [f"{f'part {part}':<12} done; shards of other parts to come: {missing}; whoever builds the last finishes"]


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
