"""The steps of a run, each a task run in Prefect, and when one is tried again.

A step returns what the message of its final state says.
"""

from __future__ import annotations

import random

from prefect_dicom.core.errors import Interrupted, PacsError, is_transient
from prefect_dicom.core.model import Chunk
from prefect_dicom.run.control import ControlledRun
from prefect_dicom.run.run import DryRun, Run

_RETRY_DELAYS_SECONDS = (10.0, 20.0)
"""Delays before the first and the second retry of a step."""
RETRIES = len(_RETRY_DELAYS_SECONDS)
TAG = "dicom"
"""Tag of all task runs in Prefect."""


def discover_rows(run: DryRun, first_line: int, last_line: int) -> str:
    """Find the studies of these lines of the cohort."""
    return f"{run.discovery.discover(first_line, last_line)} rows queried"


def retrieve_chunk(run: Run, chunk: Chunk) -> str:
    """Read instance lists and retrieve the studies that no other run has claimed."""
    claimed = run.retrieval.retrieve(chunk)
    return f"{claimed} of {len(chunk.studies)} studies requested"


def archive_chunk(run: Run, chunk: Chunk) -> str:
    """Upload the studies, read their instance lists again, and commit them."""
    archived = run.archiving.archive(chunk)
    return f"{archived} of {len(chunk.studies)} studies archived"


def is_retried(error: object) -> bool:
    """Whether a step is tried again: after transient errors, unless they are of the PACS.

    When a request to a PACS is repeated, its node's admission decides.
    """
    return is_transient(error) and not isinstance(error, PacsError)


def delay_retry(run: ControlledRun, retries: int) -> None:
    """Wait before a retry, the first, second, ...; a pause or a cancellation ends the wait.

    Raises
    ------
    Interrupted
        The run is to end.
    """
    if retries < 1:
        return
    seconds = _RETRY_DELAYS_SECONDS[min(retries, RETRIES) - 1]
    if not run.control.sleep(seconds * random.uniform(0.8, 1.2)):
        raise Interrupted()
