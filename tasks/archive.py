"""One chunk of studies from the spool into the archive, committed study by study."""

from __future__ import annotations

from functools import partial

from prefect import task
from prefect.client.schemas.objects import State

from prefect_dicom.core.model import Chunk
from prefect_dicom.run import steps
from prefect_dicom.run.run import Run
from prefect_dicom.tasks.options import CHUNK_OPTIONS, run_step


@task(task_run_name="archive-{number:06d}", **CHUNK_OPTIONS)
def archive_chunk(run: Run, number: int, node: str, studies: tuple[int, ...]) -> State:
    """Upload the studies (references), read their instance lists again, and commit them."""
    return run_step(run, partial(steps.archive_chunk, run, Chunk(number, node, studies)))
