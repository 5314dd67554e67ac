"""Part 10 files: the file meta that is put before a received data set, and a scan of a file.

:func:`file_meta` writes the preamble and group 2 (PS3.10 7.1) for a C-STORE request.
:func:`scan` walks the top-level elements of a file (PS3.5 chapter 7) by their headers alone and
compares every declared length with the bytes that are there, which general readers do not: a
file cut in its pixel data reads as a shorter image.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from uuid import UUID

from prefect_dicom.core.errors import InstanceRejected
from prefect_dicom.core.model import Identity, StoreRequest
from prefect_dicom.core.uids import is_uid
from prefect_dicom.dicom.element_walk import ElementWalk
from prefect_dicom.dicom.encoding import LONG_VRS, SHORT_VRS
from prefect_dicom.dicom.structure import Structure

IMPLEMENTATION_CLASS_UID = f"2.25.{UUID('6f1c7a52-3b0e-4d8a-9a57-0d1c0f8b2e64').int}"
"""Identifies this software in file meta and associations (PS3.7 D.3.3.2); never changes."""
IMPLEMENTATION_VERSION_NAME = "PREFECT_DICOM"


# --- writing

_UNSIGNED_LONG = Struct("<L")
_BEFORE_GROUP_LENGTH = bytes(128) + b"DICM" + b"\2\0\0\0UL\4\0"
_GROUP_LENGTH_END = len(_BEFORE_GROUP_LENGTH) + _UNSIGNED_LONG.size


def file_meta(request: StoreRequest) -> bytes:
    """Return preamble, prefix and file meta information for a received instance, PS3.10 7.1.

    They depend on the request's SOP class, SOP instance and transfer syntax alone: the same
    instance makes the same file whenever and over whichever association it arrives.

    Parameters
    ----------
    request : StoreRequest
        The C-STORE request; its UIDs are written unchanged, whatever they hold.

    Returns
    -------
    bytes
        Everything up to the first byte of the data set.
    """
    kind = request.sop_class_uid, request.transfer_syntax_uid
    # UIDs that a peer made up are not worth caching, and may be long.
    around = _around_instance if all(map(is_uid, kind)) else _around_instance.__wrapped__
    before, after = around(*kind)
    instance = _meta_element(0x0003, b"UI", _raw(request.sop_instance_uid))
    length = _UNSIGNED_LONG.pack(len(before) + len(instance) + len(after))
    return _BEFORE_GROUP_LENGTH + length + before + instance + after


def data_set_offset(beginning: bytes) -> int | None:
    """Return where the data set of a Part 10 file begins; None where more of it has to be read.

    Parameters
    ----------
    beginning : bytes
        The first bytes of the file.

    Raises
    ------
    InstanceRejected
        ``instance-unreadable``: it is no Part 10 file, or has no group length (PS3.10 7.1).
    """
    if len(beginning) < _GROUP_LENGTH_END:
        return None
    # The preamble is anybody's.
    if beginning[128 : len(_BEFORE_GROUP_LENGTH)] != _BEFORE_GROUP_LENGTH[128:]:
        raise InstanceRejected("instance-unreadable", "no file meta information with a length")
    (length,) = _UNSIGNED_LONG.unpack_from(beginning, len(_BEFORE_GROUP_LENGTH))
    return _GROUP_LENGTH_END + int(length)


@functools.lru_cache(maxsize=256)
def _around_instance(sop_class_uid: str, transfer_syntax_uid: str) -> tuple[bytes, bytes]:
    """Return the elements before and behind (0002,0003): the same for all instances of a kind."""
    before = _meta_element(0x0001, b"OB", b"\x00\x01")
    before += _meta_element(0x0002, b"UI", _raw(sop_class_uid))
    after = _meta_element(0x0010, b"UI", _raw(transfer_syntax_uid))
    after += _meta_element(0x0012, b"UI", _raw(IMPLEMENTATION_CLASS_UID))
    after += _meta_element(0x0013, b"SH", _raw(IMPLEMENTATION_VERSION_NAME))
    return before, after


def _meta_element(element: int, vr: bytes, value: bytes) -> bytes:
    if len(value) % 2:
        value += b" " if vr == b"SH" else b"\0"
    if vr in SHORT_VRS and len(value) <= 0xFFFE:
        return Struct("<HH2sH").pack(0x0002, element, vr, len(value)) + value
    # PS3.5 6.2.2: a value too long for its own VR is written as UN.
    vr = vr if vr in LONG_VRS else b"UN"
    return Struct("<HH2sxxL").pack(0x0002, element, vr, len(value)) + value


def _raw(text: str) -> bytes:
    try:
        return text.encode("latin-1", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


# --- reading


@dataclass(frozen=True, slots=True)
class Scan:
    """Result of a scan. With a ``fault``, what was read before it."""

    identity: Identity
    structure: Structure
    fault: InstanceRejected | None = None


def scan(path: Path) -> Scan:
    """Walk a Part 10 file from its first byte to its last.

    Raises
    ------
    InstanceRejected
        ``instance-unreadable`` or ``instance-truncated``; nothing else, whatever the bytes.
    OSError
        The file cannot be opened or read.
    """
    found = survey(path)
    if found.fault is not None:
        raise found.fault
    return found


def survey(path: Path) -> Scan:
    """Same as :func:`scan`, but a fault is part of the result, beside what was read before it.

    A truncated instance still names its patient, and is checked against it.

    Raises
    ------
    OSError
        The file cannot be opened or read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        walk = ElementWalk(descriptor)
        _run(walk)
    finally:
        os.close(descriptor)
    return Scan(walk.identity(), walk.structure(), walk.fault)


def study_of(
    descriptor: int, data_set_at: int | None = None, transfer_syntax_uid: str = ""
) -> str | None:
    """Return the StudyInstanceUID of an open file that was just written, or None.

    The walk ends as soon as it is read, so that the cost does not grow with the number of frames.

    Parameters
    ----------
    descriptor : int
        File descriptor, open for reading.
    data_set_at : int, optional
        Offset of the data set, behind the file meta; by default that is read first.
    transfer_syntax_uid : str
        Transfer syntax in the file meta, where that is not read.
    """
    walk = ElementWalk(descriptor, study_only=True)
    _run(walk, data_set_at, transfer_syntax_uid)
    return walk.study_instance_uid()


def _run(walk: ElementWalk, data_set_at: int | None = None, transfer_syntax_uid: str = "") -> None:
    try:
        if data_set_at is None:
            walk.run()
        else:
            walk.run_data_set(data_set_at, transfer_syntax_uid)
    except InstanceRejected as error:
        walk.fault = error
    except OSError:
        raise
    except Exception as error:
        # No bytes are known to lead here; a hostile sender may find some.
        walk.fault = InstanceRejected("instance-unreadable", type(error).__name__)
