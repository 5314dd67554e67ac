"""Is the archive what a manifest says? The one answer for verifying, rebuilding and adopting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from prefect_dicom.archive.base import Archive
from prefect_dicom.core.errors import ArchiveError
from prefect_dicom.core.model import Level, ManifestInstance, StudyManifest
from prefect_dicom.core.uids import study_prefix


def faults_of(
    archive: Archive,
    manifest: StudyManifest,
    level: Level,
    sizes: Mapping[str, int] | None = None,
) -> Counter[str]:
    """Look whether every object that a manifest names is there, and as it says.

    Parameters
    ----------
    level : Level
        How hard to look.
    sizes : mapping of key to size in bytes, optional
        What the archive lists of the study, where that is known already.

    Returns
    -------
    Counter of str
        Objects by reason code: ``archive-object-missing``, or ``archive-checksum`` for another
        size, hash or other bytes.

    Raises
    ------
    ArchiveError
        The archive cannot be asked.
    """
    if sizes is None:
        sizes = dict(archive.keys(study_prefix(manifest.study_instance_uid)))
    faults: Counter[str] = Counter()
    for instance in manifest.instances:
        fault = _fault_of(archive, instance, sizes.get(instance.key), level)
        if fault is not None:
            faults[fault] += 1
    return faults


def _fault_of(
    archive: Archive, instance: ManifestInstance, size: int | None, level: Level
) -> str | None:
    if size is None:
        return "archive-object-missing"
    if level is not Level.EXISTS and size != instance.size_bytes:
        return "archive-checksum"
    if level in (Level.EXISTS, Level.SIZE):
        return None
    try:
        found = _hash(archive, instance.key, level)
    except ArchiveError as error:
        if error.code != "archive-object-missing":
            raise
        # Gone since it was listed.
        return error.code
    return None if found == instance.sha256 else "archive-checksum"


def _hash(archive: Archive, key: str, level: Level) -> str:
    if level is Level.CHECKSUM:
        facts = archive.head(key)
        if facts is not None and facts.sha256 is not None:
            return facts.sha256
    # Asked for, or a store that keeps no hash beside the object.
    return archive.digest(key)
