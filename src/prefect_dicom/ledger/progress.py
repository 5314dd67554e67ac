"""How a cohort got to where it is: samples over time, and its studies by what became of them.

A sample is a look at a cohort's figures, written down by the runs that work on it. Whatever the
length of a cohort, no more than :data:`MOST_SAMPLES` are kept.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Select, case, delete, func, select, update

from prefect_dicom.core.model import StudyState
from prefect_dicom.core.reasons import SELECTED_OTHERWISE, reason_for
from prefect_dicom.ledger.claims import utc_now
from prefect_dicom.ledger.errors import without_database_errors
from prefect_dicom.ledger.reading import Reading, count_cohort, listable_with, selection_of, slices
from prefect_dicom.ledger.records import Run, Sample, StudyGroup, StudyRecord
from prefect_dicom.ledger.schema import row_studies, runs, samples, studies

MOST_SAMPLES = 2000
"""Of one cohort. With one more than that, it is thinned out to half as many."""


class History(Reading):
    """The verbs that tell how a cohort went, and the one by which its samples are taken."""

    @without_database_errors
    def sample(
        self,
        cohort: int,
        run: Run | None = None,
        *,
        window_open: bool | None = None,
        least_seconds: float = 0.0,
        at: datetime | None = None,
    ) -> bool:
        """Write down where a cohort stands; whether that was done.

        Parameters
        ----------
        run : Run, optional
            The run that looks.
        window_open : bool, optional
            Whether the node may be asked now, where it has windows.
        least_seconds : float
            Leave it where the last sample, of whichever run, is younger.
        at : datetime, optional
            The moment, where that is not now.
        """
        at = at or utc_now()
        with self._read() as connection:
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
            "window_open": window_open,
        }
        with self._write() as connection:
            connection.execute(self._insert(samples).on_conflict_do_nothing(), values)
            its_samples = samples.c.cohort == cohort
            taken = connection.execute(
                select(samples.c.at).where(its_samples).order_by(samples.c.at)
            ).scalars()
            for piece in slices(_too_many(list(taken))):
                connection.execute(delete(samples).where(its_samples, samples.c.at.in_(piece)))
        return True

    @without_database_errors
    def samples(self, cohort: int) -> list[Sample]:
        """What was written down of a cohort, the earliest first; at most MOST_SAMPLES."""
        with self._read() as connection:
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
                window_open=row.window_open,
            )
            for row in rows
        ]

    @without_database_errors
    def record_trouble(self, run: Run, code: str) -> None:
        """A run has been kept from its end.

        Parameters
        ----------
        code : str
            A code of :mod:`prefect_dicom.core.reasons`.
        """
        reason_for(code)
        with self._write() as connection:
            connection.execute(update(runs).where(runs.c.number == run.number).values(reason=code))

    @without_database_errors
    def trouble(self, cohort: int) -> str | None:
        """What kept the last run of a cohort from its end; None where nothing did."""
        with self._read() as connection:
            return connection.execute(
                select(runs.c.reason)
                .where(runs.c.cohort == cohort)
                .order_by(runs.c.number.desc())
                .limit(1)
            ).scalar()

    @without_database_errors
    def study_groups(self, cohort: int) -> list[StudyGroup]:
        """The studies a cohort takes, counted by modalities, state and reason.

        What another cohort has with other series is failed, to this one.
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
            .where(_is_of(cohort))
            .group_by(studies.c.modalities, "its_state", "its_reason")
        )
        with self._read() as connection:
            rows = connection.execute(query).all()
        return [
            StudyGroup(tuple(names), StudyState(its), why, count, int(instances), int(size))
            for names, its, why, count, instances, size in rows
        ]

    @without_database_errors
    def slowest_studies(self, cohort: int, most: int) -> list[StudyRecord]:
        """The archived studies between whose last claim and end the most time lies."""
        claimed, archived = studies.c.claimed_at, studies.c.archived_at
        if self._engine.dialect.name == "sqlite":
            took = func.julianday(archived) - func.julianday(claimed)
        else:
            took = archived - claimed
        query = (
            select(studies)
            .where(
                _is_of(cohort),
                listable_with(selection_of(cohort)),
                studies.c.state == StudyState.ARCHIVED,
                claimed.is_not(None),
            )
            .order_by(took.desc(), studies.c.reference)
            .limit(most)
        )
        return self._records(query)

    @without_database_errors
    def failed_studies(self, cohort: int, most_each: int) -> list[StudyRecord]:
        """The studies that failed, no more than so many for each reason: the latest of them."""
        newest_first = studies.c.failed_at.desc(), studies.c.reference
        rank = func.row_number().over(partition_by=studies.c.reason, order_by=newest_first)
        failed = (
            select(studies.c.reference, rank.label("rank"))
            .where(_is_of(cohort), studies.c.state == StudyState.FAILED)
            .subquery()
        )
        query = (
            select(studies)
            .join(failed, failed.c.reference == studies.c.reference)
            .where(failed.c.rank <= most_each)
            .order_by(studies.c.reason, *newest_first)
        )
        return self._records(query)

    def _records(self, query: Select) -> list[StudyRecord]:
        with self._read() as connection:
            return self._study_records(connection, connection.execute(query).all())


def _is_of(cohort: int) -> ColumnElement[bool]:
    """Of a row of ``studies``: a cohort takes it."""
    return studies.c.reference.in_(
        select(row_studies.c.study).where(
            row_studies.c.cohort == cohort, row_studies.c.reason.is_(None)
        )
    )


def _state_of(cohort: int) -> ColumnElement[str]:
    selected = listable_with(selection_of(cohort))
    return case((selected, studies.c.state), else_=StudyState.FAILED.value)


def _reason_of(cohort: int) -> ColumnElement[str]:
    return case((listable_with(selection_of(cohort)), studies.c.reason), else_=SELECTED_OTHERWISE)


def _too_many(taken: list[datetime]) -> list[datetime]:
    """Which of the samples to give up, so that half as many lie evenly over the whole time."""
    if len(taken) <= MOST_SAMPLES:
        return []
    kept, apart = taken, timedelta(seconds=1)
    while len(kept) > MOST_SAMPLES // 2:
        # By twos: what is far enough apart already stays, time after time.
        apart *= 2
        kept = _apart(taken, apart)
    return sorted(set(taken) - set(kept))


def _apart(taken: list[datetime], apart: timedelta) -> list[datetime]:
    """The first and the last of the samples, and between them those that lie so far apart."""
    kept = taken[:1]
    for at in taken[1:-1]:
        if at - kept[-1] >= apart:
            kept.append(at)
    return [*kept, taken[-1]]
