"""The steps that a user waits for, on little data: ``pytest tests/benchmarks``, not part of the default run.

Nothing is asserted. To see a regression: ``--benchmark-autosave`` before a change, ``--benchmark-compare`` after it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Smooth
from stores import make_store

from igstore import MaskedImageNet, integrated_gradients
from igstore.acceleration import accelerate, hoist_stem
from igstore.attribution.engine import to_float16
from igstore.datasets import MaskedBatches
from igstore.masks import MaskOptions, block_ranks, block_shares, block_sums, rank_blocks
from igstore.storage import StoreReader

N_IMAGES = 64
RANDOM = np.random.default_rng(0).permutation(N_IMAGES)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("speed") / "store.zarr", N_IMAGES, size=(224, 224), shard_size=32)


@pytest.fixture(scope="module")
def maps() -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((8, 224, 224)).astype(np.float32)
    return to_float16(torch.from_numpy(values))[0].numpy()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_integrated_gradients_of_16_steps(benchmark):
    probe = torch.zeros(1, 3, 112, 112)
    network = hoist_stem(accelerate(Smooth(), probe), probe)
    inputs = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    benchmark(integrated_gradients, network, inputs, torch.zeros_like(inputs), torch.tensor([0]), n_steps=16)


def test_scores_of_8_images(benchmark, maps):
    benchmark(block_sums, maps)


def test_ranks_of_8_images(benchmark, maps):
    benchmark(block_ranks, block_sums(maps))


def test_shares_of_8_images(benchmark, maps):
    scores = block_sums(maps)
    benchmark(block_shares, scores, block_ranks(scores))


def test_ranks_and_shares_of_8_maps(benchmark, maps):
    benchmark(rank_blocks, maps[:8])


@pytest.mark.parametrize("name", ["pixels", "attribution"])
def test_reading_64_images_in_random_order(benchmark, store, name):
    array = StoreReader(store).array(name)
    benchmark(array.read, RANDOM)


def test_64_items_of_the_data_set(benchmark, store):
    dataset = MaskedImageNet(store, p=50)
    benchmark(dataset.__getitems__, RANDOM.tolist())


def test_a_batch_of_64_under_8_masks(benchmark, store):
    cells = [MaskOptions(p=p, keep=keep) for p in (90, 70, 50, 30) for keep in ("top", "bottom")]
    batches = MaskedBatches(store, cells, batch_size=N_IMAGES)

    def show() -> None:
        for batch in batches:
            for cell in cells:
                batch.masked(cell)

    benchmark(show)


def test_opening_a_store(benchmark, store):
    benchmark(lambda: StoreReader(store).records)
