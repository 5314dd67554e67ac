"""Where a study can be had: the nodes it was found on, or looked for, and what came of that.

Kept for cohorts that have several nodes. Every function is part of its caller's transaction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, select

from prefect_dicom.core.model import Study, StudyReference
from prefect_dicom.ledger.records import Copy
from prefect_dicom.ledger.schema import copies

Copies = Mapping[str, Copy]
"""The copies of a study by node."""


def read_copies(
    connection: Connection, references: Sequence[StudyReference]
) -> dict[StudyReference, dict[str, Copy]]:
    """The copies of each study, by node; as many studies as go into one statement."""
    found: dict[StudyReference, dict[str, Copy]] = defaultdict(dict)
    for row in connection.execute(select(copies).where(copies.c.study.in_(references))):
        found[row.study][row.node] = Copy(
            node=row.node,
            is_found=row.patient_id is not None,
            number_of_instances=row.number_of_instances,
            reason=row.reason,
        )
    return found


def study_at(connection: Connection, reference: StudyReference, node: str) -> Mapping | None:
    """What a node told of a study that it has: patient and counts; None where it was not found."""
    row = connection.execute(
        select(copies.c.patient_id, copies.c.number_of_series, copies.c.number_of_instances).where(
            copies.c.study == reference, copies.c.node == node, copies.c.patient_id.is_not(None)
        )
    ).first()
    return None if row is None else row._mapping


def keep_found(
    connection: Connection,
    upsert: Callable[..., Any],
    found: Iterable[tuple[StudyReference, str, Study]],
) -> None:
    """A node has a study. That it could not be had from there before stays on record."""
    rows = {
        (reference, node): {
            "study": reference,
            "node": node,
            "patient_id": study.patient_id,
            "number_of_series": study.number_of_series,
            "number_of_instances": study.number_of_instances,
        }
        for reference, node, study in found
    }
    if not rows:
        return
    statement = upsert(copies)
    told = ("patient_id", "number_of_series", "number_of_instances")
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=[copies.c.study, copies.c.node],
            set_={name: statement.excluded[name] for name in told},
        ),
        [rows[key] for key in sorted(rows)],
    )


def keep_failed(
    connection: Connection,
    upsert: Callable[..., Any],
    reference: StudyReference,
    node: str,
    reason: str,
) -> None:
    """A study could not be had from a node."""
    statement = upsert(copies).values(study=reference, node=node, reason=reason)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=[copies.c.study, copies.c.node], set_={"reason": reason}
        )
    )
