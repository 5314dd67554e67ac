"""Values of a C-FIND answer: texts, UIDs and counts, decoded without ever raising."""

from __future__ import annotations

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset

from prefect_dicom.core.model import Study
from prefect_dicom.core.uids import normal_uid
from prefect_dicom.dicom.character_sets import Text, decoded
from prefect_dicom.dicom.value_matching import whole_number

_STUDY_TEXTS = ("PatientID", "AccessionNumber", "PatientName", "StudyDescription")


def study_of(answer: Dataset) -> Study:
    """The study of an answer at STUDY level."""
    modalities = text_of(answer, "ModalitiesInStudy").split("\\")
    texts = {keyword: _decoded_text(answer, keyword) for keyword in _STUDY_TEXTS}
    original = {keyword: raw_value(answer, keyword) for keyword in _STUDY_TEXTS}
    return Study(
        study_instance_uid=uid_of(answer, "StudyInstanceUID"),
        patient_id=texts["PatientID"].text,
        accession_number=texts["AccessionNumber"].text,
        study_date=text_of(answer, "StudyDate"),
        modalities=tuple(m.strip() for m in modalities if m.strip()),
        study_description=texts["StudyDescription"].text,
        patient_name=texts["PatientName"].text,
        patient_birth_date=text_of(answer, "PatientBirthDate"),
        issuer_of_patient_id=text_of(answer, "IssuerOfPatientID"),
        original=tuple(
            (keyword, raw.hex())
            for keyword, raw in original.items()
            if not raw.isascii() or b"\x1b" in raw
        ),
        guessed=tuple(keyword for keyword, text in texts.items() if text.guessed),
        number_of_series=count_of(answer, "NumberOfStudyRelatedSeries"),
        number_of_instances=count_of(answer, "NumberOfStudyRelatedInstances"),
    )


def belongs_to(answer: Dataset, keyword: str, asked: str) -> bool:
    """Whether an answer has the UID that was queried for in a key above its level, or none."""
    # Some PACS leave the keys above the level out of their answers.
    uid = uid_of(answer, keyword)
    return not uid or uid == normal_uid(asked)


def is_offline(answer: Dataset) -> bool:
    """Whether the PACS cannot deliver a series by itself."""
    # PS3.3 C.4.23.1.1: no request brings it; a person has to fetch the medium.
    return text_of(answer, "InstanceAvailability") in ("OFFLINE", "UNAVAILABLE")


def uid_of(answer: Dataset, keyword: str) -> str:
    """A UID in its normal form; empty where it is absent."""
    return normal_uid(raw_value(answer, keyword).decode("latin-1"))


def count_of(answer: Dataset, keyword: str) -> int | None:
    """A number; None where it is absent or none."""
    return whole_number(raw_value(answer, keyword).decode("latin-1"))


def text_of(answer: Dataset, keyword: str) -> str:
    """A text, decoded as the answer declares and without padding."""
    return _decoded_text(answer, keyword).text


def _decoded_text(answer: Dataset, keyword: str) -> Text:
    """A text without its padding: leading and trailing blanks mean nothing, PS3.5 6.2."""
    declared = raw_value(answer, "SpecificCharacterSet").decode("latin-1")
    text, guessed = decoded(raw_value(answer, keyword), declared)
    return Text(text.strip(" \0"), guessed)


def raw_value(answer: Dataset, keyword: str) -> bytes:
    """The value as it came, several joined by backslashes; pydicom converts next to nothing."""
    tag = tag_for_keyword(keyword)
    if tag is None or tag not in answer:
        return b""
    try:
        value = answer.get_item(tag).value
    except Exception:
        # An element with a length and no value is converted after all, and need not be one.
        return b""
    if isinstance(value, bytes):
        return value
    if value is None:
        return b""
    if isinstance(value, str):
        return value.encode("latin-1", "replace")
    return "\\".join(str(one) for one in value).encode("latin-1", "replace")
