"""The folder that an evaluation leaves behind: written whole or not at all, and read again. Needs no torch."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import xarray as xr
from zarr.errors import ZarrUserWarning

from igstore.errors import DamagedStoreError, StoreExistsError, UserError
from igstore.names import is_foreign
from igstore.reporting.results import Row
from igstore.reporting.tables import article_tables
from igstore.storage import files

RESULTS, CSV, TABLES, PREDICTIONS = "results.json", "results.csv", "tables.md", "predictions.zarr"


def check_out(out: Path) -> None:
    """Raise `StoreExistsError` unless a report may be written to `out`: nothing there, or nothing but a report."""
    names = {path.name for path in out.iterdir() if not is_foreign(path.name)} if out.is_dir() else set()
    strangers = sorted(names - {RESULTS, CSV, TABLES, PREDICTIONS})
    if strangers or (out.exists() and not out.is_dir()):
        what = f"holds {strangers[0]}, which igstore evaluate did not make" if strangers else "is a file"
        raise StoreExistsError(f"{out} {what}: give another --out, or remove it")


def write_report(out: Path, rows: Sequence[Row], predictions: xr.Dataset) -> None:
    """Write ``results.json``, ``results.csv``, ``tables.md`` and ``predictions.zarr`` into the folder `out`.

    They are written beside it under a temporary name, and then take the place of what was there.

    Raises
    ------
    StoreExistsError
        Something that is not a report is there.
    UserError
        The folder cannot be written.
    """
    check_out(out)
    out = out.absolute()
    making, replaced = (out.with_name(f".{out.name}.{os.getpid()}.{word}{files.PARTIAL}") for word in ("new", "old"))
    try:
        making.mkdir(parents=True)
        records = [dataclasses.asdict(row) for row in rows]
        files.write_atomically(making / RESULTS, (json.dumps(records, indent=1, allow_nan=False) + "\n").encode())
        files.write_atomically(making / CSV, _csv(records).encode())
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


def _csv(records: Sequence[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def read_rows(out: Path) -> list[Row]:
    """The rows of the report in the folder `out`; none where there is no report.

    Raises
    ------
    DamagedStoreError
        Its ``results.json`` holds something else.
    """
    try:
        return [Row(**record) for record in json.loads((out / RESULTS).read_bytes())]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, TypeError) as error:
        raise DamagedStoreError(
            f"{out / RESULTS} holds no results of this igstore's ({error}); remove {out}"
        ) from error
