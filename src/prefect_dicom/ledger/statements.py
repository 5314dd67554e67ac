"""Statements that run for every study, built once: building one costs more than running it.

Each change of a state looks for the states that the tables of
:mod:`prefect_dicom.core.transitions` allow it from. Parameters begin with ``b_``, so that none is
taken for a column of the row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Table,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from prefect_dicom.core.model import InstanceState, StudyState
from prefect_dicom.core.transitions import INSTANCE_TRANSITIONS, STUDY_TRANSITIONS, predecessors
from prefect_dicom.ledger.schema import IS_LISTED, NO_LONGER_LISTED, instances, studies


def _of_key(statement: Any) -> Any:
    """The statement, for one instance: ``b_study``, ``b_series``, ``b_instance``."""
    return statement.where(
        instances.c.study == bindparam("b_study"),
        instances.c.series_instance_uid == bindparam("b_series"),
        instances.c.sop_instance_uid == bindparam("b_instance"),
    )


def study_can_become(target: StudyState, *only: StudyState) -> ColumnElement[bool]:
    """Condition on a row of ``studies``: its state may change to ``target``.

    Parameters
    ----------
    *only : StudyState
        The states that this change starts from; all that are allowed, where none is given.
    """
    return _in_states(studies, predecessors(STUDY_TRANSITIONS, target, *only))


def _instance_can_become(target: InstanceState, *only: InstanceState) -> ColumnElement[bool]:
    return _in_states(instances, predecessors(INSTANCE_TRANSITIONS, target, *only))


def _in_states(
    table: Table, states: Iterable[StudyState] | Iterable[InstanceState]
) -> ColumnElement[bool]:
    # Spelled out: a list of values does not go with a batch.
    return or_(*(table.c.state == state for state in states))


_STUDIES = instances.c.study.in_(bindparam("b_studies", expanding=True))

# --- studies

CLAIMS = (
    select(studies.c.reference, studies.c.run, studies.c.attempt)
    .where(studies.c.reference.in_(bindparam("b_studies", expanding=True)))
    .order_by(studies.c.reference)
)
HOLD_CLAIMS = CLAIMS.with_for_update(key_share=True)

STUDY_LISTED = (
    update(studies)
    .where(studies.c.reference == bindparam("b_study"), study_can_become(StudyState.LISTED))
    .values(
        state=StudyState.LISTED,
        evidence=bindparam("b_evidence", type_=studies.c.evidence.type),
        listed_at=bindparam("b_listed_at", type_=studies.c.listed_at.type),
        counted_instances=bindparam("b_counted"),
        listed_by=bindparam("b_node"),
        selection=func.coalesce(
            bindparam("b_selection", type_=studies.c.selection.type), studies.c.selection
        ),
    )
)

STUDY_ARCHIVED = (
    update(studies)
    .where(studies.c.reference == bindparam("b_study"), study_can_become(StudyState.ARCHIVED))
    .values(
        state=StudyState.ARCHIVED,
        run=None,
        archived_at=bindparam("b_archived_at", type_=studies.c.archived_at.type),
        archived_instances=bindparam("b_instances"),
        withheld_instances=bindparam("b_withheld"),
        missing_instances=bindparam("b_missing"),
        archived_bytes=bindparam("b_size_bytes"),
        evidence=func.coalesce(
            bindparam("b_evidence", type_=studies.c.evidence.type), studies.c.evidence
        ),
    )
)

# --- instances

INSTANCES = (
    select(instances)
    .where(instances.c.study == bindparam("b_study"))
    .order_by(instances.c.series_instance_uid, instances.c.sop_instance_uid)
)

COUNTS = (
    select(
        instances.c.study,
        instances.c.state,
        func.count(),
        func.coalesce(func.sum(instances.c.size_bytes), 0),
    )
    .where(_STUDIES, IS_LISTED)
    .group_by(instances.c.study, instances.c.state)
)

LISTS = select(
    instances.c.study,
    instances.c.series_instance_uid,
    instances.c.sop_instance_uid,
    instances.c.state,
    instances.c.reason,
).where(_STUDIES)

EXPECT = insert(instances)

EXPECT_AGAIN = _of_key(
    update(instances)
    .where(_instance_can_become(InstanceState.EXPECTED, InstanceState.REJECTED))
    .values(state=InstanceState.EXPECTED, reason=None, rejections=0)
)

RETURN = _of_key(
    update(instances)
    .where(
        instances.c.reason == NO_LONGER_LISTED,
        _instance_can_become(InstanceState.EXPECTED, InstanceState.REJECTED),
    )
    .values(state=InstanceState.EXPECTED, reason=None, rejections=0)
)

FORGET = _of_key(delete(instances))

WITHDRAW = _of_key(
    update(instances)
    .where(
        or_(
            _instance_can_become(
                InstanceState.REJECTED, InstanceState.RECEIVED, InstanceState.STORED
            ),
            # It was left out for another reason, and now for this one.
            instances.c.state == InstanceState.REJECTED,
        )
    )
    .values(state=InstanceState.REJECTED, reason=NO_LONGER_LISTED)
)

RECEIVED = _of_key(
    update(instances)
    .where(_instance_can_become(InstanceState.RECEIVED))
    .values(
        state=InstanceState.RECEIVED,
        sop_class_uid=bindparam("b_sop_class_uid"),
        transfer_syntax_uid=bindparam("b_transfer_syntax_uid"),
        sha256=bindparam("b_sha256"),
        size_bytes=bindparam("b_size_bytes"),
        spool_name=bindparam("b_spool_name"),
        node=bindparam("b_node"),
    )
)

CONFIRMED = _of_key(
    update(instances)
    .where(_in_states(instances, (InstanceState.RECEIVED, InstanceState.STORED)))
    .values(node=bindparam("b_node"))
)

LOST = _of_key(
    update(instances)
    .where(
        _instance_can_become(InstanceState.EXPECTED, InstanceState.RECEIVED, InstanceState.STORED)
    )
    .values(
        state=InstanceState.EXPECTED,
        spool_name=None,
        object_key=None,
        version_id=None,
        rejections=instances.c.rejections + 1,
    )
)

REJECTED = _of_key(
    update(instances)
    .where(
        _instance_can_become(InstanceState.REJECTED, InstanceState.EXPECTED, InstanceState.RECEIVED)
    )
    .values(state=InstanceState.REJECTED, reason=bindparam("b_reason"))
)

STORED = _of_key(
    update(instances)
    .where(
        _instance_can_become(InstanceState.STORED),
        instances.c.sha256 == bindparam("b_sha256"),
    )
    .values(
        state=InstanceState.STORED,
        object_key=bindparam("b_object_key"),
        version_id=bindparam("b_version_id"),
        warnings=bindparam("b_warnings", type_=instances.c.warnings.type),
    )
)

FORGET_ARCHIVED = delete(instances).where(
    instances.c.study == bindparam("b_study"),
    or_(IS_LISTED, instances.c.object_key.is_(None)),
)
"""All but those that were stored and left the list afterwards: only the ledger knows them."""
