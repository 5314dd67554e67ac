"""Cohorts as pandas frames, and as the lists in CSV that are registered for these.

A frame is read by the rules of a cohort file. The list that is written for it has each row on its
own line number, with blank lines between: a number that names a row in one of them names it in
the other, and in every report.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import date
from functools import partial

import pandas

from prefect_dicom.cohort.column_names import likeness
from prefect_dicom.cohort.columns import meaning_of
from prefect_dicom.cohort.parquet import cell_content
from prefect_dicom.cohort.rows import CohortList, read_table
from prefect_dicom.cohort.table import Table, UnreadableFile
from prefect_dicom.core.model import CohortRow, DateRange

COLUMNS = (
    "PatientID",
    "AccessionNumber",
    "StudyInstanceUID",
    "StudyDate",
    "Modality",
    "StudyDescription",
    "PatientName",
    "PatientBirthDate",
    "IssuerOfPatientID",
    "OtherPatientID",
)
"""Keywords (PS3.6) of the fields of a CohortRow behind its line, in their order."""
LINE = "line"
"""Name of the index of a frame with line numbers."""
_SOURCE = "the data frame"
_LARGEST_LINE = 50_000_000


def frame_of_rows(rows: Iterable[CohortRow]) -> pandas.DataFrame:
    """Cohort rows as a frame of texts, with their lines as the index.

    Returns
    -------
    pandas.DataFrame
        :data:`COLUMNS` of dtype ``string``, with missing values; index ``line``.
    """
    texts = [(row.line, *_texts(row)) for row in rows]
    frame = pandas.DataFrame(texts, columns=[LINE, *COLUMNS]).set_index(LINE)
    return frame.astype("string")


def read_frame(cohort: pandas.DataFrame | Mapping[str, object]) -> list[CohortRow]:
    """Read the rows of a frame; see :func:`read_frame_as_list`."""
    return read_frame_as_list(cohort).rows


def read_frame_as_list(cohort: pandas.DataFrame | Mapping[str, object]) -> CohortList:
    """Read the rows of a frame, or a single row from a mapping, by the rules of a cohort file.

    Parameters
    ----------
    cohort : pandas.DataFrame or mapping
        Columns as in a cohort file. An index ``line`` has the line numbers of the rows; without
        one they are counted from 2, as below a header.

    Raises
    ------
    CohortError
        With the faults, as :func:`~prefect_dicom.cohort.rows.read_list`.
    """
    if isinstance(cohort, Mapping):
        cohort = pandas.DataFrame([dict(cohort)], dtype=object)
    return read_table(_SOURCE, partial(_table, cohort))


def list_of_rows(rows: Iterable[CohortRow], *, of_candidates: bool = False) -> str:
    """Text of a cohort list in CSV that has each of the rows on its line.

    Only columns with values are in it. Candidates become a table of candidates, so that reading it
    takes their identifiers as they are.
    """
    texts = {row.line: _texts(row) for row in rows}
    used = [n for n in range(len(COLUMNS)) if any(row[n] is not None for row in texts.values())]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    marks, before = (("CandidateOf",), "'") if of_candidates else ((), "")
    writer.writerow([*marks, *(COLUMNS[n] for n in used)])
    written = 1
    for line in sorted(texts):
        text.write("\n" * (line - written - 1))
        row = (texts[line][n] for n in used)
        writer.writerow([*(line for _ in marks), *(text and before + text for text in row)])
        written = line
    return text.getvalue()


def _texts(row: CohortRow) -> list[str | None]:
    """The values of a row as a cohort list has them, in the order of :data:`COLUMNS`."""
    return [_text(getattr(row, field.name)) for field in fields(CohortRow)[1:]]


def _text(value: str | date | DateRange | None) -> str | None:
    if isinstance(value, date):
        return value.isoformat().replace("-", "")
    if isinstance(value, DateRange):
        return value.text
    return value


def _table(frame: pandas.DataFrame) -> Table:
    lines: Sequence[int]
    if frame.index.name == LINE:
        lines = _lines(frame.index)
    else:
        lines = range(2, len(frame) + 2)
        frame = _with_named_index(frame)
    return Table(
        line=1,
        header=list(frame.columns),
        records=_records(frame, lines),
        content=cell_content,
        every_field_written=False,
    )


def _lines(index: pandas.Index) -> list[int]:
    lines = index.tolist()
    if not all(isinstance(line, int) and 2 <= line <= _LARGEST_LINE for line in lines):
        raise UnreadableFile(
            "its index `line` has something else than line numbers from 2 on; use "
            "reset_index(drop=True) for a list of its own"
        )
    if len(set(lines)) < len(lines):
        raise UnreadableFile(
            "its index `line` has a line number more than once; use reset_index(drop=True) for a "
            "list of its own"
        )
    return lines


def _with_named_index(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The frame with its index among its columns, where that is named like one of a list."""
    if not any(isinstance(n, str) and (meaning_of(n) or likeness(n)) for n in frame.index.names):
        return frame
    try:
        return frame.reset_index()
    except ValueError:
        raise UnreadableFile(
            "its index has the name of one of its columns; keep one of them"
        ) from None


def _records(
    frame: pandas.DataFrame, lines: Iterable[int]
) -> Iterator[tuple[int, Sequence[object]]]:
    for line, row in zip(lines, frame.itertuples(index=False, name=None), strict=True):
        yield line, [_plain(value) for value in row]


def _plain(value: object) -> object:
    """A value without the types of pandas and NumPy."""
    if value is pandas.NA:
        return None
    item: Callable[[], object] | None = getattr(value, "item", None)
    return value if item is None or isinstance(value, date) else item()
