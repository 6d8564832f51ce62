"""`igstore import`: maps that were made elsewhere become a store, with the ranks and masks that every store has.

torch is imported when the work begins, so that wrong options and ``--help`` do not wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from igstore import cli
from igstore.building import GivenMaps, Part, read_ids
from igstore.cli import add_options, add_preprocessing, pop_preprocessing
from igstore.errors import UserError, option
from igstore.images import ImageList, find_images
from igstore.info import StoreInfo, describe, next_command, store_info
from igstore.schema import IMAGE, IMPORTED, Baseline, BuildSpec, Output, Preprocessing, Reduce, Split, Target

if TYPE_CHECKING:
    import torch

    from igstore.models import Classifier


def import_maps(
    maps: str | os.PathLike[str] | NDArray[Any] | torch.Tensor,
    model: str | Classifier | torch.nn.Module,
    images: Any,
    store: str | os.PathLike[str],
    *,
    made_by: str,
    ids: Sequence[str] | None = None,
    weights: str | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    split: Split = "val",
    labels: str | os.PathLike[str] | None = None,
    baseline: Baseline = BuildSpec.baseline,
    target: Target = BuildSpec.target,
    output: Output = BuildSpec.output,
    reduce: Reduce = BuildSpec.reduce,
    pixels: bool = BuildSpec.pixels,
    shard_size: int = BuildSpec.shard_size,
    seed: int = BuildSpec.seed,
    limit: int | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    rank: bool = True,
    overwrite: bool = False,
    show_progress: bool = False,
) -> StoreInfo:
    """Make a store of attribution maps from elsewhere. The same call again goes on where it stopped.

    A store says what its model makes of its images, so the model is shown each image twice, and its baseline once.
    Everything else follows from the maps. `baseline` and `output` are what the completeness error is measured with;
    maps of methods that are not complete have a large one, and that is all it means.

    Parameters
    ----------
    maps
        A ``.npy`` file, which is never whole in memory, or an array or tensor: float16, float32 or float64, (image, y,
        x) or (image, channel, y, x), one map for each image, of the size of the model's input.
    model
        The model that the maps explain, as `build_store`.
    images, store
        As `build_store`. Map i is of ``images[i]``. Of a path, where nothing says which image is the i-th, the maps are
        in the order of the image ids; where that is not the order of the files' paths too, `ids` must be given.
    made_by
        What made the maps, in words for whoever opens the store: ``"captum 0.8 Saliency"``.
    ids
        The ids of the images in the order of the maps, where that is not the order of `images`. An xarray DataArray
        of maps says them itself, if it has the coordinate ``image``, as `open_store`'s have.
    target
        Which class the maps explain: the model's own prediction, or the label.
    reduce
        How channels become one map, as in `build_store`; maps without channels count as having one.
    limit
        The maps are of the first so many images by id only.
    weights, preprocessing, split, labels, baseline, output, pixels, shard_size, seed
        As `build_store`.
    device, workers, rank, overwrite, show_progress
        As `build_store`, on one device.
    batch_size
        Images that the model is shown at once; None fits it to the free memory.

    Returns
    -------
    StoreInfo
        What the store holds now; `failed` lists the images that could not be read, or whose map is not finite.

    Raises
    ------
    UserError
        The maps do not fit the images or the model, a setting is wrong, the store was made with other settings or
        maps, or something else is in its place.
    ModelError
        The network is not a classifier of such images.

    >>> import numpy as np, torch
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5))
    >>> images = [("grey", np.full((8, 8, 3), 128, np.uint8), 3), ("pale", np.full((8, 8, 3), 200, np.uint8), None)]
    >>> info = import_maps(np.ones((2, 8, 8), np.float32), network, images, "theirs.zarr", made_by="a captain's guess")
    >>> info.n_built, info.settings["method"]
    (2, 'imported')
    """
    from igstore.building import Importer, Worker, check_sizes, chosen_classifier, listed_images, plan_build, run_build
    from igstore.machine import find_device

    if not isinstance(made_by, str) or not made_by.strip():
        raise UserError(
            f"{option('made_by')} is {made_by!r:.80}; say what made the maps, such as 'captum 0.8 Saliency'"
        )
    check_sizes(batch_size, workers)
    listed = listed_images(images, split=split, labels=labels)
    if ids is None and IMAGE in getattr(maps, "coords", ()):
        ids = maps.coords[IMAGE].values  # type: ignore[union-attr]
    chosen = listed if limit is None else listed.head(limit)
    order = order_of_maps(images, listed, ids=ids, limit=len(chosen))
    given = GivenMaps(maps, chosen.ids, order)
    classifier, chosen = chosen_classifier(model, weights, preprocessing, chosen)
    _check_fits(given, classifier, reduce)
    on = find_device(device)
    build = plan_build(
        classifier,
        chosen,
        store,
        overwrite=overwrite,
        baseline=baseline,
        target=target,
        output=output,
        method=IMPORTED,
        n_steps=0,
        reduce=reduce,
        pixels=pixels,
        shard_size=shard_size,
        seed=seed,
        maps_by=made_by,
        maps_sha256=given.sha256(),
    )
    importer = partial(Importer, maps=given)
    hire = partial(Worker, device=on, batch_size=batch_size, workers=workers, attributor=importer)
    run_build(build, hire, part=Part(), scheduler=None, rank=rank, overwrite=overwrite, show_progress=show_progress)
    return store_info(build.path)


def order_of_maps(images: Any, listed: ImageList, *, ids: Sequence[str] | None, limit: int | None) -> list[str]:
    """The ids of the images in the order in which a user has made maps of them.

    Parameters
    ----------
    images, ids, limit
        As `import_maps`.
    listed
        All images that `images` stands for.

    Raises
    ------
    UserError
        `ids` are no list of ids, or nothing says what the order is.
    """
    if ids is not None:
        order = np.asarray(ids, dtype=object).tolist()  # of a list, or a column of a table
        if not isinstance(order, list) or not all(isinstance(one, str) for one in order):
            raise UserError(
                f"{option('ids')} is {ids!r:.80}; it must be a list of the images' ids, such as {listed.ids[0]!r}"
            )
        return order
    by_id = listed.ids[:limit]
    if isinstance(images, ImageList):
        return list(by_id)
    if listed.paths is not None:
        _check_one_order(listed.paths)
        return list(by_id)
    as_given = listed.given_ids[:limit]
    if set(as_given) != set(by_id):
        raise UserError(
            f"{option('limit')} is {limit}, which means the first images by id, and those are not the first ones of "
            f"{option('images')}; give those alone that the maps are of, without a limit"
        )
    return list(as_given)


def _check_one_order(paths: Sequence[str]) -> None:
    """Raise `UserError` unless files, in the order of their ids, are in the order of their paths, however it is made.

    Whole paths sort in another way than folder by folder, as data sets of folders list them.
    """
    by_folder = sorted(paths, key=lambda path: path.split("/"))
    for one, *others in zip(paths, sorted(paths), by_folder, strict=True):
        other = next((other for other in others if other != one), None)
        if other is not None:
            raise UserError(
                f"which image is a map of? By id {one} comes before {other}, and by path after it: give "
                f"{option('ids')}, the images' ids in the order of the maps"
            )


def _check_fits(maps: GivenMaps, classifier: Classifier, reduce: Reduce) -> None:
    if maps.size != classifier.preprocessing.crop:
        raise UserError(
            f"the maps are {maps.size[0]}x{maps.size[1]} pixels; the input of {classifier.name} is "
            f"{'x'.join(map(str, classifier.preprocessing.crop))}: give the preprocessing that they were made with, or "
            "resize them"
        )
    if reduce == "none" and maps.n_channels != 3:
        raise UserError(
            f"{option('reduce')} is none, which keeps three channels; the maps have {maps.n_channels}: leave it out"
        )


def parser() -> cli.Parser:
    """The options of the command."""
    parser = cli.Parser(
        "import",
        "Make a store of attribution maps that were made elsewhere, with captum, zennit or anything that saves a .npy "
        "file. Run the same command again after any interruption: it goes on where it stopped.",
    )
    what = parser.add_argument_group("the maps, and what they are of")
    what.add_argument("maps", metavar="MAPS", help=".npy file of floats: (image, y, x) or (image, channel, y, x)")
    what.add_argument("--made-by", required=True, metavar="TEXT", help="what made them, such as 'captum 0.8 Saliency'")
    what.add_argument("--images", required=True, metavar="PATH", help="the images, as igstore build takes --data")
    what.add_argument(
        "--ids",
        metavar="FILE",
        help="the images' ids in the order of the maps, one a line; needed where the order of the ids, which is the "
        "default, is not that of the files' paths",
    )
    what.add_argument(
        "--model", required=True, metavar="NAME", help="the model that they explain, as igstore build takes it"
    )
    add_options(what, "weights", "target", "reduce", "split", "labels")
    add_options(what, "limit", help="the maps are of the first N images")
    where = parser.add_argument_group("where to")
    where.add_argument("--store", metavar="STORE", help="folder of the store (default: MAPS with .zarr)")
    add_options(where, "shard_size", "no_pixels", "no_rank", "overwrite")
    how = parser.add_argument_group("what completeness is measured with")
    add_options(how, "baseline", "output")
    add_options(how, "seed", help="of the noise baseline")
    add_preprocessing(parser)
    machine = parser.add_argument_group("the machine")
    add_options(machine, "device", "workers")
    add_options(machine, "batch_size", help="images at once (default: what fits)")
    return parser.of(import_maps)


def main(argv: Sequence[str]) -> int:
    """``igstore import MAPS.npy --made-by TEXT --images PATH --model NAME ...``."""
    parsed, output = parser().parse(argv)
    options = vars(parsed)
    images, ids, maps, store = (options.pop(name) for name in ("images", "ids", "maps", "store"))
    listed = find_images(images, split=options.pop("split"), labels=options.pop("labels"))
    order = order_of_maps(images, listed, ids=None if ids is None else read_ids(ids), limit=options["limit"])
    if ids is None:
        output.note(f"maps in the order of the image ids: the first is of {order[0]}, the last of {order[-1]}")
    options["preprocessing"] = pop_preprocessing(options)
    store = store or Path(maps).with_suffix(".zarr").name
    info = import_maps(maps, images=listed, store=store, ids=order, **options, show_progress=output.show_progress)
    output.summary(info, [*describe(info), next_command(info)])
    return cli.SOME_IMAGES_FAILED if info.failed else cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
