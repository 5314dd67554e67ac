"""Storage commitment that we have requested, and what was reported of it: PS3.4 Annex J."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from sqlalchemy import delete, insert, select, update

from prefect_dicom.core.deliveries import Commitment, CommitmentReference, ReportOutcome
from prefect_dicom.core.model import StudyReference
from prefect_dicom.ledger.database import Database, slices, utc_now
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.schema import commitment_references, commitments

COMMITTED = 0
"""Result of a reference that the target takes responsibility for."""


class Commitments:
    """Requests for storage commitment, and their reports."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def begin(
        self,
        transaction_uid: str,
        target: str,
        references: Sequence[CommitmentReference],
        expires_at: datetime,
    ) -> None:
        """Record a request that is about to be sent; its report may come before its response."""
        with self._database.write() as connection:
            number = connection.execute(
                insert(commitments)
                .values(
                    transaction_uid=transaction_uid,
                    target=target,
                    requested_at=utc_now(),
                    expires_at=expires_at,
                )
                .returning(commitments.c.number)
            ).scalar_one()
            connection.execute(
                self._database.insert(commitment_references).on_conflict_do_nothing(),
                [
                    {
                        "commitment": number,
                        "sop_instance_uid": each.sop_instance_uid,
                        "sop_class_uid": each.sop_class_uid,
                        "study": each.study,
                    }
                    for each in references
                ],
            )

    @translate_database_errors
    def withdraw(self, transaction_uid: str) -> None:
        """Expire a request that the target has refused: no report is waited for."""
        with self._database.write() as connection:
            connection.execute(
                update(commitments)
                .where(commitments.c.transaction_uid == transaction_uid)
                .values(expires_at=utc_now())
            )

    @translate_database_errors
    def record_report(self, transaction_uid: str, results: Mapping[str, int]) -> ReportOutcome:
        """Record what a target has reported; what is on record already is not changed.

        Parameters
        ----------
        results : mapping of str to int
            By SOP Instance UID: 0 for committed, else the failure reason.
        """
        with self._database.write() as connection:
            number = connection.execute(
                select(commitments.c.number)
                .where(commitments.c.transaction_uid == transaction_uid)
                .with_for_update()
            ).scalar()
            if number is None:
                return ReportOutcome.UNKNOWN
            known = {
                row.sop_instance_uid: row.result
                for row in connection.execute(
                    select(commitment_references).where(
                        commitment_references.c.commitment == number
                    )
                )
            }
            for uid, result in results.items():
                if known.get(uid, COMMITTED) is None:
                    connection.execute(
                        update(commitment_references)
                        .where(
                            commitment_references.c.commitment == number,
                            commitment_references.c.sop_instance_uid == uid,
                        )
                        .values(result=result)
                    )
            connection.execute(
                update(commitments)
                .where(commitments.c.number == number, commitments.c.reported_at.is_(None))
                .values(reported_at=utc_now())
            )
        return ReportOutcome.RECORDED if known.keys() >= results.keys() else ReportOutcome.FOREIGN

    @translate_database_errors
    def of_study(self, study: StudyReference, target: str) -> list[Commitment]:
        """Return what was requested of a target for a study, the latest request last."""
        query = (
            select(
                commitments.c.number,
                commitments.c.requested_at,
                commitments.c.expires_at,
                commitments.c.reported_at,
                commitment_references.c.sop_instance_uid,
                commitment_references.c.result,
            )
            .join(commitments, commitments.c.number == commitment_references.c.commitment)
            .where(commitment_references.c.study == study, commitments.c.target == target)
            .order_by(commitments.c.number)
        )
        found: dict[int, Commitment] = {}
        with self._database.read() as connection:
            for row in connection.execute(query):
                each = found.setdefault(
                    row.number,
                    Commitment(row.requested_at, row.expires_at, row.reported_at, {}),
                )
                each.results[row.sop_instance_uid] = row.result
        return list(found.values())

    @translate_database_errors
    def forget(self, target: str, studies: Collection[StudyReference]) -> None:
        """Forget the references of studies whose delivery is verified, or is sent anew."""
        ours = select(commitments.c.number).where(commitments.c.target == target)
        with self._database.write() as connection:
            for piece in slices(studies):
                connection.execute(
                    delete(commitment_references).where(
                        commitment_references.c.study.in_(piece),
                        commitment_references.c.commitment.in_(ours),
                    )
                )

    @translate_database_errors
    def open(self) -> int:
        """Return how many requests are neither reported nor expired."""
        with self._database.read() as connection:
            return len(
                connection.execute(
                    select(commitments.c.number).where(
                        commitments.c.reported_at.is_(None), commitments.c.expires_at > utc_now()
                    )
                ).all()
            )
