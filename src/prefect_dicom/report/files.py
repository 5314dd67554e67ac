"""Files of reports: written as a whole, and read by spreadsheets without harm."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prefect_dicom.core.files import atomic_write
from prefect_dicom.core.uids import is_uid


def spreadsheet_cell(value: Any) -> Any:
    """A value as a CSV cell that no spreadsheet takes for a formula."""
    if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") and not is_uid(value):
        return "'" + value
    return value


def replacing(target: Path) -> AbstractContextManager[Path]:
    """A path to write a report to, which replaces the target in one step when all went well."""
    return atomic_write(target, fail_point="half-reported")


def quoted_identifier(identifier: str) -> str:
    """An identifier behind an apostrophe: a spreadsheet would drop the zeros of a number."""
    return identifier and "'" + identifier
