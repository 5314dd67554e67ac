"""The database of a ledger: opening it by URL, its transactions, and the fencing of claims.

SQLite is one file of this host in WAL mode with ``synchronous=FULL``: a committed transaction
survives the loss of power. PostgreSQL is durable by its own default.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Row,
    Select,
    Table,
    create_engine,
    event,
    make_url,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError

from prefect_dicom.core.errors import ClaimLost, LedgerError
from prefect_dicom.core.model import StudyReference
from prefect_dicom.ledger import statements
from prefect_dicom.ledger.errors import (
    NETWORK,
    translate_database_errors,
    translate_file_errors,
)
from prefect_dicom.ledger.records import Claim
from prefect_dicom.ledger.run_locks import FileLocks, RunLocks, SessionLocks
from prefect_dicom.ledger.schema import migrate, runs, studies

T = TypeVar("T")
Insert = sqlite.Insert | postgresql.Insert

LIST_SIZE = 500
"""Values in one list of a statement (three parameters each at most; SQLite takes 32,766)."""

_BUSY_SECONDS = 90
"""Time to wait for a lock of another program."""
_IDLE_SECONDS, _PROBE_SECONDS, _PROBES = 15, 5, 4
_SILENT_SECONDS = _IDLE_SECONDS + _PROBE_SECONDS * _PROBES
"""Time without a sign of life from the other host after which connections are closed, by the
server and by us: a vanished host keeps no claims, and a vanished server keeps no run."""


class Database:
    """An open database: transactions, run locks and the fencing of claims, for all parts.

    Parameters
    ----------
    engine : Engine
        As :func:`open_database` makes it.
    locks : RunLocks
        The locks of the runs on this ledger.
    """

    def __init__(self, engine: Engine, locks: RunLocks) -> None:
        self.engine = engine
        self.locks = locks
        self.is_sqlite = engine.dialect.name == "sqlite"
        self._writing_engine = for_writing(engine)
        # SQLite has one writer: threads queue here, where waiting costs nothing, rather than in
        # its busy loop. PostgreSQL needs no such thing.
        self._writer: AbstractContextManager[object] = (
            threading.Lock() if self.is_sqlite else nullcontext()
        )

    def close(self) -> None:
        """Close all connections; runs that are still open end with them on PostgreSQL."""
        self.engine.dispose()

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Open a transaction that writes."""
        with self._writer, self._writing_engine.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that only reads."""
        with self.engine.begin() as connection:
            yield connection

    def insert(self, table: Table) -> Insert:
        """Return the dialect's own INSERT, which has ON CONFLICT."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)

    def living_runs(self, connection: Connection, numbers: Collection[int]) -> set[int]:
        """Return those of the runs whose locks are held."""
        held = set()
        for piece in slices(numbers):
            for number, lock, ended_at in connection.execute(
                select(runs.c.number, runs.c.lock, runs.c.ended_at).where(runs.c.number.in_(piece))
            ).all():
                if ended_at is None and self.locks.is_held(connection, lock):
                    held.add(number)
        return held

    def lock_studies(
        self, connection: Connection, condition: ColumnElement[bool], *columns: Any
    ) -> Sequence[Row[Any]]:
        """Read studies and keep others from changing them until the transaction ends.

        On SQLite the transaction has the whole database to itself already.
        """
        return connection.execute(
            select(studies.c.reference, *columns)
            .where(condition)
            .order_by(studies.c.reference)
            .with_for_update(key_share=True)
        ).all()

    def require_claims(self, connection: Connection, claims: Collection[Claim]) -> None:
        """Check that the claims stand, and keep them so until the transaction ends.

        Raises
        ------
        ClaimLost
            Another run has taken at least one of the studies.
        """
        lost = len(claims) - len(standing_claims(connection, statements.HOLD_CLAIMS, claims))
        if lost:
            raise ClaimLost(detail=f"{lost} of {len(claims)} claims" if len(claims) > 1 else "")


def standing_claims(
    connection: Connection, query: Select[Any], claims: Iterable[Claim]
) -> list[Claim]:
    """Return the claims whose run and attempt are those of their studies, by reference."""
    ordered = sorted(claims, key=lambda claim: claim.reference)
    tokens: dict[StudyReference, tuple[int | None, int]] = {}
    for piece in slices(claim.reference for claim in ordered):
        for row in connection.execute(query, {"b_studies": piece}):
            tokens[row.reference] = (row.run, row.attempt)
    return [c for c in ordered if tokens.get(c.reference) == (c.run, c.attempt)]


def slices(values: Iterable[T], size: int = LIST_SIZE) -> Iterator[list[T]]:
    """Yield the values in lists of at most ``size``."""
    remaining = iter(values)
    while piece := list(islice(remaining, size)):
        yield piece


def utc_now() -> datetime:
    """Return the current time, as it is written down."""
    return datetime.now(UTC)


@translate_database_errors
@translate_file_errors
def open_database(url: str) -> tuple[Engine, RunLocks]:
    """Return the engine and the run locks of the ledger at ``url``; create or migrate it.

    Raises
    ------
    LedgerError
        Without any part of the URL: it may hold a password.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    if parsed is None:
        raise LedgerError("ledger-unavailable", "the ledger's URL cannot be read")
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed)
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        return _open_postgresql(parsed.set(drivername="postgresql+psycopg"))
    raise LedgerError("ledger-unavailable", "the URL names neither SQLite nor PostgreSQL")


def _open_sqlite(url: URL) -> tuple[Engine, RunLocks]:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise LedgerError("ledger-unavailable", "a SQLite ledger is a file: sqlite:///path")
    # All names of one file lead to the same locks.
    path = Path(os.path.realpath(url.database))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    locks = FileLocks(path.with_name(path.name + ".runs"))
    with locks.migrating():
        _make_private(path)
        engine = _sqlite_engine(url.set(database=str(path)))
        with closing(engine.raw_connection()) as connection:
            (mode,) = connection.cursor().execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise LedgerError("ledger-unavailable", f"SQLite cannot use WAL there: {NETWORK}")
        with for_writing(engine).begin() as connection:
            migrate(connection)
    return engine, locks


def for_writing(engine: Engine) -> Engine:
    """Return the engine for transactions that write."""
    return engine.execution_options(writing=True)


def _make_private(path: Path) -> None:
    """Create the file with mode 0600, which SQLite gives to its WAL too; refuse a wider one."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        # Only where there is none: closing a second descriptor of a file that SQLite has open
        # in this process would drop SQLite's own locks on it.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        return
    if mode & 0o077:
        raise LedgerError("ledger-unsafe", f"its file has mode {mode:04o}")


def _sqlite_engine(url: URL) -> Engine:
    engine = create_engine(
        url,
        hide_parameters=True,
        connect_args={"timeout": _BUSY_SECONDS, "check_same_thread": False},
        pool_size=5,
        max_overflow=-1,
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        # Transactions begin where _begin says so, not where the driver thinks fit.
        connection.isolation_level = None
        for setting in (
            "synchronous = FULL",
            "foreign_keys = ON",
            # Nothing of a patient in a temporary file somewhere else.
            "temp_store = MEMORY",
        ):
            connection.execute(f"PRAGMA {setting}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that will write takes the lock first: one that has read and then wants
        # to write cannot wait for another writer, it fails.
        writing = connection.get_execution_options().get("writing")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def _open_postgresql(url: URL) -> tuple[Engine, RunLocks]:
    try:
        engine = create_engine(
            url,
            hide_parameters=True,
            # Each write locks the studies it is about; it needs no more than this, and a site's
            # own default of a higher level would only make it fail.
            isolation_level="READ COMMITTED",
            pool_pre_ping=True,
            pool_size=5,
            max_overflow=-1,
            connect_args={
                "connect_timeout": 10,
                "application_name": "prefect-dicom",
                "keepalives_idle": _IDLE_SECONDS,
                "keepalives_interval": _PROBE_SECONDS,
                "keepalives_count": _PROBES,
                # Keepalives are for silence: what was sent and is not confirmed has its own time.
                "tcp_user_timeout": _SILENT_SECONDS * 1000,
            },
        )
    except ImportError:
        engine = None
    if engine is None:
        raise LedgerError(
            "ledger-unavailable", "PostgreSQL needs its driver: install prefect-dicom[postgres]"
        )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET lock_timeout = '{_BUSY_SECONDS}s'")
            # The same from the server's side, for every session: also one that has locked rows.
            cursor.execute(f"SET tcp_keepalives_idle = {_IDLE_SECONDS}")
            cursor.execute(f"SET tcp_keepalives_interval = {_PROBE_SECONDS}")
            cursor.execute(f"SET tcp_keepalives_count = {_PROBES}")
            cursor.execute(f"SET tcp_user_timeout = {_SILENT_SECONDS * 1000}")
        connection.commit()

    locks = SessionLocks(engine)
    with engine.begin() as connection:
        # A migration takes as long as it takes.
        connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
        locks.lock_migrations(connection)
        migrate(connection)
    return engine, locks
