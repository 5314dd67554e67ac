"""The auditor finds nothing where all is well, and names what was broken on purpose."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefect_dicom.core.failpoints import InjectedError, arm
from prefect_dicom.testing import ScriptedPacs, tiny_instances
from prefect_dicom.testing.audit import INVARIANTS, Auditor
from tests.support import crashes, postgres
from tests.support.s3_server import S3Server
from tests.support.sites import Place, credentials, site_around

STUDIES, INSTANCES = 2, 3


@contextlib.contextmanager
def a_place(folder: Path, **parts) -> Iterator[tuple[Place, Auditor]]:
    folder.mkdir()
    objects = tiny_instances(STUDIES, instances=INSTANCES)
    with site_around(folder, objects, retrieve="c-get", **parts) as place:
        place.cohort()
        yield place, Auditor(place.site, place.pacs, watch=folder)


@pytest.fixture(scope="module")
def archived(tmp_path_factory) -> Iterator[tuple[Place, Path]]:
    """A cohort that was archived, and a copy of all it left."""
    folder = tmp_path_factory.mktemp("archived")
    with a_place(folder / "site") as (place, _):
        crashes.bring_to_its_end(place.file, place.folder / "cohort.csv")
        shutil.copytree(place.folder, folder / "copy")
        yield place, folder / "copy"


@pytest.fixture
def finished(archived) -> Iterator[tuple[Place, Auditor]]:
    """The same for a test to break, found to be in order once."""
    place, copy = archived
    holdings = list(place.pacs.holdings)
    auditor = Auditor(place.site, place.pacs, watch=place.folder)
    assert auditor.audit(finished=True) == []
    yield place, auditor
    shutil.rmtree(place.folder)
    shutil.copytree(copy, place.folder)
    for stored in list(place.pacs.holdings):
        place.pacs.holdings.remove(stored.sop_instance_uid)
    for stored in holdings:
        place.pacs.holdings.add(stored)


@contextlib.contextmanager
def stopped_at(folder: Path, point: str) -> Iterator[tuple[Place, Auditor]]:
    """A run that ended in the middle, and was found to be in order."""
    with a_place(folder) as (place, auditor):
        arm(f"{point}:1:raise")
        try:
            with pytest.raises(InjectedError):
                crashes.bring_to_its_end(place.file, place.folder / "cohort.csv")
        finally:
            arm(None)
        assert auditor.audit() == []
        yield place, auditor


def objects_of(place: Place) -> list[Path]:
    return sorted((place.folder / "archive").rglob("*.dcm"))


def manifests_of(place: Place) -> list[Path]:
    return sorted((place.folder / "archive").rglob("manifest.json"))


def in_the_ledger(place: Place, statement: str) -> None:
    """Change the ledger behind the back of its constraints."""
    with contextlib.closing(sqlite3.connect(place.folder / "ledger.sqlite")) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(statement)
        connection.commit()


def broken(auditor: Auditor, finished: bool = True) -> set[str]:
    return {violation.invariant for violation in auditor.audit(finished=finished)}


@pytest.mark.parametrize(("ledger", "archive"), [("sqlite", "directory"), ("postgresql", "bucket")])
def test_nothing_is_found_where_all_is_well(tmp_path, monkeypatch, ledger, archive):
    parts: dict = {}
    if ledger == "postgresql":
        parts["ledger"] = {"url": postgres.cluster().new_database(), "path": None}
    with S3Server() as bucket:
        credentials(bucket, monkeypatch)
        if archive == "bucket":
            parts["archive"] = {"prefix": "some/where"}
        with a_place(
            tmp_path / "site", bucket=bucket if archive == "bucket" else None, **parts
        ) as (place, auditor):
            assert auditor.audit() == []
            cohort = place.folder / "cohort.csv"
            crashes.bring_to_its_end(place.file, cohort)
            assert auditor.audit(finished=True) == []
            again = lambda: crashes.bring_to_its_end(place.file, cohort)  # noqa: E731
            assert auditor.audit_rerun(again) == []
            # It did look: the same with one object less is another matter.
            if archive == "bucket":
                del bucket.objects[next(key for key in bucket.objects if key.endswith(".dcm"))]
            else:
                objects_of(place)[0].unlink()
            assert {"I1", "I4"} <= broken(auditor)


def _change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _another_manifest(place: Place) -> None:
    [path, *_] = manifests_of(place)
    path.write_text(path.read_text().replace('"withheld": []', '"withheld":  []'))


def _strange_object(place: Place) -> None:
    [path, *_] = objects_of(place)
    [other] = tiny_instances(1, seed=5)
    (path.parent / "1.2.3.dcm").write_bytes(path.read_bytes()[:144] + bytes(4) + other.encoded())


def _twice(place: Place) -> None:
    [path, *_] = objects_of(place)
    shutil.copy(path, path.parent / "1.2.3.dcm")


def _one_more_on_the_pacs(place: Place) -> None:
    one = next(iter(tiny_instances(STUDIES, instances=INSTANCES + 1, seed=0)))
    more = list(tiny_instances(1, instances=INSTANCES + 1))[-1]
    assert more.study_instance_uid == one.study_instance_uid
    place.pacs.holdings.add(more)


def _other_pixels_on_the_pacs(place: Place) -> None:
    place.pacs.holdings.add(next(iter(tiny_instances(1, side=5))))


def _in_the_ledger(statement: str) -> Callable[[Place], None]:
    return lambda place: in_the_ledger(place, statement)


def _file(name: str) -> Callable[[Place], None]:
    def make(place: Place) -> None:
        path = place.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")

    return make


WAYS = {
    "an object is gone": ({"I1", "I4", "I6"}, lambda place: objects_of(place)[0].unlink()),
    "an object's bytes changed": ({"I1", "I2", "I4"}, lambda place: _change(objects_of(place)[0])),
    "a manifest is gone": ({"I1", "I3", "I4"}, lambda place: manifests_of(place)[0].unlink()),
    "a manifest is not the ledger's": ({"I1", "I4"}, _another_manifest),
    "the ledger counts otherwise": (
        {"I1"},
        _in_the_ledger("UPDATE studies SET archived_instances = archived_instances + 1"),
    ),
    "the PACS holds one more": ({"I2"}, _one_more_on_the_pacs),
    "the PACS holds other bytes": ({"I2"}, _other_pixels_on_the_pacs),
    "an object nobody asked for": ({"I3"}, _strange_object),
    "a file that is no object": ({"I3"}, _file("archive/studies/notes.txt")),
    "a study the ledger does not know": (
        {"I3", "I9"},
        _in_the_ledger("DELETE FROM studies WHERE reference = 1"),
    ),
    "an instance under two keys": ({"I3", "I4"}, _twice),
    "a file beside everything": ({"I7"}, _file("elsewhere.txt")),
    "a strange file in the spool": ({"I7"}, _file("spool/notes.txt")),
    "a part nobody writes": ({"I7"}, _file(f"spool/incoming/{'0' * 32}.part")),
    "a spool that was not dropped": ({"I7"}, _file("spool/ready/1/x")),
    "a part in the archive": ({"I7"}, _file("archive/.incoming/x.part")),
    "a finished study with a claim": ({"I8"}, _in_the_ledger("UPDATE studies SET run = 1")),
    "an attempt that went back": ({"I8"}, _in_the_ledger("UPDATE studies SET attempt = 0")),
    "a cohort that lost a row": (
        {"I9"},
        _in_the_ledger("DELETE FROM cohort_rows WHERE line = 2"),
    ),
    "a row that lost its study": ({"I9"}, _in_the_ledger("DELETE FROM row_studies")),
    "a study in no known state": ({"I9"}, _in_the_ledger("UPDATE studies SET state = 'gone'")),
    "a study that failed for nothing": (
        {"I9"},
        _in_the_ledger("UPDATE studies SET state = 'failed', run = NULL"),
    ),
    "a study that is archived no more": (
        {"I9"},
        _in_the_ledger("UPDATE studies SET state = 'listed'"),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_was_broken_is_named(finished, way):
    place, auditor = finished
    expected, break_it = WAYS[way]
    break_it(place)
    assert broken(auditor) == expected


def test_an_instance_that_vanished_from_the_spool_is_named(tmp_path):
    with stopped_at(tmp_path / "site", "received-recorded") as (place, auditor):
        ready = sorted((place.folder / "spool" / "ready").rglob("*.dcm"))
        assert len(ready) >= INSTANCES
        ready[0].unlink()
        assert broken(auditor, finished=False) == {"I5", "I6"}


def test_an_instance_that_was_answered_and_never_kept_is_named(tmp_path):
    with a_place(tmp_path / "site") as (place, auditor):
        arm("request-ended:1:raise")
        with pytest.raises(InjectedError):
            crashes.bring_to_its_end(place.file, place.folder / "cohort.csv")
        arm(None)
        next((place.folder / "spool" / "ready").rglob("*.dcm")).unlink()
        # Never seen in the spool, not in the ledger: only the PACS can tell.
        assert broken(auditor, finished=False) == {"I6"}


class _PacsThatStillSends:
    """A PACS whose last object comes to the spool at the moment the auditor asks for its log."""

    def __init__(self, pacs: ScriptedPacs, part: Path, file: Path) -> None:
        self._pacs, self._part, self._file = pacs, part, file

    @property
    def log(self) -> list:
        if self._part.exists():
            self._part.rename(self._file)
        return self._pacs.log

    def __getattr__(self, name: str) -> object:
        return getattr(self._pacs, name)


def test_an_instance_that_arrives_while_the_auditor_looks_is_not_missed(tmp_path):
    with a_place(tmp_path / "site") as (place, _):
        arm("request-ended:1:raise")
        with pytest.raises(InjectedError):
            crashes.bring_to_its_end(place.file, place.folder / "cohort.csv")
        arm(None)
        file = next((place.folder / "spool" / "ready").rglob("*.dcm"))
        part = file.rename(tmp_path / "on its way")
        # A receiver outlives its run for a moment, and goes on storing.
        auditor = Auditor(place.site, _PacsThatStillSends(place.pacs, part, file))
        assert broken(auditor, finished=False) == set()


def test_an_instance_said_to_be_stored_that_is_not_there_is_named(tmp_path):
    with stopped_at(tmp_path / "site", "study-stored") as (place, auditor):
        objects_of(place)[-1].unlink()
        assert {"I4", "I5"} <= broken(auditor, finished=False)


def test_a_claim_of_a_run_that_ended_is_named(tmp_path):
    with stopped_at(tmp_path / "site", "list-recorded") as (place, auditor):
        in_the_ledger(place, "UPDATE studies SET run = 1 WHERE state = 'listed'")
        assert broken(auditor, finished=False) == {"I8"}


def test_a_row_without_an_end_is_named_only_where_the_run_had_one(tmp_path):
    with stopped_at(tmp_path / "site", "list-recorded") as (_, auditor):
        assert broken(auditor, finished=False) == set()
        assert broken(auditor) == {"I9"}


def test_a_rerun_that_does_something_is_named(finished):
    place, auditor = finished

    def asks_again() -> None:
        in_the_ledger(
            place,
            "UPDATE studies SET state = 'pending', archived_at = NULL, archived_instances = NULL,"
            " withheld_instances = NULL, archived_bytes = NULL WHERE reference = 1",
        )
        in_the_ledger(place, "DELETE FROM manifests WHERE study = 1")
        for path in manifests_of(place):
            path.unlink()
        crashes.bring_to_its_end(place.file, place.folder / "cohort.csv")

    found = auditor.audit_rerun(asks_again)
    assert {violation.invariant for violation in found} == {"I10"}
    assert len(found) == 2
    touched = auditor.audit_rerun(lambda: objects_of(place)[0].touch())
    assert [violation.what for violation in touched] == ["the archive was written to"]


def test_every_invariant_was_broken_once():
    named = set().union(*(expected for expected, _ in WAYS.values()))
    assert named | {"I5", "I6", "I10"} == set(INVARIANTS)
