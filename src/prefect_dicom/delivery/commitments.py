"""Storage commitment of what was sent, PS3.4 Annex J: requested, waited for, and judged.

A request is on record before it is sent: its report may come before its response. Reports are taken
on the association of the request, on those of later runs, and by the receiver, which all record
them in the ledger; what a study has come to is read from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta

from pydicom.uid import generate_uid

from prefect_dicom.core.deliveries import (
    Commitment,
    CommitmentReference,
    DeliveryClaim,
    DeliveryEvidence,
    DeliveryState,
)
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import InstanceKey
from prefect_dicom.delivery.chunk import ChunkDelivery
from prefect_dicom.delivery.context import DeliveryContext
from prefect_dicom.delivery.study import StudyDelivery
from prefect_dicom.ledger.database import slices
from prefect_dicom.network.commitment import MOST_REFERENCES, CommitmentAssociation
from prefect_dicom.network.commitment_report import Report
from prefect_dicom.network.storage_scp.client import ReceiverLease
from prefect_dicom.network.storage_scp.commitment_reports import status_of

COMMITTED = 0
_NO_SUCH_INSTANCE = 0x0112
_CLASS_NOT_SUPPORTED = 0x0122
_LATER = frozenset({0x0110, 0x0213})
"""Failure reasons that may pass: processing failure, resource limitation."""
_MOST_UNREPORTED = 3
_LOOK_SECONDS = 0.2


class CommitmentRequests:
    """Requests commitment of the studies of a run that were sent, and judges the reports."""

    def __init__(self, context: DeliveryContext, chunks: ChunkDelivery) -> None:
        self._context = context
        self._chunks = chunks

    def conclude(self) -> None:
        """Request what has to be requested, wait for reports, and verify what is committed.

        Raises
        ------
        PacsError
            The target cannot be used, or not now.
        Interrupted
            The run is to stop.
        """
        context = self._context
        if context.destination.evidence is not DeliveryEvidence.COMMITTED:
            return
        claims = self._claims()
        try:
            waiting = self._judge(claims)
            if waiting:
                self._request_and_wait(waiting)
                self._judge([delivery.claim for delivery in waiting])
        finally:
            context.ledger.deliveries.release(claims)

    def _claims(self) -> list[DeliveryClaim]:
        context = self._context
        known, cohort = context.ledger.deliveries, context.cohort.number
        claims: list[DeliveryClaim] = []
        after = 0
        while page := known.unfinished(cohort, context.target, context.method, after):
            claims += known.acquire(context.record, context.target, page)
            after = page[-1]
        return [claim for claim in claims if claim.state is DeliveryState.SENT]

    # --- judging

    def _judge(self, claims: Sequence[DeliveryClaim]) -> list[StudyDelivery]:
        """End the deliveries whose reports decide; returns those that wait for one."""
        waiting = []
        for claim in claims:
            delivery = self._chunks.loaded(claim)
            if delivery is not None and not self._decide(delivery):
                waiting.append(delivery)
        return waiting

    def _decide(self, delivery: StudyDelivery) -> bool:
        """End a delivery where its reports decide; whether they do."""
        context = self._context
        requests = context.ledger.commitments.of_study(delivery.reference, context.target)
        results = _latest(requests)
        wanted = {key.sop_instance_uid for key in delivery.instances}
        failed = {uid: code for uid, code in results.items() if code and code not in _LATER}
        if failed:
            self._refused(delivery, failed, len(requests))
            return True
        if all(results.get(uid) == COMMITTED for uid in wanted):
            self._chunks.verified(delivery, DeliveryEvidence.COMMITTED)
            context.ledger.commitments.forget(context.target, [delivery.reference])
            return True
        unreported = [one for one in requests if one.reported_at is None]
        expired = all(one.expires_at <= context.clock.now() for one in requests)
        if len(unreported) >= _MOST_UNREPORTED and expired:
            words = f"{len(unreported)} requests without a report"
            self._end(delivery, "commitment-unreported", words)
            return True
        return False

    def _refused(self, delivery: StudyDelivery, failed: dict[str, int], requests: int) -> None:
        codes = sorted(set(failed.values()))
        words = ", ".join(f"{list(failed.values()).count(code)} x {code:04X}" for code in codes)
        words = f"{len(failed)} of {len(delivery.instances)} instances: {words}"
        if codes == [_NO_SUCH_INSTANCE] and requests == 1:
            # Sent once more, and asked about again with a new transaction.
            context = self._context
            keys = [key for key in delivery.instances if key.sop_instance_uid in failed]
            context.ledger.deliveries.record_lacking(delivery.claim, keys)
            return
        unsupported = codes == [_CLASS_NOT_SUPPORTED]
        code = "commitment-not-offered" if unsupported else "commitment-failed"
        self._end(delivery, code, words)

    def _end(self, delivery: StudyDelivery, code: str, words: str) -> None:
        context = self._context
        self._chunks.fail(delivery.claim, code, words)
        # A rerun begins with a request of its own.
        context.ledger.commitments.forget(context.target, [delivery.reference])

    # --- requesting

    def _request_and_wait(self, waiting: Sequence[StudyDelivery]) -> None:
        context = self._context
        due = [delivery for delivery in waiting if self._is_due(delivery)]
        if due and context.destination.commit_after_seconds:
            context.wait(context.destination.commit_after_seconds)
        with contextlib.ExitStack() as stack:
            if context.site.receives:
                # Before the request: the report may come at once.
                stack.enter_context(ReceiverLease(context.site))
            stack.enter_context(context.access.admitted(context.target)).close()
            try:
                association = stack.enter_context(
                    CommitmentAssociation(context.node, self._take, context.should_stop)
                )
            except PacsError as error:
                if error.code != "commitment-not-offered":
                    raise
                for delivery in waiting:
                    self._end(delivery, error.code, error.detail)
                return
            for references in slices(_references(due), MOST_REFERENCES):
                self._request(association, references)
            seconds = context.destination.commit_wait_seconds
            until = context.clock.monotonic() + seconds
            association.attend(seconds, lambda: self._is_answered(waiting))
            # Where the peer has ended that association, the receiver may still get reports.
            while context.clock.monotonic() < until and not self._is_answered(waiting):
                context.wait(_LOOK_SECONDS)

    def _request(
        self, association: CommitmentAssociation, references: Sequence[CommitmentReference]
    ) -> None:
        context = self._context
        uid = str(generate_uid(prefix=None))
        within = timedelta(seconds=context.destination.commit_within_seconds)
        expires_at = context.clock.now() + within
        context.ledger.commitments.begin(uid, context.target, references, expires_at)
        failpoint("commitment-begun")
        try:
            association.request(
                uid, [(each.sop_class_uid, each.sop_instance_uid) for each in references]
            )
        except PacsError:
            context.ledger.commitments.withdraw(uid)
            raise

    def _take(self, report: Report | None) -> int:
        """Record a report that came on an association of ours."""
        if report is None:
            return 0x0115
        commitments = self._context.ledger.commitments
        return status_of(commitments.record_report(report.transaction_uid, report.results))

    def _is_due(self, delivery: StudyDelivery) -> bool:
        """Whether commitment of a study has to be requested, for the first time or again."""
        now = self._context.clock.now()
        requests = self._requests(delivery)
        return not any(
            one.expires_at > now and any(result is None for result in one.results.values())
            for one in requests
        )

    def _is_answered(self, waiting: Sequence[StudyDelivery]) -> bool:
        return all(
            (requests := self._requests(delivery))
            and None not in requests[-1].results.values()
            and all(one.reported_at is not None for one in requests[-1:])
            for delivery in waiting
        )

    def _requests(self, delivery: StudyDelivery) -> list[Commitment]:
        context = self._context
        return context.ledger.commitments.of_study(delivery.reference, context.target)


def _latest(requests: Sequence[Commitment]) -> dict[str, int]:
    """The latest result that was reported of each instance."""
    results: dict[str, int] = {}
    for request in requests:
        results.update({u: result for u, result in request.results.items() if result is not None})
    return results


def _references(deliveries: Sequence[StudyDelivery]) -> Iterator[CommitmentReference]:
    for delivery in deliveries:
        seen: set[str] = set()
        key: InstanceKey
        for key, instance in sorted(delivery.instances.items()):
            if key.sop_instance_uid not in seen:
                seen.add(key.sop_instance_uid)
                yield CommitmentReference(
                    delivery.reference, instance.sop_class_uid, key.sop_instance_uid
                )
