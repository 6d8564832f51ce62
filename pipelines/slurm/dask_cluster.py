"""One store by a dask cluster that SLURM starts: a worker a GPU, replaced when it is preempted.

    pip install 'igstore[cluster]' dask-jobqueue
    python -m pipelines.slurm.dask_cluster --gpus 8 --model resnet50 --data /data/imagenet --store resnet50.zarr

Run it on a login node or in a small job of its own; it ends the workers when it ends. Options but ``--gpus`` and
``--partition`` are those of ``igstore build``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from igstore import cli
from igstore.build import main as build


def main(argv: Sequence[str]) -> int:
    """Start a cluster, build on it, end it."""
    parser = cli.BareParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpus", type=cli.positive, default=4, metavar="N", help="workers, each with one GPU")
    parser.add_argument("--partition", help="where to run them")
    options, for_build = parser.parse_known_args(argv)

    from dask_jobqueue import SLURMCluster

    cluster = SLURMCluster(
        queue=options.partition,
        # one process with one thread is one worker, and it says that it has one GPU: so no two shards share it
        cores=1,
        processes=1,
        memory="16GB",
        worker_extra_args=["--resources", "GPU=1"],
        # what SLURM is asked for, which is more than dask needs to know: cores to decode images with, and the GPU
        job_cpu=8,
        job_extra_directives=["--gpus=1", "--requeue"],
        walltime="04:00:00",
    )
    with cluster:
        # At least one, which the build waits for. Workers that die or run out of time are replaced.
        cluster.adapt(minimum=1, maximum=options.gpus)
        return build([*for_build, "--scheduler", cluster.scheduler_address])


if __name__ == "__main__":
    raise SystemExit(cli.run(main, sys.argv[1:]))
