"""Every fault of the ledger's database has one reaction, and none of them loses or doubles work.

The run waits, or stops with a reason and leaves the rest pending; when the fault is gone a rerun
finishes it. What is archived is never moved again, however much the ledger has forgotten.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine, text

from prefect_dicom.core import failpoints
from prefect_dicom.core.errors import LedgerError
from prefect_dicom.core.model import Chunk, Disposition, Verdict
from prefect_dicom.ledger import database, schema
from prefect_dicom.operations.doctor import examine
from prefect_dicom.testing import tiny_instances
from tests.support import program
from tests.support.campaign import subset
from tests.support.disks import fill, remount, small_disk
from tests.support.postgres import Cluster, cluster, new_cluster
from tests.support.sites import Place, site_around

pytestmark = pytest.mark.campaign("ledger")

STUDIES, INSTANCES = 2, 3
KINDS = ("sqlite", "postgresql")


class At:
    """Calls a function when a run comes to a named point for the first time."""

    def __init__(self, point: str, do: Callable[[], object]) -> None:
        self._point, self._do = point, do
        self._lock = threading.Lock()
        self.done = False

    def pass_by(self, point: str) -> None:
        if point != self._point:
            return
        # Other threads that come there meet what it has done.
        with self._lock:
            if not self.done:
                self.done = True
                self._do()


@pytest.fixture
def at(monkeypatch) -> Callable[[str, Callable], At]:
    """A function that arms this process: point and what to do there."""

    def arm(point: str, do: Callable[[], object]) -> At:
        armed = At(point, do)
        monkeypatch.setattr(failpoints, "_armed", armed)
        return armed

    return arm


@contextlib.contextmanager
def place_with(folder: Path, kind: str, server: Cluster | None = None, **parts) -> Iterator[Place]:
    """A site whose ledger is of this kind."""
    if kind == "postgresql":
        url = (server or cluster()).new_database()
        parts["ledger"] = {"path": None, "url": url}
    objects = tiny_instances(STUDIES, instances=INSTANCES)
    with site_around(folder, objects, retrieve="c-get", **parts) as place:
        yield place


def database_of(place: Place) -> str:
    return place.site.ledger.url.get_secret_value().split("@/")[1].split("?")[0]


def stops(run: Callable, code: str, disposition: Disposition) -> LedgerError:
    """The run ends with this reason and says nothing of patients."""
    with pytest.raises(LedgerError) as caught:
        run()
    assert (caught.value.code, caught.value.disposition) == (code, disposition)
    assert caught.value.reason.advice
    assert caught.value.__context__ is None or isinstance(caught.value.__context__, LedgerError)
    return caught.value


def finishes(place: Place, run: Callable, *, moved: int = STUDIES * INSTANCES) -> None:
    """All is archived, nothing was moved twice, and there is nothing left to do."""
    assert run().rows == {Verdict.ARCHIVED: STUDIES}
    place.audit()
    assert len(place.archived()) == STUDIES * (INSTANCES + 1)
    sent = Counter(place.pacs.sent_instances())
    assert set(sent.values()) == {1}
    assert sent.total() == moved
    assert place.spooled() == []
    asked = place.asked_for("C-GET")
    place.pull()
    assert place.asked_for("C-GET") == asked


# ----------------------------------------------------------------------------------------- locked


class Lock:
    """Another program has the ledger, as a database browser does in the middle of an edit."""

    def __init__(self, place: Place, kind: str) -> None:
        if kind == "sqlite":
            self._connection = sqlite3.connect(
                place.site.ledger.path, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("BEGIN IMMEDIATE")
        else:
            self._connection = cluster().connect(database_of(place))
            self._connection.autocommit = False
            self._connection.execute("LOCK TABLE studies, instances IN EXCLUSIVE MODE")
        self.released = False

    def release(self) -> None:
        self.released = True
        self._connection.rollback()
        self._connection.close()


@pytest.mark.parametrize(
    "case",
    subset([(kind, seconds) for kind in KINDS for seconds in (0.1, 5)], [("sqlite", 0.1)]),
    ids=str,
)
def test_a_ledger_that_is_locked_for_a_while_is_waited_for(tmp_path, at, case):
    kind, seconds = case
    with place_with(tmp_path, kind) as place:
        locks: list[Lock] = []

        def lock() -> None:
            locks.append(Lock(place, kind))
            timer = threading.Timer(seconds, locks[0].release)
            timer.start()

        at("validated", lock)
        # The objects that were validated cannot be recorded before the lock is gone.
        finishes(place, place.pull)
        assert locks[0].released


@pytest.mark.parametrize("kind", subset(KINDS, ["postgresql"]))
def test_a_ledger_that_stays_locked_stops_the_run_and_the_rerun_finishes(
    tmp_path, at, kind, monkeypatch
):
    monkeypatch.setattr(database, "_BUSY_SECONDS", 1)
    with place_with(tmp_path, kind) as place:
        locks: list[Lock] = []
        at("validated", lambda: locks.append(Lock(place, kind)))
        stops(place.pull, "ledger-busy", Disposition.TRANSIENT)
        locks[0].release()
        assert place.totals().rows == {Verdict.PENDING: STUDIES}
        finishes(place, place.rerun)


# ------------------------------------------------------------------------------------ connections


def cut_the_transactions(place: Place) -> None:
    """The server ends the sessions that are in the middle of a transaction."""
    with cluster().connect() as administrator:
        ended = administrator.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = %s AND state LIKE 'idle in transaction%%'",
            [database_of(place)],
        ).fetchall()
    assert ended == [(True,)]


def test_a_connection_that_is_cut_within_a_transaction_leaves_nothing_of_it(tmp_path, at):
    with place_with(tmp_path, "postgresql") as place:
        at("list-half-written", lambda: cut_the_transactions(place))
        stops(place.pull, "ledger-busy", Disposition.TRANSIENT)
        with place.ledger() as ledger:
            assert all(
                not ledger.instances.of_study(s.reference) for s in ledger.studies.of_cohort(1)
            )
        assert not place.asked_for("C-GET")
        finishes(place, place.rerun)


# Strikes so often, whatever is rolled back: a sequence is outside of transactions.
_STRIKE = """
CREATE SEQUENCE strikes;
CREATE FUNCTION strike() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('strikes') <= {times} THEN {what}; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER strike BEFORE UPDATE ON {table} FOR EACH ROW WHEN ({when})
EXECUTE FUNCTION strike();
"""
_WHAT = {
    "cut": "PERFORM pg_terminate_backend(pg_backend_pid())",
    "serialization failure": "RAISE EXCEPTION 'SECRET^NAME' USING ERRCODE = '40001'",
    "deadlock": "RAISE EXCEPTION 'SECRET^NAME' USING ERRCODE = '40P01'",
}
_WHEN = {
    "claimed": ("studies", "NEW.run IS NOT NULL AND NEW.attempt > OLD.attempt"),
    "received": ("instances", "NEW.state = 'received'"),
    "stored": ("instances", "NEW.state = 'stored'"),
    "archived": ("studies", "NEW.state = 'archived'"),
}


def strike_at(connection: psycopg.Connection, what: str, when: str, times: int = 1) -> None:
    table, condition = _WHEN[when]
    connection.execute(_STRIKE.format(what=_WHAT[what], table=table, when=condition, times=times))


STRIKES = [(what, when) for what in _WHAT for when in _WHEN]


@pytest.mark.parametrize(
    "strike",
    subset(STRIKES, [("serialization failure", "archived")]),
    ids=" at ".join,
)
def test_a_transaction_that_fails_at_the_server_is_whole_or_not_at_all(tmp_path, strike):
    what, when = strike
    with place_with(tmp_path, "postgresql") as place:
        with place.opened() as pull:
            number = pull.cohort.number
        with cluster().connect(database_of(place)) as connection:
            strike_at(connection, what, when, times=1000)
            error = stops(place.pull, "ledger-busy", Disposition.TRANSIENT)
            assert "SECRET" not in str(error)
            connection.execute("DROP FUNCTION strike CASCADE")
        with place.ledger() as ledger:
            # All rows of a batch, or none.
            for study in ledger.studies.of_cohort(number):
                assert len({i.state for i in ledger.instances.of_study(study.reference)}) <= 1
        finishes(place, place.rerun)


@pytest.mark.parametrize("when", subset(_WHEN, ["stored", "archived"]))
def test_the_same_step_again_goes_on_in_the_same_run(tmp_path, when):
    with place_with(tmp_path, "postgresql") as place, place.opened() as pull:
        with cluster().connect(database_of(place)) as connection:
            strike_at(connection, "cut", when)
        for first, last in pull.discovery.pages():
            pull.discovery.discover(first, last)
        (chunk,) = list(pull.chunks.chunks())
        retry(pull.retrieval.retrieve, chunk)
        retry(pull.archiving.archive, chunk)
        with cluster().connect(database_of(place)) as connection:
            assert connection.execute("SELECT last_value > 1 FROM strikes").fetchone() == (True,)
        assert place.totals().rows == {Verdict.ARCHIVED: STUDIES}
        assert set(Counter(place.pacs.sent_instances()).values()) == {1}


def retry(step: Callable, chunk: Chunk) -> None:
    """Do a step until it succeeds, as its task does."""
    for _ in range(2):
        try:
            return step(chunk)
        except LedgerError as error:
            assert error.code == "ledger-busy"
    return step(chunk)


def test_a_server_that_is_restarted_ends_the_run_at_its_next_claim(tmp_path, at):
    server = new_cluster()
    try:
        limits = {"limits": {"chunk_studies": 1}}
        with place_with(tmp_path, "postgresql", server, node=limits) as place:
            at("validated", server.restart)
            # What was claimed is finished; the lock that says the run lives has gone.
            error = stops(place.pull, "ledger-unavailable", Disposition.OPERATOR)
            assert "lost its lock" in error.detail
            assert place.totals().rows == {Verdict.ARCHIVED: 1, Verdict.PENDING: 1}
            place.audit()
            finishes(place, place.rerun)
    finally:
        server.stop()


def test_a_server_that_is_away_is_named_without_its_address(tmp_path):
    with place_with(tmp_path, "sqlite") as place:
        url = f"postgresql+psycopg://SECRET@/nothing?host={tmp_path}"
        place.change(ledger={"path": None, "url": url})
        error = stops(place.pull, "ledger-unavailable", Disposition.OPERATOR)
        assert "SECRET" not in str(error)
        assert not place.asked_for()


# ------------------------------------------------------------------------------------------ files


def copy_of(place: Place) -> Path:
    """A copy of the ledger as a backup has it."""
    copy = place.folder / "copy.sqlite"
    with (
        contextlib.closing(sqlite3.connect(place.site.ledger.path)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
    return copy


def put_back(place: Place, copy: Path) -> None:
    for name in ("", "-wal", "-shm"):
        Path(f"{place.site.ledger.path}{name}").unlink(missing_ok=True)
    shutil.copy(copy, place.site.ledger.path)
    place.site.ledger.path.chmod(0o600)


POINTS = ("claimed", "list-recorded", "received-recorded", "stored-recorded", "study-stored")


@pytest.mark.parametrize("point", subset(POINTS, ["stored-recorded"]))
def test_an_older_copy_of_the_ledger_finds_again_what_is_archived(tmp_path, at, point):
    with place_with(tmp_path, "sqlite") as place:
        copies: list[Path] = []
        at(point, lambda: copies.append(copy_of(place)))
        assert place.pull().rows == {Verdict.ARCHIVED: STUDIES}
        put_back(place, copies[0])
        assert place.totals().rows == {Verdict.PENDING: STUDIES}
        finishes(place, place.rerun)


def kill_at(place: Place, point: str) -> None:
    """A run in a process of its own, which dies there."""
    killed = subprocess.run(
        [*program("sites"), str(place.file), str(place.cohort())],
        env={**os.environ, failpoints.VARIABLE: f"{point}:1:kill"},
        stderr=subprocess.DEVNULL,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "point", subset(("received-recorded", "stored-recorded", "archived-recorded"), 1)
)
def test_a_log_that_is_missing_costs_what_it_held_and_no_more(tmp_path, point):
    with place_with(tmp_path, "sqlite") as place:
        kill_at(place, point)
        wal = Path(f"{place.site.ledger.path}-wal")
        assert wal.stat().st_size > 0
        wal.unlink()
        Path(f"{place.site.ledger.path}-shm").unlink()
        assert place.pull().rows == {Verdict.ARCHIVED: STUDIES}
        place.audit()
        # Objects of which nothing is on record may have to come again, once.
        assert max(Counter(place.pacs.sent_instances()).values()) <= 2


def test_a_damaged_file_is_named_with_the_way_out(tmp_path):
    with place_with(tmp_path, "sqlite") as place:
        assert place.pull().rows == {Verdict.ARCHIVED: STUDIES}
        path = place.site.ledger.path
        data = bytearray(path.read_bytes())
        # All pages but the first, which has the schema.
        data[4096:] = b"\xa5" * (len(data) - 4096)
        path.write_bytes(data)
        error = stops(place.pull, "ledger-damaged", Disposition.OPERATOR)
        assert "rebuild-ledger" in error.reason.advice
        path.unlink()
        finishes(place, place.pull)


def test_a_page_that_no_run_has_come_across_yet_is_found_by_the_doctor(tmp_path):
    with place_with(tmp_path, "sqlite") as place:
        place.pull()
        path = place.site.ledger.path
        # Of the manifests, which a run writes and does not read.
        with contextlib.closing(sqlite3.connect(path)) as other:
            query = "SELECT rootpage FROM sqlite_schema WHERE name = 'manifests'"
            [(page,)] = other.execute(query)
            [(size,)] = other.execute("PRAGMA page_size")
        data = bytearray(path.read_bytes())
        data[(page - 1) * size : page * size] = b"\xa5" * size
        path.write_bytes(data)
        assert place.totals().rows == {Verdict.ARCHIVED: STUDIES}
        finding = next(f for f in examine(place.site) if f.part == "ledger")
        assert not finding.ok
        assert "ledger-damaged" in finding.words
        assert "rebuild-ledger" in finding.advice


def test_a_ledger_of_a_newer_version_is_left_alone_before_anything_is_asked(tmp_path):
    with place_with(tmp_path, "sqlite") as place:
        with place.ledger():
            pass
        with contextlib.closing(sqlite3.connect(place.site.ledger.path)) as other, other:
            other.execute("INSERT INTO schema_versions VALUES (99, '2026-01-01')")
        before = place.site.ledger.path.read_bytes()
        error = stops(place.pull, "ledger-too-new", Disposition.OPERATOR)
        assert "Upgrade" in error.reason.advice
        assert place.site.ledger.path.read_bytes() == before
        assert not place.asked_for()


def test_a_ledger_that_cannot_be_written_stops_the_run_before_anything_is_asked(tmp_path):
    with (
        small_disk(tmp_path / "disk", mebibytes=8) as disk,
        place_with(tmp_path, "sqlite", ledger={"path": str(disk / "ledger.sqlite")}) as place,
    ):
        with place.opened():
            pass
        remount(disk, "ro")
        stops(place.pull, "ledger-unavailable", Disposition.OPERATOR)
        assert not place.asked_for()
        remount(disk, "rw")
        finishes(place, place.pull)


@pytest.mark.parametrize(
    "point", subset(("row-answered", "claimed", "validated", "put-answered", "manifest-put"), 1)
)
def test_a_full_disk_under_the_ledger_stops_the_run_and_the_rerun_finishes(tmp_path, at, point):
    with (
        small_disk(tmp_path / "disk", mebibytes=8) as disk,
        place_with(tmp_path, "sqlite", ledger={"path": str(disk / "ledger.sqlite")}) as place,
    ):
        at(point, lambda: fill(disk))
        error = stops(place.pull, "ledger-unavailable", Disposition.OPERATOR)
        assert "disk" in error.reason.advice
        (disk / "filler").unlink()
        rows = place.totals().rows
        assert rows[Verdict.PENDING] == rows.total() == STUDIES
        finishes(place, place.rerun)


@pytest.mark.whole_campaign
def test_a_read_only_server_stops_the_run_and_the_rerun_finishes(tmp_path, at):
    with place_with(tmp_path, "postgresql") as place:
        name = database_of(place)

        def protect() -> None:
            with cluster().connect() as administrator:
                administrator.execute(
                    f"ALTER DATABASE {name} SET default_transaction_read_only = on"
                )
                administrator.execute(
                    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                    " WHERE datname = %s AND state = 'idle' AND query NOT LIKE '%%advisory%%'",
                    [name],
                )

        at("validated", protect)
        stops(place.pull, "ledger-unavailable", Disposition.OPERATOR)
        with cluster().connect() as administrator:
            administrator.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        finishes(place, place.rerun)


# ------------------------------------------------------------------------------------- migrations

_MIGRATE = """
import sys
from functools import partial
from sqlalchemy import text
from prefect_dicom.ledger import database, schema, Ledger

def second(connection):
    connection.execute(text("CREATE TABLE second (number INTEGER)"))
    connection.execute(text("INSERT INTO second SELECT reference FROM studies"))

database.migrate = partial(schema.migrate, migrations=(*schema.MIGRATIONS, second))
print(flush=True)
sys.stdin.readline()
with Ledger.open(sys.argv[1]):
    print("done")
"""


@pytest.mark.parametrize("kind", subset(KINDS, ["sqlite"]))
def test_two_migrations_at_once_are_one(tmp_path, kind):
    with place_with(tmp_path, kind) as place:
        place.pull()
        url = place.site.ledger.url
        url = url.get_secret_value() if url else f"sqlite:///{place.site.ledger.path}"
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", _MIGRATE, url],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        for process in processes:
            process.stdout.readline()
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        assert [process.communicate()[0] for process in processes] == ["done\n"] * 2
        engine = create_engine(url)
        with engine.connect() as connection:
            versions = connection.scalars(text("SELECT version FROM schema_versions")).all()
            migrated = connection.scalar(text("SELECT count(*) FROM second"))
        engine.dispose()
        assert sorted(versions) == [schema.FIRST_VERSION, schema.FIRST_VERSION + 1]
        assert migrated == STUDIES
        # An older program leaves it alone from now on.
        stops(place.pull, "ledger-too-new", Disposition.OPERATOR)
