"""Names of dimensions and variables, the settings that make a store, and the format version. No I/O, no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from igstore.errors import SettingsMismatchError, UserError, option

FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)  # in stores of version 1, class indices are int16

IMAGE, CHANNEL, Y, X = "image", "channel", "y", "x"
BLOCK_Y, BLOCK_X = "block_y", "block_x"

Method = Literal[
    "riemann_right",
    "riemann_left",
    "riemann_middle",
    "riemann_trapezoid",
    "gausslegendre",
    "quadratic_midpoint",
    "logarithmic_midpoint",
]
IMPORTED = "imported"  # the method of maps that were made elsewhere
LEARNED = "learned"  # the method of maps whose rule was fitted to gradients of other images
DEFAULT_METHOD: Method = "riemann_right"
Baseline = Literal["black", "mean", "white", "blur", "noise"]
Target = Literal["prediction", "label"]
Output = Literal["logit", "probability"]
Reduce = Literal["sum", "positive", "absolute", "none"]
Precision = Literal["float32", "mixed", "tf32", "float16"]
DEFAULT_PRECISION: Precision = "float32"
ForwardPrecision = Literal["float32", "tf32", "float16"]  # where there are no gradients
FormerPrecision = Literal["bfloat16_backward"]  # of stores that earlier versions made; none is computed any more
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]

Score = Literal["positive", "absolute", "signed"]
Select = Literal["mass", "count"]
Keep = Literal["top", "bottom"]
Fill = Literal["black", "mean", "image_mean", "blur", "noise"]
Order = Literal["attribution", "random"]
Compress = Literal["zstd"]
Split = Literal["val", "train"]

# `status` of an image
NOT_BUILT, BUILT, FAILED = 0, 1, 2

UNKNOWN_LABEL = -1

MOST_STEPS = 2**15 - 1

# Beyond what anyone needs; what a store from elsewhere makes its readers set aside is bounded by them.
_LARGEST = 2.0**100
_MOST_PIXELS = 1 << 26
_MOST_IMAGES_A_SHARD = 1 << 20

_WEIGHTS_ERROR = 1e-9  # by which the weights of a rule may miss 1: far above rounding

# Settings that a store's attributes have only where they say something.
_OPTIONAL = ("maps_by", "maps_sha256", "learned_rule")


_CODE = re.compile(r"[^\W\d][\w.]*:\w+")


def names_code(name: str) -> bool:
    """Whether a name is of the form ``package.module:function``: code that only a user may choose, never a store."""
    return _CODE.fullmatch(name) is not None


def check_choice(field: str, value: object, choices: Any) -> None:
    """Raise `UserError` unless `value` is one of `choices`: a `Literal` type or a collection of strings."""
    allowed = get_args(choices) or tuple(choices)
    if not isinstance(value, str) or value not in allowed:
        raise UserError(f"{option(field)} is {value!r:.80}; it must be one of {', '.join(map(str, allowed))}")


def whole_number(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """`value` as an int; raise `UserError` unless it is a whole number (not a bool) from `least` to `most`."""
    if _is_whole(value) and least <= value <= most:
        return int(value)
    bounds = f"at least {least}" if most == math.inf else f"at least {least} and at most {most}"
    raise UserError(f"{option(name)} is {value!r:.80}; it must be a whole number, {bounds}")


def as_path(name: str, value: Any) -> Path:
    """`value` as a path, ``~`` expanded; raise `UserError` unless it is one, as a string or path."""
    if not isinstance(value, str | os.PathLike) or isinstance(value, bytes):
        raise UserError(f"{option(name)} is {_in_words(value)}; it must be a path")
    return Path(value).expanduser()


def several(name: str, values: Any, kind: type | UnionType, what: str) -> list[Any]:
    """One thing of a kind, or any number of them in a list, as a list; raise `UserError` for anything else."""
    listed = [values] if isinstance(values, kind) else values
    if not isinstance(listed, list | tuple) or not all(isinstance(one, kind) for one in listed):
        raise UserError(f"{option(name)} is {_in_words(values)}; it must be {what}, or several in a list")
    return list(listed)


def _in_words(value: Any) -> str:
    """A value as a message shows it: itself where it is short, else what it is."""
    said = repr(value)
    return said if len(said) <= 60 and "\n" not in said else f"a {type(value).__name__}"


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and value is not True and value is not False


@dataclass(frozen=True)
class Preprocessing:
    """From a decoded RGB image to a network's input, in torchvision's order: resize, centre crop, /255, normalise.

    Parameters
    ----------
    resize
        Length in pixels that the shorter side is brought to (the longer keeps the aspect ratio); None leaves the size.
    crop
        (height, width) in pixels of the centre crop: the size of `pixels` and of the maps. A single number is a square.
    interpolation
        Pillow's filter for the resize.
    mean, std
        Per channel, in [0, 1] units: the network sees ``(pixels / 255 - mean) / std``.

    Raises
    ------
    UserError
        A value is not allowed.

    >>> Preprocessing(resize=256, crop=(224, 224)).mean
    (0.485, 0.456, 0.406)
    >>> Preprocessing(crop=56).crop
    (56, 56)
    """

    resize: int | None = None
    crop: tuple[int, int] = ()  # type: ignore[assignment]  # must be given
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        check_choice("interpolation", self.interpolation, Interpolation)
        if self.resize is not None:
            object.__setattr__(self, "resize", whole_number("resize", self.resize, 1))
        crop: list[Any] = [self.crop] * 2 if _is_whole(self.crop) else _several(self.crop)
        if len(crop) != 2 or not all(map(_is_whole, crop)) or min(crop) < 1 or math.prod(crop) > _MOST_PIXELS:
            raise UserError(
                f"{option('crop')} is {self.crop!r:.80}; it must be (height, width), each at least 1 pixel, and "
                f"{_MOST_PIXELS} at most"
            )
        mean, std = (_several(values) for values in (self.mean, self.std))
        if len(mean) != 3 or len(std) != 3 or not all(map(_is_finite, mean + std)) or min(std) <= 0:
            raise UserError(
                f"{option('mean')} {self.mean!r:.80} and {option('std')} {self.std!r:.80} must be three numbers each, "
                "std above 0"
            )
        object.__setattr__(self, "crop", tuple(map(int, crop)))
        object.__setattr__(self, "mean", tuple(map(float, mean)))
        object.__setattr__(self, "std", tuple(map(float, std)))


def check_resize(resize: int | None, crop: int | tuple[int, int] | None) -> None:
    """Raise `UserError` where `crop` is larger than the shorter side of every image that is brought to `resize`."""
    if resize is not None and crop is not None:
        sides = (crop, crop) if isinstance(crop, int) else crop
        if resize < min(sides):
            raise UserError(
                f"{option('resize')} is {resize} and {option('crop')} {sides[0]}x{sides[1]}, so every image would get "
                f"a black margin; give {option('resize', str(max(sides)))} or more, or a smaller crop"
            )


def _several(values: Any) -> list[Any]:
    """The values of a sequence, an array or a tensor; none of anything else."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return list(values) if isinstance(values, tuple | list) else []


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


@dataclass(frozen=True)
class LearnedRule:
    """A quadrature rule whose nodes and weights were fitted to the gradients of some images, and what those were.

    Parameters
    ----------
    nodes
        Where the gradient is evaluated: in [0, 1], ascending.
    weights
        One a node; they add up to 1.
    model, model_weights, model_weights_sha256
        The classifier whose gradients they were, as `Classifier` names it.
    baseline, target, output
        As `BuildSpec` has them.
    n_images
        How many images there were, at least 1.
    images_fingerprint
        sha256 of the list that the images were chosen from.
    iou, iou_error
        Intersection over union of the p=50 masks with those of a much finer rule: the mean over the images, each
        masked by a rule that was fitted to others, and its standard error.

    Raises
    ------
    UserError
        A value is not allowed.

    >>> fitted_on = ("toy", "own", "0" * 64, "black", "prediction", "logit", 8, "f" * 64)
    >>> rule = LearnedRule((0.2, 0.7), (0.4, 0.6), *fitted_on, iou=0.8, iou_error=0.1)
    >>> LearnedRule.from_json(rule.to_json()) == rule
    True
    """

    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    model: str
    model_weights: str
    model_weights_sha256: str
    baseline: Baseline
    target: Target
    output: Output
    n_images: int
    images_fingerprint: str
    iou: float
    iou_error: float

    def __post_init__(self) -> None:
        nodes, weights = _several(self.nodes), _several(self.weights)
        if not 1 <= len(nodes) <= MOST_STEPS or len(weights) != len(nodes) or not all(map(_is_finite, nodes + weights)):
            raise UserError(f"a learned rule has {len(nodes)} nodes and {len(weights)} weights; it must have as many")
        if nodes[0] < 0 or nodes[-1] > 1 or any(a >= b for a, b in itertools.pairwise(nodes)):
            raise UserError("the nodes of a learned rule must lie between 0 and 1, each above the one before")
        if abs(sum(weights) - 1) > _WEIGHTS_ERROR:
            raise UserError(f"the weights of a learned rule add up to {sum(weights):.6g}; it must be 1")
        for field in ("model", "model_weights", "model_weights_sha256", "images_fingerprint"):
            if not isinstance(getattr(self, field), str):
                raise UserError(f"{field} of a learned rule is {getattr(self, field)!r:.80}; it must be a string")
        for field, choices in (("baseline", Baseline), ("target", Target), ("output", Output)):
            check_choice(field, getattr(self, field), choices)
        for field in ("iou", "iou_error"):
            if not _is_finite(getattr(self, field)) or not 0 <= getattr(self, field) <= 1:
                raise UserError(f"{field} of a learned rule is {getattr(self, field)!r:.80}; it must be from 0 to 1")
            object.__setattr__(self, field, float(getattr(self, field)))
        object.__setattr__(self, "n_images", whole_number("n_images", self.n_images, 1))
        object.__setattr__(self, "nodes", tuple(map(float, nodes)))
        object.__setattr__(self, "weights", tuple(map(float, weights)))

    @property
    def name(self) -> str:
        """What tells this rule from others in a few words."""
        digest = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
        return f"{LEARNED} on {self.model} ({digest[:8]})"

    def to_json(self) -> dict[str, Any]:
        """All of it, as a JSON object."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, document: Any) -> LearnedRule:
        """What `to_json` wrote; raise `UserError` unless it is that."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(document, dict) or document.keys() != names:
            raise UserError(f"a learned rule must be a JSON object of {', '.join(sorted(names))}")
        return cls(**document)


@dataclass(frozen=True)
class BuildSpec:
    """Everything that decides what a store's maps are. Two runs with equal specs write one store; others are refused.

    Device, batch size, library versions and times are recorded per shard and are not part of it; nor is how many
    images of the list are built (`--limit`), so that a store can grow.

    Parameters
    ----------
    model, weights, weights_sha256
        The classifier, as `Classifier` names it.
    preprocessing
        How an image becomes the network's input.
    images_fingerprint
        sha256 of the whole list of images.
    baseline
        Where the path begins, in pixel space.
    target, output
        Which class is attributed, and what of it: its logit or its softmax probability. A network of one output z is
        taken for one of two classes, 1 with the logit z and the probability sigmoid(z), and 0 with the rest.
    method, n_steps
        The quadrature rule, and its gradient evaluations an image, 1 to 32767.
    max_error, max_steps
        None in what is built now. Earlier versions could double the steps of an image while its completeness error
        exceeded `max_error`, up to `max_steps`; their stores record both.
    precision
        Arithmetic of the gradients, as `igstore.attribution.integrated_gradients` has it.
    reduce
        How channels become one map.
    pixels
        Whether the store holds the images' pixels.
    shard_size
        Images a shard.
    seed
        Of the noise baseline, at least 0.
    maps_by, maps_sha256
        What made maps that were imported, and their checksum.
    learned_rule
        The rule itself, where the method is ``learned``.
    format_version
        Of the store's layout.

    Raises
    ------
    UserError
        A value is not allowed, or two do not go together.

    >>> plain = Preprocessing(resize=None, crop=(24, 24))
    >>> few, many = (BuildSpec("toy", "own", "0" * 64, plain, "f" * 64, n_steps=m) for m in (20, 50))
    >>> few.differences(many)
    [('n_steps', 20, 50)]
    """

    model: str
    weights: str
    weights_sha256: str
    preprocessing: Preprocessing
    images_fingerprint: str  # of the whole list, before --limit
    baseline: Baseline = "black"
    target: Target = "prediction"
    output: Output = "logit"
    method: Literal[Method, "imported", "learned"] = DEFAULT_METHOD
    n_steps: int = 50  # 0 for imported maps
    max_error: float | None = None
    max_steps: int | None = None
    precision: Precision | FormerPrecision = DEFAULT_PRECISION
    reduce: Reduce = "sum"
    pixels: bool = True
    shard_size: int = 500
    seed: int = 0
    maps_by: str | None = None  # of imported maps: what made them, in its maker's words
    maps_sha256: str | None = None  # of imported maps: their values, in the order of the images
    learned_rule: LearnedRule | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for field, choices in (
            ("baseline", Baseline),
            ("target", Target),
            ("output", Output),
            ("precision", (*get_args(Precision), *get_args(FormerPrecision))),
            ("reduce", Reduce),
        ):
            check_choice(field, getattr(self, field), choices)
        check_choice("method", self.method, (*get_args(Method), IMPORTED, LEARNED))
        if (self.method == LEARNED) != (self.learned_rule is not None):
            raise UserError(f"a learned rule goes with method {LEARNED}; method is {self.method}")
        is_imported = self.method == IMPORTED
        if is_imported and (self.n_steps or not self.maps_by or not self.maps_sha256):
            raise UserError("imported maps have n_steps 0, and maps_by and maps_sha256 say what they are")
        if not is_imported and (self.maps_by or self.maps_sha256):
            raise UserError(f"maps_by and maps_sha256 are for imported maps; method is {self.method}")
        fewest = 0 if is_imported else 1
        for field, least, most in (
            ("n_steps", fewest, MOST_STEPS),
            ("shard_size", 1, _MOST_IMAGES_A_SHARD),
            ("seed", 0, math.inf),
        ):
            object.__setattr__(self, field, whole_number(field, getattr(self, field), least, most))
        if not isinstance(self.pixels, bool):
            raise UserError(f"{option('pixels')} is {self.pixels!r:.80}; it must be True or False")
        if self.learned_rule is not None and len(self.learned_rule.nodes) != self.n_steps:
            raise UserError(
                f"{option('n_steps')} is {self.n_steps}, and the learned rule has {len(self.learned_rule.nodes)} nodes"
            )
        if (self.max_error is None) != (self.max_steps is None):
            raise UserError("max_error and max_steps are recorded together, or neither is")
        if self.max_steps is not None:
            if self.method != "riemann_right":
                raise UserError(f"steps can be doubled with method riemann_right only; method is {self.method}")
            whole_number("max_steps", self.max_steps, self.n_steps, MOST_STEPS)

    @property
    def quadrature(self) -> Any:
        """The rule, as `igstore.attribution.rule` takes it."""
        return self.learned_rule or self.method

    @property
    def rule_name(self) -> str:
        """The rule in a few words, which differ from those of any other rule."""
        return self.learned_rule.name if self.learned_rule else self.method

    @property
    def made_by(self) -> str:
        """What made the maps, in words."""
        return self.maps_by or f"Integrated Gradients by {self.rule_name}, {self.n_steps} steps"

    def to_attributes(self) -> dict[str, Any]:
        """The spec as JSON-ready attributes of a store's root group, preprocessing flattened into them.

        Fields of imported maps and of learned rules are left out of other stores.
        """
        flat = dataclasses.asdict(self)
        flat["learned_rule"] = self.learned_rule and self.learned_rule.to_json()
        flat.update(flat.pop("preprocessing"))
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in flat.items()
            if value is not None or name not in _OPTIONAL
        }

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any]) -> BuildSpec:
        """The spec that `to_attributes` wrote; other attributes are ignored.

        Raises
        ------
        SettingsMismatchError
            The format version is not this library's, or fields are missing: the store is foreign or of another version.
        """
        version = attributes.get("format_version")
        if version not in READ_VERSIONS:
            raise SettingsMismatchError(
                f"format version is {version!r}; this igstore reads versions {' and '.join(map(str, READ_VERSIONS))}: "
                + (
                    "not a store made by igstore"
                    if version is None
                    else "install the igstore that wrote it, or rebuild"
                )
            )
        types = get_type_hints(cls) | get_type_hints(Preprocessing)
        parts = [field.name for field in dataclasses.fields(Preprocessing)]
        own = [field.name for field in dataclasses.fields(cls) if field.name != "preprocessing"]
        own = [name for name in own if name in attributes or name not in _OPTIONAL]
        missing = [name for name in [*own, *parts] if name not in attributes]
        if missing:
            raise SettingsMismatchError(
                f"the store's attributes lack {', '.join(missing)}: not a store made by igstore"
            )
        try:
            if isinstance(attributes.get("learned_rule"), dict):
                attributes = {**attributes, "learned_rule": LearnedRule.from_json(attributes["learned_rule"])}
            for name in [*own, *parts]:
                if not _is_a(attributes[name], types[name]):
                    raise UserError(f"{name} is {attributes[name]!r:.80}")
            preprocessing = Preprocessing(**{name: attributes[name] for name in parts})
            return cls(preprocessing=preprocessing, **{name: attributes[name] for name in own})
        except UserError as error:
            raise SettingsMismatchError(f"the store's attributes are not a valid build: {error}") from error

    def differences(self, other: BuildSpec) -> list[tuple[str, Any, Any]]:
        """(field, value here, value there) for every field in which the two specs differ; empty when equal."""
        here, there = self.to_attributes(), other.to_attributes()
        names = dict.fromkeys((*here, *there))
        return [(name, here.get(name), there.get(name)) for name in names if here.get(name) != there.get(name)]


def _is_a(value: object, expected: Any) -> bool:
    """Whether a JSON value is of a type as the fields above are declared with."""
    parts = get_args(expected)
    if isinstance(expected, UnionType) or get_origin(expected) is Union:  # of literals it is the older kind
        return any(_is_a(value, part) for part in parts)
    if get_origin(expected) is Literal:
        return value in parts
    if get_origin(expected) is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(parts) and all(map(_is_a, value, parts))
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST
    return type(value) is expected
