"""Acceptances: what people have decided about studies that would fail otherwise, on record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from prefect_dicom.core.model import InstanceKey, StudyReference, StudyState
from prefect_dicom.ledger.database import Database, slices, utc_now
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.records import Acceptance
from prefect_dicom.ledger.schema import acceptances, cohort_rows, row_studies, studies
from prefect_dicom.ledger.statements import study_can_become

_HOLDS = acceptances.c.withdrawn_at.is_(None)


class Acceptances:
    """What people have accepted of studies; kept for good, also what they have taken back."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def add(self, cohort: int, accepted: Collection[Acceptance]) -> list[Acceptance]:
        """Record what a person has accepted, and make the failed studies concerned pending again.

        Returns
        -------
        list of Acceptance
            As they were recorded, with the time.
        """
        recorded = [replace(each, accepted_at=utc_now()) for each in accepted]
        if not recorded:
            return []
        with self._database.write() as connection:
            connection.execute(
                insert(acceptances),
                [
                    {
                        "cohort": cohort,
                        "study": each.study,
                        "reason": each.reason,
                        "patient_id": each.patient_id,
                        "missing": [list(key) for key in each.missing] or None,
                        "accepted_by": each.accepted_by,
                        "accepted_at": each.accepted_at,
                        "note": each.note,
                    }
                    for each in recorded
                ],
            )
            self._reopen(connection, [each.study for each in recorded if each.study is not None])
        return recorded

    @translate_database_errors
    def withdraw(self, numbers: Iterable[int], by: str) -> None:
        """Record that decisions do not hold any more; what was archived by them stays."""
        with self._database.write() as connection:
            connection.execute(
                update(acceptances)
                .where(acceptances.c.number.in_([*numbers]), acceptances.c.withdrawn_at.is_(None))
                .values(withdrawn_by=by, withdrawn_at=utc_now())
            )

    def _reopen(self, connection: Connection, references: Iterable[StudyReference]) -> None:
        for piece in slices(sorted(references)):
            chosen = studies.c.reference.in_(piece)
            self._database.lock_studies(connection, chosen)
            connection.execute(
                update(studies)
                .where(chosen, study_can_become(StudyState.PENDING, StudyState.FAILED))
                .values(state=StudyState.PENDING, reason=None, detail="")
            )

    @translate_database_errors
    def of_cohort(self, cohort: int) -> list[Acceptance]:
        """Return what was accepted in a cohort, in the order of the decisions."""
        query = select(acceptances).where(acceptances.c.cohort == cohort)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(acceptances.c.number)).all()
        return [_acceptance(row) for row in rows]

    @translate_database_errors
    def of_studies(
        self, cohort: int, references: Iterable[StudyReference]
    ) -> dict[StudyReference, list[Acceptance]]:
        """Return what holds of each study, accepted in whatever cohort, and of the whole cohort."""
        references = list(references)
        found: dict[StudyReference, list[Acceptance]] = defaultdict(list)
        with self._database.read() as connection:
            of_all = [
                _acceptance(row)
                for row in connection.execute(
                    select(acceptances)
                    .where(acceptances.c.cohort == cohort, acceptances.c.study.is_(None), _HOLDS)
                    .order_by(acceptances.c.number)
                )
            ]
            for piece in slices(references):
                for row in connection.execute(
                    select(acceptances)
                    .where(acceptances.c.study.in_(piece), _HOLDS)
                    .order_by(acceptances.c.number)
                ):
                    found[row.study].append(_acceptance(row))
        return {reference: [*found[reference], *of_all] for reference in references}

    @translate_database_errors
    def numbers_of_rows(
        self, cohort: int, references: Iterable[StudyReference]
    ) -> dict[StudyReference, frozenset[str]]:
        """Return the PatientIDs that the rows of each study say are one patient's.

        None where no row of a study gives another number of its patient.
        """
        found: dict[StudyReference, set[str]] = defaultdict(set)
        columns = (row_studies.c.study, cohort_rows.c.patient_id, cohort_rows.c.other_patient_id)
        with self._database.read() as connection:
            for piece in slices(references):
                for study, *numbers in connection.execute(
                    select(*columns)
                    .join(
                        cohort_rows,
                        (cohort_rows.c.cohort == row_studies.c.cohort)
                        & (cohort_rows.c.line == row_studies.c.line),
                    )
                    .where(
                        row_studies.c.cohort == cohort,
                        row_studies.c.study.in_(piece),
                        cohort_rows.c.other_patient_id.is_not(None),
                    )
                ):
                    found[study].update(filter(None, numbers))
        return {study: frozenset(numbers) for study, numbers in found.items()}


def _acceptance(row: Row[Any]) -> Acceptance:
    return Acceptance(
        study=row.study,
        reason=row.reason,
        patient_id=row.patient_id,
        missing=tuple(InstanceKey(*key) for key in row.missing or ()),
        accepted_by=row.accepted_by,
        accepted_at=row.accepted_at,
        note=row.note,
        number=row.number,
        withdrawn_by=row.withdrawn_by,
        withdrawn_at=row.withdrawn_at,
    )
