"""Progress of cohorts: their totals, samples of them over time, and throughput.

A sample is a snapshot of a cohort's totals, written by the runs that work on it. No more than
:data:`MOST_SAMPLES` are kept of a cohort.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, case, delete, func, select, text

from prefect_dicom.core.model import Evidence, StudyState
from prefect_dicom.ledger.database import Database, slices, utc_now
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.queries import (
    ARCHIVED_COLUMNS,
    PAGE_SIZE,
    VERDICT_COLUMNS,
    listable_with,
    selection_of,
    taken_by,
)
from prefect_dicom.ledger.records import Run, Sample, StudyGroup, Totals
from prefect_dicom.ledger.row_verdicts import count_plain_rows, judge_rows
from prefect_dicom.ledger.schema import IS_LISTED, cohort_rows, row_studies, runs, samples, studies
from prefect_dicom.ledger.schema import instances as instance_rows
from prefect_dicom.ledger.study_counts import StudyCounts, add_instances, count_instances

MOST_SAMPLES = 2000
"""Samples of one cohort. With one more, they are thinned out to half as many."""
_RUNS_MEASURED = 20


class Progress:
    """Totals of cohorts, now and over time."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def totals(self, cohort: int) -> Totals:
        """Return the totals of a cohort."""
        with self._database.read() as connection:
            totals = count_cohort(connection, cohort)
            plain, others = count_plain_rows(connection, cohort)
            totals.rows.update(plain)
            for lines in slices(others, PAGE_SIZE):
                page = connection.execute(
                    select(*VERDICT_COLUMNS)
                    .where(cohort_rows.c.cohort == cohort, cohort_rows.c.line.in_(lines))
                    .order_by(cohort_rows.c.line)
                ).all()
                for verdict in judge_rows(connection, cohort, page, row_studies.c.line.in_(lines)):
                    totals.rows[verdict.verdict] += 1
                    totals.unproved.update(verdict.gaps)
        return totals

    @translate_database_errors
    def study_totals(self, cohort: int) -> Totals:
        """Return :meth:`totals` without those of rows, which have to be judged one by one."""
        with self._database.read() as connection:
            return count_cohort(connection, cohort)

    @translate_database_errors
    def record_sample(
        self,
        cohort: int,
        run: Run | None = None,
        *,
        schedule_open: bool | None = None,
        least_seconds: float = 0.0,
        at: datetime | None = None,
    ) -> bool:
        """Record a sample of a cohort's totals.

        Parameters
        ----------
        run : Run, optional
            The run that takes the sample.
        schedule_open : bool, optional
            Whether the node's access schedule is open, where it has one.
        least_seconds : float
            Do nothing where the last sample, of any run, is younger than this.
        at : datetime, optional
            Time of the sample; by default now.

        Returns
        -------
        bool
            Whether a sample was recorded.
        """
        at = at or utc_now()
        with self._database.read() as connection:
            last = connection.execute(
                select(func.max(samples.c.at)).where(samples.c.cohort == cohort)
            ).scalar()
            if last is not None and (at - last).total_seconds() < least_seconds:
                return False
            totals = count_cohort(connection, cohort)
        values = {
            "cohort": cohort,
            "at": at,
            "run": None if run is None else run.number,
            "unasked": totals.unasked,
            **{str(state): totals.studies[state] for state in StudyState},
            "expected": totals.expected,
            "received": totals.received,
            "stored": totals.stored,
            "size_bytes": totals.size_bytes,
            "schedule_open": schedule_open,
        }
        with self._database.write() as connection:
            connection.execute(self._database.insert(samples).on_conflict_do_nothing(), values)
            its_samples = samples.c.cohort == cohort
            taken = connection.execute(
                select(samples.c.at).where(its_samples).order_by(samples.c.at)
            ).scalars()
            for piece in slices(_too_many(list(taken))):
                connection.execute(delete(samples).where(its_samples, samples.c.at.in_(piece)))
        return True

    @translate_database_errors
    def samples(self, cohort: int) -> list[Sample]:
        """Return the samples of a cohort, the earliest first; at most MOST_SAMPLES."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(samples, runs.c.started_at)
                .join_from(samples, runs, samples.c.run == runs.c.number, isouter=True)
                .where(samples.c.cohort == cohort)
                .order_by(samples.c.at)
            ).all()
        return [
            Sample(
                at=row.at,
                run=row.run,
                run_began=row.started_at,
                unasked=row.unasked,
                studies=Counter({state: getattr(row, str(state)) for state in StudyState}),
                expected=row.expected,
                received=row.received,
                stored=row.stored,
                size_bytes=row.size_bytes,
                schedule_open=row.schedule_open,
            )
            for row in rows
        ]

    @translate_database_errors
    def study_groups(self, cohort: int) -> list[StudyGroup]:
        """Count the studies that a cohort takes, by modalities, state and reason.

        A study that another cohort has listed with other series counts as failed.
        """
        sums = (studies.c.archived_instances, studies.c.archived_bytes)
        state, reason = _state_of(cohort), _reason_of(cohort)
        query = (
            select(
                studies.c.modalities,
                state.label("its_state"),
                reason.label("its_reason"),
                func.count(),
                *(func.coalesce(func.sum(column), 0) for column in sums),
            )
            .where(taken_by(cohort))
            .group_by(studies.c.modalities, "its_state", "its_reason")
        )
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return [
            StudyGroup(tuple(names), StudyState(its), why, count, int(instances), int(size))
            for names, its, why, count, instances, size in rows
        ]

    @translate_database_errors
    def archived_by_modalities(self) -> list[tuple[tuple[str, ...], int, int, int]]:
        """Count all archived studies, instances and bytes, by the modalities of the studies."""
        sums = func.sum(studies.c.archived_instances), func.sum(studies.c.archived_bytes)
        with self._database.read() as connection:
            rows = connection.execute(
                select(studies.c.modalities, func.count(), *sums)
                .where(studies.c.state == StudyState.ARCHIVED)
                .group_by(studies.c.modalities)
            ).all()
        return [(tuple(names), count, int(n), int(size)) for names, count, n, size in rows]

    @translate_database_errors
    def bytes_per_second(self, node: str) -> float | None:
        """Return the throughput of a node in the latest runs; None before the first.

        Each run counts from its beginning to its last study: discovery is part of it.
        """
        size = seconds = 0.0
        with self._database.read() as connection:
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


def count_cohort(connection: Connection, cohort: int) -> Totals:
    """Return the totals of a cohort without those of its rows."""
    its_studies = select(row_studies.c.study).where(
        row_studies.c.cohort == cohort, row_studies.c.reason.is_(None)
    )
    selected = listable_with(selection_of(cohort))
    # A study that another cohort has listed with other series counts as failed.
    its_state = case((selected, studies.c.state), else_=StudyState.FAILED.value)
    by_state = connection.execute(
        select(
            its_state.label("its_state"),
            studies.c.evidence,
            studies.c.node,
            func.count(),
            *(
                func.coalesce(func.sum(case((selected, column), else_=0)), 0)
                for column in ARCHIVED_COLUMNS
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
    figures = StudyCounts()
    for row in counted:
        figures.expected += max(0, row.counted_instances - here[row.reference].expected)
    for state, proof, node, count, archived, withheld, missing, size_bytes in by_state:
        counts[StudyState(state)] += count
        if state == StudyState.ARCHIVED:
            evidence[Evidence(proof)] += count
            nodes[node] += count
        figures.expected += int(archived) + int(withheld) + int(missing)
        figures.stored += int(archived)
        figures.withheld += int(withheld)
        figures.missing += int(missing)
        figures.size_bytes += int(size_bytes)
    for state, count, size_bytes in by_instance:
        add_instances(figures, state, count, int(size_bytes))
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
        missing=figures.missing,
    )


def _state_of(cohort: int) -> ColumnElement[str]:
    selected = listable_with(selection_of(cohort))
    return case((selected, studies.c.state), else_=StudyState.FAILED.value)


def _reason_of(cohort: int) -> ColumnElement[str]:
    return case((listable_with(selection_of(cohort)), studies.c.reason), else_="selected-otherwise")


def _too_many(taken: list[datetime]) -> list[datetime]:
    """Return the samples to delete, so that half as many are spread evenly over the whole time."""
    if len(taken) <= MOST_SAMPLES:
        return []
    kept, apart = taken, timedelta(seconds=1)
    while len(kept) > MOST_SAMPLES // 2:
        # By powers of two: samples that are far enough apart stay, each time.
        apart *= 2
        kept = _apart(taken, apart)
    return sorted(set(taken) - set(kept))


def _apart(taken: list[datetime], apart: timedelta) -> list[datetime]:
    """Return the first and the last sample, and between them those that are so far apart."""
    kept = taken[:1]
    for at in taken[1:-1]:
        if at - kept[-1] >= apart:
            kept.append(at)
    return [*kept, taken[-1]]
