"""Flow runs without a Prefect server: when there are any, and what Prefect shows of them."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from prefect_dicom.core.errors import ArchiveError, PrefectDicomError
from prefect_dicom.core.model import Chunk
from prefect_dicom.run import steps
from prefect_dicom.run.engine import Artifact, ArtifactKind, EndName, FlowCall, RunEnd
from prefect_dicom.run.journal import JOURNALS, StateType, open_journal
from prefect_dicom.run.local_engine import run_locally
from prefect_dicom.server import needs
from prefect_dicom.server.needs import why_a_server_is_needed
from prefect_dicom.testing import tiny_instances
from tests.support.commands import CommandLine
from tests.support.sites import Place, site_around, until

RECORDED_SECONDS = 120
HEAVY = {"prefect", "pandas", "openpyxl"}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # Other tests of this process have imported Prefect, and threads of it need its modules.
    monkeypatch.setattr(needs, "sys", SimpleNamespace(modules={}))
    monkeypatch.delenv("PREFECT_PROFILE", raising=False)
    home = tmp_path / "prefect"
    home.mkdir()
    return home


# --- when a server is needed


@pytest.mark.parametrize(
    "environ, is_needed",
    [
        ({}, False),
        ({"PREFECT_API_URL": ""}, False),
        ({"PREFECT_HOME": "/somewhere", "PREFECT_DICOM_CORPUS": "/there"}, False),
        ({"PREFECT_LOGGING_LEVEL": "CRITICAL"}, False),
        ({"PREFECT_PROFILE": "ephemeral"}, False),
        ({"PREFECT_API_URL": "http://127.0.0.1:4200/api"}, True),
        ({"PREFECT_LOGGING_LEVEL": "INFO"}, True),
        ({"PREFECT_PROFILE": "cloud"}, True),
        ({"PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://host/prefect"}, True),
    ],
)
def test_a_server_is_needed_where_the_environment_has_settings_of_one(home, environ, is_needed):
    assert bool(why_a_server_is_needed(home, environ)) is is_needed


@pytest.mark.parametrize(
    "name, text, is_needed",
    [
        ("prefect/profiles.toml", 'active = "ephemeral"\n[profiles.ephemeral]\n', False),
        ("prefect/profiles.toml", 'active = "x"\n[profiles.x]\nPREFECT_API_URL = "y"\n', True),
        ("prefect/profiles.toml", "active = ", True),
        ("pyproject.toml", "[tool.ruff]\n", False),
        ("pyproject.toml", '[tool.prefect.api]\nurl = "x"\n', True),
        ("prefect.toml", "", True),
        (".env", "AWS_REGION=x\n", False),
        (".env", "PREFECT_API_URL=x\n", True),
    ],
)
def test_a_server_is_needed_where_a_file_has_settings_of_one(home, name, text, is_needed):
    Path(name).write_text(text)
    assert bool(why_a_server_is_needed(home, {})) is is_needed


_TABLES = """
    CREATE TABLE concurrency_limit_v2 (name, active);
    CREATE TABLE concurrency_limit (tag);
    CREATE TABLE automation (enabled);
"""


@pytest.mark.parametrize(
    "content, is_needed",
    [
        ("", False),
        ("INSERT INTO concurrency_limit_v2 VALUES ('pacs-main', 0), ('other', 1)", False),
        ("INSERT INTO concurrency_limit_v2 VALUES ('pacs-main', 1)", True),
        ("INSERT INTO concurrency_limit_v2 VALUES ('tag:dicom', 1)", True),
        ("INSERT INTO concurrency_limit VALUES ('dicom')", True),
        ("INSERT INTO automation VALUES (0)", False),
        ("INSERT INTO automation VALUES (1)", True),
        ("DROP TABLE automation", True),
    ],
)
def test_a_server_is_needed_where_its_database_has_what_acts_on_a_run(home, content, is_needed):
    with contextlib.closing(sqlite3.connect(home / "prefect.db")) as database:
        database.executescript(_TABLES + content)
    assert bool(why_a_server_is_needed(home, {})) is is_needed


# --- what Prefect shows


class Run:
    """As much of a run as the engine asks."""

    class control:
        sleep = staticmethod(lambda seconds: True)


def call(body) -> FlowCall:
    return FlowCall("pull-cohort", "pull-abc", {"cohort": "cohort.csv", "node": None}, body)


def rows(home: Path, query: str) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(home / "prefect.db")) as database:
        return database.execute(query).fetchall()


def journals(home: Path) -> list[Path]:
    return sorted((home / JOURNALS).glob("*.jsonl"))


def record(home: Path) -> int:
    command = CommandLine(home.parent, home.parent)
    return subprocess.run(
        [sys.executable, "-m", "prefect_dicom.server.recorder"],
        env=command.environment({"PREFECT_HOME": str(home)}),
        cwd=home,
    ).returncode


def test_runs_are_recorded_as_they_ended_and_killed_ones_as_crashed(home, monkeypatch):
    attempts: list[int] = []

    def fails_once(run, chunk) -> str:
        attempts.append(chunk.number)
        if len(attempts) == 1:
            raise ArchiveError("archive-unavailable")
        return "2 of 2 studies archived"

    def fails(run, chunk) -> str:
        raise ValueError("Zyxquordt^Immanuela")

    monkeypatch.setattr(steps, "archive_chunk", fails_once)
    monkeypatch.setattr(steps, "retrieve_chunk", fails)

    def completes(engine) -> RunEnd:
        engine.info("cohort abc: all is well")
        bar = engine.create_artifact(Artifact(ArtifactKind.PROGRESS, "dicom-bar", "begun", 10.0))
        assert engine.archive(Run, Chunk(7, "main", (1, 2))).wait() is None
        engine.update_progress(bar, 100.0, "done")
        table = Artifact(ArtifactKind.TABLE, "dicom-table", "rows", [{"rows": 2}])
        engine.create_artifact(table)
        return RunEnd(EndName.PARTIAL, "1 row left")

    def breaks(engine) -> RunEnd:
        error = engine.retrieve(Run, Chunk(1, "main", (1,))).wait()
        assert isinstance(error, PrefectDicomError)
        raise error

    with open_journal(home) as journal:
        assert run_locally(call(completes), journal) is None
    with open_journal(home) as journal:
        assert str(run_locally(call(breaks), journal)) == "unexpected: ValueError"
    with open_journal(home) as journal:
        journal.begin("rerun-failed", None, {})
        journal.state(journal.flow_run, StateType.RUNNING)
        task = journal.task_run("retrieve_chunk", "retrieve-000001", 0, "dicom")
        journal.state(task, StateType.RUNNING)
    killed = home / JOURNALS / f"{journal.flow_run}.jsonl"
    with killed.open("ab") as file:
        file.write(b'{"kind": "state", "id"')
    (home / JOURNALS / "of-another-version.jsonl").write_text('{"kind": "flow-run"}\n')

    with open_journal(home) as living:
        living.begin("pull-cohort", "pull-living", {})
        living.state(living.flow_run, StateType.RUNNING)
        assert record(home) == 1, "one cannot be recorded"
        (left,) = journals(home)
        assert left.stem == living.flow_run

    assert [path.stem for path in (home / JOURNALS).glob("*.failed")] == ["of-another-version"]
    shown = rows(home, "SELECT name, state_type, state_name, run_count FROM flow_run")
    assert {row for row in shown if row[0] != ""} >= {
        ("pull-abc", "COMPLETED", "Partial", 1),
        ("pull-abc", "FAILED", "Failed", 1),
        ("pull-living", "RUNNING", "Running", 1),
    }
    assert sorted(row[1] for row in shown) == ["COMPLETED", "CRASHED", "FAILED", "RUNNING"]
    tasks = rows(home, "SELECT name, state_name, run_count FROM task_run ORDER BY name, state_name")
    assert tasks == [
        ("archive-000007", "Completed", 2),
        ("retrieve-000001", "Crashed", 1),
        ("retrieve-000001", "Failed", 3),
    ]
    assert rows(home, "SELECT key, data, description FROM artifact ORDER BY key") == [
        ("dicom-bar", 100, "done"),
        ("dicom-table", '"[{\\"rows\\": 2}]"', "rows"),
    ]
    assert rows(home, "SELECT level, message FROM log") == [
        (logging.INFO, "cohort abc: all is well")
    ]
    assert "Zyxquordt" not in str(rows(home, "SELECT message FROM task_run_state"))

    # The one that lived has been killed: nothing of it is there twice, and it has crashed.
    assert record(home) == 0
    assert not journals(home)
    states = "SELECT type FROM flow_run_state JOIN flow_run ON flow_run.id = flow_run_id"
    assert rows(home, f"{states} WHERE flow_run.name = 'pull-living' ORDER BY timestamp") == [
        ("RUNNING",),
        ("CRASHED",),
    ]


@pytest.fixture
def place(tmp_path) -> Iterator[Place]:
    with site_around(tmp_path, tiny_instances(2, instances=2), retrieve="c-get") as place:
        yield place


@pytest.mark.timeout(2 * RECORDED_SECONDS)
def test_two_first_pulls_at_once_start_no_server_and_are_both_shown(tmp_path, place):
    command = CommandLine(place.folder, tmp_path / "home")
    home = command.home / "prefect"
    first, second = place.pacs.holdings.study_instance_uids()
    one = place.cohort([{"StudyInstanceUID": first}])
    other = place.folder / "other.csv"
    other.write_text(f"StudyInstanceUID\n{second}\n")
    beside = command.start("pull", other, "--json")
    ended = command("pull", one, "--json")
    assert (ended.code, ended.result["rows"]) == (0, {"archived": 1})
    assert not ended.modules & HEAVY
    output, stderr = beside.communicate(timeout=RECORDED_SECONDS)
    assert beside.returncode == 0, output + stderr

    until(lambda: not journals(home), "both are recorded", RECORDED_SECONDS)
    assert (home / "recorder.log").read_text() == ""
    assert rows(home, "SELECT state_name, count(*) FROM flow_run GROUP BY 1") == [("Completed", 2)]
    tasks = rows(home, "SELECT name, state_name FROM task_run ORDER BY name")
    assert {state for _, state in tasks} == {"Completed"}
    assert len(tasks) == 6
    assert rows(home, "SELECT count(*) FROM artifact") == [(8,)]
    assert first not in str(rows(home, "SELECT name, parameters FROM flow_run"))
