"""Studies with peculiar instances: odd, as real PACS hold them, but not wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydicom.uid import (
    EncapsulatedPDFStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    GrayscaleSoftcopyPresentationStateStorage,
    KeyObjectSelectionDocumentStorage,
    RawDataStorage,
    RTPlanStorage,
    RTStructureSetStorage,
    SegmentationStorage,
    TwelveLeadECGWaveformStorage,
)

from prefect_dicom.testing.generate import uid
from prefect_dicom.testing.instances import (
    StoredInstance,
    decoded,
    encoded,
    instance_of_bytes,
    with_elements,
)
from prefect_dicom.testing.tiny import tiny_instances

_BASIC_TEXT_SR = "1.2.840.10008.5.1.4.1.1.88.11"
_PRIVATE_CLASS = "1.2.840.113619.4.30"
_PRIVATE_SYNTAX = "1.2.840.113619.5.2"
_RETIRED_CLASS = "1.2.840.10008.5.1.1.27"
_HOSTILE = (
    "../../../etc/passwd",
    "..",
    "/etc/passwd",
    "=HYPERLINK(0)",
    "@SUM(1)",
    "%s%n%x",
    "$(id)",
    "<b>x</b>",
)
_ODD_UIDS = ("1.2.826.0.01.7", "1.2.826.0.1.8" + ".1" * 40, "1.2.826.A.9", "not a UID")


def peculiar_instances(kind: str, *, seed: int = 0) -> list[StoredInstance]:
    """Make a study of small instances that are odd in one way, as real PACS hold them.

    Parameters
    ----------
    kind : str
        A name in :data:`PECULIARITIES`.
    seed : int
        As for :func:`generate_cohort`.
    """
    return list(PECULIARITIES[kind](seed))


def _odd(
    seed: int,
    kind: str,
    changes: Sequence[Mapping[str, Any]],
    syntax: str = ExplicitVRLittleEndian,
) -> Iterator[StoredInstance]:
    """Yield an instance for each of the changes to a tiny one, all of one study."""
    plain = tiny_instances(1, instances=len(changes), seed=seed)
    for number, (stored, elements) in enumerate(zip(plain, changes, strict=True), 1):
        own = {
            "StudyInstanceUID": uid(seed, kind),
            "SeriesInstanceUID": uid(seed, kind, 1),
            "SOPInstanceUID": uid(seed, kind, 1, number),
        }
        data = with_elements(stored.encoded(), stored.transfer_syntax_uid, own | dict(elements))
        if syntax != stored.transfer_syntax_uid:
            data = encoded(decoded(data, stored.transfer_syntax_uid), syntax)
        yield instance_of_bytes(data, syntax)


def _odd_uids(seed: int) -> Iterator[StoredInstance]:
    return _odd(seed, "odd-uids", [{"SOPInstanceUID": text} for text in _ODD_UIDS])


def _hostile_text(seed: int) -> Iterator[StoredInstance]:
    changes = [
        {
            "PatientID": _HOSTILE[3],
            "PatientName": _HOSTILE[0],
            "StudyInstanceUID": _HOSTILE[0],
            "SeriesInstanceUID": _HOSTILE[number % 3],
            "SOPInstanceUID": text,
            "StudyDescription": _HOSTILE[4],
        }
        for number, text in enumerate(_HOSTILE)
    ]
    return _odd(seed, "hostile-text", changes)


def _private_classes(seed: int) -> Iterator[StoredInstance]:
    classes = [{"SOPClassUID": uid} for uid in (_PRIVATE_CLASS, _RETIRED_CLASS)]
    return _odd(seed, "private-classes", classes)


def _retired_syntaxes(seed: int) -> Iterator[StoredInstance]:
    big_endian = list(_odd(seed, "retired-syntaxes", [{}, {}], ExplicitVRBigEndian))
    yield big_endian[0]
    # Its headers are those of Explicit VR Little Endian, its pixels big endian.
    elements = {"SOPInstanceUID": uid(seed, "private-syntax")}
    data = encoded(decoded(big_endian[1].encoded(), ExplicitVRBigEndian), ExplicitVRLittleEndian)
    yield instance_of_bytes(with_elements(data, ExplicitVRLittleEndian, elements), _PRIVATE_SYNTAX)


def _nameless(seed: int) -> Iterator[StoredInstance]:
    empty = {"PatientID": "", "PatientName": "", "StudyDate": ""}
    absent = dict.fromkeys((*empty, "Modality", "SeriesNumber"))
    return _odd(seed, "nameless", [empty, absent])


def _lying_character_sets(seed: int) -> Iterator[StoredInstance]:
    umlaut = {"PatientName": b"M\xfcster^J\xf6rg"}
    return _odd(
        seed,
        "lying-character-sets",
        [
            umlaut | {"SpecificCharacterSet": "ISO_IR 192"},
            umlaut | {"SpecificCharacterSet": None},
            umlaut | {"SpecificCharacterSet": "ISO_IR 999"},
        ],
    )


def _non_images(seed: int) -> Iterator[StoredInstance]:
    # A document or a plan has no pixels.
    without_pixels = dict.fromkeys(
        ("PixelData", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit")
    )
    modalities = {
        _BASIC_TEXT_SR: "SR",
        KeyObjectSelectionDocumentStorage: "KO",
        GrayscaleSoftcopyPresentationStateStorage: "PR",
        RTPlanStorage: "RTPLAN",
        RTStructureSetStorage: "RTSTRUCT",
        EncapsulatedPDFStorage: "DOC",
        RawDataStorage: "OT",
        TwelveLeadECGWaveformStorage: "ECG",
    }
    changes = [
        without_pixels | {"SOPClassUID": sop_class, "Modality": modality}
        for sop_class, modality in modalities.items()
    ]
    changes.append({"SOPClassUID": SegmentationStorage, "Modality": "SEG", "NumberOfFrames": "1"})
    return _odd(seed, "non-images", changes)


def _one_uid_in_two_series(seed: int) -> Iterator[StoredInstance]:
    changes = [
        {"SOPInstanceUID": uid(seed, "shared"), "SeriesInstanceUID": uid(seed, "shared", series)}
        for series in (1, 2)
    ]
    return _odd(seed, "one-uid-in-two-series", changes)


PECULIARITIES: dict[str, Callable[[int], Iterator[StoredInstance]]] = {
    "odd-uids": _odd_uids,
    "hostile-text": _hostile_text,
    "private-classes": _private_classes,
    "retired-syntaxes": _retired_syntaxes,
    "nameless": _nameless,
    "lying-character-sets": _lying_character_sets,
    "non-images": _non_images,
    "one-uid-in-two-series": _one_uid_in_two_series,
}
"""Kinds of :func:`peculiar_instances`: leading zeros, letters, more than 64 characters in UIDs;
paths, formulas and format strings in UIDs and names; SOP classes and transfer syntaxes that are
private or retired; no names, no PatientID, no Modality; character sets that are not those
declared; instances that are no images; one SOP Instance UID in two series."""
