"""One chunk of studies from the PACS into the spool."""

from __future__ import annotations

from functools import partial

from prefect import task
from prefect.client.schemas.objects import State

from prefect_dicom.core.model import Chunk
from prefect_dicom.run import steps
from prefect_dicom.run.run import Run
from prefect_dicom.tasks.options import CHUNK_OPTIONS, run_step


@task(task_run_name="retrieve-{number:06d}", **CHUNK_OPTIONS)
def retrieve_chunk(run: Run, number: int, node: str, studies: tuple[int, ...]) -> State:
    """Read instance lists and retrieve the studies (references) that no other run has claimed."""
    return run_step(run, partial(steps.retrieve_chunk, run, Chunk(number, node, studies)))
