"""The byte stream of an association: PDUs from a socket into one buffer, under deadlines."""

from __future__ import annotations

import math
import mmap
import select
import socket
import ssl
import time
from collections.abc import Callable

from prefect_dicom.network.upper_layer.pdu import PDU_HEADER
from prefect_dicom.network.upper_layer.sockets import acknowledge

BUFFER_BYTES = 1024 * 1024
"""What is read at once: a CT image in one piece."""
_ATTEND_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 3600.0


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
        self.before_filling: Callable[[], None] | None = None
        """Called before bytes of the buffer are overwritten or moved."""
        self._poll = select.poll()
        self._attended_at = time.monotonic()
        # Pages nobody has written to are no memory yet, and all go back to the system at the end:
        # a peer that connects and says nothing costs nothing.
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
        if self.before_filling is not None:
            self.before_filling()
        rest = self.end - self.start
        # Only the beginning of a header is ever left over, so this moves a few bytes.
        if rest:
            self.view[:rest] = self.view[self.start : self.end]
        self.start, self.end = 0, rest
        target = self.view[rest:]
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

    def send(self, data: bytes, deadline: float) -> None:
        """Write all of it. Raises as :meth:`fill` does."""
        connection = self.connection
        if connection.gettimeout() != 0:
            connection.setblocking(False)
        sent = 0
        while sent < len(data):
            try:
                sent += connection.send(data[sent:] if sent else data)
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
        attending = attending and self.attend is not None
        longest = _ATTEND_SECONDS if attending else _LONGEST_WAIT_SECONDS
        self._poll.register(self.connection, event)
        while True:
            now = time.monotonic()
            remaining = deadline - now
            if remaining <= 0:
                raise TimeoutError
            # Of a large object that comes slowly there is always something to read soon.
            if attending and now >= self._attended_at + _ATTEND_SECONDS:
                self._attended_at = now
                self.attend()
            if self._poll.poll(math.ceil(min(remaining, longest) * 1000)):
                return

    def need(self, count: int, deadline: float) -> int:
        """Have this many bytes (a header) in the buffer; their offset. Moves past them."""
        while self.end - self.start < count:
            self.fill(deadline)
        offset = self.start
        self.start += count
        return offset

    def pdu_header(self, deadline: float) -> tuple[int, int]:
        """Type and length of the next PDU."""
        return PDU_HEADER.unpack_from(self.buffer, self.need(6, deadline))

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
