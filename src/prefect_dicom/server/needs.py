"""Whether a run needs a Prefect server, found out without importing Prefect.

Without a server a command begins seconds earlier. What Prefect shows of its run is then written to
a journal and taken into Prefect's database afterwards (``server/serverless.py``). That is right
where nobody has set up anything of Prefect that acts while the run is under way. In doubt, a
server is used.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefect_dicom.server.home import DATABASE, PROFILES

DEFAULTS: Mapping[str, str] = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
"""Settings of Prefect that every command has unless its user sets others."""
_OF_NO_ACCOUNT = {
    "PREFECT_HOME",
    PROFILES,
    "PREFECT_SERVER_ANALYTICS_ENABLED",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS",
}
"""Variables that say nothing about a server, or only how one is started."""
_OF_THIS_PACKAGE = "PREFECT_DICOM_"
_EPHEMERAL = "ephemeral"
"""Prefect's profile for no server at all."""
_OF_EPHEMERAL = {"PREFECT_SERVER_EPHEMERAL_ENABLED", "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"}
_WHAT_ACTS = {
    "concurrency limits": """
        SELECT 1 FROM concurrency_limit_v2
        WHERE active AND (name LIKE 'pacs-%' OR name = 'tag:dicom')""",
    "a concurrency limit by tag": "SELECT 1 FROM concurrency_limit WHERE tag = 'dicom'",
    "automations": "SELECT 1 FROM automation WHERE enabled",
}
"""What is in a database that acts on a run while it is under way, by what it is called."""


def why_a_server_is_needed(home: Path, environ: Mapping[str, str]) -> str:
    """Why a run is to have a Prefect server, for people; empty where it can do without one.

    Parameters
    ----------
    home : Path
        Prefect's home.
    environ : mapping
        Environment of this process.
    """
    reasons = (
        *_of_environment(environ),
        *_of_files(Path(environ.get(PROFILES) or home / "profiles.toml")),
        *_of_database(home / DATABASE),
    )
    return next(iter(reasons), "")


def _of_environment(environ: Mapping[str, str]) -> Iterator[str]:
    if "prefect" in sys.modules:
        # It has been imported for the site's block, and has its server already.
        yield "Prefect is in use"
    for name, value in environ.items():
        known = name in _OF_NO_ACCOUNT or name.startswith(_OF_THIS_PACKAGE)
        if (
            name.startswith("PREFECT_")
            and value
            and not known
            and value != DEFAULTS.get(name)
            and not (name == "PREFECT_PROFILE" and value == _EPHEMERAL)
        ):
            yield f"{name} is set"


def _of_files(profiles: Path) -> Iterator[str]:
    """Settings that Prefect reads of its home and of the current folder."""
    if Path("prefect.toml").exists():
        yield "there is a prefect.toml"
    with contextlib.suppress(OSError):
        if "prefect" in Path(".env").read_text(errors="replace").lower():
            yield ".env has settings of Prefect"
    if "prefect" in _toml(Path("pyproject.toml")).get("tool", {}):
        yield "pyproject.toml has settings of Prefect"
    document = _toml(profiles)
    active = os.environ.get("PREFECT_PROFILE") or document.get("active") or _EPHEMERAL
    settings = document.get("profiles", {}).get(active, {})
    if active != _EPHEMERAL or not {*settings} <= _OF_EPHEMERAL:
        yield f"Prefect's profile {active} has settings"


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        # Prefect says what is wrong with it.
        return {"active": "unreadable", "tool": {"prefect": {}}}


def _of_database(path: Path) -> Iterator[str]:
    if not path.exists():
        return
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=1)
        ) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            if not tables:
                # One that is only being made.
                return
            for what, query in _WHAT_ACTS.items():
                if database.execute(query).fetchone():
                    yield f"Prefect's database has {what}"
    except sqlite3.Error:
        yield "Prefect's database cannot be read"
