"""Whatever the clock says, the same is moved, kept and claimed; only timestamps differ.

The runs are processes of their own, their receivers too, under a clock that is really another:
a few lines of C stand between them and the operating system. (Not libfaketime: it breaks what
sleeps by the other clock, which measures durations and is not to be touched.) Their archive is a
directory; a bucket's service compares clocks by itself, a fault of S3 with its own reaction.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from prefect_dicom.core.model import Verdict
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support import program
from tests.support.campaign import subset
from tests.support.sites import Place, site_around

pytestmark = pytest.mark.campaign("clock")

STUDIES, INSTANCES = 2, 2
SECOND, HOUR, YEAR = timedelta(seconds=1), timedelta(hours=1), timedelta(days=365)
PATIENCE = 60
# Central Europe, in words that need no time zone database.
BERLIN = "CET-1CEST,M3.5.0,M10.5.0/3"
BEFORE_ITS_END, AFTER_ITS_END = "@2026-10-25T00:59:00+00:00", "@2026-10-25T01:00:00+00:00"


# The time of day, and nothing else, by what a file says: seconds to add, or to stand still at.
_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

typedef int (*gettime)(clockid_t, struct timespec *);

int clock_gettime(clockid_t clock, struct timespec *now) {
    static gettime original;
    char said[64] = "";
    if (!original) original = (gettime)dlsym(RTLD_NEXT, "clock_gettime");
    int result = original(clock, now);
    if (result || (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE)) return result;
    int file = open(getenv("CLOCK_SAYS"), O_RDONLY | O_CLOEXEC);
    if (file < 0) abort();
    if (read(file, said, sizeof said - 1) < 1) said[0] = '+';
    close(file);
    if (said[0] == '=') { now->tv_sec = atoll(said + 1); now->tv_nsec = 0; }
    else now->tv_sec += atoll(said);
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *out, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


@dataclass(frozen=True)
class Clock:
    """What a clock says.

    Seconds ahead of the right one; ``=`` and when it stands still; or ``@`` and what time it is
    when it is set.
    """

    name: str
    says: str
    then: str | None = None
    """What it says from the middle of the run on."""
    zone: str = "UTC"

    def __str__(self) -> str:
        return self.name

    @property
    def last(self) -> str:
        return self.then or self.says


def seconds(span: timedelta) -> str:
    return f"{span.total_seconds():+.0f}"


CLOCKS = [
    Clock("an hour ahead", seconds(HOUR)),
    Clock("an hour behind", seconds(-HOUR)),
    Clock("a year ahead", seconds(YEAR)),
    Clock("set back within the run", "+0", seconds(-YEAR)),
    Clock("put on within the run", "+0", seconds(YEAR)),
    Clock("summer time ends within the run", BEFORE_ITS_END, AFTER_ITS_END, zone=BERLIN),
    Clock("frozen", f"={datetime(2020, 2, 29, 12, tzinfo=UTC).timestamp():.0f}"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """What is put between a process and the operating system's time of day."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    built = tmp_path_factory.mktemp("clock") / "clock.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", str(built), "-ldl"]
    subprocess.run(command, input=_CLOCK, text=True, check=True)
    return built


def under(library: Path, clock: Clock, says: Path) -> dict[str, str]:
    """The environment of a process with this clock; it can be set anew while it runs."""
    set_clock(says, clock.says)
    return {
        **os.environ,
        "LD_PRELOAD": str(library),
        "CLOCK_SAYS": str(says),
        "TZ": clock.zone,
    }


def set_clock(says: Path, to: str) -> None:
    if to[0] == "@":
        to = seconds(datetime.fromisoformat(to[1:]) - datetime.now(UTC))
    new = says.with_suffix(".new")
    new.write_text(to)
    new.replace(says)


@contextlib.contextmanager
def running(place: Place, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A run in a process of its own."""
    with (place.folder / "run.log").open("wb") as log:
        process = subprocess.Popen(
            [*program("sites"), str(place.file), str(place.cohort())],
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


class Held(threading.Event):
    """Holds a retrieval in its middle until the test has done something."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.reached.set()
        return super().wait(PATIENCE)


def held_at_the_first_retrieval() -> tuple[Held, Behaviour]:
    hold = Held()
    return hold, Behaviour("net.stall_after", answers=1, hold=hold, service="C-MOVE", on_request=1)


def what_is_kept(place: Place) -> dict[str, object]:
    """All that a run leaves behind, without its timestamps."""
    kept: dict[str, object] = {}
    for key, data in place.archived().items():
        if key.endswith("manifest.json"):
            manifest = json.loads(data)
            del manifest["listed_at"]
            kept[key] = manifest
        else:
            kept[key] = data
    kept["verdicts"] = [(v.line, v.verdict, v.reason) for v in place.verdicts()]
    kept["requests"] = Counter(s for s in ("C-FIND", "C-MOVE") for _ in place.pacs.requests(s))
    kept["sent"] = Counter(place.pacs.sent_instances())
    return kept


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, object]:
    """What a run leaves behind under the right clock."""
    _, stall = held_at_the_first_retrieval()
    stall.arguments["hold"].set()
    folder = tmp_path_factory.mktemp("right")
    with site_around(folder, tiny_instances(STUDIES, instances=INSTANCES), script=[stall]) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: STUDIES}
        return what_is_kept(place)


@pytest.mark.parametrize("clock", subset(CLOCKS, CLOCKS[3:4]), ids=str)
def test_only_timestamps_tell_that_the_clock_was_wrong(tmp_path, library, expected, clock):
    hold, stall = held_at_the_first_retrieval()
    says = tmp_path / "clock"
    objects = tiny_instances(STUDIES, instances=INSTANCES)
    with site_around(tmp_path, objects, script=[stall]) as place:
        before = datetime.now(UTC)
        with running(place, under(library, clock, says)) as run:
            assert hold.reached.wait(PATIENCE), (tmp_path / "run.log").read_text()
            if clock.then is not None:
                set_clock(says, clock.then)
            hold.set()
            assert run.wait(PATIENCE) == 0, (tmp_path / "run.log").read_text()
        after = datetime.now(UTC)
        assert what_is_kept(place) == expected
        place.audit()
        for study in place.studies().values():
            at = study.archived_at
            if clock.last[0] == "=":
                assert at.timestamp() == int(clock.last[1:])
            elif clock.last[0] == "@":
                assert -SECOND <= at - datetime.fromisoformat(clock.last[1:]) < HOUR
            else:
                assert before <= at - timedelta(seconds=int(clock.last)) <= after
        # The next run, under the right clock, finds nothing to do.
        asked = place.asked_for()
        assert place.pull().rows == {Verdict.ARCHIVED: STUDIES}
        assert place.asked_for() == asked


@pytest.mark.parametrize("clock", subset(CLOCKS[:3], []), ids=str)
def test_a_run_under_another_clock_keeps_what_it_claims(tmp_path, library, clock):
    hold, stall = held_at_the_first_retrieval()
    objects = tiny_instances(STUDIES, instances=INSTANCES)
    with site_around(tmp_path, objects, script=[stall]) as place:
        with running(place, under(library, clock, tmp_path / "clock")) as run:
            assert hold.reached.wait(PATIENCE), (tmp_path / "run.log").read_text()
            # However old or young its claims look, they are the living run's.
            assert place.pull().rows == {Verdict.PENDING: STUDIES}
            with place.ledger() as ledger:
                assert len(ledger.claims.live()) == STUDIES
            hold.set()
            assert run.wait(PATIENCE) == 0, (tmp_path / "run.log").read_text()
        assert place.totals().rows == {Verdict.ARCHIVED: STUDIES}
        assert set(Counter(place.pacs.sent_instances()).values()) == {1}
        place.audit()


@pytest.mark.whole_campaign
def test_a_run_that_dies_under_another_clock_is_taken_over_at_once(tmp_path, library):
    clock = CLOCKS[2]
    hold, stall = held_at_the_first_retrieval()
    objects = tiny_instances(STUDIES, instances=INSTANCES)
    with site_around(tmp_path, objects, script=[stall]) as place:
        with running(place, under(library, clock, tmp_path / "clock")):
            assert hold.reached.wait(PATIENCE), (tmp_path / "run.log").read_text()
        hold.set()
        assert place.pull().rows == {Verdict.ARCHIVED: STUDIES}
        place.audit()
