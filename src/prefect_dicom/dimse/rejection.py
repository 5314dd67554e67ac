"""A-ASSOCIATE-RJ and A-ABORT as errors with a disposition, PS3.8 9.3.4 and 9.3.8."""

from __future__ import annotations

from prefect_dicom.errors import PacsError


def rejected(result: int, source: int, reason: int) -> PacsError:
    """The error for an A-ASSOCIATE-RJ.

    Vendors set *result* carelessly: congestion and limits count as transient, whatever it says.

    Parameters
    ----------
    result, source, reason : int
        The three numbers of the PDU; reserved values are fine.
    """
    numbers = f"rejected ({result},{source},{reason})"
    if source == 3 and reason in (1, 2):
        word = "temporary congestion" if reason == 1 else "local limit exceeded"
        return PacsError("pacs-busy", f"{numbers}: {word}")
    if source == 1 and reason == 3:
        return PacsError("calling-ae-title-unknown", numbers)
    if source == 1 and reason == 7:
        return PacsError("called-ae-title-unknown", numbers)
    if result == 2:
        return PacsError("pacs-busy", f"{numbers}: transient")
    if source == 1 and reason == 2:
        return PacsError("association-rejected", f"{numbers}: application context not supported")
    if source == 2 and reason == 2:
        return PacsError("association-rejected", f"{numbers}: protocol version not supported")
    return PacsError("association-rejected", numbers)


def aborted(source: int | None, reason: int | None, first_request: bool) -> PacsError:
    """The error for an A-ABORT, or for a connection that ended without one.

    Parameters
    ----------
    source, reason : int or None
        The two numbers of the A-ABORT; None where the connection was closed without it.
    first_request : bool
        Whether it answered the negotiation or the very first request. A service user that
        aborts there usually means that our AE title lacks the permission.
    """
    if source is None:
        return PacsError("association-lost", "the connection was closed without an A-ABORT")
    numbers = f"aborted ({source},{reason})"
    if source == 0 and first_request:
        return PacsError("not-permitted", f"{numbers} at the first request")
    if source == 2 and reason in (4, 5, 6) and first_request:
        return PacsError("association-rejected", f"{numbers}: a parameter was not accepted")
    if source == 2 and reason in (1, 2):
        return PacsError("association-lost", f"{numbers}: unrecognised or unexpected PDU")
    return PacsError("association-lost", numbers)
