"""Run control: the requested state of a cohort's runs, and their priority.

A pause is the cohort's, and lasts until somebody resumes it. A cancellation is for the runs that
are under way; the next run goes on from what they leave. Both reach a run on any host that
shares the ledger: it reads its requested state every second or so, by one row.
"""

from __future__ import annotations

from sqlalchemy import and_, select, update

from prefect_dicom.core.model import RequestedState
from prefect_dicom.ledger.database import Database, utc_now
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.records import Run
from prefect_dicom.ledger.schema import cohorts, runs


class RunControl:
    """Pause, resume, cancel and prioritise runs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def pause(self, cohort: int) -> None:
        """Pause all runs of a cohort until :meth:`resume`."""
        with self._database.write() as connection:
            connection.execute(
                update(cohorts).where(cohorts.c.number == cohort).values(paused=True)
            )

    @translate_database_errors
    def resume(self, cohort: int) -> None:
        """Resume the runs of a cohort; no effect where it is not paused."""
        with self._database.write() as connection:
            connection.execute(
                update(cohorts).where(cohorts.c.number == cohort).values(paused=False)
            )

    @translate_database_errors
    def cancel(self, cohort: int) -> list[int]:
        """Cancel the runs of a cohort that are under way; return their numbers."""
        with self._database.write() as connection:
            # Also runs that were killed: it has no effect on them.
            unended = and_(runs.c.cohort == cohort, runs.c.ended_at.is_(None))
            cancelled = connection.execute(
                update(runs).where(unended).values(cancelled=True).returning(runs.c.number)
            ).scalars()
            return sorted(self._database.living_runs(connection, list(cancelled)))

    @translate_database_errors
    def prioritise(self, cohort: int, priority: int) -> None:
        """Set the priority of a cohort: runs of higher ones get a node's slots first."""
        with self._database.write() as connection:
            connection.execute(
                update(cohorts).where(cohorts.c.number == cohort).values(priority=priority)
            )

    @translate_database_errors
    def requested_state(self, run: Run) -> RequestedState:
        """Return the state that people have requested of a run."""
        with self._database.read() as connection:
            row = connection.execute(
                select(runs.c.cancelled, cohorts.c.paused)
                .join_from(runs, cohorts, runs.c.cohort == cohorts.c.number, isouter=True)
                .where(runs.c.number == run.number)
            ).first()
        if row is None:
            return RequestedState.RUNNING
        if row.cancelled:
            return RequestedState.CANCELLED
        return RequestedState.PAUSED if row.paused else RequestedState.RUNNING

    @translate_database_errors
    def record_paused(self, run: Run, paused: bool) -> None:
        """Record that a run has paused, as requested, or has resumed."""
        with self._database.write() as connection:
            connection.execute(
                update(runs)
                .where(runs.c.number == run.number)
                .values(paused_at=utc_now() if paused else None)
            )
