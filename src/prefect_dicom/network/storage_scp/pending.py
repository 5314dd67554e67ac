"""Where a connection waits until the peer has said all that it wants of us.

A thread takes a fifth of a millisecond to start, and competes with all others for Python's lock.
A storm of connections that say nothing, or half of a request, would keep the one behind them
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

# Linux only; elsewhere whoever reads what there is finds its end.
_SAYS_NO_MORE = getattr(select, "POLLRDHUP", select.POLLHUP)


class Guest(Protocol):
    """What waits here."""

    socket: socket.socket
    deadline: float
    """Of ``time.monotonic``: when it has to leave; those who come later have no earlier one."""


class Said(Enum):
    """How much a peer has said."""

    ALL = auto()
    """All that is to be read at first, or all that will ever come: reading it says which."""
    LITTLE = auto()
    NOTHING_EVER = auto()
    """The connection ended before that."""


G = TypeVar("G", bound=Guest)


class Lobby(Generic[G]):
    """The connections that wait. One thread uses it, the one that accepts them.

    Parameters
    ----------
    selector : selectors.BaseSelector
        Tells when a guest has more to say.
    first_bytes : callable
        Of what has been said: how many bytes there have to be before they are worth reading.
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
        self._awaited: dict[G, int] = {}
        """In the order in which they came: the bytes each is awaited to have said."""

    def __contains__(self, guest: object) -> bool:
        return guest in self._awaited

    def look(self, guest: G) -> Said:
        """What a guest, new or known, has said; one with little to say waits from here on."""
        try:
            said = guest.socket.recv(self._most_bytes, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            said = b""
        except OSError:
            return Said.NOTHING_EVER
        wanted = self._first_bytes(said)
        if len(said) >= wanted:
            return Said.ALL
        if _has_ended(guest.socket):
            return Said.NOTHING_EVER
        if self._awaited.get(guest) == wanted:
            # The kernel can hold no more of it for us.
            return Said.ALL
        try:
            # We are not to be told of every byte that drips in.
            guest.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
            if guest not in self._awaited:
                self._selector.register(guest.socket, selectors.EVENT_READ, guest)
        except OSError:
            # Nor can the kernel watch any number of them.
            return Said.ALL
        acknowledge(guest.socket)
        self._awaited[guest] = wanted
        return Said.LITTLE

    def leave(self, guest: G) -> None:
        """Wait for a guest no more; nothing happens to its connection."""
        if self._awaited.pop(guest, None) is not None:
            self._selector.unregister(guest.socket)
        with contextlib.suppress(OSError):
            guest.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def seconds_left(self) -> float | None:
        """Until the first has to leave; None where nobody waits."""
        first = next(iter(self._awaited), None)
        return None if first is None else max(0.0, first.deadline - time.monotonic())

    def overdue(self) -> G | None:
        """Who has to leave now, if anybody."""
        return next(iter(self._awaited)) if self.seconds_left() == 0 else None

    def guests(self) -> list[G]:
        """All who wait."""
        return [*self._awaited]


def _has_ended(connection: socket.socket) -> bool:
    """Whether the peer will say no more."""
    poll = select.poll()
    poll.register(connection, _SAYS_NO_MORE)
    return bool(poll.poll(0))
