"""Pulls from a scripted DICOMweb server that misbehaves: what is archived, and why not."""

from __future__ import annotations

import threading

import pytest

from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import Verdict
from prefect_dicom.testing import Behaviour, ScriptedWeb, tiny_instances
from prefect_dicom.testing.web_server import part10_of
from tests.support.campaign import subset
from tests.support.sites import until
from tests.support.web import archived_hashes, web_site


@pytest.fixture
def web():
    with ScriptedWeb(tiny_instances(2, instances=4, seed=7)) as server:
        yield server


@pytest.fixture
def place(web, tmp_path):
    return web_site(tmp_path, web.url, web)


def pulled(place) -> dict[Verdict, int]:
    return dict(place.pull().rows)


def is_whole(place) -> None:
    """Everything is archived as the server holds it, and was named by a list before."""
    place.is_whole()
    assert set(archived_hashes(place)) == {one.sop_instance_uid for one in place.pacs.holdings}


def test_what_the_server_lists_is_archived_as_it_sends_it(web, place):
    place.pull()
    is_whole(place)
    archived = place.archived()
    files = {part10_of(stored) for stored in web.holdings}
    assert {data for key, data in archived.items() if key.endswith(".dcm")} == files


def test_instances_are_listed_before_they_are_asked_for_and_listed_again(web, place):
    place.pull()
    services = [request.service for request in web.log]
    first, last = services.index("WADO-RS"), len(services) - services[::-1].index("WADO-RS")
    for around in (web.log[:first], web.log[last:]):
        assert any(one.path.endswith("/instances") for one in around)


def test_instances_are_asked_for_as_they_are_stored(web, place):
    place.pull()
    for request in web.requests("WADO-RS"):
        assert "transfer-syntax=*" in request.headers["accept"]
        assert request.headers["accept-encoding"] == "identity"


# --- success that is none


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(Behaviour("web.no_closing", times=1), id="no closing delimiter"),
        pytest.param(Behaviour("web.cut", after=700, times=1), id="cut"),
        pytest.param(Behaviour("web.cut", after=700, framing="chunked", times=1), id="chunk cut"),
        pytest.param(Behaviour("web.cut", after=700, framing="length", times=1), id="length cut"),
        pytest.param(Behaviour("web.part_length", times=1), id="part of another length"),
        pytest.param(Behaviour("web.delimiter_inside", times=1), id="delimiter in an instance"),
        pytest.param(Behaviour("web.drop", instances=1, status=206, times=1), id="206"),
        pytest.param(Behaviour("web.drop", instances=2, times=1), id="200 with some"),
    ],
)
def test_what_an_answer_lacks_is_asked_for_again(web, place, behaviour):
    web.script.append(behaviour)
    assert set(pulled(place)) == {Verdict.ARCHIVED}
    assert behaviour.used
    is_whole(place)


@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour("web.frame", framing="chunked", chunk_bytes=97),
        Behaviour("web.frame", framing="close", chunk_bytes=1000),
        Behaviour("web.frame", framing="length", chunk_bytes=11),
        Behaviour("web.boundary", boundary="a b=c'()+_,-./:=?d"),
        Behaviour("web.single"),
        Behaviour("web.compress"),
        Behaviour("web.no_content"),
        Behaviour("web.short", answers=1),
    ],
    ids=repr,
)
def test_what_a_server_may_do_is_no_fault(web, place, behaviour):
    web.script.append(behaviour)
    assert set(pulled(place)) == {Verdict.ARCHIVED}
    is_whole(place)


def test_an_instance_that_the_server_cannot_send_is_the_only_one_missing(web, place):
    web.script.append(Behaviour("web.fail", instances=1))
    assert set(pulled(place)) != {Verdict.ARCHIVED}
    assert {reason for _, reason in place.reasons()} == {"instances-missing"}
    assert set(archived_hashes(place)) == {
        one.sop_instance_uid for one in web.holdings
    } - web.last_of_studies(1)


def test_an_answer_that_breaks_off_at_an_instance_costs_that_instance_alone(web, place):
    web.script.append(Behaviour("web.break", instances=1))
    place.pull()
    assert {reason for _, reason in place.reasons()} == {"response-cut-short"}
    assert set(archived_hashes(place)) == {
        one.sop_instance_uid for one in web.holdings
    } - web.last_of_studies(1)


def test_instances_of_another_study_are_never_kept(web, place):
    web.script.append(Behaviour("web.change", element="StudyInstanceUID", value="2.25.99"))
    assert Verdict.ARCHIVED not in pulled(place)
    assert archived_hashes(place) == {}
    assert place.quarantined()


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "not-permitted"),
        (403, "not-permitted"),
        (404, "service-not-offered"),
        (405, "service-not-offered"),
        (501, "service-not-offered"),
    ],
)
def test_what_a_person_has_to_change_disables_the_node(web, place, status, reason):
    web.script.append(Behaviour("web.status", service="QIDO-RS", status=status))
    with pytest.raises(PacsError, match=reason):
        place.pull()
    assert len(web.log) == 1


@pytest.mark.parametrize(
    ("status", "reason"),
    [(400, "request-refused"), (406, "transfer-syntax-not-offered"), (415, "request-refused")],
)
def test_a_form_that_is_refused_is_replaced_and_never_by_a_conversion(web, place, status, reason):
    web.script.append(Behaviour("web.status", service="WADO-RS", status=status))
    place.pull()
    assert {found for _, found in place.reasons()} == {reason}
    asked = {request.headers["accept"] for request in web.requests("WADO-RS")}
    assert len(asked) == 3
    assert all("transfer-syntax=*" in accept for accept in asked)


def test_a_study_that_is_gone_is_looked_for_once_more(web, place):
    web.script.append(Behaviour("web.status", service="WADO-RS", status=404))
    place.pull()
    # It is listed still: it is not gone, the server cannot send it.
    assert {found for _, found in place.reasons()} == {"pacs-failure"}


def test_a_study_that_is_deleted_after_it_was_listed_is_gone(web, place):
    gone = web.holdings.study_instance_uids()[0]

    def delete(plan, by):
        for stored in list(web.holdings):
            if stored.study_instance_uid == gone:
                web.holdings.remove(stored.sop_instance_uid)
        plan.parts, plan.status = [], 404

    web.script.append(Behaviour("web.call", service="WADO-RS", study=gone, call=delete))
    place.pull()
    assert dict(place.reasons()).get("failed") == "study-gone"


@pytest.mark.parametrize("status", subset([408, 425, 429, 502, 503, 504], [429, 503]))
def test_a_busy_server_is_waited_for(web, place, status):
    web.script.append(Behaviour("web.status", service="WADO-RS", status=status, times=1))
    assert set(pulled(place)) == {Verdict.ARCHIVED}


def test_redirections_are_followed_within_the_origin_alone(web, place):
    elsewhere = ScriptedWeb(tiny_instances(1)).start()
    web.script.append(Behaviour("web.status", status=302, location=elsewhere.url + "/studies"))
    with pytest.raises(PacsError, match="service-not-offered"):
        place.pull()
    elsewhere.close()
    assert elsewhere.log == []


def test_no_limit_is_on_a_whole_transfer(web, place):
    place.change(node={"timeouts": {"stall_seconds": 0.4}})
    web.script.append(Behaviour("web.slow", service="WADO-RS", seconds=0.15, chunk_bytes=1100))
    assert set(pulled(place)) == {Verdict.ARCHIVED}
    slowest = max(len(part10_of(stored)) for stored in web.holdings) * 4 / 1100 * 0.15
    assert slowest > 0.4, "each answer takes longer than the server may be silent"


def test_a_server_that_drips_is_a_silent_one(web, place):
    place.change(node={"timeouts": {"stall_seconds": 0.4}})
    web.script.append(
        Behaviour("web.slow", service="WADO-RS", seconds=0.02, chunk_bytes=1, times=1)
    )
    assert set(pulled(place)) == {Verdict.ARCHIVED}


def test_a_silent_server_costs_no_more_than_its_time_limit(web, place):
    place.change(node={"timeouts": {"stall_seconds": 0.3}})
    hold = threading.Event()
    web.script.append(Behaviour("web.stall", service="WADO-RS", after=600, hold=hold, times=1))
    assert set(pulled(place)) == {Verdict.ARCHIVED}
    hold.set()
    is_whole(place)


@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour("web.endless", service="WADO-RS"),
        Behaviour("web.part_header", name="X-Long", value="y" * 20_000),
        Behaviour("web.part_header", name="Content-Type", value="image/jpeg"),
        Behaviour("web.part_length", more=10**17),
    ],
    ids=["endless header", "long header", "image", "length beyond all bounds"],
)
def test_what_is_no_answer_ends_with_a_reason(web, place, behaviour):
    web.script.append(behaviour)
    place.pull()
    assert {found for _, found in place.reasons()} <= {"answer-unusable", "pacs-failure"}
    assert archived_hashes(place) == {}


# --- a second run


def test_only_missing_instances_are_asked_for_by_a_second_run(web, place):
    web.script.append(Behaviour("web.fail", instances=1))
    place.pull()
    web.script.clear()
    before = len(web.log)
    place.rerun()
    is_whole(place)
    asked = [uid for request in web.log[before:] for uid in request.sent]
    assert sorted(asked) == sorted(web.last_of_studies(1))


def test_a_killed_run_goes_on_with_what_is_missing(web, tmp_path):
    web = ScriptedWeb(tiny_instances(6, instances=5, seed=9)).start()
    place = web_site(tmp_path / "killed", web.url, web)
    place.change(node={"limits": {"chunk_studies": 1, "associations": 1}})
    hold = threading.Event()
    held = Behaviour("web.stall", service="WADO-RS", on_request=4, after=900, hold=hold)
    web.script.append(held)
    with place.victim(place.cohort()) as process:
        until(lambda: held.used or process.poll() is not None, "the fourth study is on its way")
    hold.set()
    web.script.clear()
    before = len(web.log)
    there = set(archived_hashes(place))
    place.pull(place.folder / "cohort.csv")
    is_whole(place)
    again = [uid for request in web.log[before:] for uid in request.sent]
    assert not set(again) & there, "nothing that is archived is asked for again"
    assert len(again) == len(set(again))
    web.close()
