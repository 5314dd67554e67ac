"""Studies of several series, which say of themselves what a test wants them to say."""

from __future__ import annotations

from prefect_dicom.testing import StoredInstance, tiny_instances
from prefect_dicom.testing.instances import decoded, encoded, instance_of_bytes


def series(study: int, number: int, instances: int = 1, **elements: str) -> list[StoredInstance]:
    """One series of the study ``2.25.<study>``: its objects, with these elements."""
    made = []
    for stored in tiny_instances(1, instances=instances, seed=study * 1000 + number):
        dataset = decoded(stored.encoded(), stored.transfer_syntax_uid)
        dataset.StudyInstanceUID = study_uid(study)
        dataset.SeriesInstanceUID = series_uid(study, number)
        dataset.SeriesNumber = number
        dataset.PatientID = "P1"
        dataset.AccessionNumber = f"A{study}"
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        data = encoded(dataset, stored.transfer_syntax_uid)
        made.append(instance_of_bytes(data, stored.transfer_syntax_uid))
    return made


def study_uid(study: int) -> str:
    return f"2.25.{study}"


def series_uid(study: int, number: int) -> str:
    return f"2.25.{study}.{number}"
