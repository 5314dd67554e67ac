"""Filters as a definition writes them: texts, patterns, numbers, ranges and dates."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import PlainValidator

from prefect_dicom.cohort.bounded_regex import bounded_regex
from prefect_dicom.cohort.cells import date_range
from prefect_dicom.cohort.modalities import likely_term
from prefect_dicom.core.model import Filter, Pattern

_LARGEST_COUNT = 10**9
_LONGEST_PATTERN = 200
_RANGE = re.compile(r"([0-9]{1,9})? ?- ?([0-9]{1,9})?")
_CODE = re.compile(r"[A-Za-z0-9_ *?]{1,16}")


def read_by(read: Callable[..., Filter], keyword: str, **more: Any) -> PlainValidator:
    """Validator that reads a filter of an attribute from its text."""

    def validate(value: Any) -> Filter | None:
        return None if value is None else read(value, keyword, **more)

    return PlainValidator(validate)


def _patterns(value: Any, check: Callable[[str], str]) -> tuple[Pattern, ...]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError("expected at least one text in the list")
    return tuple(_pattern(each, check) for each in values)


def _pattern(value: Any, check: Callable[[str], str]) -> Pattern:
    if isinstance(value, Mapping) and value.keys() == {"regex"}:
        expression = value["regex"]
        if not isinstance(expression, str) or not expression:
            raise ValueError("expected a regular expression in quotes behind `regex`")
        try:
            bounded_regex(expression)
        except ValueError as error:
            raise ValueError(f"the expression behind `regex` {error}") from None
        return Pattern(expression, regex=True)
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("expected a text; put numbers in quotes")
    if not isinstance(value, str):
        raise ValueError(
            'expected a text with * and ? as wildcards, {regex: "..."}, or a list of these'
        )
    return Pattern(check(value))


def _text(value: str) -> str:
    text = value.strip()
    if not text or len(text) > _LONGEST_PATTERN or not text.isprintable() or "\\" in text:
        raise ValueError(
            f"expected a text of 1 to {_LONGEST_PATTERN} characters without backslashes and "
            "control characters"
        )
    return text


def check_code(value: str) -> str:
    if not _CODE.fullmatch(value):
        raise ValueError("expected codes like CT, each of 1 to 16 letters, digits and _")
    if (term := likely_term(value.replace("*", "").replace("?", ""))) is not None:
        raise ValueError(f"expected one of DICOM's terms for a modality: here {term}")
    return value


def check_sex(value: str) -> str:
    if value not in ("M", "F", "O"):
        raise ValueError("expected M, F or O (PS3.3 C.7.1.1), or a list of these")
    return value


def read_texts(value: Any, keyword: str, check: Callable[[str], str] = _text) -> Filter:
    """``is`` is what is written without a key; ``not`` is what must not be."""
    if not isinstance(value, Mapping) or value.keys() == {"regex"}:
        return Filter(keyword, any_of=_patterns(value, check))
    if not value or not value.keys() <= {"is", "not"}:
        raise ValueError("expected a text, a list of texts, or the keys `is` and `not` with such")
    given = {key: _patterns(each, check) for key, each in value.items()}
    return Filter(keyword, given.get("is", ()), given.get("not", ()))


def read_number(value: Any, keyword: str, most: int = _LARGEST_COUNT) -> Filter:
    expected = (
        "expected a number, a range like 18-80, 18- or -80, or the keys at_least, more_than, "
        f"at_most, less_than with whole numbers up to {most}"
    )
    low: int | None
    high: int | None
    if isinstance(value, int):
        low = high = value
    elif isinstance(value, str):
        match = _RANGE.fullmatch(value)
        if match is None or not any(match.groups()):
            raise ValueError(expected)
        low, high = (None if each is None else int(each) for each in match.groups())
    elif isinstance(value, Mapping) and value:
        low, high = _bounds(value, expected)
    else:
        raise ValueError(expected)
    for each in (low, high):
        if each is not None and not 0 <= each <= most:
            raise ValueError(expected)
    if low is not None and high is not None and low > high:
        raise ValueError("expected a range that does not end before it begins")
    return Filter(keyword, at_least=low, at_most=high)


def _bounds(value: Mapping[str, Any], expected: str) -> tuple[int | None, int | None]:
    lower, upper = {"at_least": 0, "more_than": 1}, {"at_most": 0, "less_than": -1}
    ends: list[int | None] = []
    for keys in (lower, upper):
        given = [key for key in keys if key in value]
        if len(given) > 1 or not value.keys() <= {*lower, *upper}:
            raise ValueError(expected)
        if any(isinstance(value[key], bool) or not isinstance(value[key], int) for key in given):
            raise ValueError(expected)
        ends.append(value[given[0]] + keys[given[0]] if given else None)
    return ends[0], ends[1]


def read_dates(value: Any, keyword: str) -> Filter:
    if isinstance(value, int):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError("expected a date like 20240131, or a range like 20240101-20240131")
    try:
        return Filter(keyword, dates=date_range(value))
    except ValueError as error:
        raise ValueError(f"{error}") from None
