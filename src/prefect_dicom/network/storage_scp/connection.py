"""One connection to a storage SCP, and who may open it."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass

from prefect_dicom.network.storage_scp.transfer import Transfer
from prefect_dicom.network.upper_layer.stream import BUFFER_BYTES

logger = logging.getLogger(__name__)

NEGOTIATION_SECONDS = 30.0
_RESET = struct.pack("ii", 1, 0)
"""``SO_LINGER``: the connection is reset as it is closed."""


@dataclass(frozen=True, slots=True)
class ConnectionPolicy:
    """Who may connect to a storage SCP, how often and for how long.

    Parameters
    ----------
    allowed : callable
        Whether a peer's address may connect at all. AE titles are labels that a peer chooses,
        this is the gate.
    max_associations : int
        Further ones are rejected as over the local limit, which peers take as "try later".
    max_associations_per_peer : int, optional
        The same for one address.
    negotiation_seconds : float
        From the connection to its accepted association, TLS handshake included.
    """

    allowed: Callable[[str], bool]
    max_associations: int = 64
    max_associations_per_peer: int | None = None
    negotiation_seconds: float = NEGOTIATION_SECONDS


class Connection:
    """One accepted TCP connection and, in time, its association."""

    def __init__(self, sock: socket.socket, address: str, deadline: float) -> None:
        self.socket = sock
        self.address = address
        self.deadline = deadline
        self.thread: threading.Thread | None = None
        self.transfer: Transfer | None = None
        self.buffer_bytes = BUFFER_BYTES
        self.has_slot = False
        self.is_sent_away = False

    def shut(self, how: int) -> None:
        """Wake the thread that reads. Not ``SSLSocket.shutdown``, which drops the TLS layer."""
        try:
            socket.socket.shutdown(self.socket, how)
        except OSError:
            logger.debug("the connection was gone before it was shut")

    def first_byte(self) -> int | None:
        """The first byte that is there to read, which stays there; None where none is."""
        try:
            peeked = self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return None
        return peeked[0] if peeked else None

    def reset_when_closed(self) -> None:
        """Have the connection reset when it is closed, not ended in order."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def plain_address(address: str) -> str:
    """The address as people write it: no scope, no IPv6 form of an IPv4 address."""
    address = address.partition("%")[0]
    return address.removeprefix("::ffff:") if "." in address else address
