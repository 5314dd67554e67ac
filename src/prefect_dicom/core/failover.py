"""Failover of studies: which node of a cohort a study is requested from, and when none is left."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Protocol

from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons import reason_for

_EASIEST_FIRST = (Disposition.TRANSIENT, Disposition.OPERATOR, Disposition.PERMANENT)


class StudyAtNode(Protocol):
    """What is known of a study at one of its cohort's nodes."""

    @property
    def is_found(self) -> bool:
        """Whether the node has answered a query with the study."""

    @property
    def number_of_instances(self) -> int | None:
        """Instances that the node counts in the study; None where it does not count."""

    @property
    def reason(self) -> str | None:
        """Why the node could not deliver the study; None where it has not failed."""


def choose_node(
    nodes: Sequence[str], at: Mapping[str, StudyAtNode], disabled: Container[str] = ()
) -> str | None:
    """The node to request a study from, or None where none is left.

    A node that has failed to deliver the study is not asked again. Of the nodes that are known to
    have it, the one that counts most instances comes first, where all of them count; otherwise the
    cohort's order decides. Nodes that may have it come last. Disabled nodes are passed over.

    Parameters
    ----------
    nodes : sequence of str
        In the cohort's order.
    at : mapping of str to StudyAtNode
        What is known of the study, by the nodes that were asked about it.
    disabled : container of str
        Nodes that nothing is sent to.

    Examples
    --------
    >>> choose_node(["main", "vna"], {})
    'main'
    """
    left = [node for node in nodes if node not in at or at[node].reason is None]
    known = [node for node in left if node in at and at[node].is_found]
    counts = {node: at[node].number_of_instances for node in known}
    if None not in counts.values():
        known.sort(key=lambda node: -(counts[node] or 0))
    others = [node for node in left if node not in known]
    return next((node for node in (*known, *others) if node not in disabled), None)


def combined_reason(nodes: Sequence[str], at: Mapping[str, StudyAtNode]) -> str | None:
    """The reason of a study that no node could deliver: the one that is easiest to remedy."""
    reasons = [at[node].reason for node in nodes if node in at]
    codes = [code for code in reasons if code is not None]
    return min(
        codes,
        key=lambda code: _EASIEST_FIRST.index(reason_for(code).disposition),
        default=None,
    )
