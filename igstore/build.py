"""`igstore build`: images in, Integrated Gradients, a finished store out. The main job of the project.

torch is imported when the work begins, so that wrong options and ``--help`` do not wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from igstore import cli
from igstore.attribution import METHOD_CHOICES
from igstore.building import Part
from igstore.cli import add_options, add_preprocessing, pop_preprocessing
from igstore.errors import UserError, option
from igstore.info import StoreInfo, describe, next_command, store_info
from igstore.schema import (
    DEFAULT_METHOD,
    DEFAULT_PRECISION,
    Baseline,
    BuildSpec,
    Output,
    Precision,
    Preprocessing,
    Reduce,
    Split,
    Target,
)
from igstore.storage import StoreReader

if TYPE_CHECKING:
    import torch

    from igstore.building import Forecast
    from igstore.models import Classifier

_OF_THE_MACHINE = ("device", "batch_size", "scheduler", "workers", "part", "rank")  # options that plan nothing


def build_store(
    model: str | Classifier | torch.nn.Module,
    images: Any,
    store: str | os.PathLike[str],
    *,
    weights: str | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    split: Split = "val",
    labels: str | os.PathLike[str] | None = None,
    baseline: Baseline = BuildSpec.baseline,
    target: Target = BuildSpec.target,
    output: Output = BuildSpec.output,
    method: str = DEFAULT_METHOD,
    n_steps: int = BuildSpec.n_steps,
    precision: Precision = DEFAULT_PRECISION,
    reduce: Reduce = BuildSpec.reduce,
    pixels: bool = BuildSpec.pixels,
    shard_size: int = BuildSpec.shard_size,
    seed: int = BuildSpec.seed,
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
    """Attribute every image of a list with one model, into a store. After an interruption the same call resumes.

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
        Replaces the model's own; of a model given by name, a dict such as ``{"resize": 232}`` replaces single fields.
        For a bare network the default is the size that all images have, and ``pixels / 255``.
    split, labels
        As `find_images` takes them; only with a path.
    baseline
        The image where the path begins: ``"black"``, the model's ``"mean"`` colour, ``"white"``, a ``"blur"`` of the
        image, or ``"noise"``.
    target, output
        The class that is attributed, ``"prediction"`` or ``"label"``; and its ``"logit"`` or ``"probability"``.
    method, n_steps
        The quadrature rule (see `igstore.attribution.quadrature`), and its gradient evaluations an image, 1 to 32767.
        ``learned:FILE`` is a rule of a file that `learn_rules` made, which holds rules for some numbers of steps.
    precision
        Arithmetic of the gradients, as `integrated_gradients` has it.
    reduce
        How channels become one map: their ``"sum"``, the sum of the ``"positive"`` or of the ``"absolute"`` values, or
        ``"none"``.
    pixels
        Keep the images' pixels in the store. A store with pixels redistributes the data set.
    shard_size
        Images in a file of each array.
    seed
        Of the noise baseline.
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
    from igstore.building import choose_workers, plan_build, run_build
    from igstore.machine import find_devices

    own_part = _part(part, overwrite=overwrite)
    if scheduler is None:
        find_devices(device)  # raises before weights are fetched from far
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
        baseline=baseline,
        target=target,
        output=output,
        method=method,
        n_steps=n_steps,
        precision=precision,
        reduce=reduce,
        pixels=pixels,
        shard_size=shard_size,
        seed=seed,
    )
    run_build(
        build,
        choose_workers(build, scheduler=scheduler, device=device, batch_size=batch_size, workers=workers),
        part=own_part,
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
    add_options(what, "split", "labels")
    add_options(what, "limit", help="only the first N images by id; a larger N later extends the store")
    where = parser.add_argument_group("where to")
    where.add_argument("--store", metavar="STORE", help="folder of the store (default: MODEL.zarr)")
    add_options(where, "shard_size", "no_pixels", "no_rank", "overwrite")
    where.add_argument(
        "--dry-run", action="store_true", help="say what would be done, with an estimate of the time, and stop"
    )
    how = parser.add_argument_group("Integrated Gradients")
    how.add_argument("--n-steps", type=cli.positive, metavar="M", help="gradient evaluations an image")
    how.add_argument("--method", choices=METHOD_CHOICES, help="quadrature rule; FILE is what `igstore calibrate` made")
    add_options(how, "baseline", "target", "output", "reduce")
    how.add_argument(
        "--precision",
        choices=cli.choices_of(Precision),
        help="arithmetic of the gradients: float32; mixed, for GPUs, several times as fast, whose masks at p=50 share "
        "0.995 of their blocks with float32's; tf32 and float16 share 0.95 and 0.91 to 0.97",
    )
    add_options(how, "seed", help="of the noise baseline")
    add_preprocessing(parser)
    machine = parser.add_argument_group("the machine, or several; pipelines/CLUSTER.md says more")
    add_options(
        machine,
        "device",
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
    add_options(
        machine,
        "workers",
        help="threads that decode images, of each process (default: one a core, at most 16 in all)",
    )
    return parser.of(build_store)


def _batch_size(text: str) -> int | None:
    return None if text == "auto" else cli.positive(text)


def main(argv: Sequence[str]) -> int:
    """``igstore build --model NAME [--data PATH] [--store PATH] ...``."""
    parsed, output = parser().parse(argv)
    options = vars(parsed)
    if options["images"] is None:
        raise UserError("no images: give --data PATH, or set IMAGENET_DIR; data/README.md says how to lay ImageNet out")
    part = _part(options["part"], overwrite=options["overwrite"])
    options["preprocessing"] = pop_preprocessing(options)
    options["store"] = options["store"] or options["model"].replace(":", "-").replace("/", "-") + ".zarr"
    if options.pop("dry_run"):
        expected = _forecast(options, part)
        output.result(expected, expected.lines())
        return cli.DONE
    info = build_store(**options, show_progress=output.show_progress)
    if options["pixels"]:
        output.note(
            "note: the store holds the images' pixels, so whoever shares it redistributes them; "
            "--no-pixels leaves them out"
        )
    output.summary(info, [*describe(info), *_next(info, part)])
    return cli.SOME_IMAGES_FAILED if _failed(info.path, part) else cli.DONE


def _forecast(options: dict[str, Any], part: Part) -> Forecast:
    """What `build_store` would do with these options."""
    from igstore.building import forecast, plan_build
    from igstore.machine import find_devices

    device, batch_size, scheduler, *_ = (options.pop(name) for name in _OF_THE_MACHINE)
    if scheduler is not None:
        raise UserError("--dry-run measures this machine, and --scheduler leaves the work to others; leave one out")
    find_devices(device)
    return forecast(plan_build(**options), part=part, device=device, batch_size=batch_size)


def _failed(path: str, part: Part) -> bool:
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
            "others have built; remove the store first, then start the parts"
        )
    return Part.parse(text)


def _next(info: StoreInfo, part: Part) -> list[str]:
    if info.is_complete:
        return [next_command(info)]
    missing = len(info.missing_shards)
    return [f"{f'part {part}':<12} done; shards of other parts to come: {missing}; whoever builds the last finishes"]


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
