"""Tables of candidates that a person has marked: lists that we have written ourselves.

A table with a column CandidateOf is one of ours, of near misses: there only identifiers count, an
apostrophe at their beginning does not, and where there is a column Take only what it marks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from functools import partial

from prefect_dicom.cohort.columns import IDENTIFIERS
from prefect_dicom.cohort.list_faults import ListFaults
from prefect_dicom.cohort.table import BLANKS, INVISIBLE, Table, UnfitCell

_TAKEN = frozenset(["x", "yes", "y", "1", "true", "take"])
_LEFT = frozenset(["no", "n", "0", "false", "-"])


def is_table_of_candidates(columns: dict[str, int]) -> bool:
    """Whether the columns, by meaning, are those of a table of candidates."""
    return "CandidateOf" in columns


def table_of_candidates(
    table: Table, columns: dict[str, int], faults: ListFaults
) -> tuple[Table, dict[str, int]]:
    """The candidates that are wanted, and the columns that identify them."""
    take = columns.get("Take")
    records = table.records if take is None else _marked(table, take, faults)
    content = partial(_without_apostrophe, table.content)
    identifying = {name: index for name, index in columns.items() if name in IDENTIFIERS}
    return replace(table, records=records, content=content), identifying


def _marked(table: Table, take: int, faults: ListFaults) -> Iterator[tuple[int, Sequence[object]]]:
    """Records that a person has marked in the column Take."""
    found = False
    for line, cells in table.records:
        if _is_marked(table, line, cells, take, faults):
            found = True
            yield line, cells
    if not found and not faults:
        faults.whole.append(
            "no candidate is marked; write x into the column Take of those that are wanted, "
            "or delete the lines of all others and the column Take"
        )


def _is_marked(
    table: Table, line: int, cells: Sequence[object], index: int, faults: ListFaults
) -> bool:
    """Whether a person has marked a candidate as wanted."""
    try:
        mark = table.content(cells[index]) if index < len(cells) else None
    except UnfitCell:
        mark = "neither"
    mark = str(mark or "").strip(BLANKS).casefold()
    if mark and mark not in _TAKEN | _LEFT:
        faults.of_line(line, "is neither x nor empty; write one of them", "Take")
    return mark in _TAKEN


def _without_apostrophe(
    content: Callable[[object], str | date | None], cell: object
) -> str | date | None:
    """What a table of candidates has in a cell: spreadsheets are kept from changing it."""
    text = content(cell)
    if not isinstance(text, str):
        return text
    text = text.strip(" \t\r\n").removeprefix("'")
    if text.strip(BLANKS) != text.strip(" "):
        raise UnfitCell(INVISIBLE)
    return text
