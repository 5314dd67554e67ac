"""One chunk of studies to a target, with the evidence that they are there."""

from __future__ import annotations

from functools import partial

from prefect import task
from prefect.client.schemas.objects import State

from prefect_dicom.core.model import Chunk
from prefect_dicom.run.control import DeliveringRun
from prefect_dicom.tasks.options import CHUNK_OPTIONS, run_step


@task(task_run_name="deliver-{number:06d}", **CHUNK_OPTIONS)
def deliver_chunk(run: DeliveringRun, number: int, target: str, studies: tuple[int, ...]) -> State:
    """Send and verify the studies (references) that no other run has claimed."""
    return run_step(run, partial(run.deliver, Chunk(number, target, studies)))
