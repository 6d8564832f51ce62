"""Files of weights: what is downloaded, what is read, what is refused and never run."""

from __future__ import annotations

import hashlib
import http.server
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import igstore.models.weights
from igstore.errors import UserError, WeightsNotFoundError
from igstore.models.weights import load_weights, state_sha256, torch_checkpoint


def network(seed: int, width: int = 4) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    made = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 2))
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=generator)
    return made


def plain(state: dict[str, Any], file: Path) -> None:
    torch.save(state, file)


def before_zip(state: dict[str, Any], file: Path) -> None:
    torch.save(state, file, _use_new_zipfile_serialization=False)


def nested(state: dict[str, Any], file: Path) -> None:
    torch.save({"epoch": 90, "state_dict": state}, file)


def from_data_parallel(state: dict[str, Any], file: Path) -> None:
    torch.save({"model": {f"module.{key}": tensor for key, tensor in state.items()}}, file)


def compiled(state: dict[str, Any], file: Path) -> None:
    torch.save({f"_orig_mod.{key}": tensor for key, tensor in state.items()}, file)


def without_counters(state: dict[str, Any], file: Path) -> None:
    """As before torch 0.4.1, when batch norm did not count its batches."""
    torch.save({key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}, file)


@pytest.mark.parametrize("save", [plain, before_zip, nested, from_data_parallel, compiled, without_counters])
def test_a_file_gives_the_network_its_parameters(tmp_path: Path, save: Callable[[dict[str, Any], Path], None]) -> None:
    trained, fresh, file = network(1), network(2), tmp_path / "weights.pth"
    save(trained.state_dict(), file)
    assert load_weights(fresh, file, "net") == hashlib.sha256(file.read_bytes()).hexdigest()
    assert state_sha256(fresh) == state_sha256(trained)


def test_safetensors(tmp_path: Path) -> None:
    trained, fresh, file = network(1), network(2), tmp_path / "weights.safetensors"
    save_file(trained.state_dict(), file)
    load_weights(fresh, file, "net")
    assert state_sha256(fresh) == state_sha256(trained)


def test_a_prefix_that_is_the_networks_own_stays(tmp_path: Path) -> None:
    trained, fresh, file = nn.ModuleDict({"module": network(1)}), nn.ModuleDict({"module": network(2)}), tmp_path / "w"
    torch.save(trained.state_dict(), file)
    load_weights(fresh, file, "net")
    assert state_sha256(fresh) == state_sha256(trained)


def test_missing_and_surplus_tensors_are_named(tmp_path: Path) -> None:
    state, file = network(1).state_dict(), tmp_path / "weights.pth"
    state["head.weight"] = state.pop("3.weight")
    torch.save(state, file)
    with pytest.raises(UserError, match=r"weights\.pth does not fit net: it lacks 3\.weight; it has .*head\.weight"):
        load_weights(network(2), file, "net")


def test_a_long_list_of_missing_tensors_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"x": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"it lacks 0\.weight, 0\.bias, 1\.weight and \d more; it has in excess x$"):
        load_weights(network(2), file, "net")


def test_tensors_of_another_size_are_named(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(network(1, width=5).state_dict(), file)
    with pytest.raises(UserError, match=r"does not fit net: size mismatch for \S+: .*5\].*4\]") as caught:
        load_weights(network(2), file, "net")
    assert "\n" not in str(caught.value)


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("how", ["torch", "torch before zip", "pickle"])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, how: str, name: str) -> None:
    trap, file = tmp_path / "trap", tmp_path / name
    content = {**network(1).state_dict(), "trap": Malicious(trap)}
    if how == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(UserError, match=r"more than tensors \(\w+\.mkdir\)|damaged, or not a file") as caught:
        load_weights(network(2), file, "net")
    assert "\n" not in str(caught.value)
    assert not trap.exists()
    if how == "pickle":  # the trap works, so that not springing it means something
        pickle.loads(file.read_bytes())
        assert trap.exists()


def test_code_is_named(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"weights": Malicious(tmp_path / "trap")}, file)
    with pytest.raises(UserError, match=r"more than tensors \(\w+\.mkdir\).*torch\.save\(network\.state_dict"):
        load_weights(network(2), file, "net")


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut off", b"\x80\x02}q\x00."])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_damaged_files_are_a_users_error(tmp_path: Path, content: bytes, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        load_weights(network(2), file, "net")
    assert "\n" not in str(caught.value)


def test_a_cut_off_file_is_a_users_error(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(network(1).state_dict(), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"weights\.pth is damaged"):
        load_weights(network(2), file, "net")


def test_something_else_than_a_state_dict(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save([1, 2], file)
    with pytest.raises(UserError, match="holds a list; it must hold a state dict"):
        load_weights(network(2), file, "net")


def test_state_sha256_sees_names_shapes_types_values_and_order() -> None:
    states: list[dict[str, torch.Tensor]] = [
        {"a": torch.zeros(2), "b": torch.ones(2)},
        {"b": torch.ones(2), "a": torch.zeros(2)},
        {"a": torch.zeros(2), "c": torch.ones(2)},
        {"a": torch.zeros(2), "b": torch.ones(1, 2)},
        {"a": torch.zeros(2), "b": torch.ones(2, dtype=torch.float64)},
        {"a": torch.zeros(2), "b": torch.tensor([1.0, 1.0000001])},
    ]

    def holder(state: dict[str, torch.Tensor]) -> nn.Module:
        made = nn.Module()
        for name, tensor in state.items():
            made.register_buffer(name, tensor)
        return made

    digests = [state_sha256(holder(state)) for state in states]
    assert len(set(digests)) == len(states)
    assert digests[0] == state_sha256(holder(states[0]))


# Downloads, from a server on this machine

CONTENT = b"some weights"
HASH = hashlib.sha256(CONTENT).hexdigest()[:8]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = "missing" not in self.path
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(CONTENT) if found else 0))
            self.end_headers()
            self.wfile.write(CONTENT if found else b"")

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def test_a_download_lands_where_torch_hub_keeps_it(hub: Path, server: str) -> None:
    file = torch_checkpoint(f"{server}/net-{HASH}.pth", "net's weights")
    assert file == hub / f"net-{HASH}.pth"
    assert file.read_bytes() == CONTENT
    assert list(hub.iterdir()) == [file]


def test_a_file_that_is_there_is_not_downloaded(hub: Path) -> None:
    hub.mkdir(parents=True)
    (hub / "net-00000000.pth").write_bytes(b"mine")
    file = torch_checkpoint("http://127.0.0.1:9/net-00000000.pth", "net's weights")
    assert file.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("name", "reason"), [("net-0badbad0.pth", "hash"), (f"missing-{HASH}.pth", "404")], ids=["wrong hash", "not found"]
)
def test_a_failed_download_leaves_nothing(hub: Path, server: str, name: str, reason: str) -> None:
    with pytest.raises(WeightsNotFoundError, match=reason):
        torch_checkpoint(f"{server}/{name}", "net's weights")
    assert list(hub.iterdir()) == []


def test_an_unreachable_server_is_said_with_what_to_do(hub: Path) -> None:
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/net-{HASH}.pth"
        with pytest.raises(WeightsNotFoundError) as caught:
            torch_checkpoint(url, "net's weights")
    message = str(caught.value)
    assert message.startswith("net's weights are not on this machine")
    assert url in message
    assert f"put it at {hub / f'net-{HASH}.pth'}" in message
    assert f"weights: /path/to/net-{HASH}.pth" in message
    assert "\n" not in message


def test_a_silent_server_is_given_up(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(igstore.models.weights, "_DOWNLOAD_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(WeightsNotFoundError, match="timed out"):
        torch_checkpoint(f"http://127.0.0.1:{silent.getsockname()[1]}/net-{HASH}.pth", "net's weights")
    assert socket.getdefaulttimeout() is None
