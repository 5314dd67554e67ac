"""What people have accepted of a study, as far as its retrieval depends on it."""

from __future__ import annotations

from collections.abc import Iterable

from prefect_dicom.ledger import Acceptance


class AcceptedOfStudy:
    """Decisions of people about one study."""

    def __init__(self) -> None:
        self._decisions: tuple[Acceptance, ...] = ()
        self._patient_ids: frozenset[str] = frozenset()

    @property
    def patient_ids(self) -> frozenset[str]:
        """PatientIDs that its instances may name beside the listed one."""
        return self._patient_ids

    @property
    def missing(self) -> Acceptance | None:
        """The last decision about instances that are missing."""
        return next((each for each in reversed(self._decisions) if each.missing), None)

    def record(self, decisions: Iterable[Acceptance], patient_ids: Iterable[str]) -> None:
        """Take over the ledger's decisions, and other PatientIDs that the study's rows give."""
        self._decisions = tuple(decisions)
        bound = {e.patient_id for e in self._decisions if e.study is not None and e.patient_id}
        self._patient_ids = frozenset({*bound, *patient_ids})

    def allows(self, patient_id: str) -> bool:
        """Whether a person has accepted that all its instances name this PatientID."""
        return any(
            each.reason == "patient-id-differs" and each.patient_id in (None, patient_id)
            for each in self._decisions
        )

    def take(self, patient_id: str) -> None:
        """Take instances that name this PatientID."""
        self._patient_ids |= {patient_id}
