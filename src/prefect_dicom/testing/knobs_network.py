"""Knobs for the connection of a request and for the PACS as a whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from prefect_dicom.testing.plans import End, FindPlan, Knob, RetrievePlan, Stage

if TYPE_CHECKING:
    from prefect_dicom.testing.pacs import ScriptedPacs
    from prefect_dicom.testing.script import Behaviour

_ANY = (Stage.FIND_ANSWER, Stage.RETRIEVE)


def _mutate(
    plan: FindPlan, by: Behaviour, *, change: Callable[[ScriptedPacs], None], level: str = "IMAGE"
) -> bool:
    if plan.level != level:
        return False
    change(plan.pacs)
    return True


def _drop_after(
    plan: FindPlan | RetrievePlan,
    by: Behaviour,
    *,
    answers: int,
    how: str = "abort",
    source: int = 0,
    reason: int = 0,
    keep_sending: bool = False,
) -> bool:
    length = len(plan.operations if isinstance(plan, RetrievePlan) else plan.answers)
    if length < answers:
        return False
    plan.connection.drop_after = answers
    plan.connection.drop_by = End(how, source, reason)
    if isinstance(plan, RetrievePlan):
        plan.keep_sending = keep_sending
    return True


def _first_byte(plan: FindPlan | RetrievePlan, by: Behaviour, *, hold: threading.Event) -> None:
    plan.connection.hold_before[0] = hold


def _stall_after(
    plan: FindPlan | RetrievePlan, by: Behaviour, *, answers: int, hold: threading.Event
) -> bool:
    length = len(plan.operations if isinstance(plan, RetrievePlan) else plan.answers)
    plan.connection.hold_before[answers] = hold
    return answers < length


def _slow(plan: FindPlan | RetrievePlan, by: Behaviour, *, seconds: float) -> None:
    plan.connection.pause_seconds = seconds


def _blackhole(plan: FindPlan | RetrievePlan, by: Behaviour, *, answers: int = 0) -> bool:
    length = len(plan.operations if isinstance(plan, RetrievePlan) else plan.answers)
    plan.connection.mute_after = answers
    return answers <= length


def _restart(
    plan: FindPlan | RetrievePlan,
    by: Behaviour,
    *,
    answers: int = 0,
    back: threading.Event | None = None,
) -> bool:
    length = len(plan.operations if isinstance(plan, RetrievePlan) else plan.answers)
    plan.connection.restart_after = answers
    plan.connection.back = back
    return answers <= length


def _nagle(plan: RetrievePlan, by: Behaviour) -> None:
    plan.manner.nagle = True


NETWORK_KNOBS = (
    Knob(
        "pacs.mutate",
        (Stage.FIND_DONE,),
        "After a query at `level` has been answered, calls `change` with the PACS.",
        _mutate,
    ),
    Knob(
        "net.drop_after",
        _ANY,
        "Loses the request's association after `answers` answers; `how`: abort (with `source` and "
        "`reason`), close, reset.",
        _drop_after,
    ),
    Knob(
        "net.blackhole",
        _ANY,
        "After `answers` answers neither sends nor reads anything, as behind a firewall that has "
        "forgotten the connection.",
        _blackhole,
    ),
    Knob(
        "net.nagle",
        (Stage.RETRIEVE,),
        "Sends in small segments with Nagle's algorithm, as DCMTK does.",
        _nagle,
    ),
    Knob(
        "pacs.restart",
        _ANY,
        "Goes down after `answers` answers, forgets all requests, and is back when `back` is set.",
        _restart,
    ),
    Knob(
        "net.slow",
        _ANY,
        "Waits `seconds` seconds before each answer.",
        _slow,
    ),
    Knob(
        "net.first_byte",
        _ANY,
        "Does not answer at all before `hold` is set.",
        _first_byte,
    ),
    Knob(
        "net.stall_after",
        _ANY,
        "Falls silent after `answers` answers until `hold` is set.",
        _stall_after,
    ),
)
"""All knobs for the connection and the PACS."""
