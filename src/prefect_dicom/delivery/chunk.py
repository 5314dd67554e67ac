"""One chunk of studies to a target: sent, checked, recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prefect_dicom.archive import Archive
from prefect_dicom.archive.manifest import decode_manifest
from prefect_dicom.core.deliveries import (
    DeliveryClaim,
    DeliveryEvidence,
    DeliveryState,
)
from prefect_dicom.core.errors import (
    ArchiveError,
    InstanceRejected,
    PacsError,
)
from prefect_dicom.core.events import Event
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import InstanceKey, Study, StudyReference
from prefect_dicom.core.reasons import Scope
from prefect_dicom.delivery.checks import listed_keys, read_back, series_that_lack
from prefect_dicom.delivery.context import DeliveryContext
from prefect_dicom.delivery.manifest import DeliveredEntry, encode_delivery
from prefect_dicom.delivery.moving import instances_at_source, move_study
from prefect_dicom.delivery.sending import StudySender
from prefect_dicom.delivery.study import StudyDelivery
from prefect_dicom.network.node_client import NodeClient

_READ_BACK, _COMMITTED, _LISTED, _COUNTED, _ACCEPTED = DeliveryEvidence


class ChunkDelivery:
    """Delivers chunks of studies. Thread-safe: each chunk has its own claims and association."""

    def __init__(self, context: DeliveryContext, archive: Archive) -> None:
        self._context = context
        self._archive = archive

    def deliver(self, references: Sequence[StudyReference]) -> int:
        """Send and verify the studies that no other run has claimed; how many it claimed.

        Raises
        ------
        PrefectDicomError
            What concerns more than one study: the target, the archive, the ledger, an
            interruption.
        """
        context = self._context
        claims = context.ledger.deliveries.acquire(context.record, context.target, references)
        failpoint("deliveries-claimed")
        try:
            deliveries = [d for claim in claims if (d := self.loaded(claim)) is not None]
            if context.source is not None:
                self._move(deliveries)
            with context.access.admitted(context.target) as requestor:
                if context.source is None:
                    self._send(deliveries, requestor)
                for delivery in deliveries:
                    self._concluded(delivery, requestor)
        finally:
            context.ledger.deliveries.release(claims)
        return len(claims)

    def loaded(self, claim: DeliveryClaim) -> StudyDelivery | None:
        """What a claimed delivery consists of; None where that cannot be found out."""
        ledger, source = self._context.ledger, self._context.source
        record = ledger.studies.get(claim.study)
        if record is not None and source is not None:
            return self._listed(claim, record.study, source)
        body = ledger.manifests.get(claim.study)
        if record is None or body is None:
            self.fail(claim, "archive-object-missing", "no manifest")
            return None
        manifest = decode_manifest(body)
        instances = {
            InstanceKey(each.series_instance_uid, each.sop_instance_uid): each
            for each in manifest.instances
        }
        if not instances:
            # Evidence of nothing would verify it.
            self.fail(claim, "instance-list-empty", "nothing of it is archived")
            return None
        delivery = StudyDelivery(claim, record.study, instances)
        delivery.outcomes.update(ledger.deliveries.instances(claim))
        return delivery

    def _listed(self, claim: DeliveryClaim, study: Study, source: str) -> StudyDelivery | None:
        """What the source lists of a study; None where it cannot, and the delivery has failed."""
        context = self._context
        try:
            with context.access.admitted(source) as requestor:
                instances = instances_at_source(context, requestor, study)
        except PacsError as error:
            if error.scope is Scope.STUDY or error.reason.refuses_query:
                self.fail(claim, error.code, error.detail)
                return None
            raise
        delivery = StudyDelivery(claim, study, instances)
        delivery.outcomes.update(context.ledger.deliveries.instances(claim))
        return delivery

    # --- sending

    def _move(self, deliveries: Sequence[StudyDelivery]) -> None:
        """Have the source send what is due to the target."""
        context = self._context
        due = [d for d in deliveries if d.claim.state is DeliveryState.DUE]
        if due and context.source is not None:
            with context.access.admitted(context.source) as source:
                for delivery in due:
                    if any(delivery.due()):
                        move_study(context, source, delivery)
                    self._record_sent(delivery)

    def _send(self, deliveries: Sequence[StudyDelivery], requestor: NodeClient) -> None:
        due = [d for d in deliveries if d.claim.state is DeliveryState.DUE]
        left = list(due)
        while left:
            sender = StudySender(self._context, self._archive, requestor)
            try:
                sender.send_all(left)
                break
            except (ArchiveError, InstanceRejected) as error:
                # Of one study: the others go on without it.
                if error.scope is Scope.SITE and error.code == "archive-unavailable":
                    raise
                failed = sender.current
                if failed is None:
                    raise
                self.fail(failed.claim, error.code, error.detail)
                left = left[left.index(failed) + 1 :]
                due.remove(failed)
        for delivery in due:
            self._record_sent(delivery)

    def _record_sent(self, delivery: StudyDelivery) -> None:
        if delivery.refused:
            self.fail(delivery.claim, *delivery.why_refused())
        elif delivery.is_whole:
            self._context.ledger.deliveries.record_sent(delivery.claim, len(delivery.instances))
            failpoint("sent-recorded")

    # --- evidence

    def _concluded(self, delivery: StudyDelivery, requestor: NodeClient) -> None:
        """Look for the evidence that is asked for, and record the end where it is found."""
        if not delivery.is_whole:
            return
        context, claim = self._context, delivery.claim
        try:
            evidence = self._evidence(delivery, requestor)
        except PacsError as error:
            if error.scope is not Scope.STUDY and not error.reason.refuses_query:
                raise
            self.fail(claim, error.code, error.detail)
            return
        if evidence is None:
            return
        if evidence is not _ACCEPTED:
            context.ledger.deliveries.record_evidence(claim, evidence)
        if evidence.satisfies(context.destination.evidence):
            self.verified(delivery, evidence)

    def _evidence(self, delivery: StudyDelivery, requestor: NodeClient) -> DeliveryEvidence | None:
        """The strongest evidence there is now, up to what is asked for; None where it failed."""
        wanted = self._context.destination.evidence
        if wanted is _ACCEPTED:
            return _ACCEPTED
        if not self._has_all(delivery, requestor):
            return None
        if wanted is _COUNTED:
            return _COUNTED
        if wanted is _READ_BACK:
            return self._read_back(delivery, requestor)
        return _LISTED

    def _has_all(self, delivery: StudyDelivery, requestor: NodeClient) -> bool:
        """Whether the target lists (or counts) all; what it lacks is sent again before."""
        context = self._context
        for attempt in range(context.destination.attempts):
            lacking = self._lacking(delivery, requestor)
            if lacking and not attempt:
                # Some archives list what they have a moment later.
                context.wait(context.node.timeouts.settle_seconds)
                lacking = self._lacking(delivery, requestor)
            if not lacking:
                return True
            if attempt + 1 < context.destination.attempts and not self._sent_again(
                delivery, lacking, requestor
            ):
                return False
        words = f"{len(lacking)} of {len(delivery.instances)} instances"
        self.fail(delivery.claim, "delivery-lacking", words)
        return False

    def _lacking(self, delivery: StudyDelivery, requestor: NodeClient) -> set[InstanceKey]:
        context = self._context
        if context.destination.evidence is _COUNTED:
            series = series_that_lack(context, requestor, delivery)
            return {key for key in delivery.instances if key.series_instance_uid in series}
        return delivery.instances.keys() - listed_keys(context, requestor, delivery)

    def _sent_again(
        self, delivery: StudyDelivery, keys: set[InstanceKey], requestor: NodeClient
    ) -> bool:
        """Send what the target lacks once more; whether it was accepted."""
        self._context.ledger.deliveries.record_lacking(delivery.claim, keys)
        for key in keys:
            delivery.outcomes.pop(key, None)
        failpoint("lack-recorded")
        context = self._context
        if context.source is None:
            StudySender(context, self._archive, requestor).send_all([delivery])
        else:
            with context.access.admitted(context.source) as source:
                move_study(context, source, delivery, sorted(keys))
        self._record_sent(delivery)
        return delivery.is_whole

    def _read_back(self, delivery: StudyDelivery, requestor: NodeClient) -> DeliveryEvidence | None:
        found = read_back(self._context, self._archive, requestor, delivery)
        delivery.evidence.update(dict.fromkeys(found.same, _READ_BACK))
        if found.different:
            words = f"{len(found.different)} of {len(delivery.instances)} instances"
            self.fail(delivery.claim, "delivery-differs", words)
            return None
        if found.absent:
            words = f"{len(found.absent)} of {len(delivery.instances)} instances not sent back"
            self.fail(delivery.claim, "delivery-lacking", words)
            return None
        return _READ_BACK

    # --- ends

    def verified(self, delivery: StudyDelivery, evidence: DeliveryEvidence) -> None:
        """Record that a delivery is verified; the last thing that is written of it."""
        context = self._context
        at = context.clock.now()
        manifest = encode_delivery(
            delivery.study.study_instance_uid,
            context.target,
            context.method,
            evidence,
            at,
            list(_entries(delivery, evidence)),
        )
        failpoint("evidence-found")
        context.ledger.deliveries.record_verified(delivery.claim, evidence, manifest)
        failpoint("verified-recorded")
        context.events.publish(
            Event(
                name="study.delivered",
                at=at,
                node=context.target,
                reference=delivery.reference,
                figures={"instances": len(delivery.instances)},
            )
        )

    def fail(self, claim: DeliveryClaim, code: str, detail: str) -> None:
        """Record that a delivery has failed, and publish it."""
        context = self._context
        context.ledger.deliveries.record_failed(claim, code, detail)
        context.events.publish(
            Event(
                name="delivery.failed",
                at=context.clock.now(),
                node=context.target,
                reference=claim.study,
                reason=code,
            )
        )


def _entries(delivery: StudyDelivery, evidence: DeliveryEvidence) -> Iterator[DeliveredEntry]:
    of_all = _LISTED if evidence is _READ_BACK else evidence
    for key, instance in delivery.instances.items():
        outcome = delivery.outcomes.get(key)
        yield DeliveredEntry(
            series_instance_uid=key.series_instance_uid,
            sop_instance_uid=key.sop_instance_uid,
            sop_class_uid=instance.sop_class_uid,
            transfer_syntax_uid=instance.transfer_syntax_uid,
            sha256=instance.sha256,
            status=None if outcome is None else outcome.status,
            evidence=delivery.evidence.get(key, of_all),
        )
