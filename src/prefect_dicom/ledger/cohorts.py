"""Registered cohorts: each a file and its nodes, with selection, notes and reruns."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from sqlalchemy import ColumnElement, and_, insert, or_, select, update

from prefect_dicom.cohort.filters import decode_filters, encode_filters, series_text
from prefect_dicom.core.errors import LedgerError
from prefect_dicom.core.model import (
    NO_FILTERS,
    CohortFilters,
    CohortRow,
    FaultyLine,
    NodeOrder,
    StudyReference,
    StudyState,
)
from prefect_dicom.core.reasons import WORTH_A_RERUN
from prefect_dicom.ledger.database import Database, slices, utc_now
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.queries import cohort_of, listable_with, selection_of
from prefect_dicom.ledger.records import Cohort, Reopened
from prefect_dicom.ledger.schema import (
    cohort_notes,
    cohort_rows,
    cohorts,
    row_studies,
    selections,
    studies,
    study_locations,
)
from prefect_dicom.ledger.statements import study_can_become

# Rows sent at a time by what writes.
_BATCH_SIZE = 5000


class Cohorts:
    """Registered cohorts."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def add(
        self,
        digest: str,
        node: str,
        rows: Iterable[CohortRow],
        name: str | None = None,
        filters: CohortFilters = NO_FILTERS,
        faulty: Iterable[FaultyLine] = (),
        *,
        may_be_empty: bool = False,
    ) -> Cohort:
        """Register a cohort with its rows, all or nothing; return it, or the one already there.

        Parameters
        ----------
        digest : str
            SHA-256 of the cohort file's content. With the nodes it identifies the cohort.
        node : str
            Name of the PACS node to query, or the text of a
            :class:`~prefect_dicom.core.model.NodeOrder`.
        rows : iterable of CohortRow
            Not consumed where the cohort is registered already.
        name : str, optional
            Name for people. By default the first 12 characters of the digest, with the node's
            name behind them where the cohort of another node has that name.
        filters : CohortFilters
            Filters on the studies and series that the rows find.
        faulty : iterable of FaultyLine
            Lines that were set apart: rows that end as ``line-faulty``.
        may_be_empty : bool
            Whether it is no fault that all rows are excluded.

        Raises
        ------
        LedgerError
            ``cohort-name-taken``.
        """
        short = digest[:12]
        with self._database.write() as connection:
            for attempted in (name,) if name is not None else (short, f"{short}-{node}"):
                added = connection.execute(
                    self._database.insert(cohorts)
                    .values(
                        name=attempted,
                        digest=digest,
                        node=node,
                        rows=0,
                        created_at=utc_now(),
                        selection=series_text(filters),
                        may_be_empty=may_be_empty,
                    )
                    .on_conflict_do_nothing()
                    .returning(cohorts.c.number)
                ).scalar()
                if added is not None:
                    break
                known = connection.execute(
                    select(cohorts).where(cohorts.c.digest == digest, cohorts.c.node == node)
                ).first()
                if known is not None:
                    return cohort_of(known)
            else:
                raise LedgerError("cohort-name-taken")
            if filters != NO_FILTERS:
                body = encode_filters(filters)
                connection.execute(insert(selections), {"cohort": added, "body": body})
            count = 0
            for piece in slices(rows, _BATCH_SIZE):
                connection.execute(
                    insert(cohort_rows), [_values_of_row(added, row) for row in piece]
                )
                count += len(piece)
            for apart in slices(faulty, _BATCH_SIZE):
                connection.execute(
                    insert(cohort_rows), [_values_of_faulty(added, line) for line in apart]
                )
                count += len(apart)
            connection.execute(update(cohorts).where(cohorts.c.number == added).values(rows=count))
            row = connection.execute(select(cohorts).where(cohorts.c.number == added)).one()
            return cohort_of(row)

    @translate_database_errors
    def get(self, name: str) -> Cohort:
        """Return the cohort of this name, or of this number.

        Raises
        ------
        LedgerError
            ``cohort-unknown``.
        """
        with self._database.read() as connection:
            row = connection.execute(select(cohorts).where(cohorts.c.name == name)).first()
            if row is None and name.isascii() and name.isdigit() and len(name) < 18:
                row = connection.execute(
                    select(cohorts).where(cohorts.c.number == int(name))
                ).first()
        if row is None:
            raise LedgerError("cohort-unknown")
        return cohort_of(row)

    @translate_database_errors
    def find(self, digest: str, node: str) -> Cohort | None:
        """Return the cohort of this file and order of nodes, or None where it is not registered."""
        with self._database.read() as connection:
            row = connection.execute(
                select(cohorts).where(cohorts.c.digest == digest, cohorts.c.node == node)
            ).first()
        return None if row is None else cohort_of(row)

    @translate_database_errors
    def all(self) -> list[Cohort]:
        """Return all cohorts, the latest first."""
        with self._database.read() as connection:
            rows = connection.execute(select(cohorts).order_by(cohorts.c.number.desc())).all()
        return [cohort_of(row) for row in rows]

    @translate_database_errors
    def that_take(self, study: StudyReference) -> list[int]:
        """Return the numbers of the cohorts that take a study."""
        query = select(row_studies.c.cohort).distinct().where(row_studies.c.study == study)
        with self._database.read() as connection:
            return sorted(connection.scalars(query))

    @translate_database_errors
    def filters(self, cohort: int) -> CohortFilters:
        """Return the filters of a cohort on the studies and series that its rows find."""
        with self._database.read() as connection:
            body = connection.execute(
                select(selections.c.body).where(selections.c.cohort == cohort)
            ).scalar()
        return NO_FILTERS if body is None else decode_filters(body)

    @translate_database_errors
    def add_note(self, cohort: int, node: str, words: str) -> None:
        """Keep a note on a node with a cohort; a repeated note is kept once.

        Parameters
        ----------
        words : str
            Text for people, without any identifier of a patient.
        """
        with self._database.write() as connection:
            connection.execute(
                self._database.insert(cohort_notes)
                .values(cohort=cohort, node=node, words=words, noted_at=utc_now())
                .on_conflict_do_nothing()
            )

    @translate_database_errors
    def notes(self, cohort: int) -> list[tuple[str, str]]:
        """Return the notes of a cohort as (node, words), in the order they were made."""
        columns = (cohort_notes.c.node, cohort_notes.c.words)
        query = select(*columns).where(cohort_notes.c.cohort == cohort)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(cohort_notes.c.number)).all()
        return [(node, words) for node, words in rows]

    @translate_database_errors
    def reopen(
        self,
        cohort: int,
        *,
        reasons: Collection[str] = (),
        nodes: Collection[str] = (),
        lines: Collection[int] = (),
        besides: Collection[StudyReference] = (),
    ) -> Reopened:
        """Reopen failed studies and rows, for a rerun to try again.

        Failed studies become pending, with their instances as they are. Rows that ended without
        a study are discovered again.

        Parameters
        ----------
        reasons : collection of str
            Only these, permanent ones too. Empty: all that are not permanent.
        nodes, lines : collection
            Only studies and rows of these nodes, and only these lines. Empty: all.
        besides : collection of StudyReference
            Not these studies.

        Returns
        -------
        Reopened
            How many studies and rows were reopened.
        """
        codes = sorted(reasons) or WORTH_A_RERUN
        of_lines: list[list[int] | None] = [*slices(sorted(lines))] or [None]
        count_studies = count_rows = 0
        with self._database.write() as connection:
            text = connection.execute(
                select(cohorts.c.node).where(cohorts.c.number == cohort)
            ).scalar()
            if text is None:
                return Reopened(0, 0)
            order = NodeOrder.of(text).names
            for piece in of_lines:
                chosen, failed_at = _failed(cohort, codes, nodes, piece, besides)
                self._database.lock_studies(connection, chosen)
                count_studies += connection.execute(
                    update(studies)
                    .where(chosen)
                    .values(state=StudyState.PENDING, reason=None, detail="")
                ).rowcount
                if len(order) > 1:
                    # Pending studies too: another of their nodes is still to be asked.
                    connection.execute(update(study_locations).where(failed_at).values(reason=None))
                if nodes and not set(order) & set(nodes):
                    continue
                again = and_(
                    cohort_rows.c.cohort == cohort,
                    cohort_rows.c.reason.in_(codes),
                    cohort_rows.c.faults.is_(None),
                )
                if piece is not None:
                    again = and_(again, cohort_rows.c.line.in_(piece))
                count_rows += connection.execute(
                    update(cohort_rows).where(again).values(discovered=False, reason=None)
                ).rowcount
        return Reopened(count_studies, count_rows)


def _failed(
    cohort: int,
    codes: Collection[str],
    nodes: Collection[str],
    lines: Collection[int] | None,
    besides: Collection[StudyReference],
) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """Return the conditions on failed ``studies`` of a cohort, and on their ``study_locations``."""
    linked = select(row_studies.c.study).where(
        row_studies.c.cohort == cohort, row_studies.c.reason.is_(None)
    )
    if lines is not None:
        linked = linked.where(row_studies.c.line.in_(lines))
    for some in slices(sorted(besides)):
        linked = linked.where(row_studies.c.study.not_in(some))
    chosen = and_(
        studies.c.reference.in_(linked),
        study_can_become(StudyState.PENDING, StudyState.FAILED),
        studies.c.reason.in_(codes),
        listable_with(selection_of(cohort)),
    )
    failed_at = and_(study_locations.c.study.in_(linked), study_locations.c.reason.in_(codes))
    if nodes:
        failed_at = and_(failed_at, study_locations.c.node.in_(sorted(nodes)))
        at_these = select(study_locations.c.study).where(failed_at)
        chosen = and_(
            chosen,
            or_(studies.c.node.in_(sorted(nodes)), studies.c.reference.in_(at_these)),
        )
    return chosen, failed_at


def _values_of_faulty(cohort: int, faulty: FaultyLine) -> dict[str, Any]:
    return {
        "cohort": cohort,
        "line": faulty.line,
        "discovered": True,
        "reason": "line-faulty",
        "faults": list(faulty.faults),
    }


def _values_of_row(cohort: int, row: CohortRow) -> dict[str, Any]:
    return {
        "cohort": cohort,
        "line": row.line,
        "patient_id": row.patient_id,
        "accession_number": row.accession_number,
        "study_instance_uid": row.study_instance_uid,
        "study_date": row.study_date,
        "modality": row.modality,
        "study_description": row.study_description,
        "patient_name": row.patient_name,
        "patient_birth_date": row.patient_birth_date,
        "issuer_of_patient_id": row.issuer_of_patient_id,
        "other_patient_id": row.other_patient_id,
    }
