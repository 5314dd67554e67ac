"""When a node may be asked: windows over midnight, holidays, and the changes of summer time."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from pydantic import ValidationError

from prefect_dicom.config.access_schedule import (
    AccessSchedule,
    Window,
    format_schedule_state,
    next_opening,
    schedule_state,
    schedule_states,
)
from prefect_dicom.config.node import PacsNode
from prefect_dicom.report.estimate import Estimate, Share, _end

BERLIN = ZoneInfo("Europe/Berlin")
NIGHTS = {"name": "night", "days": "mon-fri", "hours": "22:00-06:00"}
WEEKEND = {"name": "weekend", "days": ["sat", "sun", "holidays"]}


def schedule(*windows: dict, zone: str = "Europe/Berlin", **more: object) -> AccessSchedule:
    return AccessSchedule(time_zone=zone, windows=windows, **more)


def at(text: str, zone: ZoneInfo = BERLIN, fold: int = 0) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold)


def reported(rules: AccessSchedule, begin: str, end: str) -> list[tuple[str, str]]:
    """What holds from one moment to another: on the clock of the site, and the window's name."""
    zone, reported = ZoneInfo(rules.time_zone), []
    for moment, state in schedule_states(rules, at(begin, zone)):
        if moment >= at(end, zone):
            break
        name = state.name if state.rate_limits is not rules.outside else "outside"
        reported.append((f"{moment.astimezone(zone):%a %d %H:%M}", name))
    return reported


def test_a_night_belongs_to_the_day_on_which_it_begins():
    # From Thursday on: Friday's night goes into the Saturday, and there is none from Sunday on.
    assert reported(schedule(NIGHTS), "2026-11-19T12:00", "2026-11-24T00:00") == [
        ("Thu 19 12:00", "outside"),
        ("Thu 19 22:00", "night"),
        ("Fri 20 06:00", "outside"),
        ("Fri 20 22:00", "night"),
        ("Sat 21 06:00", "outside"),
        ("Mon 23 22:00", "night"),
    ]


def test_the_first_window_that_holds_is_in_force_and_the_next_one_begins_where_it_ends():
    assert reported(schedule(NIGHTS, WEEKEND), "2026-11-20T12:00", "2026-11-24T00:00") == [
        ("Fri 20 12:00", "outside"),
        ("Fri 20 22:00", "night"),
        ("Sat 21 06:00", "weekend"),
        ("Mon 23 00:00", "outside"),
        ("Mon 23 22:00", "night"),
    ]


def test_a_holiday_is_no_weekday():
    rules = schedule(NIGHTS, WEEKEND, holidays=["2026-12-24"])
    assert reported(rules, "2026-12-23T12:00", "2026-12-25T23:00") == [
        ("Wed 23 12:00", "outside"),
        ("Wed 23 22:00", "night"),
        # Thursday the 24th: all day, and no night begins on it.
        ("Thu 24 06:00", "weekend"),
        ("Fri 25 00:00", "outside"),
        ("Fri 25 22:00", "night"),
    ]


def test_a_range_of_days_may_go_over_the_end_of_the_week():
    window = Window(days="fri-mon")
    monday = date(2026, 11, 23)
    on = [(monday + timedelta(days=n)) for n in range(7)]
    assert [f"{day:%a}" for day in on if window.on(day, ())] == ["Mon", "Fri", "Sat", "Sun"]


@pytest.mark.parametrize(
    ("night", "hours"),
    [("2026-03-28", 7), ("2026-10-24", 9), ("2026-06-13", 8)],
    ids=["summer time begins", "summer time ends", "any other night"],
)
def test_a_night_in_which_the_clock_changes_is_an_hour_shorter_or_longer(night, hours):
    rules = schedule({"hours": "22:00-06:00"})
    state = schedule_state(rules, at(f"{night}T22:00"))
    assert not state.closed
    assert state.until - at(f"{night}T22:00").astimezone(UTC) == timedelta(hours=hours)
    assert f"{state.until.astimezone(BERLIN):%H:%M}" == "06:00"


def test_a_time_that_the_clock_skips_comes_when_it_would_have_and_one_that_comes_twice_the_first():
    skipped = schedule({"hours": "02:30-05:00"})
    state = schedule_state(skipped, at("2026-03-29T01:00"))
    assert state.until == datetime(2026, 3, 29, 1, 30, tzinfo=UTC)  # 03:30 on the wall
    twice = schedule({"hours": "00:00-02:30"})
    state = schedule_state(twice, at("2026-10-25T00:00"))
    assert state.until == datetime(2026, 10, 25, 0, 30, tzinfo=UTC)
    assert schedule_state(twice, at("2026-10-25T02:15", fold=1)).closed


def test_every_hour_of_two_years_is_in_the_stretch_that_the_wall_clock_says():
    """An oracle of its own: hours of days that change no clock, looked up on the wall."""
    rules = schedule(NIGHTS, WEEKEND, holidays=["2026-05-01", "2027-01-01"])
    moment, end = datetime(2026, 1, 1, 0, 30, tzinfo=UTC), datetime(2028, 1, 1, tzinfo=UTC)
    changes = iter([*states_until(rules, moment, end)])
    begin, state = next(changes)
    following = next(changes, None)
    while moment < end:
        while following and following[0] <= moment:
            begin, state = following
            following = next(changes, None)
        wall = moment.astimezone(BERLIN)
        day = wall.date() - timedelta(days=wall.hour < 6)
        holidays = rules.holidays
        night = wall.hour >= 22 or wall.hour < 6
        if night and day.weekday() < 5 and day not in holidays:
            expected = "night"
        elif wall.date().weekday() >= 5 or wall.date() in holidays:
            expected = "weekend"
        else:
            expected = ""
        assert (state.name, state.closed) == (expected, not expected), moment
        moment += timedelta(hours=1)


def states_until(rules: AccessSchedule, begin: datetime, end: datetime):
    for moment, state in schedule_states(rules, begin):
        if moment >= end:
            return
        yield moment, state


def test_the_zone_is_the_sites_whatever_the_moment_is_told_in():
    rules = schedule(NIGHTS, zone="America/New_York")
    assert not schedule_state(rules, datetime(2026, 11, 20, 4, tzinfo=UTC)).closed  # Thursday 23:00
    assert schedule_state(rules, datetime(2026, 11, 19, 23, tzinfo=UTC)).closed  # Thursday 18:00


def test_what_holds_outside_of_the_windows_may_be_less_than_in_them():
    rules = schedule(NIGHTS, outside={"associations": 1, "utilisation": "20%"})
    state = schedule_state(rules, at("2026-11-20T12:00"))
    assert not state.closed and state.rate_limits.utilisation == 0.2
    assert next_opening(rules, at("2026-11-20T12:00")) == at("2026-11-20T12:00")


def test_the_next_opening_may_be_days_away_or_never():
    assert next_opening(schedule(NIGHTS), at("2026-11-21T12:00")) == at("2026-11-23T22:00")
    holidays = schedule({"days": "holidays"}, holidays=["2026-12-25"])
    assert next_opening(holidays, at("2026-01-02T12:00")) == at("2026-12-25T00:00")
    assert next_opening(holidays, at("2026-12-26T12:00")) is None


def test_people_read_what_holds_and_until_when():
    rules = schedule(NIGHTS | {"associations": 4, "retrieves_per_minute": 30})
    words = format_schedule_state(rules, at("2026-11-20T23:10"), 8)
    assert words == "night window until 06:00: 4 associations, 30 retrieves/min"
    assert format_schedule_state(rules, at("2026-11-21T09:00"), 8) == "closed until Mon 22:00"
    day = schedule(NIGHTS, outside={"associations": 1, "utilisation": 0.2})
    words = format_schedule_state(day, at("2026-11-20T12:00"), 8)
    assert words == "outside of the windows until 22:00: 1 association at 20 %"


def test_a_request_is_no_larger_than_a_minute_brings():
    window = Window(instances_per_second=10, bytes_per_second=1_000_000)
    assert window.request_instances(50_000) == 600
    assert window.request_instances(500_000) == 120
    assert Window(bytes_per_second=1).request_instances(500_000) == 1
    assert Window().request_instances(500_000) is None


NODE = {"host": "pacs", "port": 104, "called_ae_title": "PACS"}


def faults(**schedule: object) -> dict[tuple, str]:
    with pytest.raises(ValidationError) as caught:
        PacsNode(**NODE, access_schedule={"time_zone": "UTC", "windows": [{}]} | schedule)
    return {error["loc"]: error["msg"] for error in caught.value.errors()}


def test_all_faults_of_an_access_schedule_are_told_at_once():
    found = faults(
        time_zone="Europe/Atlantis",
        grace_seconds=-1,
        on_close="end",
        windows=[
            {"days": "mon-fry", "hours": "22-6"},
            {"hours": "06:00-06:00", "utilisation": "120%", "associations": 0},
        ],
    )
    assert set(found) == {
        ("access_schedule", "time_zone"),
        ("access_schedule", "grace_seconds"),
        ("access_schedule", "on_close"),
        ("access_schedule", "windows", 0, "days"),
        ("access_schedule", "windows", 0, "hours"),
        ("access_schedule", "windows", 1, "hours"),
        ("access_schedule", "windows", 1, "utilisation"),
        ("access_schedule", "windows", 1, "associations"),
    }


def test_a_window_cannot_allow_more_associations_than_the_node_has():
    (fault,) = faults(windows=[{"associations": 4}]).values()
    assert "at most 2, which `limits.associations` allows" in fault
    more = PacsNode(
        **NODE,
        limits={"associations": 4},
        access_schedule={"time_zone": "UTC", "windows": [{"associations": 4}]},
    )
    assert more.access_schedule.windows[0].associations == 4


def test_a_dry_run_tells_the_hours_of_windows_that_a_cohort_takes_and_when_it_ends():
    """Eighteen hours at the full rate, by nights of four of eight associations at 50 %."""
    node = PacsNode(
        **NODE,
        limits={"associations": 8},
        access_schedule={
            "time_zone": "Europe/Berlin",
            "windows": [NIGHTS | {"associations": 4, "utilisation": "50%"}],
        },
    )
    whole = estimated(18 * 3600)
    ends = _end(whole, node, at("2026-11-23T12:00"))
    # Of each night a quarter: 72 hours of nights are nine of them, with a weekend between.
    assert (ends.seconds, ends.at) == (72 * 3600, at("2026-12-04T06:00"))
    assert ends.words == "2026-12-04 06:00"
    slower = estimated(18 * 3600, instances=1000)
    by_objects = PacsNode(
        **NODE,
        access_schedule={"time_zone": "Europe/Berlin", "windows": [{"instances_per_second": 0.1}]},
    )
    # A thousand objects at ten in a hundred seconds, or as long as their bytes take.
    assert _end(slower, by_objects, at("2026-11-23T12:00")).seconds == 18 * 3600
    many = estimated(3600, instances=1000)
    assert _end(many, by_objects, at("2026-11-23T12:00")).seconds == 10_000
    assert _end(whole, PacsNode(**NODE), at("2026-11-23T12:00")) is None


def estimated(seconds: int, instances: int = 10) -> Estimate:
    share = Share("CT", 10, 10, instances, 1000 * seconds, 1000 * seconds // instances, True)
    return Estimate(Counter(), (share,), 0, 0, 0, 1000.0, True)
