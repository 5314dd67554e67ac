"""The states of studies and instances, and which may follow which; ``docs/promise.md``."""

from __future__ import annotations

from prefect_dicom.core.model import (
    InstanceState,
    StudyState,
)

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
