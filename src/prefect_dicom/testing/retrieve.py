"""Sub-operations of a C-MOVE or C-GET, and where they are sent."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from pydicom.dataset import Dataset
from pynetdicom.dimse_primitives import C_STORE

from prefect_dicom.testing.connection_ends import AssociationLost
from prefect_dicom.testing.plans import (
    CANCEL,
    PENDING,
    SUCCESS,
    UNABLE_TO_PROCESS,
    RetrievePlan,
    SubOperation,
)
from prefect_dicom.testing.request_log import Sent
from prefect_dicom.testing.sending import (
    CONTEXTS_PER_ASSOCIATION,
    StoreAssociation,
    context_key,
    contexts_to_send_in,
)

if TYPE_CHECKING:
    from prefect_dicom.testing.exchange import Exchange

SUB_OPERATIONS_FAILED = 0xA702
SOME_SUB_OPERATIONS_FAILED = 0xB000
_ANY_NUMBER = 65535


class Retrieval:
    """The sub-operations of one C-MOVE or C-GET."""

    def __init__(self, exchange: Exchange, plan: RetrievePlan, sender: Sender) -> None:
        self.exchange = exchange
        self.plan = plan
        self.sender = sender
        self.total = sum(o.counted for o in plan.operations)
        self.completed = self.failed = self.warnings = 0
        self.failed_uids: list[str] = []
        self.answered = False
        self.lost = False

    def run(self) -> None:
        """Carry out the plan, when it has its turn."""
        turn, exchange = self.plan.turn, self.exchange
        if turn is None:
            self.run_now()
            return
        while not turn.acquire(timeout=0.02):
            if exchange.pacs._closing.is_set() or exchange.cancelled() or not exchange.connected():
                raise AssociationLost
        with contextlib.ExitStack() as stack:
            stack.callback(turn.release)
            self.run_now()

    def run_now(self) -> None:
        """Send the instances and the responses as planned."""
        plan, pacs = self.plan, self.exchange.pacs
        if plan.final_before is None:
            self.carry_out(plan.operations, 0)
            self.finish()
            if plan.late:
                self.answered = plan.keep_sending = True
                pacs._run(self.send_the_rest, plan.late, 0, plan.late_hold)
            return
        # Success first: the rest is sent while the requestor already goes on.
        first, rest = plan.operations[: plan.final_before], plan.operations[plan.final_before :]
        hold = plan.connection.hold_before.pop(plan.final_before, None)
        self.carry_out(first, 0)
        self.answered = True
        self.exchange.respond(
            SUCCESS, counts=(None, self.total, 0, 0) if plan.count else (None, 0, 0, 0)
        )
        pacs._run(self.send_the_rest, rest, len(first), hold)

    def send_the_rest(
        self, operations: Sequence[SubOperation], number: int, hold: threading.Event | None
    ) -> None:
        """Send instances after the final response."""
        if hold is not None:
            self.exchange.wait_for(hold)
        self.carry_out(operations, number)

    def carry_out(self, operations: Sequence[SubOperation], first_number: int) -> None:
        """Make sub-operations, with pending responses between them."""
        exchange, plan = self.exchange, self.plan
        try:
            for number, operation in enumerate(operations, first_number):
                if not self.answered and not self.lost:
                    self.pass_by(number)
                    if exchange.cancelled():
                        break
                if exchange.pacs._closing.is_set():
                    break
                if not self.lost and not plan.keep_sending and not exchange.connected():
                    raise AssociationLost
                if plan.stop_at_class and not self.sender.has_context(operation):
                    self.count(operation, None)
                    plan.status = UNABLE_TO_PROCESS
                    break
                self.count(operation, self.sender.send(operation) if operation.readable else None)
                if plan.stop_at_failure and self.failed:
                    plan.status, plan.count = UNABLE_TO_PROCESS, False
                    break
                if self.remaining and self.may_report():
                    self.report(PENDING)
            else:
                if not self.answered and not self.lost:
                    self.pass_by(first_number + len(operations))
        finally:
            self.sender.end()

    def pass_by(self, number: int) -> None:
        """Apply the events on the request's association at this number of answers."""
        try:
            self.exchange.pass_by(self.plan.connection, number)
        except AssociationLost:
            if not self.plan.keep_sending:
                raise
            self.lost = True

    @property
    def remaining(self) -> int:
        """Sub-operations that have not been made."""
        return self.total - self.completed - self.failed - self.warnings

    def count(self, operation: SubOperation, status: int | None) -> None:
        """Count the result of a sub-operation."""
        if not operation.counted:
            return
        if status == SUCCESS and not self.plan.disown:
            self.completed += 1
        elif status and (status >> 12 == 0xB or status in (0x0107, 0x0116)):
            self.warnings += 1
        else:
            self.failed += 1
            self.failed_uids.append(operation.sop_instance_uid)

    def report(self, status: int, identifier: Dataset | None = None) -> None:
        """Send a response with the counters."""
        remaining = self.remaining if status in (PENDING, CANCEL) else None
        counts: Sequence[int | None]
        counts = (remaining, self.completed, self.failed, self.warnings)
        if not self.plan.count:
            counts = (None if remaining is None else 0, 0, 0, 0)
        if self.plan.counts is not None:
            counts = self.plan.counts
        try:
            self.exchange.respond(status, identifier, counts)
        except AssociationLost:
            if not self.plan.keep_sending:
                raise
            self.lost = True

    def may_report(self) -> bool:
        """Whether pending responses are still to be sent."""
        over = self.answered or self.lost or self.request_is_answered()
        return self.plan.pendings and not over

    def request_is_answered(self) -> bool:
        """Whether the final response has gone out already, to a C-CANCEL that stops nothing."""
        return self.exchange.request.status is not None

    def finish(self) -> None:
        """Send the final response."""
        if self.lost or self.request_is_answered():
            return
        status = self.plan.status
        if status is None:
            if self.exchange.cancelled():
                status = CANCEL
            elif not self.failed and not self.warnings:
                status = SUCCESS
            elif self.completed or self.warnings:
                status = SOME_SUB_OPERATIONS_FAILED
            else:
                status = SUB_OPERATIONS_FAILED
        identifier = None
        failed_uids = self.failed_uids if self.plan.count else []
        if self.plan.failed_list is not None:
            failed_uids = self.plan.failed_list(failed_uids)
        if status != SUCCESS and failed_uids:
            identifier = Dataset()
            identifier.FailedSOPInstanceUIDList = failed_uids
        self.report(status, identifier)


class Sender:
    """Sender of instances, each in its own SOP class and transfer syntax."""

    def __init__(self, exchange: Exchange, plan: RetrievePlan) -> None:
        self.exchange = exchange
        self.plan = plan
        self.message_ids = itertools.cycle(range(1, 65536))
        self.outstanding: dict[int, tuple[SubOperation, Sent]] = {}
        """Sent, and not answered yet, by message ID: more than one only within a window."""
        self.statuses: dict[SubOperation, int] = {}
        """Answered before their turn."""
        self.next = 0
        """Number, in the plan, of the first instance that is not sent."""

    def has_context(self, operation: SubOperation) -> bool:
        """Whether the receiver accepted the instance's SOP class in its transfer syntax."""
        raise NotImplementedError

    def granted(self) -> int:
        """C-STORE requests that the receiver takes before it has answered, 0 for any number."""
        raise NotImplementedError

    def begin(self, operation: SubOperation, message_id: int) -> None:
        """Send the C-STORE request."""
        raise NotImplementedError

    def response(self) -> tuple[int, int]:
        """The next C-STORE response: the message ID of its request, and its status."""
        raise NotImplementedError

    def send(self, operation: SubOperation) -> int | None:
        """Send an instance; returns the receiver's status, None without a response or a context."""
        if not self.is_sent(operation):
            if not self.has_context(operation):
                return None
            self.request(operation)
            if self.window > 1:
                self.next = self.plan.operations.index(operation) + 1
        for one in self.ahead():
            self.request(one)
        while operation not in self.statuses:
            message_id, status = self.response()
            if message_id not in self.outstanding:
                raise ConnectionError("a response to no request")
            answered, sent = self.outstanding.pop(message_id)
            self.statuses[answered] = sent.status = status
        return self.statuses.pop(operation)

    def is_sent(self, operation: SubOperation) -> bool:
        """Whether the request for an instance went out before its turn."""
        sent = (one for one, _ in self.outstanding.values())
        return operation in self.statuses or operation in sent

    def request(self, operation: SubOperation) -> None:
        """Send an instance, and do not wait for its response."""
        message_id = next(self.message_ids)
        self.outstanding[message_id] = operation, self.note(operation)
        log = self.exchange.request
        log.most_outstanding = max(log.most_outstanding, len(self.outstanding))
        self.begin(operation, message_id)

    @property
    def window(self) -> int:
        """C-STORE requests that are outstanding at a time."""
        if self.plan.beyond_window is None:
            return self.plan.window
        return (self.granted() or _ANY_NUMBER) + self.plan.beyond_window

    def ahead(self) -> Iterator[SubOperation]:
        """Yield what is sent before the responses to those that are outstanding are read."""
        operations, window = self.plan.operations, self.window
        while len(self.outstanding) < window > 1 and self.next < len(operations):
            one = operations[self.next]
            if not one.readable or not self.has_context(one):
                return
            self.next += 1
            yield one

    def end(self) -> None:
        """End what was opened for sending."""

    def note(self, operation: SubOperation) -> Sent:
        """Log a sub-operation."""
        stored = operation.stored
        sent = Sent(
            stored.study_instance_uid, stored.series_instance_uid, operation.sop_instance_uid
        )
        self.exchange.request.sent.append(sent)
        return sent


class GetSender(Sender):
    """Sender over the association of the C-GET, on which the requestor took the SCP role."""

    def __init__(self, exchange: Exchange, plan: RetrievePlan) -> None:
        super().__init__(exchange, plan)
        self.contexts = contexts_to_send_in(
            exchange.association,
            without_roles=exchange.association.scripted.sends_without_roles,
        )
        if plan.manner.nagle:
            connection: socket.socket = exchange.association.dul.socket.socket
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)

    def has_context(self, operation: SubOperation) -> bool:
        """Whether the requestor accepted the instance's context."""
        return context_key(operation.stored) in self.contexts

    def granted(self) -> int:
        """The window that the requestor has proposed, PS3.7 D.3.3.3."""
        performed: int = self.exchange.association.requestor.asynchronous_operations[1]
        return performed

    def begin(self, operation: SubOperation, message_id: int) -> None:
        """Send the C-STORE request."""
        stored = operation.stored
        if not self.exchange.connected():
            raise AssociationLost
        message = C_STORE()
        message.MessageID = message_id
        message.Priority = 0
        message.AffectedSOPClassUID = stored.sop_class_uid
        message.AffectedSOPInstanceUID = operation.sop_instance_uid
        message.DataSet = BytesIO(operation.data())
        self.exchange.association.dimse.send_msg(message, self.contexts[context_key(stored)])

    def response(self) -> tuple[int, int]:
        """Wait for the next C-STORE response."""
        _, response = self.exchange.association.dimse.get_msg(block=True)
        if response is None:
            raise AssociationLost
        return int(response.MessageIDBeingRespondedTo), int(response.Status)


class MoveSender(Sender):
    """Sender over associations to the move destination, with at most 128 contexts each."""

    def __init__(self, exchange: Exchange, plan: RetrievePlan, address: tuple[str, int]) -> None:
        super().__init__(exchange, plan)
        self.address = address
        self.proposed: set[tuple[str, str]] = set()
        self.receiver: StoreAssociation | None = None
        self.sent_over_it = 0
        self.empty: list[StoreAssociation] = []

    def has_context(self, operation: SubOperation) -> bool:
        """Whether the receiver accepted the instance's context; opens associations as needed."""
        stored = operation.stored
        if self.outstanding:
            return self.receiver is not None and self.receiver.context_id(stored) is not None
        used_up = self.plan.each_association == self.sent_over_it
        if used_up or context_key(stored) not in self.proposed:
            self.release()
            for _ in range(self.plan.empty_associations):
                self.open_empty(context_key(stored))
            self.plan.empty_associations = 0
            self.open(context_key(stored))
        return self.receiver is not None and self.receiver.context_id(stored) is not None

    def send(self, operation: SubOperation) -> int | None:
        """Send an instance; a lost association fails it and the rest of its contexts."""
        try:
            return super().send(operation)
        except ConnectionError:
            if self.receiver is not None:
                self.receiver.close()
            self.receiver = None  # and no other: what is left of these contexts has failed
            self.outstanding.clear()
            return None

    def granted(self) -> int:
        """The window that the destination has granted."""
        return 1 if self.receiver is None else self.receiver.window

    def begin(self, operation: SubOperation, message_id: int) -> None:
        """Send the C-STORE request."""
        exchange, stored = self.exchange, operation.stored
        originator = exchange.association.requestor.ae_title, exchange.message.MessageID
        receiver = self.receiver
        context_id = None if receiver is None else receiver.context_id(stored)
        assert receiver is not None and context_id is not None, "has_context said so"
        self.sent_over_it += 1
        receiver.request(
            context_id,
            message_id=message_id,
            sop_class_uid=stored.sop_class_uid,
            sop_instance_uid=operation.sop_instance_uid,
            data=operation.data(),
            originator=originator if operation.originator else None,
            broken_off=self.plan.abort_within == len(exchange.request.sent) - 1,
        )

    def response(self) -> tuple[int, int]:
        """Wait for the next C-STORE response."""
        assert self.receiver is not None, "a request was sent over it"
        return self.receiver.response()

    def open(self, first: tuple[str, str]) -> None:
        """Open an association with contexts for this and as many further instances as possible."""
        pairs = dict.fromkeys([first, *(context_key(o.stored) for o in self.plan.operations)])
        contexts = list(itertools.islice(pairs, CONTEXTS_PER_ASSOCIATION))
        self.proposed = set(contexts)
        self.sent_over_it = 0
        with contextlib.suppress(ConnectionError):
            self.receiver = self.association(contexts)

    def open_empty(self, context: tuple[str, str]) -> None:
        """Open an association over which nothing is sent."""
        with contextlib.suppress(ConnectionError):
            association = self.association([context])
            if self.plan.empty_stay_open:
                self.empty.append(association)
            else:
                association.release()

    def association(self, contexts: Sequence[tuple[str, str]]) -> StoreAssociation:
        """Open an association to the move destination."""
        return StoreAssociation(
            self.exchange.pacs.ae_title,
            self.exchange.request.destination,
            self.address,
            contexts,
            manner=self.plan.manner,
            tls=self.exchange.pacs.policy.tls,
        )

    def release(self) -> None:
        """Release the association."""
        self.proposed.clear()
        if self.receiver is not None:
            self.receiver.release()
            self.receiver = None

    def end(self) -> None:
        """Release all associations."""
        self.release()
        while self.empty:
            self.empty.pop().release()
