"""Runs that die where a test wants it.

Each is a process of its own, forked from one that has imported everything: that takes a tenth of
a second instead of two. The receiver it starts is a process as always.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from prefect_dicom.config.site import load_site
from prefect_dicom.core.failpoints import VARIABLE, arm
from prefect_dicom.report import write_reports
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import open_run, reopen_transient

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "prefect_dicom.run.run",
        "prefect_dicom.run.loop",
        "prefect_dicom.report",
        "pyarrow.parquet",
        "psycopg",
        "boto3",
    ]
)

PATIENCE_SECONDS = 60


def bring_to_its_end(site_file: Path, cohort: Path) -> None:
    """What a user does: pull, and again what failed for a transient reason; then report."""
    site = load_site(site_file)
    registered = register_cohort(site, cohort, None)
    with open_run(site, registered.number) as pull:
        reopen_transient(pull)
        work_through(pull)
        write_reports(pull.ledger, pull.cohort, site.reports)


def start(site_file: Path, cohort: Path, log: Path, fault: str | None = None) -> BaseProcess:
    """Such a run in a process of its own, with the fault."""
    environment = {**os.environ, **({VARIABLE: fault} if fault else {})}
    process = _context.Process(target=_run, args=(site_file, cohort, log, environment))
    process.start()
    return process


def _run(site_file: Path, cohort: Path, log: Path, environment: dict[str, str]) -> None:
    os.umask(0o077)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    arm(environment.get(VARIABLE))
    bring_to_its_end(site_file, cohort)


def ended(processes: Sequence[BaseProcess]) -> list[int]:
    """Their exit codes, once all have ended; fails the test when one does not."""
    for process in processes:
        process.join(PATIENCE_SECONDS)
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
        process.join()
    assert not stuck, "a run did not come to an end"
    return [process.exitcode for process in processes]


def kill(processes: Sequence[BaseProcess]) -> None:
    """Kill those that still run."""
    for process in processes:
        process.kill()
        process.join()


KILLED = -signal.SIGKILL
