"""Knobs for what happens before the first answer: connections, associations, contexts."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefect_dicom.config.tls import Tls
from prefect_dicom.testing.association_pdus import OddItems
from prefect_dicom.testing.plans import WHENS, AssociationPlan, End, Knob, Stage

if TYPE_CHECKING:
    from prefect_dicom.testing.script import Behaviour


def _refuse(plan: AssociationPlan, by: Behaviour, *, back: threading.Event) -> None:
    plan.end_at_once = End("reset")
    plan.listen_again = back


def _reset(plan: AssociationPlan, by: Behaviour) -> None:
    plan.end_at_once = End("reset")


def _tls(plan: AssociationPlan, by: Behaviour, *, keys: Tls | None = None) -> None:
    plan.tls = True
    plan.tls_as = keys


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


def _no_roles(plan: AssociationPlan, by: Behaviour, *, sends: bool = False) -> None:
    plan.roles = False
    plan.sends_without_roles = sends


def _items(
    plan: AssociationPlan,
    by: Behaviour,
    *,
    leave_out: Sequence[int] = (),
    add: bytes = b"",
    called: bytes | None = None,
    calling: bytes | None = None,
) -> None:
    plan.items = OddItems(called, calling, tuple(leave_out), add)


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


ASSOCIATION_KNOBS = (
    Knob(
        "net.refuse",
        (Stage.CONNECT,),
        "Goes down on the connection; others are refused until `back` is set.",
        _refuse,
    ),
    Knob(
        "net.reset",
        (Stage.CONNECT,),
        "Resets the connection at once.",
        _reset,
    ),
    Knob(
        "net.tls",
        (Stage.CONNECT,),
        "Expects TLS, and closes the connection on plain DICOM. A PACS with `policy.tls` shows "
        "the certificate of `keys` (a `Tls`) in place of its own.",
        _tls,
    ),
    Knob(
        "assoc.silent",
        (Stage.ASSOCIATE,),
        "Does not answer the association request before `hold` is set.",
        _silent,
    ),
    Knob(
        "assoc.reject",
        (Stage.ASSOCIATE,),
        "A-ASSOCIATE-RJ with any `result`, `source` and `reason`, reserved numbers too.",
        _reject,
    ),
    Knob(
        "assoc.abort",
        (Stage.ASSOCIATE,),
        "A-ABORT with `source` and `reason`; `when`: instead (of an acceptance), accepted (right "
        "after it), request (in place of the first answer).",
        _abort,
    ),
    Knob(
        "assoc.drop",
        (Stage.ASSOCIATE,),
        "Drops the connection; `when` as for assoc.abort, `how`: close, reset.",
        _drop,
    ),
    Knob(
        "assoc.contexts",
        (Stage.ASSOCIATE,),
        "Refuses the presentation contexts of these `services` (all, C-ECHO, C-FIND, C-MOVE, "
        "C-GET, C-STORE, or a SOP class UID) with `result` 1 to 4.",
        _contexts,
    ),
    Knob(
        "assoc.no_contexts",
        (Stage.ASSOCIATE,),
        "Accepts the association without a list of contexts.",
        _no_contexts,
    ),
    Knob(
        "assoc.no_roles",
        (Stage.ASSOCIATE,),
        "Ignores role selection, which C-GET needs; if it `sends`, it sends the instances all the "
        "same.",
        _no_roles,
    ),
    Knob(
        "assoc.items",
        (Stage.ASSOCIATE,),
        "Leaves the user items of these types (0x51: the maximum length) out of its acceptance, "
        "and `add`s these bytes to them; returns these bytes as `called` and `calling` titles.",
        _items,
    ),
    Knob(
        "assoc.max",
        (Stage.ASSOCIATE,),
        "Accepts at most `associations` at a time, and rejects one more with `result`, `source` "
        "and `reason`.",
        _max,
    ),
)
"""All knobs for connections and associations."""
