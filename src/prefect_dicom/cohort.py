"""The cohort file: CSV, Excel or Parquet in, rows or a complete list of complaints out.

Everything is read as text, so that leading zeros live, and nothing is repaired: what could make
a query select more than the person meant (a wildcard, a torn line, a number Excel has rounded)
is a fault with its line, its column and its remedy. Faults never repeat a cell's content, which
may be patient data; they reach logs.

The standard's own terms: PatientID and StudyDescription are LO (64 characters), AccessionNumber
is SH (16), StudyDate is DA, Modality is CS, PS3.5 6.2. The matching rules that make an
identifier safe to query by are in PS3.4 C.2.2.2.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet

from prefect_dicom.errors import CohortError
from prefect_dicom.identifiers import is_safe_key, is_uid
from prefect_dicom.model import CohortRow, DateRange
from prefect_dicom.spreadsheet import Cell, Workbook

_IDENTIFIERS = frozenset({"PatientID", "AccessionNumber", "StudyInstanceUID"})

_NAMES = {
    "PatientID": "patientid patient mrn 0010,0020",
    "AccessionNumber": "accessionnumber accession acc 0008,0050",
    "StudyInstanceUID": "studyinstanceuid studyuid uid 0020,000d",
    "StudyDate": "studydate date 0008,0020",
    "StudyDateFrom": "studydatefrom datefrom from start",
    "StudyDateTo": "studydateto dateto to end",
    "Modality": "modality modalitiesinstudy 0008,0060 0008,0061",
    "StudyDescription": "studydescription description 0008,1030",
}
_MEANINGS = {name: meaning for meaning, names in _NAMES.items() for name in names.split()}
_TAG = re.compile(r"\(?([0-9a-f]{4},[0-9a-f]{4})\)?")

_BLANKS = " \t\r\n\N{NO-BREAK SPACE}\N{ZERO WIDTH NO-BREAK SPACE}"
# Most identifiers are settled by one look: printable ASCII without * ? and backslash, which is
# always safe to query by.
_PLAIN = re.compile(r"[ -)+->@-\[\]-~]+")
_ROUNDED = re.compile(r"[0-9][.,][0-9]+E\+[0-9]+", re.IGNORECASE)
_FORMULA = re.compile(r'=".*"', re.DOTALL)
_CODE = re.compile(r"[A-Za-z0-9_ ]{1,16}")

_BASIC_DAY = re.compile(r"([0-9]{4})([0-9]{2})([0-9]{2})")
# Spreadsheets and data frames write a day as its midnight.
_ISO_DAY = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})(?:[ T]00:00(?::00(?:\.0+)?)?)?")
_REGIONAL_DAY = re.compile(r"[0-9]{1,2}[./-][0-9]{1,2}[./-](?:[0-9]{2}|[0-9]{4})")
_BASIC_RANGE = re.compile(r"([0-9]{8})? ?- ?([0-9]{8})?")
_DAY_FORMS = "write 20240131 or 2024-01-31"

_LARGEST_FILE = 256 * 1024**2
_LARGEST_WORKBOOK = 4 * _LARGEST_FILE
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
class _Table:
    """A file as its reader hands it over: header, records with their lines, cells still raw."""

    line: int
    header: Sequence[object]
    records: Iterator[tuple[int, Sequence[object]]]
    content: Callable[[object], str | date | None]
    """Turns a raw cell into text or a day; raises _Unfit. Called for known columns only."""
    every_field_written: bool
    """A record with fewer fields than the header is torn (CSV), not merely empty at its end."""


@dataclass(frozen=True, slots=True)
class _Column:
    index: int
    label: str


def cohort_digest(path: Path) -> str:
    """SHA-256 (hex) of the cohort file's bytes: the same digest is the same cohort."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_cohort(path: Path) -> list[CohortRow]:
    """Read a cohort file.

    The kind of file is recognised by its first bytes. The first line that is not blank is the
    header. Columns go by their DICOM keyword, tag or plain name, whatever their case, blanks
    and underscores; columns with other names are ignored.

    Parameters
    ----------
    path : Path
        CSV (UTF-8, or UTF-16 with a byte order mark; comma, semicolon or tab), XLSX or Parquet.

    Returns
    -------
    list of CohortRow
        In the file's order, duplicates included. Each has a PatientID, an AccessionNumber or a
        StudyInstanceUID that is safe to query by (PS3.4 C.2.2.2). ``line`` counts lines of the
        file from 1; in Parquet the names of the columns count as line 1.

    Raises
    ------
    CohortError
        With all faults of the file; none repeats a cell's content.
    """
    faults: list[str] = []
    rows: list[CohortRow] = []
    try:
        table = _open(path)
        columns = _columns(table, faults)
        if faults:
            raise CohortError(path.name, faults)
        for line, cells in table.records:
            row = _row(table, columns, line, cells, faults)
            if row is not None:
                rows.append(row)
    except _Unreadable as unreadable:
        faults.append(str(unreadable))
    if not rows and not faults:
        faults.append("holds no rows below the header; write one study or patient in each line")
    if faults:
        raise CohortError(path.name, faults)
    return rows


def _open(path: Path) -> _Table:
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise _Unreadable(
                f"is larger than {_LARGEST_FILE // 1024**2} MiB; a cohort holds identifiers only: "
                "remove other columns or split the file"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise _Unreadable("does not exist; check the path") from None
    except OSError as error:
        raise _Unreadable(
            f"cannot be opened ({type(error).__name__}); check path and permissions"
        ) from None
    suffix = path.suffix.lower()
    if data.startswith(b"PK\x03\x04"):
        return _excel(data)
    if data.startswith(b"PAR1"):
        return _parquet(data)
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise _Unreadable(
            "is an old Excel file (.xls) or protected by a password; save it as .xlsx without one"
        )
    if suffix in (".xlsx", ".xlsm", ".parquet"):
        raise _Unreadable(f"is called {suffix} and is none; export it again")
    return _csv(data)


# --- header ---------------------------------------------------------------------------------


def _meaning(header: object) -> str | None:
    """What a column's name stands for, or None for a column of no interest."""
    if not isinstance(header, str):
        return None
    name = re.sub(r"[\s_]", "", header.strip(_BLANKS)).casefold()
    tag = _TAG.fullmatch(name)
    return _MEANINGS.get(tag[1] if tag else name)


def _is_header(cells: Sequence[object]) -> bool:
    return any(_meaning(cell) in _IDENTIFIERS for cell in cells)


def _columns(table: _Table, faults: list[str]) -> dict[str, _Column]:
    columns: dict[str, _Column] = {}
    where = f"line {table.line}"
    for index, header in enumerate(table.header):
        meaning = _meaning(header)
        if meaning is None:
            continue
        if meaning in columns:
            faults.append(
                f"{where}: columns {columns[meaning].index + 1} and {index + 1} both mean "
                f"{meaning}; keep one of them"
            )
            continue
        # A known name is one of ours and cannot be patient data.
        columns[meaning] = _Column(index, " ".join(str(header).strip(_BLANKS).split()))
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
    columns: dict[str, _Column],
    line: int,
    cells: Sequence[object],
    faults: list[str],
) -> CohortRow | None:
    if table.every_field_written and len(cells) != len(table.header):
        # A line torn or shifted would lose an identifier or filter, and so select more.
        surplus = any(cell.strip(_BLANKS) for cell in cells[len(table.header) :])
        lost = any(column.index >= len(cells) for column in columns.values())
        if surplus or lost:
            faults.append(
                f"line {line}: has {len(cells)} fields where the header has {len(table.header)}; "
                "look for a missing or extra separator or a line break, and put texts that hold "
                "the separator in double quotes"
            )
            return None
    values: dict[str, object] = {}
    unfit: set[str] = set()
    for meaning, column in columns.items():
        try:
            content = table.content(cells[column.index]) if column.index < len(cells) else None
            if isinstance(content, str):
                content = content.strip(_BLANKS)
            if content is not None and content != "":
                values[meaning] = _READERS[meaning](content)
        except _Unfit as fault:
            faults.append(f'line {line}, column "{column.label}": {fault}')
            unfit.add(meaning)
    if _IDENTIFIERS.isdisjoint(values) and _IDENTIFIERS.isdisjoint(unfit):
        faults.append(
            f"line {line}: no key; give PatientID, AccessionNumber or StudyInstanceUID "
            "(date, modality and description only narrow what these find)"
        )
        return None
    study_date = values.get("StudyDate")
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
    )


def _identifier(content: str | date, longest: int) -> str:
    """The content as a single-value matching key of at most ``longest`` characters."""
    text = _text(content)
    if not _PLAIN.fullmatch(text):
        if "*" in text or "?" in text:
            raise _Unfit(
                "holds a wildcard (* or ?), which would select others as well; write the exact "
                "value"
            )
        _refuse_unprintable(text)
        if not is_safe_key(text):
            raise _Unfit("cannot be queried by; write the exact value")
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
            raise _Unfit(
                "holds a control character, line break or invisible character; delete the cell "
                "and type the value anew"
            )


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
    "Modality": _modality,
    "StudyDescription": _description,
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
    try:
        workbook = Workbook.open(data, most_bytes=_LARGEST_WORKBOOK)
    except Exception:  # whatever a damaged zip or XML comes to, see spreadsheet
        raise _Unreadable(
            "is not an Excel workbook that can be read; save it again as .xlsx"
        ) from None
    firsts = [next(_excel_records(workbook, sheet), None) for sheet in workbook.sheets]
    found = [n for n, first in enumerate(firsts) if first and _is_header(_texts(first[1]))]
    if len(found) > 1:
        raise _Unreadable(
            f"sheets {', '.join(str(n + 1) for n in found)} (hidden ones count) each have the "
            "header of a cohort; keep one of them in the file"
        )
    # Without one, the first sheet with anything in it takes the complaint about its header.
    found = found or [n for n, first in enumerate(firsts) if first]
    if not found:
        raise _Unreadable("is empty; expected is a header line and rows below it")
    line, cells = firsts[found[0]]
    return _Table(
        line=line,
        header=_texts(cells),
        records=islice(_excel_records(workbook, workbook.sheets[found[0]]), 1, None),
        content=partial(_excel_content, workbook),
        every_field_written=False,
    )


def _texts(cells: Sequence[Cell | None]) -> list[str | None]:
    return [cell.text if cell is not None and cell.kind == "text" else None for cell in cells]


def _excel_records(workbook: Workbook, sheet: str) -> Iterator[tuple[int, list[Cell | None]]]:
    """Rows that are not blank, with Excel's own row numbers."""
    line = 0
    try:
        for line, cells in workbook.rows(sheet):
            if any(c is not None and (c.kind == "formula" or c.text.strip(_BLANKS)) for c in cells):
                yield line, cells
    except Exception:  # see _excel
        raise _Unreadable(
            f"after line {line}: the workbook is damaged, rows from here on were not read; save "
            "it again as .xlsx"
        ) from None


def _excel_content(workbook: Workbook, cell: Cell | None) -> str | date | None:
    if cell is None:
        return None
    if cell.kind == "text":
        return cell.text
    if cell.kind == "formula":
        raise _Unfit("holds a formula; paste the column again as values")
    if cell.kind not in ("number", "day"):
        raise _Unfit("holds an error of Excel's or a truth value; write the value as text")
    try:
        day = workbook.day(cell)
        number = float(cell.text) if day is None else None
    except (ValueError, OverflowError):
        raise _Unfit("is a date or number that cannot be read; write it as text") from None
    if day is not None:
        return day
    digits = _digits(number)
    shown = workbook.number_format(cell)
    if _ZEROS.fullmatch(shown):
        return digits.zfill(len(shown))
    if not _DIGITS_SHOWN.fullmatch(shown):
        raise _Unfit(
            "is a number in a display format, so that what is seen is not what is stored; format "
            "the column as text and write the value"
        )
    return digits


# --- Parquet --------------------------------------------------------------------------------


def _parquet(data: bytes) -> _Table:
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        names = file.schema_arrow.names
    except Exception:  # pyarrow raises its own, OSError and Unicode errors on damaged files
        raise _Unreadable("is not a Parquet file that can be read; write it again") from None
    return _Table(
        line=1,
        header=names,
        records=_parquet_records(file, names),
        content=_parquet_content,
        every_field_written=False,
    )


def _parquet_records(
    file: pyarrow.parquet.ParquetFile, names: Sequence[str]
) -> Iterator[tuple[int, Sequence[object]]]:
    known = [name for name in names if _meaning(name) is not None]
    line = 1
    try:
        for batch in file.iter_batches(batch_size=10_000, columns=known):
            cells = {name: batch.column(name).to_pylist() for name in known}
            nothing = [None] * batch.num_rows
            for record in zip(*(cells.get(name, nothing) for name in names), strict=True):
                line += 1
                yield line, record
    except Exception:  # see _parquet
        raise _Unreadable(
            f"line {line + 1}: the file is damaged here, rows from here on were not read; write "
            "it again"
        ) from None


def _parquet_content(value: object) -> str | date | None:
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        # A column of integers with gaps becomes floating point in a data frame, the gaps NaN.
        return None if value != value else _digits(value)
    return _plain_content(value)


# --- cells of both --------------------------------------------------------------------------


def _plain_content(value: object) -> str | date | None:
    if value is None or isinstance(value, str | date):
        return value
    raise _Unfit("is neither text nor a whole number nor a date; write it as text")


def _digits(number: int | float | Decimal) -> str:
    """The digits of a whole number, if its kind can hold them exactly."""
    if number != number or number in (float("inf"), float("-inf")) or number != int(number):
        raise _Unfit("is a number with a fraction; format the column as text and write the value")
    digits = str(int(number))
    if isinstance(number, float) and len(digits.lstrip("-")) > _EXACT_DIGITS:
        raise _Unfit(
            f"is a number of more than {_EXACT_DIGITS} digits, of which the last are lost; format "
            "the column as text and write the value"
        )
    return digits
