"""A Prefect server of its own, with a worker, as an operator would start them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient

from tests.support.peers import free_port
from tests.support.sites import LOOPBACK, until

ROOT = Path(__file__).resolve().parents[2]
STARTS_SECONDS = 120


class PrefectServer:
    """``prefect server start`` with everything below ``folder``; a context manager.

    Parameters
    ----------
    host : str
        Where it listens.
    database : str, optional
        URL of its database; SQLite without one.

    Attributes
    ----------
    home : Path
        ``PREFECT_HOME``: the database, and whatever else Prefect keeps.
    logs : Path
        What the server and the other processes have written, a file each.
    """

    def __init__(self, folder: Path, host: str = LOOPBACK, database: str | None = None) -> None:
        self.host = host
        self.home = folder / "home"
        self.logs = folder / "logs"
        self.home.mkdir()
        self.logs.mkdir()
        self.port = free_port()
        self.url = f"http://{host}:{self.port}/api"
        # Nothing of what the person who runs the tests has set for Prefect.
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        self.environment |= {
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "1",
        }
        if database is not None:
            self.environment["PREFECT_API_DATABASE_CONNECTION_URL"] = database
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> PrefectServer:
        address = ("--host", self.host, "--port", str(self.port))
        server = self.start("server", "prefect", "server", "start", *address, "--no-ui")

        def answers() -> bool:
            assert server.poll() is None, self.log("server")
            try:
                return httpx.get(f"{self.url}/health").is_success
            except httpx.TransportError:
                return False

        try:
            until(answers, "the Prefect server answers", STARTS_SECONDS)
        except BaseException:
            # Nobody calls __exit__ of what was not entered, and it would outlive the tests.
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def start(self, name: str, module: str, *words: str, cwd: Path | None = None):
        """Start ``python -m module words`` and let it run; its output goes to ``logs``."""
        with (self.logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                stdout=log,
                stderr=log,
                cwd=cwd or self.home,
                env=self.environment,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def run(self, *words: str, cwd: Path | None = None) -> str:
        """Run ``prefect words`` to its end; returns what it has printed."""
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *words],
            capture_output=True,
            text=True,
            cwd=cwd or self.home,
            env=self.environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def log(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text(errors="replace")

    # --- the API

    def ask(self, method: str, path: str, **content: Any) -> Any:
        """One request; Prefect's own client waits where a busy server answers 503."""
        with SyncPrefectClient(self.url) as client:
            return client.request(method, path, **content).json()

    def find(self, kind: str, **filters: dict[str, Any]) -> list[dict[str, Any]]:
        """Things of a kind (``flow_runs``, ``artifacts``, ...) that pass Prefect's filters."""
        return self.ask("POST", f"/{kind}/filter", json=filters)

    def deployment(self, name: str) -> dict[str, Any]:
        """A deployment by ``flow/deployment``."""
        return self.ask("GET", f"/deployments/name/{name}")

    def begin(self, deployment: str, **parameters: Any) -> str:
        """Let a worker run a deployment; returns the flow run's id."""
        number = self.deployment(deployment)["id"]
        content = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return self.ask("POST", f"/deployments/{number}/create_flow_run", json=content)["id"]

    def flow_run(self, number: str) -> dict[str, Any]:
        return self.ask("GET", f"/flow_runs/{number}")

    def of_run(self, kind: str, number: str) -> list[dict[str, Any]]:
        """Task runs, artifacts or logs of a flow run."""
        match kind:
            case "task_runs":
                return self.find(kind, flow_runs={"id": {"any_": [number]}})
            case "artifacts" | "logs":
                return self.find(kind, **{kind: {"flow_run_id": {"any_": [number]}}})
        raise ValueError(kind)

    def finished(self, number: str, seconds: float = 180) -> dict[str, Any]:
        """The flow run, once it has ended and the server has taken in all of its task runs."""

        def ended(runs: Callable[[], list[dict[str, Any]]]) -> bool:
            return all(run["state_type"] in _FINAL for run in runs())

        until(lambda: ended(lambda: [self.flow_run(number)]), "the flow run has ended", seconds)
        until(lambda: ended(lambda: self.of_run("task_runs", number)), "its tasks are known")
        return self.flow_run(number)


_FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
