"""Check archived studies against their manifests; the PACS is never asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prefect_dicom.archive import Archive, open_archive
from prefect_dicom.archive.manifest import decode_manifest, held_manifest, same_manifest
from prefect_dicom.archive.proof import faults_of
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.core.model import Level, StudyReference
from prefect_dicom.ledger import Ledger


@dataclass(frozen=True, slots=True)
class VerifiedStudy:
    """What was found for one study; ``faults`` counts objects by reason code."""

    reference: StudyReference
    instances: int
    faults: Counter[str] = field(default_factory=Counter)


def verify_cohort(site: Site, cohort: str | int | None, level: Level) -> Iterator[VerifiedStudy]:
    """Check every archived study of a cohort.

    Parameters
    ----------
    cohort : str, int or None
        Name or number of the cohort in the ledger; None for all studies it has as archived.
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
            number = None if cohort is None else ledger.cohort(str(cohort)).number
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
    faults = faults_of(archive, proof, level)
    held = held_manifest(archive, proof.study_instance_uid)
    if held is None:
        faults["archive-object-missing"] += 1
    elif not same_manifest(held, manifest):
        faults["archive-checksum"] += 1
    return VerifiedStudy(reference, len(proof.instances), faults)
