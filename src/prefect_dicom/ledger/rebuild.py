"""Rebuild of a lost ledger from what the archive holds.

The one way a study becomes archived without having been listed and stored under a claim: its
manifest is the list, and was written when all of it was stored.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    Connection,
    Row,
    delete,
    insert,
    or_,
    select,
    update,
)

from prefect_dicom.core.model import (
    StudyManifest,
    StudyReference,
    StudyState,
)
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.ledger.database import Database
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.records import (
    FoundStudy,
    RebuildOutcome,
    Rebuilt,
)
from prefect_dicom.ledger.schema import (
    IS_LISTED,
    manifests,
    studies,
)
from prefect_dicom.ledger.schema import instances as instance_rows

_KNOWN = (
    studies.c.reference,
    studies.c.study_instance_uid,
    studies.c.state,
    studies.c.reason,
    studies.c.run,
    studies.c.selection,
)


class Rebuild:
    """Add archived studies to a ledger that was lost or fell behind."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def import_studies(self, found: Sequence[FoundStudy]) -> list[Rebuilt]:
        """Take over what the archive holds of studies, after the ledger was lost or fell behind.

        One transaction. A study the ledger does not know is added: archived, or failed where
        ``reason`` says what is wrong with it. One it knows as pending, listed or failed becomes
        archived: the manifest is its list, and the proof that all of it was stored. Left as it
        is: what is archived already, what a living run has claimed, what was listed otherwise
        since, and everything where the manifest cannot be believed.

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
            return adopt_studies(
                connection,
                self._database.insert,
                found,
                lambda runs: self._database.living_runs(connection, runs),
            )


def adopt_studies(
    connection: Connection,
    upsert: Callable[..., Any],
    found: Sequence[FoundStudy],
    living: Callable[[Collection[int]], set[int]],
) -> list[Rebuilt]:
    """The body of :meth:`prefect_dicom.ledger.Ledger.adopt`.

    Parameters
    ----------
    upsert : callable
        The dialect's own ``insert``.
    living : callable
        Those of the runs whose locks are held.
    """
    known = {row.study_instance_uid: row for row in _locked(connection, found)}
    alive = living({row.run for row in known.values() if row.run is not None})
    done: dict[str, Rebuilt] = {}
    # New ones by UID: two that adopt the same archive wait for each other and do not embrace.
    for study in sorted(found, key=lambda study: study.study_instance_uid):
        row = known.get(study.study_instance_uid)
        if row is None:
            reference = _added(connection, upsert, study)
            if reference is not None:
                done[study.study_instance_uid] = Rebuilt(reference, RebuildOutcome.ADDED)
                continue
            # Somebody else was quicker.
            (row,) = _locked(connection, [study])
        done[study.study_instance_uid] = _met(connection, study, row, claimed=row.run in alive)
    return [done[study.study_instance_uid] for study in found]


def _locked(connection: Connection, found: Sequence[FoundStudy]) -> Sequence[Row[Any]]:
    return connection.execute(
        select(*_KNOWN)
        .where(studies.c.study_instance_uid.in_([study.study_instance_uid for study in found]))
        .order_by(studies.c.reference)
        .with_for_update(key_share=True)
    ).all()


def _added(
    connection: Connection, upsert: Callable[..., Any], study: FoundStudy
) -> StudyReference | None:
    values: dict[str, Any] = {"state": StudyState.FAILED, "reason": study.reason}
    if study.reason is None:
        values = _archived(study.manifest)
    else:
        reason_for(study.reason)
    reference = connection.execute(
        upsert(studies)
        .values(
            study_instance_uid=study.study_instance_uid,
            # A study comes to a cohort by discovery only, which says what is not known here.
            node=study.manifest.node if study.manifest is not None else "",
            patient_id="",
            accession_number="",
            study_date="",
            modalities=[],
            study_description="",
            selection=None if study.manifest is None else study.manifest.selection,
            **values,
        )
        .on_conflict_do_nothing()
        .returning(studies.c.reference)
    ).scalar()
    if reference is not None and study.reason is None:
        _keep_manifest(connection, reference, study)
    return reference


def _met(connection: Connection, study: FoundStudy, row: Row[Any], *, claimed: bool) -> Rebuilt:
    reference = row.reference
    if row.state == StudyState.ARCHIVED:
        body = connection.execute(
            select(manifests.c.body).where(manifests.c.study == reference)
        ).scalar_one()
        return Rebuilt(reference, RebuildOutcome.KNOWN, zlib.decompress(body))
    if study.reason is not None:
        return Rebuilt(reference, RebuildOutcome.KNOWN)
    if claimed:
        return Rebuilt(reference, RebuildOutcome.CLAIMED)
    listed = {
        tuple(key)
        for key in connection.execute(
            select(instance_rows.c.series_instance_uid, instance_rows.c.sop_instance_uid).where(
                instance_rows.c.study == reference, IS_LISTED
            )
        )
    }
    otherwise = row.selection not in (None, study.manifest.selection)
    # One that failed because the archive has it otherwise is as the archive has it.
    ours = listed and row.reason != "selected-otherwise"
    if ours and (otherwise or listed != _named(study.manifest)):
        return Rebuilt(reference, RebuildOutcome.LISTED_OTHERWISE)
    connection.execute(
        update(studies)
        .where(studies.c.reference == reference)
        # Whoever claimed it before has lost it.
        .values(
            run=None,
            attempt=studies.c.attempt + 1,
            reason=None,
            detail="",
            selection=study.manifest.selection,
            **_archived(study.manifest),
        )
    )
    _keep_manifest(connection, reference, study)
    connection.execute(
        delete(instance_rows).where(
            instance_rows.c.study == reference, or_(IS_LISTED, instance_rows.c.object_key.is_(None))
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
        "archived_at": datetime.now(UTC),
        "archived_instances": len(manifest.instances),
        "withheld_instances": len(manifest.withheld),
        "archived_bytes": sum(instance.size_bytes for instance in manifest.instances),
    }


def _named(manifest: StudyManifest) -> set[tuple[str, str]]:
    return {
        (part.series_instance_uid, part.sop_instance_uid)
        for part in (*manifest.instances, *manifest.withheld)
    }
