"""Verification of archived studies against their manifests; the PACS is not queried.

:func:`check_manifest` also serves rebuilding the ledger and resuming after a crash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prefect_dicom.archive import open_archive
from prefect_dicom.archive.base import Archive
from prefect_dicom.archive.manifest import decode_manifest, held_manifest, same_manifest
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.core.errors import ArchiveError
from prefect_dicom.core.model import Level, ManifestInstance, StudyManifest, StudyReference
from prefect_dicom.core.uids import study_prefix
from prefect_dicom.ledger import Ledger


@dataclass(frozen=True, slots=True)
class VerifiedStudy:
    """Result of the verification of one study.

    Attributes
    ----------
    reference : StudyReference
        Reference of the study in the ledger.
    instances : int
        Instances that its manifest names.
    missing : int
        Instances that never came, as its manifest says: the study is not whole, and a person has
        accepted that.
    faults : Counter of str
        Faulty objects by reason code; empty if the study is as its manifest says.
    """

    reference: StudyReference
    instances: int
    missing: int
    faults: Counter[str] = field(default_factory=Counter)


def verify_cohort(site: Site, cohort: str | int | None, level: Level) -> Iterator[VerifiedStudy]:
    """Verify every archived study of a cohort.

    Parameters
    ----------
    site : Site
        Site with ledger and archive.
    cohort : str, int or None
        Name or number of the cohort in the ledger; None for all archived studies of the ledger.
    level : Level
        Existence, size, recorded checksum, or all bytes.

    Yields
    ------
    VerifiedStudy
        One per archived study, as it is verified.
    """
    with Ledger.open(ledger_url(site)) as ledger:
        archive = open_archive(site.archive)
        try:
            number = None if cohort is None else ledger.cohorts.get(str(cohort)).number
            for reference, data in ledger.manifests.of_cohort(number):
                yield verify_study(archive, reference, data, level)
        finally:
            archive.close()


def verify_study(
    archive: Archive, reference: StudyReference, manifest: bytes, level: Level
) -> VerifiedStudy:
    """Verify one study against the manifest in the ledger.

    Faults are ``archive-object-missing`` (manifest or object) and ``archive-checksum`` (other
    size, hash or bytes, or another manifest).
    """
    proof = decode_manifest(manifest)
    faults = check_manifest(archive, proof, level)
    held = held_manifest(archive, proof.study_instance_uid)
    if held is None:
        faults["archive-object-missing"] += 1
    elif not same_manifest(held, manifest):
        faults["archive-checksum"] += 1
    return VerifiedStudy(reference, len(proof.instances), len(proof.missing), faults)


def check_manifest(
    archive: Archive,
    manifest: StudyManifest,
    level: Level,
    sizes: Mapping[str, int] | None = None,
) -> Counter[str]:
    """Check that the archive holds every object of a manifest as the manifest says.

    Parameters
    ----------
    archive : Archive
        Archive with the study.
    manifest : StudyManifest
        Manifest of the study.
    level : Level
        Existence, size, recorded checksum, or all bytes.
    sizes : mapping of str to int, optional
        Sizes in bytes by key, as the archive lists the study; listed here by default.

    Returns
    -------
    Counter of str
        Objects by reason code: ``archive-object-missing``, or ``archive-checksum`` for another
        size, hash or other bytes.

    Raises
    ------
    ArchiveError
        The archive cannot be reached.
    """
    if sizes is None:
        sizes = dict(archive.keys(study_prefix(manifest.study_instance_uid)))
    faults: Counter[str] = Counter()
    for instance in manifest.instances:
        fault = _check_instance(archive, instance, sizes.get(instance.key), level)
        if fault is not None:
            faults[fault] += 1
    return faults


def _check_instance(
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
        # Deleted since it was listed.
        return error.code
    return None if found == instance.sha256 else "archive-checksum"


def _hash(archive: Archive, key: str, level: Level) -> str:
    if level is Level.CHECKSUM:
        facts = archive.head(key)
        if facts is not None and facts.sha256 is not None:
            return facts.sha256
    # Level READ, or a store that keeps no hash beside the object.
    return archive.digest(key)
