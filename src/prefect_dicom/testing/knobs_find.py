"""Knobs for what a C-FIND finds and how it is answered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from prefect_dicom.testing.instances import tag_of
from prefect_dicom.testing.matching import COUNT_KEYWORDS, LEVELS, UNIQUE_KEYS
from prefect_dicom.testing.plans import (
    CANCEL,
    IDENTIFIER_DOES_NOT_MATCH,
    SUCCESS,
    UNABLE_TO_PROCESS,
    FindPlan,
    Knob,
    Stage,
)

if TYPE_CHECKING:
    from prefect_dicom.testing.script import Behaviour

_PENDING_WITHOUT_OPTIONAL_KEYS = 0xFF01
COUNT_OF_SERIES = "NumberOfSeriesRelatedInstances"


def answers_of(plan: FindPlan, by: Behaviour) -> dict[int, Dataset]:
    """The answers that a behaviour is about, by their number."""
    return {
        number: answer
        for number, answer in enumerate(plan.answers)
        if by.study in (None, answer.get("StudyInstanceUID"))
    }


def put(answer: Dataset, keyword: str, value: object) -> None:
    """Set an element, however odd the value is."""
    tag, vr = tag_of(keyword), dictionary_VR(keyword)
    answer.add(DataElement(tag, vr, value, validation_mode=IGNORE))


def _unsupported_key(
    plan: FindPlan,
    by: Behaviour,
    *,
    keys: Sequence[str],
    status: int = SUCCESS,
    returned: bool = False,
) -> bool:
    if not any(plan.keys.get(key) or (returned and key in plan.keys) for key in keys):
        return False
    plan.refuse = status
    return True


def _match_by(plan: FindPlan, keys: Sequence[str], alike: Callable[[str, str], bool]) -> bool:
    """Compare these keys, where they have a value, in another way."""
    otherwise = plan.matches

    def matching(keyword: str, key: str, value: str) -> bool:
        if key and keyword in keys:
            return alike(key, value)
        return otherwise(keyword, key, value)

    plan.matches = matching
    return any(plan.keys.get(key) for key in keys)


def _substring(plan: FindPlan, by: Behaviour, *, keys: Sequence[str] = ("PatientID",)) -> bool:
    return _match_by(plan, keys, lambda key, value: key.casefold() in value.casefold())


def _case(
    plan: FindPlan, by: Behaviour, *, keys: Sequence[str] = ("PatientID", "AccessionNumber")
) -> bool:
    return _match_by(plan, keys, lambda key, value: key.casefold() == value.casefold())


def _pn_literal(plan: FindPlan, by: Behaviour) -> bool:
    return _match_by(plan, ["PatientName"], lambda key, value: key == value)


def _query_charset(plan: FindPlan, by: Behaviour, *, sets: Sequence[str]) -> bool:
    beyond = [key for key, value in plan.keys.items() if not value.isascii()]
    if plan.declared in sets:
        return False
    return bool(beyond) and _match_by(plan, beyond, lambda key, value: False)


def _no_list(plan: FindPlan, by: Behaviour, *, uids: bool = False) -> bool:
    def is_spared(key: str) -> bool:
        return not uids and dictionary_VR(key) == "UI"

    lists = [key for key, value in plan.keys.items() if "\\" in value and not is_spared(key)]
    return bool(lists) and _match_by(plan, lists, lambda key, value: False)


def _strict(plan: FindPlan, by: Behaviour, *, status: int = IDENTIFIER_DOES_NOT_MATCH) -> bool:
    above = LEVELS[1 : LEVELS.index(plan.level)]
    if all(plan.keys.get(UNIQUE_KEYS[level]) for level in above):
        return False
    plan.refuse = status
    return True


def _demand_keys(
    plan: FindPlan,
    by: Behaviour,
    *,
    keys: Sequence[str] = ("PatientID",),
    levels: Sequence[str] = ("SERIES", "IMAGE"),
    status: int = IDENTIFIER_DOES_NOT_MATCH,
) -> bool:
    if plan.level not in levels or all(plan.keys.get(key) for key in keys):
        return False
    plan.refuse = status
    return True


def _no_series_level(plan: FindPlan, by: Behaviour, *, status: int = 0xC000) -> bool:
    if plan.level not in ("SERIES", "IMAGE"):
        return False
    plan.refuse = status
    return True


def _pad_ids(
    plan: FindPlan,
    by: Behaviour,
    *,
    before: str = "",
    after: str = "",
    strip_zeros: bool = False,
    keys: Sequence[str] = ("PatientID",),
) -> bool:
    if not plan.matched:
        _match_by(plan, keys, lambda key, value: key.lstrip(" 0") == value.lstrip(" 0"))
        return False
    found = [(a, key) for a in answers_of(plan, by).values() for key in keys if key in a]
    for answer, key in found:
        value = str(answer.get(key))
        put(answer, key, before + (value.lstrip("0") if strip_zeros else value) + after)
    return bool(found)


def _date_shift(plan: FindPlan, by: Behaviour, *, days: int, answered: bool = True) -> bool:
    if not plan.matched:
        otherwise = plan.matches

        def matching(keyword: str, key: str, value: str) -> bool:
            if keyword == "StudyDate":
                value = _shifted(value, days)
            return otherwise(keyword, key, value)

        plan.matches = matching
        return bool(plan.keys.get("StudyDate")) and not answered
    found = [a for a in answers_of(plan, by).values() if answered and "StudyDate" in a]
    for answer in found:
        put(answer, "StudyDate", _shifted(str(answer.StudyDate), days))
    return bool(found)


def _date_ends(plan: FindPlan, by: Behaviour, *, ends: str = "both") -> bool:
    first, _, last = plan.keys.get("StudyDate", "").partition("-")
    otherwise = plan.matches
    left_out = {"first": {first}, "last": {last}, "both": {first, last}}[ends]

    def matching(keyword: str, key: str, value: str) -> bool:
        if keyword == "StudyDate" and last and value in left_out:
            return False
        return otherwise(keyword, key, value)

    plan.matches = matching
    return bool(last)


def _shifted(day: str, days: int) -> str:
    try:
        return f"{datetime.strptime(day, '%Y%m%d') + timedelta(days=days):%Y%m%d}"
    except ValueError:
        return day


def _omit_keys(plan: FindPlan, by: Behaviour, *, keys: Sequence[str], empty: bool = False) -> bool:
    found = [(a, key) for a in answers_of(plan, by).values() for key in keys if key in a]
    for answer, key in found:
        if empty:
            put(answer, key, None)
        else:
            delattr(answer, key)
    return bool(found)


def _counts(plan: FindPlan, by: Behaviour, *, how: str, by_number: int = 1) -> bool:
    if how == "none":
        return _omit_keys(plan, by, keys=COUNT_KEYWORDS)
    found = [(a, k) for a in answers_of(plan, by).values() for k in COUNT_KEYWORDS if k in a]
    for answer, keyword in found:
        put(answer, keyword, 0 if how == "zero" else int(answer.get(keyword)) + by_number)
    return bool(found)


def _ff01(plan: FindPlan, by: Behaviour) -> bool:
    plan.pending = _PENDING_WITHOUT_OPTIONAL_KEYS
    return bool(plan.answers)


def _duplicate(
    plan: FindPlan, by: Behaviour, *, copies: int = 1, patient_id: str | None = None
) -> bool:
    found = answers_of(plan, by).values()
    for answer in found:
        again = deepcopy(answer)
        if patient_id is not None and "PatientID" in again:
            put(again, "PatientID", patient_id)
        plan.answers.extend([again] * copies)
    return bool(found)


def _charset(plan: FindPlan, by: Behaviour, *, how: str) -> bool:
    declared = {"strip": b"ISO_IR 100", "lie": b"ISO_IR 192", "none": b" " * 10}[how]
    found = answers_of(plan, by)
    for number, answer in found.items():
        for element in list(answer):
            if element.VR in ("LO", "PN", "SH") and element.value:
                held = str(element.value).encode("latin-1", "ignore").decode("latin-1")
                put(answer, element.keyword, held)
        answer.SpecificCharacterSet = "ISO_IR 100"
        plan.rewritten[number] = lambda data: data.replace(b"ISO_IR 100", declared, 1)
    return bool(found)


def _retrieve_aet(plan: FindPlan, by: Behaviour, *, titles: Sequence[str]) -> bool:
    return _say(plan, by, "RetrieveAETitle", list(titles))


def _availability(plan: FindPlan, by: Behaviour, *, value: str) -> bool:
    return _say(plan, by, "InstanceAvailability", value)


def _say(plan: FindPlan, by: Behaviour, keyword: str, value: object) -> bool:
    found = answers_of(plan, by).values()
    for answer in found:
        put(answer, keyword, value)
    return bool(found)


def _time_hang(plan: FindPlan, by: Behaviour, *, hold: threading.Event) -> bool:
    if not (plan.keys.get("StudyDate") and plan.keys.get("StudyTime")):
        return False
    plan.connection.hold_before[0] = hold
    return True


def _garble(
    plan: FindPlan, by: Behaviour, *, answers: Sequence[int] = (0,), how: str = "cut"
) -> bool:
    def spoiled(data: bytes) -> bytes | None:
        # The last element says that it is longer.
        return None if how == "absent" else data[:-1]

    found = [number for number in answers_of(plan, by) if number in answers]
    plan.rewritten.update(dict.fromkeys(found, spoiled))
    return bool(found)


def _cross_talk(plan: FindPlan, by: Behaviour, *, answers: Sequence[int] = (0,)) -> bool:
    found = [number for number in answers_of(plan, by) if number in answers]
    plan.astray.update(found)
    return bool(found)


def _cap(
    plan: FindPlan,
    by: Behaviour,
    *,
    answers: int,
    status: int = CANCEL,
    order: str = "",
    level: str = "",
) -> bool:
    if len(plan.answers) <= answers or level not in ("", plan.level):
        return False
    if order:
        plan.answers.sort(key=lambda answer: str(answer.get(order, "")))
    del plan.answers[answers:]
    plan.status = status
    return True


def _ignore_keys(plan: FindPlan, by: Behaviour, *, keys: Sequence[str]) -> bool:
    ignored = [key for key in keys if plan.keys.get(key)]
    for key in ignored:
        plan.keys[key] = ""
    return bool(ignored)


def _no_image_level(plan: FindPlan, by: Behaviour, *, status: int = UNABLE_TO_PROCESS) -> bool:
    if plan.level != "IMAGE":
        return False
    plan.refuse = status
    return True


def _refuse_find(plan: FindPlan, by: Behaviour, *, status: int) -> None:
    plan.refuse = status


FIND_KNOBS = (
    Knob(
        "find.cap",
        (Stage.FIND_ANSWER,),
        "Ends after `answers` matches with `status` (FE00, A700, B001, or plain success 0000): "
        "the first ones in the `order` of an attribute, or as they were stored; at one `level` or "
        "at all.",
        _cap,
    ),
    Knob(
        "find.ignore_keys",
        (Stage.FIND_QUERY,),
        "Does not match by these `keys`.",
        _ignore_keys,
    ),
    Knob(
        "find.no_image_level",
        (Stage.FIND_QUERY,),
        "Answers queries at IMAGE level with `status`; 0000 makes it an empty list.",
        _no_image_level,
    ),
    Knob(
        "find.refuse",
        (Stage.FIND_QUERY,),
        "Answers with `status` and nothing else.",
        _refuse_find,
    ),
    Knob(
        "find.unsupported_key",
        (Stage.FIND_QUERY,),
        "Answers nothing, with `status`, where one of these `keys` has a value (`returned`: or is "
        "merely requested).",
        _unsupported_key,
    ),
    Knob(
        "find.substring",
        (Stage.FIND_QUERY,),
        "Matches these `keys` wherever they occur in the value, in any case.",
        _substring,
    ),
    Knob(
        "find.case",
        (Stage.FIND_QUERY,),
        "Matches these `keys` in any case.",
        _case,
    ),
    Knob(
        "find.pn_literal",
        (Stage.FIND_QUERY,),
        "Matches PatientName to the letter: case, carets, component groups.",
        _pn_literal,
    ),
    Knob(
        "find.query_charset",
        (Stage.FIND_QUERY,),
        "Finds nothing by a text beyond ASCII unless the query declares one of these `sets`.",
        _query_charset,
    ),
    Knob(
        "find.no_list",
        (Stage.FIND_QUERY,),
        "Matches nothing by a list of values; with `uids` by a list of UIDs neither.",
        _no_list,
    ),
    Knob(
        "find.strict",
        (Stage.FIND_QUERY,),
        "Refuses, with `status`, a query without the unique keys above its level.",
        _strict,
    ),
    Knob(
        "find.demand_keys",
        (Stage.FIND_QUERY,),
        "Refuses, with `status`, a query at these `levels` in which one of these `keys` has no "
        "value.",
        _demand_keys,
    ),
    Knob(
        "find.no_series_level",
        (Stage.FIND_QUERY,),
        "Answers queries at SERIES and IMAGE level with `status`; 0000 makes it an empty list.",
        _no_series_level,
    ),
    Knob(
        "find.pad_ids",
        (
            Stage.FIND_QUERY,
            Stage.FIND_ANSWER,
        ),
        "Matches these `keys` without leading zeros, and answers them with text `before` and "
        "`after`, or without their zeros (`strip_zeros`).",
        _pad_ids,
    ),
    Knob(
        "find.date_shift",
        (
            Stage.FIND_QUERY,
            Stage.FIND_ANSWER,
        ),
        "Matches and answers every StudyDate `days` days later; not `answered`: matches only.",
        _date_shift,
    ),
    Knob(
        "find.date_ends",
        (Stage.FIND_QUERY,),
        "Leaves the `ends` of a range of dates out of it: first, last, both.",
        _date_ends,
    ),
    Knob(
        "find.omit_keys",
        (Stage.FIND_ANSWER,),
        "Leaves out these `keys`, or (`empty`) answers them without a value.",
        _omit_keys,
    ),
    Knob(
        "find.counts",
        (Stage.FIND_ANSWER,),
        "NumberOf…Related…: `how` is none (left out), zero, off_by (`by_number` more).",
        _counts,
    ),
    Knob(
        "find.ff01",
        (Stage.FIND_ANSWER,),
        "Every match has the status FF01.",
        _ff01,
    ),
    Knob(
        "find.duplicate",
        (Stage.FIND_ANSWER,),
        "Gives every match `copies` times more, the copies with `patient_id` if that is given.",
        _duplicate,
    ),
    Knob(
        "find.charset",
        (Stage.FIND_ANSWER,),
        "Answers in Latin-1 without the letters it lacks, and declares that (`how`: strip), UTF-8 "
        "(lie) or nothing (none).",
        _charset,
    ),
    Knob(
        "find.retrieve_aet",
        (Stage.FIND_ANSWER,),
        "Names these `titles` as RetrieveAETitle.",
        _retrieve_aet,
    ),
    Knob(
        "find.availability",
        (Stage.FIND_ANSWER,),
        "Answers `value` as InstanceAvailability: ONLINE, NEARLINE, OFFLINE, UNAVAILABLE.",
        _availability,
    ),
    Knob(
        "find.time_hang",
        (Stage.FIND_ANSWER,),
        "Does not answer a query by date and time before `hold` is set.",
        _time_hang,
    ),
    Knob(
        "find.garble",
        (Stage.FIND_ANSWER,),
        "The `answers` with these numbers (from 0) do not decode (`how`: cut) or have no data set "
        "(absent).",
        _garble,
    ),
    Knob(
        "find.cross_talk",
        (Stage.FIND_ANSWER,),
        "The `answers` with these numbers (from 0) respond to the message before.",
        _cross_talk,
    ),
)
"""All knobs for C-FIND."""
