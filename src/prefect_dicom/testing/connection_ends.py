"""Ends of the associations and connections of a scripted PACS."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any

from prefect_dicom.testing.plans import End

ScriptedAssociation = Any
"""A pynetdicom ``Association``, of whose internals its types know nothing."""


class AssociationLost(Exception):
    """The requestor's association is lost; no response can be sent."""


def cut_association(association: ScriptedAssociation) -> None:
    """Shut down an association's connection without an A-ABORT."""
    with contextlib.suppress(OSError, AttributeError):
        association.dul.socket.socket.shutdown(socket.SHUT_RDWR)


def end_association(association: ScriptedAssociation, end: End) -> None:
    """End an association as the script says."""
    if end == End():
        association.abort()
        return
    # pynetdicom sends no A-ABORT with other numbers.
    connection = association.dul.socket.socket
    if connection is not None:
        end_connection(connection, end)


def send_pdu(association: ScriptedAssociation, pdu: bytes) -> None:
    """Send a PDU past pynetdicom's state machine; a lost connection is ignored."""
    with contextlib.suppress(OSError, AttributeError):
        association.dul.socket.socket.sendall(pdu)


def end_connection(connection: socket.socket, end: End) -> None:
    """End a connection by A-ABORT, close or reset."""
    with contextlib.suppress(OSError):
        if end.how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
            return
        connection.sendall(end.pdu)
        connection.shutdown(socket.SHUT_WR if end.pdu else socket.SHUT_RDWR)
