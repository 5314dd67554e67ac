"""Log of a scripted PACS: its requests, sub-operations and associations."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Sent:
    """A C-STORE sub-operation.

    Attributes
    ----------
    study_instance_uid, series_instance_uid, sop_instance_uid : str
        UIDs of the instance.
    status : int or None
        Status in the receiver's response; None without one.
    at : float
        Begin, in seconds of ``time.monotonic``.
    """

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    status: int | None = None
    at: float = field(default_factory=time.monotonic)


@dataclass
class Request:
    """A request and its result.

    Attributes
    ----------
    service : str
        "C-ECHO", "C-FIND", "C-MOVE", "C-GET", "C-STORE" or "C-CANCEL".
    number : int
        Counts the requests of one service from 1.
    message_id : int
        Message ID (0000,0110); of a C-CANCEL, that of the cancelled request.
    calling_ae_title, called_ae_title : str
        AE titles of the association.
    sop_class_uid : str
        Affected SOP Class UID.
    level : str
        Query/Retrieve Level (0008,0052).
    keys : dict of str to str
        Keys of the identifier, by keyword.
    destination : str
        Move Destination (0000,0600).
    status : int or None
        Final status; None without one, or if the association ended before it.
    answers : int
        Matches sent in response to a C-FIND.
    sent : list of Sent
        Sub-operations of a C-MOVE or C-GET.
    most_outstanding : int
        The most of them that had no response at a time.
    at : float
        Arrival, in seconds of ``time.monotonic``.
    """

    service: str
    number: int
    message_id: int
    calling_ae_title: str
    called_ae_title: str
    sop_class_uid: str = ""
    level: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    destination: str = ""
    status: int | None = None
    answers: int = 0
    sent: list[Sent] = field(default_factory=list)
    most_outstanding: int = 0
    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class AssociationChange:
    """Begin (``by`` 1) or end (-1) of an association, at a time of ``time.monotonic``.

    An association whose peer has vanished ends with the PACS, which does not notice before.
    """

    at: float
    calling_ae_title: str
    by: int
