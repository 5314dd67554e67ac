"""The process in the background: it starts Prefect's server and a worker, and keeps them alive.

One that dies is started again, later and later while it goes on dying. Runs that are under way
do not hang on either: what they tell the server waits or is lost, and the ledger has the truth.
Told to stop, it ends the worker and its runs first, while the server still takes in how they end.
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
    Told,
    answers,
    furnish,
)
from prefect_dicom.server.settings import LOOPBACK

log = logging.getLogger(__name__)

POOL = "dicom"
RUNS_OF_A_NODE = 2
"""So many at a time on this machine: one may be long, and the next of higher priority."""
_SERVER_ANSWERS_SECONDS = 240
_RUNS_END_SECONDS = 60
_ENDS_SECONDS = 20
_AGAIN_SECONDS = (1, 5, 15, 60)
_LIVED_WELL_SECONDS = 600
_LOOK_SECONDS = 1.0
_MOST_LOG_BYTES = 50 * 1024**2


@dataclass
class Child:
    """One process that is to be there."""

    name: str
    words: Sequence[str]
    logs: Path
    process: subprocess.Popen | None = None
    started: float = 0.0
    deaths: int = 0
    next_at: float = 0.0

    @property
    def log(self) -> Path:
        """Where it writes."""
        return self.logs / f"{self.name}.log"

    @property
    def lives(self) -> bool:
        """Whether it is there."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it; a log that has grown large is begun anew."""
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

    def look_after(self) -> None:
        """Start it again if it has died and the pause is over."""
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

    def end(self, seconds: float) -> None:
        """Stop it, and kill it where it does not stop in time."""
        if not self.lives:
            return
        self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            log.warning("the %s did not end in time; killed", self.name)
            self.process.kill()
            self.process.wait()


class _NotUp(Exception):
    """It cannot be brought up: why, and where to read on."""

    def __init__(self, why: str, path: Path) -> None:
        super().__init__(why)
        self.why = why
        self.path = path


@dataclass
class Keeper:
    """Server and worker of one site, from start to stop."""

    local: LocalServer
    site: str
    port: int
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        address = ("--host", LOOPBACK, "--port", str(self.port))
        self.server = Child("server", ("server", "start", *address), self.local.logs)
        # And one that asks no node.
        most = RUNS_OF_A_NODE * len(load_site(self.site).nodes) + 1
        words = ("worker", "start", "--pool", POOL, "--type", "process", "--limit", str(most))
        self.worker = Child("worker", words, self.local.logs)

    def run(self) -> None:
        """Keep them until told to stop."""
        ended = (FAILED, "its keeper has broken", str(self.local.logs / "keeper.log"))
        try:
            self._bring_up()
            self._tell(UP)
            log.warning("up on port %d", self.port)
            while not self.stop.wait(_LOOK_SECONDS):
                self.server.look_after()
                self.worker.look_after()
            log.warning("down")
            ended = (DOWN,)
        except _NotUp as failure:
            log.error("%s; see %s", failure.why, failure.path)
            ended = (FAILED, failure.why, str(failure.path))
        finally:
            self._end_all()
            self._tell(*ended)

    def _bring_up(self) -> None:
        self._tell(STARTING)
        self.server.start()
        url = f"http://{LOOPBACK}:{self.port}/api"
        self._wait(
            lambda: answers(url),
            lambda: not self.server.lives,
            _NotUp("the server did not come up", self.server.log),
        )
        path = self.local.logs / "furnish.log"
        begun = furnish(self.site, dict(os.environ), path)
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
                raise _NotUp("told to stop before it was up", self.local.logs / "keeper.log")

    def _end_all(self) -> None:
        # A worker that is told to stop kills its runs two seconds later, and they stay running
        # in Prefect for ever. It is stopped, so that it begins no other either, and the runs are
        # told; the server is there until the last of them has said how it ended.
        if self.worker.lives:
            self.worker.process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + _RUNS_END_SECONDS
        told: set[int] = set()
        while (runs := self.local.runs()) and time.monotonic() < deadline:
            # A second signal would end a run that is ending in order.
            for pid in set(runs) - told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            told.update(runs)
            time.sleep(_LOOK_SECONDS / 4)
        for pid in self.local.runs():
            log.warning("a run did not end in time; killed")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.worker.lives:
            self.worker.process.kill()
            self.worker.process.wait()
        self.server.end(_ENDS_SECONDS)

    def _tell(self, phase: str, why: str = "", path: str = "") -> None:
        self.local.tell(Told(phase, self.port, self.site, os.getpid(), why, path))


def main(folder: str, site: str, port: str) -> int:
    """Keep the server of a folder until SIGTERM."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    os.umask(0o077)
    local = LocalServer(Path(folder))
    with local.kept() as kept:
        if not kept:
            log.warning("another one keeps it")
            return 0
        try:
            keeper = Keeper(local, site, int(port))
        except PrefectDicomError as error:
            local.tell(Told(FAILED, int(port), site, os.getpid(), "the site file", site))
            log.error("%s", error)
            return 1
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: keeper.stop.set())
        # The terminal that started it may go.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        keeper.run()
    return 0
