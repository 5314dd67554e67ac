"""Knobs for what a C-MOVE or C-GET sends, and what it reports."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefect_dicom.testing.matching import UNIQUE_KEYS
from prefect_dicom.testing.plans import (
    DESTINATION_UNKNOWN,
    IDENTIFIER_DOES_NOT_MATCH,
    NOT_AUTHORISED,
    SUCCESS,
    UNABLE_TO_PROCESS,
    Knob,
    RetrievePlan,
    Stage,
    SubOperation,
)

if TYPE_CHECKING:
    from prefect_dicom.testing.script import Behaviour


def _success_nothing(plan: RetrievePlan, by: Behaviour) -> None:
    plan.operations.clear()
    plan.status = SUCCESS


def _early_success(
    plan: RetrievePlan, by: Behaviour, *, after: int = 0, hold: threading.Event | None = None
) -> None:
    plan.status = SUCCESS
    plan.final_before = after
    plan.keep_sending = True
    if hold is not None:
        plan.connection.hold_before[after] = hold


def _drop_instances(plan: RetrievePlan, by: Behaviour, *, instances: int | Sequence[str]) -> bool:
    dropped = by.pick(plan.operations, instances)
    plan.operations[:] = [o for o in plan.operations if o not in dropped]
    return bool(dropped)


def _zero_counts(plan: RetrievePlan, by: Behaviour, *, status: int | None = None) -> None:
    plan.count = False
    plan.status = status


def _final_status(plan: RetrievePlan, by: Behaviour, *, status: int) -> None:
    plan.status = status


def _refuse_retrieve(plan: RetrievePlan, by: Behaviour, *, status: int) -> None:
    plan.refuse = status


def _unknown_destination(
    plan: RetrievePlan, by: Behaviour, *, status: int = DESTINATION_UNKNOWN
) -> None:
    plan.refuse = status


def _stop_at_failure(plan: RetrievePlan, by: Behaviour) -> None:
    plan.stop_at_failure = True


def _fail_but_all(plan: RetrievePlan, by: Behaviour, *, status: int = UNABLE_TO_PROCESS) -> None:
    plan.status = status
    plan.disown = True


def _bad_counts(
    plan: RetrievePlan, by: Behaviour, *, counts: tuple[int | None, ...] = (70_000, -1, 0, 3)
) -> None:
    plan.counts = counts


def _no_pending(plan: RetrievePlan, by: Behaviour) -> None:
    plan.pendings = False


def _no_originator(plan: RetrievePlan, by: Behaviour) -> bool:
    for operation in plan.operations:
        operation.originator = False
    return plan.service == "C-MOVE" and bool(plan.operations)


def _failed_list(plan: RetrievePlan, by: Behaviour, *, uids: Sequence[str] = ()) -> None:
    plan.failed_list = lambda _: list(uids)


def _no_list(plan: RetrievePlan, by: Behaviour, *, status: int | None = None) -> bool:
    key = plan.keys.get(UNIQUE_KEYS[plan.level], "")
    if "\\" not in key:
        return False
    plan.refuse = status
    first = key.split("\\")[0]
    plan.operations[:] = [
        o for o in plan.operations if o.stored.attributes.get(UNIQUE_KEYS[plan.level]) == first
    ]
    return True


def _no_retrieve_at_image_level(
    plan: RetrievePlan, by: Behaviour, *, status: int | None = IDENTIFIER_DOES_NOT_MATCH
) -> bool:
    if plan.level != "IMAGE":
        return False
    plan.refuse = status
    study = {"StudyInstanceUID": plan.keys.get("StudyInstanceUID", "")}
    plan.operations[:] = [
        SubOperation.of(stored)
        for members in plan.pacs.holdings.studies(study)
        for stored in members
    ]
    return True


def _disabled(plan: RetrievePlan, by: Behaviour, *, status: int | None = NOT_AUTHORISED) -> bool:
    if plan.service != "C-GET":
        return False
    plan.refuse = status
    if status is None:
        plan.connection.drop_after = 0
    return True


def _stop_on_class(plan: RetrievePlan, by: Behaviour) -> None:
    plan.stop_at_class = True


def _keep_sending(plan: RetrievePlan, by: Behaviour) -> None:
    plan.keep_sending = True


def _late(
    plan: RetrievePlan,
    by: Behaviour,
    *,
    hold: threading.Event,
    instances: int | Sequence[str] = 1,
    promised: bool = False,
) -> bool:
    plan.late = by.pick(plan.operations, instances)
    plan.late_hold = hold
    if promised:
        plan.counts = (None, len(plan.operations), 0, 0)
    plan.operations[:] = [o for o in plan.operations if o not in plan.late]
    plan.status = SUCCESS
    return bool(plan.late)


def _ignore_cancel(plan: RetrievePlan, by: Behaviour, *, how: str = "ignore") -> None:
    plan.on_cancel = how


def _many_assocs(plan: RetrievePlan, by: Behaviour, *, each: int = 1) -> bool:
    plan.each_association = each
    return len(plan.operations) > each


def _empty_assoc(
    plan: RetrievePlan, by: Behaviour, *, associations: int = 1, stay_open: bool = False
) -> None:
    plan.empty_associations = associations
    plan.empty_stay_open = stay_open


def _queue(plan: RetrievePlan, by: Behaviour, *, turn: threading.Semaphore) -> None:
    plan.turn = turn


def _corrupt(
    plan: RetrievePlan,
    by: Behaviour,
    *,
    instances: int | Sequence[str] = 1,
    status: int | None = None,
) -> bool:
    picked = by.pick(plan.operations, instances)
    for operation in picked:
        operation.readable = False
    if picked and status is not None:
        plan.status = status
    return bool(picked)


RETRIEVE_KNOBS = (
    Knob(
        "move.success_nothing",
        (Stage.RETRIEVE,),
        "Reports success and sends nothing.",
        _success_nothing,
    ),
    Knob(
        "move.early_success",
        (Stage.RETRIEVE,),
        "Reports success when `after` instances are sent; the others follow when `hold` is set.",
        _early_success,
    ),
    Knob(
        "move.drop_instances",
        (Stage.RETRIEVE,),
        "Never sends these `instances` (UIDs, or a number per study), and reports success.",
        _drop_instances,
    ),
    Knob(
        "move.zero_counts",
        (Stage.RETRIEVE,),
        "All counters are zero; `status` replaces the final status.",
        _zero_counts,
    ),
    Knob(
        "move.final_status",
        (Stage.RETRIEVE,),
        "Sends everything and ends with `status`.",
        _final_status,
    ),
    Knob(
        "move.refuse",
        (Stage.RETRIEVE,),
        "Answers with `status` and nothing else.",
        _refuse_retrieve,
    ),
    Knob(
        "move.fail_but_all",
        (Stage.RETRIEVE,),
        "Sends everything, counts and names all of it as failed, and ends with `status`.",
        _fail_but_all,
    ),
    Knob(
        "move.bad_counts",
        (Stage.RETRIEVE,),
        "Every response has these `counts` (remaining, completed, failed, warning; None leaves "
        "one out; beyond 65535 it takes four bytes).",
        _bad_counts,
    ),
    Knob(
        "move.no_pending",
        (Stage.RETRIEVE,),
        "Sends no pending response.",
        _no_pending,
    ),
    Knob(
        "move.no_originator",
        (Stage.RETRIEVE,),
        "Leaves the Move Originator fields out of what it sends.",
        _no_originator,
    ),
    Knob(
        "move.failed_list",
        (Stage.RETRIEVE,),
        "The Failed SOP Instance UID List holds these `uids`, whatever failed; none: it is absent.",
        _failed_list,
    ),
    Knob(
        "move.no_list",
        (Stage.RETRIEVE,),
        "Of a list of UIDs it sends what the first one names, or refuses it with `status`.",
        _no_list,
    ),
    Knob(
        "move.no_image_level",
        (Stage.RETRIEVE,),
        "Refuses requests at IMAGE level with `status`; None: it sends the whole study.",
        _no_retrieve_at_image_level,
    ),
    Knob(
        "move.keep_sending",
        (Stage.RETRIEVE,),
        "Goes on sending when the request's association has been lost.",
        _keep_sending,
    ),
    Knob(
        "move.late",
        (Stage.RETRIEVE,),
        "Reports success, and sends these `instances` when `hold` is set, however late; "
        "`promised`: they are counted as completed.",
        _late,
    ),
    Knob(
        "move.ignore_cancel",
        (Stage.RETRIEVE,),
        "A C-CANCEL stops nothing; `how`: ignore, answer (FE00 at once), abort.",
        _ignore_cancel,
    ),
    Knob(
        "move.many_assocs",
        (Stage.RETRIEVE,),
        "Opens another association to the destination after `each` instances.",
        _many_assocs,
    ),
    Knob(
        "move.empty_assoc",
        (Stage.RETRIEVE,),
        "First opens `associations` to the destination and sends nothing over them; with "
        "`stay_open` they are released only at the end.",
        _empty_assoc,
    ),
    Knob(
        "get.disabled",
        (Stage.RETRIEVE,),
        "Offers C-GET and answers each with `status`; None: with an A-ABORT.",
        _disabled,
    ),
    Knob(
        "get.stop_on_class",
        (Stage.RETRIEVE,),
        "Stops with C000 at the first instance for which there is no presentation context.",
        _stop_on_class,
    ),
    Knob(
        "assoc.queue",
        (Stage.RETRIEVE,),
        "Does not begin before it has acquired `turn`, a semaphore, which it then holds.",
        _queue,
    ),
    Knob(
        "pacs.corrupt",
        (Stage.RETRIEVE,),
        "Cannot read these `instances`: listed, and counted and named as failed whenever they are "
        "due; `status` replaces the final status (B000, A702).",
        _corrupt,
    ),
    Knob(
        "move.unknown_destination",
        (Stage.RETRIEVE,),
        "Does not know the move destination (A801; C000 on some).",
        _unknown_destination,
    ),
    Knob(
        "move.stop_at_failure",
        (Stage.RETRIEVE,),
        "Stops at the first failed sub-operation with C000 and counters of zero.",
        _stop_at_failure,
    ),
)
"""All knobs for the requests and responses of C-MOVE and C-GET."""
