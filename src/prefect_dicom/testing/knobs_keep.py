"""Knobs for the instances that are sent to the PACS: what it holds of them, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefect_dicom.testing.instances import instance_of_bytes, with_elements
from prefect_dicom.testing.plans import End, KeepPlan, Knob, Stage

if TYPE_CHECKING:
    from prefect_dicom.testing.script import Behaviour


def _concerned(plan: KeepPlan, instances: Sequence[str] | None) -> bool:
    return instances is None or plan.received.sop_instance_uid in instances


def _drop(plan: KeepPlan, by: Behaviour, *, instances: Sequence[str] | None = None) -> bool:
    if not _concerned(plan, instances):
        return False
    plan.kept = None
    return True


def _coerce(
    plan: KeepPlan,
    by: Behaviour,
    *,
    elements: dict[str, Any],
    instances: Sequence[str] | None = None,
    status: int = 0x0000,
) -> bool:
    if not _concerned(plan, instances):
        return False
    received = plan.received
    data = with_elements(received.encoded(), received.transfer_syntax_uid, elements)
    plan.kept = instance_of_bytes(data, received.transfer_syntax_uid)
    plan.status = status
    return True


def _first(plan: KeepPlan, by: Behaviour) -> bool:
    uid = plan.received.sop_instance_uid
    held = [one for one in plan.pacs.holdings if one.sop_instance_uid == uid]
    if held:
        plan.kept = None
    return bool(held)


def _status(
    plan: KeepPlan,
    by: Behaviour,
    *,
    status: int,
    instances: Sequence[str] | None = None,
    keeps: bool = False,
) -> bool:
    if not _concerned(plan, instances):
        return False
    plan.status = status
    if not keeps:
        plan.kept = None
    return True


def _end(
    plan: KeepPlan,
    by: Behaviour,
    *,
    how: str = "abort",
    instances: Sequence[str] | None = None,
    keeps: bool = False,
) -> bool:
    if not _concerned(plan, instances):
        return False
    plan.end = End(how)
    if not keeps:
        plan.kept = None
    return True


KEEP_KNOBS = (
    Knob(
        "keep.drop",
        (Stage.KEEP,),
        "Answers success to a C-STORE, and drops the instance; with `instances` (UIDs), these.",
        _drop,
    ),
    Knob(
        "keep.coerce",
        (Stage.KEEP,),
        "Holds instances that are sent to it with other values of these `elements`, and answers "
        "with `status`.",
        _coerce,
    ),
    Knob(
        "keep.first",
        (Stage.KEEP,),
        "Answers success to an instance whose UID it holds, and keeps the one that it has.",
        _first,
    ),
    Knob(
        "keep.status",
        (Stage.KEEP,),
        "Answers a C-STORE with this `status`, and holds the instance if it `keeps` it.",
        _status,
    ),
    Knob(
        "keep.end",
        (Stage.KEEP,),
        "Ends the association instead of a C-STORE response (`how`: abort, close, reset), and "
        "holds the instance if it `keeps` it.",
        _end,
    ),
)
"""All knobs for the C-STORE requests that come."""
