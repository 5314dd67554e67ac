"""A run that is killed while it delivers: the next one ends the work, and nothing false is said."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from prefect_dicom.core.failpoints import DELIVERY_POINTS, VARIABLE, arm
from prefect_dicom.delivery.run import deliver_all, open_delivery
from prefect_dicom.testing import Behaviour
from tests.support.campaign import subset
from tests.support.crashes import KILLED, _context, ended
from tests.support.destinations import COHORT, TARGET, Archived, scripted_target
from tests.support.sites import study

A, B = study(1, instances=3), study(2, instances=2)
POINTS = [point for point in DELIVERY_POINTS if point != "commitment-begun"]


@pytest.fixture(scope="module")
def archived(tmp_path_factory) -> Archived:
    return Archived(tmp_path_factory.mktemp("archived"))


@pytest.fixture
def to_scripted(archived, tmp_path):
    return partial(scripted_target, tmp_path, archived)


def _victim(file: Path, fault: str) -> None:
    from prefect_dicom.config.site import load_site

    os.umask(0o077)
    arm(fault)
    with open_delivery(load_site(file, {}), COHORT, TARGET) as run:
        deliver_all(run)


@pytest.mark.parametrize("point", subset(POINTS, ["acceptance-recorded", "evidence-found"]))
def test_a_killed_delivery_is_ended_by_the_next_and_what_is_verified_is_not_sent_again(
    to_scripted, point
):
    assert VARIABLE not in os.environ
    script = [Behaviour("keep.drop", instances=[A[0].sop_instance_uid], times=1)]
    with to_scripted(A, B, script=script) as (site, target):
        victim = _context.Process(target=_victim, args=(site.place.file, f"{point}:1:kill"))
        victim.start()
        assert ended([victim]) == [KILLED]
        done = [record for record in site.records() if record.state == "verified"]
        uids = {record.study.study_instance_uid for record in done}
        # What is verified is there.
        held = {one.sop_instance_uid for one in target.holdings}
        for known in (A, B):
            if known[0].study_instance_uid in uids:
                assert {one.sop_instance_uid for one in known} <= held
        before = len(target.requests("C-STORE"))
        assert site.deliver().is_verified
        again = target.requests("C-STORE")[before:]
        assert not uids & {request.keys["StudyInstanceUID"] for request in again}
        assert {one.encoded() for one in target.holdings} == {one.encoded() for one in (*A, *B)}
