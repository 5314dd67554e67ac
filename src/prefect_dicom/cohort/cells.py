"""Cells of a cohort file: identifiers, dates and texts, checked and never repaired."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from datetime import date, datetime, time
from functools import lru_cache, partial

from prefect_dicom.cohort.columns import WINDOW_DATE
from prefect_dicom.cohort.modalities import is_for_anything, likely_term
from prefect_dicom.cohort.table import BLANKS, INVISIBLE, UnfitCell
from prefect_dicom.core.model import DateRange
from prefect_dicom.core.uids import is_uid

_FORMULA = re.compile(r'=(?:".*"|[A-Za-z.]+\(.*|\$?[A-Za-z]{1,3}\$?[0-9]+)', re.DOTALL)
_LONGEST = 64
_CODE = re.compile(r"[A-Za-z0-9_ ]{1,16}")

_BASIC_DAY = re.compile(r"([0-9]{4})([0-9]{2})([0-9]{2})")
# Spreadsheets and data frames write a day as its midnight, of whatever time zone.
_ISO_DAY = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    r"(?:[ T]00:00(?::00(?:\.0+)?)?(?: ?(?:Z|UTC|[+-][0-9]{2}(?::?[0-9]{2})?))?)?"
)
_MOMENT = re.compile(
    r"[0-9]{4}-?[0-9]{2}-?[0-9]{2}[ T]?[0-9]{1,2}:?[0-9]{2}(?::?[0-9]{2}(?:[.,][0-9]+)?)?"
    r"(?: ?(?:Z|UTC|[+-][0-9]{2}(?::?[0-9]{2})?))?"
)
_REGIONAL_DAY = re.compile(r"[0-9]{1,2}[./-][0-9]{1,2}[./-](?:[0-9]{2}|[0-9]{4})")
_BASIC_RANGE = re.compile(r"([0-9]{8})? ?- ?([0-9]{8})?")
DAY_FORMS = "write 20240131 or 2024-01-31"
_WITH_TIME = (
    "is a moment and not a date: in another time zone it may be another day; write the day alone, "
    "20240131 or 2024-01-31"
)


def _identifier(content: str | date, limit: str = "DICOM allows 64 here") -> str:
    """The content as a single-value matching key; ``limit`` says why it has 64 characters."""
    text = _text(content)
    if "*" in text or "?" in text:
        raise UnfitCell(
            "holds a wildcard (* or ?), which would select others as well; write the exact value"
        )
    _refuse_unprintable(text)
    if len(text) > _LONGEST:
        raise UnfitCell(
            f"has {len(text)} characters; {limit}: check for two values in one cell, or leave it "
            "empty and give another identifier"
        )
    return text


def refuse_formula(text: str) -> None:
    """Refuse what a spreadsheet would compute instead of an identifier.

    Raises
    ------
    UnfitCell
        What it is, and what to do.
    """
    if _FORMULA.fullmatch(text):
        raise UnfitCell('is a spreadsheet formula (="..."); write the value alone')


def _study_uid(content: str | date) -> str:
    text = _identifier(content)
    if not is_uid(text):
        raise UnfitCell("is not a UID (digits and single dots); write the StudyInstanceUID itself")
    return text


def _modality(content: str | date) -> str:
    text = _text(content)
    if not _CODE.fullmatch(text):
        raise UnfitCell(
            "is not one modality code; write a single one such as CT, no wildcard or list"
        )
    if is_for_anything(text):
        raise UnfitCell("is no modality; leave the cell empty for studies of any")
    if (term := likely_term(text)) is not None:
        raise UnfitCell(f"is none of DICOM's terms for a modality, and finds nothing; write {term}")
    return text


def _description(content: str | date) -> str:
    text = _text(content)
    _refuse_unprintable(text)
    return text


def _person_name(content: str | date) -> str:
    text = _text(content)
    _refuse_unprintable(text)
    if not text.strip(" ^=*?"):
        raise UnfitCell("names nobody; write the name as Family^Given, or leave it empty")
    return text


def _text(content: str | date) -> str:
    if isinstance(content, date):
        raise UnfitCell("is a date; format the column as text and write the value")
    return content


def _refuse_unprintable(text: str) -> None:
    if "\\" in text:
        raise UnfitCell(
            "holds a backslash, which DICOM reads as a list; write one value, one line for each"
        )
    if text.isascii() and text.isprintable():
        return
    for character in text:
        kind = unicodedata.category(character)
        if kind in ("Cc", "Cf", "Cs", "Zl", "Zp") or (kind == "Zs" and character != " "):
            raise UnfitCell(INVISIBLE)


def _day(content: str | date) -> date:
    if isinstance(content, datetime):
        if content.time() != time():
            raise UnfitCell(_WITH_TIME)
        return content.date()
    return content if isinstance(content, date) else _day_of_text(content)


@lru_cache(maxsize=4096)
def _day_of_text(text: str) -> date:
    match = _BASIC_DAY.fullmatch(text) or _ISO_DAY.fullmatch(text)
    if match is None:
        if _REGIONAL_DAY.fullmatch(text):
            raise UnfitCell(
                "is a date in a regional form, where day and month cannot be told apart; "
                + DAY_FORMS
            )
        raise UnfitCell(_WITH_TIME if _MOMENT.fullmatch(text) else f"is not a date; {DAY_FORMS}")
    try:
        return date(*(int(part) for part in match.groups()))
    except ValueError:
        raise UnfitCell(f"is not a day of the calendar; {DAY_FORMS}") from None


def _date_range(content: str | date) -> DateRange:
    """A day, or a range written as in DICOM (PS3.4 C.2.2.2.5) or as an ISO 8601 interval."""
    return _one_day(content) if isinstance(content, date) else _range_of_text(content)


@lru_cache(maxsize=4096)
def _range_of_text(text: str) -> DateRange:
    match = _BASIC_RANGE.fullmatch(text)
    if match is not None:
        ends = [match[1], match[2]]
    elif text.count("/") == 1:
        ends = [end.strip() for end in text.split("/")]
    else:
        ends = [text, text]
    if not any(ends):
        raise UnfitCell(
            "is a range without ends; write 20240101-20240131, 20240101- or -20240131, or leave "
            "it empty"
        )
    return days_between(*(_day_of_text(end) if end else None for end in ends))


def date_range(text: str) -> DateRange:
    """A day or a range of days as a cohort may write it.

    Raises
    ------
    ValueError
        Says what is wrong and what to write, without repeating the text.
    """
    try:
        return _date_range(text.strip(BLANKS))
    except UnfitCell as fault:
        raise ValueError(f"{fault}") from None


def _one_day(content: str | date) -> DateRange:
    return days_between(_day(content), _day(content))


def days_between(first: date | None, last: date | None) -> DateRange:
    if first is not None and last is not None and first > last:
        raise UnfitCell("the date range ends before it begins; exchange its ends")
    return DateRange(first, last)


CELL_READERS: dict[str, Callable[[str | date], object]] = {
    "PatientID": _identifier,
    # PS3.5 6.2 allows 16; hospitals have longer ones, and PACS that hold them.
    "AccessionNumber": partial(_identifier, limit="no PACS keeps more than 64"),
    "StudyInstanceUID": _study_uid,
    "StudyDate": _date_range,
    "StudyDateFrom": _day,
    "StudyDateTo": _day,
    WINDOW_DATE: _one_day,
    "Modality": _modality,
    "StudyDescription": _description,
    "PatientName": _person_name,
    "PatientBirthDate": _day,
    "IssuerOfPatientID": _description,
    "OtherPatientID": _identifier,
}
