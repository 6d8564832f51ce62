"""The benchmarks: whether they time what they say, and whether everyone does the same work."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import Linear, Quadratic, Smooth
from stores import make_store
from torch import nn

from igstore import Preprocessing, classifier_from_module, learn_rules
from igstore.attribution import METHODS
from igstore.building import rank_store
from igstore.storage import StoreReader

pytest.importorskip("captum")
pytest.importorskip("h5py")
pytest.importorskip("matplotlib")

from pipelines.bench import (
    __main__ as command,
    engine,
    evaluate,
    fixtures,
    floor,
    machine,
    output,
    peers,
    quadrature,
    rank,
    reader,
    rounds,
    sources,
    startup,
)
from pipelines.bench.agreement import completeness_errors, mask_iou
from pipelines.bench.fresh import Outcome, in_fresh_process
from pipelines.bench.pictures import pictures, smooth_pictures

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(resize=None, crop=(60, 63))


@pytest.fixture(autouse=True)
def small_rates(monkeypatch):
    """Rates measured on little, and in this process."""
    monkeypatch.setattr(machine, "_SIDE", {"cpu": 32})
    monkeypatch.setattr(machine, "_COPIED", {"cpu": 1 << 12})


@pytest.fixture
def in_this_process(monkeypatch):
    def run(function, *arguments):
        started = time.perf_counter()
        result = function(*arguments)
        return Outcome(result, time.perf_counter() - started, 12_345_678)

    monkeypatch.setattr(rank, "in_fresh_process", run)
    monkeypatch.setattr(startup, "in_fresh_process", run)


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def smooth_classifier():
    return classifier_from_module(Smooth(), preprocessing=PREPROCESSING)


# --- Timing


class FakeTime:
    """A clock that only moves when a contender says how long it took."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def contender(self, name: str, *seconds: float):
        """One that takes so many seconds, when it warms up and then in each round."""
        left = iter(seconds)

        def run() -> str:
            self.now += next(left)
            self.log.append(name)
            return f"{name}'s"

        return run


def test_contenders_take_turns_after_warming_up_apart():
    clock = FakeTime()
    turns = rounds.take_turns(
        {"a": clock.contender("a", 100, 2, 4, 3), "b": clock.contender("b", 200, 1, 1, 6)},
        repeats=3,
        seconds=1000,
        before=lambda name: clock.log.append(f"before {name}"),
        clock=lambda: clock.now,
    )
    assert clock.log == ["before a", "a", "before b", "b"] * 4
    assert turns.seconds == {"a": [2, 4, 3], "b": [1, 1, 6]}
    assert turns.results["a"] == ["a's"] * 4
    assert turns.count == 3
    assert turns.median("a") == 3
    assert turns.times_as_long("a", "b") == 2  # the median of 2, 4 and 0.5; the ratio of the medians is 3


def test_what_happens_before_a_run_is_not_timed():
    clock = FakeTime()

    def before(name: str) -> None:
        clock.now += 1000

    turns = rounds.take_turns(
        {"a": clock.contender("a", 1, 1)}, repeats=1, seconds=1, before=before, clock=lambda: clock.now
    )
    assert turns.seconds == {"a": [1]}


@pytest.mark.parametrize(("budget", "expected"), [(0, 1), (19, 1), (20, 2), (29, 2), (30, 3), (1000, 5)])
def test_no_round_begins_that_would_end_too_late(budget, expected):
    clock = FakeTime()
    turns = rounds.take_turns(
        {"a": clock.contender("a", *[10] * 6)}, repeats=5, seconds=budget, clock=lambda: clock.now
    )
    assert turns.count == expected


def test_a_function_in_a_fresh_process_has_its_own_peak_memory():
    ballast = np.ones(200_000_000, np.uint8)  # what this process holds is not the other one's
    outcome = in_fresh_process(json.loads, "[1, 2]")
    assert outcome.result == [1, 2]
    assert 0 < outcome.seconds < 10
    assert 1_000_000 < outcome.peak_bytes < ballast.nbytes


# --- What is printed


def test_tables_are_aligned():
    rows = [{"name": "a", "n": 1200, "x": 0.12345}, {"name": "bcd", "n": 7, "x": None}, {"name": "", "n": 0, "x": 1e4}]
    assert output.table(rows) == [
        "name      n       x",
        "----  -----  ------",
        "a     1,200   0.123",
        "bcd       7       -",
        "          0  10,000",
    ]


def test_results_are_one_line_of_strict_json(capsys):
    output.say_result({"a": [1.5, float("inf")], "b": {50: float("nan")}, "c": "infinite"})
    line = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(line, parse_constant=pytest.fail) == {"a": [1.5, None], "b": {"50": None}, "c": "infinite"}


def test_the_machine_is_described():
    described = machine.describe(CPU)
    assert json.loads(json.dumps(described)) == described
    assert described["versions"]["torch"] in machine.in_words(described)


# --- The floor


def test_rates_are_work_over_the_fastest_time(monkeypatch):
    product = [0.0, 3.0, 3.0, 5.0, 5.0, 9.0] + [10.0, 20.0] * 4  # the fastest of seven takes 2
    monkeypatch.setattr(machine, "_CONVOLVED", ((2, 3),))
    seconds = iter(product + [0.0, 4.0] * 7)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(seconds))
    assert machine.matrix_rate(CPU) == 2 * 32**3 / 2
    seconds = iter(product + [0.0, 0.25] * 7)
    assert machine.matrix_rate(CPU) == 2 * (16 * 3 * 3) * 2 * (2 * 9) / 0.25
    seconds = iter([0.0, 4.0] + [0.0, 8.0] * 6)
    assert machine.copy_rate(CPU) == 2 * 4096 / 4


@pytest.mark.parametrize("batch_size", [1, 8])
def test_work_is_counted_by_hand(batch_size):
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.Flatten(), nn.Linear(6 * 5 * 5, 10)
    ).requires_grad_(False)
    flops, n_bytes = floor.count_work(network, (3, 16, 16), batch_size=batch_size, item_bytes=4)
    image, first, second, last = 3 * 16 * 16, 6 * 7 * 7, 6 * 5 * 5, 10
    w1, w2, w3 = 6 * 3 * 9, 6 * 2 * 9, second * 10
    # each multiplication and addition once forwards and once backwards
    assert flops == 2 * 2 * (first * 3 * 9 + second * 2 * 9 + last * second)
    forwards = (image + first) + (first + second) + (second + last)
    biases = 6 + 6 + 10
    assert n_bytes == 4 * (2 * forwards + biases + 2 * (w1 + w2 + w3) / batch_size)


def test_the_floor_is_the_longer_of_arithmetic_and_memory():
    arithmetic = floor.Floor(flops=100, n_bytes=10, matrix_rate=50, copy_rate=10)
    assert (arithmetic.seconds, arithmetic.limited_by) == (2, "arithmetic")
    memory = dataclasses.replace(arithmetic, copy_rate=2)
    assert (memory.seconds, memory.limited_by) == (5, "memory")


# --- Agreement


def test_mask_iou_of_known_masks():
    maps = np.zeros((3, 6, 6), np.float32)
    maps[:, :3, :3] = 1  # one block of four holds everything
    other = np.zeros_like(maps)
    other[0, :3, :3] = 7  # the same block
    other[1, 3:, 3:] = 1  # another one
    other[2] = -1  # none
    np.testing.assert_array_equal(mask_iou(maps, other), [1, 0, 0])
    np.testing.assert_array_equal(mask_iou(other[2:], other[2:]), [1])


def test_completeness_errors_of_known_sums():
    maps = np.full((3, 2, 2), 0.25, np.float32)
    np.testing.assert_allclose(completeness_errors(maps, np.array([1.0, -2.0, 0.0])), [0, 1.5, np.inf])


# --- The engine


@pytest.mark.parametrize("batch_size", [2, 3, 4, 8, 12])
def test_captum_makes_igstores_maps_in_any_batches(batch_size):
    classifier, pixels = smooth_classifier(), smooth_pictures(3, PREPROCESSING.crop)
    attributor = engine.Attributor(classifier, engine.spec(classifier, 4, "float32"), device=CPU, batch_size=5)
    ours = engine._maps(attributor, pixels)
    network = peers.network_as_it_comes(classifier, CPU)
    theirs = peers.captum(network, pixels, PREPROCESSING, n_steps=4, batch_size=batch_size, device=CPU)
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max())  # float16 has 11 bits
    assert mask_iou(ours, theirs).min() >= 0.97  # that rounding may move two blocks of a hundred across the cut


def test_the_loop_over_steps_makes_captums_maps():
    classifier, pixels = smooth_classifier(), smooth_pictures(2, PREPROCESSING.crop)
    network = peers.network_as_it_comes(classifier, CPU)
    loop = peers.step_loop(network, pixels, PREPROCESSING, n_steps=3, device=CPU)
    theirs = peers.captum(network, pixels, PREPROCESSING, n_steps=3, batch_size=3, device=CPU)
    np.testing.assert_allclose(loop, theirs, atol=1e-5 * np.abs(theirs).max())


def test_peers_get_the_network_as_its_library_hands_it_out():
    classifier = smooth_classifier()
    network = peers.network_as_it_comes(classifier, CPU)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in classifier.network.parameters())
    assert not network.training


@pytest.mark.parametrize(
    ("n_steps", "n_images", "largest", "expected"),
    [
        (50, 1, 64, [4, 7, 13, 25, 50]),
        (50, 2, 512, [4, 7, 13, 25, 50, 100]),
        (50, 100, 512, [4, 7, 13, 25, 50, 100, 200, 400]),
        (50, 1, 20, [4, 7, 13]),
        (4, 1, 64, [2, 4]),
        (2, 1, 0, [2]),
    ],
)
def test_batches_worth_trying_for_captum(n_steps, n_images, largest, expected):
    assert engine.candidate_batches(n_steps, n_images, largest=largest) == expected


def test_captum_gets_its_fastest_batch():
    seconds = {8: iter([5.0, 5.0]), 16: iter([9.0, 1.0]), 32: iter([2.0, 2.0])}
    assert engine.fastest_batch([8, 16, 32], lambda size: next(seconds[size]), times=2) == 16


def test_what_does_not_fit_is_left_out(monkeypatch, caplog):
    monkeypatch.setattr(engine, "_pairs_that_fit", lambda *_: 3)
    classifier, pixels = smooth_classifier(), smooth_pictures(1, PREPROCESSING.crop)
    found = engine.compare(classifier, pixels, n_steps=4, device=CPU, others=list(engine.PEERS), repeats=1)
    assert set(found["seconds"]) == {"igstore", "captum", "step_loop"}
    assert found["captum_batch_size"] <= 3
    assert "captum_one_batch is left out" in caplog.text


def test_engine(capsys):
    options = [
        "--model",
        "networks:demo_network",
        "--n-steps",
        "4",
        "--images",
        "2",
        "--repeats",
        "2",
        "--device",
        "cpu",
    ]
    assert command.main(["engine", *options, "--peers", "captum_one_batch", "step_loop"]) == 0
    result = last_line(capsys)
    assert result["benchmark"] == "engine"
    assert set(result["seconds"]) == {"igstore", *engine.PEERS}
    igstore, captum = result["seconds"]["igstore"], result["seconds"]["captum"]
    assert len(igstore) == len(captum) == 2
    assert result["speedup_vs_captum"] == pytest.approx(np.median(np.divide(captum, igstore)))
    assert result["evals_per_s"] == pytest.approx(2 * 4 / np.median(igstore))
    slowest = max(result["flops_per_eval"] / result["matrix_rate"], result["bytes_per_eval"] / result["copy_rate"])
    assert result["fraction_of_limit"] == pytest.approx(result["evals_per_s"] * slowest)
    assert result["mask_iou_p50"] >= 0.99
    assert result["mask_iou_p50_of"]["step_loop"] >= 0.99
    difference = abs(result["completeness_error_median"] - result["captum_completeness_error_median"])
    assert difference < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n-steps", "1"], "captum wants at least 2 steps"),
        (["--precision", "tf32"], "tf32 is a mode of CUDA devices"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_engine_refuses(options, message, capsys):
    assert command.main(["engine", "--model", "networks:demo_network", "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err


def test_pictures_are_those_of_the_folder_evenly_spread(tmp_path):
    pixels = smooth_pictures(9, (120, 120))
    assert pixels.shape == (9, 3, 120, 120)
    assert len({image.tobytes() for image in pixels}) == 9
    fixtures.write_jpegs(pixels, tmp_path)
    found = pictures(str(tmp_path), Preprocessing(resize=None, crop=(120, 120)), 3)
    # JPEG moves smooth pixels by a few values; another picture is 60 off
    assert np.abs(found.astype(int) - pixels[[0, 4, 8]].astype(int)).mean(axis=(1, 2, 3)).max() < 5


# --- The reader


@pytest.fixture
def data(tmp_path) -> sources.Data:
    store = make_store(tmp_path / "store.zarr", 10, shard_size=4, failed=[3], labels=[0, 1, 2, 3, 4] * 2)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return sources.prepare(store, scratch, limit=8)


ORDER = np.array([5, 6, 7, 2, 2, 0, 1, 4])


@pytest.mark.parametrize("name", sources.RAW)
def test_raw_sources_give_what_is_in_the_store(name, data):
    reader_of_store = StoreReader(data.store)
    assert data.images.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    order = np.arange(8) if name in sources.IN_ORDER_ONLY else ORDER
    images = data.images[order]
    ranking = reader_of_store.ranking("positive-3")
    [batch] = sources.RAW[name](data, order, 0)
    if name in sources.IN_ORDER_ONLY:
        assert batch.images.tolist() == images.tolist()
        return
    expected = [reader_of_store.array("pixels"), ranking.array("rank"), ranking.array("share")]
    for found, array in zip(batch, expected, strict=True):
        np.testing.assert_array_equal(found.numpy(), array.read(images))


def test_igstores_masked_sources_agree(data):
    order = np.arange(8)
    [(from_data_set, labels)] = sources.MASKED["MaskedImageNet"](data, order, 0)
    [(from_batches, labels_too)] = sources.MASKED["MaskedBatches"](data, order, 0)
    assert torch.equal(from_data_set, from_batches)
    assert labels.tolist() == labels_too.tolist() == [0, 1, 2, 4, 0, 1, 2, 3]


def test_peers_decode_the_same_images(data):
    [(unmasked, _)] = sources.MASKED["ImageFolder"](data, ORDER, 0)
    pixels = StoreReader(data.store).array("pixels").read(data.images[ORDER])
    assert unmasked.shape == pixels.shape
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.preprocessing.mean, data.preprocessing.std))
    decoded = ((unmasked * std + mean) * 255).round().numpy()
    # the pixels are noise, of which JPEG leaves some
    distances = np.abs(decoded[:, None] - pixels.astype(np.float32)).mean(axis=(2, 3, 4))
    assert distances.argmin(axis=1).tolist() == [0, 1, 2, 3, 3, 5, 6, 7]

    [(masked, _)] = sources.MASKED["per-item argsort"](data, ORDER, 0)
    maps = np.load(data.copies / "attribution.npy")[ORDER]
    for attribution, before, after in zip(maps, unmasked, masked, strict=True):
        top, bottom = attribution > np.median(attribution), attribution < np.median(attribution)
        assert torch.equal(after[:, bottom], before[:, bottom])
        assert torch.allclose(after[:, top] * std[:, 0] + mean[:, 0], torch.zeros(()), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in sources.RAW if name not in sources.IN_ORDER_ONLY])
def test_raw_sources_work_in_worker_processes(name, data):
    [alone] = sources.RAW[name](data, ORDER, 0)
    [by_worker] = sources.RAW[name](data, ORDER, 1)
    for one, other in zip(alone, by_worker, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


@pytest.mark.parametrize("name", sources.IN_ORDER_ONLY)
def test_batches_go_round_as_often_as_asked(name, data):
    sizes = [
        len(batch[0]) if isinstance(batch, tuple) else len(batch)
        for batch in (sources.MASKED | sources.RAW)[name](data, np.arange(20), 0)
    ]
    assert sizes == [8, 8, 8]


def test_files_of_other_images_are_left_out(tmp_path):
    store = make_store(tmp_path / "store.zarr", 6)
    pixels = StoreReader(store).array("pixels").read(range(6))
    folder = tmp_path / "images"
    for name, image in (("image_0004", 4), ("stranger", 5), ("image_0001", 1)):
        fixtures.write_jpegs(pixels[image : image + 1], folder / "all")
        (folder / "all" / "000000.JPEG").rename(folder / "all" / f"{name}.JPEG")
    data = sources.prepare(store, tmp_path, limit=6, folder=folder)
    assert data.places.tolist() == [1, 4, -1]
    [(inputs, _)] = sources.MASKED["ImageFolder"](data, np.arange(5), 0)
    assert len(inputs) == 5
    (folder / "all" / "image_0004.JPEG").unlink()
    (folder / "all" / "image_0001.JPEG").unlink()
    with pytest.raises(ValueError, match=r"no file below .* has the name of an image"):
        sources.prepare(store, tmp_path, limit=6, folder=folder)


def test_orders():
    assert reader.order_of("sequential", 3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    random = reader.order_of("random", 50, 120)
    assert len(random) == 120
    assert sorted(random[:50]) == sorted(random[50:100]) == list(range(50))
    assert random[:50].tolist() != list(range(50))
    assert random.tolist() == reader.order_of("random", 50, 120).tolist()


def test_every_file_is_asked_to_be_forgotten(tmp_path, monkeypatch):
    forgotten = []
    (tmp_path / "a").mkdir()
    for name in ("x", "a/y"):
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(
        reader.os,
        "posix_fadvise",
        lambda descriptor, *_: forgotten.append(Path(f"/proc/self/fd/{descriptor}").resolve()),
    )
    reader.drop_from_cache([tmp_path])
    assert sorted(forgotten) == sorted([(tmp_path / "a" / "y").resolve(), (tmp_path / "x").resolve()])


def test_reader(tmp_path, capsys):
    store = make_store(tmp_path / "store.zarr", 9)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    threads = torch.get_num_threads()
    options = ["--store", str(store), "--workers", "0", "--repeats", "1", "--seconds", "0", "--scratch", str(tmp_path)]
    assert command.main(["reader", *options]) == 0
    result = last_line(capsys)
    assert len(result["rows"]) == 2 * 2 * 2  # groups, orders, caches
    rates = {(row["reads"], row["order"], row["cache"]): row["items_per_s"] for row in result["rows"]}
    assert set(rates["masked", "sequential", "warm"]) == set(sources.MASKED)
    assert set(rates["raw", "random", "cold"]) == set(sources.RAW) - set(sources.IN_ORDER_ONLY)
    raw, masked = rates["raw", "sequential", "warm"], rates["masked", "random", "warm"]
    assert result["device_vs_memmap"] == pytest.approx(raw["MaskedBatches, unmasked"] / raw["np.memmap"])
    assert result["masked_vs_imagefolder"] == pytest.approx(masked["MaskedImageNet"] / masked["ImageFolder"])
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["store.zarr"]
    assert torch.get_num_threads() == threads


# --- Ranking


def test_synthetic_stores_are_finished_and_no_two_maps_are_alike(tmp_path):
    fixtures.make_synthetic_store(tmp_path / "s", 11, crop=(24, 27), shard_size=4)
    store = StoreReader(tmp_path / "s")
    maps = store.array("attribution").read(range(11))
    assert store.is_complete
    assert len({one.tobytes() for one in maps}) == 11
    largest = np.abs(maps.astype(np.float64)).reshape(11, -1).max(axis=1)
    assert ((largest >= 1) & (largest < 2)).all()


def test_a_copy_without_ranks_shares_the_maps_and_leaves_the_store_alone(tmp_path):
    store = make_store(tmp_path / "store.zarr", 9)
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    copy = fixtures.unranked_copy(store, tmp_path / "copy")
    assert StoreReader(copy).rankings == []
    assert rank_store(copy).ranked == 9
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    one, other = (StoreReader(path).ranking("positive-3").array("rank").read(range(9)) for path in (store, copy))
    np.testing.assert_array_equal(one, other)


def test_the_plain_ranks_are_igstores(tmp_path):
    store = make_store(tmp_path / "store.zarr", 9, shard_size=5)
    n_images, first_ranks = rank.rank_plainly(store)
    assert n_images == 9
    np.testing.assert_array_equal(first_ranks, StoreReader(store).ranking("positive-3").array("rank").read(range(5)))


def test_rank_of_a_store(tmp_path, capsys, in_this_process):
    store = make_store(tmp_path / "store.zarr", 9)
    assert command.main(["rank", "--store", str(store), "--repeats", "2", "--scratch", str(tmp_path)]) == 0
    result = last_line(capsys)
    [run] = result["runs"]
    igstore, numpy = run["seconds"]["igstore"], run["seconds"]["numpy"]
    assert (run["n_images"], run["rounds"], run["peak_bytes"]) == (9, 2, 12_345_678)
    assert run["images_per_s"] == pytest.approx(9 / np.median(igstore))
    assert run["speedup_vs_numpy"] == pytest.approx(np.median(np.divide(numpy, igstore)))
    assert result["bytes_per_image"] == 2 * 23 * 26 + 8 * 9 * 6  # float16 pixels, 8 x 9 blocks of uint16 and float32
    assert result["limit_images_per_s"] == pytest.approx(result["copy_rate"] / result["bytes_per_image"])
    assert [path.name for path in tmp_path.iterdir()] == ["store.zarr"]


def test_rank_of_synthetic_stores(tmp_path, capsys, in_this_process):
    assert command.main(["rank", "--synthetic", "30", "10", "--repeats", "1", "--scratch", str(tmp_path)]) == 0
    first, second = last_line(capsys)["runs"]
    assert (first["n_images"], second["n_images"]) == (10, 30)
    assert first["speedup_vs_numpy"] is not None
    assert second["speedup_vs_numpy"] is None
    assert not list(tmp_path.iterdir())


def test_too_small_a_disk_is_refused(tmp_path, capsys):
    assert command.main(["rank", "--synthetic", "999999999", "--scratch", str(tmp_path)]) == 2
    assert "give --scratch DIR" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- Quadrature


@pytest.fixture(scope="module")
def quadratic_rows() -> list[dict]:
    classifier = classifier_from_module(Quadratic(), preprocessing=PREPROCESSING)
    return quadrature.measure(
        classifier,
        smooth_pictures(2, PREPROCESSING.crop),
        methods=list(METHODS),
        steps=[4, 32],
        reference_steps=64,
        device=CPU,
    )


def test_rules_are_exact_where_they_must_be(quadratic_rows):
    error = {(row["method"], row["n_steps"]): row["completeness_error_median"] for row in quadratic_rows}
    assert set(error) == {(method, n_steps) for method in METHODS for n_steps in (4, 32)}
    # the gradient is linear in alpha: the sum of squares along the path
    for method in ("gausslegendre", "riemann_middle", "riemann_trapezoid"):
        assert error[method, 4] < 1e-4
    for method in METHODS:
        assert error[method, 32] <= max(error[method, 4], 1e-4)
    assert error["riemann_right", 4] > 10 * error["riemann_right", 32] / 2
    iou = {(row["method"], row["n_steps"]): row["mask_iou_p50"] for row in quadratic_rows}
    assert iou["gausslegendre", 32] == pytest.approx(1, abs=1e-3)


def test_fewest_steps_that_are_good_enough(quadratic_rows):
    rows = [
        {"method": "a", "n_steps": n, "completeness_error_median": error, "mask_iou_p50": iou}
        for n, error, iou in ((32, 0.01, 0.8), (8, 0.2, 0.6), (16, 0.05, 0.7))
    ]
    assert quadrature.fewest_steps(rows, "a") == {"error_within_5_percent": 16, "iou_of_0.9": None}


def test_the_standard_error_is_that_of_the_mean(monkeypatch):
    found = np.array([0.5, 0.7, 0.9])
    monkeypatch.setattr(quadrature, "mask_iou", lambda *_maps: found)
    few = {"methods": ["riemann_right"], "steps": [2], "reference_steps": 4, "device": CPU}
    classifier = classifier_from_module(Quadratic(), preprocessing=PREPROCESSING)
    [row] = quadrature.measure(classifier, smooth_pictures(3, PREPROCESSING.crop), **few)
    assert row["mask_iou_p50_error"] == pytest.approx(0.2 / 3**0.5)  # of numbers 0.2 apart


def test_learned_rules_are_tried_with_the_steps_that_they_have(tmp_path):
    file = tmp_path / "rules.json"
    classifier = classifier_from_module(Quadratic(), preprocessing=PREPROCESSING)
    images = [(str(i), each.transpose(1, 2, 0), None) for i, each in enumerate(smooth_pictures(8, PREPROCESSING.crop))]
    learned = learn_rules(classifier, images, file, n_steps=[2, 3], n_images=8).rules
    few = {"methods": [f"learned:{file}"], "steps": [4], "reference_steps": 64, "device": CPU}
    rows = quadrature.measure(classifier, smooth_pictures(2, PREPROCESSING.crop), **few)
    assert [row["n_steps"] for row in rows] == [len(one.nodes) for one in learned] == [2, 3]
    # the gradient is linear in alpha, which two nodes integrate as exactly as the calibration's reference does
    assert max(row["completeness_error_median"] for row in rows) < 1e-4


def test_quadrature(tmp_path, capsys):
    plot = tmp_path / "plots" / "quadrature.png"
    options = ["--model", "networks:demo_network", "--steps", "2", "4", "--reference-steps", "8", "--device", "cpu"]
    assert command.main(["quadrature", *options, "--n-images", "2", "--out", str(plot)]) == 0
    result = last_line(capsys)
    assert [(row["method"], row["n_steps"]) for row in result["rows"]] == [(m, n) for m in METHODS for n in (2, 4)]
    assert set(result["fewest_steps"]) == set(METHODS)
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# --- Evaluation


def test_the_bare_loop_shows_every_image_as_often_as_the_evaluation(tmp_path):
    store = StoreReader(make_store(tmp_path / "store.zarr", 10, failed=[2], shard_size=4))
    shown = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Linear(5, 6)

        def forward(self, x):
            shown.append(len(x))
            return self.inner(nn.functional.adaptive_avg_pool2d(x, 6))

    classifier = classifier_from_module(Counting(), preprocessing=store.spec.preprocessing)
    loop = evaluate.bare_loop(classifier, store, limit=7, n_passes=3, batch_size=4, device=CPU, precision="float32")
    shown.clear()
    assert loop() == 21
    assert shown == [4, 3] * 3


def test_evaluate(tmp_path, capsys):
    store = make_store(tmp_path / "store.zarr", 7)
    options = ["--store", str(store), "--model", "networks:demo_network", "--limit", "5", "--device", "cpu"]
    assert command.main(["evaluate", *options, "--repeats", "1"]) == 0
    result = last_line(capsys)
    assert result["n_cells"] == 4 * 2 * 2
    assert result["n_forward_passes"] == 5 * (1 + 16)
    [igstore], [loop] = result["seconds"]["igstore"], result["seconds"]["bare loop"]
    assert result["overhead"] == pytest.approx(igstore / loop - 1)


# --- Starting up


def test_bytes_on_disk_are_all_of_them(tmp_path):
    store = make_store(tmp_path / "store.zarr", 10)
    found = startup.bytes_on_disk(store)
    assert sum(found.values()) == pytest.approx(
        sum(path.stat().st_size for path in store.rglob("*") if path.is_file()) / 10
    )
    assert found["pixels"] > 3 * 23 * 26
    assert found["attribution"] > 2 * 23 * 26
    assert found["ranks"] > 6 * 8 * 9


def test_a_stores_figures_are_read_without_torch(tmp_path):
    assert not startup.imports_torch(make_store(tmp_path / "store.zarr", 4))


def test_startup(tmp_path, capsys, in_this_process, monkeypatch):
    monkeypatch.setattr(startup, "_run_python", lambda *arguments: "False\n")
    assert command.main(["startup", "--images", "3", "5", "--repeats", "1", "--scratch", str(tmp_path)]) == 0
    result = last_line(capsys)
    assert result["build_peak_bytes"] == {"3": 12_345_678, "5": 12_345_678}
    assert result["imports_torch"] is False
    saved = result["bytes_per_image"] - result["bytes_per_image_without_pixels"]
    assert saved == pytest.approx(result["bytes_per_image_of"]["pixels"])
    assert saved > 3 * 224 * 224
    assert not list(tmp_path.iterdir())


# --- The command


def test_help_lists_every_benchmark(capsys):
    assert command.main(["--help"]) == 0
    text = capsys.readouterr().out
    folder = Path(command.__file__).parent
    for name in command.BENCHMARKS:
        assert f"  {name} " in text
        assert (folder / f"{name}.py").exists()


def test_an_unknown_benchmark_is_refused(capsys):
    assert command.main(["enigne"]) == 2
    assert "no benchmark 'enigne'" in capsys.readouterr().err


def test_a_missing_peer_is_named(capsys, monkeypatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'h5py'", name="h5py")

    monkeypatch.setattr(command, "importlib", SimpleNamespace(import_module=missing))
    assert command.main(["reader", "--store", "x"]) == 2
    assert "reader needs h5py: pip install 'igstore[bench]'" in capsys.readouterr().err


# --- GPUs


@pytest.mark.parametrize(
    "parts",
    [["build"], pytest.param(["machine", "engine", "build", "resume", "networks", "profile"], marks=pytest.mark.slow)],
)
def test_everything_for_gpus_can_be_rehearsed(parts, tmp_path):
    found = tmp_path / "found.json"
    options = ["--out", str(found), "--scratch", str(tmp_path / "scratch"), "--seconds", "900"]
    assert command.main(["gpu", "--rehearse", *options, "--parts", *parts]) == 0
    results = json.loads(found.read_text())
    assert list(results) == parts
    for name in parts:
        assert results[name]["found"], results[name]
    if "resume" in parts:
        assert all(results["resume"]["found"][0]["identical"].values())
