"""One chunk of studies from the PACS into the spool."""

from __future__ import annotations

from prefect import task
from prefect.states import State

from prefect_dicom.core.model import Chunk
from prefect_dicom.run.steps import current_pull
from prefect_dicom.tasks.edge import ONE_CHUNK, ended


@task(task_run_name="retrieve-{number:06d}", tags=["dicom"], **ONE_CHUNK)
def retrieve_chunk(number: int, node: str, studies: tuple[int, ...]) -> State:
    """List and retrieve the studies (references); those another run works on are left to it."""

    def step() -> str:
        claimed = current_pull().retrieve(Chunk(number, node, studies))
        return f"{claimed} of {len(studies)} studies asked for"

    return ended(step)
