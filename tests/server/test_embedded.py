"""The server that Prefect starts for a single run does not write to the user's terminal."""

from __future__ import annotations

import subprocess
import sys

import pytest
from prefect.settings import PREFECT_HOME, temporary_settings

from prefect_dicom.server.embedded import log_embedded_server


@pytest.fixture
def server(monkeypatch):
    """A server that complains and ends, in a process without another; the value is its class.

    Importing it takes seconds, which whoever only collects this file is spared.
    """
    from prefect.server.api.server import SubprocessASGIServer

    complain = "import sys; sys.stderr.write('Exception ignored in: a connection'); sys.exit(1)"
    monkeypatch.setattr(SubprocessASGIServer, "_instances", {})
    monkeypatch.setattr(
        SubprocessASGIServer,
        "_run_uvicorn_command",
        lambda self: subprocess.Popen([sys.executable, "-c", complain]),
    )
    return SubprocessASGIServer


def test_what_the_embedded_server_complains_of_is_in_its_log(server, tmp_path, capfd):
    with temporary_settings({PREFECT_HOME: tmp_path / "prefect"}):
        log = log_embedded_server()
        # As Prefect itself gets at it.
        assert server()._run_uvicorn_command().wait() == 1
        print("the terminal", file=sys.stderr)
        assert log.read_text() == "Exception ignored in: a connection"
    assert capfd.readouterr().err == "the terminal\n"


def test_a_server_that_does_not_start_is_reported_as_before(server, tmp_path):
    with temporary_settings({PREFECT_HOME: tmp_path / "prefect"}):
        log_embedded_server()
        with pytest.raises(RuntimeError, match="exited with code 1"):
            server().start(timeout=1)
