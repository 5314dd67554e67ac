"""Studies: their states, and how they end as archived or failed."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, func, insert, select, update

from prefect_dicom.core.errors import LedgerError
from prefect_dicom.core.failover import choose_node, combined_reason
from prefect_dicom.core.model import Evidence, Study, StudyReference, StudyState
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.ledger import statements
from prefect_dicom.ledger.database import LIST_SIZE, Database, slices, utc_now
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.queries import (
    PAGE_SIZE,
    UNFINISHED,
    listable_with,
    selection_of,
    study_of,
    taken_by,
)
from prefect_dicom.ledger.records import Claim, StudyRecord
from prefect_dicom.ledger.schema import IS_UNFINISHED, manifests, row_studies, studies
from prefect_dicom.ledger.study_counts import count_instances, counts_of
from prefect_dicom.ledger.study_locations import (
    read_study_locations,
    record_failed_at,
    record_found_at,
)


class Studies:
    """The studies of all cohorts, each kept once."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def get(self, reference: StudyReference) -> StudyRecord | None:
        """Return the study with this reference, or None."""
        return self._one_study(studies.c.reference == reference)

    @translate_database_errors
    def find(self, study_instance_uid: str) -> StudyRecord | None:
        """Return the study with this StudyInstanceUID, or None."""
        return self._one_study(studies.c.study_instance_uid == study_instance_uid)

    def _one_study(self, condition: ColumnElement[bool]) -> StudyRecord | None:
        with self._database.read() as connection:
            rows = connection.execute(select(studies).where(condition)).all()
            return next(iter(study_records(self._database, connection, rows)), None)

    def of_cohort(self, cohort: int) -> Iterator[StudyRecord]:
        """Yield every study that a cohort takes, by reference, in pages."""
        reference = 0
        while page := self._study_page(cohort, reference, PAGE_SIZE):
            yield from page
            reference = page[-1].reference

    @translate_database_errors
    def to_pull(
        self, cohort: int, after: StudyReference = 0, limit: int = 1000
    ) -> list[StudyRecord]:
        """Return the next unfinished studies of a cohort, by reference, claimed ones too.

        Studies that were listed with other series than the cohort selects are left out, and so
        are those beyond its maximum per patient.
        """
        return self._study_page(cohort, after, limit, unfinished=True)

    @translate_database_errors
    def _study_page(
        self,
        cohort: int,
        after: StudyReference,
        limit: int,
        *,
        unfinished: bool = False,
    ) -> list[StudyRecord]:
        chosen: list[Row[Any]] = []
        with self._database.read() as connection:
            while len(chosen) < limit:
                if unfinished:
                    # Skip finished studies, of all cohorts, in one step.
                    following = connection.execute(
                        select(func.min(studies.c.reference)).where(
                            IS_UNFINISHED, studies.c.reference > after
                        )
                    ).scalar()
                    if following is None:
                        break
                    after = following - 1
                # By the index of the links alone, however large the ledger is.
                references = (
                    connection.execute(
                        select(row_studies.c.study)
                        .distinct()
                        .where(
                            row_studies.c.cohort == cohort,
                            row_studies.c.study > after,
                            row_studies.c.reason.is_(None),
                        )
                        .order_by(row_studies.c.study)
                        .limit(LIST_SIZE)
                    )
                    .scalars()
                    .all()
                )
                if not references:
                    break
                after = references[-1]
                query = select(studies).where(studies.c.reference.in_(references))
                if unfinished:
                    query = query.where(IS_UNFINISHED, listable_with(selection_of(cohort)))
                chosen.extend(connection.execute(query.order_by(studies.c.reference)))
            return study_records(self._database, connection, chosen[:limit])

    @translate_database_errors
    def unfinished(
        self, references: Iterable[StudyReference], selection: str | None = None
    ) -> dict[StudyReference, bool]:
        """Those of the studies that are unfinished, and whether a living run holds them.

        Parameters
        ----------
        selection : str, optional
            As for :meth:`~prefect_dicom.ledger.claims.Claims.acquire`.
        """
        found: dict[StudyReference, int | None] = {}
        columns = (studies.c.reference, studies.c.run)
        with self._database.read() as connection:
            for piece in slices(references):
                chosen = and_(studies.c.reference.in_(piece), studies.c.state.in_(UNFINISHED))
                if selection is not None:
                    chosen = and_(chosen, listable_with(selection))
                found.update(connection.execute(select(*columns).where(chosen)).tuples().all())
            living = self._database.living_runs(
                connection, {run for run in found.values() if run is not None}
            )
        return {reference: run in living for reference, run in found.items()}

    @translate_database_errors
    def slowest(self, cohort: int, most: int) -> list[StudyRecord]:
        """Return the archived studies that took longest from their last claim to their end."""
        claimed, archived = studies.c.claimed_at, studies.c.archived_at
        if self._database.is_sqlite:
            took = func.julianday(archived) - func.julianday(claimed)
        else:
            took = archived - claimed
        query = (
            select(studies)
            .where(
                taken_by(cohort),
                listable_with(selection_of(cohort)),
                studies.c.state == StudyState.ARCHIVED,
                claimed.is_not(None),
            )
            .order_by(took.desc(), studies.c.reference)
            .limit(most)
        )
        return self._records(query)

    @translate_database_errors
    def failed(self, cohort: int) -> list[StudyRecord]:
        """Return the failed studies of a cohort, by reference."""
        chosen = taken_by(cohort), studies.c.state == StudyState.FAILED
        return self._records(select(studies).where(*chosen).order_by(studies.c.reference))

    @translate_database_errors
    def latest_failures(self, cohort: int, most_each: int) -> list[StudyRecord]:
        """Return the latest failed studies, at most ``most_each`` for each reason."""
        newest_first = studies.c.failed_at.desc(), studies.c.reference
        rank = func.row_number().over(partition_by=studies.c.reason, order_by=newest_first)
        failed = (
            select(studies.c.reference, rank.label("rank"))
            .where(taken_by(cohort), studies.c.state == StudyState.FAILED)
            .subquery()
        )
        query = (
            select(studies)
            .join(failed, failed.c.reference == studies.c.reference)
            .where(failed.c.rank <= most_each)
            .order_by(studies.c.reason, *newest_first)
        )
        return self._records(query)

    def _records(self, query: Select[Any]) -> list[StudyRecord]:
        with self._database.read() as connection:
            return study_records(self._database, connection, connection.execute(query).all())

    @translate_database_errors
    def record_found(self, claim: Claim, study: Study) -> Claim:
        """Record that the claim's node has the study; return the claim with the node's answer."""
        with self._database.write() as connection:
            self._database.require_claims(connection, [claim])
            record_found_at(self._database, connection, [(claim.reference, claim.node, study)])
            attributes = {
                name: getattr(study, name)
                for name in ("patient_id", "number_of_series", "number_of_instances")
            }
            connection.execute(
                update(studies)
                .where(studies.c.reference == claim.reference)
                .values(node=claim.node, **attributes)
            )
        return replace(claim, study=replace(claim.study, **attributes), is_found=True)

    @translate_database_errors
    def record_archived(
        self,
        claim: Claim,
        manifest: bytes,
        *,
        instances: int,
        withheld: int,
        size_bytes: int,
        missing: int = 0,
        rebuilt: bool = False,
        evidence: Evidence | None = None,
    ) -> None:
        """Record that the manifest is in the archive: the study is archived, the claim released.

        The ledger keeps the manifest and deletes the instances, except those that were stored
        and left the PACS's list afterwards: nothing else knows their objects.

        Parameters
        ----------
        manifest : bytes
            The manifest as it is in the archive.
        instances, withheld, missing : int
            How many instances it names, how many it says are left out, and how many never came.
        size_bytes : int
            Size of the instances it names.
        rebuilt : bool
            The manifest was written under another ledger: its counts have to agree with the
            list, but this ledger need not have stored the instances.
        evidence : Evidence, optional
            The evidence in the manifest, where it is not that of the list.

        Raises
        ------
        LedgerError
            ``instances-missing`` where the counts of stored and rejected instances differ from
            those of the manifest; nothing is written then.
        """
        reference = claim.reference
        with self._database.write() as connection:
            self._database.require_claims(connection, [claim])
            figures = count_instances(connection, [reference])[reference]
            known = (figures.stored, figures.withheld)
            if figures.expected != instances + withheld + missing or not (
                rebuilt or known == (instances, withheld + missing)
            ):
                raise LedgerError(
                    "instances-missing",
                    f"the manifest names {instances} and leaves out {withheld + missing}; of "
                    f"{figures.expected} listed {figures.stored} are stored and "
                    f"{figures.withheld} rejected",
                )
            changed = connection.execute(
                statements.STUDY_ARCHIVED,
                {
                    "b_study": reference,
                    "b_archived_at": utc_now(),
                    "b_instances": instances,
                    "b_withheld": withheld,
                    "b_missing": missing,
                    "b_size_bytes": size_bytes,
                    "b_evidence": evidence,
                },
            ).rowcount
            if not changed:
                raise LedgerError("instances-missing", "the study has not been listed")
            connection.execute(
                insert(manifests), {"study": reference, "body": zlib.compress(manifest)}
            )
            connection.execute(statements.FORGET_ARCHIVED, {"b_study": reference})

    @translate_database_errors
    def record_failed(
        self,
        claim: Claim,
        code: str,
        detail: str = "",
        nodes: Sequence[str] = (),
        patient_id_of_instances: str | None = None,
    ) -> bool:
        """Record the failure of a study and release the claim; its instances stay as they are.

        Where the cohort has another node that may have the study, it has failed at the claim's
        node only, and becomes pending.

        Parameters
        ----------
        code : str
            A code of :mod:`prefect_dicom.core.reasons`.
        detail : str
            Text of the peer, perhaps; it stays in the ledger.
        nodes : sequence of str
            The nodes of the cohort, in its order.
        patient_id_of_instances : str, optional
            The PatientID that all its instances name, where it is another than the listed one.

        Returns
        -------
        bool
            True where the study has failed, False where it is pending.
        """
        reason_for(code)
        reference = claim.reference
        with self._database.write() as connection:
            self._database.require_claims(connection, [claim])
            values: dict[str, Any] = {
                "state": StudyState.FAILED,
                "reason": code,
                "detail": detail,
                "failed_at": utc_now(),
                "patient_id_of_instances": patient_id_of_instances,
            }
            if len(nodes) > 1 and reason_for(code).failover:
                record_failed_at(self._database, connection, reference, claim.node, code)
                locations = read_study_locations(connection, [reference])[reference]
                if choose_node(nodes, locations) is not None:
                    values = {"state": StudyState.PENDING}
                else:
                    values["reason"] = combined_reason(nodes, locations)
                if code == "study-gone":
                    # Its old list is no longer what has to be retrieved.
                    connection.execute(
                        update(studies)
                        .where(studies.c.reference == reference, studies.c.listed_by == claim.node)
                        .values(listed_by=None, counted_instances=None)
                    )
            changed = connection.execute(
                update(studies)
                .where(
                    studies.c.reference == reference,
                    statements.study_can_become(values["state"], *UNFINISHED),
                )
                .values(run=None, **values)
            ).rowcount
            if not changed:
                raise RuntimeError(f"a claimed study cannot become {values['state']}")
        return values["state"] is StudyState.FAILED


def study_records(
    database: Database, connection: Connection, rows: Sequence[Row[Any]]
) -> list[StudyRecord]:
    """Return the studies in rows of ``studies``, with their counts."""
    figures = counts_of(connection, rows)
    living = database.living_runs(connection, {row.run for row in rows if row.run is not None})
    return [
        StudyRecord(
            reference=row.reference,
            node=row.node,
            state=StudyState(row.state),
            study=study_of(row),
            reason=row.reason,
            disposition=reason_for(row.reason).disposition if row.reason else None,
            detail=row.detail,
            attempt=row.attempt,
            claimed=row.run in living,
            evidence=Evidence(row.evidence) if row.evidence else None,
            claimed_at=row.claimed_at,
            listed_at=row.listed_at,
            archived_at=row.archived_at,
            failed_at=row.failed_at,
            expected=figures[row.reference].expected,
            received=figures[row.reference].received,
            stored=figures[row.reference].stored,
            withheld=figures[row.reference].withheld,
            missing=figures[row.reference].missing,
            patient_id_of_instances=row.patient_id_of_instances,
            size_bytes=figures[row.reference].size_bytes,
            selection=row.selection,
        )
        for row in rows
    ]
