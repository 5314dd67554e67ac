"""Domain model: frozen values and enumerations of the standard library only.

A cohort is a list of rows, which find studies. Studies have lists of instances and are retrieved in
chunks; instances lie in the spool until they are archived. A *study reference* is the ledger's own
number for a study: its only name in logs, task names, artifacts and Prefect's database.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import date
from enum import StrEnum
from typing import NamedTuple

StudyReference = int


class Disposition(StrEnum):
    """Whether trying again can help, and who has to act first."""

    TRANSIENT = "transient"
    """Trying again later can help, without anybody doing anything."""
    PERMANENT = "permanent"
    """Trying again will not help; recorded, the others go on."""
    OPERATOR = "operator"
    """A person must change something first; until then the node is disabled."""


class StudyState(StrEnum):
    """Progress of a study. That a run works on it is a live claim, not a state."""

    PENDING = "pending"
    """Found on the PACS; its instance list is not known yet."""
    LISTED = "listed"
    """The PACS's own instance list is in the ledger as the expected set."""
    ARCHIVED = "archived"
    """Every listed instance and, last, the manifest are in the archive."""
    FAILED = "failed"
    """Ended without being archived; the reason says why and whether a rerun can help."""


class InstanceState(StrEnum):
    """Progress of one SOP instance of a listed study."""

    EXPECTED = "expected"
    """On the PACS's list and not received yet."""
    RECEIVED = "received"
    """In the spool, with the SHA-256 computed while its bytes arrived."""
    STORED = "stored"
    """In the archive, which has confirmed its bytes."""
    REJECTED = "rejected"
    """Left out of the archive, for the recorded reason."""


class Verdict(StrEnum):
    """Result of one cohort row. Each row ends with exactly one."""

    ARCHIVED = "archived"
    INCOMPLETE = "incomplete"
    """Archived without instances that the PACS does not send, as a person has accepted."""
    PARTIAL = "partial"
    NOT_FOUND = "not-found"
    AMBIGUOUS = "ambiguous"
    EXCLUDED = "excluded"
    FAILED = "failed"
    FAULTY = "faulty"
    """The line of the cohort file cannot be used, and was set apart."""
    PENDING = "pending"
    """No verdict yet: the work on the row has not ended."""

    @property
    def is_as_wanted(self) -> bool:
        """Whether the row has ended as people want it: archived, accepted, or excluded."""
        return self in (Verdict.ARCHIVED, Verdict.INCOMPLETE, Verdict.EXCLUDED)

    @property
    def is_without_studies(self) -> bool:
        """Whether the query for the row was answered, and no study is to be pulled for it."""
        return self in (Verdict.NOT_FOUND, Verdict.EXCLUDED)

    @property
    def has_failures(self) -> bool:
        """Whether the work on the row failed, as a whole or in part."""
        return self in (Verdict.FAILED, Verdict.PARTIAL)


class Evidence(StrEnum):
    """Evidence by which a study was found complete, strongest first."""

    INSTANCE_LIST = "instance-list"
    """The PACS's own list of its instances."""
    SERIES_COUNTS = "series-counts"
    """The PACS's list of its series, and the number of instances in each."""
    SUBOPERATION_COUNTS = "suboperation-counts"
    """The counters in the final response of a retrieve of the whole study."""

    def satisfies(self, weakest: Evidence) -> bool:
        """Whether it is at least as strong."""
        order = list(Evidence)
        return order.index(self) <= order.index(weakest)


class Level(StrEnum):
    """Depth of a verification of archived objects; each includes those before it."""

    EXISTS = "exists"
    SIZE = "size"
    CHECKSUM = "checksum"
    """The SHA-256 the store keeps beside the object; no download where it keeps one."""
    READ = "read"
    """The SHA-256 of the bytes, which are downloaded."""


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
    """How instances are retrieved from a node, PS3.4 C.4.2 and C.4.3, PS3.18 10.4."""

    C_MOVE = "c-move"
    C_GET = "c-get"
    WADO_RS = "wado-rs"


@dataclass(frozen=True, slots=True)
class DateRange:
    """A closed range of StudyDate; either end may be open (None)."""

    first: date | None
    last: date | None

    def __contains__(self, day: date) -> bool:
        after = self.first is None or self.first <= day
        before = self.last is None or day <= self.last
        return after and before

    @property
    def text(self) -> str:
        """As it is written in a cohort list: a day, or two with a dash, either end left open."""
        first, last = (
            "" if day is None else day.isoformat().replace("-", "")
            for day in (self.first, self.last)
        )
        return first if first == last else f"{first}-{last}"


@dataclass(frozen=True, slots=True)
class Pattern:
    """Pattern of a text.

    Either with ``*`` for any text and ``?`` for one character, without regard to case; or a
    regular expression, which is searched for anywhere in the text.
    """

    text: str
    regex: bool = False


@dataclass(frozen=True, slots=True)
class Filter:
    """Conditions on one attribute of a query response; all that are given must hold.

    ``keyword`` is the keyword of PS3.6. The field of :class:`CohortFilters` that holds the filter
    decides the level of the query. ``PatientAge`` is in years.
    """

    keyword: str
    any_of: tuple[Pattern, ...] = ()
    none_of: tuple[Pattern, ...] = ()
    dates: DateRange | None = None
    at_least: int | None = None
    at_most: int | None = None


@dataclass(frozen=True, slots=True)
class Excluded:
    """Identifiers of what a cohort excludes; all that are given must match."""

    patient_id: str | None = None
    accession_number: str | None = None
    study_instance_uid: str | None = None


@dataclass(frozen=True, slots=True)
class PerPatient:
    """Limit of studies per patient: the latest or the earliest ones by StudyDate."""

    studies: int
    latest: bool = True


@dataclass(frozen=True, slots=True)
class CohortFilters:
    """Filters of a cohort on the studies and series that its rows find, all applied on our side.

    Parameters
    ----------
    studies : tuple of Filter
        Conditions on a study, by its response at STUDY level.
    with_series : tuple of Filter
        Conditions that one of a study's series must meet, by its response at SERIES level.
    series : tuple of Filter
        Conditions on the series that are retrieved; empty for whole studies.
    excluded : frozenset of Excluded
        Studies and patients that are never retrieved.
    per_patient : PerPatient, optional
        Limit of studies per patient in the whole cohort.
    """

    studies: tuple[Filter, ...] = ()
    with_series: tuple[Filter, ...] = ()
    series: tuple[Filter, ...] = ()
    excluded: frozenset[Excluded] = frozenset()
    per_patient: PerPatient | None = None


NO_FILTERS = CohortFilters()
"""No filter: whole studies, all that the rows find."""


@dataclass(frozen=True, slots=True)
class NodeOrder:
    """PACS nodes of a cohort, the preferred one first.

    A row is queried at the next node if the one before has no answer for it; with ``every`` it is
    queried at all of them, and its studies are those that any of them has.

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
        """Parse :attr:`text`."""
        return cls(tuple(re.split("[,+]", text)), every="+" in text)

    @property
    def text(self) -> str:
        """Form in which it is stored and is part of a cohort's identity."""
        return ("+" if self.every else ",").join(self.names)


@dataclass(frozen=True, slots=True)
class FaultyLine:
    """A line of a cohort list that cannot be used, and was set apart so that the others go on."""

    line: int
    faults: tuple[str, ...]
    """In words that repeat no cell."""


@dataclass(frozen=True, slots=True)
class CohortRow:
    """One line of a cohort file. Texts are exactly as written, except for surrounding blanks.

    ``line`` is the line of the file (the header is line 1), and names the row wherever its
    content must not appear. A row without identifiers is one date window of a cohort without a
    list: it stands for every study of ``study_date``, whose ends are then both given, and
    ``line`` counts the date windows from 1. ``patient_name`` and ``patient_birth_date`` are not
    identifiers: the studies that the identifiers find are compared with them.
    ``issuer_of_patient_id`` says whose number ``patient_id`` is; ``other_patient_id`` is another
    number of the same patient, under which studies or instances of the patient are accepted.
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
    issuer_of_patient_id: str | None = None
    other_patient_id: str | None = None


@dataclass(frozen=True, slots=True)
class Study:
    """One response of a STUDY level C-FIND, PS3.4 C.6.2.1.3; texts as the peer sent them.

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
    attributes: tuple[tuple[str, str], ...] = ()
    """Extra requested attributes as (keyword, value) pairs; those that the peer did not return are
    absent."""
    patient_name: str = ""
    patient_birth_date: str = ""
    original: tuple[tuple[str, str], ...] = ()
    guessed: tuple[str, ...] = ()
    issuer_of_patient_id: str = ""


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
    """Identifying elements of a data set; None where one is absent or was not read.

    ``transfer_syntax_uid`` and ``requested_sop_instance_uid`` come from the file meta, which is
    written from the request. ``inspected`` is False for a deflated data set, which is not read.
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
    """A received instance, stored in the spool under ``name`` for ``study``.

    ``sha256`` (hexadecimal) and ``size_bytes`` are of the whole Part 10 file, computed as it was
    written.
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
    """Studies that are retrieved together from one node. ``number`` is unique in a run."""

    number: int
    node: str
    studies: tuple[StudyReference, ...]


@dataclass(frozen=True, slots=True)
class ArchivedInstance:
    """Result of archiving one instance."""

    key: str
    sha256: str
    size_bytes: int
    version_id: str | None = None
    already_there: bool = False
    """Nothing was written: the archive had the same bytes already."""


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
    """A listed instance that is not in the archive, with the reason code.

    The site's policy leaves it out, or the PACS did not send it and a person has accepted that.
    """

    series_instance_uid: str
    sop_instance_uid: str
    reason: str


@dataclass(frozen=True, slots=True)
class StudyManifest:
    """Manifest of an archived study, written after everything it names."""

    study_instance_uid: str
    node: str
    evidence: Evidence
    listed_at: str
    instances: tuple[ManifestInstance, ...]
    withheld: tuple[WithheldInstance, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    selection: str = ""
    """The filter of series, as text; empty for whole studies."""
    unwanted_series: tuple[str, ...] = ()
    """UIDs of the listed series that the filter leaves out; they are not in the archive."""
    missing: tuple[WithheldInstance, ...] = ()
    """Listed instances that never came. With any, the study is not whole, and a person has
    accepted it so."""
    accepted_by: str = ""
    """Who has accepted that, as the ledger has it; empty where nothing is missing."""
    accepted_at: str = ""
    """When, ISO 8601 in UTC."""

    @property
    def entries(self) -> tuple[ManifestInstance | WithheldInstance, ...]:
        """All instances that it names: archived, left out or missing."""
        return (*self.instances, *self.withheld, *self.missing)

    @property
    def keys(self) -> set[InstanceKey]:
        """Their keys."""
        return {InstanceKey(e.series_instance_uid, e.sop_instance_uid) for e in self.entries}


@dataclass(frozen=True, slots=True)
class RowVerdict:
    """Verdict of one cohort row. ``reason`` is a code of :mod:`prefect_dicom.core.reasons`."""

    line: int
    verdict: Verdict
    reason: str
    studies: tuple[StudyReference, ...] = ()
    expected_instances: int = 0
    archived_instances: int = 0
    withheld_instances: int = 0
    size_bytes: int = 0
    gaps: tuple[str, ...] = ()
    """Days and modalities in which the PACS may have more studies of the row."""
    evidence: Evidence | None = None
    """The weakest evidence of its archived studies; None if there are none."""
    nodes: tuple[str, ...] = ()
    """Nodes that its studies were requested from; one that failed has a colon and the reason."""
    faults: tuple[str, ...] = ()
    """What is wrong with its line, where it was set apart."""
    missing_instances: int = 0
    """Instances that its archived studies lack, as a person has accepted."""
