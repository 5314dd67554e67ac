"""Deployed as the documentation says, a flow runs on a worker and tells Prefect of no patient.

Nor do its events, which automations, created from the files of ``deployments/automations``, make
messages of.

One real Prefect server, one worker in an empty folder. What Prefect keeps (its database byte by
byte and value by value, its home, the logs of server and worker) is searched for everything that
identifies the patients of the cohort: after a pull with rows that fail, and after pulls that
fail as a whole.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pydicom
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.schemas.automations import AutomationCore

from prefect_dicom.core.events import AUTOMATIONS
from prefect_dicom.testing import Behaviour, generate_cohort
from prefect_dicom.testing.instances import instance_of_file
from tests.support.peers import free_port
from tests.support.prefect_server import ROOT, PrefectServer
from tests.support.sites import LOOPBACK, Place, site_around, until

NAMES = ("Zyxquordt^Immanuela", "Vrombautz^J\u00f6rnfried^^Dr", "Quellmoritz^Thusnelda")
UNKNOWN = {"AccessionNumber": "ZQNOWHERE0815", "PatientID": "PZQ-NOBODY-4711"}
WILD = {"PatientID": "PZQ-WILDCARD-99*"}
# Starting a server, a worker and six runs is the first test's.
pytestmark = pytest.mark.timeout(600)

TASK_RUN_NAME = re.compile(r"discover-lines-\d+-\d+|retrieve-\d{6}|archive-\d{6}")
IN_THE_CAMPAIGN = (pytest.mark.whole_campaign, pytest.mark.campaign("operations"))
NO_OTHER_PASS = {"retry_after_seconds": []}


@dataclass
class Stage:
    """The server, the cohort that was pulled through it, and who is in it."""

    prefect: PrefectServer
    place: Place
    elsewhere: Path
    untouched: dict[Path, bytes]
    secrets: set[str] = field(default_factory=set)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    by_hand: str = ""
    """What ``prefect-dicom pull`` has printed, run with the same server."""
    called: list[dict[str, Any]] = field(default_factory=list)
    """What the webhook of an automation was called with."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory, request) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("deployed")
    for name in ("prefect", "elsewhere", "site"):
        (folder / name).mkdir()
    files, secrets = invented_patients(folder / "files")
    objects = [instance_of_file(path) for path in files]
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(site_around(folder / "site", objects))
        edit(place, **NO_OTHER_PASS)
        before = checkout()
        server = stack.enter_context(PrefectServer(folder / "prefect"))
        stage = Stage(server, place, folder / "elsewhere", before, secrets)
        server.run("work-pool", "create", "dicom", "--type", "process")
        file = str(Path("deployments", "prefect.yaml"))
        server.run("--no-prompt", "deploy", "--prefect-file", file, "--all", cwd=ROOT)
        switch_on(server, "verify-archive/weekly")
        worker = ("prefect", "worker", "start", "--pool", "dicom", "--limit", "1")
        server.start("worker", *worker, cwd=stage.elsewhere)
        url = stack.enter_context(listening(stage.called))
        server.run("automation", "create", "--from-file", str(webhook(server, url, folder)))
        create_other_automations(server)
        run_all(stage, request.config.getoption("--campaign"))
        yield stage


def switch_on(server: PrefectServer, name: str) -> None:
    """Switch on the schedule of a deployment, as a person does in Prefect's UI."""
    known = server.deployment(name)
    (schedule,) = known["schedules"]
    path = f"/deployments/{known['id']}/schedules/{schedule['id']}"
    with SyncPrefectClient(server.url) as client:
        client.request("PATCH", path, json={"active": True}).raise_for_status()


def run_all(stage: Stage, every_reason: bool) -> None:
    """One pull in which rows fail, and pulls that fail as a whole, each for another reason.

    Those that stop at a folder of our own are left to the campaign: each costs a process.
    """
    place, server = stage.place, stage.prefect
    cohort = place.cohort(rows_of(place))
    lost = next(iter(place.pacs.holdings.study_instance_uids()))
    place.pacs.script.append(Behaviour("move.drop_instances", instances=1, study=lost))
    away = variant(place, "away", node={"port": free_port()})
    command = ("pull", str(cohort), "--site", str(away))
    by_hand = server.start("by-hand", "prefect_dicom.cli", *command, cwd=stage.elsewhere)

    parameters = ("--param", f"cohort={cohort}", "--param", f"site={place.file}")
    said = server.run("deployment", "run", "pull-cohort/cohort", *parameters)
    begun = {"pulled": re.search("UUID: ([0-9a-f-]{36})", said)[1]}

    wild = place.folder / "wild.csv"
    wild.write_text(f"PatientID\n{WILD['PatientID']}\n")
    blocked = variant(place, "blocked", spool={"path": "blocked/file"})
    (place.folder / "blocked" / "file").write_text("not a folder\n")
    no_archive = variant(place, "no-archive", archive={"directory": "no-archive/nowhere"})
    unknown = variant(place, "unknown", node={"called_ae_title": "NOBODY"})
    failing = [("wild", wild, place.file), ("unknown", cohort, unknown)]
    if every_reason:
        failing += [("blocked", cohort, blocked), ("no-archive", cohort, no_archive)]
    for name, file, site in failing:
        begun[name] = server.begin("pull-cohort/cohort", cohort=str(file), site=str(site))
    for name, number in begun.items():
        stage.runs[name] = server.finished(number)
    by_hand.wait(180)
    stage.by_hand = server.log("by-hand")
    (run,) = server.find("flow_runs", flow_runs={"deployment_id": {"is_null_": True}})
    stage.runs["away"] = server.finished(run["id"])


# ------------------------------------------------------------------------------------ the stage


@contextlib.contextmanager
def listening(calls: list[dict[str, Any]]) -> Iterator[str]:
    """A web server of somebody who wants to hear of events; the value is its URL."""

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            calls.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer((LOOPBACK, 0), Listener) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield f"http://{LOOPBACK}:{listener.server_port}/"
        listener.shutdown()


def webhook(server: PrefectServer, url: str, folder: Path) -> Path:
    """The automation that calls a webhook, with the id of a block, as the guide has it."""
    guide = (ROOT / "docs" / "operations.md").read_text()
    (code,) = re.findall(r'python -c "(from prefect.blocks.webhook [^"]*)"', guide)
    code = re.sub(r"https://[^']*", url, code)
    block = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=server.environment,
    ).stdout.strip()
    path = folder / "webhook.yaml"
    text = (AUTOMATIONS / "webhook.yaml").read_text()
    path.write_text(text.replace("00000000-0000-0000-0000-000000000000", block))
    return path


def create_other_automations(server: PrefectServer) -> None:
    """As ``prefect automation create`` does, which takes seconds for each file."""
    for path in AUTOMATIONS.glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        for automation in content if isinstance(content, list) else [content]:
            made = AutomationCore.model_validate(automation).model_dump(mode="json")
            assert server.ask("POST", "/automations/", json=made)["name"] == automation["name"]


def invented_patients(folder: Path) -> tuple[list[Path], set[str]]:
    """Generated files of patients whose names and numbers stand nowhere else, and these."""
    files = generate_cohort(folder, studies=5, seed=3, instances_per_series=2)
    secrets = {*UNKNOWN.values(), *WILD.values()}
    for path in files:
        dataset = pydicom.dcmread(path)
        number = int(dataset.StudyID)
        dataset.PatientName = NAMES[number % len(NAMES)]
        dataset.PatientID = f"PZQ-{number:06d}-X"
        dataset.AccessionNumber = f"ZQACC{number:08d}"
        dataset.save_as(path)
        uids = {dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID}
        # Without what all UIDs of their kind begin with, too.
        secrets |= uids | {uid.removeprefix("2.25.") for uid in uids}
        secrets |= {dataset.PatientID, dataset.AccessionNumber}
        secrets |= set(re.findall(r"\w{4,}", str(dataset.PatientName)))
    return files, {str(secret) for secret in secrets}


def rows_of(place: Place) -> list[dict[str, str]]:
    """The cohort: each study by another key, and two rows that will not be found."""
    keys = ("AccessionNumber", "PatientID", "StudyInstanceUID")
    rows = []
    for number, uid in enumerate(place.pacs.holdings.study_instance_uids()):
        held = next(iter(place.pacs.holdings.studies({"StudyInstanceUID": uid})))
        key = keys[number % len(keys)]
        rows.append({key: held[0].attributes[key]})
    return [*rows, *({key: value} for key, value in UNKNOWN.items())]


def variant(place: Place, name: str, **parts) -> Path:
    """The site once more, with a ledger and spool of its own and with something wrong."""
    folder = place.folder / name
    folder.mkdir()
    other = Place(place.folder, place.folder / f"{name}.yaml", place.pacs)
    shutil.copy(place.file, other.file)
    other.change(
        **{
            "ledger": {"path": f"{name}/ledger.sqlite"},
            "spool": {"path": f"{name}/spool"},
            "receiver": {"port": (port := free_port()), "ae_title": f"OTHER{port}"},
            **parts,
        }
    )
    return other.file


def edit(place: Place, **values) -> None:
    """Set keys at the top of the site file."""
    document = yaml.safe_load(place.file.read_text())
    place.file.write_text(yaml.safe_dump({**document, **values}))


def checkout() -> dict[Path, bytes]:
    """What a deployment could have left or changed in the repository."""
    paths = [*ROOT.iterdir(), *(ROOT / "deployments").iterdir()]
    return {p: p.read_bytes() if p.is_file() else b"" for p in paths if "cache" not in p.name}


# ----------------------------------------------------------------------------------- the search


def kept_by_prefect(server: PrefectServer) -> Iterator[tuple[str, bytes]]:
    """Everything Prefect has stored or printed: where, and the bytes."""
    for path in sorted(server.home.parent.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(server.home.parent)), path.read_bytes()
    # A long value lies in pieces on several pages of the file; here it is in one.
    with contextlib.closing(sqlite3.connect(server.home / "prefect.db")) as database:
        yield "values of the database", "\n".join(database.iterdump()).encode()


def disguises(secret: str) -> Iterator[bytes]:
    """The forms in which a text may lie in a file."""
    plain = secret.encode()
    yield plain
    yield secret.encode("latin-1")
    yield secret.encode("unicode_escape")
    yield secret.encode("utf-16-le")
    yield secret.encode("utf-16-be")
    yield plain.hex().encode()
    yield plain.hex().upper().encode()
    for offset in range(3):
        # Of a longer text in base64, whatever stood before it; the outer signs depend on that.
        encoded = base64.b64encode(b"\0" * offset + plain)
        yield encoded[(0, 2, 3)[offset] : -4 if len(encoded) > 8 else None]


def found(secrets: Iterable[str], server: PrefectServer) -> list[tuple[str, str]]:
    """Which of the texts Prefect has kept, and where."""
    needles = {form: secret for secret in secrets for form in disguises(secret)}
    return sorted(
        {
            (secret, where)
            for where, data in kept_by_prefect(server)
            for form, secret in needles.items()
            if form in data
        }
    )


# ------------------------------------------------------------------------------------- the tests


def test_the_run_ends_as_partial_and_says_in_figures_why(stage):
    run = stage.runs["pulled"]
    assert (run["state_type"], run["state_name"]) == ("COMPLETED", "Partial")
    assert run["state"]["message"].startswith(
        "7 rows: 4 archived, 1 partial, 2 not-found; 4 of 5 studies"
    )
    stage.place.audit()


def test_the_worker_needs_no_checkout(stage):
    assert stage.prefect.deployment("pull-cohort/cohort")["pull_steps"] == []
    assert os.listdir(stage.elsewhere) == []


def test_deploying_leaves_nothing_in_the_repository(stage):
    assert checkout() == stage.untouched


def test_a_schedule_that_is_switched_on_has_its_next_runs(stage):
    weekly = stage.prefect.deployment("verify-archive/weekly")["id"]
    runs = stage.prefect.find("flow_runs", deployments={"id": {"any_": [weekly]}})
    assert len(runs) >= 3
    assert {(run["auto_scheduled"], run["state_type"]) for run in runs} == {(True, "SCHEDULED")}
    assert {datetime.fromisoformat(run["expected_start_time"]).weekday() for run in runs} == {6}


def test_names_of_runs_hold_only_numbers(stage):
    names = {
        task["name"]
        for run in stage.runs.values()
        for task in stage.prefect.of_run("task_runs", run["id"])
    }
    assert {name for name in names if not TASK_RUN_NAME.fullmatch(name)} == set()
    assert {"retrieve-000001", "archive-000001"} <= names
    for run in stage.runs.values():
        assert re.fullmatch("pull-[0-9a-f]{12}", run["name"])


def test_the_run_shows_its_progress_and_its_results(stage):
    artifacts = stage.prefect.of_run("artifacts", stage.runs["pulled"]["id"])
    by_type = {artifact["type"]: artifact for artifact in artifacts}
    assert by_type["progress"]["data"] == 100
    assert by_type["progress"]["description"].startswith("7 rows: 4 archived")
    table = by_type["table"]["data"]
    for verdict, rows in (("archived", 4), ("not-found", 2), ("partial", 1)):
        assert f'"rows": {rows}, "verdict": "{verdict}"' in table
    # A link is of type markdown too: the key tells them apart.
    (summary,) = (item["data"] for item in artifacts if item["key"].endswith("-summary"))
    assert "- **2 not-found** (`no-match`): The PACS has no study with" in summary
    assert "results.csv" in summary


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("wild", "cohort-faulty"),
        pytest.param("blocked", "spool-unusable", marks=IN_THE_CAMPAIGN),
        pytest.param("no-archive", "archive-missing", marks=IN_THE_CAMPAIGN),
        ("unknown", "called-ae-title-unknown"),
        ("away", "pacs-refused"),
    ],
)
def test_a_run_that_fails_as_a_whole_says_why(stage, name, code):
    run = stage.runs[name]
    assert run["state_type"] == "FAILED"
    assert code in run["state"]["message"]


def test_the_command_line_is_recorded_by_a_server_too(stage):
    assert stage.runs["away"]["deployment_id"] is None
    assert "(pacs-refused)" in stage.by_hand


def test_events_tell_what_becomes_of_studies_and_why(stage):
    events = reported(stage, "pulled", 5 + 1)
    of_studies = Counter(event["event"] for event in events)
    assert of_studies == {
        "prefect-dicom.study.archived": 4,
        "prefect-dicom.study.failed": 1,
        "prefect-dicom.cohort.finished": 1,
    }
    failed = next(e for e in events if e["event"].endswith("study.failed"))
    study = re.fullmatch(r"prefect-dicom\.study\.(\d+)", failed["resource"]["prefect.resource.id"])
    assert failed["payload"]["study"] == int(study[1])
    assert failed["payload"]["reason"] == "instances-missing"
    assert failed["payload"]["advice"].startswith("`prefect-dicom rerun` requests")
    finished = next(e for e in events if e["event"].endswith("cohort.finished"))
    assert finished["payload"]["rows"] == 7 and finished["payload"]["rows_archived"] == 4


def test_a_node_that_is_disabled_is_told_with_what_to_do(stage):
    disabled = next(
        e for e in reported(stage, "unknown", 2) if e["event"].endswith("node.disabled")
    )
    assert disabled["resource"]["prefect.resource.id"] == "prefect-dicom.node.pacs"
    assert disabled["payload"]["reason"] == "called-ae-title-unknown"
    assert "`called_ae_title`" in disabled["payload"]["advice"]


def test_an_automation_made_of_a_file_calls_a_webhook(stage):
    def calls(name: str) -> list[dict[str, Any]]:
        return [call for call in stage.called if call["event"] == f"prefect-dicom.{name}"]

    until(lambda: len(calls("study.archived")) == 4, "the webhook was called")
    until(lambda: calls("node.disabled"), "the webhook was called for the node")
    until(lambda: len(calls("cohort.finished")) >= 2, "the webhook was called for the ends")
    (failed,) = calls("study.failed")
    assert failed["facts"]["reason"] == "instances-missing"
    assert stage.prefect.find("automations") != []


def reported(stage: Stage, run: str, least: int) -> list[dict[str, Any]]:
    """This package's events of a flow run, when the server has taken in so many."""
    related = {"id": [f"prefect.flow-run.{stage.runs[run]['id']}"]}
    wanted = {"event": {"prefix": ["prefect-dicom."]}, "related": related}

    def events() -> list[dict[str, Any]]:
        return stage.prefect.ask("POST", "/events/filter", json={"filter": wanted})["events"]

    until(lambda: len(events()) >= least, f"the server knows {least} events of {run}")
    return events()


def test_prefect_has_kept_nothing_that_identifies_a_patient(stage):
    assert found(stage.secrets, stage.prefect) == []


def test_the_search_finds_what_prefect_keeps(stage):
    # Short and long, in a name, a parameter and a log.
    kept = {stage.runs["pulled"]["name"], str(stage.place.file), "called-ae-title-unknown"}
    assert {text for text, _ in found(kept, stage.prefect)} == kept


@pytest.mark.parametrize("offset", range(3))
def test_the_search_sees_through_base64(offset):
    secret = "PZQ-000001-X"
    hidden = base64.b64encode(b"a" * offset + secret.encode() + b" and more")
    assert any(form in hidden for form in disguises(secret))


def test_the_cohort_was_really_about_these_patients(stage):
    text = (stage.place.folder / "cohort.csv").read_text()
    assert sum(secret in text for secret in stage.secrets) >= 7
