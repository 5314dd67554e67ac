"""The nouns. Frozen values from the standard library only; everything else speaks in them.

A cohort is a list of rows. A row finds studies; a study lists its instances; studies are
retrieved in chunks; what arrives lies in the spool until it is in the archive. A *study
reference* is the ledger's own number for a study: the only name of it that may appear in logs,
task names, artifacts and Prefect's database.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import date
from enum import StrEnum
from typing import NamedTuple

StudyReference = int


class Disposition(StrEnum):
    """The one decision an error carries: may it be tried again, and by whom."""

    TRANSIENT = "transient"
    """Trying again later can help, without anybody doing anything."""
    PERMANENT = "permanent"
    """Trying again will not help; recorded, the others go on."""
    OPERATOR = "operator"
    """A person must change something first; the node is left alone until then."""


class StudyState(StrEnum):
    """How far a study has come. Being worked on is a live claim, not a state."""

    PENDING = "pending"
    """Found on the PACS; its instance list is not known yet."""
    LISTED = "listed"
    """The PACS's own instance list is in the ledger as the expected set."""
    ARCHIVED = "archived"
    """Every listed instance and, last, the manifest are in the archive."""
    FAILED = "failed"
    """It ended without being archived; the reason says why and whether a rerun can help."""


class InstanceState(StrEnum):
    """How far one SOP instance of a listed study has come."""

    EXPECTED = "expected"
    """On the PACS's list, not here yet."""
    RECEIVED = "received"
    """In the spool, with the SHA-256 taken as its bytes arrived."""
    STORED = "stored"
    """In the archive; the store answered for its bytes."""
    REJECTED = "rejected"
    """Arrived (or cannot arrive) and is left out, for the reason recorded."""


class Verdict(StrEnum):
    """What became of one cohort row. Each row ends in exactly one."""

    ARCHIVED = "archived"
    PARTIAL = "partial"
    NOT_FOUND = "not-found"
    AMBIGUOUS = "ambiguous"
    EXCLUDED = "excluded"
    FAILED = "failed"
    PENDING = "pending"
    """Not a verdict but its absence: the work on this row has not ended."""


class Evidence(StrEnum):
    """What the completeness of a study was judged by, strongest first."""

    INSTANCE_LIST = "instance-list"
    """The PACS's own list of its instances."""
    SERIES_COUNTS = "series-counts"
    """Its list of series, and how many instances it counts in each."""
    SUBOPERATION_COUNTS = "suboperation-counts"
    """How many objects it says it has sent for a retrieve of the whole study."""

    def satisfies(self, weakest: Evidence) -> bool:
        """Whether it is at least as strong."""
        order = list(Evidence)
        return order.index(self) <= order.index(weakest)


class Level(StrEnum):
    """How hard to look at an archived object, each including those before it."""

    EXISTS = "exists"
    SIZE = "size"
    CHECKSUM = "checksum"
    """The SHA-256 the store keeps beside the object; no download where it keeps one."""
    READ = "read"
    """The bytes themselves."""


class RequestedState(StrEnum):
    """The state that people request of the runs of a cohort; later members outrank earlier ones."""

    RUNNING = "running"
    PAUSED = "paused"
    """Send no request until the cohort is resumed."""
    CANCELLED = "cancelled"
    """End now; a rerun continues from there."""


class InformationModel(StrEnum):
    """Query/Retrieve information models, PS3.4 C.6."""

    STUDY_ROOT = "study-root"
    PATIENT_ROOT = "patient-root"


class RetrieveMethod(StrEnum):
    """How a node hands over its instances, PS3.4 C.4.2 and C.4.3."""

    C_MOVE = "c-move"
    C_GET = "c-get"


@dataclass(frozen=True, slots=True)
class DateRange:
    """A closed range of StudyDate; either end may be open (None)."""

    first: date | None
    last: date | None

    def __contains__(self, day: date) -> bool:
        after = self.first is None or self.first <= day
        before = self.last is None or day <= self.last
        return after and before


@dataclass(frozen=True, slots=True)
class Pattern:
    """What a text may look like.

    With ``*`` for any text and ``?`` for one character, in whatever case; or a regular
    expression, found anywhere in the text.
    """

    text: str
    regex: bool = False


@dataclass(frozen=True, slots=True)
class Filter:
    """What one attribute of an answer has to be; conditions that are given hold together.

    ``keyword`` is DICOM's, and says with the filter's place in a :class:`CohortFilters` at which
    level it is asked for. ``PatientAge`` is in years.
    """

    keyword: str
    any_of: tuple[Pattern, ...] = ()
    none_of: tuple[Pattern, ...] = ()
    dates: DateRange | None = None
    at_least: int | None = None
    at_most: int | None = None


@dataclass(frozen=True, slots=True)
class Excluded:
    """Who or what is not wanted; what is given holds together, as in a :class:`CohortRow`."""

    patient_id: str | None = None
    accession_number: str | None = None
    study_instance_uid: str | None = None


@dataclass(frozen=True, slots=True)
class PerPatient:
    """How many studies of a patient a cohort takes at most, and from which end by StudyDate."""

    studies: int
    latest: bool = True


@dataclass(frozen=True, slots=True)
class CohortFilters:
    """What a cohort wants of what its rows find. All of it is checked on our side.

    Parameters
    ----------
    studies : tuple of Filter
        What a study has to be, by its answer at STUDY level.
    with_series : tuple of Filter
        What one of a study's series has to be, by its answer at SERIES level.
    series : tuple of Filter
        What a series has to be to be retrieved; empty for whole studies.
    excluded : frozenset of Excluded
        What is never taken, whatever finds it.
    per_patient : PerPatient, optional
        The most that is taken of one patient in the whole cohort.
    """

    studies: tuple[Filter, ...] = ()
    with_series: tuple[Filter, ...] = ()
    series: tuple[Filter, ...] = ()
    excluded: frozenset[Excluded] = frozenset()
    per_patient: PerPatient | None = None


NO_FILTERS = CohortFilters()
"""Everything that the rows find, and whole studies of it."""


@dataclass(frozen=True, slots=True)
class NodeOrder:
    """The PACS nodes that a cohort is asked of, the preferred one first.

    A row is asked of the next node where the one before has no answer for it; with ``every`` it
    is asked of all of them, and has what any of them has.

    Examples
    --------
    >>> NodeOrder.of("main,vna") == NodeOrder(("main", "vna"))
    True
    >>> NodeOrder(("main", "vna"), every=True).text
    'main+vna'
    """

    names: tuple[str, ...]
    every: bool = False

    @classmethod
    def of(cls, text: str) -> NodeOrder:
        """What :attr:`text` stands for."""
        return cls(tuple(re.split("[,+]", text)), every="+" in text)

    @property
    def text(self) -> str:
        """As it is kept, and part of a cohort's identity: of one node its name."""
        return ("+" if self.every else ",").join(self.names)


@dataclass(frozen=True, slots=True)
class CohortRow:
    """One line of a cohort file. Texts are exactly as written, but for surrounding blanks.

    ``line`` is the line of the file (the header is line 1), and the row's name wherever a row
    has to be named without its content. A row without identifiers is one window of a cohort
    that has no list: it stands for every study of ``study_date``, whose ends are then both
    given, and ``line`` counts the windows from 1. ``patient_name`` and ``patient_birth_date``
    identify nobody: what the identifiers find is compared with them.
    """

    line: int
    patient_id: str | None = None
    accession_number: str | None = None
    study_instance_uid: str | None = None
    study_date: DateRange | None = None
    modality: str | None = None
    study_description: str | None = None
    patient_name: str | None = None
    patient_birth_date: date | None = None


@dataclass(frozen=True, slots=True)
class Study:
    """One answer of a STUDY level C-FIND, PS3.4 C.6.2.1.3; texts as the peer sent them.

    ``original`` has the bytes (hexadecimal) of each text beyond ASCII, ``guessed`` the keywords of
    those that could not be decoded by the character set the answer declares.
    """

    study_instance_uid: str
    patient_id: str = ""
    accession_number: str = ""
    study_date: str = ""
    modalities: tuple[str, ...] = ()
    study_description: str = ""
    number_of_series: int | None = None
    number_of_instances: int | None = None
    told: tuple[tuple[str, str], ...] = ()
    """Keyword and value of further attributes that were asked for; those not answered lack."""
    patient_name: str = ""
    patient_birth_date: str = ""
    original: tuple[tuple[str, str], ...] = ()
    guessed: tuple[str, ...] = ()


class InstanceKey(NamedTuple):
    """Identity of an instance within its study.

    The series belongs to it: a PACS may list one SOP Instance UID in two series, as two
    instances with different bytes, and both are then expected.
    """

    series_instance_uid: str
    sop_instance_uid: str


@dataclass(frozen=True, slots=True)
class Instance:
    """One line of the PACS's own instance list (IMAGE level C-FIND)."""

    key: InstanceKey
    sop_class_uid: str = ""


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """A C-STORE request as received, PS3.7 9.1.1.1, and the association it came over."""

    message_id: int
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    calling_ae_title: str = ""
    called_ae_title: str = ""
    peer_address: str = ""
    move_originator_ae_title: str | None = None
    move_originator_message_id: int | None = None


@dataclass(frozen=True, slots=True)
class Identity:
    """What a data set says of itself; None where the element is absent or was not read.

    ``transfer_syntax_uid`` and ``requested_sop_instance_uid`` come from the file meta, which we
    wrote from the request. ``inspected`` is False where the data set could not be looked into
    without inflating it.
    """

    transfer_syntax_uid: str
    sop_class_uid: str | None = None
    sop_instance_uid: str | None = None
    study_instance_uid: str | None = None
    series_instance_uid: str | None = None
    patient_id: bytes | None = None
    specific_character_set: str | None = None
    modality: str | None = None
    inspected: bool = True
    requested_sop_instance_uid: str | None = None


@dataclass(frozen=True, slots=True)
class ReceivedInstance:
    """A received instance that lies in the spool under ``name`` for ``study``.

    ``sha256`` (hex) and ``size_bytes`` are of the whole Part 10 file, taken as it was written.
    """

    study: StudyReference
    key: InstanceKey
    sop_class_uid: str
    transfer_syntax_uid: str
    sha256: str
    size_bytes: int
    name: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """Studies of one node that are retrieved together. ``number`` is unique in a run."""

    number: int
    node: str
    studies: tuple[StudyReference, ...]


@dataclass(frozen=True, slots=True)
class ArchivedInstance:
    """What the archive answered for one instance."""

    key: str
    sha256: str
    size_bytes: int
    version_id: str | None = None
    already_there: bool = False
    """Nothing was written: the same bytes were in the archive before."""


@dataclass(frozen=True, slots=True)
class ManifestInstance:
    """One instance in a study's manifest."""

    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    key: str
    size_bytes: int
    sha256: str
    version_id: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WithheldInstance:
    """A listed instance that the site's policy leaves out of the archive, and why."""

    series_instance_uid: str
    sop_instance_uid: str
    reason: str


@dataclass(frozen=True, slots=True)
class StudyManifest:
    """The proof of one archived study, written after everything it names."""

    study_instance_uid: str
    node: str
    evidence: Evidence
    listed_at: str
    instances: tuple[ManifestInstance, ...]
    withheld: tuple[WithheldInstance, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    selection: str = ""
    """Which of the study's series were wanted, in words; empty for all of them."""
    unwanted_series: tuple[str, ...] = ()
    """The UIDs of those that the PACS listed and that were not: they are not in the archive."""


@dataclass(frozen=True, slots=True)
class RowVerdict:
    """The end of one cohort row. ``reason`` is a code of :mod:`prefect_dicom.core.reasons`."""

    line: int
    verdict: Verdict
    reason: str
    studies: tuple[StudyReference, ...] = ()
    expected_instances: int = 0
    archived_instances: int = 0
    withheld_instances: int = 0
    size_bytes: int = 0
    gaps: tuple[str, ...] = ()
    """Windows (days, modalities) in which the PACS may have more studies of the row."""
    evidence: Evidence | None = None
    """The weakest proof among the archived studies; None where there are none."""
    nodes: tuple[str, ...] = ()
    """The nodes its studies were asked of; with a colon and the reason, where one has failed."""
