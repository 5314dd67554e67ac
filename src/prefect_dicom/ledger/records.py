"""What the ledger says of cohorts, runs, studies and instances.

Texts of peers are kept out of ``repr``: a record may be printed, its study may not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import ClassVar, NamedTuple

from prefect_dicom.core.model import (
    Disposition,
    Evidence,
    InstanceKey,
    InstanceState,
    NodeOrder,
    Study,
    StudyManifest,
    StudyReference,
    StudyState,
    Verdict,
)


@dataclass(frozen=True, slots=True)
class Run:
    """A run that lives: its lock is held until it ends or its process does."""

    number: int
    kind: str


@dataclass(frozen=True, slots=True)
class Cohort:
    """A cohort file, by the digest of its content, to be asked of these nodes."""

    number: int
    name: str
    digest: str
    order: NodeOrder
    rows: int
    created_at: datetime
    selection: str = field(default="", repr=False)
    """The series it wants, as :func:`~prefect_dicom.cohort.filters.series_text` puts it."""
    paused: bool = False
    """Whether its runs ask for nothing until it is resumed."""
    priority: int = 0
    """Where runs share a node, those of higher numbers come first."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of its nodes, the preferred one first."""
        return self.order.names

    @property
    def node(self) -> str:
        """The first of its nodes."""
        return self.order.names[0]


@dataclass(frozen=True, slots=True)
class LivingRun:
    """A run under way, for people; times are aware UTC."""

    number: int
    kind: str
    started_at: datetime
    cancelled: bool
    """Whether it was told to end."""
    paused_at: datetime | None
    """Since when it waits in place for its cohort to be resumed."""
    waits: str = ""
    """What it waits for, or goes slowly for; in words, as of the last change."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right of one run to write about one study; void once another run has taken it.

    ``attempt`` counts the claims of the study. Together with ``run`` it is the fencing token
    that each write about the study is conditional on.
    """

    reference: StudyReference
    run: int
    attempt: int
    node: str
    """The node that it is asked of."""
    state: StudyState
    study: Study = field(repr=False)
    """As that node has it."""
    listed_by: str | None = None
    """The node whose list of its instances the ledger has; None where there is none to be met."""
    told_elsewhere: int = 0
    """The most instances of it that another node counts, as far as that was asked."""
    is_found: bool = True
    """Whether the node is known to have it; it may have, where another node has failed."""

    @property
    def study_instance_uid(self) -> str:
        return self.study.study_instance_uid

    @property
    def patient_id(self) -> str:
        return self.study.patient_id

    @property
    def number_of_instances(self) -> int | None:
        return self.study.number_of_instances


class RowFindings(NamedTuple):
    """What discovery made of a cohort row.

    ``reason`` is None where the row found its studies; with ``list-unproved`` it found some, and
    ``gaps`` says where there may be more. The near misses are candidates that were not taken.
    """

    line: int
    studies: Sequence[Study] = ()
    reason: str | None = None
    near_misses: Sequence[Study] = ()
    gaps: Sequence[str] = ()
    nodes: Sequence[str] = ()
    """Of each study the node that has it, where the cohort has several: a study that is on two of
    them is among ``studies`` twice."""


@dataclass(frozen=True, slots=True)
class StudyLocation:
    """A study at one of the nodes of a cohort that has several.

    ``reason`` is why it could not be had from there; None where it may be asked for.
    """

    node: str
    is_found: bool = True
    number_of_instances: int | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class StudyRecord:
    """One study as the ledger knows it.

    ``expected`` counts the instances on the PACS's list, ``stored`` those in the archive,
    ``withheld`` those listed ones that are left out for a reason; ``size_bytes`` is of the
    stored ones. ``claimed`` is True while a living run works on it; ``claimed_at`` is when the last
    run began to, ``failed_at`` when it failed last.
    """

    reference: StudyReference
    node: str
    state: StudyState
    study: Study = field(repr=False)
    reason: str | None = None
    disposition: Disposition | None = None
    detail: str = field(default="", repr=False)
    attempt: int = 0
    claimed: bool = False
    evidence: Evidence | None = None
    claimed_at: datetime | None = None
    listed_at: datetime | None = None
    archived_at: datetime | None = None
    failed_at: datetime | None = None
    expected: int = 0
    received: int = 0
    stored: int = 0
    withheld: int = 0
    size_bytes: int = 0
    selection: str | None = field(default=None, repr=False)
    """The series it was listed with, in words; empty for all, None while nothing is listed."""


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """One instance of a study that is not archived yet.

    ``sha256`` and ``size_bytes`` are of its last arrival, also where that was lost or rejected.
    ``rejections`` counts the arrivals that were given up (:meth:`Ledger.record_lost`).
    """

    key: InstanceKey = field(repr=False)
    sop_class_uid: str
    state: InstanceState
    reason: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    transfer_syntax_uid: str | None = None
    spool_name: str | None = None
    object_key: str | None = field(default=None, repr=False)
    version_id: str | None = None
    warnings: tuple[str, ...] = ()
    rejections: int = 0
    node: str | None = None
    """The node that has sent it."""


@dataclass(frozen=True, slots=True)
class FoundStudy:
    """A study as it was found in the archive.

    ``body`` is its manifest as it lies there. With a ``reason`` (a code) that is not to be
    believed, and the manifest may be None.
    """

    study_instance_uid: str = field(repr=False)
    manifest: StudyManifest | None = field(default=None, repr=False)
    body: bytes = field(default=b"", repr=False)
    reason: str | None = None


class RebuildOutcome(StrEnum):
    """What the ledger made of a study that was found in the archive."""

    ADDED = "added"
    """It did not know the study."""
    COMPLETED = "completed"
    """It had the study as unfinished or failed, and has it as archived now."""
    KNOWN = "known"
    """It had the study already, and what it has stays."""
    CLAIMED = "claimed"
    """A living run works on the study."""
    LISTED_OTHERWISE = "listed-otherwise"
    """It has another list of the PACS than the manifest's; a pull has to settle that."""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """The end of one adoption; ``body`` is the manifest that was known of an archived study."""

    reference: StudyReference
    outcome: RebuildOutcome
    body: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ListChange:
    """How a new instance list differs from the one before; ``total`` instances are listed."""

    added: int
    removed: int
    total: int


@dataclass(frozen=True, slots=True)
class Reopened:
    """How much a rerun will try again."""

    studies: int
    rows: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Where a cohort stood at a moment; the figures are those of :class:`Totals`.

    ``run`` is the one that looked, ``run_began`` when it had begun. ``window_open`` says whether
    the node might be asked then, and is None where it has no windows.
    """

    at: datetime
    run: int | None
    unasked: int
    studies: Counter[StudyState]
    expected: int
    received: int
    stored: int
    size_bytes: int
    window_open: bool | None = None
    run_began: datetime | None = None


@dataclass(frozen=True, slots=True)
class StudyGroup:
    """Studies of a cohort that are alike; instances and bytes are those that are archived."""

    modalities: tuple[str, ...]
    state: StudyState
    reason: str | None
    studies: int
    instances: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Totals:
    """A cohort in figures.

    ``rows`` counts every row once. The instances are those of the cohort's studies, each study
    once: listed (``expected``), in the spool now (``received``), in the archive (``stored``,
    ``size_bytes`` of these), left out (``rejected``). ``unproved`` counts the rows by each window
    in which the PACS may have more of their studies, ``evidence`` the archived studies by what
    their completeness was judged by, ``nodes`` by where they came from. ``unasked`` rows have had
    no answer yet.
    """

    rows: Counter[Verdict]
    studies: Counter[StudyState]
    expected: int
    received: int
    stored: int
    rejected: int
    size_bytes: int
    unproved: Counter[str] = field(default_factory=Counter)
    evidence: Counter[Evidence] = field(default_factory=Counter)
    unasked: int = 0
    nodes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Usage:
    """What requests bring, or what is allowed of it in a second; None: not bounded."""

    retrieves: float | None = 0.0
    instances: float | None = 0.0
    size_bytes: float | None = 0.0
    busy_seconds: float | None = 0.0
    """Seconds of requests, of all associations together."""

    BUCKETS: ClassVar[tuple[str, ...]] = ("retrieves", "instances", "size_bytes", "busy_seconds")

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, m) + getattr(other, m) for m in self.BUCKETS))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*(getattr(self, m) - getattr(other, m) for m in self.BUCKETS))

    def after(self, seconds: float, rates: Usage, busy: int) -> Usage:
        """What is left of it when it has fallen for so long, with so many requests under way."""
        left = []
        for bucket in self.BUCKETS:
            grows = busy if bucket == "busy_seconds" else 0
            rate = getattr(rates, bucket)
            level = getattr(self, bucket) + (grows - rate) * seconds if rate is not None else 0.0
            left.append(max(0.0, level))
        return Usage(*left)
