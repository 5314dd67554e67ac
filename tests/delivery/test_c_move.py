"""C-MOVE to a third node: the bytes pass us by, and the manifest says so."""

from __future__ import annotations

from functools import partial

import pytest
import yaml

from prefect_dicom.core.errors import ConfigurationError
from prefect_dicom.delivery.run import deliver_all, open_delivery
from prefect_dicom.testing import Behaviour, ScriptedPacs
from tests.support.destinations import COHORT, TARGET, Archived, scripted_target
from tests.support.sites import study

A, B = study(1, instances=3), study(2, instances=2)
LAST = A[-1].sop_instance_uid


@pytest.fixture(scope="module")
def archived(tmp_path_factory) -> Archived:
    return Archived(tmp_path_factory.mktemp("archived"))


@pytest.fixture
def between(archived, tmp_path):
    return partial(scripted_target, tmp_path, archived)


@pytest.fixture
def source():
    """A PACS that holds A and B, and knows the target where a test says so."""
    with ScriptedPacs(instances=[*A, *B], ae_title="SOURCE") as pacs:
        yield pacs


def know(site, source, target) -> None:
    """Have the site's node be the source, and the source know the target."""
    document = yaml.safe_load(site.place.file.read_text())
    document["nodes"]["pacs"] |= {"port": source.port, "called_ae_title": source.ae_title}
    site.place.file.write_text(yaml.safe_dump(document))
    source.destinations[target.ae_title] = ("127.0.0.1", target.port)


def deliver(site):
    with open_delivery(site.place.site, COHORT, TARGET, source="pacs") as run:
        deliver_all(run)
        return run.totals()


def test_the_source_sends_and_the_list_of_the_target_is_the_evidence(between, source):
    with between(A, B) as (site, target):
        know(site, source, target)
        assert deliver(site).is_verified
        assert {one.sop_instance_uid for one in target.holdings} == {
            one.sop_instance_uid for one in (*A, *B)
        }
        manifest = site.manifest()
        assert manifest["method"] == "c-move"
        assert {each["sha256"] for each in manifest["instances"]} == {"not seen"}
        moves = len(source.requests("C-MOVE"))
        assert deliver(site).is_verified and len(source.requests("C-MOVE")) == moves


def test_what_the_target_lacks_is_moved_once_more_by_its_uid(between, source):
    with between(A, script=[Behaviour("keep.drop", instances=[LAST], times=1)]) as (site, target):
        know(site, source, target)
        assert deliver(site).is_verified
        first, second = source.requests("C-MOVE")
        assert second.level == "IMAGE" and second.keys["SOPInstanceUID"] == LAST


def test_counters_of_success_verify_nothing(between, source):
    with between(A, script=[Behaviour("keep.drop", instances=[LAST])]) as (site, target):
        know(site, source, target)
        deliver(site)
        assert site.outcome() == [("failed", "delivery-lacking")]


@pytest.mark.parametrize("evidence", ["accepted", "read-back"])
def test_evidence_that_a_move_cannot_give_is_refused_before_anything_is_sent(between, evidence):
    with between(A, destination={"evidence": evidence}) as (site, _):
        with pytest.raises(ConfigurationError) as error:
            deliver(site)
        assert "are not seen here" in str(error.value)
