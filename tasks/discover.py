"""Discovery of cohort rows: C-FIND, row matching, and the result into the ledger."""

from __future__ import annotations

from prefect import task
from prefect.client.schemas.objects import State

from prefect_dicom.run.run import DryRun
from prefect_dicom.tasks.options import CHUNK_OPTIONS, run_step


@task(task_run_name="discover-lines-{first_line}-{last_line}", tags=["dicom"], **CHUNK_OPTIONS)
def discover_rows(run: DryRun, first_line: int, last_line: int) -> State:
    """Find the studies of these lines of the cohort."""

    def step() -> str:
        return f"{run.discovery.discover(first_line, last_line)} rows queried"

    return run_step(run, step)
