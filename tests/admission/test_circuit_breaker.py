"""One admission per PACS node: all threads wait for a failed node, and a disabled one is left.

Faults of the configuration (AE titles, addresses, permissions) end a run after its first few
requests, with what to do in the message; what was not asked for stays pending and is not failed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest

from prefect_dicom.admission.circuit_breaker import JITTER
from prefect_dicom.admission.node import NodeAdmission
from prefect_dicom.archive.spool import Spool
from prefect_dicom.core.errors import Interrupted, PacsError, SpoolFull
from prefect_dicom.core.model import Disposition, InstanceState, StudyState, Verdict
from prefect_dicom.core.reasons import REASONS, pointer
from prefect_dicom.network.association_errors import rejected
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.run import open_run
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support import peers
from tests.support.campaign import subset
from tests.support.sites import Place, site_around

WAITS = (30, 60, 120, 240)


class Time:
    """A clock of a test's own."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def admission(time) -> NodeAdmission:
    return NodeAdmission(WAITS, 4, now=time, jitter=lambda: 1.0)


def fail_until_disabled(admission: NodeAdmission, time: Time, code: str) -> list[float]:
    """What is waited for between the failures."""
    waits = []
    while True:
        asked_at = time()
        time.now += 0.1
        admission.record_failure(code, asked_at)
        if admission.disabled_for:
            return waits
        waits.append(admission.seconds_left())
        time.now += waits[-1]


# --- waiting


def test_waits_grow_and_then_it_is_given_up(admission, time):
    assert fail_until_disabled(admission, time, "pacs-refused") == pytest.approx(WAITS)
    assert admission.disabled_for == "pacs-refused"


def test_waits_begin_anew_after_something_has_succeeded(admission, time):
    admission.record_failure("pacs-refused", time())
    time.now += 30
    admission.record_failure("pacs-refused", time())
    assert admission.seconds_left() == 60
    time.now += 60
    admission.record_success()
    admission.record_failure("pacs-refused", time())
    assert admission.seconds_left() == 30


def test_a_wait_is_longer_or_shorter_by_lot(time):
    seen = set()
    for _ in range(200):
        admission = NodeAdmission((100,), 1, now=time)
        admission.record_failure("pacs-refused", time())
        seen.add(round(admission.seconds_left()))
    assert min(seen) >= 100 * (1 - JITTER) and max(seen) <= 100 * (1 + JITTER)
    assert len(seen) > 20


def test_what_was_asked_before_a_failure_failed_with_it_and_counts_once(admission, time):
    asked_at = time()
    time.now += 1
    for _ in range(10):
        admission.record_failure("pacs-refused", asked_at)
        time.now += 0.5
    assert admission.disabled_for is None
    assert admission.seconds_left() == 30 - 5


def test_after_a_failure_one_asks_and_then_one_more_at_a_time(admission, time):
    assert admission.associations == 4
    admission.record_failure("pacs-silent", time())
    widths = [admission.associations]
    time.now += 30
    for _ in range(4):
        admission.record_success()
        widths.append(admission.associations)
    assert widths == [1, 2, 3, 4, 4]


def test_a_pass_over_the_cohort_waits_by_the_same_clock(admission, time):
    assert (
        admission.delay_next_pass(1)
        and admission.seconds_left() == 30
        and admission.waiting_for is None
    )
    time.now += 25
    admission.record_failure("pacs-refused", time())
    assert admission.seconds_left() == 30 and admission.waiting_for == "pacs-refused"
    time.now += 30
    assert admission.seconds_left() == 0 and admission.waiting_for is None
    assert not admission.delay_next_pass(len(WAITS) + 1)


# --- disabling


@pytest.mark.parametrize(
    "code", sorted(c for c, r in REASONS.items() if r.disposition is Disposition.OPERATOR)
)
def test_what_a_person_must_change_disables_at_once(admission, time, code):
    patient = {"association-rejected": [30, 60], "tls-handshake-failed": [30, 60]}
    assert fail_until_disabled(admission, time, code) == pytest.approx(patient.get(code, []))
    assert admission.disabled_for == code


def test_a_rejection_without_a_reason_is_tried_twice_more(admission, time):
    code = rejected(1, 1, 1).code
    assert len(fail_until_disabled(admission, time, code)) == 2


def test_a_reset_is_a_wrong_port_until_the_node_has_worked(time):
    fresh, used = (NodeAdmission(WAITS, 1, now=time) for _ in range(2))
    used.record_success()
    for admission in (fresh, used):
        admission.record_failure("pacs-reset", time())
    assert (fresh.disabled_for, used.disabled_for) == ("pacs-reset", None)


def test_three_studies_of_which_nothing_comes_disable_a_node_that_never_sent_anything(admission):
    for study in (1, 1, 2, 2, 3):
        assert admission.disabled_for is None
        admission.record_nothing_sent(study, "pacs-failure")
    assert admission.disabled_for == "node-sends-nothing"


def test_what_the_peer_says_of_the_destination_is_kept_when_it_disables(admission):
    for study in (1, 2, 3):
        admission.record_nothing_sent(study, "move-destination-failed")
    assert admission.disabled_for == "move-destination-failed"


def test_a_node_that_has_sent_others_may_have_some_damaged_studies(admission):
    admission.record_delivery()
    for study in range(9):
        admission.record_nothing_sent(study, "pacs-failure")
    assert admission.disabled_for is None
    admission.record_delivery()
    for study in range(9):
        admission.record_nothing_sent(study, "pacs-failure")
    assert admission.disabled_for is None
    admission.record_nothing_sent(9, "pacs-failure")
    assert admission.disabled_for == "node-sends-nothing"


def test_ten_queries_that_fail_in_a_row_are_the_nodes_and_not_their_own(admission):
    for _ in range(9):
        admission.record_failed_query()
    admission.record_answer()
    for _ in range(9):
        admission.record_failed_query()
    assert admission.disabled_for is None
    admission.record_failed_query()
    assert admission.disabled_for == "requests-keep-failing"


# --- over real sockets


@pytest.fixture
def around(tmp_path, standing):
    """Builds the site: of objects, and what else :func:`~sites.site_around` takes."""
    quick = {"timeouts": {"settle_seconds": 0.1}, "limits": {"uids_per_request": 10}}
    return partial(site_around, tmp_path, standing=standing, node=quick)


@pytest.fixture
def large(around) -> Iterator[Place]:
    """A site around 200 studies."""
    with around(tiny_instances(200)) as place:
        yield place


def pull_until_disabled(place: Place, caplog) -> PacsError:
    """Pull until the node is disabled, and check what such a run leaves behind."""
    with pytest.raises(PacsError) as caught:
        place.pull()
    code = caught.value.code
    assert f"disabled. {REASONS[code].meaning}" in caplog.text
    assert f"More: {pointer(code)}" in caplog.text
    place.audit()
    return caught.value


DISABLES = [
    (Behaviour("move.unknown_destination"), "move-destination-unknown"),
    (Behaviour("move.unknown_destination", status=0xC000), "node-sends-nothing"),
    (Behaviour("move.success_nothing"), "node-sends-nothing"),
    (Behaviour("move.refuse", status=0xA702), "move-destination-failed"),
    (Behaviour("move.refuse", status=0x0124), "not-permitted"),
    (Behaviour("move.refuse", status=0x0122), "service-not-offered"),
    (Behaviour("net.drop_after", answers=0, service="C-MOVE"), "not-permitted"),
]


@pytest.mark.campaign("a node that is disabled")
@pytest.mark.parametrize("disabling", subset(DISABLES, DISABLES[1:2]), ids=repr)
def test_a_retrieve_that_a_person_must_make_possible_leaves_the_rest_pending(
    large, caplog, disabling
):
    behaviour, code = disabling
    large.pacs.script.append(behaviour)
    assert pull_until_disabled(large, caplog).code == code
    assert 0 < large.asked_for("C-MOVE") <= 8
    assert large.totals().rows == {Verdict.PENDING: 200}
    large.pacs.script.clear()
    assert large.rerun().rows == {Verdict.ARCHIVED: 200}
    large.audit()


@pytest.mark.campaign("a node that is disabled")
@pytest.mark.parametrize(
    ("behaviour", "code", "queries"),
    [
        (Behaviour("find.refuse", status=0x0124), "not-permitted", 1),
        (Behaviour("find.refuse", status=0x0122), "service-not-offered", 1),
        (Behaviour("net.drop_after", answers=0, service="C-FIND"), "not-permitted", 1),
        # First all of them by a list of UIDs; each of the ten once more, with fewer keys.
        (Behaviour("find.refuse", status=0xC001), "requests-keep-failing", 1 + 20),
        (Behaviour("find.refuse", status=0x0110), "requests-keep-failing", 1 + 10),
    ],
    ids=repr,
)
def test_a_query_that_a_person_must_make_possible_leaves_the_rest_pending(
    around, caplog, behaviour, code, queries
):
    with around(tiny_instances(15), script=[behaviour]) as place:
        assert pull_until_disabled(place, caplog).code == code
        assert place.asked_for() == queries
        pending = place.totals().rows[Verdict.PENDING]
        assert pending >= 15 - 10
        place.pacs.script.clear()
        with open_run(place.site, 1, "rerun") as pull:
            # Of what did fail before, `request-refused` is not tried again by itself.
            pull.ledger.cohorts.reopen(1, reasons=list(REASONS))
            work_through(pull)
        assert place.totals().rows == {Verdict.ARCHIVED: 15}


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"port": peers.free_port()}, "pacs-refused"),
        ({"called_ae_title": "NOBODY"}, "called-ae-title-unknown"),
        ({"host": "no-such-host.invalid"}, "pacs-address"),
    ],
)
def test_a_node_with_a_wrong_address_or_title_is_disabled_with_all_rows_pending(
    around, caplog, settings, code
):
    with around(tiny_instances(40), retrieve="c-get") as place:
        place.change(node=settings)
        text = place.file.read_text()
        place.file.write_text(f"{text}\nretry_after_seconds: []\n")
        assert pull_until_disabled(place, caplog).code == code
        assert place.totals().rows == {Verdict.PENDING: 40}
        assert place.asked_for() == 0


def test_a_node_that_is_away_is_waited_for_by_all_threads_of_a_run(around):
    with around(tiny_instances(6), node={"limits": {"chunk_studies": 1}}) as place:
        text = place.file.read_text()
        place.file.write_text(f"{text}\nretry_after_seconds: [3600]\n")
        with place.opened() as pull:
            pull.discovery.discover(2, 7)
            place.pacs.close()
            chunks = list(pull.chunks.chunks())
            with pytest.raises(PacsError, match="pacs-refused"):
                pull.retrieval.retrieve(chunks[0])
            assert pull.reporting.format_waits().startswith("node pacs: waiting until ")
            assert pull.reporting.format_waits().endswith("(pacs-refused)")
            ended: list[type[BaseException]] = []

            def retrieve(chunk) -> None:
                try:
                    pull.retrieval.retrieve(chunk)
                except BaseException as error:
                    ended.append(type(error))

            threads = [threading.Thread(target=retrieve, args=(chunk,)) for chunk in chunks[1:]]
            for thread in threads:
                thread.start()
            # None of them finds out for itself: it would be the second failure, and the end.
            assert pull.access.admission("pacs").disabled_for is None
            pull.control.stop.set()
            for thread in threads:
                thread.join()
            assert ended == [Interrupted] * 5
            assert pull.access.admission("pacs").disabled_for is None
        assert place.totals().rows == {Verdict.PENDING: 6}


def test_a_busy_archive_is_asked_again_when_its_clock_says_so_and_then_for_less(around):
    script = [Behaviour("move.refuse", status=0xA701, times=1)]
    with around(tiny_instances(3), script=script) as place:
        text = place.file.read_text()
        place.file.write_text(f"{text}\nretry_after_seconds: [0.05]\n")
        with place.opened() as pull:
            work_through(pull)
            assert pull.access.admission("pacs").ceiling == 1
        assert place.totals().rows == {Verdict.ARCHIVED: 3}


def test_a_node_at_its_limit_of_associations_is_asked_for_less_from_then_on(around):
    limit = {"result": 2, "source": 3, "reason": 2}
    with around(tiny_instances(3)) as place:
        text = place.file.read_text()
        place.file.write_text(f"{text}\nretry_after_seconds: [0.05]\n")
        with place.opened() as pull:
            pull.discovery.discover(2, 4)
            assert pull.access.admission("pacs").associations == 2
            pull.access.close()
            place.pacs.script.append(Behaviour("assoc.reject", times=1, **limit))
            with pytest.raises(PacsError, match="pacs-busy"):
                work_through(pull)
            work_through(pull)
            assert pull.access.admission("pacs").associations == 1
        assert place.totals().rows == {Verdict.ARCHIVED: 3}


# --- what it means that nothing arrives


def test_a_study_that_has_gone_since_it_was_listed_is_told_so_and_never_asked_for_again(around):
    objects = list(tiny_instances(4, instances=2))
    gone = objects[0].study_instance_uid

    def delete(pacs) -> None:
        for stored in objects[:2]:
            pacs.holdings.remove(stored.sop_instance_uid)

    script = [
        Behaviour("pacs.mutate", change=delete, level="IMAGE", times=1, study=gone),
        Behaviour("move.zero_counts", status=0xC000, study=gone),
    ]
    with around(objects, script=script, node={"limits": {"chunk_studies": 1}}) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 3, Verdict.FAILED: 1}
        assert place.studies()[gone].reason == "study-gone"
        asked = place.asked_for("C-MOVE")
        assert asked == 1 + 3
        assert place.rerun().rows == {Verdict.ARCHIVED: 3, Verdict.FAILED: 1}
        assert place.asked_for("C-MOVE") == asked


@pytest.mark.parametrize("retrieve", ["c-move", "c-get"])
@pytest.mark.parametrize("status", [0xC000, 0x0110, 0x0000])
def test_when_a_single_instance_comes_the_missing_ones_are_asked_for(around, retrieve, status):
    nothing = partial(Behaviour, "move.refuse", status=status)
    if status == 0:
        nothing = partial(Behaviour, "move.success_nothing")
    with around(
        tiny_instances(1, instances=5), script=[nothing(times=1)], retrieve=retrieve
    ) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        requests = place.pacs.requests("C-MOVE") + place.pacs.requests("C-GET")
        assert [len(r.sent) for r in requests][:2] == [0, 1]
        assert len(place.pacs.sent_instances()) == 5
        assert len(place.pacs.requests("C-ECHO")) == 1


def test_a_few_studies_that_cannot_be_sent_fail_alone(around):
    objects = list(tiny_instances(30))
    damaged = {o.study_instance_uid for o in objects[5:10]}
    script = [Behaviour("move.refuse", status=0xA702, study=uid) for uid in damaged]
    with around(objects, script=script, node={"limits": {"chunk_studies": 1}}) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 25, Verdict.FAILED: 5}
        assert {s.reason for s in place.studies().values()} == {None, "move-destination-failed"}
        with place.ledger() as ledger:
            for uid, study in place.studies().items():
                if uid in damaged:
                    assert study.state is StudyState.FAILED
                    (instance,) = ledger.instances.of_study(study.reference)
                    assert instance.state is InstanceState.EXPECTED
        place.audit()


def test_where_the_spool_is_full_it_is_not_the_node_that_sends_nothing(around, monkeypatch):
    script = [Behaviour("move.success_nothing")]
    full = iter([False, False, True])
    check = Spool.check_reserve

    def filling(self) -> None:
        check(self)
        if next(full, True):
            raise SpoolFull()

    monkeypatch.setattr(Spool, "check_reserve", filling)
    with around(tiny_instances(4), script=script) as place, place.opened() as pull:
        with pytest.raises(SpoolFull):
            work_through(pull)
        # The list, and the one instance that was to tell what it means.
        assert place.asked_for("C-MOVE") == 2
        assert pull.access.admission("pacs").disabled_for is None
