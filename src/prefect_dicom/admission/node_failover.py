"""Failover between the nodes of a cohort while a run works on it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from prefect_dicom.admission.node_access import NodeAccess
from prefect_dicom.admission.node_notes import NodeNotes
from prefect_dicom.core.reasons import reason_for


class NodeFailover:
    """Which nodes of a cohort can still be asked, and whether another one has to be. Thread-safe.

    Parameters
    ----------
    nodes : sequence of str
        The cohort's nodes, the preferred one first.
    """

    def __init__(self, nodes: Sequence[str], access: NodeAccess, notes: NodeNotes) -> None:
        self.nodes = tuple(nodes)
        self._access = access
        self._notes = notes
        self._requested = threading.Event()

    def is_disabled(self, node: str) -> bool:
        """Whether the run asks this node for nothing any more."""
        return bool(self._access.admission(node).disabled_for)

    def enabled(self) -> list[str]:
        """The nodes that are not disabled."""
        return [node for node in self.nodes if not self.is_disabled(node)]

    def disabled(self) -> list[str]:
        """The nodes that are disabled."""
        return [node for node in self.nodes if self.is_disabled(node)]

    def can_continue_without(self, node: str) -> bool:
        """Whether this node is disabled and another one is not."""
        return self.is_disabled(node) and bool(self.enabled())

    def continue_without(self, node: str) -> bool:
        """Note a disabled node and have the others asked; False where that is not possible."""
        code = self._access.admission(node).disabled_for
        if code is None or not self.enabled():
            return False
        reason = reason_for(code)
        self._notes.add(node, f"disabled in a run ({reason.code}): {reason.what_to_do}")
        self.request_next_node()
        return True

    def request_next_node(self) -> None:
        """Have the studies asked for again: the next node is to be asked for some."""
        self._requested.set()

    def take_request(self) -> bool:
        """Whether :meth:`request_next_node` was called since the last call of this method."""
        requested = self._requested.is_set()
        self._requested.clear()
        return requested

    def seconds_left(self) -> float:
        """Seconds for which all nodes that are not disabled are still waiting."""
        admissions = [self._access.admission(node) for node in self.enabled()]
        return min((admission.seconds_left() for admission in admissions), default=0.0)
