"""The database in Prefect's home: migrated as Prefect migrates it, from a copy where there is one.

A new database takes thousands of statements, which cost more than all else that a first run does.
Prefect makes one for this user, in the cache; every other new home gets a copy. A copy is of the
same version of Prefect, and has the schema of its last migration, without a row of anybody's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from importlib.metadata import version
from pathlib import Path

from prefect_dicom.core.files import atomic_write, file_lock
from prefect_dicom.server.home import DATABASE

LOCK = "embedded-server.lock"
"""Held in Prefect's home while its database is migrated."""


def template_path() -> Path:
    """Where this user's empty database of the installed version of Prefect lies."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return caches / "prefect-dicom" / f"prefect-{version('prefect')}.db"


def begin_with_template(home: Path) -> None:
    """Put a copy of the template where Prefect's database is missing, if there is a template.

    Whoever opens the database migrates it all the same.
    """
    with contextlib.suppress(OSError), file_lock(home / LOCK):
        template = template_path()
        if template.exists() and not (home / DATABASE).exists():
            with atomic_write(home / DATABASE, sync=True) as draft:
                shutil.copyfile(template, draft)


async def migrated(home: Path) -> None:
    """Create or migrate the database of Prefect's home, one process at a time."""
    begin_with_template(home)
    revision = revision_of(home / DATABASE)
    if revision is not None and revision == revision_of(template_path()):
        return
    from prefect.server.database import provide_database_interface

    is_new = not (home / DATABASE).exists()
    with file_lock(home / LOCK):
        await provide_database_interface().create_db()
        if is_new:
            keep_as_template(home)


def keep_as_template(home: Path) -> None:
    """Keep an empty database, which has just been migrated, for other homes of this user."""
    template = template_path()
    with contextlib.suppress(OSError, sqlite3.Error):
        template.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (
            atomic_write(template) as draft,
            contextlib.closing(sqlite3.connect(home / DATABASE)) as database,
            contextlib.closing(sqlite3.connect(draft)) as copy,
        ):
            if any(database.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone() for name in _OWN):
                raise sqlite3.DataError("somebody has written to it")
            database.backup(copy)


_OWN = ("flow", "block_document", "configuration", "variable")
"""Tables that are empty in a database which nobody has used."""


def revision_of(path: Path) -> str | None:
    """The last migration of a database; None where there is none."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        ) as database:
            row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error:
        return None
    return None if row is None else str(row[0])
