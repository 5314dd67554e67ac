"""No status, counter or silence of the PACS is evidence: only what lies here counts."""

from __future__ import annotations

import threading

import pytest

from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import Disposition, StudyState, Verdict
from prefect_dicom.run.loop import work_through
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support.sites import Place, until

METHODS = ("c-move", "c-get")


def retrieves(place: Place) -> list:
    return place.pacs.requests("C-MOVE") + place.pacs.requests("C-GET")


@pytest.mark.parametrize("retrieve", METHODS)
def test_success_with_nothing_sent_archives_nothing(around, retrieve):
    script = [Behaviour("move.success_nothing")]
    with around(
        tiny_instances(1, instances=2),
        script=script,
        retrieve=retrieve,
    ) as place:
        assert place.pull().rows == {Verdict.FAILED: 1}
        assert place.reasons() == [("failed", "nothing-arrived")]
        assert place.archived() == {}
        assert {r.status for r in retrieves(place)} == {0x0000}
        place.pacs.script.clear()
        assert place.rerun().rows == {Verdict.ARCHIVED: 1}
        place.audit()


@pytest.mark.parametrize("retrieve", METHODS)
def test_success_with_nothing_sent_once_is_asked_again_in_the_same_run(around, retrieve):
    script = [Behaviour("move.success_nothing", times=1)]
    with around(
        tiny_instances(1, instances=2),
        script=script,
        retrieve=retrieve,
    ) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        place.audit()


def test_what_is_received_after_the_final_response_is_waited_for(around):
    script = [Behaviour("move.early_success", after=1)]
    with around(
        tiny_instances(2, instances=6),
        script=script,
        node={"limits": {"chunk_studies": 1}},
    ) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 2}
        # Not one more request, and nothing sent twice: what was late was not asked for again.
        assert place.asked_for("C-MOVE") == 2
        assert len(place.pacs.sent_instances()) == 12
        place.audit()


class Meanwhile(threading.Event):
    """In place of an event a script waits for: does something instead of waiting."""

    def __init__(self, act) -> None:
        super().__init__()
        self._act = act

    def wait(self, timeout: float | None = None) -> bool:
        self._act()
        return True


def test_what_is_received_too_late_counts_once_like_anything_else(around):
    objects = list(tiny_instances(1, instances=4))
    late = threading.Event()
    script = [Behaviour("move.early_success", after=1, hold=late, times=1)]
    with around(objects, script=script) as place:

        def let_the_rest_come() -> None:
            late.set()
            first = place.pacs.requests("C-MOVE")[0]
            until(lambda: [s.status for s in first.sent] == [0] * 4, "the rest has come")

        # It is asked for again, and then it comes for both requests.
        hold = Meanwhile(let_the_rest_come)
        place.pacs.script.append(
            Behaviour("net.first_byte", hold=hold, service="C-MOVE", on_request=2)
        )
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert len(place.pacs.sent_instances()) == 1 + 3 + 3
        assert place.quarantined() == []
        place.audit()


@pytest.mark.parametrize("retrieve", METHODS)
def test_instances_left_out_are_asked_for_again_exactly(around, retrieve):
    objects = list(tiny_instances(2, instances=5))
    script = [Behaviour("move.drop_instances", instances=2, times=1)]
    with around(objects, script=script, retrieve=retrieve) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 2}
        first, *others = retrieves(place)
        assert first.level == "STUDY"
        assert [r.level for r in others] == ["IMAGE", "IMAGE"]
        came = {s.sop_instance_uid for s in first.sent}
        asked = [uid for r in others for uid in r.keys["SOPInstanceUID"].split("\\")]
        assert sorted(asked) == sorted({o.sop_instance_uid for o in objects} - came)
        assert len(place.pacs.sent_instances()) == len(objects)
        place.audit()


@pytest.mark.parametrize("retrieve", METHODS)
@pytest.mark.parametrize("status", [None, 0xC000, 0xA702])
def test_counters_of_zero_and_any_final_status_change_nothing(around, retrieve, status):
    script = [Behaviour("move.zero_counts", status=status)]
    with around(
        tiny_instances(2, instances=3),
        script=script,
        retrieve=retrieve,
    ) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 2}
        assert len(place.pacs.sent_instances()) == 6
        assert len(retrieves(place)) == 1
        place.audit()


@pytest.mark.parametrize("status", [0x0110, 0xA801, 0xFE00])
def test_a_failure_with_everything_there_is_no_failure(around, status):
    script = [Behaviour("move.final_status", status=status)]
    with around(tiny_instances(1, instances=3), script=script) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert place.asked_for("C-MOVE") == 1
        place.audit()


def test_an_unknown_destination_disables_the_node_and_fails_no_study(around):
    script = [Behaviour("move.unknown_destination")]
    with around(
        tiny_instances(4),
        script=script,
        node={"limits": {"chunk_studies": 1}},
    ) as place:
        with place.opened() as pull:
            with pytest.raises(PacsError) as caught:
                work_through(pull)
            assert caught.value.code == "move-destination-unknown"
            assert caught.value.disposition is Disposition.OPERATOR
            # The next chunk is not even tried.
            asked = place.asked_for()
            with pytest.raises(PacsError, match="move-destination-unknown"):
                pull.retrieval.retrieve(next(pull.chunks.chunks()))
            assert place.asked_for() == asked
        assert place.asked_for("C-MOVE") == 1
        assert place.totals().rows == {Verdict.PENDING: 4}
        place.pacs.script.clear()
        assert place.pull().rows == {Verdict.ARCHIVED: 4}
        place.audit()


def test_a_receiver_nobody_can_reach_disables_the_node_and_fails_no_study(around):
    with around(tiny_instances(4)) as place:
        # The PACS has another address for us: nothing listens there.
        title = place.site.receiver.ae_title
        address = place.pacs.destinations[title]
        place.pacs.destinations[title] = ("127.0.0.1", 1)
        with pytest.raises(PacsError, match="move-destination-failed"):
            place.pull()
        assert place.totals().rows == {Verdict.PENDING: 4}
        place.pacs.destinations[title] = address
        assert place.pull().rows == {Verdict.ARCHIVED: 4}
        place.audit()


@pytest.mark.parametrize("retrieve", METHODS)
def test_a_node_that_sends_nothing_for_three_studies_is_left_alone(around, retrieve):
    script = [Behaviour("move.success_nothing")]
    with around(
        tiny_instances(6),
        script=script,
        retrieve=retrieve,
        node={"limits": {"chunk_studies": 1}, "timeouts": {"settle_seconds": 0.1}},
    ) as place:
        code = {"c-move": "node-sends-nothing", "c-get": "c-get-sends-nothing"}[retrieve]
        with pytest.raises(PacsError, match=code) as caught:
            place.pull()
        assert caught.value.disposition is Disposition.OPERATOR
        # Of a way back there is advice only where there is one.
        assert ("the port open" in caught.value.reason.advice) is (retrieve == "c-move")
        # The third is given back as it was when it turns out to be like the two before it.
        assert place.totals().studies == {
            StudyState.FAILED: 2,
            StudyState.LISTED: 1,
            StudyState.PENDING: 3,
        }
        assert {r for _, r in place.reasons()} == {"nothing-arrived", None}
        place.pacs.script.clear()
        assert place.rerun().rows == {Verdict.ARCHIVED: 6}
        place.audit()


def test_studies_that_never_come_keep_no_rerun_from_the_others(around):
    objects = list(tiny_instances(6))
    # The first three to be asked for lie damaged on the PACS.
    damaged = sorted(each.study_instance_uid for each in objects)[:3]
    script = [Behaviour("move.success_nothing", study=study) for study in damaged]
    with around(
        objects,
        script=script,
        node={"limits": {"chunk_studies": 1}, "timeouts": {"settle_seconds": 0.1}},
    ) as place:
        with pytest.raises(PacsError, match="node-sends-nothing"):
            place.pull()
        assert place.rerun().rows == {Verdict.ARCHIVED: 3, Verdict.FAILED: 3}
        assert {r for _, r in place.reasons()} == {"nothing-arrived", None}
        place.audit()


def test_studies_whose_last_instances_never_come_do_not_disable_the_node(around):
    script = [Behaviour("move.drop_instances", instances=1)]
    with around(
        tiny_instances(4, instances=2),
        script=script,
        node={"limits": {"chunk_studies": 1}, "timeouts": {"settle_seconds": 0.1}},
    ) as place:
        assert place.pull().rows == {Verdict.PARTIAL: 4}
        assert place.rerun().rows == {Verdict.PARTIAL: 4}
        assert {r for _, r in place.reasons()} == {"instances-missing"}
        place.audit()


@pytest.mark.parametrize(("retrieve", "how"), zip(METHODS, ("abort", "close"), strict=True))
def test_an_association_lost_midway_costs_only_what_had_not_come(around, retrieve, how):
    script = [Behaviour("net.drop_after", answers=3, how=how, on_request=1)]
    objects = list(tiny_instances(1, instances=6))
    with around(objects, script=script, retrieve=retrieve) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        lost, again = retrieves(place)
        assert lost.status is None
        assert len(lost.sent) == len(again.sent) == 3
        assert len(set(place.pacs.sent_instances())) == 6
        place.audit()


def test_a_pacs_that_goes_on_sending_after_a_lost_association_is_let_finish(around):
    script = [Behaviour("net.drop_after", answers=2, on_request=1, keep_sending=True)]
    with around(tiny_instances(1, instances=6), script=script) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert place.asked_for("C-MOVE") == 1
        assert len(place.pacs.sent_instances()) == 6
        place.audit()
