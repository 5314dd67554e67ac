"""A run that a person must help ends soon, says what to change, and leaves its rows pending."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prefect_dicom.cli import Exit
from prefect_dicom.core.reasons import REASONS
from prefect_dicom.testing import Behaviour
from prefect_dicom.testing.tiny import tiny_instances
from tests.support.commands import CommandLine
from tests.support.sites import Place, site_around

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def command(tmp_path, tmp_path_factory) -> CommandLine:
    return CommandLine(tmp_path, tmp_path_factory.mktemp("home"))


@pytest.fixture
def place(tmp_path) -> Iterator[Place]:
    with site_around(tmp_path, tiny_instances(12), retrieve="c-get") as place:
        yield place


def with_waits(file: Path, *seconds: float) -> None:
    file.write_text(f"{file.read_text()}\nretry_after_seconds: {list(seconds)}\n")


def test_a_lacking_permission_is_told_with_its_remedy_and_what_is_left(command, place, prefect_api):
    place.pacs.script.append(Behaviour("get.disabled", status=0x0124))
    ended = command("pull", place.cohort(), "--name", "trial", "--json", **prefect_api)
    assert ended.code == Exit.CONFIGURATION
    assert ended.result["error"] == "not-permitted"
    assert ended.result["rows"] == {"pending": 12}
    assert ended.result["studies"].get("failed", 0) == 0
    said = " ".join(ended.stderr.split())
    assert REASONS["not-permitted"].what_to_do in said
    assert "node pacs is disabled; 12 rows stay pending, none is lost" in said
    assert len(place.pacs.requests("C-GET")) <= 2

    shown = command("status", "trial")
    assert shown.code == Exit.NOT_ALL
    assert "pending" in shown.output and "interrupted" in shown.output

    place.pacs.script.clear()
    assert command("rerun", "trial", **prefect_api).code == Exit.ALL_WELL
    place.audit()


def test_a_wait_is_shown_and_then_the_pacs_that_stays_away_is_named(command, place, prefect_api):
    with_waits(place.file, 0.3)
    cohort = place.cohort()
    place.pacs.close()
    ended = command("pull", cohort, **prefect_api)
    assert ended.code == Exit.NOT_ALL
    assert "node pacs: waiting until" in ended.stderr and "(pacs-refused)" in ended.stderr
    assert "prefect-dicom explain pacs-refused" in ended.stderr
    assert "12 pending" in ended.output
    assert "Go on with: prefect-dicom rerun" in ended.output
