"""What a caller has set in torch changes nothing that igstore computes, and is as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from igstore import MaskedImageNet, build_store, evaluate, import_maps, rank_store, verify_store
from igstore.attribution import integrated_gradients, numerics
from igstore.curves import insertion_deletion
from igstore.datasets import MaskedBatches
from igstore.machine import fresh_torch
from igstore.masks import MaskOptions
from igstore.models import Classifier, classifier_from_module, load_classifier
from igstore.schema import Preprocessing
from igstore.storage import StoreReader

PREPROCESSING = Preprocessing(resize=None, crop=(24, 24), mean=(0.5, 0.4, 0.3), std=(0.25, 0.25, 0.2))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 144, 5),
    ).eval()


def small() -> Classifier:
    """Loaded by the name ``test_ambient:small``, and made under whatever is set."""
    return classifier_from_module(network(), preprocessing=PREPROCESSING)


# --- What may be set


@contextmanager
def setting(read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def attribute(owner: Any, name: str, value: Any) -> AbstractContextManager[None]:
    return setting(lambda: getattr(owner, name), lambda new: setattr(owner, name, new), value)


def precision(owner: Any, value: str) -> AbstractContextManager[None]:
    """By torch's newer interface alone, which makes it refuse to read the older one."""
    return setting(lambda: owner.fp32_precision, lambda new: setattr(owner, "fp32_precision", new), value)


BACKENDS = torch.backends
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: setting(torch.is_grad_enabled, torch.set_grad_enabled, False),
    "autocast bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "float64 by default": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16 by default": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "another device by default": lambda: torch.device("meta"),
    "deterministic or an error": lambda: setting(
        torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, "error"
    ),
    "deterministic or a warning": lambda: setting(
        torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, "warn"
    ),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "fastest of cuDNN": lambda: attribute(BACKENDS.cudnn, "benchmark", True),
    "older tf32": lambda: attribute(BACKENDS.cuda.matmul, "allow_tf32", True),
    "older tf32 off": lambda: attribute(BACKENDS.cudnn, "allow_tf32", False),
    "medium precision of products": lambda: setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "newer tf32 of products": lambda: precision(BACKENDS.cuda.matmul, "tf32"),
    "newer tf32 of convolutions": lambda: precision(BACKENDS.cudnn.conv, "ieee"),
    "newer tf32 everywhere": lambda: precision(BACKENDS, "tf32"),
    "ieee everywhere": lambda: precision(BACKENDS, "ieee"),
    "bfloat16 products on CPUs": lambda: precision(BACKENDS.mkldnn.matmul, "bf16"),
    "bfloat16 convolutions on CPUs": lambda: precision(BACKENDS.mkldnn.conv, "bf16"),
}


def told(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError as error:  # by torch, which does not tell where old and new disagree
        return str(error)[:40]


def state() -> dict[str, Any]:
    readers: dict[str, Callable[[], Any]] = {
        "gradients": torch.is_grad_enabled,
        "inference": torch.is_inference_mode_enabled,
        "autocast": lambda: (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "dtype": torch.get_default_dtype,
        "device": torch.get_default_device,
        "deterministic": torch.get_deterministic_debug_mode,
        "anomaly": lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "cudnn": lambda: (BACKENDS.cudnn.benchmark, BACKENDS.cudnn.deterministic, BACKENDS.cudnn.enabled),
        "products": torch.get_float32_matmul_precision,
        "older": lambda: BACKENDS.cuda.matmul.allow_tf32,
        "older of cuDNN": lambda: BACKENDS.cudnn.allow_tf32,
    }
    owners = (BACKENDS, BACKENDS.cuda.matmul, BACKENDS.cudnn, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn)
    owners += (BACKENDS.mkldnn, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn)
    precisions = [owner.fp32_precision for owner in owners]
    return {name: told(read) for name, read in readers.items()} | {"precisions": precisions}


FRESH = state()


@pytest.fixture(autouse=True)
def as_in_a_fresh_process():
    """torch's older switches for tf32 leave something in the newer ones when they are put back."""
    yield
    for owner in (BACKENDS, BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn):
        owner.fp32_precision = "none"
    for owner in (BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn):
        owner.fp32_precision = "tf32"
    assert state() == FRESH


USUAL = {"older of cuDNN": False, "cudnn": (False, True, BACKENDS.cudnn.enabled)}  # what a fresh process has not


@pytest.mark.parametrize("mode", MODES)
def test_within_it_all_is_as_in_a_fresh_process_and_afterwards_as_it_was(mode):
    with MODES[mode]():
        before = state()
        with fresh_torch():
            within = state()
            with fresh_torch(tf32=True), pytest.raises(ZeroDivisionError), fresh_torch():
                raise ZeroDivisionError
            assert state() == within
        assert state() == before
    expected = FRESH | USUAL
    for name in expected.keys() - {"precisions", "products", "older", "older of cuDNN", "autocast"}:
        assert within[name] == expected[name], name
    assert within["autocast"][0] is False
    assert [within["precisions"][place] for place in (1, 3, 4, 6, 7, 8)] == ["ieee"] * 6


@pytest.mark.parametrize("mode", MODES)
def test_tf32_is_what_was_asked_for(mode):
    with MODES[mode](), fresh_torch(tf32=True):
        assert BACKENDS.cuda.matmul.fp32_precision == BACKENDS.cudnn.conv.fp32_precision == "tf32"
        assert BACKENDS.mkldnn.matmul.fp32_precision == BACKENDS.mkldnn.conv.fp32_precision == "ieee"


# --- Every way in


def pictures() -> list[tuple[str, np.ndarray, int]]:
    random = np.random.default_rng(0)
    return [(f"picture_{index}", random.integers(0, 256, (24, 24, 3), dtype=np.uint8), index) for index in range(3)]


def everything(folder: Path, classifier: Classifier | None) -> dict[str, np.ndarray]:
    """What each command makes, as arrays; of a network made here, or of one made before."""
    made = classifier or load_classifier("test_ambient:small")
    path = folder / "store.zarr"
    build_store(classifier or "test_ambient:small", pictures(), path, n_steps=16)
    rank_store(path)
    store = StoreReader(path)
    found = {name: store.array(name).read(slice(None)) for name in ("attribution", "prediction", "output")}
    rows = evaluate(path, models=[made], p=50, out=folder / "results")
    found["top1"] = np.array([row.top1 for row in rows.rows])
    found["predictions"] = np.stack([rows.predictions[name].values.ravel() for name in rows.predictions.data_vars][:1])
    cells = [MaskOptions(p=p, keep="top", fill="noise") for p in (90, 50)]
    batches = list(MaskedBatches(path, cells, networks=[Preprocessing(resize=None, crop=(31, 31))]))
    found["batches"] = np.stack([batch.masked(cell).numpy() for batch in batches for cell in cells])
    found["resized"] = batches[0].unmasked(Preprocessing(resize=None, crop=(31, 31))).numpy()
    found["visible"] = np.stack([batch.visible(cell).numpy() for batch in batches for cell in cells])
    found["item"] = MaskedImageNet(path, p=50, keep="bottom")[1][0].numpy()
    curves = insertion_deletion(path, made, steps=3)
    found |= {name: curves[name].values for name in curves.data_vars if curves[name].dtype.kind == "f"}
    if classifier is None:
        assert verify_store(path, recompute=2, model=made) == []
    maps = np.stack([found["attribution"]] * 3, axis=1).astype(np.float32)
    imported = folder / "imported.zarr"
    import_maps(maps, made, pictures(), imported, made_by="test")
    found["imported"] = StoreReader(imported).array("output").read(slice(None))
    x = torch.from_numpy(np.stack([picture.transpose(2, 0, 1) for _, picture, _ in pictures()]).astype(np.float32))
    x = x.to("cpu")
    ig = integrated_gradients(
        made.network,
        x / 255,
        torch.zeros(x.shape, device="cpu", dtype=x.dtype),
        torch.zeros(len(x), dtype=torch.int64, device="cpu"),
        n_steps=4,
    )
    found["maps"] = ig.maps.numpy()
    return found


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return everything(tmp_path_factory.mktemp("usual"), None)


@pytest.mark.parametrize("mode", MODES)
def test_every_command_gives_the_same(mode, usual, tmp_path):
    with MODES[mode]():
        before = state()
        found = everything(tmp_path, None)
        assert state() == before
    assert found.keys() == usual.keys()
    for name, values in found.items():
        assert values.dtype == usual[name].dtype, name
        np.testing.assert_array_equal(values, usual[name], name)


def test_a_network_made_under_inference_mode(usual, tmp_path):
    """Its parameters could not take part in a gradient."""
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(0)
        made = small()
        own = network()
    with torch.inference_mode():
        build_store(made, pictures(), tmp_path / "one.zarr", n_steps=4)
    build_store(own, pictures(), tmp_path / "two.zarr", n_steps=4, preprocessing=PREPROCESSING)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_networks_of_other_types_are_computed_in_float32(dtype, tmp_path):
    plain, other = network(), network().to(dtype)
    plain.load_state_dict({name: value.float() for name, value in other.state_dict().items()})
    for name, of in (("plain", plain), ("other", other)):
        build_store(of, pictures(), tmp_path / f"{name}.zarr", n_steps=4, preprocessing=PREPROCESSING)
    one, two = (
        StoreReader(tmp_path / f"{name}.zarr").array("attribution").read(slice(None)) for name in ("plain", "other")
    )
    np.testing.assert_array_equal(one, two)


def test_numerics_within_autocast():
    x = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), numerics("float32", torch.device("cpu")):
        assert (x @ x).dtype == torch.float32
    with numerics("float16", torch.device("cpu")):
        assert (x @ x).dtype == torch.float16
    with nullcontext():
        assert (x @ x).dtype == torch.float32
