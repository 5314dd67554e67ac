"""Archived instances as they are sent: read from the archive, and checked on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial

from prefect_dicom.archive import Archive
from prefect_dicom.core.errors import ArchiveError, InstanceRejected
from prefect_dicom.core.model import ManifestInstance
from prefect_dicom.dicom.part10 import data_set_offset
from prefect_dicom.network.store import OutgoingInstance


def outgoing(archive: Archive, instance: ManifestInstance) -> OutgoingInstance:
    """The archived instance, to be sent."""
    return OutgoingInstance(
        sop_class_uid=instance.sop_class_uid,
        sop_instance_uid=instance.sop_instance_uid,
        transfer_syntax_uid=instance.transfer_syntax_uid,
        file=partial(checked_blocks, archive, instance),
        size_bytes=instance.size_bytes,
    )


def checked_blocks(archive: Archive, instance: ManifestInstance) -> Iterator[bytes]:
    """The file in blocks, the last of them only if all have the hash of the manifest.

    So an object that was damaged in the archive never arrives as a whole instance.

    Raises
    ------
    ArchiveError
        ``archive-checksum`` for another hash or size; else why it cannot be read.
    """
    digest = hashlib.sha256()
    size = 0
    held = b""
    for block in archive.read(instance.key):
        digest.update(block)
        size += len(block)
        if held:
            yield held
        held = bytes(block)
    if digest.hexdigest() != instance.sha256 or size != instance.size_bytes:
        raise ArchiveError("archive-checksum", "an object that was to be delivered")
    yield held


def data_set_sha256(archive: Archive, instance: ManifestInstance) -> str:
    """The SHA-256 of the data set, without the file meta information, in hexadecimal.

    Raises
    ------
    ArchiveError
        As :func:`checked_blocks`.
    InstanceRejected
        The file has no data set.
    """
    digest = hashlib.sha256()
    beginning = b""
    in_data_set = False
    for block in checked_blocks(archive, instance):
        if in_data_set:
            digest.update(block)
            continue
        beginning += block
        offset = data_set_offset(beginning)
        if offset is not None and offset <= len(beginning):
            digest.update(beginning[offset:])
            in_data_set = True
    if not in_data_set:
        raise InstanceRejected("instance-unreadable", "no data set")
    return digest.hexdigest()
