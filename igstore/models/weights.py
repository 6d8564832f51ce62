"""Files of weights: fetched, read without running code, fitted to a network, and identified by their sha256."""

from __future__ import annotations

import hashlib
import importlib
import re
import socket
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.utils._pytree import tree_leaves

from igstore.errors import UserError, WeightsNotFoundError

_DOWNLOAD_TIMEOUT = 10.0  # seconds of silence, for each address of the server


def torch_checkpoint(url: str, what: str) -> Path:
    """The file at `url` as torch.hub keeps it: downloaded, and checked against the hash in its name, if not there yet.

    Parameters
    ----------
    what
        Whose weights they are, to begin the error with.

    Raises
    ------
    WeightsNotFoundError
        It cannot be downloaded; says from where, and where to put it by hand.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if file.is_file():
        return file
    sha256 = re.search(r"-([0-9a-f]{8,})\.", file.name)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)  # torch.hub takes no timeout, and would wait for ever
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), sha256 and sha256[1])
    except (OSError, RuntimeError) as error:
        raise WeightsNotFoundError(
            f"{what} are not on this machine, and {url} cannot be downloaded ({first_line(error)}); fetch that file "
            f"elsewhere and put it at {file}, or give weights: /path/to/{file.name}"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    return file


def load_weights(network: nn.Module, file: Path, name: str) -> str:
    """Load a file of tensors into the network, and return the file's sha256 in hexadecimal.

    It may be torch's (read without running code) or safetensors', hold the state dict itself or under ``state_dict``,
    ``model_state_dict`` or ``model``, and come from a network wrapped in DataParallel or torch.compile.

    Raises
    ------
    UserError
        It holds more than tensors, is damaged, or does not fit the network, called `name`.
    """
    state = _read_tensors(file)
    if not isinstance(state, MutableMapping) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{file} holds a {type(state).__name__}; it must hold a state dict")
    try:
        missing, unexpected = network.load_state_dict(_renamed(state, network.state_dict()), strict=False)
    except (RuntimeError, ValueError) as error:
        *_, mismatch = str(error).splitlines()
        raise UserError(f"{file} does not fit {name}: {mismatch.strip()}") from None
    if missing or unexpected:
        counts = {"lacks": missing, "has in excess": unexpected}
        details = [
            f"it {verb} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
            for verb, keys in counts.items()
            if keys
        ]
        raise UserError(f"{file} does not fit {name}: {'; '.join(details)}")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_tensors(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return importlib.import_module("safetensors.torch").load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise UserError(f"{file} needs safetensors: pip install safetensors") from None
    except Exception as error:  # a damaged file makes the readers raise almost anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise UserError(f"{file} is damaged, or not a file of weights ({first_line(error)})") from None
        raise UserError(
            f"{file} holds more than tensors ({refused[1]}), and unpickling that could run code; "
            f"save the tensors alone: torch.save(network.state_dict(), ...)"
        ) from None


def _renamed(state: MutableMapping[str, Any], own: Mapping[str, Tensor]) -> MutableMapping[str, Any]:
    """The state dict in a file, its keys as the network's own are.

    Changed in place, because the dict carries the version numbers by which torch updates older ones.
    """
    for nest in ("state_dict", "model_state_dict", "model"):
        if isinstance(state.get(nest), MutableMapping):
            state = state[nest]
    for prefix in ("module.", "_orig_mod."):  # left by DataParallel and torch.compile
        if not state.keys() & own.keys():
            consume_prefix_in_state_dict_if_present(state, prefix)  # type: ignore[arg-type]
    for key in list(state):
        # DenseNet files from before torch 0.4.1 say norm.1 for norm1
        new = re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", key)
        tensor = state.pop(key)
        # the extra heads that trained Inception v3 and GoogLeNet play no part in their logits
        if new in own or not new.startswith(("AuxLogits.", "aux1.", "aux2.")):
            state[new] = tensor
    if "_conv_stem.weight" in state and len(state) == len(own):
        # efficientnet-lite-pytorch's names; same tensors, same order
        return dict(zip(own, state.values(), strict=True))
    return state


def state_sha256(network: nn.Module) -> str:
    """Sha256, in hexadecimal, over the state dict in order: each tensor's name, dtype, shape and bytes.

    Of what else a module keeps there, such as its extra state, by its tensors and by how the rest is printed.
    """
    digest = hashlib.sha256()
    for key, kept in network.state_dict().items():
        for value in [kept] if isinstance(kept, Tensor) else tree_leaves(kept):
            digest.update(_described(key, value))
    return digest.hexdigest()


def _described(key: str, value: Any) -> bytes:
    if not isinstance(value, Tensor):
        # an address in memory says nothing
        return f"{key} {re.sub(r' at 0x[0-9a-f]+', '', repr(value))}\n".encode()
    plain = value.dequantize() if value.is_quantized else value
    return f"{key} {value.dtype} {tuple(value.shape)}\n".encode() + plain.detach().cpu().contiguous().numpy().tobytes()


def first_line(error: BaseException) -> str:
    """What an error says, without the advice that follows."""
    return (str(error).splitlines() or [type(error).__name__])[0]
