"""Instances that name another patient than the study's, held until all of the study are here.

Where all name the same other PatientID, the PACS knows the patient by a number that its files do
not have, and a person may accept that. Where some name the listed one, the others are a stranger's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from prefect_dicom.core.model import InstanceKey

MOST_REQUESTS = 2
"""How often such an instance is requested in a run."""


class HeldInstance(NamedTuple):
    """One such instance, in the spool."""

    sha256: str
    patient_id: str


class HeldInstances:
    """Instances of a study that name another patient."""

    def __init__(self) -> None:
        self._held: dict[InstanceKey, HeldInstance] = {}
        self._times: Counter[InstanceKey] = Counter()
        self._has_own = False
        self.patient_id: str | None = None
        """The PatientID that all of the study name, where nobody has accepted it."""
        self.detail = ""
        """How it differs from the listed one, in words without either."""

    def __bool__(self) -> bool:
        return bool(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    @property
    def keys(self) -> Collection[InstanceKey]:
        """Their keys."""
        return self._held.keys()

    @property
    def common_patient_id(self) -> str | None:
        """The PatientID that all name, if no instance of the study names the listed one."""
        named = {held.patient_id for held in self._held.values()}
        return next(iter(named)) if len(named) == 1 and not self._has_own else None

    def resting(self) -> set[InstanceKey]:
        """Those that need not be requested again: they would come as they did."""
        if self.common_patient_id is not None:
            return set(self._held)
        return {key for key in self._held if self._times[key] >= MOST_REQUESTS}

    def hold(self, key: InstanceKey, held: HeldInstance) -> HeldInstance | None:
        """Hold an instance; returns what was held in its place, if that has other bytes."""
        self._times[key] += 1
        before = self._held.get(key)
        self._held[key] = held
        return before if before is not None and before.sha256 != held.sha256 else None

    def record_known(self, key: InstanceKey) -> None:
        """An earlier run has set the same bytes apart: they need not come once more."""
        self._times[key] = MOST_REQUESTS

    def record_repeat(self, key: InstanceKey) -> None:
        """It has come again, with the same bytes."""
        self._times[key] += 1

    def record_common(self, patient_id: str, detail: str) -> None:
        """All that came name this PatientID, and nobody has accepted it."""
        self.patient_id, self.detail = patient_id, detail

    def record_own(self) -> None:
        """An instance of the study names the listed PatientID."""
        self._has_own = True

    def drop(self, key: InstanceKey) -> HeldInstance | None:
        """Hold an instance no longer: the right one has come."""
        return self._held.pop(key, None)

    def take_all(self) -> dict[InstanceKey, HeldInstance]:
        """Hold none any more; returns those that were held."""
        held, self._held = self._held, {}
        return held
