"""Folder, state, start and stop of a site's own Prefect server, without importing Prefect.

One folder holds everything::

    prefect-server/
        server.json      port and phase; written by the supervisor
        supervisor.lock  held while the supervisor lives
        home/            PREFECT_HOME: the database and the leases
        logs/            of the supervisor, the server, the worker and the provisioning
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from prefect_dicom.config.site import Site
from prefect_dicom.core.errors import ConfigurationError
from prefect_dicom.core.files import atomic_write, file_lock, is_locked, lock_file
from prefect_dicom.server.settings import LOOPBACK, MARK, settings_of
from prefect_dicom.server.work import Work, format_stranded, work_of

_FOLDER = "prefect-server"
_USUAL_PORT = 4200
_STARTS_SECONDS = 600
_ENDS_SECONDS = 120
_LOOK_SECONDS = 0.1
_FLOW_RUN = b"PREFECT__FLOW_RUN_ID"
_RECEIVER = b"prefect_dicom.network.storage_scp"

STARTING, UP, DOWN, FAILED = "starting", "up", "down", "failed"


@dataclass(frozen=True)
class ServerStatus:
    """The state that the supervisor last wrote.

    Attributes
    ----------
    phase : str
        ``starting``, ``up``, ``down`` (stopped by ``prefect-dicom down``) or ``failed``.
    port : int
        Port on loopback.
    site : str
        Site file whose flows are deployed.
    pid : int
        Process id of the supervisor.
    why : str
        Cause of a failure; empty in other phases.
    log : str
        Path of the log with the details of a failure.
    """

    phase: str
    port: int
    site: str
    pid: int
    why: str = ""
    log: str = ""


@dataclass(frozen=True)
class LocalServer:
    """The Prefect server that ``prefect-dicom up`` runs for a site.

    Parameters
    ----------
    folder : Path
        Folder of the server: state, database and logs.
    """

    folder: Path

    @classmethod
    def of(cls, site: Site) -> LocalServer:
        """Return the server of a site: beside its ledger, or beside its spool with PostgreSQL."""
        beside = site.ledger.path or site.spool.path
        return cls(beside.parent.absolute() / _FOLDER)

    @property
    def logs(self) -> Path:
        """Folder of the logs, one file per process."""
        return self.folder / "logs"

    # --- state

    def status(self) -> ServerStatus | None:
        """Return the state that the supervisor last wrote, or None if there is none."""
        try:
            return ServerStatus(**json.loads(self._status_path.read_text()))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return None
        except (ValueError, TypeError):
            # Written by another version of this package.
            return None

    def write_status(self, status: ServerStatus) -> None:
        """Replace the state file atomically."""
        with atomic_write(self._status_path) as draft:
            draft.write_text(json.dumps(asdict(status)))

    def is_supervised(self) -> bool:
        """Whether the supervisor process is alive: it holds the lock."""
        try:
            return is_locked(self._lock_path)
        except OSError:
            return False

    @property
    def url(self) -> str | None:
        """URL of the Prefect API while the server is up, else None."""
        status = self.status()
        if status is None or status.phase != UP or not self.is_supervised():
            return None
        return f"http://{LOOPBACK}:{status.port}/api"

    def work(self) -> Work | None:
        """Count the flow runs on the server; None if it does not answer."""
        url = self.url
        return None if url is None else work_of(url, self._flow_runs())

    def describe(self) -> str:
        """Return the state in a line or two for people; empty if there never was a server."""
        status = self.status()
        if status is None:
            return ""
        address = f"http://{LOOPBACK}:{status.port}"
        if not self.is_supervised():
            why = "has ended unexpectedly" if status.phase in (UP, STARTING) else "is down"
            if status.phase == FAILED:
                why = f"has failed ({status.why}; see {status.log})"
            return f"Prefect's server {why}: `prefect-dicom up` starts it."
        if status.phase != UP:
            return f"Prefect's server is being started: {address}"
        if (work := self.work()) is None:
            return f"Prefect's server does not answer: {address}; see {self.logs}"
        parts = [f"{work.running} runs under way"]
        if work.waiting:
            parts.append(f"{work.waiting} waiting")
        if work.next_at is not None:
            parts.append(f"the next one is due {work.next_at:%Y-%m-%d %H:%M}")
        line = f"Prefect's server is up: {address} (API {self.url}); {', '.join(parts)}."
        more = format_stranded(work.stranded, f"{address}/api")
        return f"{line}\n{more}" if more else line

    # --- starting and stopping

    def up(self, site: Path, port: int | None = None) -> str:
        """Start the server unless it runs, and wait until it is up.

        Parameters
        ----------
        site : Path
            Site file whose flows are deployed.
        port : int, optional
            Port on loopback; by default the previous port, 4200 or any free one.

        Returns
        -------
        str
            URL of the Prefect API.

        Raises
        ------
        ConfigurationError
            The server cannot be started; names the cause and the log with the details.
        """
        status = self.status()
        if self.is_supervised() and status is not None:
            self._require_same(status, site, port)
            if status.phase == UP:
                self._provision_again(status)
                return self._wait_until_up()
        else:
            self._start(site, port)
        return self._wait_until_up()

    def down(self) -> bool:
        """Stop the server and all its processes.

        Runs get SIGTERM, as by Ctrl-C, and time to end in order.

        Returns
        -------
        bool
            Whether there was anything to stop.
        """
        status = self.status()
        supervised = self.is_supervised()
        if supervised and status is not None and status.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(status.pid, signal.SIGTERM)
            _until(lambda: not self.is_supervised(), _ENDS_SECONDS)
        leftovers = self._leftovers()
        self._end(leftovers)
        return supervised or bool(leftovers)

    def _require_same(self, status: ServerStatus, site: Path, port: int | None) -> None:
        faults = []
        if status.site != str(site.absolute()):
            faults.append(f"it runs for {status.site}; `prefect-dicom down` with that one first")
        if port not in (None, status.port):
            faults.append(f"--port: it runs on {status.port}; `prefect-dicom down` first")
        if faults:
            raise ConfigurationError("prefect-dicom up", faults)

    def _provision_again(self, status: ServerStatus) -> None:
        """Provision again: the nodes of the site file may have changed."""
        environment = settings_of(self.folder, status.port, os.environ)
        log = self.logs / "provision.log"
        if code := start_provisioning(status.site, environment, log).wait():
            raise self._failure(f"provisioning the server ended with {code}", log)

    def _free_port(self, status: ServerStatus | None, port: int | None) -> int:
        wanted = port or (status.port if status else None)
        if wanted is not None:
            if _is_free(wanted):
                return wanted
            fault = f"--port: {wanted} is taken by another program; "
            fault += (
                "choose another, or leave it out"
                if port
                else "this server had it before: free it, or choose another"
            )
            raise ConfigurationError("prefect-dicom up", [fault])
        return _USUAL_PORT if _is_free(_USUAL_PORT) else _is_free(0)

    def _start(self, site: Path, port: int | None) -> None:
        try:
            for folder in (self.folder, self.folder / "home", self.logs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            log = (self.logs / "supervisor.log").open("ab")
        except OSError as error:
            fault = f"cannot be written ({error.strerror}); let this user write there"
            raise ConfigurationError(str(self.folder), [fault]) from None
        with log, self._alone():
            if self.is_supervised():
                # Another process was faster.
                return
            self._end(self._leftovers())
            port = self._free_port(self.status(), port)
            self.write_status(ServerStatus(STARTING, port, str(site.absolute()), 0))
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "prefect_dicom.server"]
                + [str(self.folder), str(site.absolute()), str(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=settings_of(self.folder, port, os.environ),
                cwd=self.folder,
                # It outlives the terminal.
                start_new_session=True,
            )
            _until(lambda: self.is_supervised() or supervisor.poll() is not None, _STARTS_SECONDS)
            # Not waited for from now on; without this Python warns about a child left behind.
            supervisor.returncode = 0

    def _wait_until_up(self) -> str:
        def settled() -> bool:
            status = self.status()
            return not self.is_supervised() or status is not None and status.phase == UP

        _until(settled, _STARTS_SECONDS)
        if (url := self.url) is not None:
            return url
        status = self.status()
        if status is not None and status.phase == FAILED:
            raise self._failure(status.why, Path(status.log))
        raise self._failure("it did not come up", self.logs / "supervisor.log")

    def _failure(self, why: str, log: Path) -> ConfigurationError:
        return ConfigurationError("Prefect's server", [f"{why}; see {log}"])

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the start lock: one process at a time starts the server."""
        with file_lock(self.folder / "start.lock"):
            yield

    @property
    def _status_path(self) -> Path:
        return self.folder / "server.json"

    @property
    def _lock_path(self) -> Path:
        return self.folder / "supervisor.lock"

    @contextlib.contextmanager
    def supervisor_lock(self) -> Iterator[bool]:
        """Try to hold the supervisor's lock; yields whether this process holds it."""
        try:
            descriptor = lock_file(self._lock_path, wait=False)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            os.close(descriptor)

    # --- the processes

    def runs(self) -> list[int]:
        """Return the process ids of flow runs that the worker started."""
        return [pid for pid in self._leftovers() if _FLOW_RUN in _environ(pid)]

    def _flow_runs(self) -> set[str]:
        """Ids of the flow runs that have a process."""
        names = (_environ(pid).split(b"\0") for pid in self._leftovers())
        return {
            str(uuid.UUID(value.decode()))
            for name, _, value in (entry.partition(b"=") for entries in names for entry in entries)
            if name == _FLOW_RUN
        }

    def _leftovers(self) -> list[int]:
        """Find all living processes of this server by the mark in their environment.

        A receiver is excluded, though a run may have started it: it serves all runs of the site
        and exits by itself after the last one.
        """
        mark = f"{MARK}={self.folder}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            pid = int(entry.name)
            if pid == os.getpid() or mark not in _environ(pid).split(b"\0"):
                continue
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if _RECEIVER not in words:
                    found.append(pid)
        return found

    def _end(self, pids: list[int]) -> None:
        """Terminate processes that no supervisor owns any more."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if _until(lambda: not self._leftovers(), 30):
                return


def start_provisioning(
    site: str, environment: dict[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a process that provisions the server for a site."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "prefect_dicom.server.provision", site],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            cwd=log.parent,
        )


def _environ(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def _is_free(port: int) -> int:
    """Return the port if it is free (0: any free port), else 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return 0
        bound: int = probe.getsockname()[1]
        return bound


def _until(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True
