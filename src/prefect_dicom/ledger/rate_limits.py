"""Association slots and rate limits of a node, shared by all living runs on a ledger.

A *slot* is the right to have one association open. It belongs to a run, and dies with it: no clock
decides that. Whoever finds no slot free waits in a queue, in which runs of cohorts with a higher
priority come first.

The rate limits are leaky buckets with deferred payment: a request starts when every bucket is
empty, is charged its expected usage up front, and is corrected when it ends. So a request is never
slowed, and on average the rates hold. How busy a node's associations are is charged as it happens:
that bucket fills with each second of each request.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Connection, and_, delete, extract, func, insert, select, update

from prefect_dicom.ledger.database import Database
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.records import Run, Usage
from prefect_dicom.ledger.schema import cohorts, leaky_buckets, runs, slots

_LEAST_WAIT_SECONDS = 0.001
"""A shorter wait is not worth it; the rest is charged to the next request."""
_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Buckets:
    """The levels of a node's leaky buckets at a time."""

    at: float
    levels: Usage


class RateLimits:
    """Association slots and leaky buckets, per node."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def take_slot(self, run: Run, node: str, most: int, waiting: int | None) -> tuple[int, bool]:
        """Take an association slot of a node, or join its queue.

        Parameters
        ----------
        most : int
            How many slots the node has now.
        waiting : int, optional
            The number that an earlier call returned for the queue.

        Returns
        -------
        tuple of int and bool
            The number, and whether it is a slot; if not, it is a place in the queue.
        """
        with self._database.write() as connection:
            self._lock_node(connection, node)
            self._forget_dead(connection, node)
            if waiting is None:
                waiting = self._queue(connection, run, node)
            taken, queue = self._slots(connection, node)
            if waiting in taken:
                return waiting, True
            if waiting not in queue:
                # Taken for dead meanwhile: its run's lock was gone for a moment.
                waiting = self._queue(connection, run, node)
                taken, queue = self._slots(connection, node)
            if len(taken) + queue.index(waiting) >= most:
                return waiting, False
            connection.execute(update(slots).where(slots.c.number == waiting).values(taken=True))
            return waiting, True

    @translate_database_errors
    def release_slot(self, number: int) -> None:
        """Release a slot, or leave the queue; no effect where the number is gone."""
        with self._database.write() as connection:
            connection.execute(delete(slots).where(slots.c.number == number))

    @translate_database_errors
    def check_slot(self, number: int, run: Run, node: str, most: int) -> tuple[bool, bool]:
        """Return whether a slot is among the first ``most``, and whether other runs wait."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(slots.c.number, slots.c.run, slots.c.taken).where(slots.c.node == node)
            ).all()
        before = sum(row.taken and row.number < number for row in rows)
        there = any(row.number == number for row in rows)
        others = any(not row.taken and row.run != run.number for row in rows)
        return there and before < most, others

    def _queue(self, connection: Connection, run: Run, node: str) -> int:
        number: int = connection.execute(
            insert(slots)
            .values(node=node, run=run.number, taken=False, busy=False)
            .returning(slots.c.number)
        ).scalar_one()
        return number

    def _slots(self, connection: Connection, node: str) -> tuple[list[int], list[int]]:
        """Return the slots that are taken, and the queue in its order."""
        rows = connection.execute(
            select(slots.c.number, slots.c.taken)
            .join_from(slots, runs, slots.c.run == runs.c.number)
            .join(cohorts, runs.c.cohort == cohorts.c.number, isouter=True)
            .where(slots.c.node == node)
            .order_by(func.coalesce(cohorts.c.priority, 0).desc(), slots.c.number)
        ).all()
        taken = [row.number for row in rows if row.taken]
        return taken, [row.number for row in rows if not row.taken]

    def _forget_dead(self, connection: Connection, node: str) -> None:
        """Free the slots of runs that are dead."""
        holders = set(
            connection.execute(select(slots.c.run).where(slots.c.node == node).distinct()).scalars()
        )
        if dead := holders - self._database.living_runs(connection, holders):
            connection.execute(
                delete(slots).where(and_(slots.c.node == node, slots.c.run.in_(dead)))
            )

    @translate_database_errors
    def begin_request(
        self,
        node: str,
        slot: int,
        rates: Usage,
        expected: Usage,
        now: float | None = None,
    ) -> float:
        """Begin a request, if every bucket that limits it is empty, and charge its estimate.

        Parameters
        ----------
        slot : int
            The slot of the association that it uses.
        rates : Usage
            Allowed usage per second; None where it is not limited.
        expected : Usage
            Estimated usage of the request.
        now : float, optional
            Seconds of a clock that all runs on the ledger share; by default that of the database
            server, or of this machine where the ledger is a file.

        Returns
        -------
        float
            0 where it has begun; otherwise the seconds to wait before the next try.
        """
        with self._database.write() as connection:
            self._lock_node(connection, node)
            buckets, busy = self._buckets(connection, node, rates, now)
            wait = max(_seconds_until_paid(buckets.levels, rates, busy, expected), default=0.0)
            if wait > _LEAST_WAIT_SECONDS:
                return wait
            self._write_buckets(connection, node, buckets.at, buckets.levels + expected)
            connection.execute(update(slots).where(slots.c.number == slot).values(busy=True))
            return 0.0

    @translate_database_errors
    def end_request(
        self,
        node: str,
        slot: int,
        rates: Usage,
        expected: Usage,
        actual: Usage,
        now: float | None = None,
    ) -> None:
        """End a request: replace its estimate by its actual usage."""
        with self._database.write() as connection:
            self._lock_node(connection, node)
            buckets, _ = self._buckets(connection, node, rates, now)
            self._write_buckets(connection, node, buckets.at, buckets.levels + (actual - expected))
            connection.execute(update(slots).where(slots.c.number == slot).values(busy=False))

    def _lock_node(self, connection: Connection, node: str) -> None:
        """Keep others from the node's rows until the transaction ends."""
        if connection.dialect.name == "sqlite":
            return
        connection.execute(
            self._database.insert(leaky_buckets).values(node=node, at=0).on_conflict_do_nothing()
        )
        connection.execute(
            select(leaky_buckets.c.node).where(leaky_buckets.c.node == node).with_for_update()
        )

    def _buckets(
        self, connection: Connection, node: str, rates: Usage, now: float | None
    ) -> tuple[_Buckets, int]:
        """Return the levels of the buckets now, and how many requests are under way."""
        if now is None:
            now = _now(connection)
        # First: requests of dead runs have ended.
        self._forget_dead(connection, node)
        busy = connection.execute(
            select(func.count()).where(and_(slots.c.node == node, slots.c.busy))
        ).scalar_one()
        row = connection.execute(select(leaky_buckets).where(leaky_buckets.c.node == node)).first()
        if row is None:
            return _Buckets(now, Usage()), busy
        # A clock that was put back takes nothing off, and nothing is owed for what it skipped.
        seconds = max(0.0, now - row.at)
        held = Usage(row.retrieves, row.instances, row.size_bytes, row.busy_seconds)
        return _Buckets(now, held.after(seconds, rates, busy)), busy

    def _write_buckets(self, connection: Connection, node: str, at: float, held: Usage) -> None:
        values = {
            "at": at,
            "retrieves": held.retrieves,
            "instances": held.instances,
            "size_bytes": held.size_bytes,
            "busy_seconds": held.busy_seconds,
        }
        connection.execute(
            self._database.insert(leaky_buckets)
            .values(node=node, **values)
            .on_conflict_do_update(index_elements=[leaky_buckets.c.node], set_=values)
        )


def _now(connection: Connection) -> float:
    """Return the time of the clock that all runs on the ledger share, in seconds."""
    if connection.dialect.name == "sqlite":
        return time.time()
    return float(connection.execute(select(extract("epoch", func.clock_timestamp()))).scalar_one())


def _seconds_until_paid(held: Usage, rates: Usage, busy: int, expected: Usage) -> list[float]:
    """Return how long each bucket takes at least until it is empty.

    A query waits for none of the buckets of retrieves.
    """
    waits = []
    for name in Usage.BUCKETS if expected.retrieves else ("busy_seconds",):
        level, rate = getattr(held, name), getattr(rates, name)
        if rate is not None and level > 0:
            waits.append(level / rate)
    level, rate = held.busy_seconds, rates.busy_seconds
    if level is not None and rate is not None and level > 0 and busy >= rate:
        # The level does not fall before one of the requests has ended.
        waits.append(_POLL_SECONDS)
    return waits
