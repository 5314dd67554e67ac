"""De-identification by PS3.15 Annex E: a new file out of the bytes of another.

Every element of every item at any depth is judged by its row of Table E.1-1 with the project's
options, or, where the table has none, by the allow-list behind it (``retained.py``). What is kept
is copied as it lies. The output depends on the input, the key, the options and
:data:`ENGINE_VERSION` alone: no clock, no chance, no host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prefect_dicom.deidentify.copy import ENGINE_VERSION, Copy, Piece, Treated
from prefect_dicom.deidentify.copying import LONGEST_ID, Copying, patient_bytes
from prefect_dicom.deidentify.elements import PartTen
from prefect_dicom.deidentify.keys import ProjectKey
from prefect_dicom.deidentify.options import Options
from prefect_dicom.deidentify.table import EDITION


@dataclass(frozen=True)
class Deidentifier:
    """Makes de-identified copies for one project. Thread-safe."""

    key: ProjectKey
    options: Options

    @property
    def description(self) -> dict[str, object]:
        """What decides about the bytes of a copy, without secrets: for manifests and ledger."""
        return {
            "project": self.key.project,
            "key": self.key.identifier,
            "engine": ENGINE_VERSION,
            "edition": EDITION,
            "dates": self.options.dates.value,
            "retain": sorted(each.value for each in self.options.retain),
            "strict": self.options.strict,
            "descriptors": len(self.options.descriptors),
        }

    def pseudonym(self, patient_id: str, issuer: str, study_instance_uid: str) -> str:
        """Keyed pseudonym of a patient; without a PatientID, that of the study alone."""
        return self.key.code(
            "patient", patient_bytes(patient_id, issuer, study_instance_uid), LONGEST_ID
        )

    def copy(
        self,
        file: PartTen,
        *,
        pseudonym: str = "",
        cleaned_pixels: Mapping[int, Piece] | None = None,
        explain: Callable[[Treated], None] | None = None,
    ) -> Copy:
        """De-identify an instance.

        Parameters
        ----------
        pseudonym : str
            What replaces the patient's name and PatientID; keyed if empty.
        cleaned_pixels : mapping of int to bytes, optional
            Values of elements with pixels that were cleaned.
        explain : callable, optional
            Called with each element and what was done to it.

        Raises
        ------
        Unreadable
            It lacks a UID that a copy needs.
        """
        return Copying(self.key, self.options, file, pseudonym, cleaned_pixels or {}, explain).run()
