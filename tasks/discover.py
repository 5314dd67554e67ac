"""Cohort rows to studies: C-FIND, every answer checked again, into the ledger."""

from __future__ import annotations

from prefect import task
from prefect.states import State

from prefect_dicom.run.planning import current_plan
from prefect_dicom.tasks.edge import ONE_CHUNK, ended


@task(task_run_name="discover-lines-{first_line}-{last_line}", tags=["dicom"], **ONE_CHUNK)
def discover_rows(first_line: int, last_line: int) -> State:
    """Find the studies of these lines of the cohort."""
    return ended(lambda: f"{current_plan().discover(first_line, last_line)} rows asked for")
