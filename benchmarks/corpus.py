"""The objects that are moved: invented patients, random pixels, every size made to order."""

from __future__ import annotations

import mmap
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
)

from prefect_dicom.testing import StoredInstance
from prefect_dicom.testing.generate import uid

CT_SIDE = 512
SMALL_SIDE = 64
"""A square of 16 bits a pixel: 512 KB and, with its header, about 10 KB."""


@dataclass(frozen=True)
class Study:
    """A study of one series, as files."""

    study_instance_uid: str
    patient_id: str
    files: tuple[Path, ...]

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def studies(
    folder: Path, name: str, *, count: int, instances: int, side: int, sop_class: str
) -> Iterator[Study]:
    """Studies of one series of square images of 16 bits a pixel, written below ``folder``."""
    noise = random.Random(name)
    for number in range(count):
        study = uid("benchmark", name, number)
        files = []
        for instance in range(1, instances + 1):
            dataset = _header(name, number, instance, study, sop_class)
            dataset.Rows = dataset.Columns = side
            dataset.PixelData = noise.randbytes(2 * side * side)
            dataset["PixelData"].VR = "OW"
            path = folder / name / f"{number:05d}" / f"{instance:05d}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            dataset.save_as(path, enforce_file_format=True)
            files.append(path)
        yield Study(study, f"{name}-{number:05d}", tuple(files))


def ct_studies(folder: Path, count: int, instances: int) -> list[Study]:
    """CT images of 512 KB."""
    options = {"side": CT_SIDE, "sop_class": str(CTImageStorage)}
    return list(studies(folder, "ct", count=count, instances=instances, **options))


def small_studies(folder: Path, count: int, instances: int) -> list[Study]:
    """Images of 10 KB."""
    options = {"side": SMALL_SIDE, "sop_class": str(SecondaryCaptureImageStorage)}
    return list(studies(folder, "small", count=count, instances=instances, **options))


def multi_frame(folder: Path, frames: int, name: str = "large") -> StoredInstance:
    """One object of 1 MB frames, as a PACS would hold it: read from its file as it is sent.

    Its random frame is the same again and again, which no hash and no copy minds.
    """
    sop_class = str(MultiFrameGrayscaleByteSecondaryCaptureImageStorage)
    study = uid("benchmark", name, 0)
    dataset = _header(name, 0, 1, study, sop_class)
    dataset.Rows = dataset.Columns = 1024
    dataset.NumberOfFrames = frames
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    path = folder / f"{name}.dcm"
    dataset.save_as(path, enforce_file_format=True)
    begin = _end_of_meta(path)
    frame = random.Random(name).randbytes(1024 * 1024)
    with path.open("ab") as file:
        file.write(struct.pack("<HH2sHL", 0x7FE0, 0x0010, b"OB", 0, len(frame) * frames))
        for _ in range(frames):
            file.write(frame)
    with path.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[begin:]
    keywords = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    keywords += ("SOPClassUID", "Modality", "StudyDate", "AccessionNumber")
    attributes = {keyword: str(dataset.get(keyword, "")) for keyword in keywords}
    return StoredInstance(attributes, str(ExplicitVRLittleEndian), lambda: content)


def _end_of_meta(path: Path) -> int:
    head = path.open("rb").read(144)
    # The value of (0002,0000), which comes first: bytes of group 2 behind it.
    return 144 + struct.unpack_from("<L", head, 140)[0]


def _header(name: str, number: int, instance: int, study: str, sop_class: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = uid("benchmark", name, number, 1, instance)
    dataset = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.SOPClassUID = sop_class
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.StudyDate = dataset.SeriesDate = dataset.ContentDate = "20240102"
    dataset.StudyTime = dataset.SeriesTime = dataset.ContentTime = "101500"
    dataset.AccessionNumber = f"B{number:07d}"
    dataset.Modality = "CT" if sop_class == CTImageStorage else "OT"
    dataset.Manufacturer = "prefect-dicom"
    dataset.ReferringPhysicianName = "Referrer^Rosa"
    dataset.StudyDescription = "Benchmark"
    dataset.PatientName = f"Invented^{name}{number}"
    dataset.PatientID = f"{name}-{number:05d}"
    dataset.PatientBirthDate = "19500101"
    dataset.PatientSex = "O"
    dataset.StudyInstanceUID = study
    dataset.SeriesInstanceUID = uid("benchmark", name, number, 1)
    dataset.StudyID = str(number)
    dataset.SeriesNumber = "1"
    dataset.InstanceNumber = str(instance)
    dataset.ConversionType = "WSD"
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 0
    return dataset
