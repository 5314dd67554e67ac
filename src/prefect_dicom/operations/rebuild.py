"""A ledger that was lost, built anew from the manifests in the archive; the PACS is not asked.

A manifest was written when everything it names was stored, so it is all the ledger needs to
know that a study is archived. Nothing is believed unseen: each must be a manifest of ours for
the place it lies at, and what it names must be there.
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
# What is held in memory and written in one transaction.
_MOST_STUDIES = 50
_MOST_BYTES = 4 * 1024**2


@dataclass(frozen=True, slots=True)
class RebuiltStudy:
    """What became of one study of the archive.

    ``reference`` is None where the ledger has none for it; ``outcome`` where there is no
    manifest, or none that says which study it is of. ``faults`` counts objects by reason code.
    """

    reference: StudyReference | None
    outcome: RebuildOutcome | None = None
    instances: int = 0
    faults: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Found:
    study: FoundStudy | None
    instances: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    @property
    def size_bytes(self) -> int:
        return 0 if self.study is None else len(self.study.body)


def rebuild_ledger(site: Site, level: Level = Level.SIZE) -> Iterator[RebuiltStudy]:
    """Bring into the ledger what the archive holds and it does not know.

    What the ledger has stays, but for unfinished studies that the archive proves to be whole,
    see :meth:`~prefect_dicom.ledger.rebuild.Rebuild.import_studies`. A study with faults is not
    taken for archived: where it was unknown it is added as failed, for a rerun to complete.
    Stopped in between, the same again goes on. Memory does not grow with the archive.

    Parameters
    ----------
    level : Level
        How hard to look at the objects. ``exists`` looks at sizes too: a listing tells both.

    Yields
    ------
    RebuiltStudy
        For each study in the archive, as it is in the ledger.
    """
    with Ledger.open(ledger_url(site)) as ledger, open_archive(site.archive) as archive:
        batch: list[_Found] = []
        for found in _look(archive, Level.SIZE if level is Level.EXISTS else level):
            batch.append(found)
            size_bytes = sum(each.size_bytes for each in batch)
            if len(batch) >= _MOST_STUDIES or size_bytes >= _MOST_BYTES:
                yield from _imported(ledger, batch)
                batch.clear()
        yield from _imported(ledger, batch)


def _look(archive: Archive, level: Level) -> Iterator[_Found]:
    listing = (entry for entry in archive.keys(_STUDIES) if entry[0].count("/") > 1)
    for name, entries in itertools.groupby(listing, lambda entry: entry[0].split("/")[1]):
        # The manifest and the objects of one study lie side by side.
        yield _look_at(archive, f"{_STUDIES}{name}/", dict(entries), level)


def _look_at(archive: Archive, prefix: str, sizes: Mapping[str, int], level: Level) -> _Found:
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
    # What is missing can be had again; it is said before what is other than it was.
    reason = next((code for code in ("archive-object-missing", *faults) if faults[code]), None)
    study = FoundStudy(manifest.study_instance_uid, manifest, body, reason)
    return _Found(study, len(manifest.instances), faults)


def _imported(ledger: Ledger, batch: list[_Found]) -> Iterator[RebuiltStudy]:
    answers = iter(
        ledger.rebuild.import_studies([found.study for found in batch if found.study is not None])
    )
    for found in batch:
        if found.study is None:
            yield RebuiltStudy(None, faults=found.faults)
            continue
        one = next(answers)
        faults = found.faults
        if one.body is not None and not faults and not _same(one.body, found.study.body):
            faults = Counter(["archive-checksum"])
        yield RebuiltStudy(one.reference, one.outcome, found.instances, faults)


def _same(known: bytes, found: bytes) -> bool:
    return known == found or same_manifest(known, found)
