"""Rebuild of a lost ledger from the manifests in the archive; the PACS is not queried.

A manifest is written when everything it names is stored, so it proves to the ledger that a study
is archived. Each is verified: it must be a manifest of this software for its prefix, and what it
names must be in the archive.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prefect_dicom.archive import Archive, open_archive
from prefect_dicom.archive.manifest import manifest_at, same_manifest
from prefect_dicom.archive.verification import check_manifest
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.core.errors import ArchiveError
from prefect_dicom.core.model import Level, StudyReference
from prefect_dicom.core.uids import uid_of
from prefect_dicom.ledger import FoundStudy, Ledger, RebuildOutcome

_STUDIES = "studies/"
_MANIFEST = "manifest.json"
# Batch that is held in memory and written in one transaction.
_MOST_STUDIES = 50
_MOST_BYTES = 4 * 1024**2


@dataclass(frozen=True, slots=True)
class RebuiltStudy:
    """Result for one study of the archive.

    Attributes
    ----------
    reference : StudyReference or None
        Reference in the ledger, if it has one.
    outcome : RebuildOutcome or None
        What the ledger did with the manifest; None without a manifest that names its study.
    instances : int
        Instances that the manifest names.
    missing : int
        Instances that never came, as the manifest says.
    faults : Counter of str
        Faulty objects by reason code.
    """

    reference: StudyReference | None
    outcome: RebuildOutcome | None = None
    instances: int = 0
    missing: int = 0
    faults: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Found:
    study: FoundStudy | None
    instances: int = 0
    missing: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    @property
    def size_bytes(self) -> int:
        return 0 if self.study is None else len(self.study.body)


def rebuild_ledger(site: Site, level: Level = Level.SIZE) -> Iterator[RebuiltStudy]:
    """Add the studies of the archive that the ledger does not know.

    Entries of the ledger stay, except unfinished studies that the archive proves to be complete,
    see :meth:`~prefect_dicom.ledger.rebuild.Rebuild.import_studies`. A study with faults does not
    count as archived: an unknown one is added as failed, for a rerun to complete. After an
    interruption the same call continues. Memory does not grow with the archive.

    Parameters
    ----------
    site : Site
        Site with ledger and archive.
    level : Level
        Depth of the verification. ``exists`` compares sizes too: a listing holds both.

    Yields
    ------
    RebuiltStudy
        For each study in the archive, when it is in the ledger.
    """
    with Ledger.open(ledger_url(site)) as ledger, open_archive(site.archive) as archive:
        batch: list[_Found] = []
        for found in _verified(archive, Level.SIZE if level is Level.EXISTS else level):
            batch.append(found)
            size_bytes = sum(each.size_bytes for each in batch)
            if len(batch) >= _MOST_STUDIES or size_bytes >= _MOST_BYTES:
                yield from _imported(ledger, batch)
                batch.clear()
        yield from _imported(ledger, batch)


def _verified(archive: Archive, level: Level) -> Iterator[_Found]:
    listing = (entry for entry in archive.keys(_STUDIES) if entry[0].count("/") > 1)
    for name, entries in itertools.groupby(listing, lambda entry: entry[0].split("/")[1]):
        # The manifest and the objects of one study share a prefix.
        yield _verify(archive, f"{_STUDIES}{name}/", dict(entries), level)


def _verify(archive: Archive, prefix: str, sizes: Mapping[str, int], level: Level) -> _Found:
    if prefix + _MANIFEST not in sizes:
        return _Found(None)
    body = archive.load(prefix + _MANIFEST)
    try:
        manifest = manifest_at(prefix, body)
    except ArchiveError as error:
        uid = uid_of(prefix.split("/")[1])
        study = None if uid is None else FoundStudy(uid, reason=error.code)
        return _Found(study, faults=Counter([error.code]))
    faults = check_manifest(archive, manifest, level, sizes)
    # What is missing can be retrieved again, so it comes before what has changed.
    reason = next((code for code in ("archive-object-missing", *faults) if faults[code]), None)
    study = FoundStudy(manifest.study_instance_uid, manifest, body, reason)
    return _Found(study, len(manifest.instances), len(manifest.missing), faults)


def _imported(ledger: Ledger, batch: list[_Found]) -> Iterator[RebuiltStudy]:
    imported = iter(
        ledger.rebuild.import_studies([found.study for found in batch if found.study is not None])
    )
    for found in batch:
        if found.study is None:
            yield RebuiltStudy(None, faults=found.faults)
            continue
        one = next(imported)
        faults = found.faults
        if one.body is not None and not faults and not _same(one.body, found.study.body):
            faults = Counter(["archive-checksum"])
        yield RebuiltStudy(one.reference, one.outcome, found.instances, found.missing, faults)


def _same(known: bytes, found: bytes) -> bool:
    return known == found or same_manifest(known, found)
