"""A throw-away PostgreSQL server for the tests, of the binaries that are installed.

It listens on a Unix socket in its own directory only, is owned by nobody else, and ends with
the process that started it. ``PREFECT_DICOM_POSTGRES_BIN`` names the directory of the binaries
where they are in no usual place.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

_USER = "postgres"
_START_SECONDS = 60
_databases = itertools.count(1)


def binaries() -> Path | None:
    """The directory with initdb and postgres, or None."""
    named = os.environ.get("PREFECT_DICOM_POSTGRES_BIN")
    found = shutil.which("initdb")
    candidates = [
        *([Path(named)] if named else []),
        *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True),
        *([Path(found).resolve().parent] if found else []),
    ]
    for directory in candidates:
        if (directory / "initdb").exists() and (directory / "postgres").exists():
            return directory
    return None


@dataclass
class Cluster:
    """A running server; ``directory`` holds its data and its socket."""

    directory: Path
    command: list[str]
    owner: dict[str, object]

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        self.process = subprocess.Popen(
            self.command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.directory,
            **self.owner,
        )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                return self.connect().close()
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise
                time.sleep(0.05)

    def restart(self) -> None:
        """As after a crash of it: sessions are cut, what was committed is there again."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(_START_SECONDS)
        self.start()

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://{_USER}@/{database}?host={self.directory}"

    def new_name(self) -> str:
        """Make an empty database; its name."""
        name = f"database_{next(_databases)}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return name

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        return psycopg.connect(
            host=str(self.directory), user=_USER, dbname=database, autocommit=True
        )

    def new_database(self) -> str:
        """Make an empty database; its URL."""
        return self.url(self.new_name())

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


@functools.cache
def cluster() -> Cluster:
    """The server of this test session, started when it is first asked for; skips without one."""
    return new_cluster()


def new_cluster(address: str = "", network: str = "") -> Cluster:
    """A server of the test's own; skips without the binaries.

    Parameters
    ----------
    address, network : str
        Where it listens to other hosts as well, and which may come (a CIDR).
    """
    directory = binaries()
    if directory is None:
        pytest.skip("needs PostgreSQL's server binaries (Debian: apt install postgresql)")
    home = Path(tempfile.mkdtemp(prefix="prefect-dicom-pg-"))
    # PostgreSQL refuses to run as root.
    owner: dict[str, object] = {}
    if os.geteuid() == 0:
        shutil.chown(home, _USER, _USER)
        owner = {"user": _USER, "group": _USER, "extra_groups": []}
    data = home / "data"
    subprocess.run(
        [
            directory / "initdb",
            f"--username={_USER}",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
            data,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=home,
        **owner,
    )
    if network:
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all {_USER} {network} trust\n")
    command = [
        str(directory / "postgres"),
        *("-D", str(data), "-k", str(home)),
        *("-c", f"listen_addresses={address}", "-c", "fsync=off", "-c", "log_min_messages=panic"),
        *("-c", "max_connections=120", "-c", "shared_buffers=32MB"),
    ]
    if shutil.which("setpriv"):
        # SIGINT (fast shutdown) also where this process is killed.
        command = ["setpriv", "--pdeathsig", "SIGINT", *command]
    started = Cluster(home, command, owner)
    atexit.register(started.stop)
    return started


def ledger_url(kind: str, directory: Path) -> str:
    """The URL of a new, empty ledger of either kind."""
    if kind == "sqlite":
        return f"sqlite:///{directory / 'ledger.db'}"
    return cluster().new_database()
