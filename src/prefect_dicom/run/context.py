"""What all parts of a run share."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefect_dicom.admission.node_access import NodeAccess
from prefect_dicom.admission.node_failover import NodeFailover
from prefect_dicom.admission.node_notes import NodeNotes
from prefect_dicom.config.site import Site
from prefect_dicom.core.clock import Clock
from prefect_dicom.core.events import EventBus
from prefect_dicom.core.model import CohortFilters, StudyReference
from prefect_dicom.ledger import Cohort, Ledger
from prefect_dicom.ledger import Run as RunRecord
from prefect_dicom.run.control import RunControl


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RunContext:
    """What all parts of a run share."""

    site: Site
    ledger: Ledger
    cohort: Cohort
    filters: CohortFilters
    """Which studies the cohort wants of those that its rows find."""
    record: RunRecord
    """The run, as the ledger knows it."""
    clock: Clock
    """What time it is, and how the run waits."""
    control: RunControl
    events: EventBus
    access: NodeAccess
    notes: NodeNotes
    failover: NodeFailover
    hopeless: set[StudyReference] = field(default_factory=set)
    """Studies that another pass of this run would bring no further: their instances were requested
    among others and alone, to the same end."""
