"""Runs: each is alive while its lock is held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sqlalchemy import and_, delete, insert, select, update

from prefect_dicom.core.errors import LedgerError
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.ledger.database import Database, utc_now
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.records import LivingRun, Run
from prefect_dicom.ledger.schema import deliveries, runs, slots, studies


class Runs:
    """Runs that are under way, and how they ended."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @contextmanager
    def begin(self, kind: str, cohort: int | None = None) -> Iterator[Run]:
        """Begin a run that is alive until the block or the process ends, however it ends.

        Its claims are released at the end of the block. A run that was killed leaves its claims
        behind; :meth:`~prefect_dicom.ledger.claims.Claims.acquire` gives them to the next one.

        Parameters
        ----------
        kind : str
            Name of the kind of work ("pull", "rerun", …), for people.
        cohort : int, optional
            The cohort it works on; the state that is requested of the cohort's runs is its own.
        """
        with self._database.locks.hold() as lock:
            run = Run(self._begin(kind, lock, cohort), kind)
            try:
                yield run
            except BaseException:
                # The error of the block matters more than a database that is gone too.
                with suppress(LedgerError):
                    self._end(run)
                raise
            self._end(run)

    @translate_database_errors
    def _begin(self, kind: str, lock: int, cohort: int | None) -> int:
        with self._database.write() as connection:
            number: int = connection.execute(
                insert(runs)
                .values(lock=lock, kind=kind, started_at=utc_now(), cohort=cohort)
                .returning(runs.c.number)
            ).scalar_one()
        return number

    @translate_database_errors
    def _end(self, run: Run) -> None:
        with self._database.write() as connection:
            self._database.lock_studies(connection, studies.c.run == run.number)
            connection.execute(update(studies).where(studies.c.run == run.number).values(run=None))
            connection.execute(
                update(deliveries).where(deliveries.c.run == run.number).values(run=None)
            )
            connection.execute(delete(slots).where(slots.c.run == run.number))
            connection.execute(
                update(runs).where(runs.c.number == run.number).values(ended_at=utc_now())
            )

    @translate_database_errors
    def record_waits(self, run: Run, words: str) -> None:
        """Record what a run waits for, in words; empty where it waits for nothing."""
        with self._database.write() as connection:
            connection.execute(
                update(runs).where(runs.c.number == run.number).values(waits=words or None)
            )

    @translate_database_errors
    def record_reason(self, run: Run, code: str) -> None:
        """Record the reason that a run ended early.

        Parameters
        ----------
        code : str
            A code of :mod:`prefect_dicom.core.reasons`.
        """
        reason_for(code)
        with self._database.write() as connection:
            connection.execute(update(runs).where(runs.c.number == run.number).values(reason=code))

    @translate_database_errors
    def last_reason(self, cohort: int) -> str | None:
        """Return the reason that the last run of a cohort ended early, or None."""
        with self._database.read() as connection:
            return connection.execute(
                select(runs.c.reason)
                .where(runs.c.cohort == cohort)
                .order_by(runs.c.number.desc())
                .limit(1)
            ).scalar()

    @translate_database_errors
    def under_way(self, cohort: int) -> list[LivingRun]:
        """Return the living runs of a cohort, in the order they began."""
        with self._database.read() as connection:
            unended = and_(runs.c.cohort == cohort, runs.c.ended_at.is_(None))
            rows = connection.execute(select(runs).where(unended).order_by(runs.c.number)).all()
            living = self._database.living_runs(connection, [row.number for row in rows])
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
