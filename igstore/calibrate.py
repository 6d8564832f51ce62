"""`igstore calibrate`: fit quadrature rules to a network's own gradients, for as good masks from fewer of them.

torch is imported when the work begins, so that wrong options and ``--help`` do not wait for it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from igstore import cli
from igstore.attribution import write_rules
from igstore.calibration import fit_rule
from igstore.cli import Progress, add_options, add_preprocessing, pop_preprocessing
from igstore.errors import UserError, option
from igstore.masks import mask_overlaps
from igstore.schema import (
    LEARNED,
    Baseline,
    BuildSpec,
    LearnedRule,
    Output,
    Preprocessing,
    Split,
    Target,
    as_path,
    whole_number,
)

if TYPE_CHECKING:
    import torch

    from igstore.calibration import Profile, Subject
    from igstore.models import Classifier

N_STEPS = (16, 24, 32)
N_IMAGES = 32
_N_POINTS = 256  # of each image's profile: masks of so many overlap by 0.99 with those of twice as many
_FOLDS = 4
_ARTICLE_STEPS = 50


@dataclass(frozen=True)
class Calibration:
    """What `learn_rules` has found.

    Attributes
    ----------
    path
        The file of the rules.
    rules
        One for each number of steps.
    article_iou, article_iou_error
        As `LearnedRule.iou`, of the article's rule with 50 steps on the same images.
    """

    path: Path
    rules: list[LearnedRule]
    article_iou: float
    article_iou_error: float


def learn_rules(
    model: str | Classifier | torch.nn.Module,
    images: Any,
    out: str | os.PathLike[str],
    *,
    n_steps: Sequence[int] = N_STEPS,
    n_images: int = N_IMAGES,
    weights: str | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    split: Split = "val",
    labels: str | os.PathLike[str] | None = None,
    baseline: Baseline = BuildSpec.baseline,
    target: Target = BuildSpec.target,
    output: Output = BuildSpec.output,
    seed: int = BuildSpec.seed,
    device: str = "auto",
    batch_size: int | None = None,
    show_progress: bool = False,
) -> Calibration:
    """Fit quadrature rules to the gradients of some images, for `build_store`'s ``method="learned:FILE"``.

    The gradients of each image are taken at 256 points of its path. A rule's nodes are those of the points, and its
    weights those numbers, that come closest to the sum over all of them. Each rule is judged on images that it was not
    fitted to: the images are divided into four parts, and each part is masked with rules fitted to the others.

    Parameters
    ----------
    model, images, weights, preprocessing, split, labels, baseline, target, output, seed, device, batch_size
        As `build_store`, on one device.
    out
        The file, which is replaced where it exists.
    n_steps
        A rule is made for each of these numbers of gradient evaluations, at most 128.
    n_images
        How many images, evenly spread over the list; at least 8.
    show_progress
        A progress bar on stderr.

    Raises
    ------
    UserError
        A setting is wrong, or too few images can be read.
    ModelError
        The network is not a classifier of such images.

    >>> import numpy as np, torch
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5))
    >>> images = [(f"grey{value}", np.full((8, 8, 3), value, np.uint8), None) for value in range(120, 128)]
    >>> found = learn_rules(network, images, "own.json", n_steps=[2], n_images=8)
    >>> found.rules[0].iou > 0.99  # one evaluation is enough for a linear network
    True
    """
    path = as_path("out", out)
    if path.is_dir():
        raise UserError(f"{option('out')} is {path}, which is a folder; it must be a file")
    counts = sorted({whole_number("n_steps", count, 1, _N_POINTS // 2) for count in n_steps})
    if not counts:
        raise UserError(f"{option('n_steps')} is empty; it must be one number or more")
    n_images = whole_number("n_images", n_images, 2 * _FOLDS)
    from igstore.calibration import Subject, profile

    subject = Subject(
        model,
        images,
        n_images=n_images,
        weights=weights,
        preprocessing=preprocessing,
        split=split,
        labels=labels,
        settings={"baseline": baseline, "target": target, "output": output, "seed": seed},
        device=device,
        batch_size=batch_size,
    )
    if subject.n_images < 2 * _FOLDS:
        raise UserError(f"{subject.n_images} images can be read; a calibration needs at least {2 * _FOLDS}")
    every = np.arange(subject.n_images)
    article, profiles = [], []
    with Progress(len(every), label="taking gradients", show=show_progress) as progress:
        for image in range(len(every)):
            article.append(subject.maps(every[image : image + 1], "riemann_right", _ARTICLE_STEPS)[0])
            profiles.append(profile(subject.path(image), _N_POINTS))
            progress.advance(1)
    if not any(one.gram.any() for one in profiles):
        raise UserError("no pixel of the images has a positive attribution, so there are no masks to compare")
    rules = []
    with Progress(len(counts) * len(every), label="checking the rules", show=show_progress) as progress:
        for count in counts:
            overlaps = np.ones(len(every))
            for fold in range(_FOLDS):
                held_out = every % _FOLDS == fold
                fitted = _fitted(subject, [profiles[image] for image in every[~held_out]], count)
                overlaps[held_out] = mask_overlaps(
                    subject.maps(every[held_out], fitted, count),
                    np.stack([profiles[image].reference for image in every[held_out]]),
                )
                progress.advance(int(held_out.sum()))
            iou, iou_error = _mean(overlaps)
            rules.append(dataclasses.replace(_fitted(subject, profiles, count), iou=iou, iou_error=iou_error))
    write_rules(path, rules)
    compared = mask_overlaps(np.stack(article), np.stack([one.reference for one in profiles]))
    return Calibration(path, rules, *_mean(compared))


def _fitted(subject: Subject, profiles: Sequence[Profile], n_nodes: int) -> LearnedRule:
    from igstore.calibration import dense_points

    alphas, reference = dense_points(_N_POINTS)
    places, weights = fit_rule(np.mean([one.gram for one in profiles], axis=0), reference, n_nodes)
    return subject.rule(alphas[places], weights, len(profiles))


def _mean(overlaps: NDArray[np.float64]) -> tuple[float, float]:
    """The mean, and its standard error."""
    return float(overlaps.mean()), float(overlaps.std(ddof=1) / len(overlaps) ** 0.5)


def parser() -> cli.Parser:
    """The options of the command."""
    parser = cli.Parser(
        "calibrate",
        "Fit quadrature rules to a network's own gradients, so that fewer of them make as good masks. The file is for "
        "`igstore build --method learned:FILE`.",
    )
    parser.add_argument("--model", metavar="NAME", required=True, help="as igstore build takes it")
    add_options(parser, "weights")
    parser.add_argument(
        "--data",
        dest="images",
        metavar="PATH",
        default=os.environ.get("IMAGENET_DIR"),
        help="images to fit the rules to, as igstore build takes them (default: $IMAGENET_DIR)",
    )
    add_options(parser, "split", "labels")
    parser.add_argument("--n-images", type=cli.positive, metavar="N", help="how many, evenly spread")
    parser.add_argument(
        "--n-steps",
        type=cli.positive,
        nargs="+",
        metavar="M",
        help="make a rule for each of these numbers of gradient evaluations",
    )
    parser.add_argument("--out", metavar="FILE", help="file of the rules (default: MODEL.rules.json)")
    add_options(parser, "baseline", "target", "output")
    add_options(parser, "seed", help="of the noise baseline")
    add_options(parser, "device")
    add_options(parser, "batch_size", help="points of a path at once (default: what fits)")
    add_preprocessing(parser)
    return parser.of(learn_rules)


def main(argv: Sequence[str]) -> int:
    """``igstore calibrate --model NAME --data PATH [--n-steps M ...] [--n-images N]``."""
    parsed, output = parser().parse(argv)
    options = vars(parsed)
    if options["images"] is None:
        raise UserError("no images: give --data PATH, or set IMAGENET_DIR; data/README.md says how to lay ImageNet out")
    options["preprocessing"] = pop_preprocessing(options)
    options["out"] = options["out"] or f"{options['model'].replace(':', '-').replace('/', '-')}.rules.json"
    found = learn_rules(**options, show_progress=output.show_progress)
    output.summary(found, describe(found))
    return cli.DONE


def describe(found: Calibration) -> list[str]:
    """What was found, as lines for people."""
    n_images = found.rules[0].n_images
    return [
        f"rules        {found.path}, fitted to {n_images} images",
        "             intersection over union of the p=50 masks with those of 256 evaluations, and its standard error:",
        *(
            f"{len(rule.nodes):>4} learned  {rule.iou:.3f} ({rule.iou_error:.3f}), on images that it was not fitted to"
            for rule in found.rules
        ),
        f"{_ARTICLE_STEPS:>4} article  {found.article_iou:.3f} ({found.article_iou_error:.3f}), by riemann_right",
        f"next         igstore build --method {LEARNED}:{found.path} --n-steps {len(found.rules[-1].nodes)} ...",
    ]


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
