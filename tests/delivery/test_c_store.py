"""Studies get to a target byte for byte; what is said of them there has been seen there."""

from __future__ import annotations

from functools import partial

import pytest

from prefect_dicom.core.errors import PrefectDicomError
from prefect_dicom.testing import Behaviour
from tests.support.destinations import Archived, scripted_target
from tests.support.sites import study

A, B = study(1, instances=3), study(2, instances=2)
LAST = A[-1].sop_instance_uid


@pytest.fixture(scope="module")
def archived(tmp_path_factory) -> Archived:
    """Sites that have pulled A, or A and B: each test delivers from a copy."""
    return Archived(tmp_path_factory.mktemp("archived"))


@pytest.fixture
def to_scripted(archived, tmp_path):
    """A site that has archived these studies, and a scripted PACS as the target."""
    return partial(scripted_target, tmp_path, archived)


def held(target) -> dict[str, bytes]:
    return {one.sop_instance_uid: one.encoded() for one in target.holdings}


def test_every_instance_is_at_the_target_byte_for_byte_and_the_ledger_says_by_what_evidence(
    to_scripted,
):
    with to_scripted(A, B) as (site, target):
        totals = site.deliver()
        assert held(target) == {one.sop_instance_uid: one.encoded() for one in (*A, *B)}
        assert totals.is_verified and totals.evidence == {"listed": 2}
        manifest = site.manifest()
        assert {each["evidence"] for each in manifest["instances"]} == {"listed"}
        assert all(len(each["sha256"]) == 64 for each in manifest["instances"])


def test_what_is_verified_is_not_sent_again(to_scripted):
    with to_scripted(A, B) as (site, target):
        site.deliver()
        sent = len(target.requests("C-STORE"))
        assert site.deliver().is_verified
        assert len(target.requests("C-STORE")) == sent == 5


def test_an_instance_that_is_dropped_after_success_is_seen_in_the_list_and_sent_again(to_scripted):
    drop = Behaviour("keep.drop", instances=[LAST], times=1)
    with to_scripted(A, B, script=[drop]) as (site, target):
        assert site.deliver().is_verified
        assert len(target.requests("C-STORE")) == 6
        assert LAST in held(target)


def test_one_that_is_dropped_each_time_is_never_verified(to_scripted):
    with to_scripted(A, B, script=[Behaviour("keep.drop", instances=[LAST])]) as (
        site,
        target,
    ):
        site.deliver()
        assert site.outcome() == [("failed", "delivery-lacking"), ("verified", None)]
        target.script.clear()
        assert site.deliver().is_verified
        # Of the study only what was missing.
        assert len(target.requests("C-STORE")) == 3 + 2 + 1 + 1


def test_success_alone_is_not_enough_unless_the_site_says_so(to_scripted):
    drop = Behaviour("keep.drop")
    accepted = {"evidence": "accepted"}
    with to_scripted(A, script=[drop], destination=accepted) as (site, target):
        assert site.deliver().evidence == {"accepted": 1}
        assert not target.requests("C-FIND")


def test_counts_of_series_show_what_was_dropped(to_scripted):
    counted = {"evidence": "counted"}
    with to_scripted(A, B, destination=counted) as (site, target):
        target.script.append(Behaviour("keep.drop", instances=[LAST]))
        site.deliver()
        assert site.outcome() == [("failed", "delivery-lacking"), ("verified", None)]


@pytest.mark.parametrize("status", [0x0000, 0xB000])
def test_altered_instances_are_listed_and_only_their_bytes_unmask_them(to_scripted, status):
    alter = Behaviour(
        "keep.coerce", elements={"PatientComments": "seen"}, instances=[LAST], status=status
    )
    with to_scripted(A, script=[alter]) as (site, _):
        assert site.deliver().is_verified
    back = {"evidence": "read-back"}
    with to_scripted(A, B, script=[alter], destination=back) as (site, _):
        site.deliver()
        assert site.outcome() == [("failed", "delivery-differs"), ("verified", None)]
        assert {each["evidence"] for each in site.manifest(2)["instances"]} == {"read-back"}


def test_an_instance_that_was_there_before_with_other_bytes_is_found_by_reading_it_back(
    to_scripted,
):
    back = {"evidence": "read-back"}
    other = study(1, instances=3, PatientComments="older")
    with to_scripted(A, script=[Behaviour("keep.first")], destination=back) as (site, target):
        target.holdings.add(other[0])
        site.deliver()
        assert site.outcome() == [("failed", "delivery-differs")]


def test_a_sample_is_read_back_and_the_manifest_says_of_which(to_scripted):
    back = {"evidence": "read-back", "sample": 1}
    with to_scripted(A, destination=back) as (site, target):
        assert site.deliver().is_verified
        found = sorted(each["evidence"] for each in site.manifest()["instances"])
        assert found == ["listed", "listed", "read-back"]


# --- statuses


@pytest.mark.parametrize("status", [0xA900, 0xC000, 0x0122, 0x0117])
def test_a_refused_instance_fails_its_study_for_good_and_the_others_are_sent(to_scripted, status):
    refuse = Behaviour("keep.status", status=status, instances=[A[0].sop_instance_uid])
    with to_scripted(A, B, script=[refuse]) as (site, target):
        site.deliver()
        assert site.outcome() == [("failed", "delivery-refused"), ("verified", None)]
        assert f"{status:04X}" in site.records()[0].detail
        sent = len(target.requests("C-STORE"))
        assert sent == 5
        # Permanent: asked for by its reason alone, and then only what was refused.
        site.deliver()
        assert len(target.requests("C-STORE")) == sent
        target.script.clear()
        assert site.deliver("delivery-refused").is_verified
        assert len(target.requests("C-STORE")) == sent + 1


@pytest.mark.parametrize("status", [0xA700, 0x0110])
def test_a_target_that_is_full_for_a_moment_is_sent_the_same_again(
    to_scripted, status, monkeypatch
):
    monkeypatch.setattr("prefect_dicom.delivery.sending._BACK_OFF_SECONDS", 0.01)
    busy = Behaviour("keep.status", status=status, times=1)
    with to_scripted(A, script=[busy]) as (site, target):
        assert site.deliver().is_verified
        assert len(target.requests("C-STORE")) == 4


def test_a_duplicate_counts_as_accepted_where_the_target_lists_it(to_scripted):
    known = Behaviour("keep.status", status=0x0111, keeps=True)
    with to_scripted(A, script=[known]) as (site, _):
        assert site.deliver().is_verified
    liar = Behaviour("keep.status", status=0x0111)
    with to_scripted(A, script=[liar]) as (site, _):
        site.deliver()
        assert site.outcome() == [("failed", "delivery-lacking")]


def test_a_target_that_forbids_storage_is_for_a_person_and_nothing_fails(to_scripted):
    forbid = Behaviour("keep.status", status=0x0124)
    with to_scripted(A, script=[forbid]) as (site, _):
        with pytest.raises(PrefectDicomError) as error:
            site.deliver()
        assert error.value.code == "not-permitted"
        assert site.outcome() == [("due", None)]


# --- associations


@pytest.mark.parametrize("keeps", [True, False])
def test_what_was_in_flight_when_the_association_ended_is_looked_for_and_then_repeated(
    to_scripted, keeps
):
    end = Behaviour("keep.end", instances=[LAST], times=1, keeps=keeps)
    with to_scripted(A, script=[end]) as (site, target):
        assert site.deliver().is_verified
        assert len(target.requests("C-STORE")) == (3 if keeps else 4)


def test_an_instance_that_ends_every_association_does_not_keep_the_others_from_going(to_scripted):
    end = Behaviour("keep.end", instances=[A[0].sop_instance_uid])
    three = {"attempts": 3}
    with to_scripted(A, B, script=[end], destination=three) as (site, target):
        site.deliver()
        assert site.outcome() == [("failed", "association-lost"), ("verified", None)]
        assert len(held(target)) == 4


def test_a_refused_context_is_named_and_nothing_is_re_encoded(to_scripted):
    refuse = Behaviour("assoc.contexts", services=["C-STORE"], result=4)
    with to_scripted(A, script=[refuse]) as (site, target):
        site.deliver()
        assert site.outcome() == [("failed", "context-refused")]
        assert not held(target)


# --- the archive


def test_an_object_that_was_damaged_in_the_archive_never_arrives(to_scripted):
    with to_scripted(A, B) as (site, target):
        path = next((site.place.folder / "archive").rglob(f"{LAST}.dcm"))
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        site.deliver()
        assert site.outcome() == [("failed", "archive-checksum"), ("verified", None)]
        assert LAST not in held(target)
