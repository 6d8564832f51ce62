"""The folder that an evaluation leaves behind: written whole or not at all, and read again. Needs no torch."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import xarray as xr
from zarr.errors import ZarrUserWarning

from igstore import files
from igstore.cli import csv_text
from igstore.errors import DamagedStoreError, StoreExistsError, UserError, option
from igstore.evaluation.results import Row
from igstore.evaluation.tables import article_tables
from igstore.files import is_foreign

RESULTS, CSV, TABLES, PREDICTIONS = "results.json", "results.csv", "tables.md", "predictions.zarr"


def check_out(out: Path, *, overwrite: bool) -> None:
    """Raise `StoreExistsError` unless results may be written to `out`: nothing is there, or what may be overwritten."""
    there = sorted(path.name for path in out.iterdir() if not is_foreign(path.name)) if out.is_dir() else []
    strangers = [name for name in there if name not in (RESULTS, CSV, TABLES, PREDICTIONS)]
    another = f"give another {option('out')}"
    if out.exists() and not out.is_dir():
        raise StoreExistsError(f"{out} is a file: {another}, or remove it")
    if strangers:
        raise StoreExistsError(
            f"{out} holds {strangers[0]}, which igstore evaluate did not make: {another}, or remove it"
        )
    if there and not overwrite:
        raise StoreExistsError(f"{out} holds the results of an evaluation: {another}, or {option('overwrite')}")


def write_report(out: Path, rows: Sequence[Row], predictions: xr.Dataset, *, overwrite: bool = False) -> None:
    """Write ``results.json``, ``results.csv``, ``tables.md`` and ``predictions.zarr`` into the folder `out`.

    They are written beside it under a temporary name, and then take the place of what was there.

    Raises
    ------
    StoreExistsError
        Something that is not a report is there, or a report, and it is not to be overwritten.
    UserError
        The folder cannot be written.
    """
    check_out(out, overwrite=overwrite)
    out = out.absolute()
    making, replaced = (out.with_name(f".{out.name}.{os.getpid()}.{word}{files.PARTIAL}") for word in ("new", "old"))
    try:
        making.mkdir(parents=True)
        files.write_atomically(making / RESULTS, results_json(rows))
        records = [dataclasses.asdict(row) for row in rows]
        files.write_atomically(making / CSV, csv_text(list(records[0]), map(dict.values, records)).encode())
        tables = "\n\n".join(table.markdown() for table in article_tables(rows))
        files.write_atomically(making / TABLES, f"{tables}\n".encode())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ZarrUserWarning)  # consolidation is not yet in the v3 standard
            predictions.to_zarr(making / PREDICTIONS, zarr_format=3, consolidated=True)
        if out.exists():
            out.replace(replaced)
        making.replace(out)
    except OSError as error:
        raise UserError(f"the results cannot be written to {out}: {error.strerror or error}") from error
    finally:
        for folder in (making, replaced):
            shutil.rmtree(folder, ignore_errors=True)


def results_json(rows: Sequence[Row]) -> bytes:
    """What ``results.json`` says of them."""
    return (json.dumps([dataclasses.asdict(row) for row in rows], indent=1, allow_nan=False) + "\n").encode()


def read_rows(out: str | os.PathLike[str]) -> list[Row]:
    """The rows of the report in the folder `out`; none where there is no report.

    Raises
    ------
    DamagedStoreError
        Its ``results.json`` holds something else.
    """
    results = Path(out) / RESULTS
    try:
        rows = [Row(**record) for record in json.loads(results.read_bytes())]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, TypeError) as error:
        raise DamagedStoreError(f"{results} holds no results of this igstore's ({error}); remove {out}") from error
    again = Counter(row.identity for row in rows).most_common(1)
    if again and again[0][1] > 1:
        raise DamagedStoreError(f"{results} holds {again[0][1]} rows of one store, model and mask: {again[0][0]}")
    return rows
