"""What all parts of a run that delivers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prefect_dicom.admission.node_access import NodeAccess
from prefect_dicom.config.destination import Destination
from prefect_dicom.config.node import PacsNode
from prefect_dicom.config.site import Site
from prefect_dicom.core.clock import Clock
from prefect_dicom.core.deliveries import DeliveryEvidence, DeliveryMethod
from prefect_dicom.core.errors import ConfigurationError, Interrupted
from prefect_dicom.core.events import EventBus
from prefect_dicom.ledger import Cohort, Ledger
from prefect_dicom.ledger import Run as RunRecord
from prefect_dicom.run.control import RunControl


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DeliveryContext:
    """What all parts of a run that delivers share."""

    site: Site
    ledger: Ledger
    cohort: Cohort
    target: str
    """The name of the node that studies are delivered to."""
    source: str | None
    """The name of the node that sends them by C-MOVE; None: we do, by C-STORE."""
    record: RunRecord
    clock: Clock
    control: RunControl
    events: EventBus
    access: NodeAccess

    @property
    def node(self) -> PacsNode:
        """The target."""
        node = self.site.nodes[self.target]
        assert isinstance(node, PacsNode), "only nodes that speak DIMSE have a `destination`"
        return node

    @property
    def destination(self) -> Destination:
        """How studies are delivered to it."""
        return destination_of(self.site, self.target)

    @property
    def method(self) -> DeliveryMethod:
        """How studies get to the target."""
        return DeliveryMethod.C_STORE if self.source is None else DeliveryMethod.C_MOVE

    @property
    def may_list(self) -> bool:
        """Whether the target is queried at all, for the evidence that the site asks for."""
        return self.destination.evidence is not DeliveryEvidence.ACCEPTED

    @property
    def should_stop(self) -> Callable[[], bool]:
        """Whether what is under way at the target is to end."""
        return lambda: self.access.is_ending(self.target)

    def wait(self, seconds: float) -> None:
        """Wait; raises :class:`Interrupted` where the run is to stop meanwhile."""
        if not self.control.sleep(seconds):
            raise Interrupted()


def destination_of(site: Site, target: str) -> Destination:
    """The settings of a node to which studies are delivered.

    Raises
    ------
    ConfigurationError
        The site has no such node, or does not deliver to it.
    """
    known = sorted(name for name, node in site.nodes.items() if node.destination is not None)
    node = site.nodes.get(target)
    if node is None or node.destination is None:
        there = ", ".join(known) if known else "none; add `destination:` to a node of the site file"
        raise ConfigurationError(
            "the target",
            [f"{ascii(target)[:80]} is no destination of the site; there are: {there}"],
        )
    return node.destination


def check_source(site: Site, target: str, source: str | None) -> None:
    """Check that studies can be moved from one node to another.

    Raises
    ------
    ConfigurationError
        The site has no such source, or asks for evidence that a C-MOVE cannot give.
    """
    if source is None:
        return
    faults = []
    if source not in site.nodes or source == target:
        others = ", ".join(sorted(name for name in site.nodes if name != target))
        faults.append(f"{ascii(source)[:80]} is no other node of the site; there are: {others}")
    evidence = destination_of(site, target).evidence
    if evidence in (DeliveryEvidence.ACCEPTED, DeliveryEvidence.READ_BACK):
        faults.append(
            f"nodes.{target}.destination.evidence: found {evidence}; expected counted, listed or "
            "committed, because the bytes of a C-MOVE to a third node are not seen here and its "
            "counters prove nothing"
        )
    if faults:
        raise ConfigurationError("the source", faults)
