"""Matching of C-FIND, C-MOVE and C-GET identifiers, PS3.4 C.2.2.2 and C.4.1.3.1."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache

from pydicom.datadict import dictionary_VR, tag_for_keyword

from prefect_dicom.testing.instances import (
    IMAGE_KEYWORDS,
    PATIENT_KEYWORDS,
    SERIES_KEYWORDS,
    STUDY_KEYWORDS,
    Holdings,
    StoredInstance,
)

LEVELS = ("PATIENT", "STUDY", "SERIES", "IMAGE")
UNIQUE_KEYS = {
    "PATIENT": "PatientID",
    "STUDY": "StudyInstanceUID",
    "SERIES": "SeriesInstanceUID",
    "IMAGE": "SOPInstanceUID",
}
_KEYWORDS_OF = {
    "PATIENT": PATIENT_KEYWORDS,
    "STUDY": STUDY_KEYWORDS,
    "SERIES": SERIES_KEYWORDS,
    "IMAGE": IMAGE_KEYWORDS,
}
COUNT_KEYWORDS = (
    "NumberOfPatientRelatedStudies",
    "NumberOfPatientRelatedSeries",
    "NumberOfPatientRelatedInstances",
    "NumberOfStudyRelatedSeries",
    "NumberOfStudyRelatedInstances",
    "NumberOfSeriesRelatedInstances",
)
_LISTS = ("ModalitiesInStudy", "SOPClassesInStudy")
_WITHOUT_WILDCARDS = frozenset({"UI", "DA", "TM", "DT", "IS", "DS", "US", "UL", "SS", "SL"})


def levels_down_to(level: str) -> tuple[str, ...]:
    """The levels from PATIENT to this one."""
    return LEVELS[: LEVELS.index(level) + 1]


@lru_cache(maxsize=1024)
def _pattern(key: str, fold: bool) -> re.Pattern[str]:
    parts = ("." if c == "?" else ".*" if c == "*" else re.escape(c) for c in key)
    return re.compile("".join(parts), re.DOTALL | (re.IGNORECASE if fold else 0))


@lru_cache(maxsize=256)
def _vr(keyword: str) -> str:
    return dictionary_VR(keyword) if tag_for_keyword(keyword) else "LO"


def matches(keyword: str, key: str, value: str) -> bool:
    """Whether an attribute's value matches a key.

    Universal matching (an empty key), single value, list of UID, range of dates and times,
    and wildcards, each for the VRs that have it. Person names are compared without regard to
    case and trailing component delimiters, everything else exactly.
    """
    key = key.strip(" \0")
    if not key:
        return True
    if keyword in _LISTS:
        values = value.split("\\")
        return any(_one(keyword, part, one) for part in key.split("\\") for one in values)
    if _vr(keyword) == "UI":
        return value in (part.strip(" \0") for part in key.split("\\"))
    return _one(keyword, key, value)


def _one(keyword: str, key: str, value: str) -> bool:
    vr = _vr(keyword)
    if vr in ("DA", "TM"):
        return _in_range(vr, key, value)
    if vr in ("IS", "US", "UL"):
        return _number(key) == _number(value)
    fold = vr == "PN"
    if fold:
        key, value = key.rstrip("^"), value.rstrip("^")
    if vr not in _WITHOUT_WILDCARDS and ("*" in key or "?" in key):
        return _pattern(key, fold).fullmatch(value) is not None
    return key.casefold() == value.casefold() if fold else key == value


def _number(text: str) -> object:
    try:
        return int(text)
    except ValueError:
        return text


def _in_range(vr: str, key: str, value: str) -> bool:
    # The former ACR-NEMA forms, yyyy.mm.dd and hh:mm:ss, mean the same (PS3.5 6.2).
    value = re.sub("[.:]" if vr == "DA" else ":", "", value)
    if not value:
        return False
    if "-" not in key:
        return value == key if vr == "DA" else value.startswith(key)
    value = value if vr == "DA" else value.ljust(6, "0")
    first, last = (part.strip() for part in key.split("-", 1))
    width = 8 if vr == "DA" else 6
    low, high = first.ljust(width, "0"), last.ljust(width, "9") if last else "9" * 20
    return low <= value and value[: len(high)] <= high


def entities(level: str, study: Iterable[StoredInstance]) -> Iterator[list[StoredInstance]]:
    """Yield the entities of a level within one study, each as the list of its instances.

    A study UID that two patients share makes two entities at STUDY level.
    """
    groups: dict[tuple[str, ...], list[StoredInstance]] = {}
    depth = LEVELS.index(level)
    for stored in study:
        identity = (
            stored.patient_id,
            stored.study_instance_uid,
            stored.series_instance_uid,
            stored.sop_instance_uid,
        )[: depth + 1]
        groups.setdefault(identity, []).append(stored)
    yield from groups.values()


def entity_attributes(level: str, members: list[StoredInstance]) -> dict[str, str]:
    """Return what a PACS answers of an entity: its attributes, those above it, and counts."""
    first = members[0].attributes
    known = {
        keyword: first.get(keyword, "")
        for one in levels_down_to(level)
        for keyword in _KEYWORDS_OF[one]
    }
    known["SpecificCharacterSet"] = first.get("SpecificCharacterSet", "")
    series = {m.series_instance_uid for m in members}
    if level == "PATIENT":
        known["NumberOfPatientRelatedStudies"] = str(len({m.study_instance_uid for m in members}))
        known["NumberOfPatientRelatedSeries"] = str(len(series))
        known["NumberOfPatientRelatedInstances"] = str(len(members))
    elif level == "STUDY":
        known["ModalitiesInStudy"] = _distinct(members, "Modality")
        known["SOPClassesInStudy"] = _distinct(members, "SOPClassUID")
        known["NumberOfStudyRelatedSeries"] = str(len(series))
        known["NumberOfStudyRelatedInstances"] = str(len(members))
    elif level == "SERIES":
        known["NumberOfSeriesRelatedInstances"] = str(len(members))
    return known


def _distinct(members: Iterable[StoredInstance], keyword: str) -> str:
    found = dict.fromkeys(m.attributes.get(keyword, "") for m in members)
    return "\\".join(value for value in found if value)


def select(
    holdings: Holdings,
    level: str,
    keys: Mapping[str, str],
    match: Callable[[str, str, str], bool] = matches,
) -> Iterator[tuple[dict[str, str], list[StoredInstance]]]:
    """Return the entities of a level that match the keys: attributes and instances.

    Keys that the level does not have are left out of matching, as a PACS does with
    optional keys it does not support (PS3.4 C.2.2.1.3). ``match`` takes the place of
    :func:`matches`.
    """
    studies = holdings.studies(keys if match is matches else {})
    if level == "PATIENT":
        studies = [[stored for study in studies for stored in study]]
    for study in studies:
        for members in entities(level, study):
            known = entity_attributes(level, members)
            if all(match(name, key, known[name]) for name, key in keys.items() if name in known):
                yield known, members
