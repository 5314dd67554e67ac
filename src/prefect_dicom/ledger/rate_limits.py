"""What all living runs of a ledger may ask of a node together: places, and what they spend.

A *place* is leave to have one association open. It belongs to a run, and dies with it: no clock
decides that. Who finds none free waits in a queue, in which runs of cohorts with a higher priority
come first.

What is spent is metered by levels: each grows by what a request brings, and falls at the rate that
is allowed. A request may begin while no level is above nothing; it is charged with what it is
expected to bring as it begins, and with the difference to what it brought at its end. So a request
is never slowed, and on average the rates hold. How busy a node's associations are is metered as it
happens: the level grows with each second of each request.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Connection, and_, delete, extract, func, insert, select, update

from prefect_dicom.ledger.claims import Claiming
from prefect_dicom.ledger.errors import without_database_errors
from prefect_dicom.ledger.records import Amounts, Run
from prefect_dicom.ledger.schema import cohorts, meters, places, runs

_LEAST_WAIT_SECONDS = 0.001
"""Nobody waits for less; it is charged to the next request."""
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Level:
    """A node's meters at a moment."""

    at: float
    amounts: Amounts


class Sharing(Claiming):
    """The verbs by which runs share the nodes."""

    # --- places

    @without_database_errors
    def take_place(self, run: Run, node: str, most: int, waiting: int | None) -> tuple[int, bool]:
        """Take a place at a node, or one in its queue.

        Parameters
        ----------
        most : int
            How many places there are now.
        waiting : int, optional
            The number that an earlier call gave for the queue.

        Returns
        -------
        tuple of int and bool
            The number, and whether it is a place; if not it is one in the queue.
        """
        with self._write() as connection:
            self._lock_node(connection, node)
            self._forget_dead(connection, node)
            if waiting is None:
                waiting = self._queue(connection, run, node)
            taken, queue = self._places(connection, node)
            if waiting in taken:
                return waiting, True
            if waiting not in queue:
                # Held to be dead meanwhile: its lock was gone for a moment.
                waiting = self._queue(connection, run, node)
                taken, queue = self._places(connection, node)
            if len(taken) + queue.index(waiting) >= most:
                return waiting, False
            connection.execute(update(places).where(places.c.number == waiting).values(taken=True))
            return waiting, True

    @without_database_errors
    def leave_place(self, number: int) -> None:
        """Give up a place, or one in the queue; one that is gone is passed over."""
        with self._write() as connection:
            connection.execute(delete(places).where(places.c.number == number))

    @without_database_errors
    def keeps_place(self, number: int, run: Run, node: str, most: int) -> tuple[bool, bool]:
        """Whether a place is among so many that there are, and whether other runs wait for one."""
        with self._read() as connection:
            rows = connection.execute(
                select(places.c.number, places.c.run, places.c.taken).where(places.c.node == node)
            ).all()
        before = sum(row.taken and row.number < number for row in rows)
        there = any(row.number == number for row in rows)
        others = any(not row.taken and row.run != run.number for row in rows)
        return there and before < most, others

    def _queue(self, connection: Connection, run: Run, node: str) -> int:
        return connection.execute(
            insert(places)
            .values(node=node, run=run.number, taken=False, busy=False)
            .returning(places.c.number)
        ).scalar_one()

    def _places(self, connection: Connection, node: str) -> tuple[list[int], list[int]]:
        """The places that are taken, and the queue in its order."""
        rows = connection.execute(
            select(places.c.number, places.c.taken)
            .join_from(places, runs, places.c.run == runs.c.number)
            .join(cohorts, runs.c.cohort == cohorts.c.number, isouter=True)
            .where(places.c.node == node)
            .order_by(func.coalesce(cohorts.c.priority, 0).desc(), places.c.number)
        ).all()
        taken = [row.number for row in rows if row.taken]
        return taken, [row.number for row in rows if not row.taken]

    def _forget_dead(self, connection: Connection, node: str) -> None:
        """Free the places of runs that are dead."""
        holders = set(
            connection.execute(
                select(places.c.run).where(places.c.node == node).distinct()
            ).scalars()
        )
        if dead := holders - self._living(connection, holders):
            connection.execute(
                delete(places).where(and_(places.c.node == node, places.c.run.in_(dead)))
            )

    # --- what is spent

    @without_database_errors
    def begin_request(
        self,
        node: str,
        place: int,
        rates: Amounts,
        expected: Amounts,
        now: float | None = None,
    ) -> float:
        """Begin a request, if what was spent before allows it.

        Parameters
        ----------
        place : int
            Over whose association it goes.
        rates : Amounts
            What is allowed in a second; None where it is not bounded.
        expected : Amounts
            What the request is expected to bring.
        now : float, optional
            Seconds of a clock that all runs on the ledger share; by default the database server's,
            or this machine's, where the ledger is a file.

        Returns
        -------
        float
            0 where it has begun; otherwise the seconds after which it is worth asking again.
        """
        with self._write() as connection:
            self._lock_node(connection, node)
            level, busy = self._level(connection, node, rates, now)
            wait = max(_seconds_until_paid(level.amounts, rates, busy, expected), default=0.0)
            if wait > _LEAST_WAIT_SECONDS:
                return wait
            self._write_level(connection, node, level.at, level.amounts + expected)
            connection.execute(update(places).where(places.c.number == place).values(busy=True))
            return 0.0

    @without_database_errors
    def end_request(
        self,
        node: str,
        place: int,
        rates: Amounts,
        expected: Amounts,
        brought: Amounts,
        now: float | None = None,
    ) -> None:
        """A request has ended: charge what it brought in place of what was expected."""
        with self._write() as connection:
            self._lock_node(connection, node)
            level, _ = self._level(connection, node, rates, now)
            self._write_level(connection, node, level.at, level.amounts + (brought - expected))
            connection.execute(update(places).where(places.c.number == place).values(busy=False))

    def _lock_node(self, connection: Connection, node: str) -> None:
        """Keep others from the node's rows until the transaction ends."""
        if connection.dialect.name == "sqlite":
            return
        connection.execute(self._insert(meters).values(node=node, at=0).on_conflict_do_nothing())
        connection.execute(select(meters.c.node).where(meters.c.node == node).with_for_update())

    def _level(
        self, connection: Connection, node: str, rates: Amounts, now: float | None
    ) -> tuple[_Level, int]:
        """The meters as they stand now, and how many requests are under way."""
        if now is None:
            now = _now(connection)
        # First: what a run was busy with when it died has ended.
        self._forget_dead(connection, node)
        busy = connection.scalar(
            select(func.count()).where(and_(places.c.node == node, places.c.busy))
        )
        row = connection.execute(select(meters).where(meters.c.node == node)).first()
        if row is None:
            return _Level(now, Amounts()), busy
        # A clock that was put back takes nothing off, and nothing is owed for what it skipped.
        seconds = max(0.0, now - row.at)
        held = Amounts(row.retrieves, row.objects, row.size_bytes, row.busy_seconds)
        return _Level(now, held.after(seconds, rates, busy)), busy

    def _write_level(self, connection: Connection, node: str, at: float, held: Amounts) -> None:
        values = {
            "at": at,
            "retrieves": held.retrieves,
            "objects": held.objects,
            "size_bytes": held.size_bytes,
            "busy_seconds": held.busy_seconds,
        }
        connection.execute(
            self._insert(meters)
            .values(node=node, **values)
            .on_conflict_do_update(index_elements=[meters.c.node], set_=values)
        )


def _now(connection: Connection) -> float:
    """The time that all who use the ledger share."""
    if connection.dialect.name == "sqlite":
        return time.time()
    return float(connection.scalar(select(extract("epoch", func.clock_timestamp()))))


def _seconds_until_paid(held: Amounts, rates: Amounts, busy: int, expected: Amounts) -> list[float]:
    """By meter, how long it takes at least until it is down at nothing.

    A query waits for no meter of retrieves.
    """
    waits = []
    for name in Amounts.METERS if expected.retrieves else ("busy_seconds",):
        level, rate = getattr(held, name), getattr(rates, name)
        if rate is not None and level > 0:
            waits.append(level / rate)
    if rates.busy_seconds is not None and held.busy_seconds > 0 and busy >= rates.busy_seconds:
        # It does not fall before one of the requests has ended.
        waits.append(_LOOK_SECONDS)
    return waits
