"""How an association of the storage SCP, or of a C-GET, ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class CloseKind(StrEnum):
    """How an association ended."""

    RELEASED = "released"
    FINISHED = "finished"
    """The response handler had its final response; the association is still open."""
    ABORTED = "aborted"
    CLOSED = "closed"
    IDLE = "idle"
    """Nothing came for the idle time; we aborted."""
    REFUSED = "refused"
    """The peer broke the protocol or a limit; we aborted."""
    STOPPED = "stopped"
    """The server stopped, and aborted between two messages."""


@dataclass(frozen=True, slots=True)
class CloseReason:
    """How an association ended; source and reason are those of the A-ABORT, if there was one."""

    kind: CloseKind
    source: int | None = None
    reason: int | None = None
    detail: str = ""
