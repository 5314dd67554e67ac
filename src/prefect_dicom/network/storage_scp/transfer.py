"""The transfer loop: P-DATA in, part files out, C-STORE responses back.

One loop for both ways of receiving instances: the storage SCP that a C-MOVE sends to, and the
association of our own C-GET. It owns the socket once the association is negotiated. The bytes
go from the socket into one buffer that is used again and again, and from there into the part
file in the encoding they arrived in; PDU headers, PDV items and command sets are read in place.
PDUs are never assembled: memory does not depend on what a peer sends.

Sources: PS3.8 9.3 (PDUs) and Annex E (PDVs), PS3.7 6.3, 9.3 and Annex E (command sets).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prefect_dicom.core.background import Background, processors
from prefect_dicom.core.errors import SpoolFull
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import StoreRequest
from prefect_dicom.core.uids import normal_uid
from prefect_dicom.network.commitment_report import (
    ReportHandler,
    read_report,
    report_response,
)
from prefect_dicom.network.dimse import (
    RESPONSE,
    CommandField,
    Element,
    Elements,
    has_data_set,
    read_command,
    response_command,
    unsigned_short,
)
from prefect_dicom.network.status import StorageStatus
from prefect_dicom.network.storage_scp.close_reason import CloseKind, CloseReason
from prefect_dicom.network.storage_scp.instance_sink import IncomingInstance, InstanceSink
from prefect_dicom.network.storage_scp.limits import Limits
from prefect_dicom.network.upper_layer.association_items import ae_title
from prefect_dicom.network.upper_layer.negotiation import Context
from prefect_dicom.network.upper_layer.pdu import (
    P_DATA_TF,
    RELEASE_RP,
    ProtocolError,
    abort_pdu,
    message_pdus,
)
from prefect_dicom.network.upper_layer.stream import BUFFER_BYTES, Stream

logger = logging.getLogger(__name__)

# Some peers do not look at the length that is announced, and none of it is kept in memory.
_LONGEST_PDU_BYTES = 64 * 1024 * 1024
_COMMAND_BYTES = 64 * 1024
# Of a final response: a list of the UIDs that failed, of all that were asked for at once.
_IDENTIFIER_BYTES = 1024 * 1024
# Fewer than the kernel takes in one call (IOV_MAX).
_MOST_FRAGMENTS = 512
# A system call for each is a fifth of the work for small instances of a peer that sends ahead.
_MOST_RESPONSES_DUE = 8


@dataclass(frozen=True, slots=True)
class AssociationInfo:
    """AE titles and address of an association's peers, for every :class:`StoreRequest`."""

    calling_ae_title: str = ""
    called_ae_title: str = ""
    address: str = ""


class _Left(Exception):
    """Raised inside the loop where the conversation is over."""

    def __init__(self, end: CloseReason) -> None:
        super().__init__(end.detail)
        self.end = end


ResponseHandler = Callable[[Elements, bytes], bool]
"""Gets the elements of a response and its identifier; True when it was the last response."""


class Transfer:
    """An established association from its first message to its end.

    Answers C-STORE-RQ and C-ECHO-RQ, one after the other in the order they came (a peer may
    send several before our first answer); hands responses to ``on_response``; answers other
    requests with 0x0211.

    Parameters
    ----------
    stream : Stream
        Behind the negotiation; bytes of the first message may be in its buffer already.
    contexts : mapping of int to Context
        The accepted presentation contexts by their ID.
    store_handler : InstanceSink
        Where instances go.
    info : AssociationInfo
        For the requests handed to the store handler.
    limits : Limits
        What the peer may take.
    peer_pdu_bytes : int
        The maximum PDU length the peer announced; 0 is any.
    first_idle_seconds : float, optional
        Instead of ``limits.idle_seconds`` until the first PDU.
    on_response : callable, optional
        Without it a response ends the association.

    Attributes
    ----------
    on_report : callable or None
        Takes reports of storage commitment; without it they are no operation of ours.
    instances, size_bytes : int
        Data sets answered by success, and their bytes.
    messages : int
        Whole messages received.
    """

    def __init__(
        self,
        stream: Stream,
        contexts: Mapping[int, Context],
        store_handler: InstanceSink[Any],
        *,
        info: AssociationInfo | None = None,
        limits: Limits | None = None,
        peer_pdu_bytes: int = 0,
        first_idle_seconds: float | None = None,
        on_response: ResponseHandler | None = None,
    ) -> None:
        self._stream = stream
        self._contexts = contexts
        self._store_handler = store_handler
        self._info = info or AssociationInfo()
        self._limits = limits or Limits()
        self._peer_pdu_bytes = peer_pdu_bytes
        self._idle_seconds = _or_never(
            self._limits.idle_seconds if first_idle_seconds is None else first_idle_seconds
        )
        self._on_response = on_response
        self.on_report: ReportHandler | None = None

        self._command = bytearray()
        self._context_id: int | None = None
        """Context of the message under way; None between messages."""
        self._elements: Elements | None = None
        """The command whose data set is under way; None before its end."""
        self._message_deadline = math.inf
        self._instance: IncomingInstance | None = None
        self._fragments: list[memoryview] = []
        """Of the part's data set, in the stream's buffer and not written yet."""
        stream.borrower = self._give_back
        # Only where the buffer has room for what is received meanwhile, and a processor has time.
        has_room = len(stream.view) >= BUFFER_BYTES
        self._background = Background("hash") if has_room and processors() > 1 else None
        self._identifier: bytearray | None = None
        self._failure: int | None = None
        self._data_set_bytes = 0

        self._responses = bytearray()
        """Those that are due, and go out before more is read."""
        self._responses_due = 0
        self._leaving = False
        self._class_was_noted = False
        self._finished = False
        """Whether the last response has come."""
        self.instances = 0
        self.size_bytes = 0
        self.messages = 0

    @property
    def busy(self) -> bool:
        """Whether a message has begun and is not answered yet."""
        return self._context_id is not None

    def leave(self) -> None:
        """End with an A-ABORT after the message under way. Another thread may call this."""
        self._leaving = True

    def hang_up(self) -> None:
        """End with an A-ABORT now. Does not return: for the callbacks ``run`` calls."""
        raise _Left(CloseReason(CloseKind.STOPPED))

    def send(self, data: bytes) -> None:
        """Write to the peer, behind responses that are due, within the time a PDU may take."""
        self._send_responses()
        self._stream.send(data, time.monotonic() + self._limits.pdu_seconds)

    def _send_responses(self) -> None:
        if self._responses:
            data, self._responses, self._responses_due = self._responses, bytearray(), 0
            self._stream.send(bytes(data), time.monotonic() + self._limits.pdu_seconds)
            failpoint("store-answered")

    def run(self) -> CloseReason:
        """Serve the association until it ends. Never raises for what a peer does.

        The socket is left open; a part that was not completed has been abandoned.
        """
        try:
            return self._converse()
        except _Left as left:
            end = left.end
        except ProtocolError as fault:
            end = CloseReason(CloseKind.REFUSED, fault.source, fault.reason, fault.detail)
        except OSError as error:
            end = CloseReason(CloseKind.CLOSED, detail=type(error).__name__)
        finally:
            self._abandon()
            if self._background is not None:
                self._background.close()
            # No cycle of references: the buffer goes with the association, not when Python
            # next looks for cycles.
            self._fragments = []
            self._stream.borrower = None
        if end.kind in (CloseKind.IDLE, CloseKind.REFUSED, CloseKind.STOPPED):
            self.abort(end.source or 0, end.reason or 0)
        elif self._leaving and end.kind is CloseKind.CLOSED:
            # The reading half was shut to wake this thread; the peer can still get an A-ABORT.
            self.abort(0, 0)
            end = CloseReason(CloseKind.STOPPED)
        return end

    def abort(self, source: int = 0, reason: int = 0) -> None:
        """Send an A-ABORT, if the peer still takes it."""
        try:
            self.send(abort_pdu(source, reason))
        except OSError:
            logger.debug("the peer was gone before our A-ABORT")

    # --- PDUs

    def _converse(self) -> CloseReason:
        stream = self._stream
        while True:
            if self._context_id is None:
                if self._leaving:
                    self.hang_up()
                if stream.attend is not None:
                    stream.attend()
            if stream.start == stream.end:
                self._wait_for_pdu()
            began = time.monotonic()
            deadline = min(began + self._limits.pdu_seconds, self._message_deadline)
            try:
                kind, length = stream.pdu_header(deadline)
                if kind != P_DATA_TF:
                    return self._other_pdu(kind, length, deadline)
                if not 6 <= length <= _LONGEST_PDU_BYTES:
                    raise ProtocolError(
                        ProtocolError.INVALID_PARAMETER, f"a P-DATA-TF of {length} bytes"
                    )
                if length > self._limits.pdu_bytes:
                    deadline = min(began + self._limits.seconds_of(length), self._message_deadline)
                stream.p_data(length, deadline, self._take)
                if self._finished:
                    return CloseReason(CloseKind.FINISHED)
            except TimeoutError:
                raise ProtocolError(
                    ProtocolError.UNSPECIFIED, "a PDU or message took too long"
                ) from None

    def _wait_for_pdu(self) -> None:
        try:
            self._send_responses()
        except TimeoutError:
            detail = "responses are not taken"
            raise ProtocolError(ProtocolError.UNSPECIFIED, detail) from None
        idle_deadline = time.monotonic() + self._idle_seconds
        try:
            self._stream.fill(min(idle_deadline, self._message_deadline))
        except TimeoutError:
            if self._message_deadline < idle_deadline:
                raise ProtocolError(ProtocolError.UNSPECIFIED, "a message took too long") from None
            raise _Left(CloseReason(CloseKind.IDLE)) from None
        self._idle_seconds = _or_never(self._limits.idle_seconds)

    def _other_pdu(self, kind: int, length: int, deadline: float) -> CloseReason:
        numbers = self._stream.read_close(kind, length, deadline)
        if numbers is not None:
            return CloseReason(CloseKind.ABORTED, *numbers)
        if self.busy:
            raise ProtocolError(ProtocolError.UNEXPECTED_PDU, "released within a message")
        self.send(RELEASE_RP)
        return CloseReason(CloseKind.RELEASED)

    # --- messages

    def _take(self, context_id: int, is_command: bool, is_last: bool, data: memoryview) -> None:
        """One fragment."""
        # Without a call for what is expected: a peer may send a million empty PDVs.
        if context_id != self._context_id or is_command is not (self._elements is None):
            self._begin_command(context_id, is_command)
        if is_command:
            self._take_command(data)
        elif data:
            self._take_data(data)
        if is_last:
            self._last_fragment(is_command)

    def _begin_command(self, context_id: int, is_command: bool) -> None:
        """Begin a message; raise where a PDV of this kind may not come now, PS3.8 E.2."""
        if self._context_id is not None:
            if context_id != self._context_id:
                raise ProtocolError(ProtocolError.INVALID_PARAMETER, "a message on two contexts")
            raise ProtocolError(ProtocolError.UNEXPECTED_PDU, "command and data set out of order")
        if context_id not in self._contexts:
            raise ProtocolError(ProtocolError.INVALID_PARAMETER, "a PDV on an unknown context")
        if not is_command:
            raise ProtocolError(ProtocolError.UNEXPECTED_PDU, "a data set without a command")
        self._context_id = context_id
        self._message_deadline = time.monotonic() + _or_never(self._limits.message_seconds)

    def _take_command(self, fragment: memoryview) -> None:
        if len(self._command) + len(fragment) > _COMMAND_BYTES:
            raise ProtocolError(ProtocolError.INVALID_PARAMETER, "a command set without end")
        self._command += fragment

    def _take_data(self, fragment: memoryview) -> None:
        self._data_set_bytes += len(fragment)
        if self._instance is not None:
            self._fragments.append(fragment)
            if len(self._fragments) >= _MOST_FRAGMENTS:
                self._write_fragments()
        elif self._identifier is not None:
            if self._data_set_bytes > _IDENTIFIER_BYTES:
                raise ProtocolError(ProtocolError.INVALID_PARAMETER, "an identifier without end")
            # Nobody reads those of requests we do not serve.
            if self._on_response is not None or self.on_report is not None:
                self._identifier += fragment

    def _give_back(self, must: bool) -> bool:
        """Write what is in the stream's buffer; whether none of that is needed any more."""
        self._send_responses()
        self._write_fragments()
        if self._background is None:
            return True
        given = self._instance is None or self._instance.give_back(all_of_it=must)
        if must:
            self._background.wait()
        return given and self._background.idle

    def _write_fragments(self) -> None:
        """Write the fragments in the buffer to the instance, all at once."""
        if not self._fragments:
            return
        fragments, self._fragments = self._fragments, []
        if self._instance is None:
            return
        try:
            self._instance.write(fragments)
        except (SpoolFull, OSError) as error:
            # Swallow the rest: the association stays usable, the peer gets a status.
            logger.error("an instance could not be written: %s", type(error).__name__)
            self._failure = StorageStatus.OUT_OF_RESOURCES
            self._abandon()

    def _last_fragment(self, is_command: bool) -> None:
        if is_command:
            elements = read_command(self._command)
            self._command.clear()
            self._elements = elements
            is_followed = has_data_set(elements)
            self._begin_message(elements, is_followed)
            if is_followed:
                return
        self._finished |= self._finish_message(self._elements or {})
        self.messages += 1
        self._context_id = self._elements = self._identifier = self._failure = None
        self._data_set_bytes = 0
        self._message_deadline = math.inf

    def _begin_message(self, elements: Elements, is_followed: bool) -> None:
        if unsigned_short(elements, Element.COMMAND_FIELD) != CommandField.C_STORE_RQ:
            self._identifier = bytearray()
            return
        if not is_followed:
            self._failure = StorageStatus.CANNOT_UNDERSTAND
            return
        try:
            request = self._store_request(elements)
            self._instance = self._store_handler.begin(request, self._background)
        except (SpoolFull, OSError) as error:
            logger.error("an instance could not be taken: %s", type(error).__name__)
            self._failure = StorageStatus.OUT_OF_RESOURCES
        except Exception as error:
            # No text: it may hold what the peer sent.
            logger.error("the store handler failed to begin an instance: %s", type(error).__name__)
            self._failure = StorageStatus.PROCESSING_FAILURE

    def _finish_message(self, elements: Elements) -> bool:
        """Answer the message that is whole now; True after the last response."""
        command = unsigned_short(elements, Element.COMMAND_FIELD) or 0
        if command == CommandField.C_STORE_RQ:
            self._answer(elements, self._store())
        elif command == CommandField.C_ECHO_RQ:
            self._answer(elements, StorageStatus.SUCCESS)
        elif command == CommandField.N_EVENT_REPORT_RQ and self.on_report is not None:
            self._take_report(elements, self.on_report)
        elif command & RESPONSE:
            if self._on_response is None:
                raise ProtocolError(ProtocolError.UNSPECIFIED, "a response to no request", source=0)
            return self._on_response(elements, bytes(self._identifier or b""))
        elif command != CommandField.C_CANCEL_RQ:
            self._answer(elements, StorageStatus.UNRECOGNISED_OPERATION)
        return False

    def _take_report(self, elements: Elements, on_report: ReportHandler) -> None:
        context_id = self._context_id or 0
        syntax = self._contexts[context_id].transfer_syntax_uid
        try:
            status = on_report(read_report(bytes(self._identifier or b""), syntax))
        except Exception as error:
            logger.error("a report could not be recorded: %s", type(error).__name__)
            status = StorageStatus.PROCESSING_FAILURE
        response = report_response(elements, status)
        self.send(message_pdus(context_id, response, None, self._peer_pdu_bytes))

    def _store(self) -> int:
        self._write_fragments()
        if self._failure is not None or self._instance is None:
            return StorageStatus.PROCESSING_FAILURE if self._failure is None else self._failure
        instance, self._instance = self._instance, None
        try:
            status = self._store_handler.complete(instance)
        except (SpoolFull, OSError) as error:
            logger.error("an instance could not be kept: %s", type(error).__name__)
            return StorageStatus.OUT_OF_RESOURCES
        except Exception as error:
            logger.error(
                "the store handler failed to complete an instance: %s", type(error).__name__
            )
            return StorageStatus.PROCESSING_FAILURE
        if status == StorageStatus.SUCCESS:
            self.instances += 1
            self.size_bytes += self._data_set_bytes
        return status

    def _answer(self, elements: Elements, status: int) -> None:
        self._responses += message_pdus(
            self._context_id or 0, response_command(elements, status), None, self._peer_pdu_bytes
        )
        self._responses_due += 1
        # A peer that has sent further requests waits for none of them; else the loop reads next,
        # and sends before.
        if self._responses_due >= _MOST_RESPONSES_DUE:
            self._send_responses()

    def _store_request(self, elements: Elements) -> StoreRequest:
        originator = elements.get(Element.MOVE_ORIGINATOR_AE_TITLE)
        context = self._contexts[self._context_id or 0]
        sop_class_uid = _text(elements, Element.AFFECTED_SOP_CLASS_UID)
        if sop_class_uid != normal_uid(context.abstract_syntax_uid) and not self._class_was_noted:
            # PS3.7 9.3.1; PACS negotiate by databases that are older than their files.
            self._class_was_noted = True
            words = "sends instances on a presentation context of another SOP class; they are taken"
            logger.debug("%s %s", self._info.calling_ae_title or "the PACS", words)
        return StoreRequest(
            message_id=unsigned_short(elements, Element.MESSAGE_ID) or 0,
            sop_class_uid=sop_class_uid,
            sop_instance_uid=_text(elements, Element.AFFECTED_SOP_INSTANCE_UID),
            transfer_syntax_uid=context.transfer_syntax_uid,
            calling_ae_title=self._info.calling_ae_title,
            called_ae_title=self._info.called_ae_title,
            peer_address=self._info.address,
            move_originator_ae_title=None if originator is None else ae_title(originator),
            move_originator_message_id=unsigned_short(elements, Element.MOVE_ORIGINATOR_MESSAGE_ID),
        )

    def _abandon(self) -> None:
        instance, self._instance = self._instance, None
        if instance is None:
            return
        try:
            self._store_handler.abandon(instance)
        except Exception as error:
            logger.error(
                "the store handler failed to abandon an instance: %s", type(error).__name__
            )


def _text(elements: Elements, element: int) -> str:
    # Bytes that are no ASCII survive as surrogates, so that two texts never become one.
    return normal_uid(elements.get(element, b"").decode("ascii", "surrogateescape"))


def _or_never(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds
