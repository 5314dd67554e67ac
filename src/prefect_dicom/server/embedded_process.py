"""``python -m prefect_dicom.server.embedded_process PORT``: Prefect's server of a single run.

It lives as long as the run that started it: standard input is a pipe whose other end the run holds,
and ends with the run, however that ends. Signals are left to the run. A service manager or a batch
system sends them to all processes of a run at once, and a server that ends by one would be gone
before the run has told it how it ended.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path

import uvicorn
from prefect.server.api.server import create_app
from prefect.settings import PREFECT_HOME

from prefect_dicom.core.files import file_lock
from prefect_dicom.server.database import LOCK
from prefect_dicom.server.settings import LOOPBACK

PORT_TAKEN = 3
"""Exit code of a server whose port was taken before it listened."""
_FAILED = 1
_CONNECTIONS_END_SECONDS = 1
_ENDS_SECONDS = 4.0


class _OneAtATime(uvicorn.Server):
    """Holds a lock while it starts: it migrates the database then, and registers blocks."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        with file_lock(Path(PREFECT_HOME.value()) / LOCK):
            await super().startup(sockets)


class _Server:
    """Prefect's server in a thread of its own: in the main thread, uvicorn would end by signals."""

    def __init__(self, port: int) -> None:
        config = uvicorn.Config(
            create_app,
            factory=True,
            host=LOOPBACK,
            port=port,
            log_level="error",
            lifespan="on",
            timeout_graceful_shutdown=_CONNECTIONS_END_SECONDS,
        )
        self.done = threading.Event()
        self.code = _FAILED
        self._uvicorn = _OneAtATime(config)

    def serve(self) -> None:
        try:
            self._uvicorn.run()
            self.code = 0 if self._uvicorn.started else _FAILED
        except SystemExit:
            # Both that the port was taken and that Prefect failed, which its log has by then.
            self.code = _FAILED if self._uvicorn.lifespan.should_exit else PORT_TAKEN
        finally:
            self.done.set()

    def end_with_the_run(self) -> None:
        while os.read(0, 1024):
            pass
        self._uvicorn.should_exit = True
        self.done.set()


def main(port: str) -> int:
    """Run the server until standard input ends; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    server = _Server(int(port))
    serving, *_ = threads = [
        threading.Thread(target=work, daemon=True)
        for work in (server.serve, server.end_with_the_run)
    ]
    for thread in threads:
        thread.start()
    server.done.wait()
    serving.join(_ENDS_SECONDS)
    return server.code


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stderr.flush()
    # Threads of the server may still wait for what does not come any more.
    os._exit(code)
