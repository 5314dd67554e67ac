"""Flow runs of the command line without a Prefect server: a journal, and who takes it over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prefect_dicom.core.errors import PrefectDicomError
from prefect_dicom.core.files import is_locked
from prefect_dicom.run.engine import FlowCall
from prefect_dicom.run.journal import FAILED, JOURNALS, SUFFIX, open_journal, recorder_lock
from prefect_dicom.run.local_engine import run_locally

RECORDER_LOG = "recorder.log"


def run_without_server(call: FlowCall, home: Path) -> BaseException | None:
    """Run a flow in this process, and have Prefect's database record it afterwards.

    Nobody waits for the record: it is written by a process of its own.

    Returns
    -------
    BaseException or None
        The error that the flow ended with.
    """
    try:
        with open_journal(home) as journal:
            return run_locally(call, journal)
    except OSError as error:
        detail = f"no journal can be written in {home} ({error.strerror})"
        raise PrefectDicomError("prefect-unavailable", detail) from None
    finally:
        record_soon(home)


def unrecorded(home: Path) -> str:
    """What to do about runs that could not be recorded; empty where there are none."""
    failed = [*(home / JOURNALS).glob(f"*{FAILED}")]
    if not failed:
        return ""
    return (
        f"{len(failed)} runs could not be recorded; see {home / RECORDER_LOG}. Nothing of their "
        f"studies is lost. Delete {home / JOURNALS}/*{FAILED} when it has been looked at."
    )


def record_soon(home: Path) -> None:
    """Start a recorder for the journals in Prefect's home, unless one is at work."""
    if not any((home / JOURNALS).glob(f"*{SUFFIX}")) or is_locked(recorder_lock(home), create=True):
        # One at work looks for others before it ends.
        return
    log = os.open(home / RECORDER_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        recorder = subprocess.Popen(
            [sys.executable, "-m", "prefect_dicom.server.recorder"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PREFECT_HOME": str(home)},
            cwd=home,
            # It outlives the terminal, and a Ctrl-C is for the run.
            start_new_session=True,
        )
        # Not waited for; without this Python warns about a child left behind.
        recorder.returncode = 0
    finally:
        os.close(log)
