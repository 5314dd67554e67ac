"""The embedded server of a run: it lives as long as the run, and writes into its own log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prefect_dicom.server.work import answers
from tests.support.sites import until

STARTS_SECONDS = 180
_RUN = """
import sys, time
from prefect.server.api.server import SubprocessASGIServer
from prefect_dicom.server.embedded import use_embedded_server
use_embedded_server()
# As Prefect itself gets at it.
server = SubprocessASGIServer()
server.start(timeout=int(sys.argv[1]))
print(server.server_process.pid, server.api_url, flush=True)
sys.stdin.read()
"""


def start(home: Path, **variables: str) -> subprocess.Popen:
    kept = {name: value for name, value in os.environ.items() if "PREFECT" not in name}
    own = {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    return subprocess.Popen(
        [sys.executable, "-c", _RUN, str(STARTS_SECONDS)],
        env={**kept, **own, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def lives(pid: int) -> bool:
    """Whether a process is there; one whose parent has gone may be left as a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.timeout(3 * STARTS_SECONDS)
def test_first_runs_at_once_each_have_a_server_that_ends_when_they_do(tmp_path):
    home = tmp_path / "prefect"
    runs = [start(home) for _ in range(2)]
    try:
        begun = [run.stdout.readline().split() for run in runs]
        servers = [int(pid) for pid, _ in begun]
        # To all processes of a run, as a service manager sends it.
        for pid in servers:
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(pid, number)
        assert all(answers(url) for _, url in begun) and all(map(lives, servers))
        # One ends in order, the other has no time for anything.
        runs[0].stdin.close()
        assert runs[0].wait(20) == 0
        assert not lives(servers[0])
        runs[1].kill()
        until(lambda: not lives(servers[1]), "its server has ended", 20)
    finally:
        for run in runs:
            run.kill()
            with run:
                """Close its pipes."""
    assert "Traceback" not in (home / "embedded-server.log").read_text()


@pytest.mark.timeout(STARTS_SECONDS)
def test_a_server_that_cannot_start_is_reported_at_once_and_speaks_in_its_log(tmp_path):
    home = tmp_path / "prefect"
    nowhere = f"sqlite+aiosqlite:///{tmp_path}/nowhere/prefect.db"
    with start(home, PREFECT_SERVER_DATABASE_CONNECTION_URL=nowhere) as run:
        try:
            # Prefect waits for what has ended until the time is out.
            output, stderr = run.communicate(timeout=0.9 * STARTS_SECONDS)
        finally:
            run.kill()
    assert (run.returncode, output) == (1, "")
    assert "RuntimeError: Prefect's embedded server ended with code 1" in stderr
    assert "nowhere" not in stderr.partition("RuntimeError")[2]
    assert "unable to open database file" in (home / "embedded-server.log").read_text()
