"""Check archived studies against their manifests; the PACS is never asked."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prefect_dicom.archive import Archive, open_archive
from prefect_dicom.archive.manifest import decode_manifest, held_manifest, same_manifest
from prefect_dicom.configuration import Site, ledger_url
from prefect_dicom.identifiers import study_prefix
from prefect_dicom.ledger import Ledger
from prefect_dicom.model import Level, ManifestInstance, StudyManifest, StudyReference


@dataclass(frozen=True, slots=True)
class VerifiedStudy:
    """What was found for one study; ``faults`` counts objects by reason code."""

    reference: StudyReference
    instances: int
    faults: Counter[str] = field(default_factory=Counter)


def verify_cohort(site: Site, cohort: str | int, level: Level) -> Iterator[VerifiedStudy]:
    """Check every archived study of a cohort.

    Parameters
    ----------
    cohort : str or int
        Name or number of the cohort in the ledger.
    level : Level
        How hard to look.

    Yields
    ------
    VerifiedStudy
        For each archived study, as it is checked.
    """
    with Ledger.open(ledger_url(site)) as ledger:
        archive = open_archive(site.archive)
        try:
            number = ledger.cohort(str(cohort)).number
            for reference, data in ledger.manifests(number):
                yield verify_study(archive, reference, data, level)
        finally:
            archive.close()


def verify_study(
    archive: Archive, reference: StudyReference, manifest: bytes, level: Level
) -> VerifiedStudy:
    """Check one study against the manifest the ledger remembers.

    The faults are ``archive-object-missing`` (manifest or object) and ``archive-checksum``
    (other size, hash or bytes, or another manifest).
    """
    proof = decode_manifest(manifest)
    faults: Counter[str] = Counter()
    faults.update(_manifest_faults(archive, proof, manifest))
    sizes = dict(archive.keys(study_prefix(proof.study_instance_uid)))
    for instance in proof.instances:
        faults.update(_instance_faults(archive, instance, sizes, level))
    return VerifiedStudy(reference, len(proof.instances), faults)


def _manifest_faults(archive: Archive, proof: StudyManifest, manifest: bytes) -> Iterator[str]:
    held = held_manifest(archive, proof.study_instance_uid)
    if held is None:
        yield "archive-object-missing"
    elif not same_manifest(held, manifest):
        yield "archive-checksum"


def _instance_faults(
    archive: Archive, instance: ManifestInstance, sizes: dict[str, int], level: Level
) -> Iterator[str]:
    size = sizes.get(instance.key)
    if size is None:
        yield "archive-object-missing"
        return
    other_size = level is not Level.EXISTS and size != instance.size_bytes
    look_inside = level in (Level.CHECKSUM, Level.READ)
    if other_size or (look_inside and _hash(archive, instance, level) != instance.sha256):
        yield "archive-checksum"


def _hash(archive: Archive, instance: ManifestInstance, level: Level) -> str | None:
    if level is Level.CHECKSUM:
        facts = archive.head(instance.key)
        if facts is not None and facts.sha256 is not None:
            return facts.sha256
    # Asked for, or a store that keeps no hash beside the object.
    digest = hashlib.sha256()
    for block in archive.read(instance.key):
        digest.update(block)
    return digest.hexdigest()
