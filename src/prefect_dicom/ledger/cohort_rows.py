"""Cohort rows: their discovery, the studies each has found, and their verdicts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, and_, bindparam, delete, func, insert, or_, select, update

from prefect_dicom.cohort.filters import over_maximum
from prefect_dicom.core.failover import choose_node
from prefect_dicom.core.model import (
    CohortRow,
    NodeOrder,
    PerPatient,
    RowVerdict,
    Study,
    StudyReference,
    StudyState,
)
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.core.row_queries import RowQuery
from prefect_dicom.ledger.database import Database, slices
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.queries import (
    PAGE_SIZE,
    ROW_COLUMNS,
    STUDY_COLUMNS,
    VERDICT_COLUMNS,
    first_rows,
    study_of,
    study_of_json,
    to_discover,
)
from prefect_dicom.ledger.records import RowFindings, Run, StudyLocation
from prefect_dicom.ledger.row_queries import read_row_queries, record_row_queries
from prefect_dicom.ledger.row_verdicts import judge_rows
from prefect_dicom.ledger.schema import cohort_rows, cohorts, row_studies, runs, studies
from prefect_dicom.ledger.study_locations import record_found_at


class CohortRows:
    """The rows of registered cohorts."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def to_discover(
        self, cohort: int, after_line: int = 0, limit: int = 500, run: Run | None = None
    ) -> list[CohortRow]:
        """Return the next rows whose discovery has not ended, by line.

        Rows whose last discovery failed for a transient reason are among them. Calls that each
        begin behind the last line of the page before return every row once.

        Parameters
        ----------
        run : Run, optional
            Leave out the rows that other runs have taken.
        """
        chosen = to_discover(cohort, after_line)
        if run is not None:
            whose = cohort_rows.c.run
            chosen = and_(chosen, or_(whose.is_(None), whose == run.number))
        with self._database.read() as connection:
            return first_rows(connection, chosen, limit)

    @translate_database_errors
    def take(self, run: Run, cohort: int, after_line: int = 0, limit: int = 500) -> list[CohortRow]:
        """Take the next rows whose discovery has not ended, so that no other run asks for them.

        They belong to the run until their discovery is recorded or the run ends. Rows that
        another living run of the cohort has taken are passed over.
        """
        with self._database.write() as connection:
            # One run at a time: each sees what the others have taken.
            connection.execute(
                select(cohorts.c.number)
                .where(cohorts.c.number == cohort)
                .with_for_update(key_share=True)
            )
            others = self._others(connection, run, cohort)
            free = or_(cohort_rows.c.run.is_(None), cohort_rows.c.run.not_in(others))
            rows = first_rows(connection, and_(to_discover(cohort, after_line), free), limit)
            for piece in slices(row.line for row in rows):
                connection.execute(
                    update(cohort_rows)
                    .where(cohort_rows.c.cohort == cohort, cohort_rows.c.line.in_(piece))
                    .values(run=run.number)
                )
        return rows

    @translate_database_errors
    def taken_by_others(self, run: Run, cohort: int) -> tuple[int, int]:
        """Count the rows that other runs have taken and not discovered.

        Returns
        -------
        tuple of int and int
            Those of living runs, and those that ended runs have left behind.
        """
        with self._database.read() as connection:
            others = self._others(connection, run, cohort)
            its_run = cohort_rows.c.run
            taken = connection.execute(
                select(its_run, func.count())
                .where(to_discover(cohort), its_run.is_not(None), its_run != run.number)
                .group_by(its_run)
            ).all()
        held = sum(count for number, count in taken if number in others)
        return held, sum(count for _, count in taken) - held

    def _others(self, connection: Connection, run: Run, cohort: int) -> set[int]:
        """Return the living runs of a cohort, without this one."""
        unended = and_(runs.c.cohort == cohort, runs.c.ended_at.is_(None))
        numbers = connection.execute(
            select(runs.c.number).where(unended, runs.c.number != run.number)
        ).scalars()
        return self._database.living_runs(connection, list(numbers))

    @translate_database_errors
    def record_discoveries(
        self, cohort: int, found: Iterable[RowFindings | tuple[Any, ...]]
    ) -> None:
        """Record the results of discovery for rows, with the studies they found.

        A study is one row of the ledger however many cohort rows and cohorts find it. Its node
        and attributes are refreshed unless it is archived or claimed; its state stays.

        Parameters
        ----------
        found : iterable of RowFindings
            Or of tuples of their fields. ``several-patients``, ``filter-undecided`` and permanent
            reasons end the row's discovery; any other reason leaves the row to be discovered
            again. Near misses are kept for :meth:`near_misses`.
        """
        entries = sorted((RowFindings(*entry) for entry in found), key=lambda entry: entry.line)
        for entry in entries:
            if entry.reason is not None:
                reason_for(entry.reason)
        by_line = {entry.line: entry for entry in entries}
        if not by_line:
            return
        with self._database.write() as connection:
            text = connection.execute(
                select(cohorts.c.node).where(cohorts.c.number == cohort)
            ).scalar()
            if text is None:
                return
            order = NodeOrder.of(text).names
            answers = _answers_by_node(by_line.values(), order)
            references = self._upsert_studies(connection, order, answers)
            if len(order) > 1:
                by_node = [
                    (references[uid], node, study)
                    for uid, at in answers.items()
                    for node, study in at.items()
                ]
                record_found_at(self._database, connection, by_node)
            _update_rows(connection, cohort, by_line.values())
            record_row_queries(self._database, connection, cohort, by_line.values())
            _link_studies(connection, cohort, by_line.values(), references)

    def _upsert_studies(
        self,
        connection: Connection,
        nodes: Sequence[str],
        answers: Mapping[str, Mapping[str, Study]],
    ) -> dict[str, StudyReference]:
        """Add or refresh studies, each with the attributes of the node that is asked for it."""
        if not answers:
            return {}
        # In the order of references first (see claims.py), then the new ones by UID.
        for piece in slices(answers):
            self._database.lock_studies(connection, studies.c.study_instance_uid.in_(piece))
        statement = self._database.insert(studies)
        refreshed = [column.name for column in (studies.c.node, *STUDY_COLUMNS[1:])]
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=[studies.c.study_instance_uid],
                set_={name: statement.excluded[name] for name in refreshed},
                where=and_(studies.c.state != StudyState.ARCHIVED, studies.c.run.is_(None)),
            ),
            [
                {
                    "study_instance_uid": uid,
                    "node": (node := _best_node(nodes, at)),
                    "patient_id": (study := at[node]).patient_id,
                    "accession_number": study.accession_number,
                    "study_date": study.study_date,
                    "modalities": list(study.modalities),
                    "study_description": study.study_description,
                    "number_of_series": study.number_of_series,
                    "number_of_instances": study.number_of_instances,
                }
                for uid, at in sorted(answers.items())
            ],
        )
        references: dict[str, StudyReference] = {}
        for piece in slices(answers):
            references.update(
                connection.execute(
                    select(studies.c.study_instance_uid, studies.c.reference).where(
                        studies.c.study_instance_uid.in_(piece)
                    )
                )
                .tuples()
                .all()
            )
        return references

    @translate_database_errors
    def limit_per_patient(self, cohort: int, per_patient: PerPatient) -> int:
        """Limit the studies of each patient to the maximum of the cohort, over all its rows.

        The decision is made anew each time, from the attributes of the studies and not from
        their states: the same studies are taken, whatever the order of the queries.

        Returns
        -------
        int
            How many studies are not taken.
        """
        its_studies = select(row_studies.c.study).where(row_studies.c.cohort == cohort)
        with self._database.write() as connection:
            found = connection.execute(
                select(studies.c.reference, *STUDY_COLUMNS)
                .where(studies.c.reference.in_(its_studies))
                .order_by(studies.c.reference)
            )
            beyond = over_maximum(per_patient, ((row.reference, study_of(row)) for row in found))
            its_links = row_studies.c.cohort == cohort
            connection.execute(update(row_studies).where(its_links).values(reason=None))
            for piece in slices(sorted(beyond)):
                connection.execute(
                    update(row_studies)
                    .where(its_links, row_studies.c.study.in_(piece))
                    .values(reason="beyond-the-maximum")
                )
        return len(beyond)

    @translate_database_errors
    def near_misses(self, cohort: int, line: int) -> tuple[Study, ...]:
        """Return the candidates that the row's discovery did not take."""
        with self._database.read() as connection:
            kept = connection.execute(
                select(cohort_rows.c.near_misses).where(
                    cohort_rows.c.cohort == cohort, cohort_rows.c.line == line
                )
            ).scalar()
        return tuple(map(study_of_json, kept or ()))

    def candidates(self, cohort: int) -> Iterator[tuple[CohortRow, str | None, tuple[Study, ...]]]:
        """Yield each row that has near misses, with its reason and these, by line, in pages."""
        line = -1
        while page := self._candidate_page(cohort, line):
            yield from page
            line = page[-1][0].line

    @translate_database_errors
    def _candidate_page(
        self, cohort: int, after_line: int
    ) -> list[tuple[CohortRow, str | None, tuple[Study, ...]]]:
        with self._database.read() as connection:
            rows = connection.execute(
                select(*ROW_COLUMNS, cohort_rows.c.reason, cohort_rows.c.near_misses)
                .where(
                    cohort_rows.c.cohort == cohort,
                    cohort_rows.c.line > after_line,
                    cohort_rows.c.near_misses.is_not(None),
                )
                .order_by(cohort_rows.c.line)
                .limit(PAGE_SIZE)
            ).all()
        return [
            (
                CohortRow(*row[: len(ROW_COLUMNS)]),
                row.reason,
                tuple(map(study_of_json, row.near_misses)),
            )
            for row in rows
        ]

    @translate_database_errors
    def queries(self, cohort: int, line: int) -> tuple[RowQuery, ...]:
        """Return what was asked for a row in its last discovery, and what came, within bounds."""
        with self._database.read() as connection:
            return read_row_queries(connection, cohort, line)

    @translate_database_errors
    def at(self, cohort: int, line: int) -> tuple[CohortRow, RowVerdict] | None:
        """Return the row of a line with its verdict; None if the cohort has no such row."""
        found = self._row_page(cohort, line - 1, 1)
        return found[0] if found and found[0][0].line == line else None

    def verdicts(self, cohort: int) -> Iterator[RowVerdict]:
        """Yield the verdict of every row of a cohort, by line, in pages."""
        return (verdict for _, verdict in self.with_verdicts(cohort))

    def with_verdicts(self, cohort: int) -> Iterator[tuple[CohortRow, RowVerdict]]:
        """Yield every row of a cohort with its verdict, by line, in pages."""
        line = 0
        while page := self._row_page(cohort, line):
            yield from page
            line = page[-1][0].line

    @translate_database_errors
    def _row_page(
        self, cohort: int, after_line: int, limit: int = PAGE_SIZE
    ) -> list[tuple[CohortRow, RowVerdict]]:
        with self._database.read() as connection:
            page = connection.execute(
                select(*ROW_COLUMNS, *VERDICT_COLUMNS[1:])
                .where(cohort_rows.c.cohort == cohort, cohort_rows.c.line > after_line)
                .order_by(cohort_rows.c.line)
                .limit(limit)
            ).all()
            if not page:
                return []
            lines = row_studies.c.line.between(page[0].line, page[-1].line)
            verdicts = judge_rows(connection, cohort, page, lines)
        return [
            (CohortRow(*row[: len(ROW_COLUMNS)]), verdict)
            for row, verdict in zip(page, verdicts, strict=True)
        ]


def _update_rows(connection: Connection, cohort: int, entries: Iterable[RowFindings]) -> None:
    """Write the end of discovery, or the reason it failed, into the rows."""
    connection.execute(
        update(cohort_rows)
        .where(cohort_rows.c.cohort == cohort, cohort_rows.c.line == bindparam("b_line"))
        .values(
            discovered=bindparam("discovered"),
            reason=bindparam("reason"),
            near_misses=bindparam("near_misses"),
            gaps=bindparam("gaps"),
            run=None,
        ),
        [
            {
                "b_line": entry.line,
                "discovered": _ends_discovery(entry.reason),
                "reason": entry.reason,
                "near_misses": [asdict(study) for study in entry.near_misses] or None,
                "gaps": list(entry.gaps) or None,
            }
            for entry in entries
        ],
    )


def _link_studies(
    connection: Connection,
    cohort: int,
    entries: Collection[RowFindings],
    references: Mapping[str, StudyReference],
) -> None:
    """Replace the links from rows to studies by what the rows have found now."""
    # A row whose query failed keeps the studies that it found before.
    answered = [e.line for e in entries if e.studies or _ends_discovery(e.reason)]
    for piece in slices(answered):
        connection.execute(
            delete(row_studies).where(row_studies.c.cohort == cohort, row_studies.c.line.in_(piece))
        )
    links = sorted(
        {
            (entry.line, references[study.study_instance_uid])
            for entry in entries
            for study in entry.studies
        }
    )
    if links:
        connection.execute(
            insert(row_studies),
            [{"cohort": cohort, "line": line, "study": study} for line, study in links],
        )


def _answers_by_node(
    entries: Iterable[RowFindings], nodes: Sequence[str]
) -> dict[str, dict[str, Study]]:
    """Return the studies that the rows have found, by StudyInstanceUID and node."""
    found: dict[str, dict[str, Study]] = {}
    for entry in entries:
        for number, study in enumerate(entry.studies):
            node = entry.nodes[number] if entry.nodes else nodes[0]
            found.setdefault(study.study_instance_uid, {})[node] = study
    return found


def _best_node(nodes: Sequence[str], at: Mapping[str, Study]) -> str:
    """Return the node whose answer describes a study: the one that is asked for it first."""
    known = {n: StudyLocation(n, number_of_instances=s.number_of_instances) for n, s in at.items()}
    return choose_node([node for node in nodes if node in at], known) or nodes[0]


def _ends_discovery(reason: str | None) -> bool:
    """Return whether discovery is over with this reason (None: the row has found studies)."""
    return reason is None or reason_for(reason).ends_discovery
