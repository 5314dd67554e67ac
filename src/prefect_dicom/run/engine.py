"""What runs the steps of a run: Prefect's engine, or threads of this process.

The pipeline is the same for both. It gives its steps to an :class:`Engine`, and with them what
people are shown in Prefect: artifacts, log lines and events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

from prefect_dicom.core.errors import PrefectDicomError
from prefect_dicom.core.model import Chunk

if TYPE_CHECKING:
    from prefect_dicom.run.control import ControlledRun, DeliveringRun
    from prefect_dicom.run.run import DryRun, Run


MOST_STEPS = 128
"""Threads for steps; the concurrency limits of the nodes keep far fewer busy."""


class ArtifactKind(StrEnum):
    """Which of Prefect's artifacts it is."""

    LINK = "link"
    MARKDOWN = "markdown"
    PROGRESS = "progress"
    TABLE = "table"


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact of a flow run, without patient data and without UIDs."""

    kind: ArtifactKind
    key: str
    description: str
    data: Any
    """A URL, a text in Markdown, percents, or rows as mappings."""
    link_text: str = ""


class StepRun(Protocol):
    """A step that has been submitted."""

    def add_done_callback(self, callback: Callable[[StepRun], None]) -> None:
        """Call back, in any thread, when the step has ended; at once where it has."""

    def wait(self) -> PrefectDicomError | None:
        """Wait for the end of the step. Returns the error that it ended with, or None."""


class Engine(Protocol):
    """Runs steps with their retries, and shows in Prefect how a run goes.

    A step is what :mod:`prefect_dicom.run.steps` has.
    """

    def discover(self, run: DryRun, first_line: int, last_line: int) -> PrefectDicomError | None:
        """Find the studies of some lines. Returns the error that this ended with, or None."""

    def retrieve(self, run: Run, chunk: Chunk) -> StepRun:
        """Begin to retrieve a chunk into the spool."""

    def archive(self, run: Run, chunk: Chunk) -> StepRun:
        """Begin to archive a chunk."""

    def deliver(self, run: DeliveringRun, chunk: Chunk) -> StepRun:
        """Begin to deliver a chunk to another node."""

    def limits(self, run: DryRun) -> AbstractContextManager[None]:
        """Hold the slots of this run in Prefect's concurrency limits, where there are any."""

    def controlled(self, run: ControlledRun) -> AbstractContextManager[None]:
        """Let the run follow what is requested of its flow run in Prefect."""

    def events(self, run: ControlledRun) -> AbstractContextManager[None]:
        """Forward the events of the run to Prefect."""

    def info(self, words: str) -> None:
        """Log a line of the flow run."""

    def error(self, words: str) -> None:
        """Log a line about what keeps the flow run from its end."""

    def create_artifact(self, artifact: Artifact) -> UUID | None:
        """Show an artifact. Returns its id, or None where there is none.

        Links and progress cannot be shown at times, which stops nothing.
        """

    def update_progress(self, artifact: UUID, percent: float, description: str) -> None:
        """Show how far it is now; where that fails, it stops nothing."""


class EndName(StrEnum):
    """How a run ended. Prefect shows it as the name of the flow run's final state."""

    COMPLETED = "Completed"
    PARTIAL = "Partial"
    """Rows are not archived, or all of them are excluded."""
    PLANNED = "Planned"
    """A dry run has found the studies."""
    CANCELLED = "Cancelled"


@dataclass(frozen=True, slots=True)
class RunEnd:
    """How a run ended that no error has stopped."""

    name: EndName
    message: str


@dataclass(frozen=True, slots=True)
class FlowCall:
    """A flow over a cohort that its caller has registered, in the ledger that it has open.

    None of what is open can be a parameter of the flow: Prefect stores these.

    Attributes
    ----------
    flow : str
        Name of the flow in Prefect.
    name : str or None
        Name of the flow run; None has Prefect make one.
    parameters : mapping
        Parameters that Prefect shows, and can start the flow with again.
    body : callable
        Does the work of the flow, with an engine.
    """

    flow: str
    name: str | None
    parameters: Mapping[str, Any]
    body: Callable[[Engine], RunEnd]
