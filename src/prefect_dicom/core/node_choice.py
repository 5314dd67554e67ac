"""Which node of a cohort a study is asked of. Pure."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Protocol

from prefect_dicom.core.model import (
    Disposition,
)
from prefect_dicom.core.reasons import reason_for


class AtNode(Protocol):
    """What is known of a study at one of its cohort's nodes."""

    @property
    def is_found(self) -> bool: ...
    @property
    def number_of_instances(self) -> int | None: ...
    @property
    def reason(self) -> str | None: ...


def node_to_ask(
    nodes: Sequence[str], copies: Mapping[str, AtNode], disabled: Container[str] = ()
) -> str | None:
    """The node that a study is to be asked of, of those of its cohort; None where none is left.

    Where it could not be had it is not asked for again. Of the nodes that are known to have it,
    the one that counts most instances comes first, where all of them count; then the cohort's
    order decides. Those that may have it come last. A node that is disabled is passed over.

    Parameters
    ----------
    nodes : sequence of str
        In the cohort's order.
    copies : mapping of node to what is known
        Of the nodes that were asked about the study.

    Examples
    --------
    >>> node_to_ask(["main", "vna"], {})
    'main'
    """
    left = [n for n in nodes if n not in copies or copies[n].reason is None]
    known = [n for n in left if n in copies and copies[n].is_found]
    counts = {n: copies[n].number_of_instances for n in known}
    if None not in counts.values():
        known.sort(key=lambda node: -counts[node])
    maybe = [n for n in left if n not in known]
    return next((node for node in (*known, *maybe) if node not in disabled), None)


def reason_of_all(nodes: Sequence[str], copies: Mapping[str, AtNode]) -> str | None:
    """The reason of a study that no node could deliver: the one that is helped most easily."""
    codes = [copies[n].reason for n in nodes if n in copies and copies[n].reason is not None]
    return min(codes, key=lambda code: _EASE.index(reason_for(code).disposition), default=None)


_EASE = (Disposition.TRANSIENT, Disposition.OPERATOR, Disposition.PERMANENT)
