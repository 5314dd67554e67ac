"""Studies made from nothing: valid Part 10 files of invented patients, and tiny ones in memory.

Everything follows from the seed: UIDs (under 2.25, PS3.5 B.2), names, dates and pixels. The
patients have what breaks spreadsheets and file names: IDs with leading zeros, a name outside
ASCII, a patient with two studies, two studies on one day.
"""

from __future__ import annotations

import csv
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    EncapsulatedPDFStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
    UltrasoundMultiFrameImageStorage,
)

_BASIC_TEXT_SR = "1.2.840.10008.5.1.4.1.1.88.11"
_NAMESPACE = uuid.UUID("8f9a2c4e-5a0e-4a57-9d54-0f6d1d8f6f10")
_NAMES = (
    "Sample^Ada",
    "Probe^Bruno",
    "Muster^J\u00f6rg",
    "Invented^Clara^Maria",
    "Nobody^Dan",
    "Example^Eva",
    "Placeholder^Finn",
    "Fiction^Greta^^Dr",
    "Model^Hugo",
    "Template^Ines",
    "Pattern^Jonas",
)


def uid(*parts: object) -> str:
    """A UID under 2.25 that depends on the parts only."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, '/'.join(map(str, parts))).int}"


@dataclass(frozen=True)
class _SeriesKind:
    modality: str
    sop_class_uid: str
    description: str
    instances: tuple[int, int]
    transfer_syntaxes: tuple[str, ...]
    fill: Callable[[Dataset, random.Random], None]


def _image(dataset: Dataset, rng: random.Random, *, side: int, bits: int, frames: int = 1) -> None:
    noise = numpy.random.default_rng(rng.getrandbits(32))
    kind = numpy.uint8 if bits == 8 else numpy.uint16
    # A gradient with a little noise: it compresses, and no two images are the same.
    shape = (frames, side, side) if frames > 1 else (side, side)
    ramp = numpy.linspace(0, 200, side, dtype=kind)
    pixels = (numpy.zeros(shape, kind) + ramp + noise.integers(0, 8, shape, kind)).astype(kind)
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows = dataset.Columns = side
    dataset.BitsAllocated = 8 if bits == 8 else 16
    dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelRepresentation = 0
    if frames > 1:
        dataset.NumberOfFrames = frames
        dataset.FrameTime = "40"
        dataset.FrameIncrementPointer = 0x00181063
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"


def _slice(dataset: Dataset, rng: random.Random) -> None:
    _image(dataset, rng, side=64, bits=12)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.PixelSpacing = ["0.8", "0.8"]
    dataset.SliceThickness = "5"
    dataset.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    dataset.ImagePositionPatient = ["-25.6", "-25.6", str(-5 * int(dataset.InstanceNumber))]


def _ct(dataset: Dataset, rng: random.Random) -> None:
    _slice(dataset, rng)
    dataset.KVP = "120"
    dataset.RescaleIntercept = "-1024"
    dataset.RescaleSlope = "1"


def _mr(dataset: Dataset, rng: random.Random) -> None:
    _slice(dataset, rng)
    dataset.ScanningSequence = "SE"
    dataset.SequenceVariant = "NONE"
    dataset.MRAcquisitionType = "2D"
    dataset.EchoTime = "15"
    dataset.RepetitionTime = "600"


def _projection(dataset: Dataset, rng: random.Random) -> None:
    _image(dataset, rng, side=128, bits=12)
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.ViewPosition = "PA"
    dataset.PresentationIntentType = "FOR PRESENTATION"


def _cine(dataset: Dataset, rng: random.Random) -> None:
    _image(dataset, rng, side=64, bits=8, frames=6)
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]


def _report(dataset: Dataset, rng: random.Random) -> None:
    dataset.ValueType = "CONTAINER"
    dataset.ContinuityOfContent = "SEPARATE"
    dataset.CompletionFlag = "COMPLETE"
    dataset.VerificationFlag = "UNVERIFIED"
    dataset.ConceptNameCodeSequence = DicomSequence([_code("18748-4", "Diagnostic imaging report")])
    finding = Dataset()
    finding.RelationshipType = "CONTAINS"
    finding.ValueType = "TEXT"
    finding.ConceptNameCodeSequence = DicomSequence([_code("59776-5", "Procedure findings")])
    finding.TextValue = f"Nothing real was examined ({rng.randrange(1000)})."
    dataset.ContentSequence = DicomSequence([finding])


def _code(value: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue = value
    code.CodingSchemeDesignator = "LN"
    code.CodeMeaning = meaning
    return code


def _pdf(dataset: Dataset, rng: random.Random) -> None:
    document = (
        b"%%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
        b"2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
        b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 %d 300]>>endobj\n"
        b"trailer<</Root 1 0 R>>\n%%%%EOF\n" % (200 + rng.randrange(100))
    )
    dataset.DocumentTitle = "Letter"
    dataset.BurnedInAnnotation = "NO"
    dataset.MIMETypeOfEncapsulatedDocument = "application/pdf"
    dataset.EncapsulatedDocumentLength = len(document)
    dataset.EncapsulatedDocument = document + b"\0" * (len(document) % 2)


_NATIVE = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
_CT = _SeriesKind("CT", CTImageStorage, "Axial 5 mm", (12, 40), (*_NATIVE, RLELossless), _ct)
_MR = _SeriesKind("MR", MRImageStorage, "T1 SE", (8, 30), (*_NATIVE, RLELossless), _mr)
_CR = _SeriesKind("CR", ComputedRadiographyImageStorage, "PA", (1, 2), _NATIVE, _projection)
_DX = _SeriesKind(
    "DX", DigitalXRayImageStorageForPresentation, "PA and lateral", (1, 3), _NATIVE, _projection
)
_US = _SeriesKind(
    "US", UltrasoundMultiFrameImageStorage, "Cine", (1, 4), (RLELossless, *_NATIVE), _cine
)
_SR = _SeriesKind("SR", _BASIC_TEXT_SR, "Report", (1, 1), _NATIVE, _report)
_PDF = _SeriesKind("DOC", EncapsulatedPDFStorage, "Letter", (1, 1), _NATIVE, _pdf)

_STUDY_KINDS = (
    ("CT chest", "CHEST", (_CT, _CT, _SR)),
    ("MR knee", "KNEE", (_MR, _MR)),
    ("X-ray thorax", "CHEST", (_DX,)),
    ("Ultrasound abdomen", "ABDOMEN", (_US, _US, _PDF)),
    ("CT abdomen", "ABDOMEN", (_CT, _SR)),
    ("X-ray hand", "HAND", (_CR, _PDF)),
)


@dataclass(frozen=True)
class _GeneratedStudy:
    number: int
    patient_id: str
    patient_name: str
    study_date: date
    description: str
    body_part: str
    kinds: tuple[_SeriesKind, ...]


def _plan(studies: int, seed: int) -> Iterator[_GeneratedStudy]:
    rng = random.Random(f"plan-{seed}")
    for number in range(studies):
        # The last study of every dozen belongs to the patient of the first, on the same day
        # of another year: two studies of one patient, told apart by their dates.
        patient = number - 11 if number % 12 == 11 else number
        description, body_part, kinds = _STUDY_KINDS[number % len(_STUDY_KINDS)]
        yield _GeneratedStudy(
            number=number,
            patient_id=f"{seed % 1000:03d}{patient + 1:05d}",
            patient_name=_NAMES[patient % len(_NAMES)],
            study_date=date(2023, 1, 9) + timedelta(days=rng.randrange(700)),
            description=description,
            body_part=body_part,
            kinds=kinds,
        )


def generate_cohort(
    directory: Path,
    *,
    studies: int = 12,
    seed: int = 0,
    instances_per_series: int = 40,
) -> list[Path]:
    """Write studies of invented patients as Part 10 files.

    CT, MR, CR, DX, multi-frame US, SR and encapsulated PDF; one to three series a study; in
    Explicit and Implicit VR Little Endian and RLE Lossless. A dozen studies are about 250
    instances and 3 MB.

    Parameters
    ----------
    directory : Path
        Made if need be. A study is a directory in it, a series a directory in that.
    studies : int
        How many.
    seed : int
        The same seed makes the same files, another seed other patients and other UIDs.
    instances_per_series : int
        No series gets more than this.

    Returns
    -------
    list of Path
        The files, study by study.
    """
    written = []
    for study in _plan(studies, seed):
        rng = random.Random(f"study-{seed}-{study.number}")
        for series, kind in enumerate(study.kinds, 1):
            syntax = kind.transfer_syntaxes[(study.number + series) % len(kind.transfer_syntaxes)]
            count = min(rng.randint(*kind.instances), instances_per_series)
            for instance in range(1, count + 1):
                dataset = _dataset(study, kind, seed, series, instance, rng)
                path = (
                    directory
                    / f"study-{study.number + 1:04d}"
                    / f"series-{series}"
                    / f"{instance:04d}.dcm"
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(dataset, syntax, path)
                written.append(path)
    return written


def _dataset(
    study: _GeneratedStudy,
    kind: _SeriesKind,
    seed: int,
    series: int,
    instance: int,
    rng: random.Random,
) -> Dataset:
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = kind.sop_class_uid
    dataset.SOPInstanceUID = uid(seed, study.number, series, instance)
    dataset.StudyDate = dataset.SeriesDate = dataset.ContentDate = f"{study.study_date:%Y%m%d}"
    dataset.StudyTime = f"{8 + study.number % 10:02d}1500"
    dataset.SeriesTime = dataset.ContentTime = f"{8 + study.number % 10:02d}{15 + series:02d}00"
    dataset.AccessionNumber = f"A{seed:03d}{study.number + 1:06d}"
    dataset.Modality = kind.modality
    dataset.Manufacturer = "prefect-dicom"
    dataset.ReferringPhysicianName = "Referrer^Rosa"
    dataset.StudyDescription = study.description
    dataset.SeriesDescription = kind.description
    dataset.PatientName = study.patient_name
    dataset.PatientID = study.patient_id
    dataset.PatientBirthDate = f"{1930 + study.number % 60}0401"
    dataset.PatientSex = "FMO"[study.number % 3]
    dataset.BodyPartExamined = study.body_part
    dataset.StudyInstanceUID = uid(seed, study.number)
    dataset.SeriesInstanceUID = uid(seed, study.number, series)
    dataset.StudyID = str(study.number + 1)
    dataset.SeriesNumber = str(series)
    dataset.InstanceNumber = str(instance)
    kind.fill(dataset, rng)
    return dataset


def _write(dataset: Dataset, transfer_syntax: str, path: Path) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = UID(transfer_syntax)
    file = FileDataset(str(path), dataset, file_meta=meta, preamble=b"\0" * 128)
    if transfer_syntax == RLELossless:
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    file.save_as(path, enforce_file_format=True)


def write_cohort_file(path: Path, files: Sequence[Path]) -> Path:
    """Write the cohort file (CSV) that names the studies of these files, a row for each.

    The rows identify their studies in turn by AccessionNumber, by PatientID and StudyDate, and
    by StudyInstanceUID.
    """
    keywords = ["PatientID", "AccessionNumber", "StudyInstanceUID", "StudyDate"]
    studies: dict[str, Dataset] = {}
    for file in files:
        dataset: Dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=keywords)
        studies.setdefault(str(dataset.StudyInstanceUID), dataset)
    ways = (("AccessionNumber",), ("PatientID", "StudyDate"), ("StudyInstanceUID",))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as out:
        rows = csv.DictWriter(out, keywords, restval="")
        rows.writeheader()
        for number, dataset in enumerate(studies.values()):
            way = ways[number % len(ways)]
            rows.writerow({keyword: str(dataset.get(keyword, "")) for keyword in way})
    return path
