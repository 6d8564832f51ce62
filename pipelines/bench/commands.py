"""Every command on many small images: seconds at two numbers of images, and whether they grow faster than the images.

The images are a few pixels wide and the network is next to nothing. What is left is what a command does for each image,
so that work that is done for all images again and again shows at once.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import igstore
from igstore import cli
from igstore.cli import COMMANDS
from pipelines.bench import fixtures, machine, output

_SIDE, _CLASSES = 12, 10
_SMALLER = 4  # times fewer images in the first round
_MODEL = ["--model", "pipelines.bench.commands:network", "--crop", str(_SIDE), "--resize", str(_SIDE)]
_MODELS = ["--models", "pipelines.bench.commands:network"]
_BYTES = 60_000  # on disk, that an image costs in all that is made of it

# What is run, in order: each makes what a later one reads, in a folder with `images` and `maps.npy`.
RUNS: dict[str, list[str]] = {
    "build": ["build", "--data", "images", "--store", "store.zarr", "--n-steps", "2", *_MODEL],
    "build again": ["build", "--data", "images", "--store", "store.zarr", "--n-steps", "2", *_MODEL],
    "import": ["import", "maps.npy", "--made-by", "nobody", "--images", "images", "--store", "theirs.zarr", *_MODEL],
    "rank": ["rank", "store.zarr", "--score", "absolute"],
    "rank again": ["rank", "store.zarr", "--score", "absolute"],
    "evaluate": ["evaluate", "store.zarr", "--out", "found", *_MODELS],
    "report": ["report", "found", "--out", "page.html", "--store", "store.zarr"],
    "curves": ["curves", "store.zarr", *_MODEL[:2], "--steps", "4", "--out", "curves"],
    "info": ["info", "store.zarr"],
    "show": ["show", "store.zarr", "--out", "shown.png"],
    "view": ["view", "store.zarr", "--save", "page"],
    "verify": ["verify", "store.zarr"],
    "verify recomputing": ["verify", "store.zarr", "--recompute", "8", *_MODEL[:2]],
    "export zarr": ["export", "store.zarr", "copy.zarr", "--compress", "zstd"],
    "export ranks": ["export", "store.zarr", "thin.zarr", "--format", "ranks"],
    "export hdf5": ["export", "store.zarr", "store.h5", "--format", "hdf5"],
    "info of hdf5": ["info", "store.h5"],
    "export quantus": ["export", "store.zarr", "quantus", "--format", "quantus"],
    "export virelay": ["export", "store.zarr", "virelay", "--format", "virelay"],
    "merge": ["merge", "store.zarr", "copy.zarr", "--out", "merged.zarr"],
}


def network() -> torch.nn.Module:
    """A network that costs next to nothing and tells images apart."""
    return torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(27, _CLASSES)).eval()


def write_data(folder: Path, n_images: int) -> None:
    """Small images with labels, and maps of them."""
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    with (folder / "images" / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "class_index"])
        for image in range(n_images):
            pixels = random.integers(0, 256, (_SIDE, _SIDE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{image:06d}.png", compress_level=1)
            table.writerow([f"{image:06d}.png", image % _CLASSES])
    np.save(folder / "maps.npy", random.standard_normal((n_images, _SIDE, _SIDE)).astype(np.float32))


def run(folder: Path, argv: Sequence[str]) -> float:
    """Seconds that a command takes in a process of its own, from its start to its end."""
    roots = [Path(igstore.__file__).parents[1], Path(__file__).resolve().parents[2], os.environ.get("PYTHONPATH", "")]
    paths = os.pathsep.join(map(str, roots))
    started = time.perf_counter()
    command = [sys.executable, "-m", "igstore", *argv, "--quiet"]
    subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": paths}, check=True, capture_output=True)
    return time.perf_counter() - started


def measure(scratch: Path, n_images: int) -> dict[str, float]:
    """Seconds of every run."""
    folder = scratch / str(n_images)
    folder.mkdir()
    write_data(folder, n_images)
    return {name: run(folder, argv) for name, argv in RUNS.items()}


def main(argv: Sequence[str]) -> int:
    """``python -m pipelines.bench commands [--images N]``."""
    parser = output.parser("commands", __doc__)
    parser.add_argument("--images", type=cli.positive, default=50_000, metavar="N", help="in the larger round")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where to make stores; default: the system's")
    options = parser.parse_args(argv)
    ran_on = machine.describe(torch.device("cpu"))
    cli.say(machine.in_words(ran_on), "")
    sizes = [max(1, options.images // _SMALLER), options.images]
    with fixtures.scratch(options.scratch, _BYTES * sum(sizes)) as scratch:
        start = run(scratch, ["--version"])
        few, many = (measure(scratch, size) for size in sizes)
    rows: list[dict[str, Any]] = []
    for name in RUNS:
        # what does not depend on the images is no part of how it grows
        grown = (many[name] - start) / max(few[name] - start, 0.1)
        rows.append({"command": name, f"{sizes[0]:,}": few[name], f"{sizes[1]:,}": many[name], "times": grown})
    left_out = COMMANDS.keys() - {argv[0] for argv in RUNS.values()}
    cli.say(
        *output.table(rows), "", f"seconds; {sizes[1] / sizes[0]:g} times as many images; without {', '.join(left_out)}"
    )
    output.say_result({"benchmark": "commands", "machine": ran_on, "images": sizes, "seconds": [few, many]})
    return cli.DONE
