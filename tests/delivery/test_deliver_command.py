"""`prefect-dicom deliver`: what a person types, reads and gets as an exit code."""

from __future__ import annotations

import csv
import json
from functools import partial

import pytest

from prefect_dicom.testing import Behaviour
from tests.support.commands import CommandLine
from tests.support.destinations import Archived, scripted_target
from tests.support.sites import study

A, B = study(1, instances=3), study(2, instances=2)


@pytest.fixture(scope="module")
def archived(tmp_path_factory) -> Archived:
    return Archived(tmp_path_factory.mktemp("archived"))


@pytest.fixture
def to_scripted(archived, tmp_path):
    return partial(scripted_target, tmp_path, archived)


def test_a_cohort_is_delivered_by_one_command_and_the_table_says_what_became_of_it(
    to_scripted, prefect_api, tmp_path
):
    with to_scripted(A, B, script=[Behaviour("keep.drop", instances=[A[0].sop_instance_uid])]) as (
        site,
        target,
    ):
        command = CommandLine(tmp_path, tmp_path / "home")
        arguments = ("1", "--to", "research", "--site", str(site.place.file))
        first = command("deliver", *arguments, **prefect_api)
        assert first.code == 2, first.stderr
        assert "1 of 2 studies verified (1 listed), 1 failed" in first.output
        assert "delivery-lacking" in first.output
        for stored in (*A, *B):
            assert stored.study_instance_uid not in first.output + first.stderr
        target.script.clear()
        second = command("deliver", *arguments, "--json", **prefect_api)
        assert second.code == 0, second.stderr
        said = json.loads(second.output)
        assert said["deliveries"] == {"verified": 2}
        with open(said["table"], encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [(row["state"], row["evidence"]) for row in rows] == [("verified", "listed")] * 2
        manifests = (site.place.folder / "reports").rglob("deliveries/research/*.json")
        assert len(list(manifests)) == 2
