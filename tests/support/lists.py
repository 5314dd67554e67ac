"""Cohort lists in each of their formats, for tests of what is read of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openpyxl
import pandas

from prefect_dicom.cohort.data_frame import read_frame_as_list
from prefect_dicom.cohort.list_options import NO_CHOICES, ListOptions
from prefect_dicom.cohort.rows import CohortList, read_list

FORMATS = ("csv", "xlsx", "parquet", "frame")


def read_as(kind: str, folder: Path, columns: Sequence[str], *rows: Sequence[Any]) -> CohortList:
    """What is read of a table in one of the :data:`FORMATS`; raises CohortError."""
    frame = pandas.DataFrame([list(row) for row in rows], columns=list(columns), dtype=object)
    if kind == "frame":
        return read_frame_as_list(frame)
    return read_list(written(kind, folder, frame))


def written(kind: str, folder: Path, frame: pandas.DataFrame) -> Path:
    """A frame as a list on the disk."""
    path = folder / f"list.{kind}"
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "xlsx":
        frame.to_excel(path, index=False)
    else:
        frame.to_parquet(path)
    return path


def workbook(
    path: Path,
    *sheets: Sequence[Sequence[Any]],
    hidden: Mapping[int, Mapping[str, Any]] | None = None,
    states: Sequence[str] = (),
) -> Path:
    """An XLSX file; ``hidden`` are properties of rows of the first sheet, by their number."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for rows in sheets:
        sheet = book.create_sheet()
        for row in rows:
            sheet.append(list(row))
    for line, properties in (hidden or {}).items():
        for name, value in properties.items():
            setattr(book.worksheets[0].row_dimensions[line], name, value)
    for sheet, state in zip(book.worksheets, states, strict=False):
        sheet.sheet_state = state
    stream = io.BytesIO()
    book.save(stream)
    path.write_bytes(stream.getvalue())
    return path


def choose(path: Path, **choices: Any) -> CohortList:
    """What is read of a list with these choices of a person."""
    return read_list(path, options=ListOptions(**choices) if choices else NO_CHOICES)
