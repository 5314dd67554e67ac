"""What people want of a cohort's runs: to pause, to go on, to end, and in which order.

A pause is the cohort's, and lasts until somebody resumes it; a cancellation is for the runs that
are under way, and the next run goes on from what they leave. Both reach a run on any host that
shares the ledger: it looks here every second or so, by one row.
"""

from __future__ import annotations

from sqlalchemy import and_, select, update

from prefect_dicom.core.model import RequestedState
from prefect_dicom.ledger.claims import Claiming, utc_now
from prefect_dicom.ledger.errors import without_database_errors
from prefect_dicom.ledger.records import LivingRun, Run
from prefect_dicom.ledger.schema import cohorts, runs


class Wishing(Claiming):
    """The verbs by which people steer runs, and by which runs hear of it."""

    @without_database_errors
    def pause(self, cohort: int) -> None:
        """Let no run of a cohort ask for anything until :meth:`resume`."""
        with self._write() as connection:
            connection.execute(
                update(cohorts).where(cohorts.c.number == cohort).values(paused=True)
            )

    @without_database_errors
    def resume(self, cohort: int) -> None:
        """Let the runs of a cohort go on; one that is not paused stays as it is."""
        with self._write() as connection:
            connection.execute(
                update(cohorts).where(cohorts.c.number == cohort).values(paused=False)
            )

    @without_database_errors
    def cancel(self, cohort: int) -> list[int]:
        """Tell the runs of a cohort that are under way to end; returns their numbers."""
        with self._write() as connection:
            # Those that were killed are told as well: they do not hear it.
            unended = and_(runs.c.cohort == cohort, runs.c.ended_at.is_(None))
            told = connection.execute(
                update(runs).where(unended).values(cancelled=True).returning(runs.c.number)
            ).scalars()
            return sorted(self._living(connection, list(told)))

    @without_database_errors
    def prioritise(self, cohort: int, priority: int) -> None:
        """Where runs share a node, let those of cohorts with higher numbers come first."""
        with self._write() as connection:
            connection.execute(
                update(cohorts).where(cohorts.c.number == cohort).values(priority=priority)
            )

    @without_database_errors
    def requested_state(self, run: Run) -> RequestedState:
        """The state that people have requested of a run."""
        with self._read() as connection:
            row = connection.execute(
                select(runs.c.cancelled, cohorts.c.paused)
                .join_from(runs, cohorts, runs.c.cohort == cohorts.c.number, isouter=True)
                .where(runs.c.number == run.number)
            ).first()
        if row is None:
            return RequestedState.RUNNING
        return (
            RequestedState.CANCELLED
            if row.cancelled
            else RequestedState.PAUSED
            if row.paused
            else RequestedState.RUNNING
        )

    @without_database_errors
    def waits_in_place(self, run: Run, waits: bool) -> None:
        """A run asks for nothing any more because its cohort is paused, or goes on again."""
        with self._write() as connection:
            connection.execute(
                update(runs)
                .where(runs.c.number == run.number)
                .values(paused_at=utc_now() if waits else None)
            )

    @without_database_errors
    def record_waits(self, run: Run, words: str) -> None:
        """What a run waits for has changed; empty where it waits for nothing."""
        with self._write() as connection:
            connection.execute(
                update(runs).where(runs.c.number == run.number).values(waits=words or None)
            )

    @without_database_errors
    def runs_under_way(self, cohort: int) -> list[LivingRun]:
        """The living runs of a cohort, the first of them first."""
        with self._read() as connection:
            unended = and_(runs.c.cohort == cohort, runs.c.ended_at.is_(None))
            rows = connection.execute(select(runs).where(unended).order_by(runs.c.number)).all()
            living = self._living(connection, [row.number for row in rows])
        return [
            LivingRun(
                row.number,
                row.kind,
                row.started_at,
                row.cancelled,
                row.paused_at,
                row.waits or "",
            )
            for row in rows
            if row.number in living
        ]
