"""Records of cohorts, runs, studies and instances.

Texts of peers are kept out of ``repr``: a record may be printed, its study may not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import ClassVar, NamedTuple

from prefect_dicom.core.deliveries import DeliveryEvidence, DeliveryMethod, DeliveryState
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
from prefect_dicom.core.row_queries import RowQuery


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is alive: its lock is held until it ends or its process does."""

    number: int
    kind: str


@dataclass(frozen=True, slots=True)
class Cohort:
    """A registered cohort: a file, by the digest of its content, and the nodes to query."""

    number: int
    name: str
    digest: str
    order: NodeOrder
    rows: int
    created_at: datetime
    selection: str = field(default="", repr=False)
    """The series it selects, in the words of :func:`~prefect_dicom.cohort.filters.series_text`."""
    paused: bool = False
    """Whether its runs are paused until it is resumed."""
    priority: int = 0
    """Runs of cohorts with higher numbers get the slots of a node first."""
    may_be_empty: bool = False
    """Whether it is well where all rows are excluded: days on which there may be no study."""

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
    """Whether its requested state is cancelled."""
    paused_at: datetime | None
    """Since when it is paused."""
    waits: str = ""
    """What it waits for, or is slowed down by; in words, as of the last change."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right of one run to write about one study; lost once another run has claimed it.

    ``attempt`` counts the claims of the study. With ``run`` it is the fencing token that each
    write about the study is conditional on.
    """

    reference: StudyReference
    run: int
    attempt: int
    node: str
    """The node to retrieve it from."""
    state: StudyState
    study: Study = field(repr=False)
    """The study as that node describes it."""
    listed_by: str | None = None
    """The node whose instance list the ledger has; None where no list has to be retrieved."""
    counted_elsewhere: int = 0
    """The largest number of its instances that another node counts, as far as is known."""
    is_found: bool = True
    """Whether the node is known to have it; if not, it is tried because another has failed."""

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
    """The result of discovery for a cohort row.

    ``reason`` is None where the row has found its studies; with ``list-unproved`` it has found
    some, and ``gaps`` says where there may be more. Near misses are candidates that were not
    taken.
    """

    line: int
    studies: Sequence[Study] = ()
    reason: str | None = None
    near_misses: Sequence[Study] = ()
    gaps: Sequence[str] = ()
    nodes: Sequence[str] = ()
    """The node of each study, where the cohort has several nodes: a study on two nodes is among
    ``studies`` twice."""
    queries: Sequence[RowQuery] = ()
    """What was asked for the row, for people."""


@dataclass(frozen=True, slots=True)
class StudyLocation:
    """A study at one node, for cohorts with several nodes.

    ``reason`` is the code of the failure there; None where it may be retrieved from there.
    """

    node: str
    is_found: bool = True
    number_of_instances: int | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class StudyRecord:
    """One study in the ledger.

    ``expected`` counts the instances on the PACS's list, ``stored`` those in the archive,
    ``withheld`` the listed ones that are left out for a reason; ``size_bytes`` is of the stored
    ones. ``claimed`` is True while a living run works on it; ``claimed_at`` is the time of the
    last claim, ``failed_at`` that of the last failure.
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
    missing: int = 0
    """Instances of an archived study that never came, as a person has accepted."""
    patient_id_of_instances: str | None = field(default=None, repr=False)
    """The PatientID that all its instances name, where it is another than the listed one."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """A decision of a person: to take a study though something is wrong with it.

    Parameters
    ----------
    study : StudyReference or None
        The study; None for every study of the cohort.
    reason : str
        Code of what is accepted.
    patient_id : str or None
        The PatientID that instances may name; None for any, if all name the same one.
    missing : tuple of InstanceKey
        The instances that may be missing.
    accepted_by : str
        Who has decided, as given or by the account of the system.
    accepted_at : datetime
        When; aware, UTC.
    note : str
        What for, in words of the person.
    number : int
        Of the decision in the ledger.
    withdrawn_by, withdrawn_at : str, datetime or None
        Who has taken it back, and when.
    """

    study: StudyReference | None
    reason: str
    patient_id: str | None = field(default=None, repr=False)
    missing: tuple[InstanceKey, ...] = field(default=(), repr=False)
    accepted_by: str = ""
    accepted_at: datetime | None = None
    note: str = field(default="", repr=False)
    number: int = 0
    withdrawn_by: str | None = None
    withdrawn_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """One instance of a study that is not archived yet.

    ``sha256`` and ``size_bytes`` are of the bytes received last, also where those were lost or
    rejected. ``rejections`` counts the times it was lost
    (:meth:`~prefect_dicom.ledger.instances.Instances.record_lost`).
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

    @property
    def is_here(self) -> bool:
        """Whether it lies in the spool or in the archive, as far as the ledger knows."""
        return self.state in (InstanceState.RECEIVED, InstanceState.STORED)


@dataclass(frozen=True, slots=True)
class FoundStudy:
    """A study that was found in the archive.

    ``body`` is its manifest as it is stored. With a ``reason`` (a code) the manifest cannot be
    trusted, and may be None.
    """

    study_instance_uid: str = field(repr=False)
    manifest: StudyManifest | None = field(default=None, repr=False)
    body: bytes = field(default=b"", repr=False)
    reason: str | None = None


class RebuildOutcome(StrEnum):
    """The outcome for one study of a rebuild of the ledger from the archive."""

    ADDED = "added"
    """The study was unknown and was added."""
    COMPLETED = "completed"
    """The study was unfinished or failed, and is archived now."""
    KNOWN = "known"
    """The study was known; nothing was changed."""
    CLAIMED = "claimed"
    """A living run works on the study."""
    LISTED_OTHERWISE = "listed-otherwise"
    """The PACS's list in the ledger differs from the manifest; a pull has to resolve that."""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A study of a rebuild; ``body`` is the manifest that the ledger had of an archived study."""

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
    """How many studies and rows a rerun will try again."""

    studies: int
    rows: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The totals of a cohort at a time; the fields are those of :class:`Totals`.

    ``run`` is the run that took the sample, ``run_began`` the time it began. ``schedule_open`` says
    whether the node's access schedule was open, and is None where it has none.
    """

    at: datetime
    run: int | None
    unasked: int
    studies: Counter[StudyState]
    expected: int
    received: int
    stored: int
    size_bytes: int
    schedule_open: bool | None = None
    run_began: datetime | None = None


@dataclass(frozen=True, slots=True)
class StudyGroup:
    """A count of studies of a cohort; instances and bytes are those that are archived."""

    modalities: tuple[str, ...]
    state: StudyState
    reason: str | None
    studies: int
    instances: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Totals:
    """The totals of a cohort.

    ``rows`` counts every row once. The instances are those of the cohort's studies, each study
    once: listed (``expected``), in the spool now (``received``), in the archive (``stored``,
    ``size_bytes`` of these), left out (``rejected``). ``unproved`` counts the rows by each date
    window in which the PACS may have more of their studies, ``evidence`` the archived studies by
    the evidence of their completeness, ``nodes`` by the node they came from. ``unasked`` rows
    have had no answer yet.
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
    missing: int = 0
    """Instances of archived studies that never came, as a person has accepted."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Usage of a node by requests, or the rate allowed per second; None: not limited."""

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
        """Return the levels after ``seconds`` of leaking at ``rates``, with ``busy`` requests."""
        left = []
        for bucket in self.BUCKETS:
            inflow = busy if bucket == "busy_seconds" else 0
            rate = getattr(rates, bucket)
            level = getattr(self, bucket) + (inflow - rate) * seconds if rate is not None else 0.0
            left.append(max(0.0, level))
        return Usage(*left)


@dataclass(frozen=True, slots=True)
class DeliveryRecord:
    """One delivery as people see it."""

    reference: StudyReference
    target: str
    method: DeliveryMethod
    state: DeliveryState
    evidence: DeliveryEvidence | None
    reason: str | None
    detail: str = field(repr=False)
    instances: int
    sent_at: datetime | None
    verified_at: datetime | None
    study: Study = field(repr=False)


@dataclass(frozen=True, slots=True)
class DeliveryTotals:
    """How far the deliveries of a cohort to one target are.

    Parameters
    ----------
    states : Counter of DeliveryState
        Deliveries by state.
    evidence : Counter of str
        Verified ones by their evidence.
    reasons : Counter of str
        Failed ones by their reason.
    not_due : int
        Studies of the cohort that are no deliveries: what is sent has to be archived first.
    instances, size_bytes : int
        What the target has accepted so far, repetitions included.
    """

    states: Counter[DeliveryState]
    evidence: Counter[str]
    reasons: Counter[str]
    not_due: int
    instances: int
    size_bytes: int

    @property
    def is_verified(self) -> bool:
        """Whether every study of the cohort is delivered and verified; there is one at least."""
        verified = self.states[DeliveryState.VERIFIED]
        return bool(verified) and verified == self.states.total() and not self.not_due
