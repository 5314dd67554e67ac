"""What deployments/ holds can be deployed: every entry point, parameter, schedule and queue.

The campaign does it: from a clean clone, against a server, with a worker that knows nothing but
the built wheel, until a schedule fires.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from prefect import Flow
from prefect.client.schemas.schedules import CronSchedule
from prefect.settings.legacy import _get_settings_fields
from prefect.settings.models.root import Settings
from prefect.utilities.importtools import import_object

from prefect_dicom import flows
from prefect_dicom.config.site import Site
from prefect_dicom.core.model import StudyState
from prefect_dicom.server.provision import QUEUE, deployments_of, local_time_zone
from prefect_dicom.server.settings import MARK, settings_of
from prefect_dicom.server.supervisor import POOL
from tests.support.campaign import only_in
from tests.support.prefect_server import ROOT, PrefectServer
from tests.support.sites import LOOPBACK, site_around, study, until

FILE = ROOT / "deployments" / "prefect.yaml"
DEPLOYMENTS = yaml.safe_load(FILE.read_text())["deployments"]


def named(deployment: dict) -> str:
    return f"{import_object(deployment['entrypoint']).name}/{deployment['name']}"


@pytest.fixture(scope="module")
def site() -> Site:
    node = {"host": LOOPBACK, "port": 104, "called_ae_title": "ANY"}
    return Site(nodes={"main": node}, archive={"directory": "/a"}, spool={"path": "/s"})


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=named)
def test_its_entry_point_is_a_flow_that_takes_its_parameters(deployment):
    flow = import_object(deployment["entrypoint"])
    assert isinstance(flow, Flow)
    # Also that none is missing: a schedule asks nobody.
    flow.validate_parameters(deployment["parameters"])
    signature = flow.parameters.properties
    assert set(flow.parameters.required) <= deployment["parameters"].keys() <= signature.keys()


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=named)
def test_its_schedules_wait_to_be_switched_on(deployment):
    assert deployment["schedules"]
    for schedule in deployment["schedules"]:
        assert schedule["active"] is False
        # Prefect finds a schedule again by it when it is deployed again.
        assert schedule["slug"]
        CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=named)
def test_what_asks_a_pacs_stands_in_the_queue_with_the_limit(deployment):
    pool = deployment["work_pool"]
    asks = deployment["entrypoint"] != "prefect_dicom.flows.verify_archive.verify_archive"
    assert (pool["name"], pool.get("work_queue_name")) == (POOL, QUEUE if asks else None)
    # Leases die with a server that keeps them in memory, and Prefect crashes the run.
    assert "concurrency_limit" not in deployment


def test_every_flow_is_deployed():
    assert {import_object(d["entrypoint"]) for d in DEPLOYMENTS} == {
        getattr(flows, name) for name in flows.__all__
    }


def test_a_machine_without_a_server_gets_the_same(site, tmp_path):
    own = {d.full_name: d for d in deployments_of(site, tmp_path / "site.yaml")}
    shipped = {named(deployment): deployment for deployment in DEPLOYMENTS}
    assert own.keys() == shipped.keys()
    for name, deployment in own.items():
        other = shipped[name]
        assert deployment.entrypoint == other["entrypoint"]
        assert deployment.work_queue_name == other["work_pool"].get("work_queue_name")
        assert deployment.parameters["site"] == str(tmp_path / "site.yaml")
        flow = import_object(deployment.entrypoint)
        assert deployment.parameters.keys() <= flow.parameters.properties.keys()
        for schedule in deployment.schedules:
            assert not schedule.active
            assert schedule.slug == other["schedules"][0]["slug"]
            assert schedule.schedule.cron == other["schedules"][0]["cron"]


def test_several_nodes_have_a_nightly_run_each(site, tmp_path):
    node = site.nodes["main"]
    several = site.model_copy(update={"nodes": {"main": node, "old": node}})
    new = [d for d in deployments_of(several, tmp_path) if d.flow_name == "archive-new"]
    assert [(d.name, d.parameters["node"]) for d in new] == [
        ("new-main", "main"),
        ("new-old", "old"),
    ]


def test_every_setting_of_that_server_is_one_that_prefect_knows(tmp_path):
    known = _get_settings_fields(Settings)
    settings = settings_of(tmp_path, 4711, {})
    assert {name for name in settings if name not in known} == {"DO_NOT_TRACK", MARK}


@pytest.mark.parametrize("name", ["Europe/Berlin", ":America/New_York"])
def test_schedules_go_by_the_clock_of_the_host(monkeypatch, name):
    monkeypatch.setenv("TZ", name)
    assert local_time_zone() == name.removeprefix(":")
    CronSchedule(cron="0 1 * * *", timezone=local_time_zone())


# ---------------------------------------------------------------------------------- the campaign


def output_of(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commands_of_the_guide() -> list[list[str]]:
    """What is to be typed for a server of one's own, without ``prefect``."""
    guide = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = guide.split("\n## Deployments\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("prefect ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_guide_and_the_file_itself_say_how_to_deploy():
    commands = commands_of_the_guide()
    assert [words[0] for words in commands] == ["work-pool", "work-queue", "--no-prompt"]
    comment = FILE.read_text(encoding="utf-8").split("\nname:")[0]
    for words in commands:
        assert f"#   prefect {shlex.join(words)}\n" in comment


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The repository as it is committed, and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone of the repository")
    output_of("git", "clone", "--quiet", ROOT, "clone", cwd=folder)
    return folder / "clone"


@pytest.fixture(scope="module")
def installed(clone, tmp_path_factory) -> Path:
    """A folder into which the wheel of that clone is installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    alone = ("--no-deps", "--no-index", "--root-user-action", "ignore")
    output_of(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist"),
        *("."),
        cwd=clone,
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    output_of(*pip, *alone, "--target", folder / "site", wheel, cwd=folder)
    return folder / "site"


@pytest.mark.timeout(1500)
@only_in("operations")
def test_a_schedule_fires_on_a_worker_of_the_wheel_as_deployed_from_a_clean_clone(
    clone, installed, tmp_path
):
    for name in ("prefect", "elsewhere", "site"):
        (tmp_path / name).mkdir()
    yesterday = f"{date.today() - timedelta(1):%Y%m%d}"
    objects = [each for seed in range(3) for each in study(seed, StudyDate=yesterday)]
    with site_around(tmp_path / "site", objects) as place, PrefectServer(tmp_path / "prefect") as s:
        for words in commands_of_the_guide():
            s.run(*words, cwd=clone)
        assert output_of("git", "status", "--porcelain", cwd=clone) == ""
        for deployment in DEPLOYMENTS:
            known = s.deployment(named(deployment))
            assert known["pull_steps"] == []
            assert known["parameters"] == deployment["parameters"]

        s.environment["PYTHONPATH"] = str(installed)
        worker = ("worker", "start", "--pool", "dicom", "--limit", "2")
        s.start("worker", "prefect", *worker, cwd=tmp_path / "elsewhere")
        number = s.deployment("archive-new/new")["id"]
        parameters = {"site": str(place.file), "days": 2}
        every = {"interval": 60, "anchor_date": datetime.now(UTC).isoformat()}
        s.ask(
            "POST",
            f"/deployments/{number}/schedules",
            json=[{"schedule": every, "active": True, "parameters": parameters, "slug": "soon"}],
        )

        def fired() -> list[dict]:
            runs = s.find("flow_runs", deployments={"id": {"any_": [number]}})
            return [run for run in runs if run["start_time"]]

        until(fired, "a schedule has fired", 600)
        run = s.finished(fired()[0]["id"], 600)
        assert run["auto_scheduled"] is True
        assert (run["state_type"], run["state_name"]) == ("COMPLETED", "Completed"), s.log("worker")
        assert [known.state for known in place.studies().values()] == [StudyState.ARCHIVED] * 3
        place.audit()
        # From the wheel, and from nowhere else.
        asked = [sys.executable, "-c", "import prefect_dicom; print(prefect_dicom.__file__)"]
        environment = {**os.environ, **s.environment}
        said = subprocess.check_output(asked, env=environment, cwd=tmp_path / "elsewhere")
        assert Path(said.decode().strip()).is_relative_to(installed)
