"""Statements that are compiled once a process, not once for each ledger that a test opens.

SQLAlchemy keeps a compiled statement under its text and the dialect object of the engine, and the
product opens one engine a process. Tests open thousands: a quarter of their time was compiling
the same statements again.
"""

from __future__ import annotations

from functools import partial

from sqlalchemy import create_engine
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.util import LRUCache

from prefect_dicom.ledger import database

STATEMENTS = 5_000


def share_compiled_statements() -> None:
    """Give all ledgers of SQLite one cache, in which their dialects count as equal."""
    SQLiteDialect_pysqlite.__eq__ = lambda self, other: type(self) is type(other)
    SQLiteDialect_pysqlite.__hash__ = lambda self: hash(type(self))
    options = {"compiled_cache": LRUCache(STATEMENTS)}
    database.create_engine = partial(create_engine, execution_options=options)
