"""An association as its requestor: opened, refused with a reason, used and ended."""

from __future__ import annotations

import contextlib
import socket
import time

from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from prefect_dicom.config.node import PacsNode
from prefect_dicom.core.errors import PacsError
from prefect_dicom.network.association_errors import aborted, rejected, unconnected
from prefect_dicom.network.dimse import (
    Message,
    MessageReader,
)
from prefect_dicom.network.tls import TLS_ALERT, refusal_after, secure
from prefect_dicom.network.upper_layer.negotiation import (
    ACCEPTED,
    ANSWER_BYTES,
    Granted,
    read_answer,
)
from prefect_dicom.network.upper_layer.pdu import (
    PDU_HEADER,
    Pdu,
    ProtocolError,
    abort_pdu,
    message_pdus,
)
from prefect_dicom.network.upper_layer.sockets import prepare
from prefect_dicom.network.upper_layer.stream import BUFFER_BYTES, Stream

TRANSFER_SYNTAXES = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))
"""Transfer syntaxes of an :class:`Association`, which lose nothing of an identifier."""
_NO_CONTEXT_RESULT = 2
_TRANSFER_SYNTAX_NOT_PROPOSED = 4
_RELEASE_SECONDS = 5.0
_ABORT_SECONDS = 1.0
_TLS_MAJOR_VERSION = 3


def connect(node: PacsNode) -> socket.socket:
    """Open a connection to a node: TCP, and TLS where the node has it.

    Raises
    ------
    PacsError
        With the cause.
    """
    seconds = node.timeouts.connect_seconds
    try:
        connection = socket.create_connection((node.host, node.port), seconds)
    except (OSError, UnicodeError) as error:
        raise unconnected(error, seconds) from None
    prepare(connection)
    return secure(connection, node, node.timeouts.acse_seconds)


def associate(
    node: PacsNode, request: bytes, buffer_bytes: int = BUFFER_BYTES
) -> tuple[Stream, Granted]:
    """Open a connection and have an association accepted on it.

    Parameters
    ----------
    request : bytes
        The A-ASSOCIATE-RQ.
    buffer_bytes : int
        Of the stream that is returned.

    Returns
    -------
    tuple of (Stream, Granted)
        The association's stream, behind the A-ASSOCIATE-AC, and what that grants.

    Raises
    ------
    PacsError
        With the cause: address, refusal, silence, rejection, abort, another answer.
    """
    connection = connect(node)
    stream = Stream(connection, buffer_bytes=buffer_bytes)
    try:
        return stream, read_answer(_answer(stream, request, node.timeouts.acse_seconds))
    except ProtocolError as fault:
        abort(stream, fault.source, fault.reason)
        raise PacsError("answer-unusable", fault.detail) from None
    except BaseException:
        connection.close()
        raise


def _answer(stream: Stream, request: bytes, seconds: float) -> bytes:
    """Send an A-ASSOCIATE-RQ; the A-ASSOCIATE-AC that answers it."""
    deadline = time.monotonic() + seconds
    try:
        stream.send(request, deadline)
        header = stream.take(PDU_HEADER.size, deadline)
        kind, length = PDU_HEADER.unpack(header)
        if header[0] == TLS_ALERT and header[1] == _TLS_MAJOR_VERSION:
            raise PacsError("tls-required", "a TLS alert answers the association request")
        if kind not in (Pdu.ASSOCIATE_AC, Pdu.ASSOCIATE_RJ, Pdu.ABORT) or length > ANSWER_BYTES:
            raise ProtocolError(ProtocolError.UNEXPECTED_PDU, "the answer is no A-ASSOCIATE-AC")
        body = stream.take(length, deadline)
    except TimeoutError:
        raise PacsError(
            "pacs-silent", f"no answer to the association request in {seconds:g} s"
        ) from None
    except OSError as error:
        # With TLS 1.3 a peer refuses our certificate only now.
        raise (
            refusal_after(error, stream.connection)
            or PacsError("pacs-reset", "the connection ended before the association was accepted")
        ) from None
    if kind != Pdu.ASSOCIATE_AC and length != 4:
        raise ProtocolError(ProtocolError.UNEXPECTED_PDU, "the answer is no A-ASSOCIATE-AC")
    if kind == Pdu.ASSOCIATE_RJ:
        raise rejected(body[1], body[2], body[3])
    if kind == Pdu.ABORT:
        raise aborted(body[2], body[3], first_request=True)
    return header + body


def abort(stream: Stream, source: int = 0, reason: int = 0) -> None:
    """Send an A-ABORT, if the peer still takes it, and close the connection.

    The peer is given a second to close it first: closed with unread bytes, a connection is reset,
    and the A-ABORT may be lost with it. Who broke the protocol is not waited for.
    """
    deadline = time.monotonic() + _ABORT_SECONDS
    with contextlib.suppress(OSError):
        stream.send(abort_pdu(source, reason), deadline)
        while source == 0:
            stream.start = stream.end
            stream.fill(deadline)
    stream.connection.close()


class Association:
    """An association that stands: requests out, messages in, and its end."""

    def __init__(self, stream: Stream, granted: Granted, pdu_seconds: float) -> None:
        self._stream = stream
        self._granted = granted
        self._reader = MessageReader(stream)
        self._pdu_seconds = pdu_seconds

    def transfer_syntax(self, context_id: int) -> UID:
        """The transfer syntax of an accepted presentation context."""
        return UID(self._granted.transfer_syntaxes[context_id])

    def context_result(self, context_id: int) -> int:
        """The result for a presentation context that was proposed, PS3.8 9.3.3.2."""
        result = self._granted.results.get(context_id, _NO_CONTEXT_RESULT)
        if (
            result == ACCEPTED
            and self._granted.transfer_syntaxes[context_id] not in TRANSFER_SYNTAXES
        ):
            return _TRANSFER_SYNTAX_NOT_PROPOSED
        return result

    def look(self) -> None:
        """Raise what has ended the association since it was read last, if anything has.

        Waits for nothing. Raises as :meth:`read` does, but no time-out.
        """
        with contextlib.suppress(TimeoutError):
            self._reader.wait(0.0)

    def read(self, deadline: float) -> Message:
        """The next message, see :meth:`MessageReader.read`."""
        return self._reader.read(deadline)

    def send(self, context_id: int, command: bytes, data_set: bytes | None) -> None:
        """Send a message. That the peer does not take it shows when its response is read."""
        pdus = message_pdus(context_id, command, data_set, self._granted.peer_pdu_bytes)
        try:
            self._stream.send(pdus, time.monotonic() + self._pdu_seconds)
        except TimeoutError:
            # A part of it has been sent: no other PDU can follow.
            self.close()
        except OSError:
            # Why is still to be read.
            pass

    def release(self) -> None:
        """Release the association, PS3.8 7.2, and close the connection; never raises."""
        self._stream.release(time.monotonic() + _RELEASE_SECONDS)
        self.close()

    def abort(self, source: int = 0, reason: int = 0) -> None:
        """Send an A-ABORT and close the connection; never raises."""
        abort(self._stream, source, reason)

    def close(self) -> None:
        """Close the connection."""
        self._stream.connection.close()
