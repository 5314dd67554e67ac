"""Metrics: one port for all of a host, scraped while work goes on, without a name of anybody.

And nothing at all, where no port is configured.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from prefect_dicom.admission.circuit_breaker import BreakerState
from prefect_dicom.config.receiver import Metrics
from prefect_dicom.core import metrics, metrics_endpoint
from prefect_dicom.core.events import Event
from prefect_dicom.core.model import StudyState, Verdict
from prefect_dicom.network.storage_scp import ReceiverLease, Request, running_receiver
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.monitoring import measured
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import open_dry_run
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support.campaign import only_in
from tests.support.commands import CommandLine
from tests.support.peers import free_port
from tests.support.sites import LOOPBACK, Place, site_around, until

DEPLOYMENTS = Path(__file__).resolve().parents[2] / "deployments"
NAME = re.compile(r"prefect_dicom_[a-z_]+")


class Scrape:
    """What a port tells, parsed; ``scrape(name, label=value)`` adds up what has these labels."""

    def __init__(self, port: int, accept: str = "text/plain") -> None:
        url = f"http://{LOOPBACK}:{port}/metrics"
        request = urllib.request.Request(url, headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as answer:
            self.text = answer.read().decode()
        parse = openmetrics_families if "openmetrics" in accept else text_string_to_metric_families
        self.samples = defaultdict(list)
        families = [family for family in parse(self.text)]
        assert len({family.name for family in families}) == len(families)
        for family in families:
            assert family.documentation
            for sample in family.samples:
                self.samples[sample.name].append(sample)

    def __call__(self, name: str, **labels: str) -> float:
        name = f"prefect_dicom_{name}"
        assert name in self.samples, f"there is no {name}"
        return sum(s.value for s in self.samples[name] if labels.items() <= s.labels.items())

    def processes(self) -> set[str]:
        return {s.labels["process"] for samples in self.samples.values() for s in samples}


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError):
        Scrape(port)
        return True
    return False


class Looking(threading.Event):
    """In place of an event that is waited for: looks instead."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self.look = look

    def wait(self, timeout: float | None = None) -> bool:
        self.look()
        return True


@contextlib.contextmanager
def measured_site(folder: Path, **more) -> Iterator[tuple[Place, int]]:
    port = free_port()
    with site_around(folder, metrics={"port": port}, **more) as place:
        yield place, port


LASTING = {"idle_seconds": 60}


def test_one_port_tells_of_the_run_and_its_receiver_while_they_work_and_after(tmp_path):
    seen: list[Scrape] = []
    look = Looking(lambda: seen.append(Scrape(port)))
    behaviour = Behaviour("net.stall_after", answers=2, hold=look, service="C-MOVE", on_request=1)
    objects = list(tiny_instances(3, instances=2))
    more = {"script": [behaviour], "receiver": LASTING}
    with measured_site(tmp_path, objects=objects, **more) as (place, port):
        assert not is_open(port)
        with place.opened() as pull, measured(pull):
            work_through(pull)
            pull.events.publish(Event(name="study.failed", node="pacs", reason="instances-missing"))
            after = Scrape(port)
            after_as_openmetrics = Scrape(port, "application/openmetrics-text; version=1.0.0")
        # The receiver takes the port, and tells its own.
        until(lambda: is_open(port), "the receiver serves the port")
        alone = Scrape(port)
        with running_receiver(place.site) as lease:
            lease.stop()
        until(lambda: not is_open(port), "nobody serves the port")

    (meanwhile,) = seen
    assert meanwhile.processes() == after.processes() == {"run-1", "receiver-1"}
    assert alone.processes() == {"receiver-1"}

    assert meanwhile("requests") == 1 and after("requests") == 0
    assert meanwhile("runs") == 1
    assert meanwhile("received_objects_total", outcome="kept") >= 1
    assert meanwhile("uploaded_objects_total") == 0

    for scrape in (after, after_as_openmetrics):
        assert scrape("received_objects_total", process="receiver-1", outcome="kept") == 6
        assert scrape("received_objects_total", process="run-1") == 0
        assert scrape("store_seconds_count") == 6
        assert scrape("first_object_seconds_count") == 1
        assert scrape("first_object_seconds_bucket", le="+Inf") == 1
        assert scrape("uploaded_objects_total", outcome="stored") == 6
        assert scrape("upload_seconds_count") == 6
        assert scrape("uploaded_bytes_total") == scrape("received_bytes_total") > 0
        assert scrape("uploads_waiting") == 0
        assert scrape("connections_total", happening="accepted") >= 1
        assert scrape("answer_seconds_count", node="pacs", service="C-MOVE") == 1
        assert scrape("answer_seconds_count", node="pacs", service="C-FIND") >= 2
        assert scrape("node_disabled", node="pacs") == 0
        assert scrape("node_breaker", node="pacs", breaker=BreakerState.CLOSED) == 1
        assert scrape("node_breaker", node="pacs") == 1
        assert scrape("node_window_open", node="pacs") == 1
        assert scrape("spool_free_bytes", process="run-1") > 0
        assert scrape("events_total", event="study.failed", reason="instances-missing") == 1
    assert alone("received_objects_total") == len(objects)


def test_objects_that_come_by_c_get_are_the_runs_own_and_no_label_names_anybody(tmp_path):
    objects = list(tiny_instances(2, instances=2))
    with measured_site(tmp_path, objects=objects, retrieve="c-get") as (place, port):
        with place.opened() as pull, measured(pull):
            work_through(pull)
            scrape = Scrape(port)
            totals = pull.ledger.progress.totals(pull.cohort.number)
        assert not is_open(port)
    assert scrape.processes() == {"run-1"}
    assert scrape("received_objects_total", outcome="kept") == totals.stored == 4
    assert scrape("uploaded_bytes_total") == totals.size_bytes
    assert scrape("studies_to_archive") == 0

    for stored in objects:
        for uid in (stored.study_instance_uid, stored.sop_instance_uid):
            assert uid not in scrape.text
    labels = {key for samples in scrape.samples.values() for s in samples for key in s.labels}
    assert labels <= {
        *("process", "le", "node", "service", "outcome", "event", "reason"),
        *("cohort", "state", "verdict", "happening", "breaker"),
    }


def test_a_cohort_is_told_by_states_and_verdicts(tmp_path):
    with measured_site(tmp_path, objects=tiny_instances(2), retrieve="c-get") as (place, port):
        cohort = place.cohort()
        with place.opened(cohort) as pull:
            work_through(pull)
        # A window on holidays, and no holiday.
        never = {"time_zone": "UTC", "windows": [{"days": ["holidays"]}], "outside": "closed"}
        place.change(node={"access_schedule": never})
        with place.opened(cohort) as pull, measured(pull):
            scrape = Scrape(port)
    assert scrape("node_window_open", node="pacs") == 0
    assert scrape("studies", cohort="1", state=StudyState.ARCHIVED) == 2
    assert scrape("studies") == 2
    assert scrape("rows", cohort="1", verdict=Verdict.ARCHIVED) == 2


def test_a_dry_run_is_measured_and_leaves_a_spool_that_a_pull_takes(tmp_path):
    with measured_site(tmp_path, objects=tiny_instances(1), retrieve="c-get") as (place, port):
        cohort = register_cohort(place.site, place.cohort(), None)
        assert not place.site.spool.path.exists()
        with open_dry_run(place.site, cohort.number) as plan, measured(plan):
            assert Scrape(port).processes() == {"run-1"}
        assert place.site.spool.path.stat().st_mode & 0o077 == 0
        with place.opened():
            pass


def test_a_port_that_another_program_has_stops_no_run(tmp_path, caplog):
    with measured_site(tmp_path, objects=tiny_instances(1), retrieve="c-get") as (place, port):
        place.change(metrics={"bind": "192.0.2.1"})
        with place.opened() as pull, measured(pull):
            work_through(pull)
            totals = pull.ledger.progress.totals(1)
    assert totals.rows == {Verdict.ARCHIVED: 1}
    assert f"cannot listen on port {port}" in caplog.text


def test_without_a_port_nothing_is_counted_and_nothing_is_loaded(tmp_path):
    assert Metrics().port is None
    with site_around(tmp_path, tiny_instances(1), retrieve="c-get") as place:
        with place.opened() as pull, measured(pull):
            assert metrics._live is None
            assert pull.events.subscribers == []
            work_through(pull)
        assert not (place.site.spool.path / "metrics").exists()
    code = "import sys, prefect_dicom.core.metrics; print('prometheus_client' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_what_takes_long_to_find_out_is_not_found_out_at_every_look(monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics_endpoint.time, "monotonic", lambda: now)
    reads = []

    def read() -> int:
        nonlocal now
        now += 2.0
        reads.append(now)
        return len(reads)

    seldom = metrics_endpoint.CachedReading(read)
    assert seldom() == 1
    now += 39
    assert seldom() == 1
    now += 2
    assert seldom() == 2


def test_a_run_that_dies_over_its_requests_is_counted(tmp_path):
    with measured_site(tmp_path, objects=[]) as (place, port), ReceiverLease(place.site):
        until(lambda: is_open(port), "the receiver serves the port")
        assert Scrape(port)("dead_runs_total") == 0
        other = ReceiverLease(place.site)
        Request(other, {"1.2": 1}, "X")
        # Its line breaks, as when it is killed.
        other.close()
        until(lambda: Scrape(port)("dead_runs_total") == 1, "the dead run is counted")
        assert Scrape(port)("runs") == 1


@only_in("operations")
@pytest.mark.timeout(600)
def test_a_flow_is_scraped_while_it_goes_on(tmp_path):
    seen: list[Scrape] = []
    look = Looking(lambda: seen.append(Scrape(port)))
    behaviour = Behaviour("net.stall_after", answers=2, hold=look, service="C-MOVE", on_request=1)
    objects = list(tiny_instances(2, instances=3))
    with measured_site(tmp_path, objects=objects, script=[behaviour]) as (place, port):
        command = CommandLine(tmp_path, tmp_path / "home")
        pull = command.start("pull", place.cohort(), "--site", place.file)
        _, stderr = pull.communicate(timeout=500)
    assert pull.returncode == 0, stderr
    (scrape,) = seen
    assert scrape.processes() == {"run-1", "receiver-1"}
    assert scrape("studies", state=StudyState.ARCHIVED, cohort="1") == 0
    assert scrape("studies", cohort="1") == 2
    assert scrape("received_objects_total", outcome="kept") >= 1
    assert scrape("answer_seconds_count", service="C-FIND") >= 1


def test_whatever_opens_a_run_measures_it():
    package = DEPLOYMENTS.parent / "src" / "prefect_dicom"
    openings = [
        line
        for file in package.rglob("*.py")
        for line in re.findall(r"^ *with .*open_(?:dry_)?run\(.*$", file.read_text(), re.MULTILINE)
    ]
    assert len(openings) >= 4
    assert [line for line in openings if "measured(" not in line] == []


# --------------------------------------------------------------- dashboard and alert rules


def names_that_exist() -> set[str]:
    """Every name a sample may have."""
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    metrics.Instruments(registry)
    names = set(metrics.READ)
    for family in registry.collect():
        endings = {
            "counter": ["_total"],
            "histogram": ["_bucket", "_count", "_sum"],
            "gauge": [""],
        }[family.type]
        names.update(family.name + ending for ending in endings)
    return names


def expressions(file: Path) -> list[str]:
    """All PromQL of a dashboard or of a file of rules."""
    found = []

    def look(value: object) -> None:
        if isinstance(value, dict):
            found.extend(v for k, v in value.items() if k in ("expr", "query", "definition"))
            for inner in value.values():
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    text = file.read_text(encoding="utf-8")
    look(json.loads(text) if file.suffix == ".json" else yaml.safe_load(text))
    return [expression for expression in found if isinstance(expression, str)]


@pytest.mark.parametrize("name", ["grafana-dashboard.json", "prometheus-rules.yaml"])
def test_dashboard_and_rules_name_metrics_that_exist(name):
    found = expressions(DEPLOYMENTS / name)
    assert len(found) >= 5
    used = {metric for expression in found for metric in NAME.findall(expression)}
    assert used <= names_that_exist()
