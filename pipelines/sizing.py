"""What a store will take: files, bytes, GPU hours, and memory of those who read it. `pipelines/CLUSTER.md` explains it.

python -m pipelines.sizing --images 1281167 --shard-size 5000
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from igstore import cli
from igstore.masks import block_grid
from igstore.schema import BuildSpec, Preprocessing
from igstore.storage import layout

# (name, images): the validation set, ImageNet's training set, and ImageNet-21k as of 2011
DATA_SETS = (("validation", 50_000), ("training", 1_281_167), ("21k", 14_197_122))

# Gradient evaluations a second on one large GPU, ResNet-50 at 224 pixels: what igstore aims at, not what was measured.
GOAL = 7000

# Measured on a store of 300 images, and held against small ones by a test.
_RECORD_BYTES, _RANK_RECORD_BYTES = 3045, 606
_RECORD_IN_MEMORY, _ID_IN_MEMORY = 11700, 80

_ID_LENGTH = 23  # ILSVRC2012_val_00000293; those of the training set are shorter
_INDEX_ENTRY, _INDEX_CHECKSUM = 16, 4  # bytes of Zarr's index of a shard


@dataclass(frozen=True)
class Size:
    """Sizes of a store of `n_images` with one ranking, made with `spec`; bytes where nothing else is said.

    Parameters
    ----------
    n_images, spec
        What the store holds.
    """

    n_images: int
    spec: BuildSpec

    @property
    def shards(self) -> int:
        """How many."""
        return layout.shard_count(self.n_images, self.spec.shard_size)

    @property
    def files(self) -> int:
        """Files in all: pieces of arrays, records, and metadata."""
        arrays, ranks = layout.variables(self.spec), layout.rank_variables(self._blocks)
        metadata = 1 + len(arrays) + 2 + len(ranks)  # the root, `ranks` and the ranking are groups
        return self.shards * (len(arrays) + 1 + len(ranks) + 1) + metadata

    @property
    def maps(self) -> int:
        """The array ``attribution``."""
        return self._image_shaped("attribution")

    @property
    def pixels(self) -> int:
        """The array ``pixels``."""
        return self._image_shaped("pixels") if self.spec.pixels else 0

    @property
    def ranks(self) -> int:
        """The arrays ``rank`` and ``share``."""
        each = sum(np.dtype(one.dtype).itemsize for one in layout.rank_variables(self._blocks).values())
        return self.n_images * self._blocks * each + 2 * self._indices

    @property
    def scalars(self) -> int:
        """Everything else that there is one of an image: numbers in whole chunks, and ids."""
        arrays = [one for one in layout.variables(self.spec).values() if not one.is_sharded and one.dtype != "string"]
        numbers = self.shards * self.spec.shard_size * sum(one.numpy_dtype.itemsize for one in arrays)
        ids = self.n_images * _ID_LENGTH + self.shards * (4 + 4 * self.spec.shard_size)
        return numbers + ids

    @property
    def records(self) -> int:
        """The records of shards, of the build and of the ranking."""
        return self.shards * (_RECORD_BYTES + _RANK_RECORD_BYTES)

    @property
    def total(self) -> int:
        """All of these; metadata, tens of kilobytes, apart."""
        return self.maps + self.pixels + self.ranks + self.scalars + self.records

    @property
    def gpu_hours(self) -> float:
        """Hours of one GPU at the goal."""
        return self.n_images * self.spec.n_steps / GOAL / 3600

    @property
    def memory(self) -> int:
        """What a reader takes that has read all ids, all other scalars, and all records of the build."""
        return self.n_images * _ID_IN_MEMORY + self.scalars + self.shards * _RECORD_IN_MEMORY

    @property
    def shard_memory(self) -> int:
        """What a builder holds of the shard that it is at, twice while it puts the shard together."""
        return 2 * min(self.n_images, self.spec.shard_size) * layout.image_bytes(self.spec)

    @property
    def _blocks(self) -> int:
        n_y, n_x = block_grid(*self.spec.preprocessing.crop, 3)
        return n_y * n_x

    @property
    def _indices(self) -> int:
        return self.shards * (self.spec.shard_size * _INDEX_ENTRY + _INDEX_CHECKSUM)

    def _image_shaped(self, name: str) -> int:
        lengths = layout.sizes(self.spec)
        variable = layout.variables(self.spec)[name]
        each = int(np.prod([lengths[dim] for dim in variable.dims[1:]])) * np.dtype(variable.dtype).itemsize
        return self.n_images * each + self._indices

    def row(self) -> list[str]:
        """For `table`."""
        parts = (self.maps, self.pixels, self.ranks, self.scalars, self.records, self.total)
        hours = (self.gpu_hours, 2 * self.gpu_hours)
        return [
            f"{self.n_images:,}",
            f"{self.spec.shard_size:,}",
            f"{self.shards:,}",
            f"{self.files:,}",
            *map(cli.size, parts),
            *(f"{value:.1f}" for value in hours),
            cli.size(self.memory),
            cli.size(self.shard_memory),
        ]


def spec_of(
    *,
    shard_size: int = BuildSpec.shard_size,
    crop: int = 224,
    n_steps: int = BuildSpec.n_steps,
    pixels: bool = BuildSpec.pixels,
) -> BuildSpec:
    """A build of some model at that size; which model makes no difference here."""
    return BuildSpec(
        model="any",
        weights="any",
        weights_sha256="",
        preprocessing=Preprocessing(resize=None, crop=(crop, crop)),
        images_fingerprint="",
        shard_size=shard_size,
        n_steps=n_steps,
        pixels=pixels,
    )


_HEADS = "images,a shard,shards,files,maps,pixels,ranks,scalars,records,in all,GPU h,at half,a reader,a builder"


def table(sizes: Sequence[Size]) -> list[str]:
    """A Markdown table, one row for each size."""
    heads = _HEADS.split(",")
    rows = [heads, ["---:"] * len(heads), *(size.row() for size in sizes)]
    return [f"| {' | '.join(row)} |" for row in rows]


def main(argv: Sequence[str]) -> int:
    """Print the sizes of one store, or those of ImageNet's parts."""
    parser = cli.BareParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=cli.positive, metavar="N", help="images; by default ImageNet's three sets")
    parser.add_argument(
        "--shard-size", type=cli.positive, default=BuildSpec.shard_size, metavar="N", help="images a shard"
    )
    parser.add_argument("--crop", type=cli.positive, default=224, metavar="PX", help="side of the model's input")
    parser.add_argument(
        "--n-steps", type=cli.positive, default=BuildSpec.n_steps, metavar="M", help="gradient evaluations an image"
    )
    parser.add_argument("--no-pixels", dest="pixels", action="store_false", help="a store without pixels")
    options = vars(parser.parse_args(argv))
    n_images = options.pop("images")
    counts = [n_images] if n_images else [count for _, count in DATA_SETS]
    print("\n".join(table([Size(count, spec_of(**options)) for count in counts])))
    return cli.DONE


if __name__ == "__main__":
    raise SystemExit(cli.run(main, sys.argv[1:]))
