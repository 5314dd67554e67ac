"""The storage SCP: who may connect, how associations are negotiated, how it stops.

The negotiation (PS3.8 9.3, PS3.7 Annex D) is read and answered here; then the
:mod:`transfer loop <prefect_dicom.network.storage_scp.transfer>` has the socket. Every peer is a
stranger until it is through: the allow-list is asked before its first byte is read, it has no
thread before its request is there, the TLS handshake and the A-ASSOCIATE-RQ have a size and
a deadline, and only an accepted association takes one of the slots, so silent connections do not
lock a PACS out.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from prefect_dicom.core.errors import ReceiverError
from prefect_dicom.network.commitment_report import ReportHandler
from prefect_dicom.network.logging import configure_logging
from prefect_dicom.network.storage_scp.association_events import (
    REJECTED_APPLICATION_CONTEXT,
    REJECTED_CALLED_AE_TITLE,
    REJECTED_CALLING_AE_TITLE,
    REJECTED_LOCAL_LIMIT,
    REJECTED_PROTOCOL_VERSION,
    AssociationEvent,
    Happening,
)
from prefect_dicom.network.storage_scp.close_reason import CloseKind, CloseReason
from prefect_dicom.network.storage_scp.connection import (
    Connection,
    ConnectionPolicy,
    plain_address,
)
from prefect_dicom.network.storage_scp.instance_sink import InstanceSink
from prefect_dicom.network.storage_scp.limits import Limits
from prefect_dicom.network.storage_scp.pending import PendingConnections, Readiness
from prefect_dicom.network.storage_scp.sender_tls import (
    MOST_HELLO_BYTES,
    SenderRefused,
    SenderTls,
    hello_bytes,
)
from prefect_dicom.network.storage_scp.transfer import (
    AssociationInfo,
    Transfer,
)
from prefect_dicom.network.tls import TLS_HANDSHAKE, peer_of
from prefect_dicom.network.upper_layer.association_items import printable
from prefect_dicom.network.upper_layer.negotiation import (
    APPLICATION_CONTEXT,
    MOST_FIRST_BYTES,
    Answer,
    AssociationRequest,
    NotDicomError,
    first_bytes,
    read_request,
)
from prefect_dicom.network.upper_layer.pdu import Pdu, ProtocolError, abort_pdu, reject_pdu
from prefect_dicom.network.upper_layer.sockets import listening_process, prepare
from prefect_dicom.network.upper_layer.stream import Stream

logger = logging.getLogger(__name__)

# Connections that are not associations yet, above the number of associations.
_CONNECTIONS_BEYOND = 64
# Those that were sent away and whose threads have not ended yet, above that.
_ENDING_BEYOND = 64
# A buffer that takes a whole image is for as many connections as a PACS opens; of more, each
# gets a smaller one: what all of them can fill stays within the memory we may take.
_LARGE_BUFFERS = 16
_SMALL_BUFFER_BYTES = 128 * 1024
# A connection that finds the queue full is retried by its kernel after a second; the last one in a
# longer queue would wait as long.
_BACKLOG = 2048
_NO_FILES_PAUSE_SECONDS = 0.1
_ABORT_SECONDS = 5.0


class StorageScp:
    """A storage SCP that accepts every storage class in the encoding it is stored in.

    Parameters
    ----------
    address : str
        Address to listen on, IPv4 or IPv6.
    port : int
        0 takes a free one, see :attr:`port`.
    ae_titles : str or sequence of str
        Our AE titles; another called title is rejected.
    store_handler : InstanceSink
        Where instances go; used by all associations at once.
    policy : ConnectionPolicy
        Who may connect.
    tls : SenderTls, optional
        TLS from the first byte on; without it plain DICOM.
    limits : Limits, optional
        What an association may take.
    on_event : callable, optional
        Called with each :class:`AssociationEvent`, in the thread it happens in.
    """

    def __init__(
        self,
        address: str,
        port: int,
        ae_titles: str | Sequence[str],
        store_handler: InstanceSink[Any],
        *,
        policy: ConnectionPolicy,
        tls: SenderTls | None = None,
        limits: Limits | None = None,
        on_event: Callable[[AssociationEvent], None] | None = None,
    ) -> None:
        configure_logging()
        self._address = address
        self._port = port
        titles = (ae_titles,) if isinstance(ae_titles, str) else ae_titles
        self._ae_titles = frozenset(title.strip() for title in titles)
        self._store_handler = store_handler
        self._policy = policy
        self._tls = tls
        self._limits = limits or Limits()
        self._on_event = on_event
        self.on_report: ReportHandler | None = None
        """Takes reports of storage commitment, PS3.4 J.3.3; without it the class is refused. To be
        set before it is started."""
        self._listener: socket.socket | None = None
        self._accepting: threading.Thread | None = None
        self._waker: socket.socket | None = None
        self._lock = threading.Lock()
        self._connections: dict[Connection, None] = {}
        self._stopping = threading.Event()

    def __enter__(self) -> StorageScp:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The port listened on; the one asked for while not started."""
        return self._port

    @property
    def associations(self) -> int:
        """Accepted associations that have not ended."""
        with self._lock:
            return sum(connection.has_slot for connection in self._connections)

    def start(self) -> None:
        """Listen, and accept associations in threads of their own.

        Raises
        ------
        ReceiverError
            ``receiver-taken`` where something listens there already, else
            ``receiver-unreachable``; ``tls-files-unusable``.
        """
        if self._tls is not None:
            self._tls.check()
        self._listener = listen(self._address, self._port)
        self._listener.setblocking(False)
        self._port = self._listener.getsockname()[1]
        self._stopping.clear()
        wake, self._waker = socket.socketpair()
        self._accepting = threading.Thread(
            target=self._accept, args=(self._listener, wake), name="receiver", daemon=True
        )
        self._accepting.start()

    def stop(self, grace_seconds: float = 10.0) -> None:
        """Listen no more, let instances under way finish, and abort the associations.

        An association between two messages is aborted at once; one within an instance after its
        answer, or when the grace is over. Returns when all threads have ended.
        """
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self._stopping.set()
        if self._waker is not None:
            self._waker.close()
        if self._accepting is not None:
            self._accepting.join()
        listener.close()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            transfer = connection.transfer
            if transfer is not None:
                transfer.leave()
            if transfer is None or not transfer.busy:
                connection.shut(socket.SHUT_RD)
        self._join(connections, grace_seconds)
        for connection in connections:
            connection.shut(socket.SHUT_RD)
        self._join(connections, _ABORT_SECONDS)
        for connection in connections:
            connection.shut(socket.SHUT_RDWR)
        self._join(connections, _ABORT_SECONDS)

    @staticmethod
    def _join(connections: Iterable[Connection], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for connection in connections:
            if connection.thread is not None:
                connection.thread.join(max(0.0, deadline - time.monotonic()))

    # --- accepting connections

    def _accept(self, listener: socket.socket, wake: socket.socket) -> None:
        with selectors.DefaultSelector() as selector, wake:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(wake, selectors.EVENT_READ)
            if self._tls is None:
                pending = PendingConnections[Connection](selector, first_bytes, MOST_FIRST_BYTES)
            else:
                pending = PendingConnections[Connection](selector, hello_bytes, MOST_HELLO_BYTES)
            while not self._stopping.is_set():
                for key, _ in selector.select(pending.seconds_left()):
                    if key.fileobj is listener:
                        self._accept_one(listener, pending)
                    elif key.data in pending:
                        # Else it was turned away for one that came before it in this turn.
                        self._look(key.data, pending)
                while (overdue := pending.overdue()) is not None:
                    self._turn_away(overdue, pending, Happening.UNINTELLIGIBLE)
            for connection in pending.all():
                pending.leave(connection)
                self._forget(connection)

    def _accept_one(self, listener: socket.socket, pending: PendingConnections[Connection]) -> None:
        try:
            sock, peer = listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            # Out of file descriptors: the connection stays in the backlog meanwhile.
            logger.error("cannot accept connections: %s", os.strerror(error.errno or 0))
            self._stopping.wait(_NO_FILES_PAUSE_SECONDS)
            return
        address = plain_address(peer[0])
        try:
            is_allowed = self._policy.allowed(address)
        except Exception as error:
            logger.error("the allow-list failed: %s", type(error).__name__)
            is_allowed = False
        if not is_allowed:
            # Before the peer sees it, and tells whoever asks us next why nothing came.
            self._tell(AssociationEvent(Happening.NOT_ALLOWED, address))
            sock.close()
            return
        connection = Connection(sock, address, time.monotonic() + self._policy.negotiation_seconds)
        sent_away: Connection | None = None
        with self._lock:
            sent_away_before = sum(c.is_sent_away for c in self._connections)
            staying = len(self._connections) - sent_away_before
            if sent_away_before >= _ENDING_BEYOND:
                sent_away = connection
            elif staying >= self._policy.max_associations + _CONNECTIONS_BEYOND:
                sent_away = self._longest_waiting()
            if staying >= _LARGE_BUFFERS:
                connection.buffer_bytes = _SMALL_BUFFER_BYTES
            self._connections[connection] = None
        if sent_away is not None and sent_away.thread is not None:
            # Its thread has the socket, and closes it.
            self._tell(AssociationEvent(Happening.CROWDED, sent_away.address))
            sent_away.shut(socket.SHUT_RDWR)
        elif sent_away is not None:
            self._turn_away(sent_away, pending, Happening.CROWDED)
        if sent_away is not connection:
            self._look(connection, pending)

    def _look(self, connection: Connection, pending: PendingConnections[Connection]) -> None:
        """Start a connection's thread as soon as its request is there."""
        readiness = pending.look(connection)
        if readiness is Readiness.CLOSED:
            self._turn_away(connection, pending, Happening.UNINTELLIGIBLE)
        elif readiness is Readiness.READY:
            if self._tls is not None and self._resets(connection, pending):
                return
            pending.leave(connection)
            connection.thread = threading.Thread(
                target=self._serve, args=(connection,), name="association", daemon=True
            )
            try:
                connection.thread.start()
            except RuntimeError:
                logger.error("cannot start a thread for a connection")
                connection.thread = None
                self._forget(connection)

    def _turn_away(
        self, connection: Connection, pending: PendingConnections[Connection], why: Happening
    ) -> None:
        """Close a connection that has no thread."""
        pending.leave(connection)
        self._forget(connection)
        self._tell(AssociationEvent(why, connection.address))

    def _resets(self, connection: Connection, pending: PendingConnections[Connection]) -> bool:
        """Reset a connection that begins without TLS, where TLS is due."""
        first = connection.first_byte()
        if first in (None, TLS_HANDSHAKE):
            return False
        pending.leave(connection)
        connection.reset_when_closed()
        self._forget(connection)
        if first == Pdu.ASSOCIATE_RQ:
            self._tell_unintelligible(connection, "it speaks plain DICOM", "sender-without-tls")
        else:
            self._tell_unintelligible(connection, "it speaks neither TLS nor DICOM")
        return True

    def _longest_waiting(self) -> Connection | None:
        """Send away who has waited longest without an association, of those from one address.

        Of the address with most of them: who wants to be served has his association in
        milliseconds, and is not to pay for others who only hold their connections.
        """
        waiting = [c for c in self._connections if not (c.has_slot or c.is_sent_away)]
        addresses = Counter(c.address for c in waiting).most_common(1)
        for connection in waiting:
            if connection.address == addresses[0][0]:
                connection.is_sent_away = True
                return connection
        return None

    def _forget(self, connection: Connection) -> None:
        connection.socket.close()
        with self._lock:
            self._connections.pop(connection, None)

    def _tell(self, event: AssociationEvent) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception as error:
            logger.error("an event handler failed: %s", type(error).__name__)

    # --- one connection

    def _serve(self, connection: Connection) -> None:
        try:
            self._associate(connection)
        except Exception as error:
            # The last line: one peer's bytes must not end more than its own thread.
            logger.error("an association failed: %s", type(error).__name__)
        finally:
            self._forget(connection)

    def _associate(self, connection: Connection) -> None:
        deadline = connection.deadline
        try:
            prepare(connection.socket)
            if self._tls is not None:
                connection.socket = secured = self._tls.wrap(connection.socket)
                self._tls.shake_hands(secured, max(0.1, deadline - time.monotonic()))
            stream = Stream(connection.socket, buffer_bytes=connection.buffer_bytes)
            request = read_request(stream, deadline)
            refused = self._refuses_certificate(request, connection)
            rejection = REJECTED_CALLING_AE_TITLE if refused else self._rejection(request)
            accepted = rejection or self._accept_request(request, connection)
        except ProtocolError as fault:
            self._tell_unintelligible(connection, fault.detail)
            self._send(connection, abort_pdu(fault.source, fault.reason), deadline)
            return
        except NotDicomError as said:
            code = "sender-with-tls" if said.is_tls else ""
            self._tell_unintelligible(connection, str(said), code)
            return
        except SenderRefused as error:
            self._tell_unintelligible(connection, error.detail, error.code)
            return
        except OSError:
            self._tell_unintelligible(connection)
            return
        info = AssociationInfo(
            printable(request.calling_ae_title),
            printable(request.called_ae_title),
            connection.address,
        )
        if not isinstance(accepted, Answer):
            event = AssociationEvent.of(Happening.REJECTED, info, rejection=accepted)
            if refused:
                event = replace(event, code="sender-certificate-refused", detail=refused)
            self._tell(event)
            self._send(connection, reject_pdu(*accepted), deadline)
            return
        connection.transfer = transfer = Transfer(
            stream,
            accepted.contexts,
            self._store_handler,
            info=info,
            limits=self._limits,
            peer_pdu_bytes=accepted.peer_pdu_bytes,
        )
        transfer.on_report = self.on_report
        if self._stopping.is_set():
            transfer.leave()
        event = AssociationEvent.of(Happening.ACCEPTED, info)
        self._tell(replace(event, tls=peer_of(connection.socket)))
        if self._send(connection, accepted.pdu, deadline):
            end = transfer.run()
        else:
            end = CloseReason(CloseKind.CLOSED)
        self._tell(
            AssociationEvent.of(Happening.ENDED, info, instances=transfer.instances, end=end)
        )

    def _tell_unintelligible(
        self, connection: Connection, detail: str = "", code: str = ""
    ) -> None:
        event = AssociationEvent(
            Happening.UNINTELLIGIBLE, connection.address, detail=detail, code=code
        )
        self._tell(event)

    def _refuses_certificate(self, request: AssociationRequest, connection: Connection) -> str:
        """Why the sender's certificate may not send under its AE title; empty where it may."""
        if self._tls is None:
            return ""
        return self._tls.refuses(connection.socket, request.calling_ae_title)

    def _rejection(self, request: AssociationRequest) -> tuple[int, int, int] | None:
        """Why a request is rejected for what it proposes; None where it is not."""
        if not request.protocol_version & 1:
            return REJECTED_PROTOCOL_VERSION
        if request.application_context_uid != APPLICATION_CONTEXT:
            return REJECTED_APPLICATION_CONTEXT
        if request.called_ae_title not in self._ae_titles:
            return REJECTED_CALLED_AE_TITLE
        return None

    def _accept_request(
        self, request: AssociationRequest, connection: Connection
    ) -> Answer | tuple[int, int, int]:
        """Take a slot for an association and answer its request; a rejection if none is free."""
        with self._lock:
            slots = [c.address for c in self._connections if c.has_slot]
            per_peer = self._policy.max_associations_per_peer
            full = len(slots) >= self._policy.max_associations or (
                per_peer is not None and slots.count(connection.address) >= per_peer
            )
            if full or connection.is_sent_away or self._stopping.is_set():
                return REJECTED_LOCAL_LIMIT
            connection.has_slot = True
        return Answer(request, self._limits.pdu_bytes, takes_reports=self.on_report is not None)

    @staticmethod
    def _send(connection: Connection, data: bytes, deadline: float) -> bool:
        connection.socket.settimeout(max(1.0, deadline - time.monotonic()))
        try:
            connection.socket.sendall(data)
        except OSError:
            return False
        return True


def listen(address: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises
    ------
    ReceiverError
        ``receiver-taken`` where another process listens there, else ``receiver-unreachable``.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        code = "receiver-taken" if error.errno == errno.EADDRINUSE else "receiver-unreachable"
        name = errno.errorcode.get(error.errno or 0, type(error).__name__)
        if code == "receiver-taken":
            name = listening_process(port) or name
        raise ReceiverError(code, f"cannot listen on port {port}: {name}") from None
