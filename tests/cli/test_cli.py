"""The command line as users meet it: help, faults, exit codes, JSON, and a Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from prefect_dicom.cli import Exit
from prefect_dicom.core.model import StudyState, Verdict
from prefect_dicom.ledger import Totals
from prefect_dicom.report import finished_fraction, next_count
from prefect_dicom.run.progress import Pace, format_progress
from prefect_dicom.testing import Behaviour
from prefect_dicom.testing.tiny import tiny_instances
from tests.support.campaign import only_in
from tests.support.commands import CommandLine
from tests.support.s3_server import S3Server
from tests.support.sites import credentials, site_around, until

SLOW_TO_IMPORT = {"prefect", "pandas", "pyarrow", "numpy", "pynetdicom", "pydicom", "boto3"}
COMMANDS = {
    "demo": ["--studies"],
    "doctor": ["--site", "--node", "--study", "--accession", "--patient", "--json"],
    "pull": ["COHORT", "--site", "--node", "--name", "--json"],
    "status": ["COHORT", "--site", "--json"],
    "why": ["COHORT", "LINE", "--site", "--json"],
    "report": ["COHORT", "--with-identifiers", "--site", "--json"],
    "rerun": ["COHORT", "--site", "--reason", "--node", "--line", "--json"],
    "pause": ["COHORT", "--site", "--json"],
    "resume": ["COHORT", "--site", "--json"],
    "cancel": ["COHORT", "--site", "--json"],
    "prioritise": ["COHORT", "PRIORITY", "--site", "--json"],
    "verify": ["COHORT", "--site", "--level", "exists", "size", "checksum", "read", "--json"],
    "rebuild-ledger": ["--site", "--level", "exists", "size", "checksum", "read", "--json"],
    "quarantine list": ["--site", "--reason", "--json"],
    "quarantine show": ["NAME", "--with-identifiers", "--site", "--json"],
    "quarantine release": ["NAMES", "--all", "--reason", "--site", "--json"],
    "quarantine drop": ["NAMES", "--all", "--reason", "--yes", "--site"],
    "receiver run": ["--site"],
    "receiver status": ["--site", "--json"],
    "receiver stop": ["--site"],
    "explain": ["CODE"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def command(tmp_path, home) -> CommandLine:
    return CommandLine(tmp_path, home)


@pytest.fixture
def place(tmp_path):
    """A site around a PACS of three studies with two instances each; C-GET needs no receiver."""
    with site_around(tmp_path, tiny_instances(3, instances=2), retrieve="c-get") as place:
        yield place


# --- status


def test_status_says_of_pending_rows_that_a_run_is_at_work_on_them(place, command):
    with place.opened() as run:
        run.reporting.record_waits("waiting for a test")
        living = command("status", "1")
    assert "a run is at work on it (waiting for a test)" in " ".join(living.output.split())
    ended = command("status", "1")
    assert "a run is at work" not in " ".join(ended.output.split())


# --- help


def test_help_names_every_command_in_the_order_of_use(command):
    ended = command("--help")
    assert ended.code == 0
    lines = ended.output.splitlines()
    named = [line.split()[1] for line in lines if line.startswith("│ ") and "--" not in line]
    assert named == [
        *("demo", "doctor", "pull", "archive-new", "status", "why", "report"),
        *("cancel", "pause", "prioritise", "rerun", "resume", "deliver"),
        *("verify", "rebuild-ledger", "quarantine", "deidentify"),
        *("receiver", "explain", "up", "down"),
    ]
    assert not ended.modules & SLOW_TO_IMPORT


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_its_options_without_loading_an_engine(command, name):
    ended = command(*name.split(), "--help")
    assert ended.code == 0
    assert [word for word in COMMANDS[name] if word not in ended.output] == []
    assert "--no-" not in ended.output and "--empty-" not in ended.output
    assert not ended.modules & (SLOW_TO_IMPORT | {"sqlalchemy"})


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["pul", "cohort.csv"], 'Did you mean "pull"'),
        (["pull"], "COHORT"),
        (["rerun", "1", "--resaon", "no-match"], "--reason"),
        (["verify", "1", "--level", "all"], "checksum"),
    ],
)
def test_a_mistyped_command_is_told_apart_from_rows_that_are_not_archived(command, arguments, hint):
    ended = command(*arguments)
    assert ended.code == Exit.CONFIGURATION
    assert hint in ended.stderr


# --- faults in what the user wrote


def test_all_faults_of_a_site_file_are_told_at_once(command, place):
    (command.folder / "faulty.yaml").write_text(
        "nodes:\n  main: {host: 0.0.0.0, port: 99999, called_ae_title: "
        f"{'X' * 17}}}\narchive: {{directory: a, bucket: b}}\nspoool: {{path: s}}\n"
    )
    cohort = place.cohort()
    before = set(command.folder.iterdir())
    for arguments in (["pull", cohort], ["doctor"], ["rerun", "1"]):
        ended = command(*arguments, "--site", "faulty.yaml")
        assert ended.code == Exit.CONFIGURATION
        for key in ("main.host", "main.port", "called_ae_title", "archive", "spoool"):
            assert key in ended.stderr
        assert "faults" in ended.stderr and "Traceback" not in ended.stderr
        assert not ended.modules & {"prefect", "boto3"}
        assert ended.output == ""
    assert set(command.folder.iterdir()) == before
    assert place.asked_for() == 0


def test_all_faults_of_a_cohort_file_are_told_before_anything_is_started(command, place):
    cohort = command.folder / "cohort.csv"
    cohort.write_text(
        "PatientID,StudyInstanceUID,StudyDate,Modality\n"
        "***,,,CT\n"
        ",1.2.*,,CT\n"
        ",,20240101,CT\n"
        "Jane^Doe?,,20249999,CT\n"
        "000123,,20240301-20240101,CT\n"
        "000124,,,CT\n"
    )
    ended = command("pull", cohort)
    assert ended.code == Exit.CONFIGURATION
    for line in (2, 3, 4, 5, 6):
        assert f"line {line}" in ended.stderr
    assert "line 7" not in ended.stderr
    assert "Jane" not in ended.stderr and "000123" not in ended.stderr
    assert "prefect" not in ended.modules
    assert place.asked_for() == 0
    assert command("status", "--json").result == []


def test_a_cohort_file_without_a_known_column_is_refused(command, place):
    (command.folder / "cohort.csv").write_text("Name,Birthday\nDoe,1950\n")
    ended = command("pull", "cohort.csv")
    assert ended.code == Exit.CONFIGURATION
    assert "PatientID" in ended.stderr
    assert command("pull", "missing.csv").code == Exit.CONFIGURATION
    assert place.asked_for() == 0


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["rerun", "17"], "cohort-unknown"),
        (["status", "nobody"], "cohort-unknown"),
        (["verify", "nobody"], "cohort-unknown"),
        (["rerun", "1", "--reason", "no-mach"], "did you mean no-match?"),
        (["rerun", "1", "--node", "west"], "there are pacs"),
        (["pull", "cohort.csv", "--node", "west"], "pacs"),
        (["doctor", "--node", "west"], "there are pacs"),
        (["doctor", "--study", ""], "--study"),
        (["doctor", "--patient", "***"], "would select other studies"),
        (["doctor", "--accession", "A\\B"], "would select other studies"),
    ],
)
def test_an_option_that_means_nothing_is_refused_before_the_pacs_is_asked(
    command, place, arguments, hint
):
    place.cohort()
    ended = command(*arguments)
    assert ended.code == Exit.CONFIGURATION
    assert hint in ended.stderr
    assert "Traceback" not in ended.stderr
    assert place.asked_for() == 0


def test_an_archive_that_is_missing_is_told_before_anything_is_started(
    command, place, monkeypatch, tmp_path_factory
):
    (place.folder / "archive").rmdir()
    for arguments in (["pull", str(place.cohort())], ["rerun", "1"], ["archive-new"]):
        ended = command(*arguments)
        assert ended.code == Exit.CONFIGURATION
        assert "(archive-missing)" in ended.stderr
        assert "prefect" not in ended.modules
    with S3Server() as bucket:
        credentials(bucket, monkeypatch)
        archive = {"bucket": bucket.bucket, "endpoint": bucket.endpoint, "directory": None}
        place.change(archive=archive)
        for refuse, code in (
            (lambda: bucket.refuse("if-none-match", status=501), "archive-overwrites"),
            (bucket.remove_bucket, "archive-missing"),
        ):
            refuse()
            ended = command("rerun", "1")
            assert ended.code == Exit.CONFIGURATION
            assert f"({code})" in ended.stderr
            assert "prefect" not in ended.modules
            bucket.behave()
    assert place.asked_for() == 0


def test_a_spool_that_others_can_read_is_told_before_anything_is_started(command, place):
    place.site.spool.path.mkdir(mode=0o755)
    place.site.spool.path.chmod(0o755)
    ended = command("pull", place.cohort())
    assert ended.code == Exit.CONFIGURATION
    assert "(spool-unsafe)" in ended.stderr
    assert "prefect" not in ended.modules


def test_a_prefect_server_that_is_away_is_named_and_nothing_is_sent(command, place):
    ended = command("pull", place.cohort(), PREFECT_API_URL="http://127.0.0.1:9/api")
    assert ended.code == Exit.CONFIGURATION
    assert "Prefect's server does not answer" in ended.stderr
    assert "PREFECT_API_URL" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert place.asked_for() == 0


def test_a_home_that_cannot_be_written_is_named_within_seconds(command, place):
    nowhere = place.folder / "nowhere"
    nowhere.write_text("not a folder")
    (place.folder / "prefect-home").write_text("neither")
    homes = {"HOME": str(nowhere)}
    for variables in ({**homes, "PREFECT_HOME": ""}, {"PREFECT_HOME": str(nowhere)}):
        ended = command("pull", place.cohort(), **variables)
        assert ended.code == Exit.CONFIGURATION
        assert "PREFECT_HOME" in ended.stderr and str(nowhere) in ended.stderr
        assert "prefect" not in ended.modules
        assert place.asked_for() == 0


def test_the_doctor_tries_what_a_pull_needs_of_prefect(command, place, prefect_api):
    proxy = {"HTTPS_PROXY": "http://proxy.example:8080"}
    ended = command("doctor", "--json", **prefect_api, **proxy)
    checks = {
        finding["check"]: finding
        for finding in ended.result["findings"]
        if finding["part"] == "prefect"
    }
    assert list(checks) == ["its home can be written", "proxy", "its server answers"]
    assert all(finding["ok"] and not finding["advice"] for finding in checks.values())
    assert "HTTPS_PROXY" in checks["proxy"]["words"]


def test_the_doctor_says_that_no_server_is_needed_and_what_was_not_recorded(command, place):
    journals = command.home / "prefect" / "prefect-dicom" / "journals"
    journals.mkdir(parents=True)
    (journals / "1.failed").touch()
    ended = command("doctor")
    assert "runs are recorded: without a server" in ended.output
    assert "1 runs could not be recorded" in ended.output
    assert "prefect" not in ended.modules


def test_the_doctor_finds_a_server_that_is_away_and_a_home_that_is_none(command, place):
    away = command("doctor", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert away.code == Exit.NOT_ALL
    assert "(prefect-unavailable: 127.0.0.1:9 (ConnectError))" in away.output
    (place.folder / "nowhere").write_text("not a folder")
    homeless = command("doctor", PREFECT_HOME=str(place.folder / "nowhere"))
    assert homeless.code == Exit.NOT_ALL
    assert "its home can be written: " in homeless.output
    assert "prefect" not in homeless.modules


# --- a cohort's life


def test_status_knows_no_cohort_yet_and_loads_no_engine(command, place):
    ended = command("status")
    assert ended.code == 0
    assert "No cohort yet" in ended.stderr
    assert not ended.modules & SLOW_TO_IMPORT


def test_a_dry_run_says_what_a_pull_would_take_and_takes_nothing(command, place, prefect_api):
    cohort = place.cohort([{"PatientID": "00000001"}, {"PatientID": "no such patient"}])
    ended = command("pull", cohort, "--dry-run", **prefect_api)
    assert ended.code == 2
    assert "1 row found" in ended.output
    assert "1 row not-found" in ended.output
    assert "1 studies, 2 instances, 1.0 MB: about 0 s of running" in ended.output
    assert place.asked_for("C-GET") == 0
    asked = place.asked_for()
    again = command("pull", cohort, "--dry-run", "--json", **prefect_api)
    assert (again.code, place.asked_for()) == (2, asked)
    assert again.result["rows"] == {"found": 1, "not-found": 1}
    assert again.result["instances"] == 2
    assert again.result["modalities"][0]["modality"] == "OT"
    written = {path.name for path in Path(again.result["reports"]).iterdir()}
    assert written >= {"estimate.parquet", "estimate.csv", "results.csv"}
    assert list((place.folder / "archive").iterdir()) == []


def test_exit_codes_and_json_tell_what_became_of_a_cohort(command, place, prefect_api):
    uid = place.pacs.holdings.study_instance_uids()[0]
    (late,) = tiny_instances(1, seed=9)
    rows = [{"StudyInstanceUID": uid}, {"StudyInstanceUID": late.study_instance_uid}]
    cohort = place.cohort(rows)

    pulled = command("pull", cohort, "--name", "trial", "--json", **prefect_api)
    assert pulled.code == Exit.NOT_ALL
    result = pulled.result
    assert {key: result[key] for key in ("cohort", "number", "node")} == {
        "cohort": "trial",
        "number": 1,
        "node": "pacs",
    }
    assert result["rows"] == {"archived": 1, "not-found": 1}
    assert result["studies"] == {"archived": 1}
    assert result["expected_instances"] == result["archived_instances"] == 2
    assert result["size_bytes"] > 0
    reasons = {row["reason"]: row for row in result["reasons"]}
    assert reasons.keys() == {"all-archived", "no-match"}
    assert all(row["meaning"] and row["what_to_do"] for row in reasons.values())
    assert (Path(result["reports"]) / "results.csv").is_file()
    assert "error" not in result

    assert command("status", "trial", "--json").result == result
    assert command("status", "trial").code == Exit.NOT_ALL
    overview = command("status")
    assert overview.code == 0
    assert overview.output.startswith("1  trial (pacs): 2 rows: 1 archived, 1 not-found;")
    assert command("status", "--json").result[0]["rows"] == result["rows"]

    # The missing study turns up, and exactly these failures are tried again.
    place.pacs.holdings.add(late)
    again = command("rerun", "1", "--reason", "no-match", "--json", **prefect_api)
    assert (again.code, again.result["rows"]) == (Exit.ALL_WELL, {"archived": 2})
    shown = command("status", "1")
    assert shown.code == Exit.ALL_WELL
    assert "Results:" in shown.output and "rerun" not in shown.output

    verified = command("verify", "trial", "--json")
    assert verified.code == Exit.ALL_WELL
    assert verified.result == {"level": "checksum", "studies": 2, "instances": 3, "faulty": []}
    object_file = next(path for path in (place.folder / "archive").rglob("*.dcm"))
    object_file.unlink()
    damaged = command("verify", "trial", "--level", "exists")
    assert damaged.code == Exit.NOT_ALL
    assert "1 archive-object-missing" in damaged.output
    reported = command("verify", "trial", "--level", "exists", "--json").result["faulty"]
    assert [study["faults"] for study in reported] == [{"archive-object-missing": 1}]

    for ended in (pulled, again, overview, shown, verified, damaged):
        assert uid not in ended.output + ended.stderr
        assert "Traceback" not in ended.stderr


@contextlib.contextmanager
def pull_in_its_middle(command, **variables):
    """A pull whose PACS has fallen silent after two instances: the site, and the process."""
    hold = threading.Event()
    # The first C-FIND has one answer only: what stalls is the first C-MOVE.
    stall = Behaviour("net.stall_after", answers=2, on_request=1, hold=hold)
    objects = tiny_instances(3, instances=2)
    with site_around(command.folder, objects, script=[stall]) as place:
        process = command.start("pull", place.cohort(), "--json", **variables)
        with _killed_in_the_end(process):
            until(lambda: place.pacs.sent_instances()[1:], "two instances are sent", 240)
            yield place, process
        hold.set()


def all_processes_of(process: subprocess.Popen) -> set[int]:
    """A process and all that it has started, in whatever group or session they are."""
    found = {process.pid}
    while True:
        others = {
            int(path.name)
            for path in Path("/proc").glob("[0-9]*")
            if parent_of(int(path.name)) in found
        }
        if others <= found:
            return found
        found |= others


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@only_in("operations")
def test_a_pull_that_a_signal_to_all_has_ended_is_completed_by_a_rerun(
    command, prefect_api, number
):
    with pull_in_its_middle(command, PREFECT_LOGGING_LEVEL="ERROR") as (place, process):
        # It has embedded a server, which gets the signal as well.
        everything = all_processes_of(process)
        assert len(everything) >= 2
        begun = time.monotonic()
        for pid in everything:
            os.kill(pid, number)
        output, stderr = process.communicate(timeout=60)
        assert process.returncode == Exit.INTERRUPTED, stderr
        # Two seconds with a machine of its own.
        assert time.monotonic() - begun < 10
        assert "Interrupted" in stderr and "Traceback" not in stderr
        assert max(map(len, stderr.splitlines())) < 300
        result = json.loads(output)
        assert result["error"] == "interrupted"
        assert result["rows"] == {"pending": 3}
        assert [row["reason"] for row in result["reasons"]] == ["interrupted"]
        with place.ledger() as ledger:
            assert ledger.claims.live() == []
        assert command("status", "1").code == Exit.NOT_ALL

        place.pacs.script.clear()
        again = command("rerun", "1", "--json", **prefect_api)
        assert (again.code, again.result["rows"]) == (Exit.ALL_WELL, {"archived": 3})
        place.audit()


def test_a_process_with_prefect_in_it_ends_without_taking_its_modules_apart(tmp_path):
    # That takes Python more than a second of CPU, for which whoever has interrupted a run waits.
    script = """
import atexit, sys
from prefect_dicom.cli import main
class Apart:
    def __del__(self): print("taken apart")
sys.modules["prefect"] = Apart()
sys.argv[1:] = ["explain", "no-match"]
try: main()
finally: atexit.register(print, "a handler of after", end="", flush=False)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ended.returncode == Exit.ALL_WELL and "no-match" in ended.stdout
    assert ended.stdout.endswith("a handler of after") and ended.stderr == ""


def test_a_terminated_pull_ends_in_order_too(command, prefect_api):
    with pull_in_its_middle(command, **prefect_api) as (place, process):
        process.terminate()
        output, stderr = process.communicate(timeout=60)
        assert process.returncode == Exit.INTERRUPTED, stderr
        assert "Traceback" not in stderr
        assert json.loads(output)["rows"] == {"pending": 3}
        with place.ledger() as ledger:
            assert ledger.claims.live() == []


@only_in("operations")
def test_a_pull_can_be_paused_and_cancelled_from_anywhere(command, prefect_api):
    with pull_in_its_middle(command, **prefect_api) as (place, process):
        paused = command("pause", "1")
        assert (paused.code, paused.stderr) == (Exit.ALL_WELL, "")
        assert "Cohort 1: paused, 1 run waiting to be resumed." in paused.output
        assert "Go on with: prefect-dicom resume" in paused.output
        assert not paused.modules & SLOW_TO_IMPORT
        asked = place.asked_for()
        shown = command("status", "1", "--json").result
        assert (shown["paused"], shown["priority"]) == (True, 0)
        assert [(run["kind"], run["waits"]) for run in shown["runs"]] == [("pull", True)]
        cancelled = command("cancel", "1")
        assert (cancelled.code, cancelled.stderr) == (Exit.ALL_WELL, "")
        assert "Cohort 1: paused, no run under way." in cancelled.output
        output, stderr = process.communicate(timeout=60)
        assert process.returncode == Exit.INTERRUPTED, stderr
        assert "Traceback" not in stderr
        assert re.search(r"studies archived; .*, paused$", stderr, re.MULTILINE)
        assert json.loads(output)["error"] == "interrupted"
        resumed = command("resume", "1")
        assert resumed.output.startswith(
            "Cohort 1: no run under way.\nGo on with: prefect-dicom rerun"
        )
        command("prioritise", "1", "7")
        assert "priority 7, no run under way" in command("status").output
        assert place.asked_for() == asked
        place.audit()
        place.pacs.script.clear()
        place.goes_on()


@contextlib.contextmanager
def _killed_in_the_end(process: subprocess.Popen):
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# --- the display


def totals(pending: int, listed: int, archived: int, *, expected: int, stored: int) -> Totals:
    states = {
        StudyState.PENDING: pending,
        StudyState.LISTED: listed,
        StudyState.ARCHIVED: archived,
    }
    rows = Counter({Verdict.PENDING: pending + listed, Verdict.ARCHIVED: archived})
    return Totals(rows, Counter(states), expected, 0, stored, 0, stored * 1000)


def test_progress_is_of_all_studies_not_of_those_that_are_listed_already():
    begun = totals(980, 20, 0, expected=2000, stored=1990)
    assert 0.019 < finished_fraction(begun) < 0.02
    assert finished_fraction(totals(0, 1, 999, expected=9999, stored=9999)) < 1
    assert finished_fraction(totals(0, 0, 1000, expected=9999, stored=9999)) == 1


def test_the_time_left_counts_from_where_this_run_began():
    pace = Pace()
    pace.note(0.0, totals(0, 0, 0, expected=0, stored=0))
    # Half was archived before; a tenth more takes ten seconds.
    pace.note(100.0, totals(50, 0, 50, expected=500, stored=500))
    assert pace.seconds_left() is None
    assert pace.rates() == (0, 0)
    pace.note(110.0, totals(40, 0, 60, expected=600, stored=600))
    assert pace.seconds_left() == pytest.approx(40)
    assert pace.rates() == (10, 10_000)


def test_a_cohort_that_takes_long_to_count_is_counted_less_often():
    assert next_count(100.0, 100.02, 1.0) == 101.0
    assert next_count(100.0, 103.0, 1.0) == 160.0
    pace = Pace()
    pace.note(0.0, totals(100, 0, 0, expected=0, stored=0))
    pace.note(60.0, totals(40, 0, 60, expected=600, stored=600))
    assert pace.rates() == (10, 10_000)


def test_the_line_of_figures_says_what_is_going_on():
    pace = Pace()
    looking = Totals(Counter({Verdict.PENDING: 7}), Counter(), 0, 0, 0, 0, 0)
    assert format_progress(looking, pace) == "finding the studies of 7 rows"
    pace.note(0.0, totals(4, 0, 0, expected=0, stored=0))
    under_way = totals(1, 1, 2, expected=40, stored=30)
    pace.note(10.0, under_way)
    assert format_progress(under_way, pace) == (
        "2 of 4 studies archived; 30 instances, 3/s, 3.0 kB/s"
    )


def test_a_port_that_is_taken_ends_a_pull_before_prefect_starts(command, tmp_path):
    with (
        site_around(tmp_path, tiny_instances(1)) as place,
        socket.create_server(("127.0.0.1", place.site.receiver.port)),
    ):
        ended = command("pull", place.cohort())
        assert ended.code == Exit.CONFIGURATION
        assert "cannot listen on port" in ended.stderr and "prefect" not in ended.modules
        assert place.asked_for() == 0
