"""The end of a window, wherever the run is just then: nothing new is asked for, nothing is lost."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from prefect_dicom.core.clock import Clock
from prefect_dicom.core.errors import WindowClosed
from prefect_dicom.core.events import Event
from prefect_dicom.core.model import StudyState
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import Run, open_run
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support.campaign import subset
from tests.support.sites import Place, until

pytestmark = pytest.mark.campaign("operations")

NIGHT = datetime(2026, 11, 23, 23, tzinfo=UTC)
GRACE_SECONDS = 600


class LeapingClock(Clock):
    """The time from a moment on, which a test may move on."""

    def __init__(self, begin: datetime = NIGHT) -> None:
        self._ahead = begin - datetime.now(UTC)

    def now(self) -> datetime:
        return datetime.now(UTC) + self._ahead

    def leap(self, **by: float) -> None:
        self._ahead += timedelta(**by)


@pytest.fixture(params=subset(["c-move", "c-get"], ["c-move"]))
def nights(request, around):
    """A site whose PACS may be asked by night, and its clock, at 23:00."""

    def build(script=(), studies: int = 4, instances: int = 4, **window):
        objects = list(tiny_instances(studies, instances=instances, seed=5))
        schedule = {
            "time_zone": "UTC",
            "grace_seconds": GRACE_SECONDS,
            "windows": [{"name": "night", "hours": "22:00-06:00", **window}],
        }
        node = {"access_schedule": schedule, "limits": {"chunk_studies": 2}}
        return around(objects, retrieve=request.param, script=list(script), node=node)

    return build


def worked(place: Place, clock: Clock, events: list[Event] | None = None) -> None:
    cohort = register_cohort(place.site, place.cohort(), None)
    with open_run(place.site, cohort.number, clock=clock) as pull:
        if events is not None:
            pull.events.subscribe(events.append)
        work_through(pull)


def retrieves(place: Place) -> list:
    return [*place.pacs.requests("C-MOVE"), *place.pacs.requests("C-GET")]


def nothing_is_lost(place: Place, clock: LeapingClock) -> None:
    """Nothing has failed or is held; the next night's run finishes it and moves nothing twice."""
    with place.ledger() as ledger:
        assert not ledger.claims.live()
    assert {s.state for s in place.studies().values()} <= {
        StudyState.PENDING,
        StudyState.LISTED,
        StudyState.ARCHIVED,
    }
    place.audit()
    here = {path.stem for path in place.spooled()}
    asked = len(place.pacs.log)
    with pytest.raises(WindowClosed):
        worked(place, clock)
    assert len(place.pacs.log) == asked, "a run by day asks for nothing"
    assert {path.stem for path in place.spooled()} >= here
    clock.leap(hours=16)
    worked(place, clock)
    place.is_whole()


SLOWLY = [Behaviour("net.slow", service=service, seconds=0.3) for service in ("C-MOVE", "C-GET")]
DEAF = [
    Behaviour("move.ignore_cancel", service=service, how="ignore")
    for service in ("C-MOVE", "C-GET")
]


@pytest.mark.parametrize(
    "script",
    subset([SLOWLY, SLOWLY + DEAF], [SLOWLY]),
    ids=["cancels", "deaf to C-CANCEL"],
)
def test_a_retrieve_that_lasts_longer_than_the_grace_is_cancelled(nights, script):
    with nights(script, studies=2, instances=20) as place, ThreadPoolExecutor(1) as pool:
        clock = LeapingClock()
        run = pool.submit(worked, place, clock)
        until(lambda: len(place.pacs.sent_instances()) >= 2, "objects have come")
        clock.leap(hours=7, minutes=20)
        reported = time.monotonic()
        with pytest.raises(WindowClosed) as closed:
            run.result(30)
        assert time.monotonic() - reported < 10
        assert "the next window opens at 22:00 (UTC)" in closed.value.detail
        assert place.pacs.requests("C-CANCEL")
        if script is SLOWLY:
            assert len(place.pacs.sent_instances()) < 40
        for behaviour in script:
            behaviour.times = behaviour.used
        nothing_is_lost(place, clock)


def test_a_retrieve_within_the_grace_ends_by_itself_and_no_other_is_begun(nights):
    hold = threading.Event()
    script = [
        Behaviour("net.first_byte", service=service, on_request=1, hold=hold)
        for service in ("C-MOVE", "C-GET")
    ]
    with nights(script) as place, ThreadPoolExecutor(1) as pool:
        clock = LeapingClock()
        run = pool.submit(worked, place, clock)
        until(lambda: retrieves(place), "a retrieve is under way")
        asked = len(place.pacs.log)
        clock.leap(hours=7, minutes=5)
        hold.set()
        with pytest.raises(WindowClosed):
            run.result(30)
        assert not place.pacs.requests("C-CANCEL")
        assert len(place.pacs.log) == asked, "nothing is asked for after the edge"
        assert len(place.pacs.sent_instances()) == 8
        # What has come is in the archive already; only its last list is still to be read.
        assert not place.spooled()
        sent = len(place.pacs.sent_instances())
        nothing_is_lost(place, clock)
        assert len(place.pacs.sent_instances()) == sent + 8


def test_rows_are_not_asked_for_after_the_edge(nights):
    with nights(slowly := [Behaviour("net.slow", service="C-FIND", seconds=0.3)]) as place:
        place.change(node={"limits": {"uids_per_request": 1}})
        clock = LeapingClock()
        with ThreadPoolExecutor(1) as pool:
            run = pool.submit(worked, place, clock)
            until(lambda: len(place.pacs.requests("C-FIND")) == 2, "rows are asked for")
            clock.leap(hours=7, minutes=5)
            with pytest.raises(WindowClosed):
                run.result(30)
        assert len(place.pacs.requests("C-FIND")) == 2
        assert not retrieves(place)
        slowly[0].times = slowly[0].used
        nothing_is_lost(place, clock)


def test_who_wants_to_hear_is_told_that_a_window_has_closed(nights):
    with nights() as place:
        events: list[Event] = []
        with pytest.raises(WindowClosed):
            worked(place, LeapingClock(NIGHT + timedelta(hours=10)), events)
        (event,) = [event for event in events if event.name == "window.closed"]
        assert (event.node, event.reason) == ("pacs", "window-closed")
        assert event.figures["associations"] == 0
        assert 12 * 3600 < event.figures["seconds"] < 14 * 3600


def test_where_less_is_allowed_from_a_moment_on_no_more_associations_stand(around):
    """Two threads at night, one association by day: the second gives its own up."""
    schedule = {
        "time_zone": "UTC",
        "grace_seconds": 0,
        "windows": [{"name": "night", "hours": "22:00-06:00"}],
        "outside": {"associations": 1},
    }
    node = {"access_schedule": schedule, "limits": {"chunk_studies": 1, "associations": 2}}
    script = [Behaviour("net.slow", service="C-MOVE", seconds=0.2)]
    objects = list(tiny_instances(6, instances=3, seed=5))
    with around(objects, script=script, node=node) as place:
        clock = LeapingClock()
        cohort = register_cohort(place.site, place.cohort(), None)
        with open_run(place.site, cohort.number, clock=clock) as pull:
            for first, last in pull.discovery.pages():
                pull.discovery.discover(first, last)
            chunks, lock = pull.chunks.chunks(), threading.Lock()

            def work() -> None:
                while True:
                    with lock:
                        chunk = next(chunks, None)
                    if chunk is None:
                        return
                    pull.retrieval.retrieve(chunk)
                    pull.archiving.archive(chunk)

            with ThreadPoolExecutor(2) as pool:
                threads = [pool.submit(work) for _ in range(2)]
                until(lambda: len(place.pacs.requests("C-MOVE")) >= 2, "both are at work")
                clock.leap(hours=8)
                moment = time.monotonic()
                for thread in threads:
                    thread.result(60)
            assert _standing_after(place, moment + 3) <= 1
        assert _standing_before(place, moment) == 2
        place.is_whole()


def _standing_before(place: Place, moment: float) -> int:
    return max(count for at, count in _counts(place) if at <= moment)


def _standing_after(place: Place, moment: float) -> int:
    counts = [(at, count) for at, count in _counts(place)]
    before = [count for at, count in counts if at <= moment]
    return max([before[-1], *(count for at, count in counts if at > moment)])


def _counts(place: Place) -> list[tuple[float, int]]:
    counts, standing = [], 0
    for change in sorted(place.pacs.association_changes, key=lambda change: change.at):
        standing += change.by
        counts.append((change.at, standing))
    return counts


def test_an_association_is_given_up_while_the_next_request_has_to_wait(around):
    """Where requests are metered, a run holds nothing open between them, and says what is on."""
    schedule = {"time_zone": "UTC", "windows": [{"retrieves_per_minute": 20}]}
    with around(
        list(tiny_instances(2, seed=5)),
        node={"access_schedule": schedule, "limits": {"chunk_studies": 1}},
    ) as place:
        began = time.monotonic()
        with place.opened() as pull:
            work_through(pull)
            assert (
                pull.reporting.format_waits()
                == "node pacs: window: 2 associations, 20 retrieves/min"
            )
        assert 3 <= time.monotonic() - began < 20
        moves = [request.at for request in place.pacs.requests("C-MOVE")]
        assert moves[1] - moves[0] >= 2.9
        gaps = [at for at, count in _counts(place) if count == 0]
        assert any(moves[0] < at < moves[1] for at in gaps)
        place.is_whole()


def test_a_run_that_is_alone_pays_two_writes_for_an_association_and_none_for_a_request(
    around, monkeypatch
):
    with around(list(tiny_instances(12, seed=5)), node={"limits": {"chunk_studies": 2}}) as place:
        with place.opened() as pull:
            calls = _counted(pull, monkeypatch, "take_slot", "release_slot", "begin_request")
            work_through(pull)
            pull.access.close()
        associations = len(place.pacs.requests("C-FIND")) and place.pacs.connections
        assert calls["take_slot"] <= associations
        assert calls["release_slot"] == calls["take_slot"]
        assert not calls["begin_request"]


def _counted(pull: Run, monkeypatch, *names: str) -> dict[str, int]:
    calls = dict.fromkeys(names, 0)
    for name in names:
        original = getattr(pull.ledger.rate_limits, name)

        def counted(*args, _name=name, _original=original, **more):
            calls[_name] += 1
            return _original(*args, **more)

        monkeypatch.setattr(pull.ledger.rate_limits, name, counted)
    return calls
