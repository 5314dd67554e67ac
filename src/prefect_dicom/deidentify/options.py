"""Options of PS3.15 E.3, and what follows from them for each attribute of Table E.1-1."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from prefect_dicom.deidentify.table import Row, rows_by_tag

_BASIC_PROFILE = ("113100", "Basic Application Confidentiality Profile")


class Dates(StrEnum):
    """What happens to dates and times."""

    REMOVE = "remove"
    """As the Basic Profile has it."""
    MODIFIED = "modified"
    """Shifted back by a number of days that is the same for all dates of a patient (E.3.6)."""
    FULL = "full"
    """Kept (E.3.6)."""


class Retain(StrEnum):
    """What is kept beyond the Basic Profile."""

    PATIENT_CHARACTERISTICS = "patient-characteristics"
    DEVICE = "device"
    INSTITUTION = "institution"
    UIDS = "uids"
    SAFE_PRIVATE = "safe-private"


class Action(StrEnum):
    """What is done to an element."""

    REMOVE = "removed"
    EMPTY = "emptied"
    DUMMY = "dummy"
    UID = "uid-replaced"
    KEEP = "kept"
    SHIFT = "dates-shifted"
    ALLOW_LISTED = "kept-if-allowed"
    PSEUDONYM = "pseudonym"


_CODES = {
    Retain.PATIENT_CHARACTERISTICS: ("113108", "Retain Patient Characteristics Option"),
    Retain.DEVICE: ("113109", "Retain Device Identity Option"),
    Retain.UIDS: ("113110", "Retain UIDs Option"),
    Retain.SAFE_PRIVATE: ("113111", "Retain Safe Private Option"),
    Retain.INSTITUTION: ("113112", "Retain Institution Identity Option"),
}
_CODES_OF_DATES = {
    Dates.FULL: ("113106", "Retain Longitudinal Temporal Information Full Dates Option"),
    Dates.MODIFIED: ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
}
_CLEAN_DESCRIPTORS = ("113105", "Clean Descriptors Option")
TEMPORAL_INFORMATION = {
    Dates.REMOVE: "REMOVED",
    Dates.MODIFIED: "MODIFIED",
    Dates.FULL: "UNMODIFIED",
}
"""Values of Longitudinal Temporal Information Modified (0028,0303)."""

# E.1-1a leaves the choice to the IOD; these are conformant to all. X/Z/U*: the sequence stays, its
# items are treated.
BASIC: Mapping[str, Action] = {
    "X": Action.REMOVE,
    "Z": Action.EMPTY,
    "X/Z": Action.EMPTY,
    "D": Action.DUMMY,
    "X/D": Action.DUMMY,
    "Z/D": Action.DUMMY,
    "X/Z/D": Action.DUMMY,
    "U": Action.UID,
    "X/Z/U*": Action.KEEP,
}
"""Action for each code of the column *Basic Profile*."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What is done to an attribute, and why."""

    action: Action
    row: Row
    option: str = ""
    """Column of the table that decides; empty: the Basic Profile."""

    def __str__(self) -> str:
        column = self.option.replace("_", " ") or "basic profile"
        return f"{self.row}: {column}"


@dataclass(frozen=True)
class Options:
    """How a project's copies are made. Equal options make equal copies."""

    dates: Dates = Dates.REMOVE
    retain: frozenset[Retain] = frozenset()
    descriptors: Mapping[str, str] = field(default_factory=dict)
    """Allowed values of descriptors, in any case, and what is written instead."""
    strict: bool = False
    """Whether text is removed unless a row of the table keeps it."""

    @property
    def codes(self) -> tuple[tuple[str, str], ...]:
        """Code values and meanings of CID 7050 for the profile and its options, without pixels."""
        found = [_BASIC_PROFILE]
        if self.descriptors:
            found.append(_CLEAN_DESCRIPTORS)
        if self.dates in _CODES_OF_DATES:
            found.append(_CODES_OF_DATES[self.dates])
        found += [_CODES[each] for each in Retain if each in self.retain]
        return tuple(sorted(found))

    def rules(self) -> Mapping[int, Rule]:
        """Rule of each attribute that has a row of its own, by tag."""
        return _rules(self.dates, self.retain, bool(self.descriptors))


@functools.lru_cache(maxsize=32)
def _rules(dates: Dates, retain: frozenset[Retain], descriptors: bool) -> Mapping[int, Rule]:
    return {tag: _rule(row, dates, retain, descriptors) for tag, row in rows_by_tag().items()}


def _rule(row: Row, dates: Dates, retain: frozenset[Retain], descriptors: bool) -> Rule:
    """An option overrides the Basic Profile (E.1.1). Where several keep, the first one is named.

    A device's or patient's *C* is cleaned by the allow-list of descriptors: without one its value
    is treated as the Basic Profile has it.
    """
    chosen = (
        # First: a date that a device's option keeps would tell by how much the others are shifted.
        (dates is Dates.MODIFIED, "modified_dates"),
        (Retain.UIDS in retain, "uids"),
        (Retain.DEVICE in retain, "device"),
        (Retain.INSTITUTION in retain, "institution"),
        (Retain.PATIENT_CHARACTERISTICS in retain, "patient_characteristics"),
        (dates is Dates.FULL, "full_dates"),
        (descriptors, "descriptors"),
    )
    for is_chosen, column in chosen:
        cell = getattr(row, column) if is_chosen else ""
        if cell == "K":
            return Rule(Action.KEEP, row, column)
        if cell == "C" and column == "modified_dates":
            return Rule(Action.SHIFT, row, column)
        if cell == "C" and descriptors:
            return Rule(Action.ALLOW_LISTED, row, column)
    return Rule(BASIC[row.basic], row)
