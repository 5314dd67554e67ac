"""Discovery of cohort rows: C-FIND, row matching, and the result into the ledger."""

from __future__ import annotations

from functools import partial

from prefect import task
from prefect.client.schemas.objects import State

from prefect_dicom.run import steps
from prefect_dicom.run.run import DryRun
from prefect_dicom.tasks.options import CHUNK_OPTIONS, run_step


@task(task_run_name="discover-lines-{first_line}-{last_line}", **CHUNK_OPTIONS)
def discover_rows(run: DryRun, first_line: int, last_line: int) -> State:
    """Find the studies of these lines of the cohort."""
    return run_step(run, partial(steps.discover_rows, run, first_line, last_line))
