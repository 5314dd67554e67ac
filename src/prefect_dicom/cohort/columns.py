"""Columns of a cohort file: what a header names, and where each meaning stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from prefect_dicom.cohort.column_names import likeness, nearly_called
from prefect_dicom.cohort.table import BLANKS, DateWindow, Table

IDENTIFIERS = frozenset({"PatientID", "AccessionNumber", "StudyInstanceUID"})
_STUDY_DATES = frozenset({"StudyDate", "StudyDateFrom", "StudyDateTo"})
WINDOW_DATE = "around"
"""Meaning of the column that a date window is laid around."""

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
    "IssuerOfPatientID": "issuerofpatientid patientidissuer issuer assigningauthority 0010,0021",
    "OtherPatientID": "otherpatientid otherpatientids formerpatientid previouspatientid 0010,1000",
    "CandidateOf": "candidateof",
    "Take": "take",
}
_MEANINGS = {name: meaning for meaning, names in _NAMES.items() for name in names.split()}
_LONGEST_SHOWN = 40
_TAG = re.compile(r"\(?([0-9a-f]{4},[0-9a-f]{4})\)?")


def meaning_of(header: object) -> str | None:
    """Meaning of a column by its name, or None for one that is not taken."""
    if not isinstance(header, str):
        return None
    name = _folded(header)
    tag = _TAG.fullmatch(name)
    return _MEANINGS.get(tag[1] if tag else name)


def _folded(name: str) -> str:
    return re.sub(r"[\s_]", "", name.strip(BLANKS)).casefold()


def is_window_column(window: DateWindow | None, header: object) -> bool:
    """Whether this is the column that the window is laid around."""
    return (
        window is not None and isinstance(header, str) and _folded(header) == _folded(window.around)
    )


def is_header(cells: Sequence[object]) -> bool:
    """Whether a record names a column that identifies patients or studies."""
    return any(meaning_of(cell) in IDENTIFIERS for cell in cells)


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a list: those that are taken, and those that are passed over."""

    taken: dict[str, int]
    """Index of each meaning into the cells of a record."""
    ignored: tuple[str, ...] = ()
    """The others that have a name, in words that hold no numbers."""
    unnamed: tuple[int, ...] = ()
    """Indexes of columns without a name."""


def find_columns(table: Table, faults: list[str], window: DateWindow | None) -> Columns:
    """Find what each column of a list means.

    A column that looks like an identifier or a filter and is not taken is a fault: its rows would
    select more than they say. Only in a table of candidates it is there for reading. The date
    that a window is laid around is read as a StudyDate of one day.

    Parameters
    ----------
    faults : list of str
        Faults of the header are appended to it.
    """
    columns: dict[str, int] = {}
    where = f"line {table.line}"
    if window is not None and (index := _window_column(table, faults, window)) is not None:
        columns[WINDOW_DATE] = index
    others = []
    for index, header in enumerate(table.header):
        meaning = meaning_of(header)
        if index == columns.get(WINDOW_DATE):
            continue
        if meaning is None:
            others.append(index)
        elif meaning in columns:
            faults.append(
                f"{where}: columns {columns[meaning] + 1} and {index + 1} both mean "
                f"{meaning}; keep one of them"
            )
        else:
            columns[meaning] = index
    if "CandidateOf" not in columns:
        others += [index for meaning, index in columns.items() if meaning == "Take"]
        columns.pop("Take", None)
        faults += [fault for index in others if (fault := _fault_of_name(table, index))]
    if "StudyDate" in columns and columns.keys() & {"StudyDateFrom", "StudyDateTo"}:
        faults.append(
            f"{where}: both StudyDate and a column for one end of a range are there; keep either "
            "StudyDate or the pair StudyDateFrom and StudyDateTo"
        )
    if IDENTIFIERS.isdisjoint(columns):
        faults.append(
            f"{where}: no column that identifies patients or studies; expected is a header line "
            "with at least one of PatientID, AccessionNumber and StudyInstanceUID (columns "
            "separated by comma, semicolon or tab)"
        )
    return Columns(
        columns,
        ignored=tuple(_shown(table.header[n], n) for n in others if not _is_unnamed(table, n)),
        unnamed=tuple(n for n in others if _is_unnamed(table, n)),
    )


def _fault_of_name(table: Table, index: int) -> str | None:
    """The fault of a column that is not taken, where it looks like one to be taken."""
    header = table.header[index]
    if not isinstance(header, str):
        return None
    # With signs and numbers, it is nearly a name that would be taken.
    nearly = _MEANINGS.get(re.sub(r"[\W\d_]", "", _folded(header)))
    if nearly in (None, "CandidateOf", "Take"):
        found = likeness(header)
    else:
        found = nearly_called(nearly, header)
    if found is None:
        return None
    name = f' "{found.name}"' if found.name else ""
    return (
        f"line {table.line}, column {index + 1}{name}: looks like {found.attribute} and is not "
        f"taken, so that rows would select more than they say; {found.remedy}"
    )


def _is_unnamed(table: Table, index: int) -> bool:
    header = table.header[index]
    if not isinstance(header, str):
        return header is None
    # What pandas calls an index that has no name.
    return not header.strip(BLANKS) or header.startswith("__index_level_")


def _shown(header: object, index: int) -> str:
    """A column that is passed over, for people; a name with digits may be a patient's number."""
    name = " ".join(header.split()) if isinstance(header, str) else ""
    is_shown = name.isprintable() and not re.search("[0-9^]", name)
    return f'"{name}"' if is_shown and 0 < len(name) <= _LONGEST_SHOWN else f"number {index + 1}"


def _window_column(table: Table, faults: list[str], window: DateWindow) -> int | None:
    """Index of the one column that the window is laid around, if it alone limits the date."""
    where = f"line {table.line}"
    around = [n for n, header in enumerate(table.header) if is_window_column(window, header)]
    if len(around) != 1:
        faults.append(
            f"{where}: {'several columns have' if around else 'no column has'} the name that "
            "the window is laid around; name one of the list's columns"
        )
        return None
    if any(
        meaning_of(header) in _STUDY_DATES and index not in around
        for index, header in enumerate(table.header)
    ):
        faults.append(
            f"{where}: a window is laid around one column, and another limits the study's "
            "date as well; keep one of them"
        )
        return None
    return around[0]
