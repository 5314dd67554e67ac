"""Control protocol of the receiver: one JSON object a line over a Unix socket in the spool.

A connection is a lease: the receiver stays while one is open, and a run that dies lets go of
its lease with its socket. Requests are answered in order.

============ =========================================== ==================================
``verb``     with                                        answer
============ =========================================== ==================================
``expect``   ``studies`` {StudyInstanceUID: reference},  ``message_id`` to send the C-MOVE
             ``originator`` (our calling AE title)       with; ``quiet_seconds`` since the
                                                         last arrival for any of them
``received`` ``message_id``                              ``instances``, ``size_bytes``,
                                                         ``quiet_seconds``, ``open_bytes``,
                                                         ``refused``, ``by_originator``,
                                                         ``turned_away`` since ``expect``,
                                                         ``first_age_seconds``
``forget``   ``message_id``, ``awaited``: whether what
             comes late is kept for its studies
``status``                                               what ``prefect-dicom receiver
                                                         status`` prints
``stop``                                                 ends the receiver
============ =========================================== ==================================
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

SOCKET_NAME = "receiver.sock"
LOCK_NAME = "receiver.lock"
STARTING_NAME = "receiver.starting"
LOG_NAME = "receiver.log"
SPOOL_TAKEN = "another receiver runs on this spool"
_LONGEST_LINE = 16 * 1024**2


def socket_path(spool: Path, descriptor: int) -> str:
    """The control socket's path in a form short enough for AF_UNIX, whatever the spool's.

    Parameters
    ----------
    descriptor : int
        Of the spool, open for as long as the path is used.
    """
    plain = str(spool / SOCKET_NAME)
    if len(plain.encode()) < 100 or sys.platform != "linux":
        return plain
    return f"/proc/self/fd/{descriptor}/{SOCKET_NAME}"


class Line:
    """A socket that carries JSON lines."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._reader = sock.makefile("rb")

    def send(self, message: dict[str, Any]) -> None:
        """Send one message."""
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message, or None when the other side has gone."""
        try:
            line = self._reader.readline(_LONGEST_LINE)
        except OSError:
            return None
        if not line.endswith(b"\n"):
            return None
        try:
            message = json.loads(line)
        except ValueError:
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        """Close the connection."""
        self._reader.close()
        self.socket.close()
