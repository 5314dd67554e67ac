"""Run locks: held while a run is alive. No clocks: nothing expires, nothing is renewed.

The operating system or the database server releases the lock when the process ends, however it
ends. To test whether a run is alive is to try a shared lock, so that any number of processes may
test at once, and none of them is taken for the run.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

from prefect_dicom.core.files import file_lock, lock_file, looked_at_lock
from prefect_dicom.ledger.errors import translate_database_errors, translate_file_errors

# The first of the two integers of PostgreSQL's advisory locks: it keeps ours apart from those of
# other programs in the same database. The second names the run, or is this for the migrations.
_NAMESPACE = 0x44434D4C
_MIGRATIONS = 0


class RunLocks(Protocol):
    """The locks of runs, as the ledger uses them."""

    def hold(self) -> AbstractContextManager[int]:
        """Hold a new lock; its number, random and never 0, is the value of the block."""

    def is_held(self, connection: Connection, number: int) -> bool:
        """Return whether any process holds the lock, this one too."""


class FileLocks:
    """``flock`` on one file per run, for a ledger that is itself a file of this host.

    Parameters
    ----------
    directory : Path
        Where the lock files lie; made with mode 0700.
    """

    @translate_file_errors
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, exist_ok=True)

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:08x}.lock"

    @contextmanager
    def hold(self) -> Iterator[int]:
        number, descriptor = self._take()
        try:
            yield number
        finally:
            # First the name, then the lock: no file of an ended run stays, and a process that
            # has it open still gets the lock and the right answer.
            with suppress(OSError):
                self._path(number).unlink(missing_ok=True)
            os.close(descriptor)

    @translate_file_errors
    def _take(self) -> tuple[int, int]:
        number = secrets.randbelow(2**31 - 1) + 1
        return number, lock_file(self._path(number), wait=True, new=True)

    @translate_file_errors
    def is_held(self, connection: Connection, number: int) -> bool:
        try:
            with looked_at_lock(self._path(number)) as held:
                if not held:
                    # Killed: its number is never drawn again for a row that exists, so its file
                    # may go.
                    with suppress(OSError):
                        self._path(number).unlink(missing_ok=True)
                return held
        except FileNotFoundError:
            return False

    @contextmanager
    def migrating(self) -> Iterator[None]:
        """Wait until no other process creates or migrates the ledger, and keep others out."""
        with file_lock(self._directory / "schema.lock"):
            yield


class SessionLocks:
    """PostgreSQL's advisory locks, each on a connection of its own.

    They belong to the session: the connection must reach the server directly or through a
    pooler in session mode.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @contextmanager
    def hold(self) -> Iterator[int]:
        number, connection = self._take()
        try:
            yield number
        finally:
            # Where the session has broken, the lock went with it.
            with suppress(SQLAlchemyError):
                connection.close()

    @translate_database_errors
    def _take(self) -> tuple[int, Connection]:
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            # Out of the pool: closing it ends the session, and the lock with it.
            connection.detach()
            while True:
                number = secrets.randbelow(2**31 - 1) + 1
                if connection.scalar(
                    text("SELECT pg_try_advisory_lock(:namespace, :number)"),
                    {"namespace": _NAMESPACE, "number": number},
                ):
                    return number, connection
        except BaseException:
            connection.close()
            raise

    def is_held(self, connection: Connection, number: int) -> bool:
        shared = connection.scalar(
            text("SELECT pg_try_advisory_xact_lock_shared(:namespace, :number)"),
            {"namespace": _NAMESPACE, "number": number},
        )
        return not shared

    def lock_migrations(self, connection: Connection) -> None:
        """Wait for other migrations, and lock them out until the transaction ends."""
        connection.execute(
            text("SELECT pg_advisory_xact_lock(:namespace, :number)"),
            {"namespace": _NAMESPACE, "number": _MIGRATIONS},
        )
