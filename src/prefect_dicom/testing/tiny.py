"""Studies of tiny instances in memory, for cohorts of thousands of studies."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from datetime import date, timedelta

import pydicom
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from prefect_dicom.testing.generate import uid
from prefect_dicom.testing.instances import StoredInstance, tag_of


def tiny_instances(
    studies: int, *, instances: int = 1, seed: int = 0, side: int = 4
) -> Iterator[StoredInstance]:
    """Make studies of one series of tiny secondary captures, encoded when they are sent.

    For cohorts of thousands of studies: an instance costs memory for its attributes only.

    Parameters
    ----------
    studies, instances : int
        Number of studies, and of instances in each.
    seed : int
        As for :func:`generate_cohort`.
    side : int
        Rows and columns of the images, 8 bits a pixel; sets the size of an instance.
    """
    for number in range(studies):
        day = date(2020, 1, 1) + timedelta(days=number % 1500)
        study, series = uid(seed, "tiny", number), uid(seed, "tiny", number, 1)
        for instance in range(1, instances + 1):
            attributes = {
                "SpecificCharacterSet": "ISO_IR 100",
                "SOPClassUID": str(SecondaryCaptureImageStorage),
                "SOPInstanceUID": uid(seed, "tiny", number, 1, instance),
                "StudyDate": f"{day:%Y%m%d}",
                "StudyTime": "120000",
                "AccessionNumber": f"T{seed:03d}{number:07d}",
                "Modality": "OT",
                "ReferringPhysicianName": "",
                "StudyDescription": "Tiny",
                "PatientName": f"Tiny^Patient{number}",
                "PatientID": f"{number:08d}",
                "PatientBirthDate": "19500101",
                "PatientSex": "O",
                "StudyInstanceUID": study,
                "SeriesInstanceUID": series,
                "StudyID": str(number),
                "SeriesNumber": "1",
                "InstanceNumber": str(instance),
            }
            yield StoredInstance(attributes, str(ExplicitVRLittleEndian), _tiny(attributes, side))


def _tiny(attributes: dict[str, str], side: int) -> Callable[[], bytes]:
    def encoded() -> bytes:
        elements = []
        for keyword, value in attributes.items():
            vr = pydicom.datadict.dictionary_VR(keyword)
            raw = value.encode("latin-1")
            raw += (b"\0" if vr == "UI" else b" ") * (len(raw) % 2)
            tag = tag_of(keyword)
            elements.append((tag, vr.encode(), raw))
        elements.append((0x00080064, b"CS", b"WSD "))
        elements.append((0x00280004, b"CS", b"MONOCHROME2 "))
        numbers = {
            0x0002: 1,
            0x0010: side,
            0x0011: side,
            0x0100: 8,
            0x0101: 8,
            0x0102: 7,
            0x0103: 0,
        }
        for element, number in numbers.items():
            elements.append((0x00280000 | element, b"US", struct.pack("<H", number)))
        head = b"".join(
            struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, len(raw)) + raw
            for tag, vr, raw in sorted(elements)
        )
        shade = int(attributes["InstanceNumber"]) % 256
        pixels = bytes([shade]) * (side * side)
        pixels += b"\0" * (len(pixels) % 2)
        return head + struct.pack("<HH2sHL", 0x7FE0, 0x0010, b"OB", 0, len(pixels)) + pixels

    return encoded
