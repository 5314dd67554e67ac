"""Connections whose peer has not sent its whole association request yet.

A thread takes a fifth of a millisecond to start, and competes with all others for Python's lock.
A storm of connections that send nothing, or half of a request, would keep the one behind them
waiting for as many threads; here each costs a file descriptor and some microseconds.
"""

from __future__ import annotations

import contextlib
import select
import selectors
import socket
import time
from collections.abc import Callable
from enum import Enum, auto
from typing import Generic, Protocol, TypeVar

from prefect_dicom.network.upper_layer.sockets import acknowledge

# Linux only; elsewhere reading finds the end of the connection.
_SAYS_NO_MORE = getattr(select, "POLLRDHUP", select.POLLHUP)


class PendingConnection(Protocol):
    """A connection that can be pending."""

    socket: socket.socket
    deadline: float
    """Of ``time.monotonic``: when it is overdue; later connections have no earlier one."""


class Readiness(Enum):
    """Whether a connection is worth a thread."""

    READY = auto()
    """The first PDU is there, or all that will ever come: reading it shows which."""
    WAITING = auto()
    CLOSED = auto()
    """The connection ended before its first PDU was there."""


C = TypeVar("C", bound=PendingConnection)


class PendingConnections(Generic[C]):
    """Pending connections, watched by the one thread that accepts them.

    Parameters
    ----------
    selector : selectors.BaseSelector
        Reports which connections have bytes to read.
    first_bytes : callable
        The number of bytes that are needed, given the bytes that are there.
    most_bytes : int
        The most that ``first_bytes`` asks for.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        first_bytes: Callable[[bytes], int],
        most_bytes: int,
    ) -> None:
        self._selector = selector
        self._first_bytes = first_bytes
        self._most_bytes = most_bytes
        self._awaited: dict[C, int] = {}
        """The number of bytes awaited of each, in the order of their arrival."""

    def __contains__(self, connection: object) -> bool:
        return connection in self._awaited

    def look(self, connection: C) -> Readiness:
        """Whether a connection, new or pending, is ready; else it is pending from now on."""
        try:
            peeked = connection.socket.recv(self._most_bytes, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            peeked = b""
        except OSError:
            return Readiness.CLOSED
        wanted = self._first_bytes(peeked)
        if len(peeked) >= wanted:
            return Readiness.READY
        if _has_ended(connection.socket):
            return Readiness.CLOSED
        if self._awaited.get(connection) == wanted:
            # The kernel can hold no more of it for us.
            return Readiness.READY
        try:
            # Not to be woken by every byte that drips in.
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
            if connection not in self._awaited:
                self._selector.register(connection.socket, selectors.EVENT_READ, connection)
        except OSError:
            # Nor can the kernel watch any number of them.
            return Readiness.READY
        acknowledge(connection.socket)
        self._awaited[connection] = wanted
        return Readiness.WAITING

    def leave(self, connection: C) -> None:
        """Stop watching a connection, which stays open."""
        if self._awaited.pop(connection, None) is not None:
            self._selector.unregister(connection.socket)
        with contextlib.suppress(OSError):
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def seconds_left(self) -> float | None:
        """Seconds until the first is overdue; None where none is pending."""
        first = next(iter(self._awaited), None)
        return None if first is None else max(0.0, first.deadline - time.monotonic())

    def overdue(self) -> C | None:
        """A connection that is overdue, if any is."""
        return next(iter(self._awaited)) if self.seconds_left() == 0 else None

    def all(self) -> list[C]:
        """All pending connections."""
        return [*self._awaited]


def _has_ended(connection: socket.socket) -> bool:
    """Whether the peer will send no more."""
    poll = select.poll()
    poll.register(connection, _SAYS_NO_MORE)
    return bool(poll.poll(0))
