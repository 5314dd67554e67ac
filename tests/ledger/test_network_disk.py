"""A ledger on a file system whose locks do not hold: the reason names it, and the doctor warns."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from prefect_dicom.core.errors import LedgerError
from prefect_dicom.ledger import Ledger
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.operations import doctor
from prefect_dicom.testing import tiny_instances
from tests.support.sites import site_around

pytestmark = pytest.mark.campaign("ledger")

# Bytes of the wal-index that SQLite locks (walformat.html, 2.3).
_HOLD = """
import fcntl, os, sys
shm = os.open(sys.argv[1] + "-shm", os.O_RDWR | os.O_CREAT, 0o600)
os.ftruncate(shm, 32768)
fcntl.lockf(shm, fcntl.LOCK_SH, 1, 128)
fcntl.lockf(shm, fcntl.LOCK_EX, 1, 120)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.whole_campaign
def test_locking_protocol_is_told_as_that_of_a_network_file_system(tmp_path):
    path = tmp_path / "ledger.sqlite"
    Ledger.open(f"sqlite:///{path}").close()
    # An index that another process is for ever about to write, as some file systems show it.
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        try:
            with pytest.raises(LedgerError) as caught:
                Ledger.open(f"sqlite:///{path}")
        finally:
            holder.stdin.close()
    assert caught.value.code == "ledger-unavailable"
    assert "SQLITE_PROTOCOL" in caught.value.detail
    assert "network file system" in caught.value.detail


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("SQLITE_PROTOCOL", True),
        ("SQLITE_IOERR_LOCK", True),
        ("SQLITE_IOERR_RDLOCK", True),
        ("SQLITE_IOERR_CHECKRESERVEDLOCK", True),
        ("SQLITE_IOERR_SHMMAP", True),
        ("SQLITE_IOERR_SHMLOCK", True),
        ("SQLITE_NOLFS", True),
        ("SQLITE_IOERR_WRITE", False),
        ("SQLITE_READONLY", False),
        ("SQLITE_CANTOPEN", False),
        ("SQLITE_FULL", False),
    ],
)
def test_errors_of_locks_name_network_file_systems_and_others_do_not(name, network):
    @translate_database_errors
    def ask() -> None:
        error = sqlite3.OperationalError("locking protocol")
        error.sqlite_errorname = name
        raise error

    with pytest.raises(LedgerError) as caught:
        ask()
    assert caught.value.code == "ledger-unavailable"
    assert name in caught.value.detail
    assert ("network file system" in caught.value.detail) is network


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_lock_file_that_cannot_be_locked_names_them_too(tmp_path, monkeypatch, number):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(LedgerError) as caught:
        Ledger.open(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    assert "network file system" in caught.value.detail


def test_the_doctor_warns_of_a_ledger_and_a_spool_on_a_network_file_system(tmp_path, monkeypatch):
    shared: set[Path] = set()
    monkeypatch.setattr(
        doctor, "network_file_system", lambda path: "nfs4" if path in shared else None
    )
    with site_around(tmp_path, tiny_instances(1), retrieve="c-get") as place:
        check = "lies on a local disk"
        assert check not in {finding.check for finding in doctor.examine(place.site)}
        shared |= {place.site.ledger.path, place.site.spool.path}
        warnings = {f.part: f for f in doctor.examine(place.site) if f.check == check}
        assert warnings.keys() == {"ledger", "spool"}
        assert all(finding.ok and "nfs4" in finding.words for finding in warnings.values())
        assert "PostgreSQL" in warnings["ledger"].advice
