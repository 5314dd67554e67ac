"""What a node makes of queries below the STUDY level, and queries in the forms that it answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from pydicom.dataset import Dataset

from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import InformationModel
from prefect_dicom.core.uids import is_safe_key
from prefect_dicom.network.find.query import find
from prefect_dicom.network.node_client import NodeClient
from prefect_dicom.network.query_keys import query_identifier

_REFUSALS = 3
"""Number of studies whose queries at a level are refused before the level is given up."""


@dataclass(slots=True)
class QueryCapabilities:
    """What a node answers below the STUDY level; shared by all requestors to it."""

    answers: dict[str, bool] = field(default_factory=dict)
    """By level, whether it answers queries there; absent while unknown."""
    wants_patient_id: bool = False
    """Whether it needs the PatientID beside the study's UID in the Study Root too."""
    refusals: Counter[str] = field(default_factory=Counter)
    """By level, the number of studies whose lists it has refused."""

    @classmethod
    def doubting(cls, levels: Collection[str] | None) -> QueryCapabilities:
        """Capabilities of a node that answered a probe at these levels; None: not probed.

        The other levels are queried too, but given up after one refusal.
        """
        others = {"SERIES", "IMAGE"}.difference({"SERIES", "IMAGE"} if levels is None else levels)
        return cls(refusals=Counter(dict.fromkeys(others, _REFUSALS - 1)))

    def refused(self, level: str) -> None:
        """Count a study all of whose queries at the level were refused."""
        self.refusals[level] += 1
        if self.refusals[level] >= _REFUSALS:
            self.answers.setdefault(level, False)


def answers_at_level(
    requestor: NodeClient,
    above: Mapping[str, str],
    forms: Sequence[Sequence[str]],
    level: str,
    patient_id: str,
    capabilities: QueryCapabilities | None = None,
) -> list[Dataset]:
    """Answers at a level, by the first form of the query that the PACS answers.

    Optional keys spoil a query for some, and some need the PatientID in the Study Root too. The
    PatientID is tried where nothing has been answered at the level yet; what works is kept in the
    capabilities.

    Parameters
    ----------
    forms : sequence of sequence of str
        The keys to return, from all to as few as can be.

    Raises
    ------
    PacsError
        What the last form was answered with.
    """
    capabilities = capabilities or QueryCapabilities()
    with_patient = {**above, "PatientID": patient_id}
    ways = [(above, form) for form in forms]
    if "PatientID" not in above and is_safe_key(patient_id):
        if capabilities.wants_patient_id:
            ways = [(with_patient, form) for form in forms]
        elif not capabilities.answers.get(level):
            ways += [(with_patient, form) for form in forms]
    last: PacsError | None = None
    for keys, form in ways:
        last = None
        try:
            identifier = query_identifier(keys, form, requestor.characters)
            if answers := list(find(requestor, identifier, level)):
                capabilities.answers[level] = True
                capabilities.wants_patient_id |= keys is with_patient
                return answers
        except PacsError as error:
            if error.code != "request-refused":
                raise
            last = error
    if last is not None:
        raise last
    return []


def answers_if_any(
    requestor: NodeClient,
    above: Mapping[str, str],
    keywords: Sequence[str],
    level: str,
    patient_id: str,
) -> list[Dataset]:
    """Answers to a query that one of its keys may spoil; none where it is refused."""
    try:
        return answers_at_level(requestor, above, [keywords], level, patient_id)
    except PacsError as error:
        if error.code != "request-refused":
            raise
        return []


def keys_above(
    requestor: NodeClient,
    study_instance_uid: str,
    patient_id: str,
    capabilities: QueryCapabilities | None = None,
) -> dict[str, str]:
    """Unique keys above the SERIES level, as the node's information model needs them.

    Raises
    ------
    PacsError
        ``unsafe-patient-id`` where the Patient Root cannot name the study.
    """
    keys = {"StudyInstanceUID": study_instance_uid}
    if capabilities is not None and capabilities.wants_patient_id and is_safe_key(patient_id):
        keys["PatientID"] = patient_id
    if requestor.node.query_model is InformationModel.PATIENT_ROOT:
        if not is_safe_key(patient_id):
            # From the PACS, not from our code: data, and no reason to stop a run.
            raise PacsError("unsafe-patient-id", "PatientID is a unique key in the Patient Root")
        keys["PatientID"] = patient_id
    return keys
