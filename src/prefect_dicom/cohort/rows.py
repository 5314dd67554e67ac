"""The cohort file: CSV, Excel or Parquet in, rows or a complete list of faults out.

Everything is read as text, so that leading zeros live, and nothing is repaired: what could make
a query select more than the person meant (a wildcard, a torn line, a number Excel has rounded)
is a fault with its line, its column and its remedy. Faults never repeat a cell's content, which
may be patient data; they reach logs.

PatientName and PatientBirthDate identify nobody; what a row finds is compared with them.
A table with a column CandidateOf is one of ours, of near misses: there only identifiers count, an
apostrophe at their beginning does not, and where there is a column Take only what it marks.

The standard's own terms: PatientID and StudyDescription are LO (64 characters), AccessionNumber
is SH (16), StudyDate is DA, Modality is CS, PS3.5 6.2. The matching rules that make an
identifier safe to query by are in PS3.4 C.2.2.2.
"""

from __future__ import annotations

import hashlib
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import date, timedelta
from functools import partial
from pathlib import Path

from prefect_dicom.cohort.cells import CELL_READERS, DAY_FORMS, days_between
from prefect_dicom.cohort.columns import IDENTIFIERS, WINDOW_DATE, find_columns
from prefect_dicom.cohort.csv import read_csv
from prefect_dicom.cohort.excel import SAVE_AS_XLSX, read_excel
from prefect_dicom.cohort.parquet import read_parquet
from prefect_dicom.cohort.table import (
    BLANKS,
    INVISIBLE,
    DateWindow,
    Table,
    UnfitCell,
    UnreadableFile,
    refuse_larger,
)
from prefect_dicom.core.errors import CohortError
from prefect_dicom.core.model import CohortRow, DateRange, Excluded

_TAKEN = frozenset(["x", "yes", "y", "1", "true", "take"])
_LEFT = frozenset(["no", "n", "0", "false", "-"])

_MOST_FAULTS = 200


def cohort_digest(path: Path) -> str:
    """SHA-256 (hex) of the cohort file's bytes: the same digest is the same cohort.

    Raises
    ------
    OSError
        It cannot be read, or is no regular file: a device has no end.
    """
    if not path.is_file():
        raise FileNotFoundError(path.name)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_cohort(path: Path, window: DateWindow | None = None) -> list[CohortRow]:
    """Read a cohort file, or a table of candidates that a person has marked.

    The kind of file is recognised by its first bytes. The first line that is not blank is the
    header. Columns go by their DICOM keyword, tag or plain name, whatever their case, blanks
    and underscores; columns with other names are ignored.

    Parameters
    ----------
    path : Path
        CSV (UTF-8, or UTF-16 with a byte order mark; comma, semicolon or tab), XLSX or Parquet.
    window : DateWindow, optional
        Takes the place of a column StudyDate: each row is for studies of these days only.

    Returns
    -------
    list of CohortRow
        In the file's order, duplicates included. Each has a PatientID, an AccessionNumber or a
        StudyInstanceUID that is safe to query by (PS3.4 C.2.2.2). ``line`` counts lines of the
        file from 1; in Parquet the names of the columns count as line 1.

    Raises
    ------
    CohortError
        With the faults of the file, the first 200 of them and the number of the others; none
        repeats a cell's content.
    """
    return _read(path.name, partial(_open, path, window), window, least=1)


def read_table(source: str, open_table: Callable[[], Table]) -> list[CohortRow]:
    """Read a table that is not a cohort file, by the same rules.

    Parameters
    ----------
    source : str
        Name of the table in error messages.
    open_table : callable
        Opens the table, or raises UnreadableFile.

    Raises
    ------
    CohortError
        As :func:`read_cohort`.
    """
    return _read(source, open_table, None, least=1)


def read_excluded(path: Path) -> list[Excluded]:
    """Read a list of what is not wanted: the identifiers of a cohort list, which may be empty.

    Its other columns narrow nothing.

    Raises
    ------
    CohortError
        As :func:`read_cohort`.
    """
    return [
        Excluded(row.patient_id, row.accession_number, row.study_instance_uid)
        for row in _read(path.name, partial(_open, path, None), None, least=0)
    ]


def _read(
    source: str, open_table: Callable[[], Table], window: DateWindow | None, least: int
) -> list[CohortRow]:
    faults: list[str] = []
    # Warnings of openpyxl repeat what a cell holds.
    with warnings.catch_warnings(action="ignore"):
        rows = list(_rows(open_table, faults, window))
    if len(rows) < least and not faults:
        faults.append("holds no rows below the header; write one study or patient in each line")
    if len(faults) > _MOST_FAULTS:
        faults[_MOST_FAULTS:] = [f"and {len(faults) - _MOST_FAULTS} more"]
    if faults:
        raise CohortError(source, faults)
    return rows


def _rows(
    open_table: Callable[[], Table], faults: list[str], window: DateWindow | None
) -> Iterator[CohortRow]:
    try:
        table = open_table()
        columns = find_columns(table, faults, window)
        if faults:
            return
        take = columns.pop("Take", None)
        if "CandidateOf" not in columns:
            take = None
        else:
            table = replace(table, content=partial(_without_apostrophe, table.content))
            columns = {name: index for name, index in columns.items() if name in IDENTIFIERS}
        for line, cells in _marked_records(table, take, faults):
            row = _row(table, columns, line, cells, faults)
            if row is not None and window is not None:
                row = _within(window, row, faults)
            if row is not None:
                yield row
    except UnreadableFile as unreadable:
        faults.append(str(unreadable))


def _marked_records(
    table: Table, take: int | None, faults: list[str]
) -> Iterator[tuple[int, Sequence[object]]]:
    """Records that a person has marked in the column Take; all where there is no such column."""
    if take is None:
        yield from table.records
        return
    found = False
    for line, cells in table.records:
        if _is_marked(table, line, cells, take, faults):
            found = True
            yield line, cells
    if not found and not faults:
        faults.append(
            "no candidate is marked; write x into the column Take of those that are wanted, "
            "or delete the lines of all others and the column Take"
        )


def _is_marked(
    table: Table, line: int, cells: Sequence[object], index: int, faults: list[str]
) -> bool:
    """Whether a person has marked a candidate as wanted."""
    try:
        mark = table.content(cells[index]) if index < len(cells) else None
    except UnfitCell:
        mark = "neither"
    mark = str(mark or "").strip(BLANKS).casefold()
    if mark and mark not in _TAKEN | _LEFT:
        faults.append(f'line {line}, column "Take": is neither x nor empty; write one of them')
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


def _within(window: DateWindow, row: CohortRow, faults: list[str]) -> CohortRow | None:
    """The row, for the days around the one that was read as its study date."""
    day = None if row.study_date is None else row.study_date.first
    if day is None:
        faults.append(f"line {row.line}: no date to lay the window around; {DAY_FORMS}")
        return None
    try:
        days = DateRange(
            day - timedelta(days=window.days_before), day + timedelta(days=window.days_after)
        )
    except OverflowError:
        faults.append(f"line {row.line}: the window reaches beyond the calendar; check its date")
        return None
    return replace(row, study_date=days)


def _open(path: Path, window: DateWindow | None) -> Table:
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
    except Exception:  # see _open
        where = f"after line {line}" if line else "below the header"
        raise UnreadableFile(
            f"{where}: the file is damaged, rows from here on were not read; save it again"
        ) from None


def _row(
    table: Table,
    columns: dict[str, int],
    line: int,
    cells: Sequence[object],
    faults: list[str],
) -> CohortRow | None:
    """Row of a record, or None after its faults were appended."""
    if table.every_field_written and _is_torn(table, columns, cells):
        faults.append(
            f"line {line}: has {len(cells)} fields where the header has {len(table.header)}; "
            "look for a missing or extra separator or a line break, and put texts that hold "
            "the separator in double quotes"
        )
        return None
    values, unfit = _values(table, columns, line, cells, faults)
    if IDENTIFIERS.isdisjoint(values) and IDENTIFIERS.isdisjoint(unfit):
        faults.append(
            f"line {line}: no key; give PatientID, AccessionNumber or StudyInstanceUID "
            "(date, modality and description only narrow what these find)"
        )
        return None
    try:
        study_date = _study_date(values)
    except UnfitCell as fault:
        faults.append(f"line {line}: {fault}")
        return None
    if unfit:
        return None
    return CohortRow(
        line=line,
        patient_id=_text(values, "PatientID"),
        accession_number=_text(values, "AccessionNumber"),
        study_instance_uid=_text(values, "StudyInstanceUID"),
        study_date=study_date,
        modality=_text(values, "Modality"),
        study_description=_text(values, "StudyDescription"),
        patient_name=_text(values, "PatientName"),
        patient_birth_date=_day(values, "PatientBirthDate"),
        issuer_of_patient_id=_text(values, "IssuerOfPatientID"),
        other_patient_id=_text(values, "OtherPatientID"),
    )


def _is_torn(table: Table, columns: dict[str, int], cells: Sequence[object]) -> bool:
    """Whether a line is torn or shifted: it would lose an identifier or filter, and select more."""
    if len(cells) == len(table.header):
        return False
    surplus = any(str(cell).strip(BLANKS) for cell in cells[len(table.header) :])
    return surplus or any(index >= len(cells) for index in columns.values())


def _values(
    table: Table,
    columns: dict[str, int],
    line: int,
    cells: Sequence[object],
    faults: list[str],
) -> tuple[dict[str, object], set[str]]:
    """Values of a record by their meaning, and the meanings whose cell is unfit."""
    values: dict[str, object] = {}
    unfit: set[str] = set()
    for meaning, index in columns.items():
        try:
            content = table.content(cells[index]) if index < len(cells) else None
            if isinstance(content, str):
                content = content.strip(BLANKS)
            if content is not None and content != "":
                values[meaning] = CELL_READERS[meaning](content)
        except UnfitCell as fault:
            # A known name is one of ours and cannot be patient data.
            label = " ".join(str(table.header[index]).strip(BLANKS).split())
            faults.append(f'line {line}, column "{label}": {fault}')
            unfit.add(meaning)
    return values, unfit


def _study_date(values: dict[str, object]) -> DateRange | None:
    """Days of a record, of one column or of the two for the ends of a range."""
    if "StudyDateFrom" in values or "StudyDateTo" in values:
        return days_between(_day(values, "StudyDateFrom"), _day(values, "StudyDateTo"))
    days = values.get("StudyDate", values.get(WINDOW_DATE))
    return days if isinstance(days, DateRange) else None


def _text(values: dict[str, object], meaning: str) -> str | None:
    value = values.get(meaning)
    return value if isinstance(value, str) else None


def _day(values: dict[str, object], meaning: str) -> date | None:
    value = values.get(meaning)
    return value if isinstance(value, date) else None
