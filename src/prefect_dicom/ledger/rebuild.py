"""Rebuild of a lost ledger from the manifests in the archive.

The only way for a study to become archived without having been listed and stored under a claim:
its manifest is the list, and was written when all of it was stored. So it does not go through
the states of :mod:`prefect_dicom.core.transitions` one by one.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, or_, select, update

from prefect_dicom.core.model import (
    StudyManifest,
    StudyReference,
    StudyState,
)
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.ledger.database import Database, utc_now
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.records import FoundStudy, RebuildOutcome, Rebuilt
from prefect_dicom.ledger.schema import IS_LISTED, instances, manifests, studies

_KNOWN = (
    studies.c.study_instance_uid,
    studies.c.state,
    studies.c.reason,
    studies.c.run,
    studies.c.selection,
)


class Rebuild:
    """Import archived studies into a ledger that was lost or fell behind."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def import_studies(self, found: Sequence[FoundStudy]) -> list[Rebuilt]:
        """Import studies that were found in the archive, in one transaction.

        An unknown study is added: archived, or failed where ``reason`` says what is wrong with
        it. A pending, listed or failed study becomes archived: the manifest is its list, and the
        proof that all of it was stored. Left as they are: archived studies, studies that a living
        run has claimed, studies whose list differs from the manifest, and every known study whose
        manifest cannot be trusted.

        Parameters
        ----------
        found : sequence of FoundStudy
            Each study once; some dozens at a time.

        Returns
        -------
        list of Rebuilt
            In the order of ``found``.
        """
        with self._database.write() as connection:
            known = {row.study_instance_uid: row for row in self._lock(connection, found)}
            living = self._database.living_runs(
                connection, {row.run for row in known.values() if row.run is not None}
            )
            done: dict[str, Rebuilt] = {}
            # New ones by UID: two that import the same archive wait for each other, in one order.
            for study in sorted(found, key=lambda study: study.study_instance_uid):
                uid = study.study_instance_uid
                row = known.get(uid)
                if row is None:
                    reference = self._add(connection, study)
                    if reference is not None:
                        done[uid] = Rebuilt(reference, RebuildOutcome.ADDED)
                        continue
                    # Another process was quicker.
                    (row,) = self._lock(connection, [study])
                done[uid] = _complete(connection, study, row, claimed=row.run in living)
        return [done[study.study_instance_uid] for study in found]

    def _lock(self, connection: Connection, found: Sequence[FoundStudy]) -> Sequence[Row[Any]]:
        uids = [study.study_instance_uid for study in found]
        return self._database.lock_studies(
            connection, studies.c.study_instance_uid.in_(uids), *_KNOWN
        )

    def _add(self, connection: Connection, study: FoundStudy) -> StudyReference | None:
        """Add a study; None where it has become known meanwhile."""
        manifest = study.manifest
        values: dict[str, Any] = {"state": StudyState.FAILED, "reason": study.reason}
        if study.reason is not None:
            reason_for(study.reason)
        elif manifest is not None:
            values = _archived(manifest)
        reference: StudyReference | None = connection.execute(
            self._database.insert(studies)
            .values(
                study_instance_uid=study.study_instance_uid,
                # Only discovery links a study to a cohort; it adds what is not known here.
                node=manifest.node if manifest is not None else "",
                patient_id="",
                accession_number="",
                study_date="",
                modalities=[],
                study_description="",
                selection=None if manifest is None else manifest.selection,
                **values,
            )
            .on_conflict_do_nothing()
            .returning(studies.c.reference)
        ).scalar()
        if reference is not None and study.reason is None:
            _keep_manifest(connection, reference, study)
        return reference


def _complete(
    connection: Connection, study: FoundStudy, row: Row[Any], *, claimed: bool
) -> Rebuilt:
    """Make a known study archived, where the manifest proves it."""
    reference, manifest = row.reference, study.manifest
    if row.state == StudyState.ARCHIVED:
        body = connection.execute(
            select(manifests.c.body).where(manifests.c.study == reference)
        ).scalar_one()
        return Rebuilt(reference, RebuildOutcome.KNOWN, zlib.decompress(body))
    if study.reason is not None or manifest is None:
        return Rebuilt(reference, RebuildOutcome.KNOWN)
    if claimed:
        return Rebuilt(reference, RebuildOutcome.CLAIMED)
    listed = {
        tuple(key)
        for key in connection.execute(
            select(instances.c.series_instance_uid, instances.c.sop_instance_uid).where(
                instances.c.study == reference, IS_LISTED
            )
        )
    }
    other_series = row.selection not in (None, manifest.selection)
    # A study that failed because the archive has it with other series is as the archive has it.
    is_ours = listed and row.reason != "selected-otherwise"
    if is_ours and (other_series or listed != manifest.keys):
        return Rebuilt(reference, RebuildOutcome.LISTED_OTHERWISE)
    connection.execute(
        update(studies)
        .where(studies.c.reference == reference, studies.c.state != StudyState.ARCHIVED)
        # The attempt is incremented: an older claim is lost.
        .values(
            run=None,
            attempt=studies.c.attempt + 1,
            reason=None,
            detail="",
            selection=manifest.selection,
            **_archived(manifest),
        )
    )
    _keep_manifest(connection, reference, study)
    connection.execute(
        delete(instances).where(
            instances.c.study == reference, or_(IS_LISTED, instances.c.object_key.is_(None))
        )
    )
    return Rebuilt(reference, RebuildOutcome.COMPLETED)


def _keep_manifest(connection: Connection, reference: StudyReference, study: FoundStudy) -> None:
    connection.execute(insert(manifests).values(study=reference, body=zlib.compress(study.body)))


def _archived(manifest: StudyManifest) -> dict[str, Any]:
    return {
        "state": StudyState.ARCHIVED,
        "evidence": manifest.evidence,
        "listed_at": datetime.fromisoformat(manifest.listed_at),
        "archived_at": utc_now(),
        "archived_instances": len(manifest.instances),
        "withheld_instances": len(manifest.withheld),
        "missing_instances": len(manifest.missing),
        "archived_bytes": sum(instance.size_bytes for instance in manifest.instances),
    }
