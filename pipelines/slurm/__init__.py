"""Examples for SLURM: a job array (`array.sbatch`), and a dask cluster (`dask_cluster.py`)."""
