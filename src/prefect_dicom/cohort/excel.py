"""Cohort files in Excel's format.

Read through openpyxl, pandas' own engine, which shows formulas and number formats where a data
frame has lost them.
"""

from __future__ import annotations

import contextlib
import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING
from xml.parsers import expat

from prefect_dicom.cohort.columns import is_header
from prefect_dicom.cohort.table import (
    BLANKS,
    INVISIBLE,
    Table,
    UnfitCell,
    UnreadableFile,
    exact_digits,
    refuse_larger,
)

if TYPE_CHECKING:
    from openpyxl.cell.read_only import ReadOnlyCell
    from openpyxl.worksheet._read_only import ReadOnlyWorksheet

_MOST_EXCEL_ROWS = 1_048_576
# How Excel writes a character XML cannot hold, ECMA-376 part 1, 22.9.2.19.
_EXCEL_ESCAPE = re.compile(r"_x[0-9A-Fa-f]{4}_")
SAVE_AS_XLSX = "save it again as Excel workbook (.xlsx), not as Strict Open XML"
"""openpyxl does not find the sheets of the strict form."""
_ROW = "http://schemas.openxmlformats.org/spreadsheetml/2006/main row"
_MERGED = "http://schemas.openxmlformats.org/spreadsheetml/2006/main mergeCell"
# Formats under which Excel shows an integer as its digits; zeros alone pad with zeros.
_ZEROS = re.compile(r"0+")
_DIGITS_SHOWN = re.compile(r"General|@|#+|[#,]*0(?:\.0+)?")


def read_excel(data: bytes) -> Table:
    """Read the one sheet of a workbook that has the header of a cohort.

    Raises
    ------
    UnreadableFile
        It is too large, empty or ambiguous; what the libraries raise of a damaged file passes.
    """
    # Here, as pandas below: most files are CSV, and need none of their 70 MB in every process.
    import openpyxl

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        refuse_larger(sum(part.file_size for part in archive.infolist()))
    workbook = openpyxl.load_workbook(io.BytesIO(data), read_only=True, keep_links=False)
    sheets = workbook.worksheets
    firsts = [next(_records(sheet), None) for sheet in sheets]
    found = [n for n, first in enumerate(firsts) if first and is_header(_texts(first[1]))]
    if len(found) > 1:
        raise UnreadableFile(
            f"sheets {', '.join(str(n + 1) for n in found)} (hidden ones count) each have the "
            "header of a cohort; keep one of them in the file"
        )
    # Without one, the first sheet with anything in it has the fault of its header.
    found = found or [n for n, first in enumerate(firsts) if first]
    if not found:
        raise UnreadableFile(
            f"is empty; expected is a header line and rows below it (if there are, {SAVE_AS_XLSX})"
        )
    first = firsts[found[0]]
    if first is None:
        raise ValueError("the sheet is empty")
    line, cells = first
    for number, cell in enumerate(cells, 1):
        if cell.data_type == "f":
            raise UnreadableFile(
                f"line {line}, column {number}: the name of the column is a formula; paste the "
                "header again as values"
            )
    sheet = sheets[found[0]]
    layout = _layout(sheet)
    return Table(
        line=line,
        header=_texts(cells),
        records=_with_merged(_records(sheet, after=line, width=len(cells)), layout.merged),
        content=_content,
        every_field_written=False,
        hidden_lines=frozenset(layout.hidden),
        all_hidden=sheet.sheet_state != "visible",
        ignored_sheets=tuple(n + 1 for n, first in enumerate(firsts) if first and n != found[0]),
    )


def _texts(cells: Sequence[ReadOnlyCell]) -> list[str | None]:
    from openpyxl.utils.escape import unescape

    return [
        unescape(cell.value) if cell.data_type == "s" and cell.value else None for cell in cells
    ]


def _records(
    sheet: ReadOnlyWorksheet, after: int = 0, width: int | None = None
) -> Iterator[tuple[int, Sequence[ReadOnlyCell]]]:
    """Rows with something below the header, with Excel's own row numbers; hidden ones too."""
    # What a sheet states as its size is not always true.
    sheet.reset_dimensions()
    for line, cells in enumerate(sheet.iter_rows(min_row=after + 1), after + 1):
        if line > _MOST_EXCEL_ROWS:
            raise ValueError("a row is where none can be")
        if any(cell.value is not None and str(cell.value).strip(BLANKS) for cell in cells[:width]):
            yield line, cells


@dataclass(slots=True)
class _Layout:
    """What a sheet says of its rows and cells beside what they hold."""

    hidden: set[int] = field(default_factory=set)
    """Rows that are not shown: filtered, hidden by hand, in a closed group, or without height."""
    merged: list[tuple[int, int, int, int]] = field(default_factory=list)
    """First and last row, first and last column (from 0), of cells that are shown as one."""


def _layout(sheet: ReadOnlyWorksheet) -> _Layout:
    from openpyxl.utils.cell import range_boundaries

    layout = _Layout()
    line = 0

    def begin(name: str, attributes: dict[str, str]) -> None:
        nonlocal line
        if name == _MERGED:
            left, top, right, bottom = range_boundaries(attributes["ref"])
            layout.merged.append((top, bottom, left - 1, right - 1))
        if name != _ROW:
            return
        line = int(float(attributes.get("r", line + 1)))
        if attributes.get("hidden") in ("1", "true") or float(attributes.get("ht", 1)) < 1:
            layout.hidden.add(line)

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = begin
    parser.EntityDeclHandler = _refuse_entities
    # What is damaged shows when the cells are read.
    with contextlib.suppress(Exception), sheet._get_source() as source:
        parser.ParseFile(source)
    return layout


@dataclass(frozen=True, slots=True)
class _MergedCell:
    """A cell behind the first one of merged cells: it shows that one's value and has none."""

    value: None = None
    data_type: str = "merged"


def _with_merged(
    records: Iterator[tuple[int, Sequence[ReadOnlyCell]]], merged: list[tuple[int, int, int, int]]
) -> Iterator[tuple[int, Sequence[ReadOnlyCell | _MergedCell]]]:
    """The records, with cells that show the value of another one marked as such."""
    coming = sorted(merged, reverse=True)
    here: list[tuple[int, int, int, int]] = []
    for line, cells in records:
        while coming and coming[-1][0] <= line:
            here.append(coming.pop())
        here = [each for each in here if line <= each[1]]
        marked: list[ReadOnlyCell | _MergedCell] = [*cells]
        for top, _, left, right in here:
            first = left + (line == top)
            marked += [_MergedCell()] * (right + 1 - len(marked))
            marked[first : right + 1] = [_MergedCell()] * (right + 1 - first)
        yield line, marked


def _refuse_entities(*_: object) -> None:
    raise ValueError("an entity is declared")


def _content(cell: ReadOnlyCell | _MergedCell) -> str | date | None:
    if isinstance(cell, _MergedCell):
        raise UnfitCell(
            "is one of several cells that are merged, of which the first alone has a value; undo "
            "the merge and write the value into each row"
        )
    value, kind = cell.value, cell.data_type
    if value is None or isinstance(value, date):
        return value
    if kind == "f":
        raise UnfitCell("holds a formula; paste the column again as values")
    if kind == "s":
        text: str = value
        if _EXCEL_ESCAPE.search(text):
            raise UnfitCell(INVISIBLE)
        return text
    if kind != "n":
        raise UnfitCell(
            "holds an error of Excel's, a truth value or a time (a fraction of a day); write the "
            "value as text"
        )
    digits = exact_digits(value, exact=False)
    try:
        shown = cell.number_format
    except (IndexError, TypeError):
        shown = "a format the workbook does not have"
    if _ZEROS.fullmatch(shown):
        return digits.zfill(len(shown))
    if not _DIGITS_SHOWN.fullmatch(shown):
        raise UnfitCell(
            "is a number in a display format, so that what is seen is not what is stored; format "
            "the column as text and write the value"
        )
    return digits
