"""Instances that a :class:`~prefect_dicom.testing.pacs.ScriptedPacs` holds, indexed by keys.

An instance is its attributes as text (the keys of a C-FIND) and a function that returns its
encoded data set when it is sent. So a PACS with ten thousand studies costs memory for the texts
only, and what is sent is byte for byte what is stored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import UID
from pynetdicom import dsutils

PATIENT_KEYWORDS = (
    "PatientID",
    "IssuerOfPatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
)
STUDY_KEYWORDS = (
    "StudyInstanceUID",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "StudyDescription",
    "ReferringPhysicianName",
    "PatientAge",
    "InstitutionName",
)
SERIES_KEYWORDS = (
    "SeriesInstanceUID",
    "Modality",
    "SeriesNumber",
    "SeriesDate",
    "SeriesTime",
    "SeriesDescription",
    "ProtocolName",
    "BodyPartExamined",
)
IMAGE_KEYWORDS = ("SOPInstanceUID", "SOPClassUID", "InstanceNumber")
KEYWORDS = PATIENT_KEYWORDS + STUDY_KEYWORDS + SERIES_KEYWORDS + IMAGE_KEYWORDS


@dataclass(frozen=True, slots=True)
class StoredInstance:
    """One SOP instance.

    Parameters
    ----------
    attributes : mapping of str to str
        Keyword to text, values joined by backslashes; at least those of the four unique keys
        that the instance has. ``SpecificCharacterSet`` is the one of C-FIND answers about it.
    transfer_syntax_uid : str
        Transfer syntax of ``encoded()``.
    encoded : callable
        Returns the data set, without preamble and file meta information.
    """

    attributes: Mapping[str, str]
    transfer_syntax_uid: str
    encoded: Callable[[], bytes]

    @property
    def patient_id(self) -> str:
        """PatientID (0010,0020)."""
        return self.attributes.get("PatientID", "")

    @property
    def study_instance_uid(self) -> str:
        """StudyInstanceUID (0020,000D)."""
        return self.attributes.get("StudyInstanceUID", "")

    @property
    def series_instance_uid(self) -> str:
        """SeriesInstanceUID (0020,000E)."""
        return self.attributes.get("SeriesInstanceUID", "")

    @property
    def sop_instance_uid(self) -> str:
        """SOPInstanceUID (0008,0018)."""
        return self.attributes.get("SOPInstanceUID", "")

    @property
    def sop_class_uid(self) -> str:
        """SOPClassUID (0008,0016)."""
        return self.attributes.get("SOPClassUID", "")


def text_of(dataset: Dataset, keyword: str) -> str:
    """Return the value of an element as text, values joined by backslashes; empty if none."""
    try:
        value = dataset.get(keyword)
        if value is None:
            return ""
        if isinstance(value, MultiValue | list | tuple):
            return "\\".join(str(part) for part in value)
        return str(value).strip(" \0")
    except (ValueError, TypeError, OverflowError, UnicodeError):
        return ""  # a damaged value is as good as none for matching


def attributes_of(dataset: Dataset) -> dict[str, str]:
    """Return the attributes of a data set that a C-FIND can request."""
    found = {keyword: text_of(dataset, keyword) for keyword in KEYWORDS if keyword in dataset}
    if "SpecificCharacterSet" in dataset:
        found["SpecificCharacterSet"] = text_of(dataset, "SpecificCharacterSet")
    return found


def instance_of_file(path: Path) -> StoredInstance:
    """Read a Part 10 file as an instance, whose data set stays on the disk until it is sent.

    Raises
    ------
    pydicom.errors.InvalidDicomError
        If the file has no DICOM preamble.
    ValueError
        If its file meta information names no transfer syntax.
    """
    meta, offset = dsutils.split_dataset(path)
    if not text_of(meta, "TransferSyntaxUID"):
        raise ValueError("the file names no transfer syntax")
    dataset = pydicom.dcmread(
        path, stop_before_pixels=True, specific_tags=[*KEYWORDS, "SpecificCharacterSet"]
    )
    attributes = attributes_of(dataset)
    for keyword, of_meta in (
        ("SOPClassUID", "MediaStorageSOPClassUID"),
        ("SOPInstanceUID", "MediaStorageSOPInstanceUID"),
    ):
        if not attributes.get(keyword):
            attributes[keyword] = text_of(meta, of_meta)

    def data_set() -> bytes:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read()

    return StoredInstance(attributes, str(meta.TransferSyntaxUID), data_set)


def instance_of_bytes(
    data: bytes, transfer_syntax_uid: str, *, sop_class_uid: str = "", sop_instance_uid: str = ""
) -> StoredInstance:
    """Return an encoded data set in memory as an instance, as received by C-STORE."""
    dataset = decoded(data, transfer_syntax_uid)
    attributes = attributes_of(dataset)
    attributes.setdefault("SOPClassUID", sop_class_uid)
    attributes.setdefault("SOPInstanceUID", sop_instance_uid)
    return StoredInstance(attributes, transfer_syntax_uid, lambda: data)


def decoded(data: bytes, transfer_syntax_uid: str) -> Dataset:
    """Decode a data set."""
    return dsutils.decode(BytesIO(data), *_encoding(transfer_syntax_uid))


def encoded(dataset: Dataset, transfer_syntax_uid: str) -> bytes:
    """Encode a data set in a transfer syntax, in which its pixel data must be already.

    Raises
    ------
    ValueError
        If the data set holds what the syntax cannot express.
    """
    data = dsutils.encode(dataset, *_encoding(transfer_syntax_uid))
    if data is None:
        raise ValueError("the data set cannot be encoded")
    return data


def with_elements(data: bytes, transfer_syntax_uid: str, elements: Mapping[str, Any]) -> bytes:
    """Replace elements of an encoded data set by any values; None removes an element.

    Parameters
    ----------
    elements : mapping of str to object
        Values by keyword; raw bytes are written as they are (padded to an even length).
    """
    dataset = decoded(data, transfer_syntax_uid)
    for keyword, value in elements.items():
        tag = tag_of(keyword)
        if value is None:
            dataset.pop(tag, None)
        else:
            vr = dictionary_VR(keyword)
            dataset[tag] = DataElement(tag, vr, value, validation_mode=IGNORE)
    return encoded(dataset, transfer_syntax_uid)


def changed(stored: StoredInstance, **elements: Any) -> StoredInstance:
    """Return the instance with other values, see :func:`with_elements`."""
    data = with_elements(stored.encoded(), stored.transfer_syntax_uid, elements)
    return instance_of_bytes(data, stored.transfer_syntax_uid)


def tag_of(keyword: str) -> int:
    """Return the tag of a keyword of the data dictionary.

    Raises
    ------
    KeyError
        If the dictionary (PS3.6) has no such keyword.
    """
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise KeyError(keyword)
    return tag


def _encoding(transfer_syntax_uid: str) -> tuple[bool, bool, bool]:
    syntax = UID(transfer_syntax_uid)
    if not syntax.is_transfer_syntax:  # private: all of them that are in use are like this
        return False, True, False
    return syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated


class Holdings:
    """Instances of a PACS by study; thread-safe.

    An instance is one (study, series, SOP instance): the same SOP Instance UID in two series is
    two instances, and storing an instance again replaces it.

    Parameters
    ----------
    instances : iterable of StoredInstance
        Instances to begin with.
    """

    _INDEXED = ("PatientID", "AccessionNumber")

    def __init__(self, instances: Iterable[StoredInstance] = ()) -> None:
        self._lock = threading.Lock()
        self._studies: dict[str, dict[tuple[str, str], StoredInstance]] = {}
        self._studies_by: dict[str, dict[str, set[str]]] = {name: {} for name in self._INDEXED}
        for stored in instances:
            self.add(stored)

    def __len__(self) -> int:
        with self._lock:
            return sum(len(study) for study in self._studies.values())

    def __iter__(self) -> Iterator[StoredInstance]:
        with self._lock:
            instances = [stored for study in self._studies.values() for stored in study.values()]
        return iter(instances)

    def add(self, stored: StoredInstance) -> None:
        """Store an instance, in place of the one with the same UIDs."""
        uid = stored.study_instance_uid
        with self._lock:
            study = self._studies.setdefault(uid, {})
            study[stored.series_instance_uid, stored.sop_instance_uid] = stored
            for name, index in self._studies_by.items():
                index.setdefault(stored.attributes.get(name, ""), set()).add(uid)

    def remove(self, sop_instance_uid: str) -> None:
        """Remove every instance with this SOP Instance UID."""
        with self._lock:
            for uid, study in list(self._studies.items()):
                for key in [key for key in study if key[1] == sop_instance_uid]:
                    del study[key]
                if not study:
                    del self._studies[uid]

    def study_instance_uids(self) -> list[str]:
        """Return the StudyInstanceUIDs in the order of storing."""
        with self._lock:
            return list(self._studies)

    def studies(self, keys: Mapping[str, str]) -> list[list[StoredInstance]]:
        """Return the instances of every study that the keys may select, a list per study.

        Only StudyInstanceUID, PatientID and AccessionNumber narrow it, and only where they are
        exact: what is returned still has to be matched.
        """
        with self._lock:
            chosen = self._candidates(keys)
            return [list(self._studies[uid].values()) for uid in chosen if uid in self._studies]

    def _candidates(self, keys: Mapping[str, str]) -> list[str]:
        if uids := keys.get("StudyInstanceUID"):
            return list(dict.fromkeys(uid.strip(" \0") for uid in uids.split("\\")))
        for name, index in self._studies_by.items():
            value = keys.get(name, "")
            if value and not any(character in value for character in "*?\\"):
                return sorted(index.get(value, ()))
        return list(self._studies)
