"""DIMSE statuses as reason codes: PS3.7 Annex C, PS3.4 C.4.1.1.4, C.4.2.1.5 and C.4.3.1.4.

One table for the services this package requests. A number that is not in it goes by its class:
Bxxx is a warning, so the request succeeded; Cxxx is "unable to process"; A7xx is "out of
resources"; A9xx and AAxx say that the request is at fault. Any other is a failure of the PACS,
which is transient.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

SUCCESS = 0x0000
CANCEL = 0xFE00
PENDING = frozenset({0xFF00, 0xFF01})
DUPLICATE_SOP_INSTANCE = 0x0111
UNABLE_TO_PERFORM_SUBOPERATIONS = 0xA702


class StorageStatus(IntEnum):
    """Statuses that this package answers as a storage SCP, PS3.7 Annex C and PS3.4 B.2.3."""

    SUCCESS = 0x0000
    PROCESSING_FAILURE = 0x0110
    UNRECOGNISED_OPERATION = 0x0211
    OUT_OF_RESOURCES = 0xA700
    CANNOT_UNDERSTAND = 0xC000


_ANY = {
    0x0110: "pacs-failure",  # processing failure
    0x0118: "service-not-offered",  # no such SOP class
    0x0122: "service-not-offered",  # refused: SOP class not supported
    0x0124: "not-permitted",  # refused: not authorised
    0x0210: "unexpected",  # duplicate invocation: a message ID of ours was still open
    0x0211: "service-not-offered",  # unrecognised operation
    0x0213: "pacs-busy",  # resource limitation
}

# Attributes, arguments, events and classes the peer does not know or take.
_REQUEST_AT_FAULT = (
    *(0x0105, 0x0106, 0x0111, 0x0112, 0x0113, 0x0114, 0x0115, 0x0117, 0x0119),
    *(0x0120, 0x0121, 0x0123, 0x0212),
)

# Upper bytes: the data set does not match the SOP class, or the identifier does not.
_REFUSED_FOR_THE_REQUEST = (0xA9, 0xAA)

# Warnings: the request was carried out. What a retrieve left out shows in the spool.
_WARNINGS = (0x0001, 0x0107, 0x0116)

_FIND = {
    # A cancel nobody asked for, the standard's own word, and a refusal for size: all say that
    # there are more answers than the peer wants to give.
    CANCEL: "answers-capped",
    0xB001: "answers-capped",
    0xA700: "answers-capped",
    0xA710: "request-refused",  # invalid prior record key
}

_RETRIEVE = {
    0x0112: "study-gone",  # no such SOP instance
    CANCEL: "pacs-failure",
    0xA701: "pacs-busy",  # unable to calculate the number of matches
    UNABLE_TO_PERFORM_SUBOPERATIONS: "pacs-failure",
}

_MOVE = {
    **_RETRIEVE,
    # With nothing arrived this is the destination, not the PACS: refused, rejected, no context.
    UNABLE_TO_PERFORM_SUBOPERATIONS: "move-destination-failed",
    0xA801: "move-destination-unknown",
}

_STORE: dict[int, str | None] = {
    # The target has it: whether it does is seen in its list.
    DUPLICATE_SOP_INSTANCE: None,
    CANCEL: "pacs-failure",
    0x0110: "pacs-busy",  # processing failure: a full disk as often as a bad instance
    0x0118: "delivery-refused",  # no such SOP class
    0x0122: "delivery-refused",  # refused: SOP class not supported
}

_SERVICES: Mapping[str, Mapping[int, str | None]] = {
    "C-ECHO": {},
    "C-FIND": _FIND,
    "C-MOVE": _MOVE,
    "C-GET": _RETRIEVE,
    "C-STORE": _STORE,
}


def is_warning(status: int) -> bool:
    """Whether a status is of the class Bxxx of PS3.7 Annex C: carried out, with a warning."""
    return status >> 12 == 0xB


def is_unable_to_process(status: int) -> bool:
    """Whether a status is of the class Cxxx of PS3.4, "unable to process"."""
    return status >> 12 == 0xC


def is_out_of_resources(status: int) -> bool:
    """Whether a status is of the class A7xx of PS3.4, "refused: out of resources".

    Not A702, unable to perform sub-operations: that is a file which cannot be read as often as a
    destination which cannot be reached.
    """
    return status >> 8 == 0xA7 and status != UNABLE_TO_PERFORM_SUBOPERATIONS


def reason_for_status(service: str, status: int) -> str | None:
    """The reason code a response's status stands for, or None where the request succeeded.

    Parameters
    ----------
    service : str
        ``C-ECHO``, ``C-FIND``, ``C-MOVE``, ``C-GET`` or ``C-STORE``.
    status : int
        Status (0000,0900) of the response.

    Returns
    -------
    str or None
        A code of :mod:`prefect_dicom.core.reasons`. None for success, for pending and for warnings:
        the peer carried the request out, and for retrieves only the spool shows how far. So
        0xFE00 is a failure here; the caller that cancelled ignores it.

    Examples
    --------
    >>> reason_for_status("C-MOVE", 0xA801)
    'move-destination-unknown'
    >>> reason_for_status("C-FIND", 0xFE00), reason_for_status("C-MOVE", 0xB000)
    ('answers-capped', None)
    """
    special = _SERVICES[service]
    if status in special:
        return special[status]
    if status == SUCCESS or status in PENDING or status in _WARNINGS:
        return None
    if status in _ANY:
        return _ANY[status]
    if is_warning(status):
        return None
    if service == "C-STORE" and (
        status in _REQUEST_AT_FAULT
        or status >> 8 in _REFUSED_FOR_THE_REQUEST
        or is_unable_to_process(status)
    ):
        return "delivery-refused"
    if status in _REQUEST_AT_FAULT:
        return "request-refused"
    if is_unable_to_process(status):
        # A query is refused for its keys; a retrieve fails with this for every cause there is,
        # from an unknown destination to a slow receiver.
        return "request-refused" if service == "C-FIND" else "pacs-failure"
    if is_out_of_resources(status):
        return "pacs-busy"
    return "request-refused" if status >> 8 in _REFUSED_FOR_THE_REQUEST else "pacs-failure"
