"""Validation of a received instance: the requested one, and complete? Returns findings.

Everything is checked by element headers (:mod:`prefect_dicom.dicom.part10`): declared lengths
against the bytes that are there, the length of the pixel data against the image's own figures
(PS3.3 C.7.6.3), UIDs and PatientID against what the PACS listed. Pixels are not decoded; a
changed bit in them is detected by the SHA-256 taken on arrival, not here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from pydicom.charset import convert_encodings, decode_bytes, python_encoding
from pydicom.uid import UID, UID_dictionary  # type: ignore[attr-defined]  # not in __all__

from prefect_dicom.core.model import Identity, InstanceKey
from prefect_dicom.core.reasons import REASONS, Consequence
from prefect_dicom.core.uids import normal_uid
from prefect_dicom.dicom.character_sets import decoded, defined_terms
from prefect_dicom.dicom.part10 import Scan
from prefect_dicom.dicom.structure import PixelData, Structure

_GRAVEST_FIRST = [
    code
    for consequence in Consequence
    for code, reason in REASONS.items()
    if reason.consequence is consequence
]


@dataclass(frozen=True, slots=True)
class Expected:
    """What the PACS listed. Empty ``sop_class_uid`` or ``patient_id``: unknown, not compared."""

    study_instance_uid: str
    key: InstanceKey
    sop_class_uid: str = ""
    patient_id: str | None = None
    accepted_patient_ids: frozenset[str] = frozenset()
    """Other PatientIDs that a person has accepted."""


@dataclass(frozen=True, slots=True)
class Validation:
    """Findings on one instance: codes of :mod:`prefect_dicom.core.reasons`, gravest first."""

    findings: tuple[str, ...] = ()

    @property
    def consequence(self) -> Consequence | None:
        """Consequence of the gravest finding; None without findings."""
        return REASONS[self.findings[0]].consequence if self.findings else None

    @property
    def remarks(self) -> tuple[str, ...]:
        """Findings that are only warnings."""
        return tuple(
            code for code in self.findings if REASONS[code].consequence is Consequence.WARN
        )


def validate(scan: Scan, expected: Expected) -> Validation:
    """Compare a scanned Part 10 file with the listed instance; never raises.

    A faulty instance is compared as far as it can be read: half an image of another patient is
    another patient's.

    Parameters
    ----------
    scan : Scan
        Result of the scan of the file.
    expected : Expected
        What the PACS listed of the instance.
    """
    identity, structure = scan.identity, scan.structure
    found = set(_foreign(identity, structure, expected, whole=scan.fault is None))
    if scan.fault is not None:
        found.add(scan.fault.code)
    found.update(_remarks(identity, structure))
    if structure.other_syntax:
        found.add("wrong-transfer-syntax")
    elif scan.fault is None and identity.inspected and structure.complete:
        found.update(_pixel_data(identity, structure))
    return Validation(tuple(code for code in _GRAVEST_FIRST if code in found))


# --- identity


def listed_key(identity: Identity, listed: Collection[InstanceKey]) -> InstanceKey:
    """Return the listed key of an instance, or its own UIDs if it is not listed."""
    sop = normal_uid(identity.sop_instance_uid or identity.requested_sop_instance_uid or "")
    if identity.series_instance_uid is not None:
        return InstanceKey(normal_uid(identity.series_instance_uid), sop)
    # Not read: the request named the instance; the list says in which series it is.
    matches = [key for key in listed if key.sop_instance_uid == sop]
    return matches[0] if len(matches) == 1 else InstanceKey("", sop)


def _foreign(
    identity: Identity, structure: Structure, expected: Expected, *, whole: bool
) -> Iterator[str]:
    """Yield findings where the instance differs from what was listed and requested."""
    said_and_listed = (
        (identity.study_instance_uid, expected.study_instance_uid),
        (identity.series_instance_uid, expected.key.series_instance_uid),
        (identity.sop_instance_uid, expected.key.sop_instance_uid),
    )
    if any(
        said is not None and normal_uid(said) != normal_uid(listed)
        for said, listed in said_and_listed
    ):
        yield "uid-mismatch"
    said_at_all = (*(said for said, _ in said_and_listed), identity.sop_class_uid)
    # Of a truncated or uninspected instance, absence proves nothing.
    if None in said_at_all and whole and identity.inspected:
        yield "uid-mismatch"
    listed_class = normal_uid(expected.sop_class_uid)
    if listed_class and normal_uid(identity.sop_class_uid or listed_class) != listed_class:
        # The list is the PACS's database, which may be older than the object; UIDs say which it is.
        yield "sop-class-differs"
    requested = identity.requested_sop_instance_uid
    if requested and normal_uid(requested) != normal_uid(expected.key.sop_instance_uid):
        yield "uid-mismatch"
    requested = structure.requested_sop_class_uid
    if requested and identity.sop_class_uid not in (None, requested):
        yield "uid-mismatch"
    if structure.twice & {
        "study_instance_uid",
        "series_instance_uid",
        "sop_instance_uid",
        "sop_class_uid",
    }:
        yield "uid-mismatch"
    listed_patient = _significant(expected.patient_id or "")
    if not listed_patient:
        return
    if "patient_id" in structure.twice:
        yield "wrong-patient"
    elif identity.patient_id:
        finding = _patient(identity.patient_id, identity.specific_character_set, listed_patient)
        if finding == "wrong-patient" and _is_accepted(identity, expected):
            finding = "patient-id-accepted"
        if finding is not None:
            yield finding
    elif whole and identity.inspected:
        yield "patient-id-missing"


def _patient(raw: bytes, character_set: str | None, listed: str) -> str | None:
    """Compare PatientIDs exactly, except for letters changed by a character set.

    PACS answer queries in a character set of their own and drop letters that it lacks, replace
    them by question marks, or read UTF-8 as Latin-1. The remaining ASCII characters distinguish
    that from another patient, if there are any.
    """
    said = _decoded(raw, character_set)
    if said == listed:
        return None
    if said.isascii() and listed.isascii():
        return "wrong-patient"
    rest = _ascii_rest(said)
    if any(c.isalnum() for c in rest) and rest == _ascii_rest(listed):
        return "patient-id-reencoded"
    others = {_decoded(raw, other) for other in ("ISO_IR 192", "ISO_IR 100")}
    if listed in others | {_significant(decoded(raw, character_set or "").text)}:
        return "patient-id-reencoded"
    return "wrong-patient"


def named_patient_id(identity: Identity) -> str:
    """The PatientID that an instance names, without its padding; empty where it names none."""
    return _decoded(identity.patient_id or b"", identity.specific_character_set)


def _is_accepted(identity: Identity, expected: Expected) -> bool:
    accepted = {_significant(number) for number in expected.accepted_patient_ids}
    return named_patient_id(identity) in accepted


def _decoded(raw: bytes, character_set: str | None) -> str:
    """The text of an LO value, PS3.5 6.1.2; Latin-1 where what is declared does not fit."""
    if raw.isascii() and b"\x1b" not in raw:
        return _significant(raw.decode("ascii"))
    terms = list(defined_terms(character_set or ""))
    # pydicom warns of terms it does not know, in the whole process; they are not shown to it.
    if not all(term in python_encoding for term in terms):
        return _significant(raw.decode("latin-1"))
    try:
        if b"\x1b" in raw:
            return _significant(decode_bytes(raw, convert_encodings(terms), set()))
        return _significant(raw.decode(python_encoding[terms[0]]))
    except Exception:
        # It raises in many ways about bytes; all mean the same here.
        return _significant(raw.decode("latin-1"))


def _significant(text: str) -> str:
    """PS3.5 6.2: leading and trailing blanks of LO do not count; NUL is padding of some."""
    return text.strip(" \0")


def _ascii_rest(text: str) -> str:
    return "".join(c for c in text if c.isascii() and c != "?")


# --- completeness


def _remarks(identity: Identity, structure: Structure) -> Iterator[str]:
    if identity.transfer_syntax_uid:
        if _encapsulates(identity.transfer_syntax_uid) is None:
            yield "transfer-syntax-unknown"
        if not identity.inspected:
            yield "not-inspected"
    if not structure.complete:
        yield "partly-inspected"
    if structure.trailing_bytes:
        yield "trailing-bytes"
    yield from structure.oddities


def _pixel_data(identity: Identity, structure: Structure) -> Iterator[str]:
    """The pixel data against the Image Pixel module's figures, PS3.3 C.7.6.3 and PS3.5 8."""
    pixels = structure.pixel_data
    if pixels is None:
        if _should_be_an_image(identity, structure):
            yield "pixel-data-length"
        return
    expected = _native_length(structure)
    encapsulating = _encapsulates(identity.transfer_syntax_uid)
    if pixels.length_bytes is None:
        if encapsulating is False:
            yield "wrong-transfer-syntax"
        elif not _has_a_fragment_for_each_frame(identity, structure, pixels):
            yield "pixel-data-length"
    elif expected is None:
        if not pixels.length_bytes and structure.rows and structure.columns:
            yield "pixel-data-length"
    elif pixels.length_bytes < expected:
        yield "pixel-data-length"
    elif encapsulating and pixels.tag == _PIXEL_DATA:
        # Whole and not encapsulated, under a syntax that encapsulates.
        yield "wrong-transfer-syntax"
    elif pixels.length_bytes > expected + expected % 2:
        yield "pixel-data-longer"


_PIXEL_DATA = 0x7FE00010
_NEWER_THAN_PYDICOM = {
    "1.2.840.10008.1.2.4.110",
    "1.2.840.10008.1.2.4.111",
    "1.2.840.10008.1.2.4.112",
    "1.2.840.10008.1.2.8.1",
}
"""JPEG XL and Deflated Image Frame Compression: encapsulated, PS3.5 A.4.12 and A.4.13."""
_MULTI_COMPONENT_OR_VIDEO = (
    "1.2.840.10008.1.2.4.92",
    "1.2.840.10008.1.2.4.93",
    "1.2.840.10008.1.2.4.10",
)
"""Beginnings of the syntaxes that may have many frames in one fragment, PS3.5 A.4.4 to A.4.11."""


def _native_length(structure: Structure) -> int | None:
    """Return the bytes of native pixel data by the header; None if an attribute is missing."""
    rows, columns, frames = structure.rows, structure.columns, structure.number_of_frames
    samples, bits = structure.samples_per_pixel, structure.bits_allocated
    if rows is None or columns is None or samples is None or bits is None or frames is None:
        return None
    # Two pixels share their chrominance: PS3.3 C.7.6.3.1.2.
    shared = {"YBR_FULL_422": 2, "YBR_PARTIAL_422": 2, "YBR_PARTIAL_420": 1.5}
    stored = shared.get(structure.photometric_interpretation or "", samples)
    return -(-int(rows * columns * stored * bits * frames) // 8)


def _has_a_fragment_for_each_frame(
    identity: Identity, structure: Structure, pixels: PixelData
) -> bool:
    if not pixels.fragment_bytes:
        return False
    if identity.transfer_syntax_uid.startswith(_MULTI_COMPONENT_OR_VIDEO):
        return True
    return pixels.fragments >= (structure.number_of_frames or 1)


def _encapsulates(transfer_syntax_uid: str) -> bool | None:
    """Whether pixel data in this syntax is encapsulated, PS3.5 A.4; None if unknown."""
    if transfer_syntax_uid in _NEWER_THAN_PYDICOM:
        return True
    if UID_dictionary.get(transfer_syntax_uid, ("", ""))[1] != "Transfer Syntax":
        return None
    return UID(transfer_syntax_uid).is_encapsulated


def _should_be_an_image(identity: Identity, structure: Structure) -> bool:
    """Whether pixel data is missing: an image without it was cut between elements."""
    if structure.has_pixel_data_provider or structure.has_spectroscopy_data:
        return False
    if "Image Storage" in UID_dictionary.get(identity.sop_class_uid or "", ("",))[0]:
        return True
    return None not in (structure.rows, structure.columns, structure.bits_allocated)
