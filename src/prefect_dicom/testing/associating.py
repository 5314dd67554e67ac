"""Behaviours of a PACS before its first answer: connections, associations, contexts.

Each edits the plan of one connection, as all do in :mod:`prefect_dicom.testing.script`, whose
table they are rows of.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect_dicom.testing.pacs import ScriptedPacs
    from prefect_dicom.testing.script import Behaviour

WHENS = ("instead", "accepted", "request")
"""When an association ends: in place of an acceptance, right after it, at the first request."""


@dataclass
class End:
    """How an association ends: by A-ABORT, or the connection by "close" or "reset"."""

    how: str = "abort"
    source: int = 0
    reason: int = 0

    @property
    def pdu(self) -> bytes:
        """The A-ABORT, PS3.8 9.3.8; empty where there is none."""
        if self.how != "abort":
            return b""
        return struct.pack(">BxL2x2B", 7, 4, self.source, self.reason)


@dataclass
class AssociationPlan:
    """A connection, and the association that is about to be asked for on it."""

    pacs: ScriptedPacs
    end_at_once: End | None = None
    """Before anything has been read from the connection."""
    listen_again: threading.Event | None = None
    """Nothing listens from now on until this is set."""
    tls: bool = False
    """TLS is expected of the peer."""
    hold: threading.Event | None = None
    """The answer waits for this."""
    reject: tuple[int, int, int] | None = None
    """Result, source and reason of an A-ASSOCIATE-RJ, PS3.8 9.3.4; any numbers."""
    end: dict[str, End] = field(default_factory=dict)
    """By when it ends, see :data:`WHENS`."""
    refused: dict[str, int] = field(default_factory=dict)
    """By service, or "all": the result its contexts are refused with, PS3.8 9.3.3.2."""
    list_contexts: bool = True
    """False: the acceptance says nothing of any context."""
    roles: bool = True
    """False: role selection is ignored, PS3.7 D.3.3.4."""

    def concerns(self, study: str) -> bool:
        """Never: an association names no study."""
        return False

    @property
    def rejection(self) -> bytes:
        """The A-ASSOCIATE-RJ of :attr:`reject`."""
        return struct.pack(">BxLx3B", 3, 4, *self.reject)


def _refuse(plan: AssociationPlan, by: Behaviour, *, back: threading.Event) -> None:
    plan.end_at_once = End("reset")
    plan.listen_again = back


def _reset(plan: AssociationPlan, by: Behaviour) -> None:
    plan.end_at_once = End("reset")


def _tls(plan: AssociationPlan, by: Behaviour) -> None:
    plan.tls = True


def _silent(plan: AssociationPlan, by: Behaviour, *, hold: threading.Event) -> None:
    plan.hold = hold


def _reject(plan: AssociationPlan, by: Behaviour, *, result: int, source: int, reason: int) -> None:
    plan.reject = result, source, reason


def _abort(
    plan: AssociationPlan, by: Behaviour, *, when: str, source: int = 0, reason: int = 0
) -> None:
    _end(plan, when, End("abort", source, reason))


def _drop(plan: AssociationPlan, by: Behaviour, *, when: str, how: str = "close") -> None:
    _end(plan, when, End(how))


def _end(plan: AssociationPlan, when: str, end: End) -> None:
    if when not in WHENS:
        raise ValueError(f"when: {', '.join(WHENS)}")
    plan.end[when] = end


def _contexts(
    plan: AssociationPlan, by: Behaviour, *, result: int, services: Sequence[str] = ("all",)
) -> None:
    plan.refused.update(dict.fromkeys(services, result))


def _no_contexts(plan: AssociationPlan, by: Behaviour) -> None:
    plan.list_contexts = False


def _no_roles(plan: AssociationPlan, by: Behaviour) -> None:
    plan.roles = False


def _max(
    plan: AssociationPlan,
    by: Behaviour,
    *,
    associations: int,
    result: int = 2,
    source: int = 3,
    reason: int = 2,
) -> bool:
    if plan.pacs.established() < associations:
        return False
    plan.reject = result, source, reason
    return True


ASSOCIATIONS = (
    (
        "net.refuse",
        "connect",
        "Goes down when the connection comes; others are refused until `back` is set.",
        _refuse,
    ),
    ("net.reset", "connect", "Resets the connection at once.", _reset),
    ("net.tls", "connect", "Expects TLS, and gives up when plain DICOM comes.", _tls),
    (
        "assoc.silent",
        "associate",
        "Does not answer the association request before `hold` is set.",
        _silent,
    ),
    (
        "assoc.reject",
        "associate",
        "A-ASSOCIATE-RJ with any `result`, `source` and `reason`, reserved numbers too.",
        _reject,
    ),
    (
        "assoc.abort",
        "associate",
        "A-ABORT with `source` and `reason`; `when`: instead (of an acceptance), accepted (right "
        "after it), request (in place of the first answer).",
        _abort,
    ),
    (
        "assoc.drop",
        "associate",
        "Drops the connection; `when` as for assoc.abort, `how`: close, reset.",
        _drop,
    ),
    (
        "assoc.contexts",
        "associate",
        "Refuses the presentation contexts of these `services` (all, C-ECHO, C-FIND, C-MOVE, "
        "C-GET, C-STORE) with `result` 1 to 4.",
        _contexts,
    ),
    (
        "assoc.no_contexts",
        "associate",
        "Accepts the association and says nothing of its contexts.",
        _no_contexts,
    ),
    ("assoc.no_roles", "associate", "Ignores role selection, which C-GET needs.", _no_roles),
    (
        "assoc.max",
        "associate",
        "Accepts so many `associations` at a time, and rejects one more with `result`, `source` "
        "and `reason`.",
        _max,
    ),
)
"""Name, stage, meaning and function of each."""
