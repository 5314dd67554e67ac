"""Events tell what happens in numbers and reason codes, and disturb nobody."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from prefect.events.schemas.automations import AutomationCore

from prefect_dicom.events import AUTOMATIONS, EVENTS, Event

ROOT = Path(__file__).resolve().parents[1]


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


def test_a_run_that_has_ended_is_not_taken_for_dead_whatever_its_end_is_called():
    # Prefect names the event of an end by the name of the state, not by its type.
    flows = "".join(path.read_text() for path in (ROOT / "flows").glob("*.py"))
    names = {"Completed", "Failed", "Crashed", "Cancelled", "TimedOut", "Suspended"}
    names |= set(re.findall(r'Completed\(name="(\w+)"', flows))
    assert {"Partial", "Planned"} <= names
    dead_runs = automations()["prefect-dicom: mark dead runs"]
    assert {f"prefect.flow-run.{name}" for name in names} <= dead_runs.trigger.expect
