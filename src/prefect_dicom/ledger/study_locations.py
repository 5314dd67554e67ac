"""Study locations: the nodes that a study was found on or looked for, and with what result.

Kept for cohorts that have several nodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    Connection,
    select,
)

from prefect_dicom.core.model import (
    Study,
    StudyReference,
)
from prefect_dicom.ledger.database import Database, slices
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.records import (
    StudyLocation,
)
from prefect_dicom.ledger.schema import (
    study_locations,
)

StudyLocations = Mapping[str, StudyLocation]
"""The locations of one study by node."""


class StudyLocationTable:
    """Where studies can be retrieved from."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def of_studies(
        self, references: Iterable[StudyReference]
    ) -> dict[StudyReference, dict[str, StudyLocation]]:
        """Of studies of cohorts with several nodes: by node, whether it can be had from there."""
        known: dict[StudyReference, dict[str, StudyLocation]] = {}
        with self._database.read() as connection:
            for piece in slices(references):
                known.update(read_study_locations(connection, piece))
        return known


def read_study_locations(
    connection: Connection, references: Sequence[StudyReference]
) -> dict[StudyReference, dict[str, StudyLocation]]:
    """The copies of each study, by node; as many studies as go into one statement."""
    found: dict[StudyReference, dict[str, StudyLocation]] = defaultdict(dict)
    for row in connection.execute(
        select(study_locations).where(study_locations.c.study.in_(references))
    ):
        found[row.study][row.node] = StudyLocation(
            node=row.node,
            is_found=row.patient_id is not None,
            number_of_instances=row.number_of_instances,
            reason=row.reason,
        )
    return found


def study_at(connection: Connection, reference: StudyReference, node: str) -> Mapping | None:
    """What a node told of a study that it has: patient and counts; None where it was not found."""
    row = connection.execute(
        select(
            study_locations.c.patient_id,
            study_locations.c.number_of_series,
            study_locations.c.number_of_instances,
        ).where(
            study_locations.c.study == reference,
            study_locations.c.node == node,
            study_locations.c.patient_id.is_not(None),
        )
    ).first()
    return None if row is None else row._mapping


def record_found_at(
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
    statement = upsert(study_locations)
    told = ("patient_id", "number_of_series", "number_of_instances")
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=[study_locations.c.study, study_locations.c.node],
            set_={name: statement.excluded[name] for name in told},
        ),
        [rows[key] for key in sorted(rows)],
    )


def record_failed_at(
    connection: Connection,
    upsert: Callable[..., Any],
    reference: StudyReference,
    node: str,
    reason: str,
) -> None:
    """A study could not be had from a node."""
    statement = upsert(study_locations).values(study=reference, node=node, reason=reason)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=[study_locations.c.study, study_locations.c.node],
            set_={"reason": reason},
        )
    )
