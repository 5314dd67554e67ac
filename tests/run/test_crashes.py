"""A run or its receiver may die between any two effects that last; the next one goes on.

After each death, and again when the next run has come to its end, an auditor that shares nothing
with the product compares PACS, spool, archive and ledger.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from prefect_dicom.config.tls import Tls
from prefect_dicom.core.failpoints import POINTS
from prefect_dicom.core.model import Verdict
from prefect_dicom.network.storage_scp import running_receiver
from prefect_dicom.testing import Behaviour, tiny_instances
from prefect_dicom.testing.audit import Auditor
from tests.support import crashes, postgres
from tests.support.campaign import only_in, subset
from tests.support.s3_server import S3Server
from tests.support.sites import Place, Standing, credentials, site_around

STUDIES, INSTANCES = 3, 3
_numbers = itertools.count(1)

# What only happens to objects that are faulty, or that nobody asked for.
STRANGE = ("set-aside", "rejection-recorded", "quarantine-noted")
# Met for every row, object or folder: the second time something has been done and something not.
# The others may be met but once, where two workers share few studies.
OFTEN = (
    "row-answered",
    "part-begun",
    "part-whole",
    "part-kept",
    "store-answered",
    "validated",
    "put-begun",
    "object-linked",
    "put-answered",
    "half-dropped",
)
# Reached by the receiver, which is a process of its own, where there is one.
IN_THE_RECEIVER = (
    "expectation-noted",
    "part-begun",
    "part-whole",
    "part-kept",
    "store-answered",
    "quarantine-noted",
)


@dataclass(frozen=True)
class Case:
    """One way to die."""

    kind: str
    point: str
    retrieve: str
    ledger: str
    workers: int
    over_tls: bool = False

    def __str__(self) -> str:
        name = f"{self.point}-{self.retrieve}-{self.ledger}-{self.workers}"
        return f"{name}-tls" if self.over_tls else name

    @property
    def to_a_bucket(self) -> bool:
        """Both kinds of archive, in turn."""
        return (self.retrieve == "c-get") == (self.ledger == "sqlite")

    @property
    def of_a_receiver(self) -> bool:
        """Whether the receiver is to die, and not the run."""
        return self.retrieve == "c-move" and self.point in IN_THE_RECEIVER

    @property
    def needs_its_own_receiver(self) -> bool:
        """Whether a receiver has to be started, in this case of all."""
        return self.of_a_receiver or self.point == "receiver-started" or self.over_tls

    @property
    def happens(self) -> bool:
        """Whether such a run meets the point at all."""
        if self.point in ("expectation-noted", "receiver-started"):
            return self.retrieve == "c-move"
        return self.point != "object-linked" or not self.to_a_bucket

    @property
    def verdicts(self) -> dict[Verdict, int]:
        """What becomes of the rows in the end."""
        if self.point in ("set-aside", "rejection-recorded"):
            return {Verdict.ARCHIVED: STUDIES - 1, Verdict.PARTIAL: 1}
        return {Verdict.ARCHIVED: STUDIES}

    @property
    def fault(self) -> str:
        return f"{self.point}:{2 if self.point in OFTEN else 1}:{self.kind}"


def cases(kind: str) -> list[Case]:
    every = itertools.product(POINTS, ("c-move", "c-get"), ("sqlite", "postgresql"), (1, 2))
    over_tls = itertools.product(
        POINTS if kind == "kill" else (), ["c-move"], ["sqlite"], [1], [True]
    )
    return [
        case
        for point, *rest in (*every, *over_tls)
        if (case := Case(kind, point, *rest)).happens and (kind != "enospc" or POINTS[point].writes)
    ]


# These have found what no other test did, or are the one of their kind.
ALWAYS = {
    "kill": (
        "receiver-started-c-move-sqlite-1",
        "archived-recorded-c-get-postgresql-1",
        # Two workers, and a bucket.
        "put-answered-c-move-postgresql-2",
    ),
    "raise": ("part-whole-c-move-sqlite-1",),
    "enospc": ("quarantine-noted-c-move-sqlite-1",),
}


def few_or_all(kind: str) -> list:
    """All cases of a kind for the campaign, and always those found to matter."""
    every = cases(kind)
    return subset(every, [case for case in every if str(case) in ALWAYS[kind]])


@pytest.fixture(scope="module")
def bucket() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@dataclass(frozen=True)
class Stage:
    """What a case needs around it."""

    folder: Path
    bucket: S3Server
    standing: Standing
    tls: Tls


@pytest.fixture
def stage(tmp_path, bucket, standing, authority, monkeypatch) -> Stage:
    credentials(bucket, monkeypatch)
    return Stage(tmp_path, bucket, standing, authority.tls(authority.issue("crashes")))


@contextlib.contextmanager
def scene(case: Case, stage: Stage) -> Iterator[Place]:
    """The site of a case, around a PACS that misbehaves where the point asks for it."""
    objects = list(tiny_instances(STUDIES, instances=INSTANCES))
    script = []
    if case.point == "quarantine-noted":
        nobodys = list(tiny_instances(1, seed=7))
        script.append(Behaviour("store.unsolicited", extra=nobodys))
    elif case.point == "list-extended":
        script.append(Behaviour("find.no_image_level"))
    elif case.point in STRANGE:
        script.append(Behaviour("store.truncate", instances=[objects[1].sop_instance_uid]))
    parts = {"node": {"limits": {"chunk_studies": 2}}, "validation": {"faulty": "leave-out"}}
    if case.ledger == "postgresql":
        parts["ledger"] = {"url": postgres.cluster().new_database(), "path": None}
    if case.to_a_bucket:
        # The same studies in every case: each has a prefix of its own.
        parts["archive"] = {"prefix": f"case-{next(_numbers)}"}
    folder = stage.folder / "site"
    folder.mkdir()
    with site_around(
        folder,
        objects,
        script=script,
        retrieve=case.retrieve,
        bucket=stage.bucket if case.to_a_bucket else None,
        standing=None if case.needs_its_own_receiver else stage.standing,
        tls=stage.tls if case.over_tls else None,
        **parts,
    ) as place:
        yield place


def comes_to_its_end(place: Place, cohort: Path, auditor: Auditor, verdicts) -> None:
    """The next run finishes the cohort, and one more has nothing to do."""
    crashes.bring_to_its_end(place.file, cohort)
    assert auditor.audit(finished=True) == []
    with place.ledger() as ledger:
        # Not always the first number: PostgreSQL gives none a second time.
        [known] = ledger.cohorts.all()
        assert ledger.progress.totals(known.number).rows == verdicts
    assert auditor.audit_rerun(lambda: crashes.bring_to_its_end(place.file, cohort)) == []


def dies_and_goes_on(case: Case, stage: Stage) -> None:
    with scene(case, stage) as place:
        cohort, note, log = place.cohort(), stage.folder / "note", stage.folder / "log"
        auditor = Auditor(place.site, place.pacs, watch=place.folder)
        runs = [
            crashes.start(place.file, cohort, log, f"{case.fault}:{note}")
            for _ in range(case.workers)
        ]
        codes = crashes.ended(runs)
        assert note.exists(), f"{case.point} was not met: {codes}, {place.reasons()}"
        process = int(note.read_text().split()[0])
        assert (process in [run.pid for run in runs]) is not case.of_a_receiver
        for run, code in zip(runs, codes, strict=True):
            if run.pid != process:
                # The other run, and the one whose receiver died, are not to be harmed.
                assert code == 0, log.read_text()
            elif case.kind == "kill":
                assert code == crashes.KILLED
        assert auditor.audit() == []
        comes_to_its_end(place, cohort, auditor, case.verdicts)


@pytest.mark.campaign("crash: kill")
@pytest.mark.parametrize("case", few_or_all("kill"), ids=str)
def test_killed_at_any_point(case, stage):
    dies_and_goes_on(case, stage)


@pytest.mark.campaign("crash: kill")
@pytest.mark.parametrize("nth", subset(range(1, 7), [4]))
def test_killed_in_the_middle_of_an_object_that_goes_in_parts(nth, stage):
    # Three parts of 5 MiB at most, each read for its hash and read again to be sent.
    objects = list(tiny_instances(1, instances=1, side=3500))
    assert 10 * 1024**2 < len(objects[0].encoded()) < 15 * 1024**2
    folder = stage.folder / "site"
    folder.mkdir()
    archive = {"prefix": f"case-{next(_numbers)}", "part_bytes": 5 * 1024**2}
    with site_around(
        folder, objects, retrieve="c-get", bucket=stage.bucket, archive=archive
    ) as place:
        cohort = place.cohort()
        auditor = Auditor(place.site, place.pacs, watch=place.folder)
        fault = f"put-begun:{nth}:kill"
        run = crashes.start(place.file, cohort, stage.folder / "log", fault)
        assert crashes.ended([run]) == [crashes.KILLED]
        assert auditor.audit() == []
        comes_to_its_end(place, cohort, auditor, {Verdict.ARCHIVED: 1})
        assert len(place.pacs.sent_instances()) == 1


@pytest.mark.campaign("crash: kill")
@pytest.mark.parametrize("nth", subset([1, 3, 5], [3]))
@pytest.mark.parametrize("retrieve", subset(["c-move", "c-get"], ["c-get"]))
@pytest.mark.parametrize(
    "point", subset(["part-whole", "part-kept", "store-answered"], ["part-whole"])
)
def test_killed_while_instances_that_were_answered_are_hashed(point, retrieve, nth, stage):
    # Large ones get their name beside the transfer; the PACS sends ahead meanwhile.
    objects = list(tiny_instances(2, instances=INSTANCES, side=600))
    case, note = Case("kill", point, retrieve, "sqlite", 1), stage.folder / "note"
    folder = stage.folder / "site"
    folder.mkdir()
    script = [Behaviour("store.pipeline")]
    with site_around(folder, objects, retrieve=retrieve, script=script) as place:
        cohort = place.cohort()
        auditor = Auditor(place.site, place.pacs, watch=place.folder)
        run = crashes.start(place.file, cohort, stage.folder / "log", f"{point}:{nth}:kill:{note}")
        [code] = crashes.ended([run])
        assert code == (0 if case.of_a_receiver else crashes.KILLED)
        assert note.exists()
        assert auditor.audit() == []
        comes_to_its_end(place, cohort, auditor, {Verdict.ARCHIVED: 2})


@pytest.mark.campaign("crash: raise")
@pytest.mark.parametrize("case", few_or_all("raise"), ids=str)
def test_an_error_nothing_expects_at_any_point(case, stage):
    dies_and_goes_on(case, stage)


@pytest.mark.campaign("crash: every boundary in turn")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("retrieve", subset(["c-move", "c-get"], ["c-move"]))
def test_killed_at_each_point_a_run_meets_until_it_meets_no_more(retrieve, stage, seed, scale):
    # Whatever comes to be named in the code is among them, be it in no table of this file.
    every = range(1, scale(1, 200) + 1)
    numbers = every if len(every) > 1 else [random.Random(seed).randint(1, 60)]
    for number in numbers:
        case = Case("kill", "*", retrieve, "sqlite", 1)
        turn = replace(stage, folder=stage.folder / str(number))
        turn.folder.mkdir()
        with scene(case, turn) as place:
            cohort, note = place.cohort(), turn.folder / "note"
            auditor = Auditor(place.site, place.pacs, watch=place.folder)
            fault = f"*:{number}:kill:{note}"
            [code] = crashes.ended([crashes.start(place.file, cohort, turn.folder / "log", fault)])
            assert code == (crashes.KILLED if note.exists() else 0)
            assert auditor.audit() == []
            comes_to_its_end(place, cohort, auditor, case.verdicts)
        if not note.exists():
            assert number > INSTANCES * STUDIES
            return
    assert len(every) == 1, "a run met more points than were tried"


@pytest.mark.campaign("crash: disk full")
@pytest.mark.parametrize("case", few_or_all("enospc"), ids=str)
def test_the_disk_is_full_wherever_something_is_written(case, stage):
    dies_and_goes_on(case, stage)


def site_of(folder: Path, lot: random.Random, studies: int) -> AbstractContextManager[Place]:
    """A site whose kind is drawn by lot; every tenth object needs many reads and writes."""
    objects = [
        one
        for number in range(studies)
        for one in tiny_instances(1, instances=lot.randint(1, 6), seed=number + 1)
    ]
    objects += [next(iter(tiny_instances(1, seed=1000 + n, side=900))) for n in range(studies // 3)]
    parts: dict = {"node": {"limits": {"chunk_studies": lot.choice((1, 2, 10))}}}
    if lot.random() < 0.3:
        parts["ledger"] = {"url": postgres.cluster().new_database(), "path": None}
    folder.mkdir()
    return site_around(folder, objects, retrieve=lot.choice(("c-move", "c-get")), **parts)


def killed_until_it_ends(
    place: Place, lot: random.Random, folder: Path, between: tuple[float, float], most: int
) -> int:
    """Kill one run after the other at random times, until one has ended; how many were killed.

    With C-MOVE it is sometimes the receiver that dies, and the run has to come to its end.
    """
    cohort = place.cohort()
    auditor = Auditor(place.site, place.pacs, watch=place.folder)
    killed = 0
    while True:
        run = crashes.start(place.file, cohort, folder / "log")
        run.join(lot.uniform(*between))
        if run.is_alive() and killed < most:
            killed += 1
            if lot.random() < 0.2 and (receiver := receiver_of(place)) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(receiver, signal.SIGKILL)
            else:
                crashes.kill([run])
        [code] = crashes.ended([run])
        assert code in (0, crashes.KILLED), (folder / "log").read_text()
        assert auditor.audit() == []
        if code == 0:
            break
    rows = len(place.pacs.holdings.study_instance_uids())
    comes_to_its_end(place, cohort, auditor, {Verdict.ARCHIVED: rows})
    return killed


def receiver_of(place: Place) -> int | None:
    """The process of the receiver, if there is one."""
    if (lease := running_receiver(place.site)) is None:
        return None
    with lease:
        return lease.status()["pid"]


@pytest.mark.campaign("random kills")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", subset(range(10), [0]))
def test_killed_at_any_time(tmp_path, seed, scale, part):
    lot, left = random.Random(f"{seed}/{part}"), scale(3, 100)
    for life in itertools.count():
        folder = tmp_path / str(life)
        folder.mkdir()
        with site_of(folder / "site", lot, 3) as place:
            # From the first steps of a run to well behind its end.
            left -= killed_until_it_ends(place, lot, folder, (0.05, 1.5), left)
        shutil.rmtree(folder)
        if not left:
            break


@only_in("kill loop")
@pytest.mark.timeout(3600)
def test_killed_again_and_again_a_cohort_comes_to_its_end(tmp_path, seed):
    lot = random.Random(seed)
    with site_of(tmp_path / "site", lot, 50) as place:
        assert killed_until_it_ends(place, lot, tmp_path, (0.3, 2), 1000) < 1000
