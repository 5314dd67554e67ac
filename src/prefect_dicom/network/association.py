"""The requesting side of an association: opened when needed, used again, explained when lost.

pynetdicom's upper layer, negotiation and messages are used; its association thread is not. That
thread takes messages off the queue for itself: now and then it takes the answer a request waits
for, and one instance is missing from a list that looks whole. Here the caller's thread alone
reads the queue, by our own clock.

Why an association ended is seen in its PDUs, through pynetdicom's event handlers. Why a
connection could not be opened pynetdicom only logs: a plain connection to the same address is
then opened, once, to learn it.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Hashable
from io import BytesIO

from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_primitives import C_CANCEL, C_ECHO, C_FIND, C_MOVE
from pynetdicom.dsutils import encode
from pynetdicom.fsm import InvalidEventError, StateMachine
from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_AC, A_ASSOCIATE_RJ, A_RELEASE_RQ
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.sop_class import (
    PatientRootQueryRetrieveInformationModelFind,
    PatientRootQueryRetrieveInformationModelMove,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)
from pynetdicom.transport import AddressInformation, AssociationSocket

from prefect_dicom.config.site import PacsNode
from prefect_dicom.core.errors import Interrupted, PacsError
from prefect_dicom.core.failpoints import reached
from prefect_dicom.core.model import InformationModel
from prefect_dicom.network.association_errors import aborted, rejected, unconnected
from prefect_dicom.network.dimse import Element, read_command, unsigned_short
from prefect_dicom.network.logging import quiet_pynetdicom
from prefect_dicom.network.status import PENDING
from prefect_dicom.network.upper_layer.pdu import ProtocolError, abort_pdu
from prefect_dicom.network.upper_layer.sockets import acknowledge, prepare

Message = C_ECHO | C_FIND | C_MOVE

_SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
_PRIMITIVES: dict[str, type[Message]] = {"C-ECHO": C_ECHO, "C-FIND": C_FIND, "C-MOVE": C_MOVE}
_MODELS = {
    InformationModel.STUDY_ROOT: {
        "C-FIND": StudyRootQueryRetrieveInformationModelFind,
        "C-MOVE": StudyRootQueryRetrieveInformationModelMove,
    },
    InformationModel.PATIENT_ROOT: {
        "C-FIND": PatientRootQueryRetrieveInformationModelFind,
        "C-MOVE": PatientRootQueryRetrieveInformationModelMove,
    },
}

# Far above what an answer has: one names a study, or the UIDs of a request that have failed.
_LONGEST_PDU_BYTES = 1024 * 1024
_LONGEST_MESSAGE_BYTES = 1024 * 1024
_COMMAND_FRAGMENT, _LAST_FRAGMENT = 0x01, 0x02
_RESPONSES = {0x8020, 0x8021, 0x8030}
_LOW_PRIORITY = 2
# Archives drop idle associations after 30 s (Orthanc) or more; one about to go is not used.
_IDLE_SECONDS = 15.0
_RELEASE_SECONDS = 5.0
_ABORT_SECONDS = 1.0
# How late, at worst, the end of a connection is noticed.
_LOOK_SECONDS = 0.2


def diagnose(node: PacsNode) -> PacsError | None:
    """Why no TCP connection to a node can be opened, or None where one can.

    Opens and closes a plain connection, no DICOM on it.
    """
    try:
        socket.create_connection((node.host, node.port), node.timeouts.connect_seconds).close()
    except (OSError, UnicodeError) as error:
        return unconnected(error, node.timeouts.connect_seconds)
    return None


class _Socket(AssociationSocket):
    """pynetdicom's, which would read as many bytes as a header announces, up to 4 GiB."""

    wire: _Wire

    def recv(self, nr_bytes: int) -> bytearray:
        if nr_bytes > _LONGEST_PDU_BYTES:
            self.wire.unusable = f"a PDU of {nr_bytes} bytes"
            raise ConnectionAbortedError
        return super().recv(nr_bytes)

    def _shutdown_socket(self) -> None:
        # pynetdicom's leaves a connection open that has been shut before.
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
            self.socket.close()


class _States(StateMachine):
    """pynetdicom's, whose thread dies, with a traceback, where both sides end at the same time."""

    def do_action(self, event: str) -> None:
        # It may end (Sta13, Sta1) between our look at it and what we then ask for.
        with contextlib.suppress(InvalidEventError):
            super().do_action(event)


class _Messages(DIMSEServiceProvider):
    """pynetdicom's, which would keep the fragments of a message until memory ends.

    Its thread dies of command sets that are none, starts threads for N-EVENT-REPORTs, and writes
    the traceback, and in it what the peer has sent, to the standard error.
    """

    def __init__(self, association: Association, wire: _Wire) -> None:
        super().__init__(association)
        self._wire = wire
        self._command = bytearray()
        self._bytes = 0

    def receive_primitive(self, primitive: P_DATA) -> None:
        if self._wire.ended:
            return
        try:
            for _, data in primitive.presentation_data_value_list:
                self._check(data[0], data[1:])
            super().receive_primitive(primitive)
        except ProtocolError as fault:
            self._wire.give_up(self.assoc, fault.detail)
        except Exception as error:
            # It decodes what a stranger has sent.
            kind = type(error).__name__
            self._wire.give_up(self.assoc, f"a message that does not decode, {kind}")

    def _check(self, control: int, fragment: bytes) -> None:
        self._bytes += len(fragment)
        if self._bytes > _LONGEST_MESSAGE_BYTES:
            raise ProtocolError(ProtocolError.INVALID_PARAMETER, "a message without end")
        if control & _COMMAND_FRAGMENT:
            self._command += fragment
        if control & _LAST_FRAGMENT:
            self._bytes = 0
            if control & _COMMAND_FRAGMENT:
                command = unsigned_short(read_command(self._command), Element.COMMAND_FIELD)
                self._command.clear()
                if command not in _RESPONSES:
                    raise ProtocolError(
                        ProtocolError.UNEXPECTED_PDU, "a message that is no response"
                    )


class _Wire:
    """What was seen on one association: connection, acceptance, rejection, abort, end.

    ``unusable`` tells what the peer sent where that was no answer.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.connected = False
        self.accepted = False
        self.ended = False
        self.unusable: str | None = None
        self.rejection: tuple[int, int, int] | None = None
        self.abort: tuple[int, int] | None = None

    def watch(self, association: Association) -> None:
        association.bind(evt.EVT_CONN_OPEN, self._on_open)
        # The kernel forgets to acknowledge at once with every segment that is sent.
        association.bind(evt.EVT_DATA_RECV, self._on_data)
        association.bind(evt.EVT_DATA_SENT, self._on_data)
        association.bind(evt.EVT_PDU_RECV, self._on_pdu)
        association.bind(evt.EVT_CONN_CLOSE, self._on_close)

    def give_up(self, association: Association, detail: str) -> None:
        """What comes cannot be used: nothing more is read."""
        self.unusable = detail
        self.ended = True
        connection = association.dul.socket
        with contextlib.suppress(OSError):
            connection.socket.sendall(abort_pdu(2, ProtocolError.UNSPECIFIED))
        connection.close()

    def _on_open(self, event: evt.Event) -> None:
        self.connected = True
        connection = event.assoc.dul.socket.socket
        prepare(connection)
        # pynetdicom reads when there is something to read, and then until the PDU is whole: a
        # peer that stops in the middle of one would hold its thread, and all who wait for it.
        connection.settimeout(self._patience)

    def _on_data(self, event: evt.Event) -> None:
        connection = event.assoc.dul.socket
        if connection is not None and connection.socket is not None:
            acknowledge(connection.socket)

    def _on_pdu(self, event: evt.Event) -> None:
        pdu = event.pdu
        if isinstance(pdu, A_ASSOCIATE_AC):
            self.accepted = True
        elif isinstance(pdu, A_ASSOCIATE_RJ):
            self.rejection = (pdu.result, pdu.source, pdu.reason_diagnostic)
            # pynetdicom's thread dies of numbers outside the standard, with a traceback.
            pdu.result = pdu.source = pdu.reason_diagnostic = 1
        elif isinstance(pdu, A_ABORT_RQ):
            self.abort = (pdu.source, pdu.reason_diagnostic)
            pdu.source = pdu.reason_diagnostic = 0
            self.ended = True
        elif isinstance(pdu, A_RELEASE_RQ):
            if not self.ended:
                event.assoc.acse.send_release(is_response=True)
            self.ended = True

    def _on_close(self, event: evt.Event) -> None:
        self.ended = True


class Exchange:
    """One request under way and the responses to it. Made by :meth:`Requestor.send`."""

    def __init__(
        self,
        requestor: Requestor,
        association: Association,
        wire: _Wire,
        service: str,
        context: PresentationContext,
        message_id: int,
        fresh: bool,
    ) -> None:
        self.fresh = fresh
        """Whether the association was opened for this request."""
        self.answered = False
        """Whether the peer answered it at all."""
        self.ended = False
        """Whether the final response is here, or the association gone."""
        self._requestor = requestor
        self._association = association
        self._wire = wire
        self._service = service
        self._context = context
        self._message_id = message_id
        self._sent_at = requestor.now()

    @property
    def transfer_syntax(self) -> UID:
        """The syntax identifiers are encoded in, in both directions."""
        return self._context.transfer_syntax[0]

    def next(self, seconds: float) -> Message | None:
        """The next response, or None when none came in time.

        Raises
        ------
        PacsError
            When the association has ended, or what came is no answer to this request; the
            association is gone then.
        Interrupted
            The run was told to stop; the association was aborted.
        """
        deadline = time.monotonic() + seconds
        while True:
            remaining = max(0.0, deadline - time.monotonic())
            self._association.dimse_timeout = min(remaining, _LOOK_SECONDS)
            context_id, message = self._association.dimse.get_msg(block=True)
            if message is not None:
                return self._take(message, context_id)
            if self._service != "C-MOVE" and self._requestor.stopping():
                # A C-MOVE is cancelled first, by who waits for it: it goes on behind our back.
                self.abort()
                raise Interrupted()
            if self._wire.ended or _is_over(self._association):
                self.abort()
                if self._wire.unusable is not None:
                    raise PacsError("answer-unusable", self._wire.unusable)
                # Archives that know our AE title from no table accept the association, answer
                # C-ECHO, and abort at the first request that needs a permission.
                first = not self.answered and self._service not in self._requestor.answered
                raise aborted(*(self._wire.abort or (None, None)), first_request=first)
            if not remaining:
                return None

    def cancel(self) -> None:
        """Send a C-CANCEL-RQ, PS3.7 9.3.2.3; the final response is still to be waited for."""
        request = C_CANCEL()
        request.MessageIDBeingRespondedTo = self._message_id
        self._association.dimse.send_msg(request, self._context.context_id)

    def abort(self) -> None:
        """End the association now, with an A-ABORT where it still stands."""
        self.ended = True
        self._requestor.abort()

    def _take(self, message: object, context_id: int | None) -> Message:
        if (
            context_id != self._context.context_id
            or not isinstance(message, _PRIMITIVES[self._service])
            or not message.is_valid_response
            or message.MessageIDBeingRespondedTo != self._message_id
        ):
            self.abort()
            raise PacsError("answer-unusable", f"no answer to a {self._service} where one was due")
        if not self.answered:
            self._requestor.first_answer(self._service, self._requestor.now() - self._sent_at)
        self.answered = True
        self._requestor.answered.add(self._service)
        if message.Status not in PENDING:
            self.ended = True
            self._requestor.touch()
        return message


class Requestor:
    """Our side of the associations to one node, one at a time.

    The association (Verification, and the FIND and MOVE classes of the node's information
    model) is opened with the first request, used for all that follow, and opened anew when it
    was lost or has been idle. For one thread at a time. A context manager: pynetdicom's threads
    keep a process alive until the association is closed.

    Parameters
    ----------
    node : PacsNode
        Whom to ask, as whom, and how long to wait.
    answered : set of str, optional
        Kept by the caller, who has several requestors to the node: an abort of what it has
        answered before is no lack of permission.

    Examples
    --------
    >>> with Requestor(node) as requestor:  # doctest: +SKIP
    ...     seconds = echo(requestor)
    ...     studies = find_studies(requestor, {"PatientID": "000123"})
    """

    def __init__(self, node: PacsNode, answered: set[str] | None = None) -> None:
        quiet_pynetdicom()
        self.node = node
        self.answers_lists = True
        """Whether lists of UIDs in queries are worth a try: until one was not answered whole."""
        self.stopping: Callable[[], bool] = lambda: False
        """Whether the run has been told to stop; asked while an answer is waited for."""
        self.answered = set() if answered is None else answered
        """The services this node has ever answered us."""
        self.ignores_keys = False
        """Whether this node has said (FF01) that it does not support all keys of a query."""
        self.characters = ""
        """The Specific Character Set in which it last found a text beyond ASCII."""
        self.now: Callable[[], float] = time.monotonic
        self.first_answer: Callable[[str, float], object] = lambda service, seconds: None
        """Told of each request after how many seconds of ``now`` its first response came."""
        self.about: Hashable = None
        """The study or row that the requests are about, where it is one."""
        self._association: Association | None = None
        self._wire = _Wire(node.timeouts.acse_seconds)
        self._message_id = 0
        self._last_used = 0.0

    def __enter__(self) -> Requestor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def model(self, service: str) -> str:
        """SOP class UID that stands for a service at this node."""
        if service == "C-ECHO":
            return Verification
        return _MODELS[self.node.information_model][service]

    def open(self) -> bool:
        """Open the association now, where there is none that can be used.

        Returns
        -------
        bool
            Whether a new one was opened.

        Raises
        ------
        PacsError
            With the cause: address, refusal, silence, rejection, abort.
        """
        if self._association is not None and not self._wire.ended:
            if time.monotonic() - self._last_used < _IDLE_SECONDS:
                return False
            self.close()
        self.abort()
        self._associate()
        return True

    def send(
        self,
        service: str,
        identifier: Dataset | None = None,
        *,
        destination: str | None = None,
        message_id: int | None = None,
    ) -> Exchange:
        """Send one request, on the open association or on a new one.

        Parameters
        ----------
        service : str
            ``C-ECHO``, ``C-FIND`` or ``C-MOVE``.
        identifier : Dataset, optional
            Of a C-FIND or C-MOVE.
        destination : str, optional
            AE title a C-MOVE sends to.
        message_id : int, optional
            1 to 65535; by default the next of this requestor's own.

        Raises
        ------
        PacsError
            When no association can be had, or the peer did not accept the service on it.
        """
        fresh = self.open()
        association, model = self._association, self.model(service)
        context = next(
            (c for c in association.accepted_contexts if c.abstract_syntax == model), None
        )
        if context is None:
            refused = [c for c in association.rejected_contexts if c.abstract_syntax == model]
            result = refused[0].result if refused else None
            raise PacsError("service-not-offered", f"{service}: context result {result}")
        if message_id is None:
            self._message_id = self._message_id % 65535 + 1
            message_id = self._message_id
        request = _PRIMITIVES[service]()
        request.MessageID = message_id
        request.AffectedSOPClassUID = model
        if identifier is not None:
            syntax = context.transfer_syntax[0]
            encoded = encode(identifier, syntax.is_implicit_VR, syntax.is_little_endian)
            if encoded is None:
                raise ValueError("the identifier cannot be encoded")
            request.Priority = _LOW_PRIORITY
            request.Identifier = BytesIO(encoded)
        if destination is not None:
            request.MoveDestination = destination
        association.dimse.send_msg(request, context.context_id)
        return Exchange(self, association, self._wire, service, context, message_id, fresh)

    def close(self) -> None:
        """Release the association, PS3.8 7.2; never raises, and is fine to repeat."""
        association, self._association = self._association, None
        if association is None:
            return
        if not (self._wire.ended or _is_over(association)):
            association.acse.send_release(is_response=False)
            association.dul.receive_pdu(wait=True, timeout=_RELEASE_SECONDS)
            association.is_established = False
        _end(association)

    def abort(self) -> None:
        """End the association with an A-ABORT, where there is one."""
        association, self._association = self._association, None
        if association is not None:
            _end(association)

    def touch(self) -> None:
        """Note that the association was used just now."""
        self._last_used = time.monotonic()

    def _associate(self) -> None:
        node, wire = self.node, _Wire(self.node.timeouts.acse_seconds)
        self._wire = wire
        application = AE(ae_title=node.calling_ae_title)
        application.connection_timeout = node.timeouts.connect_seconds
        application.acse_timeout = node.timeouts.acse_seconds
        application.network_timeout = None
        try:
            address = AddressInformation.from_addr_port(node.host, node.port)
        except (socket.gaierror, UnicodeError) as error:
            raise unconnected(error, node.timeouts.connect_seconds) from None
        association = Association(application, "requestor")
        own = AddressInformation("0.0.0.0" if address.is_ipv4 else "::", 0)
        connection = _Socket(association, address=own)
        connection.wire = wire
        association.set_socket(connection)
        association.dimse = _Messages(association, wire)
        association.dul.state_machine = _States(association.dul)
        association.acceptor.ae_title = node.called_ae_title
        association.acceptor.address_info = address
        association.requestor.address_info = own
        association.requestor.ae_title = node.calling_ae_title
        association.requestor.maximum_length = application.maximum_pdu_size
        association.requestor.implementation_class_uid = application.implementation_class_uid
        association.requestor.implementation_version_name = application.implementation_version_name
        contexts = []
        for number, service in enumerate(_PRIMITIVES):
            contexts.append(build_context(self.model(service), _SYNTAXES))
            contexts[-1].context_id = 2 * number + 1
        association.requestor.requested_contexts = contexts
        wire.watch(association)
        started = time.monotonic()
        association.request()
        if association.is_established and not wire.ended:
            self._association = association
            self.touch()
            reached("associated")
            return
        _end(association)
        usable = bool(association.accepted_contexts)
        raise self._refused(wire, usable, time.monotonic() - started)

    def _refused(self, wire: _Wire, usable: bool, seconds: float) -> PacsError:
        """The error for an association that did not come to stand."""
        timeouts = self.node.timeouts
        if not wire.connected:
            if seconds >= timeouts.connect_seconds:
                limit = timeouts.connect_seconds
                return PacsError("pacs-unreachable", f"no connection within {limit:g} s")
            # A connection that failed and succeeds a moment later was reset while it was opened,
            # or the peer has just come up.
            return diagnose(self.node) or PacsError("pacs-reset", "the connection failed once")
        if wire.unusable is not None:
            return PacsError("answer-unusable", wire.unusable)
        if wire.rejection is not None:
            return rejected(*wire.rejection)
        if wire.abort is not None:
            error = aborted(*wire.abort, first_request=True)
            if error.code != "association-lost":
                return error
            # Nothing has been asked yet that could be at fault: it is the node's.
            return PacsError("pacs-reset", error.detail)
        if usable:
            return PacsError("pacs-reset", "the connection ended as the association was accepted")
        if wire.accepted:
            return PacsError("service-not-offered", "no presentation context was accepted")
        if seconds >= timeouts.acse_seconds:
            limit = timeouts.acse_seconds
            return PacsError("pacs-silent", f"no answer to the association request in {limit:g} s")
        return PacsError("pacs-reset", "the connection ended before the association was accepted")


def _is_over(association: Association) -> bool:
    """Whether pynetdicom has ended it: it aborts for itself what it cannot read (PS3.8 9.2)."""
    thread = association.dul
    return not thread.is_alive() or thread.state_machine.current_state in ("Sta1", "Sta13")


def _end(association: Association) -> None:
    """Abort what still stands, and see its thread and its socket off."""
    thread, connection = association.dul, association.dul.socket
    if association.is_established and not _is_over(association):
        association.abort(block=False)
        thread.join(_ABORT_SECONDS)
    # Whatever the thread waits for, this ends it.
    raw = connection.socket
    if raw is not None:
        with contextlib.suppress(OSError):
            raw.shutdown(socket.SHUT_RDWR)
    association.kill()
    connection.close()
