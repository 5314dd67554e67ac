"""C-ECHO, PS3.4 Annex A: verify that a node answers."""

from __future__ import annotations

import time

from prefect_dicom.core.errors import PacsError
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.network.status import reason_for_status


def echo(requestor: Requestor) -> float:
    """Send a C-ECHO and wait for its response, up to the time limit of an association request.

    An answer proves the address, both AE titles and the negotiation. It does not prove the
    permission to query or to move: PACS answer a C-ECHO to anybody.

    Returns
    -------
    float
        Seconds from the request to the answer, without the opening of the association.

    Raises
    ------
    PacsError
        With the cause, or with what the status stands for.
    """
    patience = requestor.node.timeouts.acse_seconds
    requestor.open()
    started = time.monotonic()
    exchange = requestor.send("C-ECHO")
    response = exchange.next(patience)
    if response is None:
        exchange.abort()
        raise PacsError("pacs-silent", f"no answer to a C-ECHO within {patience:g} s")
    code = reason_for_status("C-ECHO", response.status)
    if code is not None:
        raise PacsError(code, f"C-ECHO status {response.status:04X}")
    return time.monotonic() - started
