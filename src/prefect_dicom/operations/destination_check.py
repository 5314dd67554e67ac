"""The doctor's checks of a node to which studies are delivered."""

from __future__ import annotations

import io
from collections.abc import Iterator

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from prefect_dicom.config.destination import Destination
from prefect_dicom.config.node import PacsNode
from prefect_dicom.core.deliveries import DeliveryEvidence
from prefect_dicom.core.errors import PacsError
from prefect_dicom.dicom.part10 import IMPLEMENTATION_CLASS_UID
from prefect_dicom.network.commitment import CommitmentAssociation
from prefect_dicom.network.find.list_instances import list_instances
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.network.status import reason_for_status
from prefect_dicom.network.store import OutgoingInstance, StoreAssociation
from prefect_dicom.operations.findings import Finding, checked

TEST_PATIENT_ID = "PREFECT-DICOM-TEST"
"""PatientID of the synthetic instance, by which people find it again."""
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_PAIR = (_SECONDARY_CAPTURE, str(ExplicitVRLittleEndian))
_INVALID_ARGUMENT_VALUE = 0x0115


def check_destination(name: str, node: PacsNode, destination: Destination) -> Iterator[Finding]:
    """Check that a node answers, takes instances and shows the evidence that the site asks for.

    Where the site allows it, one synthetic instance is stored there, and stays.
    """
    yield checked(name, "answers a C-ECHO", lambda: _echo(node))
    if not destination.test_instance:
        yield checked(name, "accepts a presentation context of storage", lambda: _negotiate(node))
    else:
        study, series, instance = (str(generate_uid(prefix=None)) for _ in range(3))
        stored = checked(
            name, "stores a synthetic instance", lambda: _store(node, study, series, instance)
        )
        yield stored
        if stored.ok and destination.evidence is not DeliveryEvidence.ACCEPTED:
            yield checked(
                name, "lists the synthetic instance", lambda: _list(node, study, instance)
            )
    if destination.evidence is DeliveryEvidence.COMMITTED:
        yield checked(name, "offers storage commitment", lambda: _offer_of_commitment(node))


def _echo(node: PacsNode) -> str:
    with Requestor(node) as requestor:
        return f"after {requestor.echo():.2f} s"


def _negotiate(node: PacsNode) -> str:
    with StoreAssociation(node, [_PAIR]) as association:
        if not association.accepts(_PAIR):
            raise PacsError("context-refused", "Secondary Capture, Explicit VR Little Endian")
    return "nothing was sent; `destination.test_instance` allows a synthetic instance"


def _store(node: PacsNode, study: str, series: str, instance: str) -> str:
    data = _synthetic(study, series, instance)
    outgoing = OutgoingInstance(_PAIR[0], instance, _PAIR[1], lambda: iter([data]), len(data))
    with StoreAssociation(node, [_PAIR]) as association:
        if not association.accepts(_PAIR):
            raise PacsError("context-refused", "Secondary Capture, Explicit VR Little Endian")
        ((_, status),) = association.send([outgoing])
    code = reason_for_status("C-STORE", status)
    if code is not None:
        raise PacsError(code, f"C-STORE status {status:04X}")
    return (
        f"it stays there: to remove it, delete the study of PatientID {TEST_PATIENT_ID} with "
        f"StudyInstanceUID {study} at the node"
    )


def _list(node: PacsNode, study: str, instance: str) -> str:
    with Requestor(node) as requestor:
        listed = list_instances(requestor, study, TEST_PATIENT_ID)
    if instance not in {each.key.sop_instance_uid for each in listed.instances}:
        raise PacsError("delivery-lacking", "it answered success to a synthetic instance")
    return "as it was sent"


def _offer_of_commitment(node: PacsNode) -> str:
    with CommitmentAssociation(node, lambda _: _INVALID_ARGUMENT_VALUE):
        return "its reports come to the receiver, which has to be up and known to it"


def _synthetic(study: str, series: str, instance: str) -> bytes:
    """A Secondary Capture image of 16 by 16 pixels that names nobody, as a Part 10 file."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = UID(_SECONDARY_CAPTURE), UID(instance)
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = UID(study), UID(series)
    dataset.PatientID, dataset.PatientName = TEST_PATIENT_ID, "Test^Delivery"
    dataset.Modality, dataset.ConversionType = "OT", "SYN"
    dataset.StudyDescription = "prefect-dicom doctor: may be deleted"
    for keyword in (
        "StudyDate",
        "StudyTime",
        "AccessionNumber",
        "ReferringPhysicianName",
        "StudyID",
        "PatientBirthDate",
        "PatientSex",
    ):
        setattr(dataset, keyword, "")
    dataset.SeriesNumber, dataset.InstanceNumber = 1, 1
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows = dataset.Columns = 16
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.PixelData = bytes(16 * 16)
    dataset["PixelData"].VR = "OB"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    written = io.BytesIO()
    dataset.save_as(written, enforce_file_format=True)
    return written.getvalue()
