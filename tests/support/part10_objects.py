"""Objects for tests of the byte level: made with pydicom, written as a receiver writes them."""

from __future__ import annotations

import struct

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence

from prefect_dicom.core.model import InstanceKey, StoreRequest
from prefect_dicom.dicom.part10 import file_meta
from prefect_dicom.dicom.validation import Expected

IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
JPEG = "1.2.840.10008.1.2.4.50"
MPEG2 = "1.2.840.10008.1.2.4.100"
RLE = "1.2.840.10008.1.2.5"
PRIVATE = "1.2.840.113619.5.2"

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
STUDY, SERIES, INSTANCE = "1.2.826.0.1.7", "1.2.826.0.1.7.1", "1.2.826.0.1.7.1.1"
PATIENT = "SECRET-0042"

EXPECTED = Expected(STUDY, InstanceKey(SERIES, INSTANCE), CT_IMAGE, PATIENT)


def ct(**changes: object) -> Dataset:
    """A CT of 16 by 12 pixels of 16 bits; a change to None removes the attribute."""
    image = Dataset()
    image.SpecificCharacterSet = "ISO_IR 100"
    image.SOPClassUID = CT_IMAGE
    image.SOPInstanceUID = INSTANCE
    image.StudyDate = "20240229"
    image.Modality = "CT"
    image.PatientName = "Secret^Name"
    image.PatientID = PATIENT
    image.StudyInstanceUID = STUDY
    image.SeriesInstanceUID = SERIES
    image.SamplesPerPixel = 1
    image.PhotometricInterpretation = "MONOCHROME2"
    image.Rows = 12
    image.Columns = 16
    image.BitsAllocated = 16
    image.BitsStored = 16
    image.HighBit = 15
    image.PixelRepresentation = 0
    image.PixelData = bytes(range(256)) + bytes(128)
    image["PixelData"].VR = "OW"
    for keyword, value in changes.items():
        if value is None:
            delattr(image, keyword)
        else:
            setattr(image, keyword, value)
    return image


def sequence_of(*items: Dataset, undefined: bool = True) -> Sequence:
    """A sequence whose items, too, are of undefined (or defined) length."""
    sequence = Sequence(items)
    sequence.is_undefined_length = undefined
    for item in items:
        item.is_undefined_length_sequence_item = undefined
    return sequence


def encoded(image: Dataset, syntax: str = EXPLICIT) -> bytes:
    """The bytes of the data set alone."""
    buffer = DicomBytesIO()
    buffer.is_little_endian = syntax != BIG_ENDIAN
    buffer.is_implicit_VR = syntax == IMPLICIT
    for element in image.iterall():
        if isinstance(element.value, Sequence):
            element.is_undefined_length = element.value.is_undefined_length
    write_dataset(buffer, image)
    return buffer.getvalue()


def received(body: bytes, syntax: str = EXPLICIT, instance: str = INSTANCE) -> bytes:
    """The file a receiver writes of a data set that came in one C-STORE request."""
    return file_meta(StoreRequest(1, CT_IMAGE, instance, syntax)) + body


def element(tag: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    """One element in Explicit VR Little Endian, with another length than its own if given."""
    length = len(value) if length is None else length
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr
    if vr in (b"OB", b"OW", b"SQ", b"UN", b"UT"):
        return head + struct.pack("<xxL", length) + value
    return head + struct.pack("<H", length) + value


def item(content: bytes, length: int | None = None) -> bytes:
    """An item or fragment; of undefined length, with its delimiter, if ``length`` is -1."""
    if length == -1:
        return b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + content + b"\xfe\xff\x0d\xe0\0\0\0\0"
    return b"\xfe\xff\x00\xe0" + struct.pack("<L", len(content)) + content


SEQUENCE_END = b"\xfe\xff\xdd\xe0\0\0\0\0"


def encapsulated(*fragments: bytes) -> bytes:
    """An encapsulated PixelData element with an empty Basic Offset Table."""
    content = item(b"") + b"".join(item(fragment) for fragment in fragments) + SEQUENCE_END
    return element(0x7FE00010, b"OB", content, 0xFFFFFFFF)
