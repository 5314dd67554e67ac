"""An open ledger, and what it says: rows and verdicts, studies, instances, counts, manifests.

What is long is streamed in pages; nothing here changes anything.
"""

from __future__ import annotations

import threading
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self, TypeVar

from sqlalchemy import ColumnElement, Connection, Engine, Row, and_, case, func, or_, select, text
from sqlalchemy.dialects import postgresql, sqlite

from prefect_dicom.cohort.filters import decode_selection
from prefect_dicom.core.errors import LedgerError
from prefect_dicom.core.model import (
    WHOLE,
    CohortRow,
    Evidence,
    InstanceKey,
    InstanceState,
    NodeOrder,
    RowVerdict,
    Selection,
    Study,
    StudyReference,
    StudyState,
    Verdict,
)
from prefect_dicom.core.reasons import SELECTED_OTHERWISE, reason_for
from prefect_dicom.core.verdicts import StudyOutcome, row_verdict, weakest_evidence
from prefect_dicom.ledger import statements
from prefect_dicom.ledger.database import for_writing, open_database
from prefect_dicom.ledger.errors import without_database_errors
from prefect_dicom.ledger.records import Cohort, Copy, InstanceRecord, Run, StudyRecord, Totals
from prefect_dicom.ledger.run_locks import Locks
from prefect_dicom.ledger.schema import (
    IS_LISTED,
    IS_UNFINISHED,
    cohort_notes,
    cohort_rows,
    cohorts,
    manifests,
    row_studies,
    runs,
    selections,
    studies,
)
from prefect_dicom.ledger.schema import instances as instance_rows
from prefect_dicom.ledger.study_locations import Copies, read_copies

T = TypeVar("T")

UNFINISHED = (StudyState.PENDING, StudyState.LISTED)
LIST = 500
"""Values in one list of a statement (three parameters each at most; SQLite takes 32,766)."""
# Rows read at a time by what streams. A manifest can have megabytes.
_PAGE = 1000
_MANIFEST_PAGE = 8
_RUNS_MEASURED = 20

_ROW_COLUMNS = (
    cohort_rows.c.line,
    cohort_rows.c.patient_id,
    cohort_rows.c.accession_number,
    cohort_rows.c.study_instance_uid,
    cohort_rows.c.study_date,
    cohort_rows.c.modality,
    cohort_rows.c.study_description,
    cohort_rows.c.patient_name,
    cohort_rows.c.patient_birth_date,
)
STUDY_COLUMNS = (
    studies.c.study_instance_uid,
    studies.c.patient_id,
    studies.c.accession_number,
    studies.c.study_date,
    studies.c.modalities,
    studies.c.study_description,
    studies.c.number_of_series,
    studies.c.number_of_instances,
)
_ARCHIVED_COLUMNS = (
    studies.c.archived_instances,
    studies.c.withheld_instances,
    studies.c.archived_bytes,
)


def slices(values: Iterable[T], size: int = LIST) -> Iterator[list[T]]:
    """The values in lists of at most so many."""
    remaining = iter(values)
    while piece := list(islice(remaining, size)):
        yield piece


def listable_with(selection: Any) -> ColumnElement[bool]:
    """Of a row of ``studies``: nothing of it is listed yet, or with the same series."""
    return or_(studies.c.selection.is_(None), studies.c.selection == selection)


def selection_of(cohort: int) -> Any:
    """The series a cohort wants, in words, within another statement."""
    return select(cohorts.c.selection).where(cohorts.c.number == cohort).scalar_subquery()


def study_of(row: Row[Any]) -> Study:
    """The study in a row that has STUDY_COLUMNS."""
    return Study(
        study_instance_uid=row.study_instance_uid,
        patient_id=row.patient_id,
        accession_number=row.accession_number,
        study_date=row.study_date,
        modalities=tuple(row.modalities),
        study_description=row.study_description,
        number_of_series=row.number_of_series,
        number_of_instances=row.number_of_instances,
    )


def cohort_of(row: Row[Any]) -> Cohort:
    """The cohort in a row of ``cohorts``."""
    return Cohort(
        number=row.number,
        name=row.name,
        digest=row.digest,
        order=NodeOrder.of(row.node),
        rows=row.rows,
        created_at=row.created_at,
        selection=row.selection,
        paused=row.paused,
        priority=row.priority,
    )


def _study_of_json(study: dict[str, Any]) -> Study:
    """The study in its ``asdict``, after JSON has made lists of what were tuples."""
    return Study(
        **{
            **study,
            "modalities": tuple(study["modalities"]),
            "told": tuple((keyword, value) for keyword, value in study.get("told", ())),
            "original": tuple((keyword, value) for keyword, value in study.get("original", ())),
            "guessed": tuple(study.get("guessed", ())),
        }
    )


@dataclass(slots=True)
class _Figures:
    """Instances of one study, counted."""

    expected: int = 0
    received: int = 0
    stored: int = 0
    withheld: int = 0
    size_bytes: int = 0


class Reading:
    """A ledger that is open, and every verb that only reads."""

    def __init__(self, engine: Engine, locks: Locks) -> None:
        self._engine = engine
        self._writing_engine = for_writing(engine)
        self._locks = locks
        self._insert = (sqlite if engine.dialect.name == "sqlite" else postgresql).insert
        # SQLite has one writer: threads queue here, where waiting costs nothing, rather than in
        # its busy loop. PostgreSQL needs no such thing.
        self._writer = threading.Lock() if engine.dialect.name == "sqlite" else nullcontext()

    @classmethod
    def open(cls, url: str) -> Self:
        """Open the ledger at a URL; make it where there is none, migrate an older one.

        Parameters
        ----------
        url : str
            ``sqlite:///relative`` or ``sqlite:////absolute`` for a file (made with mode 0600),
            ``postgresql+psycopg://…`` for PostgreSQL.

        Raises
        ------
        LedgerError
            ``ledger-unavailable``, ``ledger-too-new`` or ``ledger-unsafe``; no part of the URL
            is in its message.
        """
        return cls(*open_database(url))

    def close(self) -> None:
        """Close all connections; runs that are still open end with them on PostgreSQL."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._writer, self._writing_engine.begin() as connection:
            yield connection

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self._engine.begin() as connection:
            yield connection

    @without_database_errors
    def look_for_damage(self) -> None:
        """Look through the whole of a SQLite file; a server sees to that by its own means.

        Raises
        ------
        LedgerError
            ``ledger-damaged``
        """
        if self._engine.dialect.name != "sqlite":
            return
        with self._read() as connection:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if found != "ok":
            raise LedgerError("ledger-damaged", "its pages do not fit together")

    def _living(self, connection: Connection, numbers: Collection[int]) -> set[int]:
        """Those of the runs whose locks are held."""
        held = set()
        for piece in slices(numbers):
            for number, lock, ended_at in connection.execute(
                select(runs.c.number, runs.c.lock, runs.c.ended_at).where(runs.c.number.in_(piece))
            ).all():
                if ended_at is None and self._locks.is_held(connection, lock):
                    held.add(number)
        return held

    @without_database_errors
    def cohort(self, name: str) -> Cohort:
        """The cohort of this name, or of this number.

        Raises
        ------
        LedgerError
            ``cohort-unknown``.
        """
        with self._read() as connection:
            row = connection.execute(select(cohorts).where(cohorts.c.name == name)).first()
            if row is None and name.isascii() and name.isdigit() and len(name) < 18:
                row = connection.execute(
                    select(cohorts).where(cohorts.c.number == int(name))
                ).first()
        if row is None:
            raise LedgerError("cohort-unknown")
        return cohort_of(row)

    @without_database_errors
    def cohort_of(self, digest: str, node: str) -> Cohort | None:
        """The cohort of this file and order of nodes, or None where it has not been added."""
        with self._read() as connection:
            row = connection.execute(
                select(cohorts).where(cohorts.c.digest == digest, cohorts.c.node == node)
            ).first()
        return None if row is None else cohort_of(row)

    @without_database_errors
    def cohorts(self) -> list[Cohort]:
        """All cohorts, the latest first."""
        with self._read() as connection:
            rows = connection.execute(select(cohorts).order_by(cohorts.c.number.desc())).all()
        return [cohort_of(row) for row in rows]

    @without_database_errors
    def selection(self, cohort: int) -> Selection:
        """What a cohort wants of what its rows find."""
        with self._read() as connection:
            body = connection.execute(
                select(selections.c.body).where(selections.c.cohort == cohort)
            ).scalar()
        return WHOLE if body is None else decode_selection(body)

    @without_database_errors
    def notes(self, cohort: int) -> list[tuple[str, str]]:
        """Node and words of what runs of a cohort have found out about nodes, in their order."""
        columns = (cohort_notes.c.node, cohort_notes.c.words)
        query = select(*columns).where(cohort_notes.c.cohort == cohort)
        with self._read() as connection:
            rows = connection.execute(query.order_by(cohort_notes.c.number)).all()
        return [(node, words) for node, words in rows]

    @without_database_errors
    def rows_to_discover(
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
        with self._read() as connection:
            return first_rows(connection, chosen, limit)

    @without_database_errors
    def near_misses(self, cohort: int, line: int) -> tuple[Study, ...]:
        """The candidates that the row's discovery did not take."""
        with self._read() as connection:
            kept = connection.execute(
                select(cohort_rows.c.near_misses).where(
                    cohort_rows.c.cohort == cohort, cohort_rows.c.line == line
                )
            ).scalar()
        return tuple(map(_study_of_json, kept or ()))

    def candidates(self, cohort: int) -> Iterator[tuple[CohortRow, str | None, tuple[Study, ...]]]:
        """Each row that has near misses, with its reason and these, by line, in pages."""
        line = -1
        while page := self._candidate_page(cohort, line):
            yield from page
            line = page[-1][0].line

    @without_database_errors
    def _candidate_page(
        self, cohort: int, after_line: int
    ) -> list[tuple[CohortRow, str | None, tuple[Study, ...]]]:
        with self._read() as connection:
            rows = connection.execute(
                select(*_ROW_COLUMNS, cohort_rows.c.reason, cohort_rows.c.near_misses)
                .where(
                    cohort_rows.c.cohort == cohort,
                    cohort_rows.c.line > after_line,
                    cohort_rows.c.near_misses.is_not(None),
                )
                .order_by(cohort_rows.c.line)
                .limit(_PAGE)
            ).all()
        return [
            (
                CohortRow(*row[: len(_ROW_COLUMNS)]),
                row.reason,
                tuple(map(_study_of_json, row.near_misses)),
            )
            for row in rows
        ]

    @without_database_errors
    def studies_to_pull(
        self, cohort: int, after: StudyReference = 0, limit: int = 1000
    ) -> list[StudyRecord]:
        """The next unfinished studies of a cohort, by reference; claimed ones are among them.

        Those that are listed with other series than the cohort wants are not, and neither are
        those beyond its maximum.
        """
        return self._study_page(cohort, after, limit, unfinished=True)

    @without_database_errors
    def unfinished(
        self, references: Iterable[StudyReference], selection: str | None = None
    ) -> dict[StudyReference, bool]:
        """Those of the studies that are unfinished, and whether a living run holds them.

        Parameters
        ----------
        selection : str, optional
            As for :meth:`claim`.
        """
        found: dict[StudyReference, int | None] = {}
        columns = (studies.c.reference, studies.c.run)
        with self._read() as connection:
            for piece in slices(references):
                chosen = and_(studies.c.reference.in_(piece), studies.c.state.in_(UNFINISHED))
                if selection is not None:
                    chosen = and_(chosen, listable_with(selection))
                found.update(connection.execute(select(*columns).where(chosen)).tuples().all())
            living = self._living(connection, {run for run in found.values() if run is not None})
        return {reference: run in living for reference, run in found.items()}

    @without_database_errors
    def copies(self, references: Iterable[StudyReference]) -> dict[StudyReference, dict[str, Copy]]:
        """Of studies of cohorts with several nodes: by node, whether it can be had from there."""
        known: dict[StudyReference, dict[str, Copy]] = {}
        with self._read() as connection:
            for piece in slices(references):
                known.update(read_copies(connection, piece))
        return known

    @without_database_errors
    def instances(self, reference: StudyReference) -> list[InstanceRecord]:
        """The instances of a study, by key; of an archived one the manifest has them instead.

        Those that are no longer listed are among them, rejected for that reason.
        """
        with self._read() as connection:
            rows = connection.execute(statements.INSTANCES, {"b_study": reference}).all()
        return [
            InstanceRecord(
                key=InstanceKey(row.series_instance_uid, row.sop_instance_uid),
                sop_class_uid=row.sop_class_uid,
                state=InstanceState(row.state),
                reason=row.reason,
                sha256=row.sha256,
                size_bytes=row.size_bytes,
                transfer_syntax_uid=row.transfer_syntax_uid,
                spool_name=row.spool_name,
                object_key=row.object_key,
                version_id=row.version_id,
                warnings=tuple(row.warnings or ()),
                rejections=row.rejections,
                node=row.node,
            )
            for row in rows
        ]

    def studies(self, cohort: int) -> Iterator[StudyRecord]:
        """Every study that a cohort takes, by reference, in pages."""
        reference = 0
        while page := self._study_page(cohort, reference, _PAGE):
            yield from page
            reference = page[-1].reference

    @without_database_errors
    def _study_page(
        self,
        cohort: int,
        after: StudyReference,
        limit: int,
        *,
        unfinished: bool = False,
    ) -> list[StudyRecord]:
        chosen: list[Row[Any]] = []
        with self._read() as connection:
            while len(chosen) < limit:
                if unfinished:
                    # Past those that are done, of whichever cohort, at one step.
                    following = connection.execute(
                        select(func.min(studies.c.reference)).where(
                            IS_UNFINISHED, studies.c.reference > after
                        )
                    ).scalar()
                    if following is None:
                        break
                    after = following - 1
                # By the index of the links alone, whatever else the ledger holds.
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
                        .limit(LIST)
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
            return self._study_records(connection, chosen[:limit])

    def _study_records(self, connection: Connection, rows: Sequence[Row[Any]]) -> list[StudyRecord]:
        figures = _figures(connection, rows)
        living = self._living(connection, {row.run for row in rows if row.run is not None})
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
                size_bytes=figures[row.reference].size_bytes,
                selection=row.selection,
            )
            for row in rows
        ]

    @without_database_errors
    def study(self, reference: StudyReference) -> StudyRecord | None:
        """The study with this reference, or None."""
        return self._one_study(studies.c.reference == reference)

    @without_database_errors
    def study_by_uid(self, study_instance_uid: str) -> StudyRecord | None:
        """The study with this StudyInstanceUID, or None."""
        return self._one_study(studies.c.study_instance_uid == study_instance_uid)

    def _one_study(self, condition: ColumnElement[bool]) -> StudyRecord | None:
        with self._read() as connection:
            rows = connection.execute(select(studies).where(condition)).all()
            return next(iter(self._study_records(connection, rows)), None)

    def verdicts(self, cohort: int) -> Iterator[RowVerdict]:
        """The verdict of every row of a cohort, by line, in pages."""
        return (verdict for _, verdict in self.rows(cohort))

    def rows(self, cohort: int) -> Iterator[tuple[CohortRow, RowVerdict]]:
        """Every row of a cohort with its own keys and its verdict, by line, in pages."""
        line = 0
        while page := self._row_page(cohort, line):
            yield from page
            line = page[-1][0].line

    @without_database_errors
    def _row_page(self, cohort: int, after_line: int) -> list[tuple[CohortRow, RowVerdict]]:
        with self._read() as connection:
            page = connection.execute(
                select(*_ROW_COLUMNS, cohort_rows.c.reason, cohort_rows.c.gaps)
                .where(cohort_rows.c.cohort == cohort, cohort_rows.c.line > after_line)
                .order_by(cohort_rows.c.line)
                .limit(_PAGE)
            ).all()
            if not page:
                return []
            lines = row_studies.c.line.between(page[0].line, page[-1].line)
            verdicts = _judge(connection, cohort, page, lines)
        return [
            (CohortRow(*row[: len(_ROW_COLUMNS)]), verdict)
            for row, verdict in zip(page, verdicts, strict=True)
        ]

    @without_database_errors
    def totals(self, cohort: int) -> Totals:
        """The cohort in figures."""
        with self._read() as connection:
            totals = count_cohort(connection, cohort)
            plain, others = _count_plain_rows(connection, cohort)
            totals.rows.update(plain)
            for lines in slices(others, _PAGE):
                page = connection.execute(
                    select(cohort_rows.c.line, cohort_rows.c.reason, cohort_rows.c.gaps)
                    .where(cohort_rows.c.cohort == cohort, cohort_rows.c.line.in_(lines))
                    .order_by(cohort_rows.c.line)
                ).all()
                for verdict in _judge(connection, cohort, page, row_studies.c.line.in_(lines)):
                    totals.rows[verdict.verdict] += 1
                    totals.unproved.update(verdict.gaps)
        return totals

    @without_database_errors
    def figures(self, cohort: int) -> Totals:
        """:meth:`totals` but for those of rows, which have to be judged one by one."""
        with self._read() as connection:
            return count_cohort(connection, cohort)

    @without_database_errors
    def archived_by_modalities(self) -> list[tuple[tuple[str, ...], int, int, int]]:
        """All that is archived: studies, instances and bytes, by the studies' modalities."""
        sums = func.sum(studies.c.archived_instances), func.sum(studies.c.archived_bytes)
        with self._read() as connection:
            rows = connection.execute(
                select(studies.c.modalities, func.count(), *sums)
                .where(studies.c.state == StudyState.ARCHIVED)
                .group_by(studies.c.modalities)
            ).all()
        return [(tuple(names), count, int(n), int(size)) for names, count, n, size in rows]

    @without_database_errors
    def bytes_per_second(self, node: str) -> float | None:
        """How fast the latest runs have archived what came from a node; None before the first.

        From the beginning of each to its last study: what it took to find the studies counts.
        """
        size = seconds = 0.0
        with self._read() as connection:
            for began, ended in connection.execute(
                select(runs.c.started_at, runs.c.ended_at)
                .order_by(runs.c.number.desc())
                .limit(_RUNS_MEASURED)
            ).all():
                in_it = [studies.c.node == node, studies.c.archived_at >= began]
                if ended is not None:
                    in_it.append(studies.c.archived_at <= ended)
                figures = func.sum(studies.c.archived_bytes), func.max(studies.c.archived_at)
                done, last = connection.execute(select(*figures).where(*in_it)).one()
                if last is not None:
                    size += int(done)
                    seconds += (last - began).total_seconds()
        return size / seconds if size and seconds > 0 else None

    def manifests(self, cohort: int | None) -> Iterator[tuple[StudyReference, bytes]]:
        """The manifests of the cohort's archived studies (None: all), by reference, in pages."""
        reference = 0
        while page := self._manifest_page(cohort, reference):
            yield from page
            reference = page[-1][0]

    @without_database_errors
    def manifest(self, reference: StudyReference) -> bytes | None:
        """The manifest of an archived study."""
        with self._read() as connection:
            body = connection.execute(
                select(manifests.c.body).where(manifests.c.study == reference)
            ).scalar()
        return None if body is None else zlib.decompress(body)

    @without_database_errors
    def _manifest_page(
        self, cohort: int | None, after: StudyReference
    ) -> list[tuple[StudyReference, bytes]]:
        query = select(manifests.c.study, manifests.c.body).where(manifests.c.study > after)
        if cohort is not None:
            query = query.where(
                select(row_studies.c.study)
                .join(studies, studies.c.reference == row_studies.c.study)
                .where(
                    row_studies.c.cohort == cohort,
                    row_studies.c.study == manifests.c.study,
                    row_studies.c.reason.is_(None),
                    listable_with(selection_of(cohort)),
                )
                .exists()
            )
        with self._read() as connection:
            rows = connection.execute(query.order_by(manifests.c.study).limit(_MANIFEST_PAGE)).all()
        return [(row.study, zlib.decompress(row.body)) for row in rows]


def _judge(
    connection: Connection, cohort: int, page: Sequence[Row[Any]], lines: ColumnElement[bool]
) -> list[RowVerdict]:
    """The verdicts of some rows of a cohort (with line, reason and gaps), in their order.

    Parameters
    ----------
    lines : ColumnElement
        Of a row of ``row_studies``: it is of one of them.
    """
    links = connection.execute(
        select(
            row_studies.c.line,
            studies.c.reference,
            studies.c.state,
            studies.c.reason,
            row_studies.c.reason.label("not_taken"),
            listable_with(selection_of(cohort)).label("selected"),
            studies.c.evidence,
            studies.c.counted_instances,
            studies.c.node,
            *_ARCHIVED_COLUMNS,
        )
        .join(studies, studies.c.reference == row_studies.c.study)
        .where(row_studies.c.cohort == cohort, lines)
        .order_by(row_studies.c.line, row_studies.c.study)
    ).all()
    figures = _figures(connection, links)
    known: dict[StudyReference, dict[str, Copy]] = {}
    for piece in slices(dict.fromkeys(link.reference for link in links)):
        known.update(read_copies(connection, piece))
    nodes: dict[int, dict[str, None]] = {}
    outcomes: dict[int, list[StudyOutcome]] = {}
    not_taken: dict[int, str] = {}
    for link in links:
        if link.not_taken is not None:
            not_taken[link.line] = link.not_taken
            continue
        its_nodes = nodes.setdefault(link.line, {})
        its_nodes.update(dict.fromkeys(_asked_of(link, known.get(link.reference, {}))))
        if not link.selected:
            other = StudyOutcome(link.reference, StudyState.FAILED, SELECTED_OTHERWISE)
            outcomes.setdefault(link.line, []).append(other)
            continue
        counted = figures[link.reference]
        outcomes.setdefault(link.line, []).append(
            StudyOutcome(
                reference=link.reference,
                state=StudyState(link.state),
                reason=link.reason,
                expected_instances=counted.expected,
                stored_instances=counted.stored,
                withheld_instances=counted.withheld,
                size_bytes=counted.size_bytes,
                evidence=Evidence(link.evidence) if link.evidence else None,
            )
        )
    return [
        _verdict(
            row.line,
            row.reason,
            row.gaps,
            outcomes.get(row.line, []),
            not_taken.get(row.line),
            tuple(nodes.get(row.line, ())),
        )
        for row in page
    ]


def _count_plain_rows(
    connection: Connection, cohort: int
) -> tuple[Counter[Verdict], Sequence[int]]:
    """Verdicts that follow from what studies are found and archived, counted by the database.

    Returns
    -------
    tuple of Counter and sequence of int
        And the lines of all other rows: with gaps, with studies that failed or are not taken.
    """
    taken = and_(row_studies.c.reason.is_(None), listable_with(selection_of(cohort)))
    is_archived = and_(taken, studies.c.state == StudyState.ARCHIVED)

    def any_of(condition: ColumnElement[bool]) -> ColumnElement[int]:
        return func.max(case((condition, 1), else_=0))

    found = (
        select(
            row_studies.c.line,
            any_of(and_(taken, IS_UNFINISHED)).label("unfinished"),
            any_of(and_(is_archived, studies.c.withheld_instances > 0)).label("withheld"),
            any_of(or_(~taken, studies.c.state == StudyState.FAILED)).label("other"),
        )
        .join(studies, studies.c.reference == row_studies.c.study)
        .where(row_studies.c.cohort == cohort)
        .group_by(row_studies.c.line)
        .subquery()
    )
    joined = cohort_rows.outerjoin(found, found.c.line == cohort_rows.c.line)
    of_cohort = cohort_rows.c.cohort == cohort
    no_gaps = cohort_rows.c.gaps.is_(None)
    plain = and_(
        no_gaps,
        or_(found.c.line.is_(None), found.c.unfinished == 1, found.c.other == 0),
    )
    signature = (
        cohort_rows.c.reason,
        found.c.unfinished,
        found.c.withheld,
    )
    rows: Counter[Verdict] = Counter()
    for reason, unfinished, withheld, count in connection.execute(
        select(*signature, func.count())
        .select_from(joined)
        .where(of_cohort, plain)
        .group_by(*signature)
    ):
        outcomes = []
        if unfinished is not None:
            state = StudyState.PENDING if unfinished else StudyState.ARCHIVED
            outcomes.append(StudyOutcome(0, state, withheld_instances=withheld))
        rows[row_verdict(reason, outcomes)[0]] += count
    others = connection.execute(
        select(cohort_rows.c.line).select_from(joined).where(of_cohort, ~plain)
    ).scalars()
    return rows, others.all()


def to_discover(cohort: int, after_line: int = -1) -> ColumnElement[bool]:
    """Of a row of ``cohort_rows``: its discovery has not ended."""
    return and_(
        cohort_rows.c.cohort == cohort,
        cohort_rows.c.line > after_line,
        ~cohort_rows.c.discovered,
    )


def first_rows(connection: Connection, chosen: ColumnElement[bool], limit: int) -> list[CohortRow]:
    """The first of the chosen rows of ``cohort_rows``, by line."""
    rows = connection.execute(
        select(*_ROW_COLUMNS).where(chosen).order_by(cohort_rows.c.line).limit(limit)
    )
    return [CohortRow(**row._mapping) for row in rows]


def _verdict(
    line: int,
    reason: str | None,
    gaps: list[str] | None,
    outcomes: list[StudyOutcome],
    not_taken: str | None,
    nodes: tuple[str, ...],
) -> RowVerdict:
    verdict, code = row_verdict(reason, outcomes, unproved=bool(gaps), not_taken=not_taken)
    return RowVerdict(
        line=line,
        verdict=verdict,
        reason=code,
        studies=tuple(outcome.reference for outcome in outcomes),
        expected_instances=sum(outcome.expected_instances for outcome in outcomes),
        archived_instances=sum(outcome.stored_instances for outcome in outcomes),
        withheld_instances=sum(outcome.withheld_instances for outcome in outcomes),
        size_bytes=sum(outcome.size_bytes for outcome in outcomes),
        gaps=tuple(gaps or ()),
        evidence=weakest_evidence(outcomes),
        nodes=nodes,
    )


def _asked_of(study: Row[Any], copies: Copies) -> list[str]:
    """The nodes that a study was asked of, with the reasons of those that could not deliver it."""
    failed = [f"{copy.node}: {copy.reason}" for copy in copies.values() if copy.reason is not None]
    last = copies.get(study.node)
    return failed if last is not None and last.reason is not None else [*failed, study.node]


def _add(figures: _Figures, state: str, count: int, size_bytes: int) -> None:
    figures.expected += count
    if state == InstanceState.RECEIVED:
        figures.received += count
    elif state == InstanceState.STORED:
        figures.stored += count
        figures.size_bytes += size_bytes
    elif state == InstanceState.REJECTED:
        figures.withheld += count


def count_cohort(connection: Connection, cohort: int) -> Totals:
    """The cohort in figures, but for those of its rows, which have to be judged one by one."""
    its_studies = select(row_studies.c.study).where(
        row_studies.c.cohort == cohort, row_studies.c.reason.is_(None)
    )
    selected = listable_with(selection_of(cohort))
    # To this cohort, what another has with other series is as good as failed.
    its_state = case((selected, studies.c.state), else_=StudyState.FAILED.value)
    by_state = connection.execute(
        select(
            its_state.label("its_state"),
            studies.c.evidence,
            studies.c.node,
            func.count(),
            *(
                func.coalesce(func.sum(case((selected, column), else_=0)), 0)
                for column in _ARCHIVED_COLUMNS
            ),
        )
        .where(studies.c.reference.in_(its_studies))
        .group_by(text("its_state"), studies.c.evidence, studies.c.node)
    ).all()
    others = select(studies.c.reference).where(studies.c.reference.in_(its_studies), ~selected)
    by_instance = connection.execute(
        select(
            instance_rows.c.state,
            func.count(),
            func.coalesce(func.sum(instance_rows.c.size_bytes), 0),
        )
        # Of archived studies no listed instance is a row any more.
        .where(
            instance_rows.c.study.in_(its_studies),
            instance_rows.c.study.not_in(others),
            IS_LISTED,
        )
        .group_by(instance_rows.c.state)
    ).all()
    counted = connection.execute(
        select(studies.c.reference, studies.c.counted_instances).where(
            studies.c.reference.in_(its_studies),
            studies.c.reference.not_in(others),
            studies.c.counted_instances.is_not(None),
            studies.c.state != StudyState.ARCHIVED,
        )
    ).all()
    here = count_instances(connection, [row.reference for row in counted])
    unasked = connection.execute(
        select(func.count()).where(
            cohort_rows.c.cohort == cohort,
            ~cohort_rows.c.discovered,
            cohort_rows.c.reason.is_(None),
        )
    ).scalar_one()
    counts: Counter[StudyState] = Counter()
    evidence: Counter[Evidence] = Counter()
    nodes: Counter[str] = Counter()
    figures = _Figures()
    for row in counted:
        figures.expected += max(0, row.counted_instances - here[row.reference].expected)
    for state, proof, node, count, archived, withheld, size_bytes in by_state:
        counts[StudyState(state)] += count
        if state == StudyState.ARCHIVED:
            evidence[Evidence(proof)] += count
            nodes[node] += count
        figures.expected += int(archived) + int(withheld)
        figures.stored += int(archived)
        figures.withheld += int(withheld)
        figures.size_bytes += int(size_bytes)
    for state, count, size_bytes in by_instance:
        _add(figures, state, count, int(size_bytes))
    return Totals(
        rows=Counter(),
        evidence=evidence,
        nodes=nodes,
        studies=counts,
        expected=figures.expected,
        received=figures.received,
        stored=figures.stored,
        rejected=figures.withheld,
        size_bytes=figures.size_bytes,
        unasked=unasked,
    )


def count_instances(
    connection: Connection, references: Iterable[StudyReference]
) -> dict[StudyReference, _Figures]:
    """Count the listed instances of each study by their rows."""
    figures: dict[StudyReference, _Figures] = {}
    for piece in slices(references):
        figures.update((reference, _Figures()) for reference in piece)
        for reference, state, count, size_bytes in connection.execute(
            statements.COUNTS, {"b_studies": piece}
        ):
            _add(figures[reference], state, count, int(size_bytes))
    return figures


def _figures(connection: Connection, rows: Sequence[Row[Any]]) -> dict[StudyReference, _Figures]:
    """The figures of studies: those written down of archived ones, counted of the others."""
    figures: dict[StudyReference, _Figures] = {}
    unfinished: dict[StudyReference, None] = {}
    for row in rows:
        if row.state == StudyState.ARCHIVED:
            figures[row.reference] = _Figures(
                expected=row.archived_instances + row.withheld_instances,
                stored=row.archived_instances,
                withheld=row.withheld_instances,
                size_bytes=row.archived_bytes,
            )
        else:
            unfinished[row.reference] = None
    figures.update(count_instances(connection, unfinished))
    for row in rows:
        if row.reference in unfinished and row.counted_instances is not None:
            its = figures[row.reference]
            its.expected = max(its.expected, row.counted_instances)
    return figures
