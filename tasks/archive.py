"""One chunk of studies from the spool into the archive, committed study by study."""

from __future__ import annotations

from prefect import task
from prefect.states import State

from prefect_dicom.core.model import Chunk
from prefect_dicom.run.steps import current_pull
from prefect_dicom.tasks.edge import ONE_CHUNK, ended


@task(task_run_name="archive-{number:06d}", tags=["dicom"], **ONE_CHUNK)
def archive_chunk(number: int, node: str, studies: tuple[int, ...]) -> State:
    """Upload, list again and commit the studies (references)."""

    def step() -> str:
        archived = current_pull().archive_chunk(Chunk(number, node, studies))
        return f"{archived} of {len(studies)} studies archived"

    return ended(step)
