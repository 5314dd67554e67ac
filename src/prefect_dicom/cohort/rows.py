"""The cohort file: CSV, Excel or Parquet in, rows or a complete list of complaints out.

Everything is read as text, so that leading zeros live, and nothing is repaired: what could make
a query select more than the person meant (a wildcard, a torn line, a number Excel has rounded)
is a fault with its line, its column and its remedy. Faults never repeat a cell's content, which
may be patient data; they reach logs.

Excel is read through openpyxl, pandas' own engine, which shows formulas and number formats where
a data frame has lost them, and Parquet through pandas. CSV is split by the standard library's
csv module: ``pandas.read_csv`` silently fills short lines up and drops a stray quote, and it
numbers records where complaints need the lines of the file.

PatientName and PatientBirthDate identify nobody; what a row finds is compared with them.
A table with a column CandidateOf is one of ours, of near misses: there only identifiers count, an
apostrophe at their beginning does not, and where there is a column Take only what it marks.

The standard's own terms: PatientID and StudyDescription are LO (64 characters), AccessionNumber
is SH (16), StudyDate is DA, Modality is CS, PS3.5 6.2. The matching rules that make an
identifier safe to query by are in PS3.4 C.2.2.2.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import stat
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from prefect_dicom.core.errors import CohortError
from prefect_dicom.core.model import CohortRow, DateRange, Excluded
from prefect_dicom.core.uids import is_uid

if TYPE_CHECKING:
    from openpyxl.cell.read_only import ReadOnlyCell
    from openpyxl.worksheet._read_only import ReadOnlyWorksheet

_IDENTIFIERS = frozenset({"PatientID", "AccessionNumber", "StudyInstanceUID"})
_STUDY_DATES = frozenset({"StudyDate", "StudyDateFrom", "StudyDateTo"})
_AROUND = "around"
"""What the column means that a window is laid around."""

_NAMES = {
    "PatientID": "patientid patient mrn 0010,0020",
    "AccessionNumber": "accessionnumber accession acc 0008,0050",
    "StudyInstanceUID": "studyinstanceuid studyuid uid 0020,000d",
    "StudyDate": "studydate date 0008,0020",
    "StudyDateFrom": "studydatefrom datefrom from start",
    "StudyDateTo": "studydateto dateto to end",
    "Modality": "modality modalitiesinstudy 0008,0060 0008,0061",
    "StudyDescription": "studydescription description 0008,1030",
    "PatientName": "patientname 0010,0010",
    "PatientBirthDate": "patientbirthdate birthdate 0010,0030",
    "CandidateOf": "candidateof",
    "Take": "take",
}
_MEANINGS = {name: meaning for meaning, names in _NAMES.items() for name in names.split()}
_TAKEN = frozenset(["x", "yes", "y", "1", "true", "take"])
_LEFT = frozenset(["no", "n", "0", "false", "-"])
_TAG = re.compile(r"\(?([0-9a-f]{4},[0-9a-f]{4})\)?")

_BLANKS = " \t\r\n\N{NO-BREAK SPACE}\N{ZERO WIDTH NO-BREAK SPACE}"
_ROUNDED = re.compile(r"[0-9][.,][0-9]+E\+[0-9]+", re.IGNORECASE)
_FORMULA = re.compile(r'=".*"', re.DOTALL)
_CODE = re.compile(r"[A-Za-z0-9_ ]{1,16}")

_BASIC_DAY = re.compile(r"([0-9]{4})([0-9]{2})([0-9]{2})")
# Spreadsheets and data frames write a day as its midnight.
_ISO_DAY = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})(?:[ T]00:00(?::00(?:\.0+)?)?)?")
_REGIONAL_DAY = re.compile(r"[0-9]{1,2}[./-][0-9]{1,2}[./-](?:[0-9]{2}|[0-9]{4})")
_BASIC_RANGE = re.compile(r"([0-9]{8})? ?- ?([0-9]{8})?")
_DAY_FORMS = "write 20240131 or 2024-01-31"

_INVISIBLE = (
    "holds a control character, line break or invisible character; delete the cell and type the "
    "value anew"
)

_MOST_FAULTS = 200
_LARGEST_FILE = 256 * 1024**2
_MOST_EXCEL_ROWS = 1_048_576
# How Excel writes a character XML cannot hold, ECMA-376 part 1, 22.9.2.19.
_EXCEL_ESCAPE = re.compile(r"_x[0-9A-Fa-f]{4}_")
# openpyxl does not find the sheets of the strict form.
_SAVE_AS_XLSX = "save it again as Excel workbook (.xlsx), not as Strict Open XML"
# What Excel and floating point keep of a number.
_EXACT_DIGITS = 15
# Formats under which Excel shows an integer as its digits; zeros alone pad with zeros.
_ZEROS = re.compile(r"0+")
_DIGITS_SHOWN = re.compile(r"General|@|#+|[#,]*0(?:\.0+)?")


class _Unfit(Exception):
    """Content that cannot be taken: what was found, what to do; never the content itself."""


class _Unreadable(Exception):
    """The file, or the rest of it, cannot be read."""


@dataclass(frozen=True, slots=True)
class Window:
    """The days around a date that a list has in a column: what a study's date has to be in.

    ``around`` is the column's name, whatever its case, blanks and underscores.
    """

    around: str
    days_before: int
    days_after: int


@dataclass(frozen=True, slots=True)
class _Table:
    """A file as its reader hands it over: header, records with their lines, cells still raw."""

    line: int
    header: Sequence[object]
    records: Iterator[tuple[int, Sequence[object]]]
    content: Callable[[object], str | date | None]
    """Turns a raw cell into text or a day; raises _Unfit. Called for known columns only."""
    every_field_written: bool
    """A record with fewer fields than the header is torn (CSV), not merely empty at its end."""


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


def read_cohort(path: Path, window: Window | None = None) -> list[CohortRow]:
    """Read a cohort file, or a table of candidates that a person has marked.

    The kind of file is recognised by its first bytes. The first line that is not blank is the
    header. Columns go by their DICOM keyword, tag or plain name, whatever their case, blanks
    and underscores; columns with other names are ignored.

    Parameters
    ----------
    path : Path
        CSV (UTF-8, or UTF-16 with a byte order mark; comma, semicolon or tab), XLSX or Parquet.
    window : Window, optional
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
    return _read(path, window, least=1)


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
        for row in _read(path, None, least=0)
    ]


def _read(path: Path, window: Window | None, least: int) -> list[CohortRow]:
    faults: list[str] = []
    # Warnings of openpyxl repeat what a cell holds.
    with warnings.catch_warnings(action="ignore"):
        rows = list(_rows(path, faults, window))
    if len(rows) < least and not faults:
        faults.append("holds no rows below the header; write one study or patient in each line")
    if len(faults) > _MOST_FAULTS:
        faults[_MOST_FAULTS:] = [f"and {len(faults) - _MOST_FAULTS} more"]
    if faults:
        raise CohortError(path.name, faults)
    return rows


def _rows(path: Path, faults: list[str], window: Window | None) -> Iterator[CohortRow]:
    try:
        table = _open(path, window)
        columns = _columns(table, faults, window)
        if faults:
            return
        marks = None
        if "CandidateOf" in columns:
            marks = columns.get("Take")
            table = replace(table, content=partial(_without_apostrophe, table.content))
            columns = {name: index for name, index in columns.items() if name in _IDENTIFIERS}
        columns.pop("Take", None)
        marked = marks is None
        for line, cells in table.records:
            if marks is not None and not _is_marked(table, line, cells, marks, faults):
                continue
            marked = True
            row = _row(table, columns, line, cells, faults)
            if row is None:
                continue
            if window is not None:
                row = _within(window, row, faults)
            if row is not None:
                yield row
        if not marked and not faults:
            faults.append(
                "no candidate is marked; write x into the column Take of those that are wanted, "
                "or delete the lines of all others and the column Take"
            )
    except _Unreadable as unreadable:
        faults.append(str(unreadable))


def _is_marked(
    table: _Table, line: int, cells: Sequence[object], index: int, faults: list[str]
) -> bool:
    """Whether a person has marked a candidate as wanted."""
    try:
        mark = table.content(cells[index]) if index < len(cells) else None
    except _Unfit:
        mark = "neither"
    mark = str(mark or "").strip(_BLANKS).casefold()
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
    if text.strip(_BLANKS) != text.strip(" "):
        raise _Unfit(_INVISIBLE)
    return text


def _within(window: Window, row: CohortRow, faults: list[str]) -> CohortRow | None:
    """The row, for the days around the one that was read as its study date."""
    if row.study_date is None:
        faults.append(f"line {row.line}: no date to lay the window around; {_DAY_FORMS}")
        return None
    day = row.study_date.first
    try:
        days = DateRange(
            day - timedelta(days=window.days_before), day + timedelta(days=window.days_after)
        )
    except OverflowError:
        faults.append(f"line {row.line}: the window reaches beyond the calendar; check its date")
        return None
    return replace(row, study_date=days)


def _open(path: Path, window: Window | None) -> _Table:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _Unreadable("is no file but a folder or a device; give the path of a list")
        _refuse_larger(status.st_size)
        data = path.read_bytes()
    except FileNotFoundError:
        raise _Unreadable("does not exist; check the path") from None
    except OSError as error:
        raise _Unreadable(
            f"cannot be opened ({type(error).__name__}); check path and permissions"
        ) from None
    suffix = path.suffix.lower()
    for beginning, kind, reader, remedy in (
        (b"PK\x03\x04", "an Excel workbook", _excel, _SAVE_AS_XLSX),
        (b"PAR1", "a Parquet file", partial(_parquet, window=window), "write it again"),
    ):
        if data.startswith(beginning):
            try:
                table = reader(data)
            except _Unreadable:
                raise
            except Exception:  # a damaged file makes the libraries raise whatever it comes to
                raise _Unreadable(f"is not {kind} that can be read; {remedy}") from None
            return replace(table, records=_until_damage(table.records))
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise _Unreadable(
            "is an old Excel file (.xls) or protected by a password; save it as .xlsx without one"
        )
    if suffix in (".xlsx", ".xlsm", ".parquet"):
        raise _Unreadable(f"is called {suffix} and is none; export it again")
    return _csv(data)


def _refuse_larger(size: int) -> None:
    if size > _LARGEST_FILE:
        raise _Unreadable(
            f"is larger than {_LARGEST_FILE // 1024**2} MiB (without compression); a cohort holds "
            "identifiers only: remove other columns or split the file"
        )


def _until_damage(
    records: Iterator[tuple[int, Sequence[object]]],
) -> Iterator[tuple[int, Sequence[object]]]:
    line = 0
    try:
        for line, cells in records:
            yield line, cells
    except Exception:  # see _open
        where = f"after line {line}" if line else "below the header"
        raise _Unreadable(
            f"{where}: the file is damaged, rows from here on were not read; save it again"
        ) from None


# --- header ---------------------------------------------------------------------------------


def _meaning(header: object) -> str | None:
    """What a column's name stands for, or None for a column of no interest."""
    if not isinstance(header, str):
        return None
    name = _folded(header)
    tag = _TAG.fullmatch(name)
    return _MEANINGS.get(tag[1] if tag else name)


def _folded(name: str) -> str:
    return re.sub(r"[\s_]", "", name.strip(_BLANKS)).casefold()


def _is_around(window: Window | None, header: object) -> bool:
    """Whether this is the column that the window is laid around."""
    return (
        window is not None and isinstance(header, str) and _folded(header) == _folded(window.around)
    )


def _is_header(cells: Sequence[object]) -> bool:
    return any(_meaning(cell) in _IDENTIFIERS for cell in cells)


def _columns(table: _Table, faults: list[str], window: Window | None) -> dict[str, int]:
    """Where each meaning stands, as an index into the cells of a record.

    The date that a window is laid around is read as a StudyDate of one day.
    """
    columns: dict[str, int] = {}
    where = f"line {table.line}"
    if window is not None:
        around = [n for n, header in enumerate(table.header) if _is_around(window, header)]
        if len(around) != 1:
            faults.append(
                f"{where}: {'several columns have' if around else 'no column has'} the name that "
                "the window is laid around; name one of the list's columns"
            )
        elif any(
            _meaning(header) in _STUDY_DATES and index not in around
            for index, header in enumerate(table.header)
        ):
            faults.append(
                f"{where}: a window is laid around one column, and another limits the study's "
                "date as well; keep one of them"
            )
        else:
            columns[_AROUND] = around[0]
    for index, header in enumerate(table.header):
        meaning = _meaning(header)
        if meaning is None or index == columns.get(_AROUND):
            continue
        if meaning in columns:
            faults.append(
                f"{where}: columns {columns[meaning] + 1} and {index + 1} both mean "
                f"{meaning}; keep one of them"
            )
        else:
            columns[meaning] = index
    if "StudyDate" in columns and columns.keys() & {"StudyDateFrom", "StudyDateTo"}:
        faults.append(
            f"{where}: both StudyDate and a column for one end of a range are there; keep either "
            "StudyDate or the pair StudyDateFrom and StudyDateTo"
        )
    if _IDENTIFIERS.isdisjoint(columns):
        faults.append(
            f"{where}: no column that identifies patients or studies; expected is a header line "
            "with at least one of PatientID, AccessionNumber and StudyInstanceUID (columns "
            "separated by comma, semicolon or tab)"
        )
    return columns


# --- rows -----------------------------------------------------------------------------------


def _row(
    table: _Table,
    columns: dict[str, int],
    line: int,
    cells: Sequence[object],
    faults: list[str],
) -> CohortRow | None:
    if table.every_field_written and len(cells) != len(table.header):
        # A line torn or shifted would lose an identifier or filter, and so select more.
        surplus = any(cell.strip(_BLANKS) for cell in cells[len(table.header) :])
        lost = any(index >= len(cells) for index in columns.values())
        if surplus or lost:
            faults.append(
                f"line {line}: has {len(cells)} fields where the header has {len(table.header)}; "
                "look for a missing or extra separator or a line break, and put texts that hold "
                "the separator in double quotes"
            )
            return None
    values: dict[str, object] = {}
    unfit: set[str] = set()
    for meaning, index in columns.items():
        try:
            content = table.content(cells[index]) if index < len(cells) else None
            if isinstance(content, str):
                content = content.strip(_BLANKS)
            if content is not None and content != "":
                values[meaning] = _READERS[meaning](content)
        except _Unfit as fault:
            # A known name is one of ours and cannot be patient data.
            label = " ".join(str(table.header[index]).strip(_BLANKS).split())
            faults.append(f'line {line}, column "{label}": {fault}')
            unfit.add(meaning)
    if _IDENTIFIERS.isdisjoint(values) and _IDENTIFIERS.isdisjoint(unfit):
        faults.append(
            f"line {line}: no key; give PatientID, AccessionNumber or StudyInstanceUID "
            "(date, modality and description only narrow what these find)"
        )
        return None
    study_date = values.get("StudyDate", values.get(_AROUND))
    if "StudyDateFrom" in values or "StudyDateTo" in values:
        try:
            study_date = _range(values.get("StudyDateFrom"), values.get("StudyDateTo"))
        except _Unfit as fault:
            faults.append(f"line {line}: {fault}")
            return None
    if unfit:
        return None
    return CohortRow(
        line=line,
        patient_id=values.get("PatientID"),
        accession_number=values.get("AccessionNumber"),
        study_instance_uid=values.get("StudyInstanceUID"),
        study_date=study_date,
        modality=values.get("Modality"),
        study_description=values.get("StudyDescription"),
        patient_name=values.get("PatientName"),
        patient_birth_date=values.get("PatientBirthDate"),
    )


def _identifier(content: str | date, longest: int) -> str:
    """The content as a single-value matching key of at most ``longest`` characters."""
    text = _text(content)
    if "*" in text or "?" in text:
        raise _Unfit(
            "holds a wildcard (* or ?), which would select others as well; write the exact value"
        )
    _refuse_unprintable(text)
    if len(text) > longest:
        raise _Unfit(
            f"has {len(text)} characters; DICOM allows {longest} here: check for two values in "
            "one cell, or leave it empty and give another identifier"
        )
    if _ROUNDED.fullmatch(text):
        raise _Unfit(
            "is a number a spreadsheet has rounded (its digits are lost); format the column as "
            "text before the values are entered, and export again"
        )
    if _FORMULA.fullmatch(text):
        raise _Unfit('is a spreadsheet formula (="..."); write the value alone')
    return text


def _study_uid(content: str | date) -> str:
    text = _identifier(content, longest=64)
    if not is_uid(text):
        raise _Unfit("is not a UID (digits and single dots); write the StudyInstanceUID itself")
    return text


def _modality(content: str | date) -> str:
    text = _text(content)
    if not _CODE.fullmatch(text):
        raise _Unfit("is not one modality code; write a single one such as CT, no wildcard or list")
    return text


def _description(content: str | date) -> str:
    text = _text(content)
    _refuse_unprintable(text)
    return text


def _person_name(content: str | date) -> str:
    text = _text(content)
    _refuse_unprintable(text)
    if not text.strip(" ^=*?"):
        raise _Unfit("names nobody; write the name as Family^Given, or leave it empty")
    return text


def _text(content: str | date) -> str:
    if isinstance(content, date):
        raise _Unfit("is a date; format the column as text and write the value")
    return content


def _refuse_unprintable(text: str) -> None:
    if "\\" in text:
        raise _Unfit(
            "holds a backslash, which DICOM reads as a list; write one value, one line for each"
        )
    if text.isascii() and text.isprintable():
        return
    for character in text:
        kind = unicodedata.category(character)
        if kind in ("Cc", "Cf", "Cs", "Zl", "Zp") or (kind == "Zs" and character != " "):
            raise _Unfit(_INVISIBLE)


@lru_cache(maxsize=4096)
def _day(content: str | date) -> date:
    if isinstance(content, datetime):
        return content.date()
    if isinstance(content, date):
        return content
    match = _BASIC_DAY.fullmatch(content) or _ISO_DAY.fullmatch(content)
    if match is None:
        if _REGIONAL_DAY.fullmatch(content):
            raise _Unfit(
                "is a date in a regional form, where day and month cannot be told apart; "
                + _DAY_FORMS
            )
        raise _Unfit(f"is not a date; {_DAY_FORMS}")
    try:
        return date(*(int(part) for part in match.groups()))
    except ValueError:
        raise _Unfit(f"is not a day of the calendar; {_DAY_FORMS}") from None


@lru_cache(maxsize=4096)
def _date_range(content: str | date) -> DateRange:
    """A day, or a range written as in DICOM (PS3.4 C.2.2.2.5) or as an ISO 8601 interval."""
    if isinstance(content, date):
        return _range(_day(content), _day(content))
    match = _BASIC_RANGE.fullmatch(content)
    if match is not None:
        ends = [match[1], match[2]]
    elif content.count("/") == 1:
        ends = [end.strip() for end in content.split("/")]
    else:
        ends = [content, content]
    if not any(ends):
        raise _Unfit(
            "is a range without ends; write 20240101-20240131, 20240101- or -20240131, or leave "
            "it empty"
        )
    return _range(*(_day(end) if end else None for end in ends))


def date_range(text: str) -> DateRange:
    """A day or a range of days as a cohort may write it.

    Raises
    ------
    ValueError
        Says what is wrong and what to write, without repeating the text.
    """
    try:
        return _date_range(text.strip(_BLANKS))
    except _Unfit as fault:
        raise ValueError(f"{fault}") from None


def _one_day(content: str | date) -> DateRange:
    return _range(_day(content), _day(content))


def _range(first: date | None, last: date | None) -> DateRange:
    if first is not None and last is not None and first > last:
        raise _Unfit("the date range ends before it begins; exchange its ends")
    return DateRange(first, last)


_READERS: dict[str, Callable[[str | date], object]] = {
    "PatientID": partial(_identifier, longest=64),
    "AccessionNumber": partial(_identifier, longest=16),
    "StudyInstanceUID": _study_uid,
    "StudyDate": _date_range,
    "StudyDateFrom": _day,
    "StudyDateTo": _day,
    _AROUND: _one_day,
    "Modality": _modality,
    "StudyDescription": _description,
    "PatientName": _person_name,
    "PatientBirthDate": _day,
}


# --- CSV ------------------------------------------------------------------------------------


def _csv(data: bytes) -> _Table:
    text = _decoded(data)
    best: tuple[tuple[int, int], str, int, list[str]] | None = None
    for separator in ",;\t":
        try:
            line, header = next(_csv_records(text, separator))
        except StopIteration:
            raise _Unreadable("is empty; expected is a header line and rows below it") from None
        except _Unreadable:
            continue
        score = (sum(_meaning(name) is not None for name in header), len(header))
        if best is None or score > best[0]:
            best = (score, separator, line, header)
    if best is None:
        raise _Unreadable(
            "the header line cannot be read with comma, semicolon or tab as separator; check its "
            "double quotes"
        )
    _, separator, line, header = best
    return _Table(
        line=line,
        header=header,
        records=islice(_csv_records(text, separator), 1, None),
        content=str,
        every_field_written=True,
    )


def _decoded(data: bytes) -> str:
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    encoding = "utf-16" if utf16 else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise _Unreadable(
            f"line {line}: the file is not {'UTF-16' if utf16 else 'UTF-8'} (perhaps Latin-1 or "
            'Windows-1252); save it as "CSV UTF-8"'
        ) from None
    if "\0" in text.partition("\n")[0]:
        raise _Unreadable('holds NUL characters and is not a text file; save it as "CSV UTF-8"')
    return text


def _csv_records(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Records with the line each begins in; blank lines, and empty records at the end, left out.

    Strict, because a quote that is never closed would otherwise swallow the rows after it.
    """
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=True)
    empty: list[tuple[int, list[str]]] = []
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error:
            raise _Unreadable(
                f"line {line}: a double quote is not closed, or stands inside a quoted text "
                'without being doubled (""); rows from here on were not read'
            ) from None
        if any(field.strip(_BLANKS) for field in record):
            yield from empty
            empty.clear()
            yield line, record
        elif len(record) > 1:
            # Only separators: Excel leaves such lines at the end; elsewhere a row lost its key.
            empty.append((line, record))


# --- Excel ----------------------------------------------------------------------------------


def _excel(data: bytes) -> _Table:
    # Here, as pandas below: most files are CSV, and need none of their 70 MB in every process.
    import openpyxl

    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        _refuse_larger(sum(part.file_size for part in archive.infolist()))
    workbook = openpyxl.load_workbook(io.BytesIO(data), read_only=True, keep_links=False)
    sheets = workbook.worksheets
    firsts = [next(_excel_records(sheet), None) for sheet in sheets]
    found = [n for n, first in enumerate(firsts) if first and _is_header(_texts(first[1]))]
    if len(found) > 1:
        raise _Unreadable(
            f"sheets {', '.join(str(n + 1) for n in found)} (hidden ones count) each have the "
            "header of a cohort; keep one of them in the file"
        )
    # Without one, the first sheet with anything in it takes the complaint about its header.
    found = found or [n for n, first in enumerate(firsts) if first]
    if not found:
        raise _Unreadable(
            f"is empty; expected is a header line and rows below it (if there are, {_SAVE_AS_XLSX})"
        )
    line, cells = firsts[found[0]]
    return _Table(
        line=line,
        header=_texts(cells),
        records=_excel_records(sheets[found[0]], after=line, width=len(cells)),
        content=_excel_content,
        every_field_written=False,
    )


def _texts(cells: Sequence[ReadOnlyCell]) -> list[str | None]:
    from openpyxl.utils.escape import unescape

    return [
        unescape(cell.value) if cell.data_type == "s" and cell.value else None for cell in cells
    ]


def _excel_records(
    sheet: ReadOnlyWorksheet, after: int = 0, width: int | None = None
) -> Iterator[tuple[int, Sequence[ReadOnlyCell]]]:
    """Rows that are not blank, with Excel's own row numbers; hidden and filtered ones too."""
    # What a sheet states as its size is not always true.
    sheet.reset_dimensions()
    for line, cells in enumerate(sheet.iter_rows(min_row=after + 1, max_col=width), after + 1):
        if line > _MOST_EXCEL_ROWS:
            raise ValueError("a row is where none can be")
        if any(cell.value is not None and str(cell.value).strip(_BLANKS) for cell in cells):
            yield line, cells


def _excel_content(cell: ReadOnlyCell) -> str | date | None:
    value, kind = cell.value, cell.data_type
    if value is None or isinstance(value, date):
        return value
    if kind == "f":
        raise _Unfit("holds a formula; paste the column again as values")
    if kind == "s":
        if _EXCEL_ESCAPE.search(value):
            raise _Unfit(_INVISIBLE)
        return value
    if kind != "n":
        raise _Unfit(
            "holds an error of Excel's, a truth value or a time (a fraction of a day); write the "
            "value as text"
        )
    digits = _digits(value, exact=False)
    try:
        shown = cell.number_format
    except (IndexError, TypeError):
        shown = "a format the workbook does not have"
    if _ZEROS.fullmatch(shown):
        return digits.zfill(len(shown))
    if not _DIGITS_SHOWN.fullmatch(shown):
        raise _Unfit(
            "is a number in a display format, so that what is seen is not what is stored; format "
            "the column as text and write the value"
        )
    return digits


# --- Parquet --------------------------------------------------------------------------------


def _parquet(data: bytes, window: Window | None) -> _Table:
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(io.BytesIO(data))
    _refuse_larger(
        sum(metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups))
    )
    names = metadata.schema.to_arrow_schema().names
    return _Table(
        line=1,
        header=names,
        records=_parquet_records(data, names, window),
        content=_parquet_content,
        every_field_written=False,
    )


def _parquet_records(
    data: bytes, names: Sequence[str], window: Window | None
) -> Iterator[tuple[int, Sequence[object]]]:
    import pandas

    known = [name for name in names if _meaning(name) is not None or _is_around(window, name)]
    # Arrow's types keep whole numbers whole where there are gaps between them.
    frame = pandas.read_parquet(io.BytesIO(data), columns=known, dtype_backend="pyarrow")
    # A column may have been made the index of the frame that was written.
    frame = frame.reset_index().reindex(columns=names)
    for line, row in enumerate(frame.itertuples(index=False, name=None), 2):
        yield line, [None if value is pandas.NA else value for value in row]


def _parquet_content(value: object) -> str | date | None:
    # NaN and NaT, the other forms of nothing, differ from themselves.
    if value is None or value != value:
        return None
    if isinstance(value, str | date):
        return value
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return _digits(value, exact=not isinstance(value, float))
    raise _Unfit("is neither text nor a whole number nor a date; write it as text")


# --- numbers of both ------------------------------------------------------------------------


def _digits(number: int | float | Decimal, *, exact: bool) -> str:
    """The digits of a whole number; what is not exact is good for 15 of them."""
    if number in (float("inf"), float("-inf")) or number != int(number):
        raise _Unfit("is a number with a fraction; format the column as text and write the value")
    digits = str(int(number))
    if not exact and len(digits.lstrip("-")) > _EXACT_DIGITS:
        raise _Unfit(
            f"is a number of more than {_EXACT_DIGITS} digits, of which the last are lost; format "
            "the column as text and write the value"
        )
    return digits
