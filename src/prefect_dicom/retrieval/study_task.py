"""Study task: what a run knows of one study while it retrieves and archives it.

The fields of a :class:`StudyTask` and of its parts are written by their own methods only, each of
which is named for what has happened (``record_listed``, ``record_received``, ``fail``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Final

from prefect_dicom.core.model import (
    Evidence,
    Instance,
    InstanceKey,
    InstanceState,
    ReceivedInstance,
    StudyReference,
)
from prefect_dicom.core.uids import is_safe_key, is_uid
from prefect_dicom.dicom.validation import Expected
from prefect_dicom.ledger import Claim
from prefect_dicom.network.retrieve_result import RetrieveResult
from prefect_dicom.retrieval.accepted import AcceptedOfStudy
from prefect_dicom.retrieval.attempts import Attempts
from prefect_dicom.retrieval.held_instances import HeldInstances
from prefect_dicom.retrieval.spool_files import SpoolFiles


@dataclass(frozen=True, slots=True)
class StudyContent:
    """What the PACS lists or counts of a study, by which its completeness is judged.

    Parameters
    ----------
    evidence : Evidence
        What completeness is judged by.
    series : mapping of SeriesInstanceUID to int or None, optional
        The series and how many instances the PACS counts in each, where it lists no instances.
        None: it does not list series either.
    number_of_instances : int, optional
        How many instances the PACS counts in the whole study, where it lists no series.
    listed_at : str
        When it was read, ISO 8601 in UTC.
    """

    evidence: Evidence = Evidence.INSTANCE_LIST
    series: Mapping[str, int | None] | None = None
    number_of_instances: int | None = None
    listed_at: str = ""

    @property
    def is_listed(self) -> bool:
        """Whether the PACS lists the instances."""
        return self.evidence is Evidence.INSTANCE_LIST

    @property
    def counted_instances(self) -> int:
        """How many instances the PACS counts in the series that it lists."""
        return sum(count or 0 for count in (self.series or {}).values())

    def admits(self, key: InstanceKey) -> bool:
        """Whether an instance that is not on the list is added to it on receipt."""
        if self.is_listed or not all(map(is_safe_key, key)):
            return False
        return self.series is None or key.series_instance_uid in self.series

    def key_of(self, key: InstanceKey) -> InstanceKey:
        """The key, with the study's only series where the instance does not name its own."""
        if key.series_instance_uid or self.series is None or len(self.series) != 1:
            return key
        (series,) = self.series
        return InstanceKey(series, key.sop_instance_uid)


class InstanceTable:
    """Listed instances of a study and how far each has come."""

    def __init__(self) -> None:
        self._listed: dict[InstanceKey, Instance] = {}
        self._states: dict[InstanceKey, InstanceState] = {}
        self._received: dict[InstanceKey, ReceivedInstance] = {}
        self._findings: dict[InstanceKey, tuple[str, ...]] = {}
        self._stored_hashes: dict[InstanceKey, str] = {}
        self._from_elsewhere: set[InstanceKey] = set()

    @property
    def listed(self) -> Mapping[InstanceKey, Instance]:
        """The expected instances; where the PACS lists none, those that have been received."""
        return self._listed

    @property
    def received(self) -> Mapping[InstanceKey, ReceivedInstance]:
        """The instances in the spool that wait to be stored in the archive."""
        return self._received

    def stored(self) -> list[InstanceKey]:
        """The instances that are in the archive."""
        return [key for key, state in self._states.items() if state is InstanceState.STORED]

    def missing(self) -> list[InstanceKey]:
        """The listed instances that have neither been received nor been rejected.

        One that another node has sent is missing until this node has sent the same bytes.
        """
        return [
            key
            for key in self._listed
            if self._states.get(key) is InstanceState.EXPECTED or key in self._from_elsewhere
        ]

    def count_by_series(self) -> Counter[str]:
        """How many instances are not missing, by SeriesInstanceUID."""
        return Counter(
            key.series_instance_uid
            for key in self._listed
            if self._states[key] is not InstanceState.EXPECTED and key not in self._from_elsewhere
        )

    def known_hash(self, key: InstanceKey) -> str | None:
        """The SHA-256 (hex) of the bytes that are received or stored; None where there are none."""
        received = self._received.get(key)
        return received.sha256 if received else self._stored_hashes.get(key)

    def findings_of(self, key: InstanceKey) -> tuple[str, ...]:
        """What validation found in a received instance; reason codes."""
        return self._findings.get(key, ())

    def has_findings(self, key: InstanceKey) -> bool:
        """Whether this run has validated the instance."""
        return key in self._findings

    def is_from_elsewhere(self, key: InstanceKey) -> bool:
        """Whether another node has sent the instance, and this node has not confirmed it."""
        return key in self._from_elsewhere

    def sop_class_of(self, key: InstanceKey) -> str:
        """The SOP class of an instance as listed; empty where the PACS does not return it."""
        return self._listed[key].sop_class_uid if key in self._listed else ""

    def class_to_propose(self, key: InstanceKey) -> str:
        """The SOP class to propose for an instance; empty where no valid one is listed."""
        sop_class = self.sop_class_of(key)
        return sop_class if is_uid(sop_class) else ""

    def record_listed(self, instances: Iterable[Instance]) -> None:
        """Replace the list; the states of instances that leave it are kept."""
        self._listed = {instance.key: instance for instance in instances}

    def expect_all(self) -> None:
        """Expect every listed instance."""
        self._states.update(dict.fromkeys(self._listed, InstanceState.EXPECTED))

    def forget_other_nodes(self) -> None:
        """Clear the record of instances that other nodes have sent, before it is read again."""
        self._from_elsewhere.clear()

    def restore(
        self,
        key: InstanceKey,
        state: InstanceState,
        *,
        received: ReceivedInstance | None = None,
        stored_hash: str | None = None,
        from_elsewhere: bool = False,
    ) -> None:
        """Take over the state of an instance from the ledger."""
        self._states[key] = state
        if from_elsewhere:
            self._from_elsewhere.add(key)
        if received is not None:
            self._received[key] = received
        if stored_hash is not None:
            self._stored_hashes[key] = stored_hash

    def add(self, key: InstanceKey, sop_class: str | None) -> list[Instance]:
        """List an instance that was received unlisted. Returns the additions to the list."""
        if key in self._listed:
            return []
        self._listed[key] = Instance(key, sop_class or "")
        self._states[key] = InstanceState.EXPECTED
        return [self._listed[key]]

    def record_received(self, instance: ReceivedInstance, findings: tuple[str, ...]) -> None:
        """A valid instance lies in the spool."""
        key = instance.key
        self._received[key] = instance
        self._findings[key] = findings
        if self._states[key] is InstanceState.EXPECTED:
            self._states[key] = InstanceState.RECEIVED

    def record_findings(self, key: InstanceKey, findings: tuple[str, ...]) -> None:
        """Validation of an instance that an earlier run has received."""
        self._findings[key] = findings

    def record_rejected(self, key: InstanceKey) -> None:
        """The instance is faulty and is left out."""
        self._states[key] = InstanceState.REJECTED

    def record_stored(self, key: InstanceKey, sha256: str) -> None:
        """The instance is in the archive."""
        self._states[key] = InstanceState.STORED
        self._stored_hashes[key] = sha256
        del self._received[key]

    def record_own(self, key: InstanceKey) -> None:
        """The instance no longer counts as sent by another node."""
        self._from_elsewhere.discard(key)

    def expect_lost(self, key: InstanceKey) -> None:
        """Expect a stored instance again that the archive no longer has."""
        self._states[key] = InstanceState.EXPECTED
        del self._stored_hashes[key]

    def expect_again(self, key: InstanceKey) -> ReceivedInstance:
        """Expect a received instance again; returns what had been received."""
        self._states[key] = InstanceState.EXPECTED
        return self._received.pop(key)


class StudyTask:
    """Retrieval and archiving of one claimed study. One thread works on it at a time.

    Parameters
    ----------
    claim : Claim
        The run's right to write about the study.
    """

    def __init__(self, claim: Claim) -> None:
        self.claim: Final = claim
        self.instances: Final = InstanceTable()
        self.files: Final = SpoolFiles()
        self.attempts: Final = Attempts()
        self.held: Final = HeldInstances()
        self.accepted: Final = AcceptedOfStudy()
        self._content = StudyContent()
        self._unwanted: tuple[str, ...] = ()
        self._remarks: set[str] = set()
        self._failure: str | None = None
        self._gone = False
        self._sent: set[InstanceKey] = set()
        self._confirmed = False

    @property
    def reference(self) -> StudyReference:
        """The study's reference."""
        return self.claim.reference

    @property
    def content(self) -> StudyContent:
        """What the PACS lists or counts of the study."""
        return self._content

    @property
    def is_listed(self) -> bool:
        """Whether the PACS lists its instances."""
        return self._content.is_listed

    @property
    def unwanted_series(self) -> tuple[str, ...]:
        """The UIDs of the series that the PACS lists and that the cohort does not want."""
        return self._unwanted

    @property
    def remarks(self) -> AbstractSet[str]:
        """What the manifest notes about the study as a whole; reason codes."""
        return self._remarks

    @property
    def failure(self) -> str | None:
        """Why the study cannot be archived, as far as is known; a reason code."""
        return self._failure

    @property
    def contradicts_counts(self) -> bool:
        """Whether more is here of a series than the PACS counts in it."""
        if self._content.evidence is not Evidence.SERIES_COUNTS:
            return False
        counts = self._content.series or {}
        return any(
            count > (counts[uid] or 0) for uid, count in self.instances.count_by_series().items()
        )

    @property
    def is_incomplete(self) -> bool:
        """Whether something is to be requested, by the evidence that completeness is judged by."""
        if self._gone:
            return False
        if self.missing():
            return True
        if self._content.evidence is Evidence.SERIES_COUNTS:
            return bool(self.short_series()) or self.contradicts_counts
        return not self.is_listed and not self._confirmed

    @property
    def is_untouched(self) -> bool:
        """Whether none of its instances has been received yet, in this run or before."""
        return not self.attempts.faulty_count and len(self.missing()) == len(self.instances.listed)

    def missing(self) -> list[InstanceKey]:
        """The instances that are to be requested; none where the PACS no longer has the study."""
        if self._gone:
            return []
        resting = self.held.resting()
        return [key for key in self.instances.missing() if key not in resting]

    def to_request(self) -> list[InstanceKey]:
        """Those of the missing instances that another request may bring."""
        held_back = self.attempts.held_back()
        return [
            key
            for key in self.missing()
            if key not in held_back and not self.attempts.is_settled(key)
        ]

    def short_series(self) -> list[str]:
        """The UIDs of series of which less is here than the PACS counts."""
        here = self.instances.count_by_series()
        here.update(key.series_instance_uid for key in self.held.resting())
        series = self._content.series or {}
        return [uid for uid, count in series.items() if here[uid] < (count or 0)]

    def expected(self, key: InstanceKey) -> Expected:
        """What an instance of this key is validated against."""
        return Expected(
            self.claim.study_instance_uid,
            key,
            self.instances.sop_class_of(key),
            self.claim.patient_id or None,
            self.accepted.patient_ids,
        )

    # --- transitions

    def record_listed(self, content: StudyContent, instances: Iterable[Instance]) -> None:
        """The PACS's list of the study has been read and is in the ledger."""
        self._content = content
        self.instances.record_listed(instances)
        self._confirmed = False
        self._remarks.discard("series-count-wrong")

    def record_selection(self, unwanted: Iterable[str]) -> None:
        """These series (UIDs) are not wanted by the cohort."""
        self._unwanted = tuple(unwanted)

    def distrust_counts(self) -> None:
        """Judge completeness without the counts of series, which are wrong."""
        self._remarks.add("series-count-wrong")
        self._content = replace(self._content, evidence=Evidence.SUBOPERATION_COUNTS)

    def record_gone(self) -> None:
        """The PACS does not have the study any more."""
        self._gone = True
        self._failure = "study-gone"

    def begin_request(self) -> None:
        """Forget what the request before has brought."""
        self._sent.clear()

    def record_sent(self, key: InstanceKey) -> None:
        """The current request has brought an instance, be it one that is here already."""
        self._sent.add(key)

    def record_end(self, level: str, outcome: RetrieveResult) -> None:
        """A request has ended; of a whole study its counters may confirm that this is all."""
        self._confirmed = level == "STUDY" and _is_confirmed(self, self._sent, outcome)

    def remark(self, code: str) -> None:
        """Note something about the study as a whole in its manifest; a reason code."""
        self._remarks.add(code)

    def supersede(self, key: InstanceKey) -> None:
        """Drop what another node had sent of an instance."""
        held = self.instances.expect_again(key)
        self.instances.record_own(key)
        self.files.stop_watching(held.sha256)

    def record_damaged(self, instance: ReceivedInstance) -> None:
        """The spool has damaged a received instance: expect it again."""
        self.instances.expect_again(instance.key)
        self.files.examine_again(instance.sha256)

    def fail(self, code: str) -> None:
        """Set why the study cannot be archived, as far as is known; a reason code."""
        self._failure = code

    def clear_failure(self) -> None:
        """Nothing is missing: what had failed no longer matters."""
        self._failure = None


def _is_confirmed(task: StudyTask, sent: AbstractSet[InstanceKey], outcome: RetrieveResult) -> bool:
    """Whether a request for a whole study brought what the peer says it sent, and all there is."""
    sent_all = outcome.reports_success and outcome.lost is None
    others = (outcome.failed, outcome.warning, outcome.remaining or 0)
    counted = task.content.number_of_instances or task.claim.number_of_instances or 0
    return (
        sent_all
        and others == (0, 0, 0)
        and outcome.completed == len(sent) > 0
        and sent == task.instances.listed.keys() | {*task.held.keys}
        and counted <= len(sent)
    )
