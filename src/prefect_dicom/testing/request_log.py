"""Log of a scripted PACS: its requests, sub-operations and associations."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Sent:
    """A C-STORE sub-operation that was made.

    ``status`` is the receiver's answer, None while there is none (or if there never was); ``at``
    is the time of ``time.monotonic`` when it began.
    """

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    status: int | None = None
    at: float = field(default_factory=time.monotonic)


@dataclass
class Request:
    """A request as it came, and what became of it.

    ``number`` counts the requests of one ``service`` from 1. ``status`` is the final status, None
    while there is none (or if the association ended before there was). ``at`` is the time of
    ``time.monotonic`` when it came.
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
    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class AssociationChange:
    """An association was accepted (``by`` 1), or has ended (-1); ``at`` is of the monotonic clock.

    One whose peer has vanished ends when the PACS does: nothing tells it.
    """

    at: float
    calling_ae_title: str
    by: int
