"""The byte stream of an association: PDUs from a socket into one buffer, under deadlines."""

from __future__ import annotations

import contextlib
import math
import mmap
import select
import socket
import ssl
import time
from collections.abc import Callable

from prefect_dicom.network.upper_layer.pdu import (
    COMMAND_FRAGMENT,
    LAST_FRAGMENT,
    PDU_HEADER,
    PDU_TYPES,
    PDV_HEADER,
    RELEASE_RQ,
    Pdu,
    ProtocolError,
    abort_pdu,
)
from prefect_dicom.network.upper_layer.sockets import acknowledge

BUFFER_BYTES = 1024 * 1024
"""What is read at once: a CT image in one piece."""
_LEAST_ROOM_BYTES = 64 * 1024
"""With less room behind what is there, the buffer is used from its begin."""
_ATTEND_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 3600.0
_NOTHING = memoryview(b"")


FragmentHandler = Callable[[int, bool, bool, memoryview], None]
"""Gets a piece of a PDV, PS3.8 Annex E: its presentation context; whether it is of a command set,
not of a data set; whether that ends with this piece; and its bytes in the stream's buffer, which
are valid until more is read."""


class Stream:
    """Reads PDUs from a socket into one buffer, under deadlines.

    A deadline is a point of time and not a time-out of one read: a byte now and then does not
    move it.

    Parameters
    ----------
    connection : socket.socket
        Connected; it becomes non-blocking.
    attend : callable, optional
        Called about once a second while waiting for the peer, in the middle of a message too.
    """

    def __init__(
        self,
        connection: socket.socket,
        *,
        attend: Callable[[], None] | None = None,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self.connection = connection
        self.attend = attend
        self.borrower: Callable[[bool], bool] | None = None
        """Asked before more is read whether it has given back the bytes of the buffer, which may
        be overwritten then. With true it has to, and may take its time."""
        self._poll = select.poll()
        self._attended_at = time.monotonic()
        # Pages nobody has written to are no memory yet, and all go back to the system at the end:
        # a peer that connects and sends nothing costs nothing.
        self.buffer = mmap.mmap(-1, buffer_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self.buffer)
        self.start = 0
        self.end = 0

    def fill(self, deadline: float) -> None:
        """Read at least one byte behind those that are there.

        Raises
        ------
        TimeoutError
            The deadline (of ``time.monotonic``) passed.
        ConnectionError
            The peer closed.
        """
        if self._may_overwrite():
            rest = self.end - self.start
            # Of a transfer only the beginning of a header is ever left over: a few bytes.
            if rest and self.start:
                self.view[:rest] = self.view[self.start : self.end]
            self.start, self.end = 0, rest
        target = self.view[self.end :]
        while True:
            try:
                count = self._receive(target)
            except (BlockingIOError, ssl.SSLWantReadError):
                # Only before a wait: a peer with data under way needs no extra ACK.
                acknowledge(self.connection)
                self._wait(select.POLLIN, deadline)
                continue
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT, deadline)
                continue
            if not count:
                raise ConnectionAbortedError
            self.end += count
            return

    def _may_overwrite(self) -> bool:
        """Whether to read to the begin of the buffer, and not behind what is there."""
        if self.borrower is None or self.borrower(False):
            return True
        return len(self.view) - self.end < _LEAST_ROOM_BYTES and self.borrower(True)

    def send(self, data: bytes, deadline: float) -> None:
        """Write all of it. Raises as :meth:`fill` does."""
        connection = self.connection
        if connection.gettimeout() != 0:
            connection.setblocking(False)
        sent, view = 0, memoryview(data)
        while sent < len(data):
            try:
                # A view: the rest of a large block is not copied again and again.
                sent += connection.send(view[sent:])
            except (BlockingIOError, ssl.SSLWantWriteError):
                self._wait(select.POLLOUT, deadline, attending=False)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN, deadline, attending=False)

    def _receive(self, target: memoryview) -> int:
        # Others set time-outs for what they send; with one, each read is two calls of the kernel.
        connection = self.connection
        if connection.gettimeout() != 0:
            connection.setblocking(False)
        return connection.recv_into(target)

    def _wait(self, event: int, deadline: float, *, attending: bool = True) -> None:
        """Wait until the socket can be read (or written)."""
        attend = self.attend if attending else None
        longest = _LONGEST_WAIT_SECONDS if attend is None else _ATTEND_SECONDS
        self._poll.register(self.connection, event)
        while True:
            now = time.monotonic()
            remaining = deadline - now
            if remaining <= 0:
                raise TimeoutError
            # Of a large instance that comes slowly there is always something to read soon.
            if attend is not None and now >= self._attended_at + _ATTEND_SECONDS:
                self._attended_at = now
                attend()
            if self._poll.poll(math.ceil(min(remaining, longest) * 1000)):
                return

    def pdu_header(self, deadline: float) -> tuple[int, int]:
        """Read type and length of the next PDU. Raises as :meth:`fill` does."""
        while self.end - self.start < 6:
            self.fill(deadline)
        offset = self.start
        self.start = offset + 6
        return PDU_HEADER.unpack_from(self.buffer, offset)

    def await_pdu(self, longest_bytes: int, deadline: float) -> None:
        """Wait until the next PDU is in the buffer as a whole; fine to repeat after a time-out.

        Parameters
        ----------
        longest_bytes : int
            Of a PDU without its header, at least that much less than the buffer has.

        Raises
        ------
        ProtocolError
            A longer one begins.
        TimeoutError, ConnectionError
            As :meth:`fill`.
        """
        while True:
            there = self.end - self.start
            if there >= PDU_HEADER.size:
                kind, length = PDU_HEADER.unpack_from(self.buffer, self.start)
                if there >= PDU_HEADER.size + length or kind not in PDU_TYPES:
                    return
                if length > longest_bytes:
                    raise ProtocolError(ProtocolError.INVALID_PARAMETER, f"a PDU of {length} bytes")
            self.fill(deadline)

    def p_data(self, length: int, deadline: float, take: FragmentHandler) -> None:
        """Read a P-DATA-TF behind its header; call ``take`` with each fragment as it comes.

        A PDV is taken in as many pieces as it is read in, one at least. A call and no generator:
        most PDUs have one fragment, and a generator for each costs more than the call.

        Raises
        ------
        ProtocolError
            PDU and PDVs do not agree on their lengths.
        TimeoutError, ConnectionError
            As :meth:`fill`.
        """
        view, buffer = self.view, self.buffer
        while length:
            if length < 6:
                raise ProtocolError(
                    ProtocolError.INVALID_PARAMETER, "a PDU ends within a PDV header"
                )
            begin = self.start
            while self.end - begin < 6:
                self.fill(deadline)
                begin = self.start
            size, context_id, control = PDV_HEADER.unpack_from(buffer, begin)
            self.start = begin + 6
            length -= size + 4
            if size < 2 or length < 0:
                raise ProtocolError(ProtocolError.INVALID_PARAMETER, f"a PDV of {size} bytes")
            size -= 2
            # The bits above the two are not tested, PS3.8 E.2.
            is_command = control & COMMAND_FRAGMENT != 0
            is_last = control & LAST_FRAGMENT != 0
            if not size:
                take(context_id, is_command, is_last, _NOTHING)
            while size:
                if self.start == self.end:
                    self.fill(deadline)
                begin = self.start
                stop = begin + size
                if stop > self.end:
                    stop = self.end
                self.start = stop
                size -= stop - begin
                take(context_id, is_command, is_last and not size, view[begin:stop])

    def read_close(self, kind: int, length: int, deadline: float) -> tuple[int, int] | None:
        """The rest of a PDU that ends an association.

        Parameters
        ----------
        kind, length : int
            Of its header.

        Returns
        -------
        tuple of (int, int) or None
            Source and reason of an A-ABORT; None for an A-RELEASE-RQ, which is still to be
            answered.

        Raises
        ------
        ProtocolError
            It is another PDU, or has another length.
        TimeoutError, ConnectionError
            As :meth:`fill`.
        """
        if length == 4 and kind in (Pdu.RELEASE_RQ, Pdu.ABORT):
            _, _, source, reason = self.take(length, deadline)
            return (source, reason) if kind == Pdu.ABORT else None
        if kind in PDU_TYPES:
            raise ProtocolError(
                ProtocolError.UNEXPECTED_PDU, f"a PDU of type {kind} is not expected"
            )
        raise ProtocolError(ProtocolError.UNRECOGNISED_PDU, f"a PDU of unknown type {kind}")

    def release(self, deadline: float) -> None:
        """Release the association as its requestor, PS3.8 7.2; never raises for the peer.

        The answer is waited for, and does not matter: for another one than A-RELEASE-RP the
        association is aborted.
        """
        with contextlib.suppress(OSError):
            self.send(RELEASE_RQ, deadline)
            kind, _ = self.pdu_header(deadline)
            if kind != Pdu.RELEASE_RP:
                self.send(abort_pdu(0, 0), deadline)

    def take(self, count: int, deadline: float) -> bytes:
        """The next bytes, copied: for the small PDUs of negotiation and release."""
        taken = bytearray()
        while len(taken) < count:
            if self.start == self.end:
                self.fill(deadline)
            stop = min(self.end, self.start + count - len(taken))
            taken += self.view[self.start : stop]
            self.start = stop
        return bytes(taken)
