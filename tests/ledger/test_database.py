"""A ledger is opened by URL, durable, private, shared by threads, and silent about patients."""

from __future__ import annotations

import inspect
import os
import sqlite3
import stat
import threading
from collections import Counter
from pathlib import Path

import pytest

from prefect_dicom.core.errors import LedgerError
from prefect_dicom.core.model import CohortRow, Evidence, StudyState
from prefect_dicom.ledger import Claim, Ledger
from tests.support.ledgers import DIGEST, claimed, claims_of, keys, listed, received, rows, stored
from tests.support.postgres import cluster, ledger_url


def test_the_threads_of_a_run_share_one_ledger(ledger, run):
    claims = claims_of(ledger, run, 8)
    failures = []

    def work(claim: Claim) -> None:
        try:
            ledger.instances.record_list(claim, listed(50), Evidence.INSTANCE_LIST)
            for key in keys(50):
                ledger.instances.record_received(
                    {claim.reference: claim}, [received(claim.reference, key)]
                )
            ledger.instances.record_stored(claim, [stored(key) for key in keys(50)])
            ledger.studies.record_archived(
                claim, b"{}", instances=50, withheld=0, size_bytes=50_000
            )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(claim,)) for claim in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    totals = ledger.progress.totals(ledger.cohorts.all()[0].number)
    assert totals.stored == 400
    assert totals.studies == Counter({StudyState.ARCHIVED: 8})


def test_what_was_written_is_there_when_the_ledger_is_opened_again(url):
    with Ledger.open(url) as ledger, ledger.runs.begin("pull") as run:
        claim = claimed(ledger, run)
        ledger.instances.record_list(claim, listed(2), Evidence.INSTANCE_LIST)
        before = ledger.instances.of_study(claim.reference)
    with Ledger.open(url) as ledger:
        assert ledger.instances.of_study(claim.reference) == before
        assert ledger.studies.get(claim.reference).claimed is False


def test_an_error_of_the_database_says_nothing_of_patients(ledger):
    twice = [CohortRow(line=2, patient_id="SECRET-MRN"), CohortRow(line=2, patient_id="SECRET-MRN")]
    with pytest.raises(LedgerError) as error:
        ledger.cohorts.add(DIGEST, "main", twice)
    assert error.value.code == "ledger-unavailable"
    assert error.value.__context__ is None
    assert "SECRET" not in str(error.value)
    assert error.value.detail in {
        "the database answered SQLITE_CONSTRAINT_PRIMARYKEY",
        "the database answered 23505",
    }


@pytest.mark.parametrize(
    "bad",
    [
        "postgresql+psycopg://me:S3CRET@127.0.0.1:1/ledger",
        "mysql://me:S3CRET@127.0.0.1/ledger",
        "not a url S3CRET",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:////dev/null/S3CRET/ledger.db",
    ],
)
def test_a_ledger_that_cannot_be_opened_is_an_error_without_its_url(bad):
    with pytest.raises(LedgerError) as error:
        Ledger.open(bad)
    assert error.value.code == "ledger-unavailable"
    assert "S3CRET" not in str(error.value)
    assert error.value.__context__ is None


def test_the_file_of_a_ledger_is_its_owners_alone(tmp_path):
    path = tmp_path / "new" / "ledger.db"
    before = os.umask(0)
    try:
        with Ledger.open(f"sqlite:///{path}") as ledger, ledger.runs.begin("pull"):
            ledger.cohorts.add(DIGEST, "main", rows(1))
            for entry in [path.parent, *path.parent.rglob("*")]:
                assert stat.S_IMODE(entry.stat().st_mode) & 0o077 == 0, entry
    finally:
        os.umask(before)


def test_a_file_that_is_open_to_others_is_refused(tmp_path):
    path = tmp_path / "ledger.db"
    Ledger.open(f"sqlite:///{path}").close()
    path.chmod(0o640)
    with pytest.raises(LedgerError) as error:
        Ledger.open(f"sqlite:///{path}")
    assert error.value.code == "ledger-unsafe"


@pytest.mark.campaign("ledger")
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "ledger.db"
    path.write_bytes(b"patients, patients, patients" * 100)
    path.chmod(0o600)
    with pytest.raises(LedgerError) as error:
        Ledger.open(f"sqlite:///{path}")
    assert error.value.detail == "the database answered SQLITE_NOTADB"
    assert path.read_bytes() == b"patients, patients, patients" * 100


@pytest.mark.campaign("ledger")
def test_a_committed_write_survives_the_loss_of_power(tmp_path):
    path = tmp_path / "ledger.db"
    with Ledger.open(f"sqlite:///{path}") as ledger, ledger._database.read() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    full = 2
    assert settings == {
        "journal_mode": "wal",
        "synchronous": full,
        "foreign_keys": 1,
        "busy_timeout": 90_000,
    }


@pytest.mark.campaign("ledger")
def test_a_writer_waits_for_another_program_that_has_the_file(tmp_path):
    path = tmp_path / "ledger.db"
    with Ledger.open(f"sqlite:///{path}") as ledger:
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        added = []
        thread = threading.Thread(
            target=lambda: added.append(ledger.cohorts.add(DIGEST, "main", rows(1)))
        )
        thread.start()
        assert ledger.cohorts.all() == []
        other.execute("COMMIT")
        thread.join()
        other.close()
        assert ledger.cohorts.all() == added


@pytest.mark.campaign("ledger")
def test_a_server_that_ended_the_connections_is_asked_again(tmp_path):
    with Ledger.open(ledger_url("postgresql", tmp_path)) as ledger:
        ledger.cohorts.add(DIGEST, "main", rows(1))
        with cluster().connect() as administrator:
            administrator.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'prefect-dicom'"
            )
        assert len(ledger.cohorts.all()) == 1


def test_a_reader_does_not_wait_for_a_writer(ledger):
    ledger.cohorts.add(DIGEST, "main", rows(1))

    def slow():
        assert len(ledger.cohorts.all()) == 1
        yield from rows(1)

    ledger.cohorts.add("e" * 64, "main", slow())
    assert len(ledger.cohorts.all()) == 2


def test_the_ledger_is_found_by_every_name_of_its_file(tmp_path):
    real = tmp_path / "real.db"
    link = tmp_path / "link.db"
    with Ledger.open(f"sqlite:///{real}") as one:
        link.symlink_to(real)
        with Ledger.open(f"sqlite:///{link}") as two, one.runs.begin("pull") as run:
            claim = claimed(one, run)
            assert two.claims.live() == [claim]
    assert not Path(f"{link}.runs").exists()


def test_every_method_of_every_part_translates_errors_of_the_database(tmp_path):
    with Ledger.open(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        parts = [part for name, part in vars(ledger).items() if not name.startswith("_")]
    assert len(parts) > 10
    for part in parts:
        for name, method in vars(type(part)).items():
            if name.startswith("_") or inspect.isgeneratorfunction(method):
                # What reads in pages is a generator; each page is a method of its own.
                continue
            assert hasattr(method, "__wrapped__") or name == "verdicts", (type(part), name)
