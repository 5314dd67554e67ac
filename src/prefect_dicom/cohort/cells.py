"""Cells of a cohort file: identifiers, dates and texts, checked and never repaired."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from datetime import date, datetime
from functools import lru_cache, partial

from prefect_dicom.cohort.columns import WINDOW_DATE
from prefect_dicom.cohort.table import BLANKS, INVISIBLE, UnfitCell
from prefect_dicom.core.model import DateRange
from prefect_dicom.core.uids import is_uid

_ROUNDED = re.compile(r"[0-9][.,][0-9]+E\+[0-9]+", re.IGNORECASE)
_FORMULA = re.compile(r'=".*"', re.DOTALL)
_CODE = re.compile(r"[A-Za-z0-9_ ]{1,16}")

_BASIC_DAY = re.compile(r"([0-9]{4})([0-9]{2})([0-9]{2})")
# Spreadsheets and data frames write a day as its midnight.
_ISO_DAY = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})(?:[ T]00:00(?::00(?:\.0+)?)?)?")
_REGIONAL_DAY = re.compile(r"[0-9]{1,2}[./-][0-9]{1,2}[./-](?:[0-9]{2}|[0-9]{4})")
_BASIC_RANGE = re.compile(r"([0-9]{8})? ?- ?([0-9]{8})?")
DAY_FORMS = "write 20240131 or 2024-01-31"


def _identifier(content: str | date, longest: int) -> str:
    """The content as a single-value matching key of at most ``longest`` characters."""
    text = _text(content)
    if "*" in text or "?" in text:
        raise UnfitCell(
            "holds a wildcard (* or ?), which would select others as well; write the exact value"
        )
    _refuse_unprintable(text)
    if len(text) > longest:
        raise UnfitCell(
            f"has {len(text)} characters; DICOM allows {longest} here: check for two values in "
            "one cell, or leave it empty and give another identifier"
        )
    if _ROUNDED.fullmatch(text):
        raise UnfitCell(
            "is a number a spreadsheet has rounded (its digits are lost); format the column as "
            "text before the values are entered, and export again"
        )
    if _FORMULA.fullmatch(text):
        raise UnfitCell('is a spreadsheet formula (="..."); write the value alone')
    return text


def _study_uid(content: str | date) -> str:
    text = _identifier(content, longest=64)
    if not is_uid(text):
        raise UnfitCell("is not a UID (digits and single dots); write the StudyInstanceUID itself")
    return text


def _modality(content: str | date) -> str:
    text = _text(content)
    if not _CODE.fullmatch(text):
        raise UnfitCell(
            "is not one modality code; write a single one such as CT, no wildcard or list"
        )
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


@lru_cache(maxsize=4096)
def _day(content: str | date) -> date:
    if isinstance(content, datetime):
        return content.date()
    if isinstance(content, date):
        return content
    match = _BASIC_DAY.fullmatch(content) or _ISO_DAY.fullmatch(content)
    if match is None:
        if _REGIONAL_DAY.fullmatch(content):
            raise UnfitCell(
                "is a date in a regional form, where day and month cannot be told apart; "
                + DAY_FORMS
            )
        raise UnfitCell(f"is not a date; {DAY_FORMS}")
    try:
        return date(*(int(part) for part in match.groups()))
    except ValueError:
        raise UnfitCell(f"is not a day of the calendar; {DAY_FORMS}") from None


@lru_cache(maxsize=4096)
def _date_range(content: str | date) -> DateRange:
    """A day, or a range written as in DICOM (PS3.4 C.2.2.2.5) or as an ISO 8601 interval."""
    if isinstance(content, date):
        return days_between(_day(content), _day(content))
    match = _BASIC_RANGE.fullmatch(content)
    if match is not None:
        ends = [match[1], match[2]]
    elif content.count("/") == 1:
        ends = [end.strip() for end in content.split("/")]
    else:
        ends = [content, content]
    if not any(ends):
        raise UnfitCell(
            "is a range without ends; write 20240101-20240131, 20240101- or -20240131, or leave "
            "it empty"
        )
    return days_between(*(_day(end) if end else None for end in ends))


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
    "PatientID": partial(_identifier, longest=64),
    "AccessionNumber": partial(_identifier, longest=16),
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
    "OtherPatientID": partial(_identifier, longest=64),
}
