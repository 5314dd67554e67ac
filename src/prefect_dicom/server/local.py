"""Where a site's own Prefect server lies, whether it runs and what it has to do. No Prefect.

One folder holds everything of it::

    prefect-server/
        server.json     the port and how far it has come; written by the keeper
        keeper.lock     held while the keeper lives
        home/           PREFECT_HOME: the database and the leases
        logs/           of the keeper, the server, the worker, and of furnishing it
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from prefect_dicom.config.site import Site
from prefect_dicom.core.errors import ConfigurationError
from prefect_dicom.server.settings import LOOPBACK, MARK, settings_of

_FOLDER = "prefect-server"
_USUAL_PORT = 4200
_STARTS_SECONDS = 600
_ENDS_SECONDS = 120
_LOOK_SECONDS = 0.1
_ANSWERS_SECONDS = 2.0
_RECEIVER = b"prefect_dicom.network.storage_scp"

STARTING, UP, DOWN, FAILED = "starting", "up", "down", "failed"


@dataclass(frozen=True)
class Told:
    """What the keeper last wrote of itself.

    Attributes
    ----------
    phase : str
        ``starting``, ``up``, ``down`` (as told) or ``failed``.
    port : int
        On loopback.
    site : str
        The site file whose deployments it has.
    pid : int
        Of the keeper.
    why : str
        Where it failed: what, in words.
    log : str
        And the log that says more.
    """

    phase: str
    port: int
    site: str
    pid: int
    why: str = ""
    log: str = ""


@dataclass(frozen=True)
class Work:
    """What the server says of its flow runs."""

    running: int
    waiting: int
    """Due, and not begun."""
    next_at: datetime | None
    """When the next scheduled one is due."""


@dataclass(frozen=True)
class LocalServer:
    """The Prefect server that ``prefect-dicom up`` keeps for a site.

    Parameters
    ----------
    folder : Path
        Where everything of it lies.
    """

    folder: Path

    @classmethod
    def of(cls, site: Site) -> LocalServer:
        """The one of a site: beside its ledger, or beside its spool where that is no file."""
        beside = site.ledger.path or site.spool.path
        return cls(beside.parent.absolute() / _FOLDER)

    @property
    def logs(self) -> Path:
        """Where the logs lie, a file for each process."""
        return self.folder / "logs"

    # --- asking

    def told(self) -> Told | None:
        """What the keeper has last said; None where there never was one."""
        try:
            return Told(**json.loads(self._told_path.read_text()))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return None
        except (ValueError, TypeError):
            # Of another version of this package.
            return None

    def tell(self, told: Told) -> None:
        """Write what the keeper has to say; readers see it as a whole or not at all."""
        draft = self.folder / "server.json.draft"
        draft.write_text(json.dumps(asdict(told)))
        os.replace(draft, self._told_path)

    def is_kept(self) -> bool:
        """Whether the keeper lives."""
        try:
            descriptor = os.open(self._lock_path, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    @property
    def url(self) -> str | None:
        """Its API, while it is up."""
        told = self.told()
        if told is None or told.phase != UP or not self.is_kept():
            return None
        return f"http://{LOOPBACK}:{told.port}/api"

    def work(self) -> Work | None:
        """What it has to do; None where it does not answer."""
        url = self.url
        if url is None:
            return None
        scheduled = {"type": {"any_": ["SCHEDULED"]}}
        now = datetime.now().astimezone()
        due = {"before_": now.isoformat()}
        try:
            running = _ask(url, "count", {"state": {"type": {"any_": ["RUNNING", "CANCELLING"]}}})
            pending = _ask(url, "count", {"state": {"type": {"any_": ["PENDING"]}}})
            late = _ask(url, "count", {"state": scheduled, "expected_start_time": due})
            later = _ask(
                url,
                "filter",
                {"state": scheduled, "expected_start_time": {"after_": now.isoformat()}},
                sort="EXPECTED_START_TIME_ASC",
                limit=1,
            )
        except (OSError, ValueError):
            return None
        times = [datetime.fromisoformat(run["expected_start_time"]) for run in later]
        return Work(running, pending + late, times[0].astimezone() if times else None)

    def in_words(self) -> str:
        """How it is, in a line for people; empty where there never was one."""
        told = self.told()
        if told is None:
            return ""
        address = f"http://{LOOPBACK}:{told.port}"
        if not self.is_kept():
            why = "has ended unasked" if told.phase in (UP, STARTING) else "is down"
            if told.phase == FAILED:
                why = f"has failed ({told.why}; see {told.log})"
            return f"Prefect's server {why}: `prefect-dicom up` starts it."
        if told.phase != UP:
            return f"Prefect's server is being started: {address}"
        if (work := self.work()) is None:
            return f"Prefect's server does not answer: {address}; see {self.logs}"
        parts = [f"{work.running} runs under way"]
        if work.waiting:
            parts.append(f"{work.waiting} waiting")
        if work.next_at is not None:
            parts.append(f"the next one is due {work.next_at:%Y-%m-%d %H:%M}")
        return f"Prefect's server is up: {address} (API {self.url}); {', '.join(parts)}."

    # --- starting and stopping

    def up(self, site: Path, port: int | None = None) -> str:
        """Start it, if it does not run, and wait until it is up; returns its URL.

        Raises
        ------
        ConfigurationError
            It cannot be started: the port is taken, or the log that says why.
        """
        told = self.told()
        if self.is_kept() and told is not None:
            self._is_the_same(told, site, port)
            if told.phase == UP:
                self._furnish_again(told)
                return self._wait_until_up()
        else:
            self._start(site, port)
        return self._wait_until_up()

    def down(self) -> bool:
        """Stop it, and all that belongs to it; whether there was anything to stop.

        Runs are told to stop, as by Ctrl-C, and get the time to do it in order.
        """
        told = self.told()
        kept = self.is_kept()
        if kept and told is not None and told.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(told.pid, signal.SIGTERM)
            _until(lambda: not self.is_kept(), _ENDS_SECONDS)
        leftovers = self._leftovers()
        self._end(leftovers)
        return kept or bool(leftovers)

    def _is_the_same(self, told: Told, site: Path, port: int | None) -> None:
        faults = []
        if told.site != str(site.absolute()):
            faults.append(f"it runs for {told.site}; `prefect-dicom down` with that one first")
        if port not in (None, told.port):
            faults.append(f"--port: it runs on {told.port}; `prefect-dicom down` first")
        if faults:
            raise ConfigurationError("prefect-dicom up", faults)

    def _furnish_again(self, told: Told) -> None:
        """The site file may have changed: nodes come and go."""
        environment = settings_of(self.folder, told.port, os.environ)
        log = self.logs / "furnish.log"
        if code := furnish(told.site, environment, log).wait():
            raise self._failure(f"furnishing the server ended with {code}", log)

    def _free_port(self, told: Told | None, port: int | None) -> int:
        wanted = port or (told.port if told else None)
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
            log = (self.logs / "keeper.log").open("ab")
        except OSError as error:
            fault = f"cannot be written ({error.strerror}); let this user write there"
            raise ConfigurationError(str(self.folder), [fault]) from None
        with log, self._alone():
            if self.is_kept():
                # Somebody else was faster.
                return
            self._end(self._leftovers())
            port = self._free_port(self.told(), port)
            self.tell(Told(STARTING, port, str(site.absolute()), 0))
            keeper = subprocess.Popen(
                [sys.executable, "-m", "prefect_dicom.server", self.folder, site.absolute()]
                + [str(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=settings_of(self.folder, port, os.environ),
                cwd=self.folder,
                # It outlives the terminal.
                start_new_session=True,
            )
            _until(lambda: self.is_kept() or keeper.poll() is not None, _STARTS_SECONDS)
            # It is nobody's child from now on; Python would complain of one left behind.
            keeper.returncode = 0

    def _wait_until_up(self) -> str:
        def settled() -> bool:
            told = self.told()
            return not self.is_kept() or told is not None and told.phase == UP

        _until(settled, _STARTS_SECONDS)
        if (url := self.url) is not None:
            return url
        told = self.told()
        if told is not None and told.phase == FAILED:
            raise self._failure(told.why, Path(told.log))
        raise self._failure("it did not come up", self.logs / "keeper.log")

    def _failure(self, why: str, log: Path) -> ConfigurationError:
        return ConfigurationError("Prefect's server", [f"{why}; see {log}"])

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One at a time begins to start it."""
        descriptor = os.open(self.folder / "start.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @property
    def _told_path(self) -> Path:
        return self.folder / "server.json"

    @property
    def _lock_path(self) -> Path:
        return self.folder / "keeper.lock"

    @contextlib.contextmanager
    def kept(self) -> Iterator[bool]:
        """Hold the keeper's lock; the value says whether it was to be had."""
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
        finally:
            os.close(descriptor)

    # --- the processes

    def runs(self) -> list[int]:
        """Processes of flow runs that the worker started, by their pid."""
        return [pid for pid in self._leftovers() if b"PREFECT__FLOW_RUN_ID" in _environ(pid)]

    def _leftovers(self) -> list[int]:
        """Every living process that belongs to this server.

        A receiver is none of them, though a run may have started it: it serves all runs of the
        site, and leaves by itself after the last.
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
        """End processes that nobody keeps any more."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if _until(lambda: not self._leftovers(), 30):
                return


def furnish(site: str, environment: dict[str, str], log: Path) -> subprocess.Popen:
    """Begin to give the server what it needs for a site, in a process of its own."""
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
    """The port, if nobody listens on it (0: any that is free); else 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return 0
        return probe.getsockname()[1]


def _until(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def _ask(url: str, what: str, runs: dict[str, Any], **more: Any) -> Any:
    body = json.dumps({"flow_runs": runs, **more}).encode()
    request = urllib.request.Request(
        f"{url}/flow_runs/{what}", body, {"Content-Type": "application/json"}
    )
    # Never through a proxy: it is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=_ANSWERS_SECONDS) as answer:
        return json.load(answer)


def answers(url: str) -> bool:
    """Whether the server says that it is well."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=_ANSWERS_SECONDS) as answer:
            return answer.status == 200
    except OSError:
        return False
