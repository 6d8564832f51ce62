"""Whole studies, benchmarks and cluster jobs, built only on igstore's public names."""
