"""Replacement values: dummies by VR, shifted dates, and what numbers and codes may look like."""

from __future__ import annotations

import re
from datetime import date, timedelta

TEXT_VRS = frozenset(b"AE AS LO LT PN SH ST UC UR UT".split())
NUMBER_TEXT_VRS = frozenset(b"DS IS".split())
DATE_VRS = frozenset(b"DA DT TM".split())
BULK_VRS = frozenset(b"OB OW UN".split())
BINARY_VRS = frozenset(b"AT FD FL OD OF OL OV SL SS SV UL US UV".split())

_FAMILIES = (
    frozenset(b"LO LT SH ST UC UT".split()),
    NUMBER_TEXT_VRS,
    BINARY_VRS | frozenset(b"OB OW".split()),
)
_NUMBERS = re.compile(rb"[-+0-9.eE \\]*\0?")
_CODE_STRINGS = re.compile(rb"[A-Za-z0-9 _]{0,16}(\\[A-Za-z0-9 _]{0,16})*\0?")
_DAY = re.compile(r"(\d{4})(\.?)(\d{2})\2(\d{2})")
_AGE = re.compile(rb" *(\d{3})([DWMY]) *\0?")
_TIME = re.compile(rb"[-0-9.: \\]*\0?")

_DUMMIES = {
    b"AE": b"REMOVED ",
    b"AS": b"000Y",
    b"CS": b"REMOVED ",
    b"DA": b"19000101",
    b"DS": b"0 ",
    b"DT": b"19000101000000",
    b"IS": b"0 ",
    b"TM": b"000000",
    b"UR": b"urn:removed ",
}
_TEXT_DUMMY = b"REMOVED "
_WIDTHS = {b"US": 2, b"SS": 2, b"AT": 4, b"UL": 4, b"SL": 4, b"FL": 4, b"OF": 4, b"OL": 4}


def dummy(vr: bytes) -> bytes:
    """Value that is no one's, of even length (action D).

    A year below 1000 is refused by readers, so dates are those of 1900.
    """
    if vr in _DUMMIES:
        return _DUMMIES[vr]
    if vr in TEXT_VRS:
        return _TEXT_DUMMY
    return bytes(_WIDTHS.get(vr, 8 if vr in BINARY_VRS else 2))


def is_of_vr(encoded: bytes, known: tuple[bytes, ...]) -> bool:
    """Whether an encoded VR is one of the dictionary's, or as good as one of them."""
    return encoded in known or any(
        encoded in family and not family.isdisjoint(known) for family in _FAMILIES
    )


def is_legal(vr: bytes, value: bytes) -> bool:
    """Whether numbers, codes and times look like such: text may hide in them (PS3.15 E.3.5)."""
    if vr in NUMBER_TEXT_VRS:
        return _NUMBERS.fullmatch(value) is not None
    if vr == b"CS":
        return _CODE_STRINGS.fullmatch(value) is not None
    if vr == b"TM":
        return _TIME.fullmatch(value) is not None
    return True


def padded(value: bytes, padding: bytes = b" ") -> bytes:
    """Value of even length."""
    return value + padding if len(value) % 2 else value


def shifted_dates(value: bytes, days: int) -> bytes | None:
    """Dates or date-times, each moved back by whole days; None if one of them is no such.

    Times and offsets from UTC behind a date stay as they are.
    """
    try:
        text = value.decode("ascii")
    except UnicodeDecodeError:
        return None
    moved = []
    for each in text.rstrip(" \0").split("\\"):
        part = each.strip(" \0")
        if not part:
            moved.append("")
            continue
        match = _DAY.match(part)
        behind = part[match.end() :] if match else "?"
        if match is None or not _TIME.fullmatch(behind.replace("+", "").encode()):
            return None
        try:
            day = date(int(match[1]), int(match[3]), int(match[4])) - timedelta(days=days)
        except (ValueError, OverflowError):
            return None
        if day.year < 1000:
            return None
        moved.append(f"{day.year:04}{match[2]}{day.month:02}{match[2]}{day.day:02}{behind}")
    return padded("\\".join(moved).encode())


def capped_age(value: bytes) -> bytes | None:
    """Age with those above 89 years as 090Y; None if it is no age."""
    match = _AGE.fullmatch(value)
    if match is None:
        return None
    years = {b"D": 365, b"W": 52, b"M": 12, b"Y": 1}[match[2]]
    return b"090Y" if int(match[1]) > 89 * years else match[1] + match[2]
