"""De-identification by PS3.15 Annex E: a new file out of the bytes of another.

Every element of every item at any depth is judged by its row of Table E.1-1 with the project's
options, or, where the table has none, by the allow-list behind it (``retained.py``). What is kept
is copied as it lies. The output depends on the input, the key, the options and
:data:`~prefect_dicom.deidentify.copy.ENGINE_VERSION` alone: no clock, no chance, no host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prefect_dicom.deidentify.copy import Copy, Treated
from prefect_dicom.deidentify.copying import Copying
from prefect_dicom.deidentify.elements import PartTen
from prefect_dicom.deidentify.keys import ProjectKey
from prefect_dicom.deidentify.options import Options


@dataclass(frozen=True)
class Deidentifier:
    """Makes de-identified copies for one project. Thread-safe."""

    key: ProjectKey
    options: Options

    def copy(
        self,
        file: PartTen,
        *,
        pseudonym: str = "",
        explain: Callable[[Treated], None] | None = None,
    ) -> Copy:
        """De-identify an instance.

        Parameters
        ----------
        pseudonym : str
            What replaces the patient's name and PatientID; keyed if empty.
        explain : callable, optional
            Called with each element and what was done to it.

        Raises
        ------
        Unreadable
            It lacks a UID that a copy needs.
        """
        return Copying(self.key, self.options, file, pseudonym, explain).run()
