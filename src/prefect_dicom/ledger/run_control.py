"""Run control: the requested state of a cohort's runs, and their priority.

A pause is the cohort's, and lasts until somebody resumes it. A cancellation is for the runs that
are under way; the next run goes on from what they leave. Both reach a run on any host that
shares the ledger: it reads its requested state every second or so, by one row.
"""

from __future__ import annotations

from sqlalchemy import (
    and_,
    select,
    update,
)

from prefect_dicom.core.model import RequestedState
from prefect_dicom.ledger.database import Database, utc_now
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.records import (
    Run,
)
from prefect_dicom.ledger.schema import (
    cohorts,
    runs,
)


class RunControl:
    """Pause, resume, cancel and prioritise runs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def pause(self, cohort: int) -> None:
        """Let no run of a cohort ask for anything until :meth:`resume`."""
        with self._database.write() as connection:
            connection.execute(
                update(cohorts).where(cohorts.c.number == cohort).values(paused=True)
            )

    @translate_database_errors
    def resume(self, cohort: int) -> None:
        """Let the runs of a cohort go on; one that is not paused stays as it is."""
        with self._database.write() as connection:
            connection.execute(
                update(cohorts).where(cohorts.c.number == cohort).values(paused=False)
            )

    @translate_database_errors
    def cancel(self, cohort: int) -> list[int]:
        """Tell the runs of a cohort that are under way to end; returns their numbers."""
        with self._database.write() as connection:
            # Those that were killed are told as well: they do not hear it.
            unended = and_(runs.c.cohort == cohort, runs.c.ended_at.is_(None))
            told = connection.execute(
                update(runs).where(unended).values(cancelled=True).returning(runs.c.number)
            ).scalars()
            return sorted(self._database.living_runs(connection, list(told)))

    @translate_database_errors
    def prioritise(self, cohort: int, priority: int) -> None:
        """Where runs share a node, let those of cohorts with higher numbers come first."""
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
    def record_paused(self, run: Run, waits: bool) -> None:
        """A run asks for nothing any more because its cohort is paused, or goes on again."""
        with self._database.write() as connection:
            connection.execute(
                update(runs)
                .where(runs.c.number == run.number)
                .values(paused_at=utc_now() if waits else None)
            )
