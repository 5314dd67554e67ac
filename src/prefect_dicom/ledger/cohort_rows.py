"""Cohort rows: their discovery, what each found, and their verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict

from sqlalchemy import (
    Connection,
    and_,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from prefect_dicom.cohort.filters import (
    beyond_the_maximum,
)
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
from prefect_dicom.ledger.database import Database, slices
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.queries import (
    PAGE_SIZE,
    ROW_COLUMNS,
    STUDY_COLUMNS,
    first_rows,
    study_of,
    study_of_json,
    to_discover,
)
from prefect_dicom.ledger.records import (
    Reopened,
    RowFindings,
    Run,
    StudyLocation,
)
from prefect_dicom.ledger.row_verdicts import judge_rows
from prefect_dicom.ledger.schema import (
    cohort_rows,
    cohorts,
    row_studies,
    runs,
    studies,
)
from prefect_dicom.ledger.study_locations import (
    record_found_at,
)


class CohortRows:
    """The rows of registered cohorts."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def to_discover(
        self, cohort: int, after_line: int = 0, limit: int = 500, run: Run | None = None
    ) -> list[CohortRow]:
        """The next rows whose discovery has not ended, by line.

        Among them are rows whose last discovery failed for a reason that need not last; going
        on behind the last line of each answer meets every row once.

        Parameters
        ----------
        run : Run, optional
            Only those that this run has taken, or none.
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

        They are the run's until what became of them is recorded, or the run ends. Rows that
        another living run of the cohort has taken are passed over.
        """
        with self._database.write() as connection:
            # One at a time: whoever takes sees what the others have taken.
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
        """How many rows other runs have taken and not asked for: living ones, and ended ones."""
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
        """The living runs of a cohort but this one."""
        unended = and_(runs.c.cohort == cohort, runs.c.ended_at.is_(None))
        numbers = connection.execute(
            select(runs.c.number).where(unended, runs.c.number != run.number)
        ).scalars()
        return self._database.living_runs(connection, list(numbers))

    @translate_database_errors
    def record_discoveries(self, cohort: int, found: Iterable[RowFindings | tuple]) -> None:
        """Record what became of rows at discovery, and the studies they found.

        A study is one row of the ledger however many cohort rows and cohorts find it. Its node
        and attributes are refreshed unless it is archived or claimed; its state stays.

        Parameters
        ----------
        found : iterable of RowFindings
            Or of their fields. ``several-patients`` and reasons that are permanent end the row;
            others leave it to be discovered again. The near misses are kept for
            :meth:`near_misses`.
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
                return Reopened(0, 0)
            order = NodeOrder.of(text).names
            found = _found_at(by_line.values(), order)
            references = self._upsert_studies(connection, order, found)
            if len(order) > 1:
                by_node = [
                    (references[uid], node, study)
                    for uid, at in found.items()
                    for node, study in at.items()
                ]
                record_found_at(connection, self._database.insert, by_node)
            connection.execute(
                update(cohort_rows)
                .where(
                    cohort_rows.c.cohort == cohort,
                    cohort_rows.c.line == bindparam("b_line"),
                )
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
                        "discovered": _ends_a_row(entry.reason),
                        "reason": entry.reason,
                        "near_misses": [asdict(study) for study in entry.near_misses] or None,
                        "gaps": list(entry.gaps) or None,
                    }
                    for entry in by_line.values()
                ],
            )
            # What could not be asked again has not lost what it found before.
            asked = [e.line for e in by_line.values() if e.studies or _ends_a_row(e.reason)]
            for piece in slices(asked):
                connection.execute(
                    delete(row_studies).where(
                        row_studies.c.cohort == cohort, row_studies.c.line.in_(piece)
                    )
                )
            links = sorted(
                {
                    (line, references[study.study_instance_uid])
                    for line, entry in by_line.items()
                    for study in entry.studies
                }
            )
            if links:
                connection.execute(
                    insert(row_studies),
                    [{"cohort": cohort, "line": line, "study": study} for line, study in links],
                )

    def _upsert_studies(
        self,
        connection: Connection,
        nodes: Sequence[str],
        answers: Mapping[str, Mapping[str, Study]],
    ) -> dict[str, StudyReference]:
        """Add or refresh studies, each as the node has it that is to be asked for it."""
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
                    "node": (node := _best_of(nodes, at)),
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
        """Take of each patient no more studies than a cohort wants, of all its rows have found.

        Decided anew each time, by what is known of the studies and not by how far they are:
        whatever the order in which rows were asked, the same studies are taken in the end.

        Returns
        -------
        int
            How many are not taken.
        """
        its_studies = select(row_studies.c.study).where(row_studies.c.cohort == cohort)
        with self._database.write() as connection:
            found = connection.execute(
                select(studies.c.reference, *STUDY_COLUMNS)
                .where(studies.c.reference.in_(its_studies))
                .order_by(studies.c.reference)
            )
            beyond = beyond_the_maximum(
                per_patient, ((row.reference, study_of(row)) for row in found)
            )
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
        """The candidates that the row's discovery did not take."""
        with self._database.read() as connection:
            kept = connection.execute(
                select(cohort_rows.c.near_misses).where(
                    cohort_rows.c.cohort == cohort, cohort_rows.c.line == line
                )
            ).scalar()
        return tuple(map(study_of_json, kept or ()))

    def candidates(self, cohort: int) -> Iterator[tuple[CohortRow, str | None, tuple[Study, ...]]]:
        """Each row that has near misses, with its reason and these, by line, in pages."""
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

    def verdicts(self, cohort: int) -> Iterator[RowVerdict]:
        """The verdict of every row of a cohort, by line, in pages."""
        return (verdict for _, verdict in self.with_verdicts(cohort))

    def with_verdicts(self, cohort: int) -> Iterator[tuple[CohortRow, RowVerdict]]:
        """Every row of a cohort with its own keys and its verdict, by line, in pages."""
        line = 0
        while page := self._row_page(cohort, line):
            yield from page
            line = page[-1][0].line

    @translate_database_errors
    def _row_page(self, cohort: int, after_line: int) -> list[tuple[CohortRow, RowVerdict]]:
        with self._database.read() as connection:
            page = connection.execute(
                select(*ROW_COLUMNS, cohort_rows.c.reason, cohort_rows.c.gaps)
                .where(cohort_rows.c.cohort == cohort, cohort_rows.c.line > after_line)
                .order_by(cohort_rows.c.line)
                .limit(PAGE_SIZE)
            ).all()
            if not page:
                return []
            lines = row_studies.c.line.between(page[0].line, page[-1].line)
            verdicts = judge_rows(connection, cohort, page, lines)
        return [
            (CohortRow(*row[: len(ROW_COLUMNS)]), verdict)
            for row, verdict in zip(page, verdicts, strict=True)
        ]


def _found_at(entries: Iterable[RowFindings], nodes: Sequence[str]) -> dict[str, dict[str, Study]]:
    """What the entries have found: by StudyInstanceUID and node."""
    found: dict[str, dict[str, Study]] = {}
    for entry in entries:
        for number, study in enumerate(entry.studies):
            node = entry.nodes[number] if entry.nodes else nodes[0]
            found.setdefault(study.study_instance_uid, {})[node] = study
    return found


def _best_of(nodes: Sequence[str], at: Mapping[str, Study]) -> str:
    """The node whose answer a study is known by."""
    known = {n: StudyLocation(n, number_of_instances=s.number_of_instances) for n, s in at.items()}
    return choose_node([node for node in nodes if node in at], known) or nodes[0]


def _ends_a_row(reason: str | None) -> bool:
    """Whether discovery is over for a row that ended with this reason (None: it found studies)."""
    return reason is None or reason_for(reason).ends_discovery
