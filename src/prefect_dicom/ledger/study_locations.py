"""Study locations: the nodes that a study was found on or looked for, and with what result.

Kept for cohorts that have several nodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, select

from prefect_dicom.core.model import Study, StudyReference
from prefect_dicom.ledger.database import Database, slices
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.records import StudyLocation
from prefect_dicom.ledger.schema import study_locations

LocationsByNode = Mapping[str, StudyLocation]
"""The locations of one study by node."""


class StudyLocations:
    """The nodes that studies can be retrieved from."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def of_studies(
        self, references: Iterable[StudyReference]
    ) -> dict[StudyReference, dict[str, StudyLocation]]:
        """Return the locations of each study, by node; only cohorts with several nodes have any."""
        known: dict[StudyReference, dict[str, StudyLocation]] = {}
        with self._database.read() as connection:
            for piece in slices(references):
                known.update(read_study_locations(connection, piece))
        return known


def read_study_locations(
    connection: Connection, references: Sequence[StudyReference]
) -> dict[StudyReference, dict[str, StudyLocation]]:
    """Return the locations of each study, by node; as many studies as fit into one statement."""
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


def study_at(connection: Connection, reference: StudyReference, node: str) -> dict[str, Any] | None:
    """Return PatientID and counts of a study at a node; None where it was not found there."""
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
    return None if row is None else row._asdict()


def record_found_at(
    database: Database,
    connection: Connection,
    found: Iterable[tuple[StudyReference, str, Study]],
) -> None:
    """Record that nodes have studies. The reason of an earlier failure there is kept."""
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
    statement = database.insert(study_locations)
    attributes = ("patient_id", "number_of_series", "number_of_instances")
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=[study_locations.c.study, study_locations.c.node],
            set_={name: statement.excluded[name] for name in attributes},
        ),
        [rows[key] for key in sorted(rows)],
    )


def record_failed_at(
    database: Database,
    connection: Connection,
    reference: StudyReference,
    node: str,
    reason: str,
) -> None:
    """Record why a study could not be retrieved from a node."""
    statement = database.insert(study_locations).values(study=reference, node=node, reason=reason)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=[study_locations.c.study, study_locations.c.node],
            set_={"reason": reason},
        )
    )
