"""Access schedule of a PACS: when requests may be sent, and at what rates. Pure, given the moment.

A *window* is a part of the day on some days, in the time zone of the site, with the rate limits in
it; outside of all windows no request is sent, or those that ``outside`` allows. A window that goes
over midnight belongs to the day on which it begins. Its ends are local times. A time skipped by
daylight saving is taken with the offset before the change; of a repeated time the first counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from pydantic import BeforeValidator, Field, field_validator

from prefect_dicom.config.settings import Settings

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
HOLIDAYS = "holidays"
_ALL_DAYS = ("mon-sun", HOLIDAYS)
_HOURS = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9])-(?:([01]?[0-9]|2[0-3]):([0-5][0-9])|24:00)")
_LOOK_AHEAD_DAYS = 400
"""A window that opens on no day of a year to come never does."""
_REQUEST_SECONDS = 60
"""A request brings no more than the rate limits allow in so many seconds."""


def _share(value: Any) -> Any:
    """A share of 1, which may be written in percent."""
    text = str(value).strip()
    divisor = 100 if text.endswith("%") else 1
    try:
        share = float(text.removesuffix("%")) / divisor
    except ValueError:
        share = 0
    if not 0 < share <= 1:
        raise ValueError('expected a share above 0 and up to 1, or in percent like "20%"')
    return share


class RateLimits(Settings):
    """Rate limits of a node, shared by all runs on one ledger."""

    associations: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Associations at a time; limits.associations by default.",
    )
    retrieves_per_minute: float | None = Field(
        default=None, gt=0, description="C-MOVE and C-GET requests, on average over a minute."
    )
    instances_per_second: float | None = Field(
        default=None, gt=0, description="Instances, on average over a minute."
    )
    bytes_per_second: float | None = Field(
        default=None, gt=0, description="Bytes of instances, on average over a minute."
    )
    utilisation: Annotated[float, BeforeValidator(_share)] = Field(
        default=1,
        description="Share of the time for which its associations are busy with requests.",
    )

    @property
    def is_metered(self) -> bool:
        """Whether more is limited than the number of associations."""
        rates = (self.retrieves_per_minute, self.instances_per_second, self.bytes_per_second)
        return self.utilisation < 1 or any(rate is not None for rate in rates)

    def request_instances(self, instance_bytes: int) -> int | None:
        """The most instances of a request; None where no rate limits them."""
        bounds = [
            rate * _REQUEST_SECONDS / size
            for rate, size in (
                (self.instances_per_second, 1),
                (self.bytes_per_second, instance_bytes),
            )
            if rate is not None
        ]
        return max(1, int(min(bounds))) if bounds else None

    def format(self, associations: int) -> str:
        """Text of the limits for people; ``associations`` is the most that the node allows."""
        most = min(self.associations or associations, associations)
        words = [f"{most} association{'s' if most != 1 else ''}"]
        if self.utilisation < 1:
            words[0] += f" at {self.utilisation * 100:g} %"
        for rate, what in (
            (self.retrieves_per_minute, "retrieves/min"),
            (self.instances_per_second, "instances/s"),
            (self.bytes_per_second, "bytes/s"),
        ):
            if rate is not None:
                words.append(f"{rate:g} {what}")
        return ", ".join(words)


class Window(RateLimits):
    """Part of the day on some days of the week, with the rate limits in it."""

    name: str = Field(default="", description="A name for people, like night.")
    days: tuple[str, ...] = Field(
        default=_ALL_DAYS,
        description="Days on which it begins: mon to sun, ranges like mon-fri, and holidays, which "
        "are no weekdays.",
    )
    hours: str = Field(
        default="00:00-24:00",
        description="From when to when; over midnight, like 22:00-06:00, as well.",
    )

    @field_validator("days", mode="before")
    @classmethod
    def _one_day_is_a_list(cls, days: Any) -> Any:
        return [part.strip() for part in days.split(",")] if isinstance(days, str) else days

    @field_validator("days")
    @classmethod
    def _days_are_known(cls, days: tuple[str, ...]) -> tuple[str, ...]:
        days = tuple(day.strip().lower() for day in days)
        for day in days:
            first, _, last = day.partition("-")
            if day != HOLIDAYS and not {first, last or first} <= set(DAYS):
                raise ValueError("expected days like mon, sat-sun or holidays")
        if not days:
            raise ValueError("expected at least one day")
        return days

    @field_validator("hours")
    @classmethod
    def _hours_are_two(cls, hours: str) -> str:
        text = re.sub(r"\s", "", hours)
        match = _HOURS.fullmatch(text)
        if match is None:
            raise ValueError("expected two times of the day like 22:00-06:00")
        if match.group(1, 2) == match.group(3, 4):
            raise ValueError("expected two different times; 00:00-24:00 is the whole day")
        return text

    def on(self, day: date, holidays: tuple[date, ...]) -> bool:
        """Whether the window begins on a day."""
        if day in holidays:
            return HOLIDAYS in self.days
        today = day.weekday()
        for part in self.days:
            if part == HOLIDAYS:
                continue
            first, _, last = part.partition("-")
            begin, end = DAYS.index(first), DAYS.index(last or first)
            if (today - begin) % 7 <= (end - begin) % 7:
                return True
        return False

    def times(self, day: date, zone: ZoneInfo) -> tuple[datetime, datetime]:
        """Begin and end, in UTC, of the window that begins on a day."""
        first, last = self.hours.split("-")
        begin = datetime.combine(day, _time(first), zone)
        whole = last == "24:00" or _time(last) <= _time(first)
        end = datetime.combine(
            day + timedelta(days=whole), time() if last == "24:00" else _time(last), zone
        )
        return begin.astimezone(UTC), end.astimezone(UTC)


def _time(text: str) -> time:
    hour, minute = text.split(":")
    return time(int(hour), int(minute))


class AccessSchedule(Settings):
    """Access schedule of a node, kept by all runs on one ledger together."""

    time_zone: str = Field(description="The site's time zone, like Europe/Berlin.")
    holidays: tuple[date, ...] = Field(default=(), description="Dates like 2026-12-25.")
    on_close: Literal["stop", "wait"] = Field(
        default="stop",
        description="When the node closes: stop the run, or wait in it until the node opens.",
    )
    grace_seconds: float = Field(
        default=60,
        ge=0,
        description="Time for a request under way to end; then it is cancelled and aborted.",
    )
    windows: tuple[Window, ...] = Field(
        description="When requests may be sent; of several windows at a moment the first counts."
    )
    outside: RateLimits | None = Field(
        default=None, description="Rate limits outside of all windows; closed by default."
    )

    @field_validator("time_zone")
    @classmethod
    def _zone_is_known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (KeyError, OSError, ValueError):
            raise ValueError(
                "expected a name of the time zone database, like Europe/Berlin"
            ) from None
        return name

    @field_validator("windows")
    @classmethod
    def _one_window_at_least(cls, windows: tuple[Window, ...]) -> tuple[Window, ...]:
        if not windows:
            raise ValueError(
                "expected at least one window; leave `access_schedule` out where none is"
            )
        return windows

    @field_validator("outside", mode="before")
    @classmethod
    def _closed_is_nothing(cls, outside: Any) -> Any:
        return None if outside == "closed" else outside


@dataclass(frozen=True, slots=True)
class ScheduleState:
    """Rate limits in force at a moment, and until when."""

    rate_limits: RateLimits | None
    """None: no request may be sent."""
    until: datetime | None
    """When something else is in force; None where that never happens."""
    name: str = ""
    """Name of the window; empty outside of all."""

    @property
    def closed(self) -> bool:
        """Whether no request may be sent."""
        return self.rate_limits is None


def schedule_state(schedule: AccessSchedule, now: datetime) -> ScheduleState:
    """State of a schedule at a moment.

    Parameters
    ----------
    now : datetime
        Aware of its zone, whichever that is.
    """
    here = _window_at(schedule, now)
    until = next((at for at in _edges(schedule, now) if _window_at(schedule, at) is not here), None)
    if here is None:
        return ScheduleState(schedule.outside, until)
    return ScheduleState(here, until, here.name)


def next_opening(schedule: AccessSchedule, now: datetime) -> datetime | None:
    """When requests may be sent again: now, or later; None: never."""
    state = schedule_state(schedule, now)
    if not state.closed:
        return now
    return state.until


def schedule_states(
    schedule: AccessSchedule, begin: datetime
) -> Iterator[tuple[datetime, ScheduleState]]:
    """States of a schedule from a moment on, each with its begin."""
    at: datetime | None = begin
    while at is not None:
        state = schedule_state(schedule, at)
        yield at, state
        at = state.until


def _window_at(schedule: AccessSchedule, now: datetime) -> Window | None:
    zone = ZoneInfo(schedule.time_zone)
    today = now.astimezone(zone).date()
    for window in schedule.windows:
        for day in (today - timedelta(days=1), today):
            if window.on(day, schedule.holidays):
                begin, end = window.times(day, zone)
                if begin <= now < end:
                    return window
    return None


def _edges(schedule: AccessSchedule, after: datetime) -> Iterator[datetime]:
    """Moments after one at which a window begins or ends, in order."""
    zone = ZoneInfo(schedule.time_zone)
    first = after.astimezone(zone).date() - timedelta(days=1)
    waiting: set[datetime] = set()
    for number in range(_LOOK_AHEAD_DAYS):
        day = first + timedelta(days=number)
        for window in schedule.windows:
            if window.on(day, schedule.holidays):
                waiting.update(window.times(day, zone))
        # What begins on a later day comes after its midnight.
        known = datetime.combine(day + timedelta(days=1), time(), zone).astimezone(UTC)
        for at in sorted(at for at in waiting if at < known):
            waiting.discard(at)
            if at > after:
                yield at


def format_time(at: datetime, schedule: AccessSchedule, now: datetime) -> str:
    """Text of a moment, in the time zone of the site and as short as it is clear."""
    zone = ZoneInfo(schedule.time_zone)
    there, here = at.astimezone(zone), now.astimezone(zone)
    if there.date() == here.date() or timedelta() <= there - here < timedelta(hours=12):
        return f"{there:%H:%M}"
    if there - here < timedelta(days=6):
        return f"{there:%a %H:%M}"
    return f"{there:%Y-%m-%d %H:%M}"


def format_schedule_state(schedule: AccessSchedule, now: datetime, associations: int) -> str:
    """Text of the state now, for people: "night window until 06:00: 4 associations"."""
    state = schedule_state(schedule, now)
    until = f" until {format_time(state.until, schedule, now)}" if state.until else ""
    if state.rate_limits is None:
        return f"closed{until}" if until else "closed, and no window opens"
    inside = isinstance(state.rate_limits, Window)
    what = f"{state.name} window".strip() if inside else "outside of the windows"
    return f"{what}{until}: {state.rate_limits.format(associations)}"
