"""A list on the disk as a table: CSV, Excel or Parquet, told apart by its first bytes."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from prefect_dicom.cohort.csv import read_csv
from prefect_dicom.cohort.excel import SAVE_AS_XLSX, read_excel
from prefect_dicom.cohort.parquet import read_parquet
from prefect_dicom.cohort.table import DateWindow, Table, UnreadableFile, refuse_larger


def open_list(path: Path, window: DateWindow | None) -> Table:
    """Open a list.

    Raises
    ------
    UnreadableFile
        It is none, or cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableFile("is no file but a folder or a device; give the path of a list")
        refuse_larger(status.st_size)
        data = path.read_bytes()
    except FileNotFoundError:
        raise UnreadableFile("does not exist; check the path") from None
    except OSError as error:
        raise UnreadableFile(
            f"cannot be opened ({type(error).__name__}); check path and permissions"
        ) from None
    suffix = path.suffix.lower()
    for beginning, kind, reader, remedy in (
        (b"PK\x03\x04", "an Excel workbook", read_excel, SAVE_AS_XLSX),
        (b"PAR1", "a Parquet file", partial(read_parquet, window=window), "write it again"),
    ):
        if data.startswith(beginning):
            try:
                table = reader(data)
            except UnreadableFile:
                raise
            except Exception:  # a damaged file makes the libraries raise whatever it comes to
                raise UnreadableFile(f"is not {kind} that can be read; {remedy}") from None
            return replace(table, records=_until_damage(table.records))
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise UnreadableFile(
            "is an old Excel file (.xls) or protected by a password; save it as .xlsx without one"
        )
    if suffix in (".xlsx", ".xlsm", ".parquet"):
        raise UnreadableFile(f"is called {suffix} and is none; export it again")
    return read_csv(data)


def _until_damage(
    records: Iterator[tuple[int, Sequence[object]]],
) -> Iterator[tuple[int, Sequence[object]]]:
    line = 0
    try:
        for line, cells in records:
            yield line, cells
    except Exception:  # see open_list
        where = f"after line {line}" if line else "below the header"
        raise UnreadableFile(
            f"{where}: the file is damaged, rows from here on were not read; save it again"
        ) from None
