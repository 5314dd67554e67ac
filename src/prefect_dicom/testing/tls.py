"""TLS of a scripted PACS, as server of its requestors and as client of move destinations."""

from __future__ import annotations

import socket

from prefect_dicom.config.tls import Tls
from prefect_dicom.config.tls_context import client_context, server_context

_HANDSHAKE_SECONDS = 10.0


def secured_server(connection: socket.socket, tls: Tls, other: Tls | None) -> socket.socket | None:
    """Shake hands with a requestor, which shows a certificate; None where that fails.

    Parameters
    ----------
    tls, other : Tls
        The keys of the PACS; and others that a script puts in their place.
    """
    try:
        context = server_context(other or tls)
        connection.settimeout(_HANDSHAKE_SECONDS)
        secured = context.wrap_socket(connection, server_side=True)
    except OSError:
        connection.close()
        return None
    secured.settimeout(None)
    return secured


def secured_client(connection: socket.socket, tls: Tls, host: str) -> socket.socket:
    """Shake hands with a move destination. Raises ``OSError`` where that fails."""
    return client_context(tls).wrap_socket(connection, server_hostname=host)
