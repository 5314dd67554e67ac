"""Files of reports: written as a whole, and read by spreadsheets without harm."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prefect_dicom.core.files import atomic_write, create_file
from prefect_dicom.core.uids import is_uid


def spreadsheet_cell(value: Any) -> Any:
    """A value as a CSV cell that no spreadsheet takes for a formula."""
    if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") and not is_uid(value):
        return "'" + value
    return value


def replacing(target: Path) -> AbstractContextManager[Path]:
    """A path to write a report to, which replaces the target in one step when all went well."""
    return atomic_write(target, fail_point="half-reported")


def write_table_for_people(
    target: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]
) -> bool:
    """Write a table with identifiers, readable by the user alone, or remove it if it has no rows.

    Returns
    -------
    bool
        Whether there is a table.
    """
    left = iter(rows)
    first = next(left, None)
    if first is None:
        target.unlink(missing_ok=True)
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(target) as path,
        # With a byte order mark: spreadsheets take the file for Latin-1 without.
        open(create_file(path), "w", newline="", encoding="utf-8-sig") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerow(first)
        writer.writerows(left)
    return True


def quoted_identifier(identifier: str) -> str:
    """An identifier behind an apostrophe: a spreadsheet would drop the zeros of a number."""
    return identifier and "'" + identifier
