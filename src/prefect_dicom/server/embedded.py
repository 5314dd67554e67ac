"""Prefect's embedded server: a process of a single run, with a log file of its own.

Prefect lets it inherit the terminal. When a run ends while the server still writes, Python reports
database connections that are collected after their event loop has closed ("Exception ignored in
...", with a traceback). That concerns nobody who ran a pull, and it is all the terminal would get.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_HOME


def log_embedded_server() -> Path:
    """Make this process's embedded server write to a log file; returns the file's path.

    To be called before Prefect starts the server.
    """
    # Prefect keeps one instance per process and starts that one, whoever made it.
    _LoggedServer()
    return _log_file()


class _LoggedServer(SubprocessASGIServer):
    def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
        with _standard_error_in(_log_file()):
            return super()._run_uvicorn_command()


def _log_file() -> Path:
    return Path(PREFECT_HOME.value()) / "embedded-server.log"


@contextlib.contextmanager
def _standard_error_in(path: Path) -> Iterator[None]:
    """Redirect file descriptor 2, which child processes inherit, for the length of a fork."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 2)
        os.close(log)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
