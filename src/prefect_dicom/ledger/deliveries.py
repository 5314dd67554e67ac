"""Deliveries of studies to other nodes: their states, claims and instances.

A delivery is claimed as a study is (:mod:`prefect_dicom.ledger.claims`): the run and the attempt
are in its row, and each write is conditional on both.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    delete,
    func,
    or_,
    select,
    update,
)

from prefect_dicom.core.deliveries import (
    DELIVERY_TRANSITIONS,
    DeliveredInstance,
    DeliveredState,
    DeliveryClaim,
    DeliveryEvidence,
    DeliveryMethod,
    DeliveryState,
)
from prefect_dicom.core.errors import ClaimLost, LedgerError
from prefect_dicom.core.model import InstanceKey, StudyReference, StudyState
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.core.transitions import predecessors
from prefect_dicom.ledger.database import Database, slices, utc_now
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.queries import PAGE_SIZE, STUDY_COLUMNS, study_of
from prefect_dicom.ledger.records import DeliveryRecord, DeliveryTotals, Run
from prefect_dicom.ledger.schema import (
    delivered_instances,
    deliveries,
    row_studies,
    studies,
)

_UNFINISHED = (DeliveryState.DUE, DeliveryState.SENT)


class Deliveries:
    """Deliveries of studies, one for each target, and the claims of runs on them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def add(self, cohort: int, target: str, method: DeliveryMethod) -> None:
        """Make the studies of a cohort due for a target; deliveries that are known stay.

        What we send ourselves has to be archived first, so the other studies are left out.
        """
        chosen = [*_of_cohort(cohort)]
        if method is DeliveryMethod.C_STORE:
            chosen.append(studies.c.state == StudyState.ARCHIVED)
        found = select(studies.c.reference).where(*chosen).order_by(studies.c.reference)
        with self._database.write() as connection:
            references = connection.execute(found).scalars().all()
            for piece in slices(references):
                connection.execute(
                    self._database.insert(deliveries)
                    .values([{"study": s, "target": target, "method": method} for s in piece])
                    .on_conflict_do_nothing()
                )

    @translate_database_errors
    def reopen(self, cohort: int, target: str, reasons: Collection[str]) -> int:
        """Make deliveries due again that failed for one of these reasons; how many."""
        chosen = and_(
            deliveries.c.target == target,
            deliveries.c.state == DeliveryState.FAILED,
            deliveries.c.study.in_(_studies_of(cohort)),
            deliveries.c.reason.in_(list(reasons)),
        )
        with self._database.write() as connection:
            references = connection.execute(
                select(deliveries.c.study).where(chosen).order_by(deliveries.c.study)
            ).scalars()
            count = 0
            for piece in slices(references.all()):
                here = and_(deliveries.c.target == target, deliveries.c.study.in_(piece))
                connection.execute(
                    update(deliveries)
                    .where(here, _can_become(DeliveryState.DUE, DeliveryState.FAILED))
                    .values(state=DeliveryState.DUE, reason=None, detail="")
                )
                # What it refused is sent again; what it accepted is not.
                connection.execute(
                    delete(delivered_instances).where(
                        delivered_instances.c.target == target,
                        delivered_instances.c.study.in_(piece),
                        delivered_instances.c.state == DeliveredState.FAILED,
                    )
                )
                count += len(piece)
        return count

    @translate_database_errors
    def unfinished(
        self,
        cohort: int,
        target: str,
        method: DeliveryMethod,
        after: StudyReference = 0,
        limit: int = PAGE_SIZE,
    ) -> list[StudyReference]:
        """Return studies of a cohort whose delivery has not ended, by reference.

        Those that are not archived are left out where we are to send them.
        """
        query = select(deliveries.c.study).where(
            deliveries.c.target == target,
            deliveries.c.state.in_(_UNFINISHED),
            deliveries.c.study > after,
            deliveries.c.study.in_(_studies_of(cohort)),
        )
        if method is DeliveryMethod.C_STORE:
            archived = select(studies.c.reference).where(studies.c.state == StudyState.ARCHIVED)
            query = query.where(deliveries.c.study.in_(archived))
        with self._database.read() as connection:
            found = connection.execute(query.order_by(deliveries.c.study).limit(limit))
            return list(found.scalars())

    # --- claims

    @translate_database_errors
    def acquire(
        self, run: Run, target: str, references: Sequence[StudyReference]
    ) -> list[DeliveryClaim]:
        """Claim the deliveries that are unfinished and that no living run has claimed.

        Raises
        ------
        LedgerError
            The run itself has lost its lock: others may take its claims at any time.
        """
        claims: list[DeliveryClaim] = []
        with self._database.write() as connection:
            for piece in slices(sorted(set(references))):
                claims += self._acquire_some(connection, run, target, piece)
        return claims

    def _acquire_some(
        self, connection: Connection, run: Run, target: str, references: list[StudyReference]
    ) -> list[DeliveryClaim]:
        found = connection.execute(
            select(deliveries.c.study, deliveries.c.state, deliveries.c.run, deliveries.c.attempt)
            .where(
                deliveries.c.target == target,
                deliveries.c.study.in_(references),
                deliveries.c.state.in_(_UNFINISHED),
            )
            .order_by(deliveries.c.study)
            .with_for_update()
        ).all()
        living = self._database.living_runs(
            connection, {run.number, *(row.run for row in found if row.run is not None)}
        )
        if run.number not in living:
            raise LedgerError("ledger-unavailable", "the run has ended or lost its lock")
        claims = [
            DeliveryClaim(row.study, target, run.number, row.attempt + 1, DeliveryState(row.state))
            for row in found
            if row.run not in living
        ]
        for claim in claims:
            connection.execute(
                update(deliveries)
                .where(deliveries.c.study == claim.study, deliveries.c.target == target)
                .values(run=run.number, attempt=claim.attempt)
            )
        return claims

    @translate_database_errors
    def release(self, claims: Iterable[DeliveryClaim]) -> None:
        """Release claims; the deliveries keep their states. Lost ones are passed over."""
        with self._database.write() as connection:
            for claim in sorted(claims, key=lambda claim: claim.study):
                connection.execute(update(deliveries).where(_held(claim)).values(run=None))

    # --- instances

    @translate_database_errors
    def instances(self, claim: DeliveryClaim) -> dict[InstanceKey, DeliveredInstance]:
        """Return what has become of the instances that were sent so far."""
        query = select(delivered_instances).where(
            delivered_instances.c.study == claim.study,
            delivered_instances.c.target == claim.target,
        )
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        found = (
            DeliveredInstance(
                InstanceKey(row.series_instance_uid, row.sop_instance_uid),
                DeliveredState(row.state),
                row.status,
                row.reason,
            )
            for row in rows
        )
        return {each.key: each for each in found}

    @translate_database_errors
    def record_instances(
        self, claim: DeliveryClaim, sent: Sequence[DeliveredInstance], size_bytes: int = 0
    ) -> None:
        """Record what became of instances that were sent.

        Parameters
        ----------
        size_bytes : int
            Of those of them that the target accepted.
        """
        if not sent:
            return
        accepted = sum(each.state is not DeliveredState.FAILED for each in sent)
        with self._database.write() as connection:
            _hold(connection, claim)
            for piece in slices(sent, 200):
                _forget(connection, claim, [each.key for each in piece])
                connection.execute(
                    self._database.insert(delivered_instances).values(
                        [
                            {
                                "study": claim.study,
                                "target": claim.target,
                                "series_instance_uid": each.key.series_instance_uid,
                                "sop_instance_uid": each.key.sop_instance_uid,
                                "state": each.state,
                                "status": each.status,
                                "reason": each.reason,
                            }
                            for each in piece
                        ]
                    )
                )
            connection.execute(
                update(deliveries)
                .where(_held(claim))
                .values(
                    sent_instances=deliveries.c.sent_instances + accepted,
                    sent_bytes=deliveries.c.sent_bytes + size_bytes,
                )
            )

    @translate_database_errors
    def record_lacking(self, claim: DeliveryClaim, keys: Collection[InstanceKey]) -> None:
        """Record that the target lacks instances that it had accepted: they are sent again."""
        with self._database.write() as connection:
            _hold(connection, claim)
            for piece in slices(keys):
                _forget(connection, claim, piece)
            _change(connection, claim, DeliveryState.DUE, DeliveryState.SENT, sent_at=None)

    # --- ends

    @translate_database_errors
    def record_sent(self, claim: DeliveryClaim, instances: int) -> None:
        """Record that the target has accepted all instances of the study."""
        with self._database.write() as connection:
            _change(
                connection,
                claim,
                DeliveryState.SENT,
                instances=instances,
                sent_at=utc_now(),
                evidence=DeliveryEvidence.ACCEPTED,
            )

    @translate_database_errors
    def record_evidence(self, claim: DeliveryClaim, evidence: DeliveryEvidence) -> None:
        """Record evidence that is weaker than what is asked for; the delivery stays sent."""
        with self._database.write() as connection:
            _change(connection, claim, DeliveryState.SENT, DeliveryState.SENT, evidence=evidence)

    @translate_database_errors
    def record_verified(
        self, claim: DeliveryClaim, evidence: DeliveryEvidence, manifest: bytes
    ) -> None:
        """Record that a delivery is verified, with its manifest; the last thing that is written."""
        with self._database.write() as connection:
            _change(
                connection,
                claim,
                DeliveryState.VERIFIED,
                run=None,
                evidence=evidence,
                verified_at=utc_now(),
                manifest=zlib.compress(manifest),
            )
            # They are in the manifest.
            connection.execute(
                delete(delivered_instances).where(
                    delivered_instances.c.study == claim.study,
                    delivered_instances.c.target == claim.target,
                )
            )

    @translate_database_errors
    def record_failed(self, claim: DeliveryClaim, reason: str, detail: str = "") -> None:
        """Record that a delivery has failed."""
        reason_for(reason)
        with self._database.write() as connection:
            _change(
                connection,
                claim,
                DeliveryState.FAILED,
                run=None,
                reason=reason,
                detail=detail,
                failed_at=utc_now(),
            )

    # --- for people

    @translate_database_errors
    def totals(self, cohort: int, target: str) -> DeliveryTotals:
        """Return how far the deliveries of a cohort to a target are."""
        counts: Counter[DeliveryState] = Counter()
        evidence: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        instances = size_bytes = 0
        query = (
            select(
                deliveries.c.state,
                deliveries.c.evidence,
                deliveries.c.reason,
                func.count(),
                func.sum(deliveries.c.sent_instances),
                func.sum(deliveries.c.sent_bytes),
            )
            .where(deliveries.c.target == target, deliveries.c.study.in_(_studies_of(cohort)))
            .group_by(deliveries.c.state, deliveries.c.evidence, deliveries.c.reason)
        )
        undelivered = (
            select(func.count())
            .select_from(studies)
            .where(
                *_of_cohort(cohort),
                ~select(deliveries.c.study)
                .where(deliveries.c.study == studies.c.reference, deliveries.c.target == target)
                .exists(),
            )
        )
        with self._database.read() as connection:
            for state, what, reason, count, sent, sent_bytes in connection.execute(query):
                counts[DeliveryState(state)] += count
                if state == DeliveryState.VERIFIED:
                    evidence[what] += count
                if reason is not None:
                    reasons[reason] += count
                instances += int(sent)
                size_bytes += int(sent_bytes)
            not_archived = connection.execute(undelivered).scalar_one()
        return DeliveryTotals(counts, evidence, reasons, not_archived, instances, size_bytes)

    def of_cohort(self, cohort: int, target: str) -> Iterator[DeliveryRecord]:
        """Yield the deliveries of a cohort to a target, by the study's reference."""
        after = 0
        while page := self._page(cohort, target, after):
            yield from page
            after = page[-1].reference

    @translate_database_errors
    def _page(self, cohort: int, target: str, after: StudyReference) -> list[DeliveryRecord]:
        query = (
            select(deliveries, *STUDY_COLUMNS)
            .join(studies, studies.c.reference == deliveries.c.study)
            .where(
                deliveries.c.target == target,
                deliveries.c.study > after,
                deliveries.c.study.in_(_studies_of(cohort)),
            )
            .order_by(deliveries.c.study)
            .limit(PAGE_SIZE)
        )
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return [
            DeliveryRecord(
                reference=row.study,
                target=row.target,
                method=DeliveryMethod(row.method),
                state=DeliveryState(row.state),
                evidence=None if row.evidence is None else DeliveryEvidence(row.evidence),
                reason=row.reason,
                detail=row.detail,
                instances=row.instances,
                sent_at=row.sent_at,
                verified_at=row.verified_at,
                study=study_of(row),
            )
            for row in rows
        ]

    @translate_database_errors
    def manifest(self, reference: StudyReference, target: str) -> bytes | None:
        """Return the manifest of a verified delivery, or None."""
        query = select(deliveries.c.manifest).where(
            deliveries.c.study == reference, deliveries.c.target == target
        )
        with self._database.read() as connection:
            body = connection.execute(query).scalar()
        return None if body is None else zlib.decompress(body)


def _of_cohort(cohort: int) -> tuple[ColumnElement[bool], ...]:
    """Conditions on ``studies``: the cohort takes it."""
    return (studies.c.reference.in_(_studies_of(cohort)),)


def _studies_of(cohort: int) -> Any:
    return select(row_studies.c.study).where(
        row_studies.c.cohort == cohort, row_studies.c.reason.is_(None)
    )


def _held(claim: DeliveryClaim) -> ColumnElement[bool]:
    return and_(
        deliveries.c.study == claim.study,
        deliveries.c.target == claim.target,
        deliveries.c.run == claim.run,
        deliveries.c.attempt == claim.attempt,
    )


def _hold(connection: Connection, claim: DeliveryClaim) -> None:
    """Check that a claim stands, and keep it so until the transaction ends."""
    found = connection.execute(select(deliveries.c.study).where(_held(claim)).with_for_update())
    if found.first() is None:
        raise ClaimLost(detail="a delivery")


def _change(
    connection: Connection,
    claim: DeliveryClaim,
    state: DeliveryState,
    *only: DeliveryState,
    **values: Any,
) -> None:
    changed = connection.execute(
        update(deliveries)
        .where(_held(claim), _can_become(state, *only))
        .values(state=state, **values)
    )
    if changed.rowcount != 1:
        raise ClaimLost(detail="a delivery")


def _can_become(state: DeliveryState, *only: DeliveryState) -> ColumnElement[bool]:
    return deliveries.c.state.in_(predecessors(DELIVERY_TRANSITIONS, state, *only))


def _forget(connection: Connection, claim: DeliveryClaim, keys: Sequence[InstanceKey]) -> None:
    connection.execute(
        delete(delivered_instances).where(
            delivered_instances.c.study == claim.study,
            delivered_instances.c.target == claim.target,
            or_(
                *(
                    and_(
                        delivered_instances.c.series_instance_uid == key.series_instance_uid,
                        delivered_instances.c.sop_instance_uid == key.sop_instance_uid,
                    )
                    for key in keys
                )
            ),
        )
    )
