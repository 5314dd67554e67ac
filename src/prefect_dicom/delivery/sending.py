"""Sending the instances of studies by C-STORE, with the retries that each status is worth.

The instances of a chunk go over one association, study by study and series by series; further ones
where there are more than 128 pairs of SOP class and transfer syntax. What ends an association
leaves the instances in flight unknown: the target's list is read, and what is not there is sent
again.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prefect_dicom.admission.health import RequestKind
from prefect_dicom.admission.request_rates import RequestUsage
from prefect_dicom.archive import Archive
from prefect_dicom.core.deliveries import DeliveredInstance, DeliveredState
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.metrics import sent
from prefect_dicom.core.model import Disposition, InstanceKey, ManifestInstance
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.delivery.checks import listed_keys
from prefect_dicom.delivery.context import DeliveryContext
from prefect_dicom.delivery.source import outgoing
from prefect_dicom.delivery.study import StudyDelivery
from prefect_dicom.network.node_client import NodeClient
from prefect_dicom.network.status import is_warning, reason_for_status
from prefect_dicom.network.store import OutgoingInstance, StoreAssociation, pack_contexts

log = logging.getLogger(__name__)

_RECORDED_TOGETHER = 100
"""Instances whose outcomes are one transaction: a run that is killed sends them again."""
_BACK_OFF_SECONDS = 2.0
_LOSSES_BY_ONE = 2
_GIVEN_UP_IN_VAIN = 3


@dataclass(slots=True)
class _InFlight:
    """An instance that was sent and is not answered yet."""

    key: InstanceKey
    instance: ManifestInstance


class StudySender:
    """Sends the studies of a chunk, over one association as long as it will do.

    Parameters
    ----------
    context : DeliveryContext
        The target and what a run shares.
    requestor : Requestor
        Borrowed: its slot is the right to one association.
    """

    def __init__(self, context: DeliveryContext, archive: Archive, requestor: NodeClient) -> None:
        self._context = context
        self._archive = archive
        self._requestor = requestor
        self._association: StoreAssociation | None = None
        self._losses: Counter[InstanceKey] = Counter()
        self._given_up = 0
        self._pairs: list[tuple[str, str]] = []
        self.current: StudyDelivery | None = None
        """The study that is being sent, or was when an error ended that."""

    def send_all(self, deliveries: Sequence[StudyDelivery]) -> None:
        """Send what is due of the studies. Their outcomes are in the ledger afterwards.

        Raises
        ------
        PacsError
            The target cannot be used, or not now.
        Interrupted
            The run is to stop.
        """
        self._pairs = [
            (instance.sop_class_uid, instance.transfer_syntax_uid)
            for delivery in deliveries
            for _, instance in delivery.due()
        ]
        try:
            for delivery in deliveries:
                self.current = delivery
                if any(delivery.due()):
                    self._send_study(delivery)
        finally:
            self._leave()

    def _send_study(self, delivery: StudyDelivery) -> None:
        context = self._context
        if delivery.claim.attempt > 1 and delivery.outcomes:
            self._note_what_is_there(delivery)
        attempt, most = 0, context.destination.attempts
        while attempt < most:
            attempt += 1
            due = list(delivery.due())
            if not due:
                return
            admitted = context.access.pool.request(
                self._requestor, retrieve=True, instances=len(due)
            )
            try:
                with admitted as usage:
                    # The slot is for one association: this is on one of its own.
                    self._requestor.close()
                    busy = self._send_round(delivery, due, usage, keep=attempt == most)
            except PacsError as error:
                self._leave()
                if not error.reason.cuts_transfer or context.should_stop():
                    raise
                self._note_what_is_there(delivery)
                if self._give_up_on_what_ends_associations(delivery, error.code):
                    # The others have not had their turn.
                    attempt -= 1
                continue
            if busy is not None:
                context.access.admission(context.target).record_strain(
                    RequestKind.RETRIEVE, busy, delivery.reference
                )
                self._leave()
                context.wait(_BACK_OFF_SECONDS * attempt)
        # Each round has ended with the association.
        self._record(delivery, [self._lost(key, "association-lost") for key, _ in delivery.due()])

    def _send_round(
        self,
        delivery: StudyDelivery,
        due: Sequence[tuple[InstanceKey, ManifestInstance]],
        usage: RequestUsage,
        *,
        keep: bool,
    ) -> str | None:
        """Send each once; the reason of those that are worth another round, if there are any.

        Parameters
        ----------
        keep : bool
            Whether there is no other round: then a transient refusal is an outcome as well.
        """
        busy: str | None = None
        by_pair = {(i.sop_class_uid, i.transfer_syntax_uid) for _, i in due}
        for group in pack_contexts(sorted(by_pair)):
            association = self._associate(group)
            refused = [
                DeliveredInstance(key, DeliveredState.FAILED, reason="context-refused")
                for key, instance in due
                if (instance.sop_class_uid, instance.transfer_syntax_uid) in group
                and not association.accepts((instance.sop_class_uid, instance.transfer_syntax_uid))
            ]
            self._record(delivery, refused)
            going = [
                (key, instance)
                for key, instance in due
                if association.accepts((instance.sop_class_uid, instance.transfer_syntax_uid))
                and (instance.sop_class_uid, instance.transfer_syntax_uid) in group
            ]
            busy = self._send_over(association, delivery, going, usage, keep=keep) or busy
        return busy

    def _send_over(
        self,
        association: StoreAssociation,
        delivery: StudyDelivery,
        going: Sequence[tuple[InstanceKey, ManifestInstance]],
        usage: RequestUsage,
        *,
        keep: bool,
    ) -> str | None:
        busy: str | None = None
        outcomes: list[DeliveredInstance] = []
        size_bytes = 0
        flying: dict[int, _InFlight] = {}

        def instances() -> Iterator[OutgoingInstance]:
            for key, instance in going:
                out = outgoing(self._archive, instance)
                flying[id(out)] = _InFlight(key, instance)
                # Kept by the association until it is answered, so its id is its own.
                yield out

        try:
            for out, status in association.send(instances()):
                flight = flying.pop(id(out))
                code = reason_for_status("C-STORE", status)
                if code == "not-permitted":
                    raise PacsError(code, f"C-STORE status {status:04X}")
                if code is not None and not keep and _may_pass(code):
                    busy = code
                    continue
                outcome = _outcome(flight.key, status, code)
                outcomes.append(outcome)
                if code is None:
                    size_bytes += flight.instance.size_bytes
                    usage.instances += 1
                    usage.size_bytes += flight.instance.size_bytes
                sent("accepted" if code is None else "refused", flight.instance.size_bytes)
                failpoint("instance-accepted")
                if len(outcomes) >= _RECORDED_TOGETHER:
                    self._record(delivery, outcomes, size_bytes)
                    outcomes, size_bytes = [], 0
        except PacsError:
            self._losses.update(flight.key for flight in flying.values())
            raise
        finally:
            self._record(delivery, outcomes, size_bytes)
        if usage.instances:
            self._context.access.admission(self._context.target).record_delivery()
        return busy

    # --- associations

    def _associate(self, group: Sequence[tuple[str, str]]) -> StoreAssociation:
        """The open association, where it has proposed these pairs, else another one."""
        association = self._association
        if association is None or not association.proposed.issuperset(group):
            self._leave()
            # With those that the next studies need, as far as there is room.
            pairs = pack_contexts([*group, *self._pairs])[0]
            association = self._association = StoreAssociation(
                self._context.node, pairs, self._context.should_stop
            )
            failpoint("associated")
        return association

    def _leave(self) -> None:
        association, self._association = self._association, None
        if association is not None:
            association.close()

    # --- what is unknown

    def _note_what_is_there(self, delivery: StudyDelivery) -> None:
        """Take what the target lists as accepted, of what has no outcome."""
        self._leave()
        if not self._context.may_list:
            return
        keys = {key for key, _ in delivery.due()}
        there = listed_keys(self._context, self._requestor, delivery)
        self._requestor.close()
        self._record(
            delivery,
            [DeliveredInstance(key, DeliveredState.ACCEPTED) for key in sorted(keys & there)],
        )

    def _give_up_on_what_ends_associations(self, delivery: StudyDelivery, code: str) -> bool:
        """An instance under way at two losses is what causes them; whether there is one.

        Raises
        ------
        PacsError
            ``not-permitted``: several have, and none was ever accepted.
        """
        causes = [key for key, _ in delivery.due() if self._losses[key] >= _LOSSES_BY_ONE]
        if not causes:
            return False
        self._given_up += len(causes)
        admission = self._context.access.admission(self._context.target)
        if self._given_up >= _GIVEN_UP_IN_VAIN and not admission.has_delivered:
            raise PacsError("not-permitted", "it ends the association at every instance")
        self._record(delivery, [self._lost(key, code) for key in causes])
        return True

    @staticmethod
    def _lost(key: InstanceKey, code: str) -> DeliveredInstance:
        return DeliveredInstance(key, DeliveredState.FAILED, reason=code)

    def _record(
        self, delivery: StudyDelivery, outcomes: Sequence[DeliveredInstance], size_bytes: int = 0
    ) -> None:
        if outcomes:
            self._context.ledger.deliveries.record_instances(delivery.claim, outcomes, size_bytes)
            delivery.note(outcomes)
            failpoint("acceptance-recorded")


def _may_pass(code: str) -> bool:
    """Whether sending the same again may succeed."""
    return reason_for(code).disposition is Disposition.TRANSIENT


def _outcome(key: InstanceKey, status: int, code: str | None) -> DeliveredInstance:
    if code is not None:
        return DeliveredInstance(key, DeliveredState.FAILED, status, code)
    altered = is_warning(status)
    state = DeliveredState.ALTERED if altered else DeliveredState.ACCEPTED
    return DeliveredInstance(key, state, status)
