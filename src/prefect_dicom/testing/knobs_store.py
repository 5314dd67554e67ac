"""Knobs for the instances that are sent: other values, other bytes, another order."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from prefect_dicom.testing.instances import StoredInstance, decoded, encoded, with_elements
from prefect_dicom.testing.plans import (
    AssociationPlan,
    Knob,
    RetrievePlan,
    Stage,
    SubOperation,
)

if TYPE_CHECKING:
    from prefect_dicom.testing.script import Behaviour

_Instances = int | Sequence[str]
_MEBIBYTE = 1 << 20


def alter(
    plan: RetrievePlan,
    by: Behaviour,
    instances: _Instances,
    change: Callable[[bytes, StoredInstance], bytes],
) -> bool:
    """Let ``change`` rewrite the data sets of these instances, on top of what others rewrite."""
    picked = by.pick(plan.operations, instances)
    for operation in picked:
        operation.data = partial(_changed, operation.data, operation.stored, change)
    return bool(picked)


def _changed(
    before: Callable[[], bytes],
    stored: StoredInstance,
    change: Callable[[bytes, StoredInstance], bytes],
) -> bytes:
    return change(before(), stored)


def _coerce(
    plan: RetrievePlan, by: Behaviour, *, elements: Mapping[str, Any], instances: _Instances = 1
) -> bool:
    return alter(
        plan,
        by,
        instances,
        lambda data, stored: with_elements(data, stored.transfer_syntax_uid, elements),
    )


def _other_study(
    plan: RetrievePlan,
    by: Behaviour,
    *,
    instances: _Instances = 1,
    study_instance_uid: str = "2.25.4100",
) -> bool:
    elements = {"StudyInstanceUID": study_instance_uid}
    return _coerce(plan, by, elements=elements, instances=instances)


def _uid_mismatch(
    plan: RetrievePlan,
    by: Behaviour,
    *,
    instances: _Instances = 1,
    sop_instance_uid: str = "2.25.4500",
) -> bool:
    picked = by.pick(plan.operations, instances)
    for operation in picked:
        operation.sop_instance_uid = sop_instance_uid
    return bool(picked)


_ODDLY: dict[str, Callable[[str], str]] = {
    "blank": lambda uid: uid + " ",
    "nul": lambda uid: uid + "\0\0",
    "zeros": lambda uid: ".0".join(uid.rsplit(".", 1)),
    "long": lambda uid: uid + ".1" * 40,
    "letters": lambda uid: uid + "A",
}


def _odd_uid(
    plan: RetrievePlan, by: Behaviour, *, instances: _Instances = 1, how: str = "blank"
) -> bool:
    oddly = _ODDLY[how]
    picked = by.pick(plan.operations, instances)
    for operation in picked:
        operation.sop_instance_uid = oddly(operation.stored.sop_instance_uid)
    return _alter_uids(plan, by, instances, oddly)


def _alter_uids(
    plan: RetrievePlan, by: Behaviour, instances: _Instances, oddly: Callable[[str], str]
) -> bool:
    def written_oddly(data: bytes, stored: StoredInstance) -> bytes:
        elements = {"SOPInstanceUID": oddly(stored.sop_instance_uid)}
        return with_elements(data, stored.transfer_syntax_uid, elements)

    return alter(plan, by, instances, written_oddly)


def _wrong_syntax(
    plan: RetrievePlan,
    by: Behaviour,
    *,
    instances: _Instances = 1,
    transfer_syntax_uid: str | None = None,
) -> bool:
    def written_otherwise(data: bytes, stored: StoredInstance) -> bytes:
        own = stored.transfer_syntax_uid
        implicit = own == ImplicitVRLittleEndian
        other = ExplicitVRLittleEndian if implicit else ImplicitVRLittleEndian
        return encoded(decoded(data, own), transfer_syntax_uid or other)

    return alter(plan, by, instances, written_otherwise)


def _transcode(
    plan: RetrievePlan,
    by: Behaviour,
    *,
    instances: _Instances = 1,
    transfer_syntax_uid: str = ImplicitVRLittleEndian,
    lossy: bool = False,
) -> bool:
    def re_encoded(data: bytes, stored: StoredInstance) -> bytes:
        return _transcoded(data, stored.transfer_syntax_uid, transfer_syntax_uid, lossy=lossy)

    picked = by.pick(plan.operations, instances)
    for operation in picked:
        stored = operation.stored
        operation.stored = replace(stored, transfer_syntax_uid=str(transfer_syntax_uid))
        operation.data = partial(_changed, operation.data, stored, re_encoded)
    return bool(picked)


def _transcoded(data: bytes, syntax: str, into: str, *, lossy: bool = False) -> bytes:
    """A data set in another native transfer syntax; ``lossy`` costs its pixels their low bits."""
    dataset = decoded(data, syntax)
    if UID(syntax).is_encapsulated:
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = UID(syntax)
        dataset.decompress(generate_instance_uid=False)
    if lossy:
        dataset.LossyImageCompression = "01"
        dataset.LossyImageCompressionRatio = "10"
        if "PixelData" in dataset:
            dataset.PixelData = bytes(byte & 0xF0 for byte in dataset.PixelData)
    return encoded(dataset, into)


def _odd_length(plan: RetrievePlan, by: Behaviour, *, instances: _Instances = 1) -> bool:
    picked = by.pick(plan.operations, instances)
    if any(o.stored.transfer_syntax_uid == DeflatedExplicitVRLittleEndian for o in picked):
        return False
    return alter(plan, by, instances, lambda data, stored: data + _odd_element(stored))


def _odd_element(stored: StoredInstance) -> bytes:
    """A private element of seven bytes, behind the pixel data."""
    syntax = stored.transfer_syntax_uid
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    written = b""
    for element, value in ((0x0010, b"ODD LENGTH"), (0x1001, b"7 bytes")):
        written += struct.pack(order + "HH", 0x7FE1, element)
        if syntax == ImplicitVRLittleEndian:
            written += struct.pack("<L", len(value)) + value
        else:
            written += b"LO" + struct.pack(order + "H", len(value)) + value
    return written


def _huge(
    plan: RetrievePlan, by: Behaviour, *, instances: _Instances = 1, mebibytes: int = 64
) -> bool:
    return alter(plan, by, instances, lambda data, stored: _with_frames(data, stored, mebibytes))


def _with_frames(data: bytes, stored: StoredInstance, mebibytes: int) -> bytes:
    """As many frames of noise as fill this many MiB, in a native little endian syntax."""
    syntax = stored.transfer_syntax_uid
    image = decoded(data, syntax)
    frame: int = image.Rows * image.Columns * image.SamplesPerPixel * image.BitsAllocated // 8
    frames = -(-mebibytes * _MEBIBYTE // frame)
    head = with_elements(data, syntax, {"NumberOfFrames": str(frames), "PixelData": None})
    noise = random.Random(stored.sop_instance_uid).randbytes(_MEBIBYTE)
    size = frames * frame
    header = struct.pack("<HH", 0x7FE0, 0x0010)
    if syntax != ImplicitVRLittleEndian:
        header += b"OW\0\0"
    pixels = (noise * (size // _MEBIBYTE + 1))[:size]
    return head + header + struct.pack("<L", size + size % 2) + pixels + b"\0" * (size % 2)


def _shuffle(plan: RetrievePlan, by: Behaviour, *, lot: int = 0) -> bool:
    random.Random(lot).shuffle(plan.operations)
    return len(plan.operations) > 1


def _async_flood(plan: RetrievePlan, by: Behaviour, *, window: int = 1000) -> bool:
    plan.window = window
    return len(plan.operations) > 1


def _pipeline(
    plan: RetrievePlan | AssociationPlan,
    by: Behaviour,
    *,
    window: int = 0,
    beyond: int = 0,
    abort_within: int | None = None,
) -> bool:
    if isinstance(plan, AssociationPlan):
        plan.window = True
        # The answer to a proposal; what this is for is the retrieve.
        return False
    plan.manner.window, plan.beyond_window, plan.abort_within = window, beyond, abort_within
    return bool(plan.operations)


def _truncate(
    plan: RetrievePlan,
    by: Behaviour,
    *,
    instances: int | Sequence[str] = 1,
    keep: float = 0.5,
    less_bytes: int = 0,
    before: bytes = b"",
    behind: bytes = b"",
) -> bool:
    def cut(data: bytes, stored: StoredInstance) -> bytes:
        length = int(len(data) * keep) // 2 * 2  # a PDV of odd length is another fault
        return before + data[: length - less_bytes] + behind

    return alter(plan, by, instances, cut)


def _other_patient(
    plan: RetrievePlan,
    by: Behaviour,
    *,
    instances: int | Sequence[str] = 1,
    patient_id: str = "OTHER-000001",
) -> bool:
    other = {"PatientID": patient_id, "PatientName": "Other^Patient"}
    return alter(
        plan,
        by,
        instances,
        lambda data, stored: with_elements(data, stored.transfer_syntax_uid, other),
    )


def _duplicate(plan: RetrievePlan, by: Behaviour, *, instances: int | Sequence[str] = 1) -> bool:
    return _insert_behind(plan, by, instances, lambda stored: stored)


def _conflict(
    plan: RetrievePlan,
    by: Behaviour,
    *,
    instances: int | Sequence[str] = 1,
    transfer_syntax_uid: str | None = None,
) -> bool:
    def second(stored: StoredInstance) -> StoredInstance:
        own = stored.transfer_syntax_uid
        other, comment = transfer_syntax_uid or own, {"ImageComments": "Second version."}

        def data() -> bytes:
            if transfer_syntax_uid is None:
                return with_elements(stored.encoded(), own, comment)
            return _transcoded(stored.encoded(), own, other)

        return replace(stored, transfer_syntax_uid=other, encoded=data)

    return _insert_behind(plan, by, instances, second)


def _insert_behind(
    plan: RetrievePlan,
    by: Behaviour,
    instances: int | Sequence[str],
    again: Callable[[StoredInstance], StoredInstance],
) -> bool:
    picked = by.pick(plan.operations, instances)
    for operation in picked:
        copy = SubOperation.of(again(operation.stored), counted=False)
        plan.operations.insert(plan.operations.index(operation) + 1, copy)
    return bool(picked)


def _titles(
    plan: RetrievePlan, by: Behaviour, *, called: bytes | None = None, calling: bytes | None = None
) -> bool:
    plan.manner.items = replace(plan.manner.items, called=called, calling=calling)
    return plan.service == "C-MOVE"


def _items(
    plan: RetrievePlan, by: Behaviour, *, leave_out: Sequence[int] = (), add: bytes = b""
) -> bool:
    plan.manner.items = replace(plan.manner.items, leave_out=tuple(leave_out), add=add)
    return plan.service == "C-MOVE"


def _source(plan: RetrievePlan, by: Behaviour, *, address: str) -> bool:
    plan.manner.source = address
    return plan.service == "C-MOVE"


def _contexts(plan: RetrievePlan, by: Behaviour, *, classes: int = 127, syntaxes: int = 45) -> bool:
    plan.manner.classes, plan.manner.syntaxes = classes, syntaxes
    return plan.service == "C-MOVE"


def _long_pdus(plan: RetrievePlan, by: Behaviour, *, size_bytes: int = _MEBIBYTE) -> bool:
    plan.manner.pdu_bytes = size_bytes
    return bool(plan.operations)


def _unsolicited(
    plan: RetrievePlan,
    by: Behaviour,
    *,
    extra: Sequence[StoredInstance],
    originator: bool = False,
) -> bool:
    plan.operations[:0] = [
        SubOperation.of(stored, counted=False, originator=originator) for stored in extra
    ]
    return bool(extra)


STORE_KNOBS = (
    Knob(
        "store.truncate",
        (Stage.RETRIEVE,),
        "Sends the first part (`keep`, a share, and `less_bytes`) of the data set of these "
        "`instances`, with these bytes `before` and `behind` it.",
        _truncate,
    ),
    Knob(
        "store.other_patient",
        (Stage.RETRIEVE,),
        "Sends these `instances` with another PatientID.",
        _other_patient,
    ),
    Knob(
        "store.async_flood",
        (Stage.RETRIEVE,),
        "Has up to `window` C-STORE requests outstanding, whatever the receiver grants.",
        _async_flood,
    ),
    Knob(
        "store.pipeline",
        (Stage.ASSOCIATE, Stage.RETRIEVE),
        "Negotiates an asynchronous operations `window` (0: any number; of a C-GET what the "
        "requestor proposes), has as many C-STORE requests outstanding as it was granted and so "
        "many `beyond`, and takes responses in any order; aborts its association to the "
        "destination in the middle of the instance with this number (`abort_within`, from 0).",
        _pipeline,
    ),
    Knob(
        "store.duplicate",
        (Stage.RETRIEVE,),
        "Sends these `instances` twice.",
        _duplicate,
    ),
    Knob(
        "store.conflict",
        (Stage.RETRIEVE,),
        "Sends these `instances` twice, the second time with another content, or the same in "
        "another native `transfer_syntax_uid`.",
        _conflict,
    ),
    Knob(
        "store.unsolicited",
        (Stage.RETRIEVE,),
        "Sends these `extra` instances first, which nobody requested.",
        _unsolicited,
    ),
    Knob(
        "store.coerce",
        (Stage.RETRIEVE,),
        "Sends these `instances` with other `elements`, by keyword; None takes one away.",
        _coerce,
    ),
    Knob(
        "store.other_study",
        (Stage.RETRIEVE,),
        "Sends these `instances` under another `study_instance_uid`.",
        _other_study,
    ),
    Knob(
        "store.uid_mismatch",
        (Stage.RETRIEVE,),
        "Requests to store these `instances` name another `sop_instance_uid` than the data sets.",
        _uid_mismatch,
    ),
    Knob(
        "store.odd_uid",
        (Stage.RETRIEVE,),
        "Writes the SOP Instance UID of these `instances` oddly; `how`: blank or nul (behind it), "
        "zeros (leading), long (over 64 characters), letters.",
        _odd_uid,
    ),
    Knob(
        "store.wrong_syntax",
        (Stage.RETRIEVE,),
        "Sends these `instances` in another encoding (`transfer_syntax_uid`) than negotiated.",
        _wrong_syntax,
    ),
    Knob(
        "store.transcode",
        (Stage.RETRIEVE,),
        "Negotiates another native `transfer_syntax_uid` for these `instances` and re-encodes "
        "them; `lossy` changes their pixels too.",
        _transcode,
    ),
    Knob(
        "store.odd_length",
        (Stage.RETRIEVE,),
        "Sends these `instances` with a value of odd length at their end.",
        _odd_length,
    ),
    Knob(
        "store.huge",
        (Stage.RETRIEVE,),
        "Sends these native `instances` with as many frames as fill `mebibytes` MiB.",
        _huge,
    ),
    Knob(
        "store.titles",
        (Stage.RETRIEVE,),
        "Requests its associations to the destination with these bytes as `called` and `calling` "
        "titles (of a C-MOVE).",
        _titles,
    ),
    Knob(
        "store.items",
        (Stage.RETRIEVE,),
        "Leaves the user items of these types (0x51: the maximum length) out of its association "
        "requests to the destination, and `add`s these bytes to them.",
        _items,
    ),
    Knob(
        "store.source",
        (Stage.RETRIEVE,),
        "Sends from this `address` of the host.",
        _source,
    ),
    Knob(
        "store.contexts",
        (Stage.RETRIEVE,),
        "Proposes as many `classes` to the destination, and as many `syntaxes` more in each "
        "context.",
        _contexts,
    ),
    Knob(
        "store.long_pdus",
        (Stage.RETRIEVE,),
        "Sends PDUs of `size_bytes`, whatever the receiver says it takes.",
        _long_pdus,
    ),
    Knob(
        "store.shuffle",
        (Stage.RETRIEVE,),
        "Sends in an order drawn by `lot`, series interleaved.",
        _shuffle,
    ),
)
"""All knobs for the C-STORE sub-operations."""
