"""``prefect-dicom up`` brings a Prefect server to a machine that has none, and ``down`` ends it.

What is asked of it without starting anything is always run; server, worker and runs of their own
are the campaign's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prefect_dicom.cli import Exit, server
from prefect_dicom.config.site import load_site
from prefect_dicom.core.errors import ConfigurationError
from prefect_dicom.network.storage_scp import running_receiver
from prefect_dicom.server import LocalServer
from prefect_dicom.server.local import DOWN, FAILED, UP, ServerStatus
from prefect_dicom.server.settings import MARK, settings_of
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support.commands import CommandLine
from tests.support.peers import free_port
from tests.support.proxies import refusing_proxy
from tests.support.sites import LOOPBACK, Place, site_around, until

SITE = """
nodes:
  pacs: {host: 127.0.0.1, port: 104, called_ae_title: ANY, retrieve: c-get}
archive: {directory: archive}
spool: {path: spool}
"""


@pytest.fixture
def command(tmp_path) -> CommandLine:
    (tmp_path / "site.yaml").write_text(SITE)
    return CommandLine(tmp_path, tmp_path / "home")


@pytest.fixture
def local(tmp_path) -> LocalServer:
    folder = tmp_path / "prefect-server"
    folder.mkdir()
    return LocalServer(folder)


# ------------------------------------------------------------------------- without a server


def test_its_folder_lies_beside_the_ledger(command, tmp_path):
    site = load_site(tmp_path / "site.yaml", {})
    assert LocalServer.of(site).folder == tmp_path / "prefect-server"
    elsewhere = {"PREFECT_DICOM_LEDGER_URL": "postgresql://user@host/database"}
    # Beside the spool, where the ledger is no file.
    site = load_site(tmp_path / "site.yaml", elsewhere)
    assert LocalServer.of(site).folder == tmp_path / "prefect-server"


def test_status_says_nothing_of_it_where_there_never_was_one(command):
    ended = command("status")
    assert (ended.code, ended.output) == (Exit.ALL_WELL, "")
    assert "prefect" not in ended.modules


def test_status_of_one_that_has_ended_loads_no_prefect(command, local):
    local.write_status(ServerStatus(UP, 4200, str(command.folder / "site.yaml"), 1))
    ended = command("status")
    assert "Prefect's server has ended unexpectedly: `prefect-dicom up` starts it." in ended.output
    assert "prefect" not in ended.modules


def test_a_taken_port_is_reported_before_anything_is_started(command):
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        ended = command("up", "--port", port)
    assert ended.code == Exit.CONFIGURATION
    assert f"--port: {port} is taken by another program" in ended.stderr
    assert LocalServer(command.folder / "prefect-server")._leftovers() == []


def test_the_port_it_had_before_is_not_given_up_silently(local):
    with socket.create_server((LOOPBACK, 0)) as taken:
        local.write_status(ServerStatus(DOWN, taken.getsockname()[1], "site.yaml", 1))
        with pytest.raises(ConfigurationError, match="this server had it before"):
            local.up(Path("site.yaml"))
    assert not local.is_supervised()


def test_a_server_of_another_site_or_port_is_reported(local):
    with local.supervisor_lock():
        local.write_status(ServerStatus(UP, 4711, "/srv/site.yaml", 1))
        with pytest.raises(ConfigurationError) as caught:
            local.up(Path("/srv/other.yaml"), 4712)
    assert [fault.split("; ")[0] for fault in caught.value.faults] == [
        "it runs for /srv/site.yaml",
        "--port: it runs on 4711",
    ]


def test_down_without_up_is_no_fault(command):
    ended = command("down")
    assert (ended.code, ended.output) == (Exit.ALL_WELL, "It did not run.\n")


@pytest.mark.parametrize("command", [server.up, server.down])
def test_a_site_in_a_block_has_a_server_already(command):
    with pytest.raises(ConfigurationError, match="name a site file"):
        command(site="block:lab")


def test_one_supervisor_at_a_time_holds_the_lock(local):
    assert not local.is_supervised()
    with local.supervisor_lock() as first:
        assert first and local.is_supervised()
        with local.supervisor_lock() as second:
            assert not second
    assert not local.is_supervised()


def test_only_a_supervised_server_that_is_up_has_an_address(local):
    local.write_status(ServerStatus(UP, 4711, "site.yaml", 1))
    assert local.url is None
    with local.supervisor_lock():
        assert local.url == f"http://{LOOPBACK}:4711/api"
        local.write_status(ServerStatus(FAILED, 4711, "site.yaml", 1, "why", "log"))
        assert local.url is None


@pytest.mark.parametrize("text", ["", "{}", '{"phase": "up", "else": 1}', "\0"])
def test_a_state_of_another_version_is_none(local, text):
    (local.folder / "server.json").write_text(text)
    assert local.status() is None
    assert local.describe() == ""


def test_the_environment_may_tune_it_but_not_say_which_server_it_is(tmp_path):
    given = {
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "50",
        "PREFECT_API_URL": "https://elsewhere/api",
        "PREFECT_API_KEY": "pnu_1",
        "PREFECT_HOME": "/home/someone",
        "AWS_PROFILE": "research",
    }
    settings = settings_of(tmp_path, 4711, given)
    assert settings["PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE"] == "50"
    assert settings["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert settings["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"].endswith(".filesystem")
    assert settings["PREFECT_API_URL"] == f"http://{LOOPBACK}:4711/api"
    assert settings["PREFECT_HOME"] == str(tmp_path / "home")
    assert settings["AWS_PROFILE"] == "research"
    assert "PREFECT_API_KEY" not in settings


def test_a_process_is_ended_by_its_mark_and_a_receiver_is_spared(local):
    environment = {**os.environ, MARK: str(local.folder)}
    other = {**os.environ, MARK: str(local.folder / "other")}
    waiting = ["-c", "import sys; sys.stdin.read()", "prefect_dicom.network.storage_scp"]
    own = start(waiting[:2], environment)
    spared = [start(waiting, environment), start(waiting[:2], other)]
    try:
        until(lambda: local._leftovers() == [own.pid], "it is there")
        assert local.down()
        assert own.wait(10) == -signal.SIGTERM
        assert [process.poll() for process in spared] == [None, None]
    finally:
        for process in (own, *spared):
            process.kill()
            process.wait()
            process.stdin.close()


def start(words: list[str], environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE, env=environment)


# ------------------------------------------------------------------------------ the campaign


@dataclass
class Stage:
    place: Place
    command: CommandLine
    local: LocalServer

    def run(self, *words: str | Path, **variables: str) -> tuple[int, str, str]:
        """A command, with the time that a server takes to start on a busy machine."""
        process = self.command.start(*words, "--site", self.place.file, **variables)
        output, stderr = process.communicate(timeout=900)
        return process.returncode, output, stderr

    def ask(self, method: str, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.local.url}/{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def begin(self, deployment: str, **parameters: Any) -> str:
        number = self.ask("GET", f"deployments/name/{deployment}")["id"]
        content = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return self.ask("POST", f"deployments/{number}/create_flow_run", content)["id"]

    def begin_when_it_answers(self, deployment: str, **parameters: Any) -> str:
        begun: list[str] = []

        def begins() -> bool:
            with contextlib.suppress(OSError):
                begun.append(self.begin(deployment, **parameters))
            return bool(begun)

        until(begins, "the server takes it", 300)
        return begun[0]

    def state(self, run: str) -> str:
        try:
            return self.ask("GET", f"flow_runs/{run}")["state_type"]
        except OSError:
            return "unknown"

    def child(self, name: str) -> int:
        """The pid of the server or the worker."""
        words = f"prefect\0{name}\0start".encode()
        (pid,) = [
            pid
            for pid in self.local._leftovers()
            if words in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return pid


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("up")
    with (
        site_around(folder, tiny_instances(4, instances=2), retrieve="c-move") as place,
        # All of it behind the proxy of a hospital, which is of no use to it.
        refusing_proxy() as proxy,
    ):
        local = LocalServer.of(place.site)
        stage = Stage(place, CommandLine(folder, folder / "home"), local)
        (folder / "home").mkdir()
        try:
            port = str(free_port())
            code, output, stderr = stage.run("up", "--port", port, **proxy.environment)
            assert code == Exit.ALL_WELL, stderr
            assert f"Prefect's server is up: {local.url.removesuffix('/api')}" in output
            yield stage
        finally:
            local.down()
            assert local._leftovers() == []
            assert proxy.requests == []


whole = [
    pytest.mark.timeout(1800),
    pytest.mark.whole_campaign,
    pytest.mark.campaign("operations"),
]


def campaign(test):
    for mark in whole:
        test = mark(test)
    return test


@campaign
def test_up_twice_is_up_once(stage):
    before = stage.local.status()
    code, _, stderr = stage.run("up")
    assert code == Exit.ALL_WELL, stderr
    assert stage.local.status() == before
    code, _, stderr = stage.run("up", "--port", str(free_port()))
    assert (code, "`prefect-dicom down` first" in stderr) == (Exit.CONFIGURATION, True)


@campaign
def test_status_says_how_it_is_without_loading_prefect(stage):
    ended = stage.command("status", "--site", stage.place.file)
    assert f"Prefect's server is up: {stage.local.url.removesuffix('/api')}" in ended.output
    assert "0 runs under way" in ended.output
    assert "prefect" not in ended.modules


@campaign
def test_it_runs_as_was_measured_to_be_best(stage):
    settings = stage.ask("GET", "admin/settings")
    server = settings["server"]
    assert server["analytics_enabled"] is False
    assert server["ui"]["show_promotional_content"] is False
    assert server["services"]["task_run_recorder"]["batch_size"] == 200
    assert server["services"]["event_persister"]["batch_size"] == 500
    assert server["concurrency"]["lease_storage"].endswith(".filesystem")
    assert server["api"]["host"] == LOOPBACK


@campaign
def test_it_has_the_limits_the_blocks_and_the_deployments(stage):
    (limit,) = stage.ask("POST", "v2/concurrency_limits/filter", {})
    # Not in force: the ledger shares a node's associations among runs, by their priority.
    assert (limit["name"], limit["limit"], limit["active"]) == ("pacs-pacs", 2, False)
    slugs = {block["slug"] for block in stage.ask("POST", "block_types/filter", {})}
    assert {"dicom-site", "dicom-pacs", "dicom-archive", "dicom-ledger"} <= slugs
    names = {d["name"] for d in stage.ask("POST", "deployments/filter", {})}
    assert names == {"cohort", "failures", "new", "weekly"}
    queues = stage.ask("POST", "work_pools/dicom/queues/filter", {})
    assert {q["name"]: q["concurrency_limit"] for q in queues} == {"default": None, "pacs": 2}


@campaign
def test_what_a_person_has_changed_stays(stage):
    known = stage.ask("GET", "deployments/name/archive-new/new")
    (schedule,) = known["schedules"]
    path = f"deployments/{known['id']}/schedules/{schedule['id']}"
    stage.ask("PATCH", path, {"active": True})
    stage.ask("PATCH", f"deployments/{known['id']}", {"parameters": {"days": 3}})
    code, _, stderr = stage.run("up")
    assert code == Exit.ALL_WELL, stderr
    again = stage.ask("GET", "deployments/name/archive-new/new")
    assert again["parameters"] == {"days": 3}
    assert [s["active"] for s in again["schedules"]] == [True]
    stage.ask("PATCH", path, {"active": False})


@campaign
def test_pull_uses_it_by_itself(stage):
    cohort = stage.place.cohort()
    code, _, stderr = stage.run("pull", cohort)
    assert code == Exit.ALL_WELL, stderr
    by_hand = {"flow_runs": {"deployment_id": {"is_null_": True}}}
    (run,) = stage.ask("POST", "flow_runs/filter", by_hand)
    assert (run["name"][:5], run["state_type"]) == ("pull-", "COMPLETED")


@campaign
def test_its_worker_runs_what_is_deployed(stage):
    run = stage.begin("verify-archive/weekly")
    until(lambda: stage.state(run) in ("COMPLETED", "FAILED", "CRASHED"), "it has ended", 600)
    assert stage.ask("GET", f"flow_runs/{run}")["state"]["message"].startswith("4 studies checked")


@campaign
@pytest.mark.parametrize("name", ["server", "worker"])
def test_what_dies_is_started_again(stage, name):
    before = stage.child(name)
    os.kill(before, signal.SIGKILL)

    def again() -> bool:
        with contextlib.suppress(ValueError, OSError):
            return stage.child(name) != before
        return False

    until(again, f"the {name} is there again", 300)
    run = stage.begin_when_it_answers("verify-archive/weekly")
    until(lambda: stage.state(run) == "COMPLETED", "its work goes on", 600)


@campaign
def test_a_run_whose_process_and_worker_have_gone_is_marked_as_crashed(stage):
    shorten(stage, "prefect-dicom: mark dead runs", 60)
    with held_run(stage) as run:
        (process,) = stage.local.runs()
        os.kill(stage.child("worker"), signal.SIGKILL)
        os.kill(process, signal.SIGKILL)
        until(lambda: stage.state(run) == "CRASHED", "it is marked", 600)
    assert "No heartbeat" in stage.ask("GET", f"flow_runs/{run}")["state"]["message"]


@campaign
def test_runs_that_a_lost_worker_has_taken_do_not_hold_the_queue(stage):
    shorten(stage, "prefect-dicom: mark stranded runs", 60)
    pool = "work_pools/dicom/queues/pacs"
    before = stage.ask("GET", pool)["concurrency_limit"]
    stage.ask("PATCH", pool, {"concurrency_limit": 2})
    worker = stage.child("worker")
    os.kill(worker, signal.SIGSTOP)
    try:
        stranded = [stage.begin("rerun-failed/failures") for _ in range(2)]
        for run in stranded:
            state = {"state": {"type": "PENDING"}, "force": True}
            stage.ask("POST", f"flow_runs/{run}/set_state", state)
        third = stage.begin("rerun-failed/failures")
    finally:
        os.kill(worker, signal.SIGCONT)
    until(lambda: stage.state(third) in ("COMPLETED", "FAILED"), "the third begins", 600)
    assert [stage.state(run) for run in stranded] == ["CRASHED", "CRASHED"]
    assert "its worker is gone" in stage.ask("GET", f"flow_runs/{stranded[0]}")["state"]["message"]
    stage.ask("PATCH", pool, {"concurrency_limit": before})


def shorten(stage: Stage, name: str, seconds: int) -> None:
    """Let an automation act sooner than it does for people."""
    (automation,) = [a for a in stage.ask("POST", "automations/filter", {}) if a["name"] == name]
    automation["trigger"]["within"] = seconds
    keys = ("name", "description", "enabled", "trigger", "actions")
    stage.ask("PUT", f"automations/{automation['id']}", {key: automation[key] for key in keys})


@campaign
def test_down_ends_the_runs_the_worker_and_the_server_and_nothing_else(stage):
    with held_run(stage) as run:
        code, output, stderr = stage.run("down")
        assert (code, output) == (Exit.ALL_WELL, "Stopped.\n"), stderr
    assert stage.local._leftovers() == []
    assert stage.local.url is None
    with contextlib.closing(sqlite3.connect(stage.local.folder / "home/prefect.db")) as database:
        query = "select state_type from flow_run where id = ?"
        ((state,),) = database.execute(query, (run,)).fetchall()
    # The server has still heard how it ended.
    assert state in ("CRASHED", "CANCELLED")
    with stage.place.ledger() as ledger:
        assert not ledger.claims.live()
    assert "Prefect's server is down" in stage.run("status")[1]
    assert stage.run("down")[1] == "It did not run.\n"


@campaign
def test_a_server_that_does_not_come_up_is_reported_with_its_log(tmp_path, command):
    nowhere = "sqlite+aiosqlite:////nowhere/at/all.db"
    process = command.start("up", PREFECT_SERVER_DATABASE_CONNECTION_URL=nowhere)
    _, stderr = process.communicate(timeout=900)
    local = LocalServer(tmp_path / "prefect-server")
    assert process.returncode == Exit.CONFIGURATION
    assert str(local.logs / "server.log") in stderr.replace("\n", "")
    assert local._leftovers() == []
    assert "has failed" in local.describe()


@contextlib.contextmanager
def held_run(stage: Stage) -> Iterator[str]:
    """A run under way that waits for the PACS."""
    hold = threading.Event()
    stage.place.pacs.script.append(Behaviour("net.first_byte", service="C-FIND", hold=hold))
    asked = len(stage.place.pacs.requests("C-FIND"))
    uids = stage.place.pacs.holdings.study_instance_uids()
    path = stage.place.folder / f"held-{asked}.csv"
    # Another order makes another cohort.
    path.write_text("StudyInstanceUID\n" + "".join(f"{uid}\n" for uid in [*uids][: asked + 1]))
    try:
        run = stage.begin_when_it_answers("pull-cohort/cohort", cohort=str(path))
        until(lambda: len(stage.place.pacs.requests("C-FIND")) > asked, "it asks", 600)
        yield run
    finally:
        hold.set()
        stage.place.pacs.script.clear()
        if (lease := running_receiver(stage.place.site)) is not None:
            lease.close()
