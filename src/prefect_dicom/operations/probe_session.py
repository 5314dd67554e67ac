"""Bounded, harmless conversation with a node under probe, and the facts found by it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefect_dicom.config.node import PacsNode
from prefect_dicom.config.site import Site
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import InformationModel
from prefect_dicom.core.uids import is_safe_key
from prefect_dicom.network.probe import Answers, ask
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.network.status import CANCEL
from prefect_dicom.network.storage_scp import ReceiverLease

MOST_REQUESTS = 120
"""Limit on associations, queries and retrieves for one node."""
MOST_ANSWERS = 2000
"""Limit on the answers to one query."""
MOST_INSTANCES = 3
"""Limit on the instances of one retrieve."""
FEW = 20
"""Limit on the answers to a query that names one entity."""

CAPPED = {CANCEL, 0xB001, 0xA700}
"""Final statuses that mean an incomplete list of answers."""
LIST_KEYS = ("StudyInstanceUID", "PatientID", "PatientName", "AccessionNumber", "StudyDate")
OPTIONAL_KEYS = (
    "ModalitiesInStudy",
    "StudyDescription",
    "NumberOfStudyRelatedSeries",
    "NumberOfStudyRelatedInstances",
)

_TIMEOUT_SECONDS = {"acse_seconds": 10.0, "find_seconds": 30.0, "first_byte_seconds": 120.0}
_STALL_SECONDS = 30.0
_MOST_IN_A_ROW = 3
"""Failed queries in a row after which the failure is the node's and not the query's."""


class RequestsSpent(Exception):
    """The limit on requests is reached."""


@dataclass
class ProbedSeries:
    """A series of the probed study."""

    uid: str
    images: list[tuple[str, str]] = field(default_factory=list)
    """SOP Instance UID and SOP Class UID of each listed instance."""
    count: int | None = None
    """Number of Series Related Instances, where the node answers it."""


class ProbeSession:
    """One node under probe: its requestor, the request budget, and the facts found.

    Parameters
    ----------
    site : Site
        Site of the node.
    node : PacsNode
        Node to probe; its timeouts are shortened.

    Attributes
    ----------
    facts : dict
        Fields of :class:`~prefect_dicom.config.capabilities.NodeCapabilities` found so far.
    notes : list of str
        Text for people: what could not be probed, and why.
    requests, instances : int
        Requests sent and instances received so far.
    lease : ReceiverLease or None
        Lease of the receiver for C-MOVE; None without a receiver.
    """

    def __init__(self, site: Site, node: PacsNode) -> None:
        timeouts = {
            key: min(most, getattr(node.timeouts, key)) for key, most in _TIMEOUT_SECONDS.items()
        }
        timeouts["stall_seconds"] = min(_STALL_SECONDS, node.timeouts.stall_seconds)
        shortened = node.timeouts.model_copy(update=timeouts)
        self.site = site
        self.node = node.model_copy(update={"timeouts": shortened})
        self.requestor = Requestor(self.node)
        self.lease: ReceiverLease | None = None
        self.facts: dict[str, Any] = {}
        self.notes: list[str] = []
        self.requests = 0
        self.instances = 0
        self._failed_in_a_row = 0

    @property
    def by_patient(self) -> bool:
        """Whether queries use the Patient Root model."""
        return self.node.information_model is InformationModel.PATIENT_ROOT

    def spend(self) -> None:
        """Count a request.

        Raises
        ------
        RequestsSpent
            The limit is reached.
        """
        if self.requests >= MOST_REQUESTS:
            self.notes.append(f"not all was tried: {MOST_REQUESTS} requests are enough")
            raise RequestsSpent
        self.requests += 1

    def spend_alone(self) -> None:
        """Count a request and close the association: some nodes serve one at a time."""
        self.spend()
        self.requestor.close()

    def ask(
        self,
        level: str,
        match: Mapping[str, str | Sequence[str]],
        wanted: Iterable[str] = (),
        most: int = FEW,
        character_set: str | None = None,
    ) -> Answers:
        """Send one query; without status and answers if the association ended over it."""
        self.spend()
        try:
            answers = ask(
                self.requestor, level, match, wanted, most=most, character_set=character_set
            )
        except PacsError as error:
            self._failed_in_a_row += 1
            if not error.reason.unanswered or self._failed_in_a_row >= _MOST_IN_A_ROW:
                raise
            return Answers(None, ())
        self._failed_in_a_row = 0
        return answers

    def is_cut(self, answers: Answers) -> bool:
        """Whether there may be more answers, beyond the node's limit or ours."""
        return bool(answers.rows) and (
            answers.status is None
            or answers.status in CAPPED
            or len(answers.rows) == self.facts.get("answer_cap")
        )

    def unique_keys(self, study: Mapping[str, bytes]) -> dict[str, str]:
        """Return the unique keys of a study in the node's information model."""
        keys = {"StudyInstanceUID": ascii_value(study, "StudyInstanceUID")}
        if self.by_patient:
            keys["PatientID"] = ascii_value(study, "PatientID")
        return keys

    def can_be_named(self, study: Mapping[str, bytes]) -> bool:
        """Whether a query for this study alone can be written."""
        if not is_safe_key(ascii_value(study, "StudyInstanceUID")):
            return False
        return not self.by_patient or is_safe_key(ascii_value(study, "PatientID"))


def raw_value(row: Mapping[str, bytes], keyword: str) -> str:
    """Return a value of an answer, one character per byte; empty if absent."""
    return row.get(keyword, b"").decode("latin-1")


def ascii_value(row: Mapping[str, bytes], keyword: str) -> str:
    """Return a value of an answer if it is ASCII, else an empty string."""
    value = raw_value(row, keyword)
    return value if value.isascii() else ""


def integer_value(row: Mapping[str, bytes], keyword: str) -> int | None:
    """Return a value of an answer as an integer; None if it is none."""
    digits = ascii_value(row, keyword)
    return int(digits) if digits.isdigit() and len(digits) < 12 else None
