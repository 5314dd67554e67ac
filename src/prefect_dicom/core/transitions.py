"""State transitions of studies and instances; ``docs/promise.md`` says what they promise.

The ledger takes the states that its statements look for from these tables
(:func:`predecessors`), so that no write can change a state otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from prefect_dicom.core.deliveries import DeliveryState
from prefect_dicom.core.model import InstanceState, StudyState

State = TypeVar("State", StudyState, InstanceState, DeliveryState)

STUDY_TRANSITIONS: dict[StudyState, frozenset[StudyState]] = {
    # Pending again: one node has failed, and another is asked.
    StudyState.PENDING: frozenset({StudyState.LISTED, StudyState.FAILED, StudyState.PENDING}),
    # A changed list is listed again.
    StudyState.LISTED: frozenset(
        {StudyState.LISTED, StudyState.ARCHIVED, StudyState.FAILED, StudyState.PENDING}
    ),
    StudyState.ARCHIVED: frozenset(),
    # A rerun begins with a new list; what was stored stays stored.
    StudyState.FAILED: frozenset({StudyState.PENDING}),
}

INSTANCE_TRANSITIONS: dict[InstanceState, frozenset[InstanceState]] = {
    InstanceState.EXPECTED: frozenset({InstanceState.RECEIVED, InstanceState.REJECTED}),
    # Back to expected: the spool file was damaged, or an object did not pass validation once.
    InstanceState.RECEIVED: frozenset(
        {InstanceState.STORED, InstanceState.REJECTED, InstanceState.EXPECTED}
    ),
    # Taken off the PACS's list after it was stored; its object stays. Or back to expected: the
    # archive no longer has the object.
    InstanceState.STORED: frozenset({InstanceState.REJECTED, InstanceState.EXPECTED}),
    # A rerun asks again for what was left out.
    InstanceState.REJECTED: frozenset({InstanceState.EXPECTED}),
}


def predecessors(
    transitions: Mapping[State, frozenset[State]], target: State, *only: State
) -> tuple[State, ...]:
    """Return the states that a change to ``target`` may start from.

    Parameters
    ----------
    transitions : mapping of state to states
        :data:`STUDY_TRANSITIONS` or another table of these.
    target : StudyState, InstanceState or DeliveryState
    *only : StudyState, InstanceState or DeliveryState
        The states that one particular change starts from. Without any: all that are allowed.

    Raises
    ------
    ValueError
        The table does not allow the change from one of ``only``.
    """
    allowed = tuple(source for source, targets in transitions.items() if target in targets)
    for source in only:
        if source not in allowed:
            raise ValueError(f"{source} cannot become {target}")
    return only or allowed
