"""Background process that runs Prefect's server and a worker and restarts them.

A child that dies is restarted, with increasing pauses while it keeps dying. Running flows depend
on neither: their reports to the server wait or are lost, and the ledger has the truth. On
SIGTERM the worker and its runs end first, while the server still records how they end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefect_dicom.config.site import load_site
from prefect_dicom.core.errors import PrefectDicomError
from prefect_dicom.server.local import (
    DOWN,
    FAILED,
    STARTING,
    UP,
    LocalServer,
    ServerStatus,
    start_provisioning,
)
from prefect_dicom.server.settings import LOOPBACK
from prefect_dicom.server.work import answers

log = logging.getLogger(__name__)

POOL = "dicom"
RUNS_OF_A_NODE = 2
"""Runs per node at a time on this machine: one may be long, the next of higher priority."""
_SERVER_ANSWERS_SECONDS = 240
_RUNS_END_SECONDS = 60
_ENDS_SECONDS = 20
_AGAIN_SECONDS = (1, 5, 15, 60)
_LIVED_WELL_SECONDS = 600
_LOOK_SECONDS = 1.0
_MOST_LOG_BYTES = 50 * 1024**2


@dataclass
class ChildProcess:
    """A supervised process."""

    name: str
    words: Sequence[str]
    logs: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    deaths: int = 0
    next_at: float = 0.0

    @property
    def log(self) -> Path:
        """Path of its log."""
        return self.logs / f"{self.name}.log"

    @property
    def lives(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start the process; a large log is rotated first."""
        if self.log.exists() and self.log.stat().st_size > _MOST_LOG_BYTES:
            os.replace(self.log, self.log.with_suffix(".log.old"))
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "prefect", *self.words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        self.started = time.monotonic()

    def restart_if_dead(self) -> None:
        """Restart the process if it has died and the pause is over."""
        if self.lives:
            return
        now = time.monotonic()
        if self.process is not None:
            if now - self.started > _LIVED_WELL_SECONDS:
                self.deaths = 0
            pause = _AGAIN_SECONDS[min(self.deaths, len(_AGAIN_SECONDS) - 1)]
            code = self.process.returncode
            log.warning("the %s ended with %s; again in %d s", self.name, code, pause)
            self.deaths += 1
            self.next_at = now + pause
            self.process = None
        if now >= self.next_at:
            self.start()

    def suspend(self) -> None:
        """Suspend the process (SIGSTOP), so that it starts nothing more."""
        if self.process is not None and self.lives:
            self.process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """Kill the process and wait for its end."""
        if self.process is not None and self.lives:
            self.process.kill()
            self.process.wait()

    def end(self, seconds: float) -> None:
        """Terminate the process, and kill it after ``seconds``."""
        if self.process is None or not self.lives:
            return
        self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            log.warning("the %s did not end in time; killed", self.name)
            self.process.kill()
            self.process.wait()


class _NotUp(Exception):
    """The server cannot be brought up: the cause, and the log with the details."""

    def __init__(self, why: str, path: Path) -> None:
        super().__init__(why)
        self.why = why
        self.path = path


@dataclass
class Supervisor:
    """Supervisor of the server and the worker of one site."""

    local: LocalServer
    site: str
    port: int
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        address = ("--host", LOOPBACK, "--port", str(self.port))
        self.server = ChildProcess("server", ("server", "start", *address), self.local.logs)
        # And one for a run that asks no node.
        most = RUNS_OF_A_NODE * len(load_site(self.site).nodes) + 1
        words = ("worker", "start", "--pool", POOL, "--type", "process", "--limit", str(most))
        self.worker = ChildProcess("worker", words, self.local.logs)

    def run(self) -> None:
        """Run server and worker until :attr:`stop` is set."""
        ended: tuple[str, ...] = (
            FAILED,
            "its supervisor has failed",
            str(self.local.logs / "supervisor.log"),
        )
        try:
            self._bring_up()
            self._write_status(UP)
            log.warning("up on port %d", self.port)
            while not self.stop.wait(_LOOK_SECONDS):
                self.server.restart_if_dead()
                self.worker.restart_if_dead()
            log.warning("down")
            ended = (DOWN,)
        except _NotUp as failure:
            log.error("%s; see %s", failure.why, failure.path)
            ended = (FAILED, failure.why, str(failure.path))
        finally:
            self._end_all()
            self._write_status(*ended)

    def _bring_up(self) -> None:
        self._write_status(STARTING)
        self.server.start()
        url = f"http://{LOOPBACK}:{self.port}/api"
        self._wait(
            lambda: answers(url),
            lambda: not self.server.lives,
            _NotUp("the server did not come up", self.server.log),
        )
        path = self.local.logs / "provision.log"
        begun = start_provisioning(self.site, dict(os.environ), path)
        try:
            self._wait(
                lambda: begun.poll() == 0,
                lambda: begun.poll() not in (None, 0),
                _NotUp("limits and deployments could not be set up", path),
            )
        finally:
            if begun.poll() is None:
                begun.kill()
                begun.wait()
        self.worker.start()

    def _wait(self, done: Callable[[], bool], failed: Callable[[], bool], failure: _NotUp) -> None:
        deadline = time.monotonic() + _SERVER_ANSWERS_SECONDS
        while not done():
            if failed() or time.monotonic() > deadline:
                raise failure
            if self.stop.wait(_LOOK_SECONDS / 4):
                raise _NotUp("stopped before it was up", self.local.logs / "supervisor.log")

    def _end_all(self) -> None:
        # A worker that gets SIGTERM kills its runs two seconds later, and they stay running in
        # Prefect for ever. It is suspended instead, so that it starts no other run, and the runs
        # get SIGTERM; the server lives until the last of them has reported how it ended.
        self.worker.suspend()
        deadline = time.monotonic() + _RUNS_END_SECONDS
        signalled: set[int] = set()
        while (runs := self.local.runs()) and time.monotonic() < deadline:
            # A second signal would interrupt a run that is ending in order.
            for pid in set(runs) - signalled:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            signalled.update(runs)
            time.sleep(_LOOK_SECONDS / 4)
        for pid in self.local.runs():
            log.warning("a run did not end in time; killed")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.worker.kill()
        self.server.end(_ENDS_SECONDS)

    def _write_status(self, phase: str, why: str = "", path: str = "") -> None:
        self.local.write_status(ServerStatus(phase, self.port, self.site, os.getpid(), why, path))


def main(folder: str, site: str, port: str) -> int:
    """Supervise the server of a folder until SIGTERM; returns the exit code."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    os.umask(0o077)
    local = LocalServer(Path(folder))
    with local.supervisor_lock() as locked:
        if not locked:
            log.warning("another supervisor runs already")
            return 0
        try:
            supervisor = Supervisor(local, site, int(port))
        except PrefectDicomError as error:
            local.write_status(
                ServerStatus(FAILED, int(port), site, os.getpid(), "the site file", site)
            )
            log.error("%s", error)
            return 1
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: supervisor.stop.set())
        # The terminal that started it may go.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        supervisor.run()
    return 0
