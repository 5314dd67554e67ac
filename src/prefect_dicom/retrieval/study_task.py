"""What a run knows of one study while it works on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefect_dicom.core.model import (
    Evidence,
    Instance,
    InstanceKey,
    InstanceState,
    ReceivedInstance,
    StudyReference,
)
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.core.uids import is_safe_key, is_uid
from prefect_dicom.dicom.validation import Expected
from prefect_dicom.ledger import Claim


@dataclass(slots=True)
class StudyTask:
    """What this run knows of one claimed study. One thread works on it at a time."""

    claim: Claim
    listed: dict[InstanceKey, Instance] = field(default_factory=dict)
    states: dict[InstanceKey, InstanceState] = field(default_factory=dict)
    received: dict[InstanceKey, ReceivedInstance] = field(default_factory=dict)
    warnings: dict[InstanceKey, tuple[str, ...]] = field(default_factory=dict)
    stored_hashes: dict[InstanceKey, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    unlisted: dict[str, InstanceKey] = field(default_factory=dict)
    set_aside: int = 0
    """Faulty arrivals that are to be asked for once more before they are judged."""
    evidence: Evidence = Evidence.INSTANCE_LIST
    series: Mapping[str, int | None] | None = None
    """The series and their counts, where no instances are listed; None: neither are series."""
    number_of_instances: int | None = None
    """What the PACS counts in the whole study, where it lists no series."""
    came: set[InstanceKey] = field(default_factory=set)
    """What the last request for the whole study brought, be it for the second time."""
    places: dict[str, tuple[InstanceKey, int, int]] = field(default_factory=dict)
    """Of what lies in the spool, by hash: what it is, and which file; one that comes again is
    another file of the same name."""
    confirmed: bool = False
    """Such a request brought exactly what the PACS said it had sent, and that is all there is."""
    remarks: set[str] = field(default_factory=set)
    """What the manifest says about the study as a whole; reason codes."""
    listed_at: str = ""
    failure: str | None = None
    """Why the study cannot be archived, as far as is known; a reason code."""
    unwanted: tuple[str, ...] = ()
    """The UIDs of the series that the PACS lists and that the cohort does not want."""
    gone: bool = False
    """Whether the PACS does not have it any more; nothing of it is asked for then."""
    elsewhere: set[InstanceKey] = field(default_factory=set)
    """What is here of it from another node: it counts when this one has sent the same bytes."""

    @property
    def reference(self) -> StudyReference:
        """The study's reference."""
        return self.claim.reference

    @property
    def failure_stands(self) -> bool:
        """Whether the study keeps its failure though no instance is missing."""
        return self.failure is not None and reason_for(self.failure).stands_though_complete

    @property
    def failure_is_explained(self) -> bool:
        """Whether its failure explains missing instances better than the end of a request."""
        return self.failure is not None and reason_for(self.failure).says_more_than_request

    @property
    def failure_needs_diagnosis(self) -> bool:
        """Whether its failure may have several causes, which further queries tell apart."""
        return self.failure is not None and reason_for(self.failure).needs_diagnosis

    def missing(self) -> list[InstanceKey]:
        """The listed instances that have neither arrived nor been given up."""
        if self.gone:
            return []
        return [
            key
            for key in self.listed
            if self.states.get(key) is InstanceState.EXPECTED or key in self.elsewhere
        ]

    @property
    def is_listed(self) -> bool:
        """Whether the PACS lists its instances."""
        return self.evidence is Evidence.INSTANCE_LIST

    def admits(self, key: InstanceKey) -> bool:
        """Whether an object that is not on the list becomes part of it by arriving."""
        if self.is_listed or not all(map(is_safe_key, key)):
            return False
        return self.series is None or key.series_instance_uid in self.series

    def key_of(self, key: InstanceKey) -> InstanceKey:
        """The key, in the study's only series where the object does not tell which it is in."""
        if key.series_instance_uid or self.series is None or len(self.series) != 1:
            return key
        return InstanceKey(*self.series, key.sop_instance_uid)

    def arrived(self) -> Counter[str]:
        """How many instances are here, by series."""
        return Counter(
            key.series_instance_uid
            for key in self.listed
            if self.states[key] is not InstanceState.EXPECTED and key not in self.elsewhere
        )

    def short(self) -> list[str]:
        """The series of which less is here than the PACS counts."""
        arrived = self.arrived()
        return [uid for uid, count in (self.series or {}).items() if arrived[uid] < (count or 0)]

    @property
    def contradicts_counts(self) -> bool:
        """Whether more is here of a series than the PACS counts in it."""
        if self.evidence is not Evidence.SERIES_COUNTS:
            return False
        return any(count > self.series[uid] for uid, count in self.arrived().items())

    @property
    def incomplete(self) -> bool:
        """Whether something is to be asked for, by what its completeness is judged by."""
        if self.gone:
            return False
        if self.missing():
            return True
        if self.evidence is Evidence.SERIES_COUNTS:
            return bool(self.short()) or self.contradicts_counts
        return not self.is_listed and not self.confirmed

    @property
    def untouched(self) -> bool:
        """Whether none of its instances has been seen yet, in this run or before."""
        return not self.set_aside and len(self.missing()) == len(self.listed)

    def sop_class_of(self, key: InstanceKey) -> str:
        """The SOP class of an instance as listed; empty where the PACS does not tell it."""
        return self.listed[key].sop_class_uid if key in self.listed else ""

    def class_to_propose(self, key: InstanceKey) -> str:
        """The SOP class to propose for an instance; empty where the PACS tells none that is one."""
        sop_class = self.sop_class_of(key)
        return sop_class if is_uid(sop_class) else ""

    def put_on_list(self, key: InstanceKey, sop_class: str | None) -> list[Instance]:
        """List what has come, unless it is listed; what that adds to the list."""
        if key in self.listed:
            return []
        self.listed[key] = Instance(key, sop_class or "")
        self.states[key] = InstanceState.EXPECTED
        return [self.listed[key]]

    def see(self, path: Path, key: InstanceKey) -> None:
        """Remember an object in the spool that has been looked at."""
        self.seen.add(path.stem)
        if not self.is_listed or key in self.elsewhere:
            facts = path.stat()
            self.places[path.stem] = (key, facts.st_ino, facts.st_mtime_ns)

    def see_again(self, path: Path) -> InstanceKey | None:
        """Notice that an object which lies in the spool has come once more; which one, if so."""
        if path.stem in self.places:
            key, *file = self.places[path.stem]
            facts = path.stat()
            if [facts.st_ino, facts.st_mtime_ns] != file:
                self.places[path.stem] = (key, facts.st_ino, facts.st_mtime_ns)
                self.came.add(key)
                return key
        return None

    def expects(self, key: InstanceKey) -> Expected:
        """What an object of this key is validated against."""
        return Expected(
            self.claim.study_instance_uid,
            key,
            self.sop_class_of(key),
            self.claim.patient_id or None,
        )
