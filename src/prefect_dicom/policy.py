"""Pure decisions: state transitions, verdicts, chunking, when to ask a node. No I/O.

What depends on time is given its clock. Sources: ``docs/promise.md`` for the states, PS3.4
C.4.2.1.4 for what a request may name.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import threading
from collections import deque
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from prefect_dicom.model import (
    Chunk,
    Disposition,
    Evidence,
    InstanceKey,
    InstanceState,
    StudyReference,
    StudyState,
    Verdict,
)
from prefect_dicom.reasons import reason_for

STUDY_TRANSITIONS: dict[StudyState, frozenset[StudyState]] = {
    # Pending again: one node has failed, and another is asked.
    StudyState.PENDING: frozenset({StudyState.LISTED, StudyState.FAILED, StudyState.PENDING}),
    # A changed list is listed again.
    StudyState.LISTED: frozenset(
        {StudyState.LISTED, StudyState.ARCHIVED, StudyState.FAILED, StudyState.PENDING}
    ),
    StudyState.ARCHIVED: frozenset(),
    # A rerun begins with a new list; what was stored stays stored.
    StudyState.FAILED: frozenset({StudyState.PENDING}),
}

INSTANCE_TRANSITIONS: dict[InstanceState, frozenset[InstanceState]] = {
    InstanceState.EXPECTED: frozenset({InstanceState.RECEIVED, InstanceState.REJECTED}),
    # Back to expected: the spool file was damaged, or an object did not pass validation once.
    InstanceState.RECEIVED: frozenset(
        {InstanceState.STORED, InstanceState.REJECTED, InstanceState.EXPECTED}
    ),
    # Taken off the PACS's list after it was stored; its object stays. Or back to expected: the
    # archive no longer has the object.
    InstanceState.STORED: frozenset({InstanceState.REJECTED, InstanceState.EXPECTED}),
    # A rerun asks again for what was left out.
    InstanceState.REJECTED: frozenset({InstanceState.EXPECTED}),
}


# PS3.3 C.7.3.1.1.1: what goes with images and says nothing of their size.
_BESIDE_IMAGES = {"SR", "PR", "KO", "DOC", "REG", "FID", "RWV", "PLAN", "AU"}
_UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class StudyOutcome:
    """What a verdict needs to know of one study of a row."""

    reference: StudyReference
    state: StudyState
    reason: str | None = None
    expected_instances: int = 0
    stored_instances: int = 0
    withheld_instances: int = 0
    size_bytes: int = 0
    evidence: Evidence | None = None


LIST_UNPROVED = "list-unproved"
FILTER_UNDECIDED = "filter-undecided"
BEYOND_THE_MAXIMUM = "beyond-the-maximum"
SELECTED_OTHERWISE = "selected-otherwise"

COPY_INCOMPLETE = "copy-incomplete"
STUDY_GONE = "study-gone"

OF_ONE_REQUEST = {
    "answer-unusable",
    "answers-capped",
    "association-lost",
    "copy-incomplete",
    "evidence-too-weak",
    "filter-undecided",
    "pacs-failure",
    "request-refused",
    "study-changed",
    "study-offline",
    "unsafe-patient-id",
}
"""Ends of one query that say nothing about the next: the others go on."""

_ROW_VERDICTS = {
    FILTER_UNDECIDED: Verdict.AMBIGUOUS,
    BEYOND_THE_MAXIMUM: Verdict.EXCLUDED,
    "window-empty": Verdict.EXCLUDED,
    "no-match": Verdict.NOT_FOUND,
    "several-patients": Verdict.AMBIGUOUS,
    "name-disagrees": Verdict.AMBIGUOUS,
    "excluded-by-filter": Verdict.EXCLUDED,
}


def row_verdict(
    reason: str | None,
    studies: Sequence[StudyOutcome],
    *,
    unproved: bool = False,
    not_taken: str | None = None,
) -> tuple[Verdict, str]:
    """The verdict of a cohort row and its reason code.

    Parameters
    ----------
    reason : str or None
        What discovery recorded about the row itself; None where it found studies or has not
        been made yet.
    studies : sequence of StudyOutcome
        The studies the row found.
    unproved : bool
        There are gaps in the list of them.
    not_taken : str or None
        Why the cohort takes none or not all of what the row found; ``studies`` are the others.

    Returns
    -------
    tuple of Verdict and str
        ``(Verdict.PENDING, "interrupted")`` while any of it is unfinished.
    """
    if reason is not None and not (reason in (LIST_UNPROVED, FILTER_UNDECIDED) and studies):
        return _ROW_VERDICTS.get(reason, Verdict.FAILED), reason
    if not_taken is not None and not studies and not unproved:
        return _ROW_VERDICTS.get(not_taken, Verdict.FAILED), not_taken
    if not studies or any(s.state in (StudyState.PENDING, StudyState.LISTED) for s in studies):
        return Verdict.PENDING, "interrupted"
    if unproved or reason == FILTER_UNDECIDED:
        some = any(s.state is StudyState.ARCHIVED or s.stored_instances for s in studies)
        code = LIST_UNPROVED if unproved else FILTER_UNDECIDED
        return Verdict.PARTIAL if some else _ROW_VERDICTS.get(code, Verdict.FAILED), code
    failed = [s for s in studies if s.state is StudyState.FAILED]
    withheld = any(s.withheld_instances for s in studies)
    if not failed and not withheld:
        return Verdict.ARCHIVED, "all-archived"
    if not failed:
        return Verdict.PARTIAL, "instances-rejected"
    code = failed[0].reason or "unexpected"
    if len(failed) < len(studies) or any(s.stored_instances for s in failed):
        return Verdict.PARTIAL, code if len(studies) == 1 else "some-archived"
    return Verdict.FAILED, code


def weakest_evidence(studies: Iterable[StudyOutcome]) -> Evidence | None:
    """The weakest proof among the archived studies; None where there are none."""
    proofs = {s.evidence for s in studies if s.state is StudyState.ARCHIVED}
    return next((proof for proof in reversed(Evidence) if proof in proofs), None)


def modality_of(modalities: Iterable[str]) -> str:
    """What a study counts as, by its Modalities in Study (0008,0061).

    Examples
    --------
    >>> modality_of(["SR", "CT"]), modality_of(["PT", "CT"]), modality_of(["SR"]), modality_of([])
    ('CT', 'CT+PT', 'SR', 'unknown')
    """
    named = {name.strip().upper() for name in modalities} - {""}
    return "+".join(sorted(named - _BESIDE_IMAGES or named)) or _UNKNOWN


_OF_OUR_SIDE = {
    "archive-checksum",
    "archive-conflict",
    "archive-object-missing",
    "manifest-unreadable",
    SELECTED_OTHERWISE,
    "unexpected",
}
"""Ends of a study that no other node can help."""


class AtNode(Protocol):
    """What is known of a study at one of its cohort's nodes."""

    @property
    def is_found(self) -> bool: ...
    @property
    def number_of_instances(self) -> int | None: ...
    @property
    def reason(self) -> str | None: ...


def node_to_ask(
    nodes: Sequence[str], copies: Mapping[str, AtNode], halted: Container[str] = ()
) -> str | None:
    """The node that a study is to be asked of, of those of its cohort; None where none is left.

    Where it could not be had it is not asked for again. Of the nodes that are known to have it,
    the one that counts most instances comes first, where all of them count; then the cohort's
    order decides. Those that may have it come last. A node that is halted is passed over.

    Parameters
    ----------
    nodes : sequence of str
        In the cohort's order.
    copies : mapping of node to what is known
        Of the nodes that were asked about the study.

    Examples
    --------
    >>> node_to_ask(["main", "vna"], {})
    'main'
    """
    left = [n for n in nodes if n not in copies or copies[n].reason is None]
    known = [n for n in left if n in copies and copies[n].is_found]
    counts = {n: copies[n].number_of_instances for n in known}
    if None not in counts.values():
        known.sort(key=lambda node: -counts[node])
    maybe = [n for n in left if n not in known]
    return next((node for node in (*known, *maybe) if node not in halted), None)


def helps_elsewhere(code: str) -> bool:
    """Whether a study that ended so at one node may still be had from another."""
    return code not in _OF_OUR_SIDE


def reason_of_all(nodes: Sequence[str], copies: Mapping[str, AtNode]) -> str | None:
    """The reason of a study that no node could deliver: the one that is helped most easily."""
    codes = [copies[n].reason for n in nodes if n in copies and copies[n].reason is not None]
    return min(codes, key=lambda code: _EASE.index(reason_for(code).disposition), default=None)


_EASE = (Disposition.TRANSIENT, Disposition.OPERATOR, Disposition.PERMANENT)


def plan_chunks(
    studies: Iterable[tuple[StudyReference, str, int | None]],
    *,
    chunk_studies: int,
    chunk_instances: int,
) -> Iterator[Chunk]:
    """Studies in the order given, cut into chunks of one node.

    A chunk ends at ``chunk_studies`` studies, or before the study that would lift its known
    instances over ``chunk_instances``; a study is never cut (its requests are, see
    :func:`plan_requests`).

    Parameters
    ----------
    studies : iterable of (study reference, node, instances or None)
        Unknown counts weigh nothing.
    """
    number = 1
    members: list[StudyReference] = []
    node, weight = "", 0
    for reference, its_node, instances in studies:
        load = instances or 0
        if members and (
            its_node != node or len(members) >= chunk_studies or weight + load > chunk_instances
        ):
            yield Chunk(number, node, tuple(members))
            number, members, weight = number + 1, [], 0
        node = its_node
        members.append(reference)
        weight += load
    if members:
        yield Chunk(number, node, tuple(members))


CHUNKS_WAITING_FOR_UPLOAD = 2


def most_chunks_under_way(associations: int) -> int:
    """How many chunks lie in the spool at a time, at most.

    As many are retrieved as there are associations. A new one begins while fewer than that, and
    :data:`CHUNKS_WAITING_FOR_UPLOAD`, are on their way into the archive.
    """
    return 2 * associations + CHUNKS_WAITING_FOR_UPLOAD - 1


@dataclass(frozen=True, slots=True)
class RetrieveRequest:
    """One C-MOVE or C-GET to send: a level and the UIDs it names, PS3.4 C.4.2.1.4.1.

    ``studies`` names one study, or several at STUDY level; ``series`` is empty at STUDY level,
    ``instances`` everywhere but at IMAGE level. ``expected`` is what it should bring; None where
    nobody knows, and it has brought what the peer says it has sent.
    """

    level: str
    studies: tuple[StudyReference, ...]
    series: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()
    expected: int | None = 0


def plan_requests(
    missing: dict[StudyReference, Sequence[InstanceKey]],
    listed: dict[StudyReference, Sequence[InstanceKey]],
    *,
    request_instances: int,
    uids_per_request: int,
) -> list[RetrieveRequest]:
    """The requests that ask for exactly what is missing, as few and as coarse as possible.

    Studies of which nothing is here yet go together by UID list, until ``request_instances``;
    a larger one goes by series; of a series that is partly here, or too large for one request,
    the missing instances are named in lists.
    """
    whole: list[StudyReference] = []
    requests: list[RetrieveRequest] = []
    weight = 0

    def flush() -> None:
        nonlocal weight
        if whole:
            requests.append(RetrieveRequest("STUDY", tuple(whole), expected=weight))
            whole.clear()
            weight = 0

    for study, keys in missing.items():
        if not keys:
            continue
        if len(keys) == len(listed[study]) and len(keys) <= request_instances:
            if weight + len(keys) > request_instances or len(whole) >= uids_per_request:
                flush()
            whole.append(study)
            weight += len(keys)
            continue
        requests.extend(
            _requests_of_one_study(study, keys, listed[study], request_instances, uids_per_request)
        )
    flush()
    return requests


def _requests_of_one_study(
    study: StudyReference,
    missing: Sequence[InstanceKey],
    listed: Sequence[InstanceKey],
    request_instances: int,
    uids_per_request: int,
) -> Iterator[RetrieveRequest]:
    sizes: dict[str, int] = {}
    for key in listed:
        sizes[key.series_instance_uid] = sizes.get(key.series_instance_uid, 0) + 1
    by_series: dict[str, list[str]] = {}
    for key in missing:
        by_series.setdefault(key.series_instance_uid, []).append(key.sop_instance_uid)
    for series, instances in by_series.items():
        count = len(instances)
        if count == sizes[series] and count <= request_instances:
            yield RetrieveRequest("SERIES", (study,), (series,), expected=count)
            continue
        step = min(uids_per_request, request_instances)
        for start in range(0, count, step):
            part = tuple(instances[start : start + step])
            yield RetrieveRequest("IMAGE", (study,), (series,), part, expected=len(part))


_FAILURES_BEFORE_HALT = {
    # A PACS that starts, or reads its tables again, may say this too.
    "association-rejected": 3,
}
"""How often in a row a node may answer so; other reasons for a person to act halt it at once."""

_NEVER_WORKED = {"pacs-reset"}
"""Passing reasons that are none where the node has done nothing for this run yet."""


class Breaker(StrEnum):
    """Whether a node may be asked."""

    CLOSED = "closed"
    """By all."""
    HALF_OPEN = "half-open"
    """By one at a time, until one has succeeded."""
    OPEN = "open"
    """Not now."""
    HALTED = "halted"
    """Not before a person has acted."""


_MUTE_STUDIES = 3
_MUTE_STUDIES_AFTER_OTHERS = 10
_FAILED_QUERIES = 10
JITTER = 0.2
"""Waits are longer or shorter by up to this part: runs that failed together do not return so."""

EASE_SECONDS = 300.0
"""After so long without strain, a node that was asked for less is asked for one more at a time."""
_LATELY = 10
_SIGNS = 3
"""Signs of strain from so many different studies among the last :data:`_LATELY` requests."""
_SLOW_TIMES = 4.0
_SLOW_SECONDS = 3.0
"""A request is slow that takes several times the usual to begin, and at least so long."""
_USUAL_OF = 51
_USUAL_FROM = 8
"""The usual is the median of so many requests, at most and at least."""


def _lot() -> float:
    return random.uniform(1 - JITTER, 1 + JITTER)


class Asked(StrEnum):
    """Kinds of requests; how long they take to begin is compared with others of the kind."""

    QUERY = "query"
    RETRIEVE = "retrieve"


Heard = Callable[[str, str | None, Mapping[str, int | float]], None]
"""Told the name of an event, its reason code and its figures."""


class NodeClock:
    """When one PACS node may be asked, for how much at a time, and whether at all. Thread-safe.

    There is one for each node of a run, and all its studies and threads go by it: what one
    learns of the node spares the others the same.

    *A breaker.* A node that fails for a passing reason is left alone for the first of the waits,
    then for the second, and so on. When a wait is over, one caller is to probe the node with
    what costs it least (:meth:`begin_probe`); when that was answered, one caller at a time may
    ask (:meth:`take_turn`), until a request has succeeded. A node that fails once more after the
    last wait, or for a reason that a person has to act on, is *halted*: nothing is sent to it any
    more, and what was to be asked stays as it is.

    *Less at a time.* A node that refuses for want of resources, or shows signs of strain (slow
    to begin, out of resources, success with nothing sent) at several studies of late, is asked
    for half as much at a time; after each :data:`EASE_SECONDS` without, for one more.

    Parameters
    ----------
    waits : sequence of float
        Seconds. How long to leave the node alone after so many failures in a row.
    associations : int
        How many requests it may be sent at a time.
    now : callable
        The time in seconds, of any clock that does not go backwards.
    lot : callable, optional
        What a wait is multiplied with.
    heard : callable, optional
        Told what changes, after it has.
    """

    def __init__(
        self,
        waits: Sequence[float],
        associations: int,
        *,
        now: Callable[[], float],
        lot: Callable[[], float] = _lot,
        heard: Heard | None = None,
    ) -> None:
        self.now = now
        self.halted: str | None = None
        """The reason code, where the node is left alone until a person has acted."""
        self.worked = False
        """Whether the node has done anything for this run yet."""
        self._waits = tuple(waits)
        self._lot = lot
        self._lock = threading.Lock()
        self._heard = heard
        self._news: list[tuple[str, str | None, Mapping[str, int | float]]] = []
        self._failures = 0
        self._failed_at: float | None = None
        self._not_before = now()
        self._waiting_for: str | None = None
        self._probing = False
        self._probed = False
        self._turn: int | None = None
        """The thread that may ask while the breaker is half-open."""
        self.has_delivered = False
        """Whether anything has ever arrived from it in this run."""
        self._mute: set[StudyReference] = set()
        self._failed_queries = 0
        # How much at a time: never more than the most; of late not more than the ceiling; and
        # after a failure one, and then one more with each success.
        self._most = self._ceiling = self._width = associations
        self._strained_at = now()
        self._strained_for: str | None = None
        self._lately = {kind: deque(maxlen=_LATELY) for kind in Asked}
        self._took = {kind: deque(maxlen=_USUAL_OF) for kind in Asked}

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock; tell what has changed when it is free again."""
        with self._lock:
            yield
            news, self._news = self._news, []
        if self._heard is not None:
            for one in news:
                self._heard(*one)

    # --- what may be done

    @property
    def associations(self) -> int:
        """How many requests may be under way: one after a failure, then one more at a time."""
        return self._width

    @property
    def most(self) -> int:
        """How many may be under way when nothing is wrong."""
        return self._most

    @property
    def ceiling(self) -> int:
        """How many may be under way as it stood strain of late."""
        return self._ceiling

    @property
    def strained_for(self) -> str | None:
        """The reason code for which it is asked for less at a time, while it is."""
        return self._strained_for

    def seconds_left(self) -> float:
        """How long the node is still to be left alone."""
        return max(0.0, self._not_before - self.now())

    @property
    def waiting_for(self) -> str | None:
        """The reason code of the wait, while there is one that a failure has brought about."""
        return self._waiting_for if self.seconds_left() else None

    @property
    def breaker(self) -> Breaker:
        """Whether the node may be asked by all, by one, by none now, or by none any more."""
        if self.halted:
            return Breaker.HALTED
        if not self._failures:
            return Breaker.CLOSED
        return Breaker.HALF_OPEN if self._probed else Breaker.OPEN

    def begin_probe(self) -> bool:
        """Whether the caller is to probe the node now; then it calls :meth:`end_probe`."""
        with self._lock:
            if self.breaker is not Breaker.OPEN or self._probing or self.seconds_left():
                return False
            self._probing = True
            return True

    def end_probe(self, *, answered: bool) -> None:
        """The probe is over; where it failed, :meth:`failed` was told as well."""
        with self._lock:
            self._probing = False
            self._probed = answered and bool(self._failures)

    def take_turn(self) -> bool:
        """Whether this thread may ask now. While the breaker is half-open, one at a time may."""
        with self._lock:
            if self.breaker is Breaker.CLOSED:
                return True
            own = threading.get_ident()
            if self.breaker is not Breaker.HALF_OPEN or self._turn not in (None, own):
                return False
            self._turn = own
            return True

    def end_turn(self) -> None:
        """This thread asks no more: the next one may, if it had the turn."""
        with self._lock:
            if self._turn == threading.get_ident():
                self._turn = None

    # --- what has happened

    def failed(self, code: str, asked_at: float) -> None:
        """The node cannot be used, or not now; ``asked_at`` is when it was asked what failed.

        What was asked before the last failure failed with it, and counts once.
        """
        with self._changing():
            if self.halted or (self._failed_at is not None and asked_at < self._failed_at):
                return
            self._failed_at = self.now()
            self._failures += 1
            self._probed, self._turn = False, None
            if code == "pacs-busy":
                self._narrow(code)
            self._width = 1
            passing = reason_for(code).disposition is Disposition.TRANSIENT
            if passing and (self.worked or code not in _NEVER_WORKED):
                most = len(self._waits) + 1
            else:
                most = min(_FAILURES_BEFORE_HALT.get(code, 1), len(self._waits) + 1)
            if self._failures >= most:
                self._halt(code)
            else:
                self._wait(self._waits[self._failures - 1], code)
                figures = {"failures": self._failures, "seconds": round(self.seconds_left(), 1)}
                self._news.append(("breaker.opened", code, figures))

    def rest(self, passes: int) -> bool:
        """Leave the node alone after so many passes over the cohort; False after the last."""
        with self._lock:
            if self.halted or passes > len(self._waits):
                return False
            self._wait(self._waits[passes - 1], None)
            return True

    def _wait(self, seconds: float, code: str | None) -> None:
        self._not_before = max(self._not_before, self.now() + seconds * self._lot())
        self._waiting_for = code

    def _halt(self, code: str) -> None:
        self.halted = code
        self._news.append(("node.halted", code, {}))

    def answered(self) -> None:
        """A query was answered."""
        with self._lock:
            self._failed_queries = 0

    def query_failed(self) -> None:
        """A query failed for a reason that may be its own; ten in a row are the node's."""
        with self._changing():
            self._failed_queries += 1
            if self._failed_queries >= _FAILED_QUERIES and not self.halted:
                self._halt("requests-keep-failing")

    def succeeded(self) -> None:
        """Something was done that need not be done again: the failures before it are over.

        Not those of a wait that goes on: it was asked for before them.
        """
        with self._changing():
            self.worked = True
            self._failed_queries = 0
            if self._failures and self.seconds_left():
                return
            if self._failures:
                self._news.append(("breaker.closed", None, {"failures": self._failures}))
            self._failures, self._probed, self._turn = 0, False, None
            self._ease()
            self._width = min(self._ceiling, self._width + 1)

    def delivered(self) -> None:
        """Objects have arrived, so the way from the node to here is open."""
        self.succeeded()
        with self._lock:
            self.has_delivered = True
            self._mute.clear()

    def sent_nothing(self, study: StudyReference, code: str) -> None:
        """The node lists the study, and was asked for it, and nothing came; it said why.

        Some studies lie damaged on their PACS; but after three of them with nothing before, or
        ten in a row after others, it is the way to here that is closed.
        """
        with self._changing():
            self._mute.add(study)
            most = _MUTE_STUDIES_AFTER_OTHERS if self.has_delivered else _MUTE_STUDIES
            if len(self._mute) >= most and not self.halted:
                for_a_person = reason_for(code).disposition is Disposition.OPERATOR
                self._halt(code if for_a_person else "node-sends-nothing")

    # --- how much at a time

    def took(self, kind: Asked, seconds: float, about: Hashable = None) -> None:
        """A request took so long to begin: until its first answer, or its first object.

        ``about`` is the study, or the row, where it was about one.
        """
        with self._changing():
            before = self._took[kind]
            usual = statistics.median(before) if len(before) >= _USUAL_FROM else math.inf
            before.append(seconds)
            slow = seconds >= max(_SLOW_SECONDS, _SLOW_TIMES * usual)
            self._note(kind, "pacs-slow" if slow else None, about)

    def strained(self, kind: Asked, code: str, about: Hashable = None) -> None:
        """A request ended as it does where too much is asked at a time; or for the study's fault.

        Which of the two is told by whether it happens to several studies.
        """
        with self._changing():
            self._note(kind, code, about)

    def _note(self, kind: Asked, code: str | None, about: Hashable) -> None:
        lately = self._lately[kind]
        lately.append((code, about))
        if code is None:
            return
        signs = [who for sign, who in lately if sign is not None]
        if len({who for who in signs if who is not None}) + signs.count(None) >= _SIGNS:
            self._narrow(code)

    def _narrow(self, code: str) -> None:
        """Ask for half as much at a time."""
        for lately in self._lately.values():
            lately.clear()
        self._strained_at = self.now()
        before = self._ceiling
        self._ceiling = max(1, min(self._ceiling, self._width) // 2)
        self._width = min(self._width, self._ceiling)
        if self._ceiling < before:
            self._strained_for = code
            self._news.append(("node.narrowed", code, {"associations": self._ceiling}))

    def _ease(self) -> None:
        """Ask for one more at a time, where that has been less, and not of late."""
        if self._ceiling == self._most or self.now() - self._strained_at < EASE_SECONDS:
            return
        self._strained_at = self.now()
        self._ceiling += 1
        if self._ceiling == self._most:
            self._strained_for = None
        self._news.append(("node.widened", None, {"associations": self._ceiling}))
