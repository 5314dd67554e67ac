"""Error translation: database and file-system errors become LedgerError, without their texts."""

from __future__ import annotations

import errno
import functools
import re
import sqlite3
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from prefect_dicom.core.errors import LedgerError

P = ParamSpec("P")
T = TypeVar("T")


def _translate(*errors: type[Exception]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    def decorate(verb: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(verb)
        def translated(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return verb(*args, **kwargs)
            except errors as error:
                fault = _fault(error)
            # Outside of the handler: the original is not even the context of what is raised.
            raise fault

        return translated

    return decorate


# Names of SQLite's result codes, and SQLSTATEs or classes of them (PostgreSQL, appendix A).
_TRANSIENT = re.compile(
    r"SQLITE_(BUSY|LOCKED).*"
    # A connection that broke, a transaction that lost against others, too many clients, a lock
    # not had in time, a server that shuts down or starts.
    r"|08...|40...|53300|55P03|57014|57P0[1235]"
)
# What locks and shared memory end with where the file system does not have them (sqlite.org,
# "Result and Error Codes"): "locking protocol" is SQLITE_PROTOCOL.
_NO_LOCKS = re.compile(
    r"SQLITE_PROTOCOL|SQLITE_NOLFS|SQLITE_IOERR_(.*LOCK|SHM.*)|ENOLCK|ESTALE|ENOTSUP|EOPNOTSUPP"
)
NETWORK = "a network file system (NFS, SMB) does so; a SQLite ledger must lie on a local disk"
"""What is behind an error of locks, for the detail of an error."""
_DAMAGED = re.compile(r"SQLITE_(CORRUPT.*|NOTADB)|XX00[12]")


def _fault(error: Exception) -> LedgerError:
    if isinstance(error, OSError):
        word = errno.errorcode.get(error.errno or 0, type(error).__name__)
        return LedgerError("ledger-unavailable", f"its files: {word}{_why(word)}")
    origin = getattr(error, "orig", None) or error
    word = (
        getattr(origin, "sqlite_errorname", None)
        or getattr(origin, "sqlstate", None)
        or type(origin).__name__
    )
    code = "ledger-unavailable"
    if _TRANSIENT.fullmatch(word) or getattr(error, "connection_invalidated", False):
        # The transaction left nothing, or is known from its effects: all of it may be repeated.
        code = "ledger-busy"
    elif _DAMAGED.fullmatch(word):
        code = "ledger-damaged"
    return LedgerError(code, f"the database answered {word}{_why(word)}")


def _why(word: str) -> str:
    return f": {NETWORK}" if _NO_LOCKS.fullmatch(word) else ""


translate_database_errors = _translate(SQLAlchemyError, sqlite3.Error)
"""Decorator: raise a :class:`LedgerError` instead of an error of the database.

Statements and their parameters hold identifiers of patients, and so do messages of PostgreSQL:
only the error's name or SQLSTATE is kept.
"""

translate_file_errors = _translate(OSError)
"""Decorator: raise a :class:`LedgerError` instead of an OSError, with its errno and no path."""
