"""Prefect's embedded server: a process of a single run, with a log file of its own.

Prefect's own start of it leaves three things to chance. The server inherits the terminal, and what
it complains of at its end concerns nobody who ran a pull. It ends by the signals that are sent to
the run, and does not end where the run is killed. And a server that has ended while it was started
is waited for until the time is out.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import (
    PREFECT_HOME,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    get_current_settings,
)

from prefect_dicom.server.database import begin_with_template
from prefect_dicom.server.embedded_process import PORT_TAKEN
from prefect_dicom.server.work import answers

_LOOK_SECONDS = 0.1
_ENDS_SECONDS = 5.0
_ENDS_SOON_SECONDS = 1.0
_PORTS = 5


def use_embedded_server() -> Path:
    """Make this process's embedded server the one of this module; returns its log's path.

    To be called before Prefect starts the server.
    """
    # Prefect keeps one instance per process and starts that one, whoever made it.
    EmbeddedServer()
    return _log_file()


def end_embedded_server_soon() -> None:
    """Give the embedded server less time to end: whoever has interrupted a run waits for it."""
    EmbeddedServer.ends_seconds = _ENDS_SOON_SECONDS


class EmbeddedServer(SubprocessASGIServer):
    """Prefect's embedded server, in a process that lives as long as this one.

    Attributes
    ----------
    ends_seconds : float
        How long it may take to end before it is killed. What runs have told it is in its database
        by then, and what is lost are events that nobody listens to any more.
    """

    ends_seconds = _ENDS_SECONDS
    _starting = threading.Lock()

    def start(self, timeout: int | None = None) -> None:
        """Start the server unless it runs, and wait until it answers.

        Raises
        ------
        RuntimeError
            The server has ended, or does not answer in time.
        """
        with self._starting:
            if not self.running:
                self._start(timeout)

    def _start(self, timeout: int | None) -> None:
        atexit.register(self.stop)
        begin_with_template(Path(PREFECT_HOME.value()))
        seconds = timeout or PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
        deadline = time.monotonic() + seconds
        for _ in range(_PORTS):
            self.port = self.find_available_port()
            self.server_process = self._run_uvicorn_command()
            if self._wait_until_it_answers(deadline):
                self.running = True
                return
            code = self.server_process.poll()
            self._end()
            if code is None:
                raise RuntimeError(f"Prefect's embedded server did not answer in {seconds:.0f} s")
            if code != PORT_TAKEN:
                break
        raise RuntimeError(f"Prefect's embedded server ended with code {code}")

    def stop(self) -> None:
        """End the server, in order if it can."""
        self._end()
        self.running = False

    def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
        path = _log_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "prefect_dicom.server.embedded_process", str(self.port)],
                # It ends when this pipe does; no other process inherits our end.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "PREFECT_UI_ENABLED": "0",
                    "PREFECT__SERVER_EPHEMERAL": "1",
                    "PREFECT__SERVER_FINAL": "1",
                    **get_current_settings().to_environment_variables(exclude_unset=True),
                },
                # A Ctrl-C is for the run.
                start_new_session=True,
            )
        finally:
            os.close(log)

    def _wait_until_it_answers(self, deadline: float) -> bool:
        assert self.server_process is not None, "it has been started"
        while time.monotonic() < deadline:
            if self.server_process.poll() is not None:
                return False
            if answers(self.api_url):
                return True
            time.sleep(_LOOK_SECONDS)
        return False

    def _end(self) -> None:
        process, self.server_process = self.server_process, None
        if process is None:
            return
        assert process.stdin is not None, "it is a pipe"
        process.stdin.close()
        try:
            process.wait(self.ends_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _log_file() -> Path:
    return Path(PREFECT_HOME.value()) / "embedded-server.log"
