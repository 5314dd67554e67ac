"""Every boundary between two durable effects has a name, and costs nothing unless asked for."""

from __future__ import annotations

import ast
import errno
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from prefect_dicom.core import failpoints
from prefect_dicom.core.failpoints import (
    DELIVERY_POINTS,
    POINTS,
    VARIABLE,
    InjectedError,
    arm,
    failpoint,
)

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("src/prefect_dicom", "flows", "tasks")


@pytest.fixture(autouse=True)
def disarmed():
    yield
    arm(None)


def calls() -> Counter[object]:
    """The names that are passed to ``failpoint``, there or by who is given them."""
    found: Counter[object] = Counter()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                named = [k.value for k in node.keywords if k.arg == "fail_point"]
                called = node.args if getattr(node.func, "id", "") == "failpoint" else []
                found.update(a.value for a in (*called, *named) if isinstance(a, ast.Constant))
    return found


@pytest.mark.needs("time")
def test_the_table_names_exactly_the_points_that_the_code_passes():
    assert set(calls()) == {*POINTS, *DELIVERY_POINTS}


def test_a_point_lies_between_two_things_that_are_said():
    every = [*POINTS.values(), *DELIVERY_POINTS.values()]
    assert all(point.before and point.after for point in every)
    assert len({(point.before, point.after) for point in every}) == len(every)


def test_nothing_is_armed_where_the_variable_is_not_set():
    assert failpoints._armed is None
    for point in POINTS:
        failpoint(point)


def test_the_fault_happens_the_nth_time_and_once():
    arm("claimed:2:raise")
    failpoint("claimed")
    failpoint("list-recorded")
    with pytest.raises(InjectedError):
        failpoint("claimed")
    failpoint("claimed")


def test_any_point_can_be_counted():
    arm("*:2:enospc")
    failpoint("claimed")
    with pytest.raises(OSError) as caught:
        failpoint("list-recorded")
    assert caught.value.errno == errno.ENOSPC


def test_of_several_processes_the_one_that_writes_the_note_has_the_fault(tmp_path):
    note = tmp_path / "note"
    arm(f"claimed:1:raise:{note}")
    with pytest.raises(InjectedError):
        failpoint("claimed")
    assert note.read_text().split()[1] == "claimed"
    arm(f"claimed:1:raise:{note}")
    failpoint("claimed")


@pytest.mark.parametrize("wrong", ["nowhere:1:kill", "claimed:0:kill", "claimed:1:harm", "claimed"])
def test_a_variable_that_names_no_fault_is_refused(wrong):
    with pytest.raises(ValueError):
        arm(wrong)


def test_a_process_is_killed_where_its_environment_says():
    script = (
        "from prefect_dicom.core.failpoints import failpoint; print(1, flush=True); "
        "failpoint('claimed')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={VARIABLE: "claimed:1:kill"},
        capture_output=True,
        cwd=ROOT,
    )
    assert (ended.returncode, ended.stdout) == (-9, b"1\n")
