"""Events tell what happens in numbers and reason codes, and disturb nobody."""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from prefect.blocks.notifications import SlackWebhook
from prefect.events.schemas.automations import AutomationCore

from prefect_dicom.archive.spool import Spool
from prefect_dicom.core.events import AUTOMATIONS, EVENTS, Event, EventBus
from prefect_dicom.run.engine import EndName
from prefect_dicom.run.loop import PullLoop, work_through
from prefect_dicom.tasks import events
from prefect_dicom.testing import tiny_instances
from tests.support.sites import Place, site_around, until
from tests.support.walking import Walk

ROOT = Path(__file__).resolve().parents[2]
GIB = 1024**3


@pytest.mark.parametrize(
    "fault",
    [
        {"name": "study.lost"},
        {"name": "study.failed", "reason": "Zyxquordt^Immanuela"},
        {"name": "study.failed", "figures": {"patient": "Zyxquordt^Immanuela"}},
        {"name": "study.failed", "at": datetime(2026, 1, 1)},
    ],
)
def test_an_event_has_no_room_for_anything_but_numbers_and_codes(fault):
    with pytest.raises(ValueError) as caught:
        Event(**fault)
    assert "Zyxquordt" not in str(caught.value)


# --- who is told


@pytest.fixture
def place(tmp_path) -> Iterator[Place]:
    with site_around(tmp_path, tiny_instances(2), retrieve="c-get") as place:
        yield place


def test_a_subscriber_that_fails_disturbs_neither_the_run_nor_the_others(place, caplog):
    reported: list[str] = []

    def fail(event: Event) -> None:
        raise RuntimeError("Zyxquordt^Immanuela")

    with place.opened() as pull:
        pull.events.subscribe(fail)
        pull.events.subscribe(lambda event: reported.append(event.name))
        work_through(pull)
    assert reported == ["study.archived"] * 2
    assert "no subscriber got study.archived: RuntimeError" in caplog.text
    assert "Zyxquordt" not in caplog.text
    place.is_whole()


class Disks:
    """The disks of the spool and the archive, as full as the test says, in bytes."""

    def __init__(self, place: Place, monkeypatch) -> None:
        self.spool = self.archive = 5 * GIB
        usage = namedtuple("usage", "free")
        monkeypatch.setattr(Spool, "free_bytes", lambda spool: self.spool - spool.reserve_bytes)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(self.archive))
        place.change(spool={"reserve_bytes": GIB})


def test_one_event_is_sent_before_a_disk_is_full(place, monkeypatch):
    disks, sent, walk = Disks(place, monkeypatch), [], Walk()
    with place.opened(clock=walk) as pull:
        pull.events.subscribe(sent.append)
        for spool, archive in ((5, 5), (1.5, 5), (1.4, 0.5), (5, 5), (1.5, 5)):
            disks.spool, disks.archive = int(spool * GIB), int(archive * GIB)
            pull.disks.look()
            pull.disks.look()
            walk.seconds += 30
    assert [(e.name, e.reason, e.figures["free_bytes"] / GIB) for e in sent] == [
        ("disk.low", "spool-full", 0.5),
        ("disk.low", "archive-full", 0.5),
        ("disk.low", "spool-full", 0.5),
    ]


def test_a_run_warns_of_its_disks_while_it_is_under_way(place, monkeypatch):
    disks, sent = Disks(place, monkeypatch), []
    disks.spool = disks.archive = GIB + GIB // 2
    with place.opened() as run:
        run.events.subscribe(sent.append)
        loop = PullLoop(
            run=run,
            discover=lambda first, last: None,
            pull=lambda: None,
            show=lambda count, waits="", *, now=False: None,
            say=lambda words: None,
            limits=contextlib.nullcontext,
        )
        loop.work_through()
    assert [(e.name, e.reason) for e in sent if e.name == "disk.low"] == [
        ("disk.low", "spool-full")
    ]


def test_a_disk_that_cannot_be_read_does_not_stop_a_run(place, monkeypatch):
    Disks(place, monkeypatch)

    def fail(path: Path) -> None:
        raise OSError

    monkeypatch.setattr(shutil, "disk_usage", fail)
    with place.opened() as run:
        run.disks.look()


class Prefect:
    """What a run hands over to Prefect, which may take its time over it."""

    def __init__(self, monkeypatch) -> None:
        self.back = threading.Event()
        self.emitted: list[dict] = []
        monkeypatch.setattr(events, "emit_event", self.emit)
        monkeypatch.setattr(events.EventsWorker, "instance", lambda: self)

    def emit(self, **event) -> None:
        self.emitted.append(event)

    def wait_until_empty(self) -> None:
        self.back.wait()


def test_a_prefect_server_that_is_away_holds_nobody_up(monkeypatch, caplog):
    prefect = Prefect(monkeypatch)
    monkeypatch.setattr(events, "_MOST_WAITING", 10)
    monkeypatch.setattr(events, "_END_SECONDS", 0.05)
    plan = Told()
    with events.events_to_prefect(plan):
        for reference in range(5):
            plan.events.publish(Event(name="study.archived", reference=reference))
        until(lambda: len(prefect.emitted) == 5, "Prefect has what it is given at a time")
        for reference in range(5, 50):
            plan.events.publish(Event(name="study.archived", reference=reference))
    assert [event["payload"]["study"] for event in prefect.emitted] == [0, 1, 2, 3, 4]
    assert "45 events did not reach Prefect" in caplog.text
    assert plan.events.subscribers == []
    prefect.back.set()


def test_prefect_is_told_of_everything_while_it_keeps_up(monkeypatch, caplog):
    prefect = Prefect(monkeypatch)
    prefect.back.set()
    plan = Told()
    with events.events_to_prefect(plan):
        for reference in range(300):
            plan.events.publish(
                Event(name="study.failed", reference=reference, reason="study-gone")
            )
    assert [event["payload"]["study"] for event in prefect.emitted] == list(range(300))
    assert not caplog.text
    one = prefect.emitted[7]
    assert one["event"] == "prefect-dicom.study.failed"
    assert one["resource"]["prefect.resource.id"] == "prefect-dicom.study.7"
    assert (
        one["payload"]["reason"] == "study-gone"
        and "explain study-gone" in one["payload"]["advice"]
    )


class Told:
    """As much of a run as tells."""

    def __init__(self) -> None:
        self.events = EventBus()
        self.cohort = SimpleNamespace(number=3, name="knees")


# --- the automations that listen


def automations() -> dict[str, AutomationCore]:
    """All that are in the files, by name."""
    known = {}
    for path in AUTOMATIONS.glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        for automation in content if isinstance(content, list) else [content]:
            known[automation["name"]] = AutomationCore.model_validate(automation)
    return known


def test_automations_listen_to_events_that_there_are():
    listening = {name: a.trigger.expect for name, a in automations().items()}
    assert len(listening) >= 7
    own = {event for events in listening.values() for event in events} - {"prefect-dicom.*"}
    own = {event for event in own if event.startswith("prefect-dicom.")}
    assert own and own <= {f"prefect-dicom.{name}" for name in EVENTS}


def test_the_guide_names_every_event_and_every_file():
    guide = (ROOT / "docs" / "operations.md").read_text()
    for name in EVENTS:
        assert f"`prefect-dicom.{name}`" in guide or f"`….{name.split('.')[1]}`" in guide, name
    for path in AUTOMATIONS.glob("*.yaml"):
        assert f"| `{path.name}` |" in guide


@pytest.mark.needs("time")
def test_the_address_of_a_mail_server_in_the_guide_is_one():
    guide = (ROOT / "docs" / "operations.md").read_text()
    (url,) = re.findall(r"`(mailtos://[^`]*)`", guide)
    (server,) = SlackWebhook(url=url)._apprise_client
    assert (server.smtp_host, server.targets[0][1]) == (
        "mail.hospital.example",
        "dicom@hospital.example",
    )


def test_a_run_that_has_ended_is_not_taken_for_dead_whatever_its_end_is_called():
    # Prefect names the event of an end by the name of the state, not by its type.
    flows = "".join(path.read_text() for path in (ROOT / "flows").glob("*.py"))
    names = {"Completed", "Failed", "Crashed", "Cancelled", "TimedOut", "Suspended", *EndName}
    names |= set(re.findall(r'Completed\(name="(\w+)"', flows))
    assert {"Partial", "Planned"} <= names
    dead_runs = automations()["prefect-dicom: mark dead runs"]
    assert {f"prefect.flow-run.{name}" for name in names} <= dead_runs.trigger.expect


def test_a_run_that_has_left_pending_is_not_taken_for_stranded():
    known = automations()
    stranded = known["prefect-dicom: mark stranded runs"].trigger
    dead = known["prefect-dicom: mark dead runs"].trigger
    assert stranded.after == {"prefect.flow-run.Pending"}
    ends = dead.expect - {"prefect.flow-run.heartbeat", "prefect.flow-run.Partial"}
    assert ends - {"prefect.flow-run.Planned"} <= stranded.expect
    assert "prefect.flow-run.Running" in stranded.expect
    assert not stranded.expect & stranded.after
