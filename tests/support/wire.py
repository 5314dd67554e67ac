"""Helpers of the tests that speak DICOM's upper layer byte by byte."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import struct
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom.dsutils import decode
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    ImplementationClassUIDNotification,
    MaximumLengthNotification,
)
from pynetdicom.presentation import build_context

from prefect_dicom.core.background import Background
from prefect_dicom.core.errors import SpoolFull
from prefect_dicom.core.model import StoreRequest
from prefect_dicom.network.dimse import (
    Element,
    Elements,
    read_command,
    unsigned_short,
    write_command,
)
from prefect_dicom.network.storage_scp.close_reason import CloseReason
from prefect_dicom.network.storage_scp.transfer import (
    AssociationInfo,
    Limits,
    Transfer,
)
from prefect_dicom.network.upper_layer.negotiation import Context
from prefect_dicom.network.upper_layer.pdu import Pdu, message_pdus
from prefect_dicom.network.upper_layer.stream import Stream

CT = "1.2.840.10008.5.1.4.1.1.2"
VERIFICATION = "1.2.840.10008.1.1"
EXPLICIT = "1.2.840.10008.1.2.1"
IMPLICIT = "1.2.840.10008.1.2"
CONTEXTS = {1: Context(VERIFICATION, IMPLICIT), 3: Context(CT, EXPLICIT), 5: Context(CT, IMPLICIT)}


@dataclass
class MemoryInstance:
    """A part that keeps its bytes."""

    request: StoreRequest
    data: bytearray = field(default_factory=bytearray)
    room: int | None = None

    def write(self, fragments: list[memoryview]) -> None:
        for fragment in fragments:
            if self.room is not None and len(self.data) + len(fragment) > self.room:
                raise SpoolFull()
            self.data += fragment

    def give_back(self, *, all_of_it: bool) -> bool:
        return True


class MemoryStoreHandler:
    """A store handler that keeps instances in memory, in the order of completion."""

    def __init__(self, status: int = 0x0000, room: int | None = None, full: bool = False) -> None:
        self.status = status
        self.room = room
        self.full = full
        self.began: list[StoreRequest] = []
        self.completed: list[MemoryInstance] = []
        self.abandoned: list[MemoryInstance] = []
        self.changed = threading.Condition()

    def begin(self, request: StoreRequest, background: Background | None) -> MemoryInstance:
        with self.changed:
            self.began.append(request)
            self.changed.notify_all()
        if self.full:
            raise SpoolFull()
        return MemoryInstance(request, room=self.room)

    def complete(self, part: MemoryInstance) -> int:
        with self.changed:
            self.completed.append(part)
            self.changed.notify_all()
        return self.status

    def abandon(self, part: MemoryInstance) -> None:
        with self.changed:
            self.abandoned.append(part)
            self.changed.notify_all()

    def wait_until(self, condition, seconds: float = 10.0) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self), seconds)

    @property
    def instances(self) -> list[tuple[str, str, str, bytes]]:
        return [
            (
                part.request.sop_class_uid,
                part.request.sop_instance_uid,
                part.request.transfer_syntax_uid,
                bytes(part.data),
            )
            for part in self.completed
        ]


def store_command(uid: str, *, message_id: int = 1, data_set_type: int = 1, **more) -> bytes:
    elements = {
        Element.AFFECTED_SOP_CLASS_UID: CT.encode(),
        Element.COMMAND_FIELD: 0x0001,
        Element.MESSAGE_ID: message_id,
        Element.PRIORITY: 0,
        Element.COMMAND_DATA_SET_TYPE: data_set_type,
        Element.AFFECTED_SOP_INSTANCE_UID: uid.encode(),
    }
    elements.update(more.get("elements", {}))
    return write_command(elements)


def store_message(uid: str, data: bytes, *, context_id: int = 3, pdu_bytes: int = 0) -> bytes:
    return message_pdus(context_id, store_command(uid), data, pdu_bytes)


def echo_message(message_id: int = 7) -> bytes:
    command = write_command(
        {
            Element.AFFECTED_SOP_CLASS_UID: VERIFICATION.encode(),
            Element.COMMAND_FIELD: 0x0030,
            Element.MESSAGE_ID: message_id,
            Element.COMMAND_DATA_SET_TYPE: 0x0101,
        }
    )
    return message_pdus(1, command, None, 0)


def pdv(context_id: int, control: int, data: bytes) -> bytes:
    return struct.pack(">IBB", len(data) + 2, context_id, control) + data


def pdu(*pdvs: bytes) -> bytes:
    body = b"".join(pdvs)
    return struct.pack(">BxI", Pdu.P_DATA_TF, len(body)) + body


def association_request() -> bytes:
    """An A-ASSOCIATE-RQ that proposes CONTEXTS."""
    request = A_ASSOCIATE()
    request.application_context_name = "1.2.840.10008.3.1.1.1"
    request.calling_ae_title, request.called_ae_title = "SENDER", "PREFECTDICOM"
    request.presentation_context_definition_list = []
    for context_id, uid, syntax in (
        (1, VERIFICATION, IMPLICIT),
        (3, CT, EXPLICIT),
        (5, CT, IMPLICIT),
    ):
        context = build_context(uid, syntax)
        context.context_id = context_id
        request.presentation_context_definition_list.append(context)
    length = MaximumLengthNotification()
    length.maximum_length_received = 0
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = "1.2.3.4"
    request.user_information = [length, implementation]
    request_pdu = A_ASSOCIATE_RQ()
    request_pdu.from_primitive(request)
    return request_pdu.encode()


RELEASE_RQ = bytes((5, 0, 0, 0, 0, 4, 0, 0, 0, 0))
RELEASE_RP = bytes((6, 0, 0, 0, 0, 4, 0, 0, 0, 0))


def responses(data: bytes) -> tuple[list[Elements], bytes]:
    """The command sets we sent, and what came behind them that is no P-DATA."""
    commands = []
    while data[:1] == b"\x04":
        (length,) = struct.unpack_from(">I", data, 2)
        commands.append(read_command(data[12 : 6 + length]))
        data = data[6 + length :]
    return commands, data


def statuses(data: bytes) -> list[int]:
    return [unsigned_short(command, Element.STATUS) for command in responses(data)[0]]


class Conversation:
    """A transfer loop in a thread, on one end of a pair of sockets; the test has the other."""

    def __init__(
        self,
        store_handler: MemoryStoreHandler | None = None,
        *,
        limits: Limits | None = None,
        kind: int = socket.SOCK_STREAM,
        **more,
    ) -> None:
        self.store_handler = store_handler or MemoryStoreHandler()
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        self.ours.settimeout(20)
        self._theirs = theirs
        self.transfer = Transfer(
            Stream(theirs),
            CONTEXTS,
            self.store_handler,
            info=AssociationInfo("SENDER", "RECEIVER", "192.0.2.1"),
            limits=limits,
            **more,
        )
        self.end: CloseReason | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.end = self.transfer.run()
        self._theirs.close()

    def everything(self) -> bytes:
        """What the loop says until it closes."""
        said = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while chunk := self.ours.recv(65536):
                said += chunk
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.ours.close()
        return bytes(said)


def converse(*chunks: bytes, store_handler: MemoryStoreHandler | None = None, **more) -> tuple:
    """Say the chunks, each in one packet; the store handler, the end and what was answered."""
    talk = Conversation(store_handler, kind=socket.SOCK_SEQPACKET, **more)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for chunk in chunks:
            talk.ours.send(chunk)
    said = talk.everything()
    return talk.store_handler, talk.end, said


def make_instance(number: int, *, sop_class: str = CT, size: int = 64) -> Dataset:
    """A small, whole, synthetic instance of one study."""
    dataset = Dataset()
    dataset.SOPClassUID = sop_class
    dataset.SOPInstanceUID = f"1.2.3.4.{number}"
    dataset.StudyInstanceUID = "1.2.3"
    dataset.SeriesInstanceUID = "1.2.3.4"
    dataset.PatientID = "SYNTHETIC"
    dataset.PatientName = "Synthetic^Test"
    dataset.StudyID = "1"
    dataset.SeriesNumber = 1
    dataset.StudyDate = "20240101"
    dataset.StudyTime = "120000"
    dataset.AccessionNumber = "1"
    dataset.Modality = "CT"
    dataset.InstanceNumber = number
    dataset.Rows, dataset.Columns = size, size
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 0
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.add_new(0x7FE00010, "OW", bytes(number % 251 for _ in range(size * size * 2)))
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta = meta
    return dataset


def write_instances(directory: Path, count: int, **more) -> list[Path]:
    paths = []
    for number in range(1, count + 1):
        path = directory / f"{number:05}.dcm"
        make_instance(number, **more).save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def data_set_bytes(path: Path) -> bytes:
    """The data set of a Part 10 file: what lies behind its file meta."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<I", raw, 132 + 8)
    return raw[132 + 12 + length :]


def tool(name: str) -> str:
    """Path of a DCMTK program; skips the test where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"DCMTK's {name} is not installed")
    return path


# Debian's DCMTK leaves Nagle's algorithm on; the tests of it say so where they want it.
QUICK = {**os.environ, "TCP_NODELAY": "1"}


def run_tool(*arguments: object, environment: dict | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment or QUICK,
        check=False,
    )


def raw_answer(**values: bytes) -> Dataset:
    """A data set as it comes from the wire: nothing in it has been converted."""
    encoded = b""
    for tag, value in sorted((tag_for_keyword(k), v) for k, v in values.items()):
        value += b" " * (len(value) % 2)
        encoded += struct.pack("<HHL", tag >> 16, tag & 0xFFFF, len(value)) + value
    return decode(io.BytesIO(encoded), True, True)
