"""Received instances are validated before they are archived; unrequested ones are quarantined."""

from __future__ import annotations

import json
import socket

import pytest

from prefect_dicom.core.model import Verdict
from prefect_dicom.network.storage_scp import ReceiverLease
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support.sites import LOOPBACK, Place, site_around

METHODS = ("c-move", "c-get")


def notes(place: Place) -> list[dict]:
    return [json.loads(path.read_text()) for path in place.quarantined()]


@pytest.mark.parametrize(
    ("retrieve", "faulty"), zip(METHODS, ("archive", "leave-out"), strict=True)
)
def test_an_instance_cut_on_its_way_is_asked_for_again(around, retrieve, faulty):
    objects = list(tiny_instances(1, instances=3))
    script = [Behaviour("store.truncate", instances=1, times=1)]
    with around(
        objects,
        script=script,
        retrieve=retrieve,
        validation={"faulty": faulty},
    ) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        manifest = place.manifest(objects[0].study_instance_uid)
        assert [i.warnings for i in manifest.instances] == [(), (), ()]
        assert manifest.withheld == ()
        assert len(place.pacs.sent_instances()) == 4
        place.audit()


@pytest.mark.parametrize("retrieve", METHODS)
def test_an_instance_that_is_cut_at_its_source_is_archived_with_a_warning(around, retrieve):
    objects = list(tiny_instances(1, instances=3))
    cut = objects[1].sop_instance_uid
    script = [Behaviour("store.truncate", instances=[cut])]
    with around(objects, script=script, retrieve=retrieve) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        manifest = place.manifest(objects[0].study_instance_uid)
        warnings = {i.sop_instance_uid: i.warnings for i in manifest.instances if i.warnings}
        assert warnings == {cut: ("instance-truncated",)}
        assert place.pacs.sent_instances().count(cut) == 2
        place.audit()


@pytest.mark.parametrize("retrieve", METHODS)
def test_an_instance_that_is_cut_at_its_source_is_left_out_and_named(around, retrieve):
    objects = list(tiny_instances(1, instances=3))
    cut = objects[1].sop_instance_uid
    script = [Behaviour("store.truncate", instances=[cut])]
    with around(
        objects,
        script=script,
        retrieve=retrieve,
        validation={"faulty": "leave-out"},
    ) as place:
        assert place.pull().rows == {Verdict.PARTIAL: 1}
        [verdict] = place.verdicts()
        assert verdict.reason == "instances-rejected"
        assert (verdict.archived_instances, verdict.withheld_instances) == (2, 1)
        manifest = place.manifest(objects[0].study_instance_uid)
        [withheld] = manifest.withheld
        assert (withheld.sop_instance_uid, withheld.reason) == (cut, "instance-truncated")
        assert len(place.archived()) == 2 + 1
        assert place.spooled() == []
        place.audit()


@pytest.mark.parametrize("uids_per_request", [50, 1])
def test_studies_of_which_every_instance_is_cut_are_judged_instance_by_instance(
    around, uids_per_request
):
    # Cut before the study's UID, so that only a request for one study can tell where it belongs.
    script = [Behaviour("store.truncate", instances=5)]
    node = {"limits": {"uids_per_request": uids_per_request}}
    with around(tiny_instances(3, instances=2), script=script, node=node) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 3}
        assert place.totals().stored == 6
        place.audit()


@pytest.mark.parametrize("retrieve", METHODS)
def test_an_instance_of_another_patient_is_quarantined_and_fails_its_study_alone(around, retrieve):
    objects = list(tiny_instances(2, instances=3))
    other = objects[1].sop_instance_uid
    script = [Behaviour("store.other_patient", instances=[other])]
    with around(objects, script=script, retrieve=retrieve) as place:
        assert place.pull().rows == {Verdict.PARTIAL: 1, Verdict.ARCHIVED: 1}
        assert sorted(place.reasons()) == [("archived", None), ("failed", "wrong-patient")]
        assert [note["reason"] for note in notes(place)] == ["wrong-patient"]
        assert not any(other in key for key in place.archived())
        assert not any(b"OTHER-000001" in data for data in place.archived().values())
        place.audit()
        place.pacs.script.clear()
        assert place.rerun().rows == {Verdict.ARCHIVED: 2}
        place.audit()


def test_studies_that_bring_another_patient_do_not_disable_the_node(around):
    script = [Behaviour("store.other_patient", instances=1)]
    with around(
        tiny_instances(5),
        script=script,
        node={"limits": {"chunk_studies": 1}},
    ) as place:
        assert place.pull().rows == {Verdict.FAILED: 5}
        assert {reason for _, reason in place.reasons()} == {"patient-id-differs"}
        assert place.archived() == {}
        place.audit()


def test_an_instance_of_another_patient_that_comes_right_the_second_time_is_archived(around):
    script = [Behaviour("store.other_patient", instances=1, times=1)]
    with around(tiny_instances(1, instances=3), script=script) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert [note["reason"] for note in notes(place)] == ["wrong-patient"]
        place.audit()


@pytest.mark.parametrize("retrieve", METHODS)
def test_an_instance_that_comes_twice_counts_once(around, retrieve):
    script = [Behaviour("store.duplicate", instances=2)]
    objects = list(tiny_instances(1, instances=4))
    with around(objects, script=script, retrieve=retrieve) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert len(place.pacs.sent_instances()) == 6
        assert len(place.manifest(objects[0].study_instance_uid).instances) == 4
        assert place.quarantined() == []
        assert place.spooled() == []
        place.audit()


@pytest.mark.parametrize("retrieve", METHODS)
def test_two_contents_under_one_uid_are_nobodys_to_choose(around, retrieve):
    script = [Behaviour("store.conflict", instances=1)]
    with around(
        tiny_instances(1, instances=3),
        script=script,
        retrieve=retrieve,
    ) as place:
        assert place.pull().rows == {Verdict.PARTIAL: 1}
        assert place.reasons() == [("failed", "conflicting-content")]
        assert {note["reason"] for note in notes(place)} == {"conflicting-content"}
        assert not any(key.endswith("manifest.json") for key in place.archived())
        place.audit()


@pytest.mark.parametrize("retrieve", METHODS)
@pytest.mark.parametrize("originator", [False, True])
def test_an_instance_that_comes_along_unasked_is_quarantined(around, retrieve, originator):
    wanted, stranger = tiny_instances(1, instances=3), list(tiny_instances(1, seed=7))
    script = [Behaviour("store.unsolicited", extra=stranger, originator=originator)]
    with around(wanted, script=script, retrieve=retrieve) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        [note] = notes(place)
        assert note["reason"] in ("not-requested", "uid-mismatch")
        assert note["sop_instance_uid"] == stranger[0].sop_instance_uid
        # Success to whoever may send: another answer makes some archives stop the transfer.
        assert place.pacs.requests("C-MOVE" if retrieve == "c-move" else "C-GET")[0].sent[
            0
        ].status == (0x0000)
        assert not any(stranger[0].sop_instance_uid in key for key in place.archived())
        place.audit()


def test_an_instance_sent_by_somebody_else_is_quarantined_with_a_note(around):
    stranger = next(tiny_instances(1, seed=7))
    with (
        around(tiny_instances(1)) as place,
        ReceiverLease(place.site),
    ):
        assert place.store(stranger) == 0x0000
        [note] = notes(place)
        assert note["reason"] == "not-requested"
        assert note["calling_ae_title"] == "STRANGER"
        assert note["peer_address"] == LOOPBACK
        assert note["since"]
        place.pull()
        assert not any(stranger.study_instance_uid in key for key in place.archived())


def test_an_instance_of_the_study_that_is_not_on_its_list_is_quarantined(around):
    *listed, unlisted = tiny_instances(1, instances=3)
    script = [Behaviour("store.unsolicited", extra=[unlisted], originator=True)]
    with around(listed, script=script) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert [note["reason"] for note in notes(place)] == ["not-requested"]
        assert not any(unlisted.sop_instance_uid in key for key in place.archived())
        place.audit()


def test_an_address_that_is_not_allowed_gets_no_association(tmp_path):
    parts = {"receiver": {"allowed_senders": ["192.0.2.1"]}}
    with (
        site_around(tmp_path, tiny_instances(1), **parts) as place,
        ReceiverLease(place.site),
    ):
        with socket.create_connection((LOOPBACK, place.site.receiver.port), 5) as connection:
            connection.settimeout(5)
            assert connection.recv(1) == b""
        with pytest.raises(ConnectionError):
            place.store(next(tiny_instances(1, seed=7)))
        assert place.quarantined() == []
