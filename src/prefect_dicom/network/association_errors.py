"""Connection failures, rejections and aborts as errors with a reason code.

A connection that cannot be opened, A-ASSOCIATE-RJ and A-ABORT (PS3.8 9.3.4 and 9.3.8): each
event has one code, for every service.
"""

from __future__ import annotations

import errno
import socket

from prefect_dicom.core.errors import PacsError


def unconnected(error: OSError | UnicodeError, seconds: float) -> PacsError:
    """The error for a TCP connection that could not be opened.

    Parameters
    ----------
    error : OSError or UnicodeError
        The error of name resolution or of connecting.
    seconds : float
        The time limit it had.
    """
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return PacsError("pacs-address", "the host name does not resolve")
    if isinstance(error, ConnectionRefusedError):
        return PacsError("pacs-refused", "the connection was refused")
    if isinstance(error, ConnectionResetError):
        return PacsError("pacs-reset", "the connection was reset")
    if isinstance(error, TimeoutError):
        return PacsError("pacs-unreachable", f"no connection within {seconds:g} s")
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return PacsError("pacs-unreachable", f"no connection ({name})")


def rejected(result: int, source: int, reason: int) -> PacsError:
    """The error for an A-ASSOCIATE-RJ.

    Vendors set *result* carelessly: congestion and limits are transient, whatever its value.

    Parameters
    ----------
    result, source, reason : int
        The three numbers of the PDU; reserved values are fine.
    """
    numbers = f"rejected ({result},{source},{reason})"
    if source == 3 and reason in (1, 2):
        word = "temporary congestion" if reason == 1 else "local limit exceeded"
        return PacsError("pacs-busy", f"{numbers}: {word}")
    if source == 1 and reason in (3, 7):
        if result == 2:
            # The two numbers contradict each other: transient, and permanent.
            return PacsError("association-rejected", f"{numbers}: AE title, transient")
        return PacsError(
            "calling-ae-title-unknown" if reason == 3 else "called-ae-title-unknown", numbers
        )
    if result == 2:
        return PacsError("pacs-busy", f"{numbers}: transient")
    if source == 1 and reason == 2:
        return PacsError("protocol-not-supported", f"{numbers}: application context")
    if source == 2 and reason == 2:
        return PacsError("protocol-not-supported", f"{numbers}: protocol version")
    return PacsError("association-rejected", numbers)


def aborted(
    source: int | None, reason: int | None, first_request: bool, seconds: float | None = None
) -> PacsError:
    """The error for an A-ABORT, or for a connection that ended without one.

    Parameters
    ----------
    source, reason : int or None
        The two numbers of the A-ABORT; None where the connection was closed without it.
    first_request : bool
        Whether it answered the negotiation or the very first request. A service user that
        aborts there usually means that our AE title lacks the permission.
    seconds : float, optional
        How long after the request it ended, which tells a crash from the time-out of a firewall.
    """
    when = "" if seconds is None else f", {seconds:.1f} s after the request"
    if source is None:
        closed = "the connection was closed without an A-ABORT"
        return PacsError("association-lost", closed + when)
    numbers = f"aborted ({source},{reason}){when}"
    if source == 0 and first_request:
        return PacsError("not-permitted", f"{numbers} at the first request")
    if source == 2 and reason in (4, 5, 6) and first_request:
        return PacsError("protocol-not-supported", f"{numbers}: a parameter was not accepted")
    if source == 2 and reason in (1, 2):
        return PacsError("association-lost", f"{numbers}: unrecognised or unexpected PDU")
    return PacsError("association-lost", numbers)
