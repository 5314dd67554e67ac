"""The cohort file: CSV, Excel or Parquet in, rows or a complete list of faults out.

Everything is read as text, so that leading zeros live, and nothing is repaired: what could make
a query select more than the person meant (a wildcard, a torn line, a number Excel has rounded)
is a fault with its line, its column and its remedy. Faults never repeat a cell's content, which
may be patient data; they reach logs.

PatientName and PatientBirthDate identify nobody; what a row finds is compared with them.

Nothing is dropped in silence either: a column is taken, refused or named as ignored, rows that a
workbook hides are asked about, and a line with a fault refuses the list or is set apart with it.

The standard's own terms: PatientID and StudyDescription are LO (64 characters), AccessionNumber
is SH (16, of which hospitals and their PACS take no notice), StudyDate is DA, Modality is CS,
PS3.5 6.2. The matching rules that make an identifier safe to query by are in PS3.4 C.2.2.2.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from functools import partial
from pathlib import Path

from prefect_dicom.cohort.altered_values import Exponents, refuse_altered
from prefect_dicom.cohort.candidates import is_table_of_candidates, table_of_candidates
from prefect_dicom.cohort.cells import CELL_READERS, DAY_FORMS, days_between, refuse_formula
from prefect_dicom.cohort.columns import IDENTIFIERS, WINDOW_DATE, find_columns, meaning_of
from prefect_dicom.cohort.list_faults import ListFaults
from prefect_dicom.cohort.list_file import open_list
from prefect_dicom.cohort.list_options import NO_CHOICES, ListOptions
from prefect_dicom.cohort.modalities import is_defined
from prefect_dicom.cohort.row_choices import RowChoices
from prefect_dicom.cohort.table import BLANKS, DateWindow, Table, UnfitCell, UnreadableFile
from prefect_dicom.core.errors import CohortError
from prefect_dicom.core.model import CohortRow, DateRange, Excluded, FaultyLine

_LINES_NAMED = 5
_SECOND_HEADER = (
    "line {line}: is a header line, and the list has one above; keep one, with the names of all "
    "columns in it, and only lines of the same columns below"
)


@dataclass(frozen=True, slots=True)
class CohortList:
    """What a list holds."""

    rows: list[CohortRow]
    """In the order of the list."""
    faulty: tuple[FaultyLine, ...] = ()
    """Lines that were set apart, by line."""
    notes: tuple[str, ...] = ()
    """What was not taken of the list, in words that repeat no cell."""
    is_of_candidates: bool = False
    """Its identifiers are those that a PACS has answered, however they look."""


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
    """Read the rows of a list that leaves no choice; see :func:`read_list`."""
    return read_list(path, window).rows


def read_list(
    path: Path, window: DateWindow | None = None, options: ListOptions = NO_CHOICES
) -> CohortList:
    """Read a cohort file, or a table of candidates that a person has marked.

    The kind of file is recognised by its first bytes. The first line that is not blank is the
    header. Columns go by their DICOM keyword, tag or plain name, whatever their case, blanks
    and underscores. Columns with other names are ignored and named, unless they look like an
    identifier or a filter: that is a fault.

    Parameters
    ----------
    path : Path
        CSV (UTF-8, or UTF-16 with a byte order mark; comma, semicolon or tab), XLSX or Parquet.
    window : DateWindow, optional
        Takes the place of a column StudyDate: each row is for studies of these days only.
    options : ListOptions
        What a person has chosen for rows that are hidden, and for faulty lines.

    Returns
    -------
    CohortList
        Rows in the file's order, duplicates included. Each has a PatientID, an AccessionNumber or
        a StudyInstanceUID that is safe to query by (PS3.4 C.2.2.2). ``line`` counts lines of the
        file from 1; in Parquet the names of the columns count as line 1.

    Raises
    ------
    CohortError
        With the faults of the file, the first 200 of them and the number of the others; none
        repeats a cell's content.
    """
    return _ListReader(window, options).read(path.name, partial(open_list, path, window), least=1)


def read_table(source: str, open_table: Callable[[], Table]) -> CohortList:
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
        As :func:`read_list`.
    """
    return _ListReader(None, NO_CHOICES).read(source, open_table, least=1)


def read_excluded(path: Path, options: ListOptions = NO_CHOICES) -> list[Excluded]:
    """Read a list of what is not wanted: the identifiers of a cohort list, which may be empty.

    Its other columns narrow nothing, so that a row that gives a patient and a date of studies is a
    fault. Faulty lines are never set apart: what they exclude would be taken.

    Raises
    ------
    CohortError
        As :func:`read_list`.
    """
    reader = _ListReader(None, ListOptions(options.hidden_rows), excludes=True)
    rows = reader.read(path.name, partial(open_list, path, None), least=0).rows
    return [Excluded(row.patient_id, row.accession_number, row.study_instance_uid) for row in rows]


@dataclass(slots=True)
class _ListReader:
    """The reading of one list."""

    window: DateWindow | None
    options: ListOptions
    excludes: bool = False
    """It is a list of what is not wanted."""
    faults: ListFaults = field(default_factory=ListFaults)
    notes: list[str] = field(default_factory=list)
    columns: dict[str, int] = field(default_factory=dict)
    exact: bool = False
    """Identifiers are those that a PACS has answered."""
    exponents: Exponents = field(default_factory=Exponents)
    choices: RowChoices = field(default_factory=lambda: RowChoices(()))
    private_modalities: list[int] = field(default_factory=list)
    """Lines with a modality that DICOM does not define."""
    with_values_unnamed: set[int] = field(default_factory=set)
    records: int = 0
    hidden: int = 0

    def read(self, source: str, open_table: Callable[[], Table], least: int) -> CohortList:
        """Read all of it, or raise its faults."""
        # Warnings of openpyxl repeat what a cell holds.
        with warnings.catch_warnings(action="ignore"):
            rows = self._rows(open_table)
        faults = self.faults
        if len(rows) < least and not faults and not self.hidden:
            faults.whole.append(
                "holds no rows below the header; write one study or patient in each line"
            )
        elif len(rows) < least and not faults:
            faults.whole.append("holds no rows but hidden ones, and these are to be left out")
        if faults.whole or (faults and (not self.options.sets_apart or not rows)):
            raise CohortError(source, faults.first)
        apart = tuple(FaultyLine(n, tuple(faults.by_line[n])) for n in sorted(faults.by_line))
        self._note_ends(len(apart))
        return CohortList(rows, apart, tuple(self.notes), self.exact)

    def _rows(self, open_table: Callable[[], Table]) -> list[CohortRow]:
        rows: list[CohortRow] = []
        table: Table | None = None
        try:
            table = open_table()
            found = find_columns(table, self.faults.whole, self.window)
            if self.faults:
                return []
            self.columns = found.taken
            if is_table_of_candidates(found.taken):
                self.exact = True
                table, self.columns = table_of_candidates(table, found.taken, self.faults)
            elif not self.excludes:
                self.choices = RowChoices(table.header)
            if found.ignored and not self.exact:
                self.notes.append(f"columns that are ignored: {', '.join(found.ignored)}")
            if table.ignored_sheets:
                numbers = ", ".join(map(str, table.ignored_sheets))
                self.notes.append(
                    f"sheets without the header of a cohort, ignored: number {numbers}"
                )
            rows += self._rows_of_records(table, found.unnamed)
        except UnreadableFile as unreadable:
            self.faults.whole.append(str(unreadable))
        if table is not None:
            self._judge_exponents(table)
        for line, column, fault in self.choices.faults():
            self.faults.of_line(line, fault, column)
        if self.hidden and self.options.hidden_rows is None:
            self.faults.whole.append(
                f"{self.hidden} of {self.records} rows are hidden (by a filter, by hand, in a "
                "group or on a hidden sheet), and whether they are wanted cannot be known; choose "
                "with `--hidden-rows take` or `--hidden-rows leave-out` (in a definition and in "
                "Python: `hidden_rows`)"
            )
        return [row for row in rows if row.line not in self.faults.by_line]

    def _rows_of_records(self, table: Table, unnamed: Sequence[int]) -> Iterator[CohortRow]:
        for line, cells in table.records:
            self.records += 1
            if table.is_hidden(line):
                self.hidden += 1
                if self.options.hidden_rows == "leave-out":
                    continue
            if not self.exact and _is_header_again(table, self.columns, cells):
                self.faults.whole.append(_SECOND_HEADER.format(line=line))
                continue
            self.choices.look(line, cells)
            self._look_for_values(cells, (*unnamed, *range(len(table.header), len(cells))))
            row = self._row(table, line, cells)
            if row is not None and self.window is not None:
                row = self._within(self.window, row)
            if row is not None:
                yield row

    def _look_for_values(self, cells: Sequence[object], unnamed: Sequence[int]) -> None:
        """Remember which columns without a name have values."""
        if not self.with_values_unnamed.issuperset(unnamed):
            self.with_values_unnamed.update(n for n in unnamed if _is_written(cells, n))

    def _row(self, table: Table, line: int, cells: Sequence[object]) -> CohortRow | None:
        """Row of a record, or None after its faults were noted."""
        if table.every_field_written and _is_torn(table, self.columns, cells):
            self.faults.of_line(
                line,
                f"has {len(cells)} fields where the header has {len(table.header)}; "
                "look for a missing or extra separator or a line break, and put texts that hold "
                "the separator in double quotes",
            )
            return None
        values, unfit = self._values(table, line, cells)
        if IDENTIFIERS.isdisjoint(values) and IDENTIFIERS.isdisjoint(unfit):
            self.faults.of_line(
                line,
                "no key; give PatientID, AccessionNumber or StudyInstanceUID "
                "(date, modality and description only narrow what these find)",
            )
            return None
        try:
            study_date = _study_date(values)
        except UnfitCell as fault:
            self.faults.of_line(line, str(fault))
            return None
        if unfit:
            return None
        row = CohortRow(
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
        if row.modality is not None and not is_defined(row.modality):
            self.private_modalities.append(line)
        if self.excludes and _excludes_more_than_it_says(row):
            self.faults.of_line(
                line,
                "gives a patient with a date, modality, description or issuer, and "
                "would leave out all studies under the PatientID; give AccessionNumber or "
                "StudyInstanceUID, or leave these cells empty",
            )
        return row

    def _values(
        self, table: Table, line: int, cells: Sequence[object]
    ) -> tuple[dict[str, object], set[str]]:
        """Values of a record by their meaning, and the meanings whose cell is unfit."""
        values: dict[str, object] = {}
        unfit: set[str] = set()
        for meaning, index in self.columns.items():
            try:
                content = table.content(cells[index]) if index < len(cells) else None
                if isinstance(content, str):
                    content = content.strip(BLANKS)
                    if content and not self.exact:
                        refuse_altered(meaning, content)
                        if meaning in IDENTIFIERS:
                            refuse_formula(content)
                if content is None or content == "":
                    continue
                values[meaning] = CELL_READERS[meaning](content)
            except UnfitCell as fault:
                self._fault_of_cell(table, meaning, line, str(fault))
                unfit.add(meaning)
                continue
            if meaning in IDENTIFIERS and isinstance(content, str) and not self.exact:
                self.exponents.add(meaning, line, content)
        return values, unfit

    def _fault_of_cell(self, table: Table, meaning: str, line: int, fault: str) -> None:
        # A known name is one of ours and cannot be patient data.
        label = " ".join(str(table.header[self.columns[meaning]]).strip(BLANKS).split())
        self.faults.of_line(line, fault, label)

    def _judge_exponents(self, table: Table) -> None:
        for meaning, line, fault in self.exponents.faults():
            self._fault_of_cell(table, meaning, line, fault)

    def _within(self, window: DateWindow, row: CohortRow) -> CohortRow | None:
        """The row, for the days around the one that was read as its study date."""
        day = None if row.study_date is None else row.study_date.first
        if day is None:
            fault = f"no date to lay the window around; {DAY_FORMS}"
            self.faults.of_line(row.line, fault)
            return None
        try:
            days = DateRange(
                day - timedelta(days=window.days_before), day + timedelta(days=window.days_after)
            )
        except OverflowError:
            fault = "the window reaches beyond the calendar; check its date"
            self.faults.of_line(row.line, fault)
            return None
        return replace(row, study_date=days)

    def _note_ends(self, apart: int) -> None:
        """Note for people what was not taken."""
        if self.with_values_unnamed:
            numbers = ", ".join(str(n + 1) for n in sorted(self.with_values_unnamed))
            self.notes.append(f"columns with values and without a name, ignored: number {numbers}")
        if self.hidden:
            done = "taken" if self.options.hidden_rows == "take" else "left out"
            self.notes.append(f"{self.hidden} of {self.records} rows are hidden and were {done}")
        if apart:
            self.notes.append(f"{apart} of {self.records} lines have faults and were set apart")
        if lines := self.private_modalities:
            named = ", ".join(map(str, lines[:_LINES_NAMED]))
            more = f" and {len(lines) - _LINES_NAMED} more" if len(lines) > _LINES_NAMED else ""
            self.notes.append(
                f"a modality that DICOM does not define, in line {named}{more}: it finds studies "
                "only on a PACS that uses it"
            )


def _excludes_more_than_it_says(row: CohortRow) -> bool:
    narrowing = (row.study_date, row.modality, row.study_description, row.issuer_of_patient_id)
    return any(narrowing) and row.accession_number is None and row.study_instance_uid is None


def _is_written(cells: Sequence[object], index: int) -> bool:
    """Whether there is something in a cell, whatever it is."""
    if index >= len(cells):
        return False
    value = getattr(cells[index], "value", cells[index])
    return value is not None and value == value and bool(str(value).strip(BLANKS))


def _is_torn(table: Table, columns: dict[str, int], cells: Sequence[object]) -> bool:
    """Whether a line is torn or shifted: it would lose an identifier or filter, and select more."""
    if len(cells) == len(table.header):
        return False
    surplus = any(str(cell).strip(BLANKS) for cell in cells[len(table.header) :])
    return surplus or any(index >= len(cells) for index in columns.values())


def _is_header_again(table: Table, columns: dict[str, int], cells: Sequence[object]) -> bool:
    """Whether an identifier of a record is the name of a column."""
    for meaning in IDENTIFIERS.intersection(columns):
        cell = cells[columns[meaning]] if columns[meaning] < len(cells) else None
        text = getattr(cell, "value", cell)
        if isinstance(text, str) and meaning_of(text) is not None:
            return True
    return False


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
