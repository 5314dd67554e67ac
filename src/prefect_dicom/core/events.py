"""Events of a run, in numbers and reason codes.

The subscribers of a run (:class:`EventBus`) get each event as it happens; one of them
(``tasks/events.py``) forwards them to Prefect, whose automations send mails and messages.
An event names a study by its reference and a node by its name in the site file; it has no room for
text of a peer or of a cohort file, so it cannot hold patient data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from prefect_dicom.core.model import StudyReference
from prefect_dicom.core.reasons import REASONS

log = logging.getLogger(__name__)

EVENTS: Mapping[str, str] = MappingProxyType(
    {
        "study.archived": "A study is archived.",
        "study.failed": "A study has ended without being archived.",
        "study.delivered": "A study is at a target, with the evidence that the site asks for.",
        "delivery.failed": "A study has not got to a target, or was not verified there.",
        "cohort.finished": "A run has ended its work on a cohort.",
        "node.disabled": "A node is disabled until a person has acted.",
        "node.narrowed": "A node is slow, busy or sends nothing: its concurrency limit is lowered.",
        "node.widened": "A node's concurrency limit was raised again after it had been lowered.",
        "breaker.opened": "A node has failed and is waiting: nothing is sent until a time.",
        "breaker.closed": "A node that had failed works again.",
        "window.opened": "An access window has begun, or one with higher rate limits.",
        "window.closed": "An access window has ended, or one with lower rate limits has begun.",
        "disk.low": "Free space of the spool or of the archive is running out.",
    }
)
"""Kinds of events by name, with their meaning."""


AUTOMATIONS = Path(__file__).parents[1] / "automations"
"""Folder of automations that these events trigger, as files for ``prefect automation create``."""


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An event of a cohort, a study, a node or a disk.

    Parameters
    ----------
    name : str
        One of :data:`EVENTS`.
    at : datetime
        When it happened, with its time zone.
    node : str or None
        The node's name in the site file.
    reference : int or None
        The study's number in the ledger.
    reason : str or None
        A code of :mod:`prefect_dicom.core.reasons`.
    figures : mapping of str to number
        Numbers that describe it.

    Raises
    ------
    ValueError
        A value has the wrong type.
    """

    name: str
    at: datetime = field(default_factory=_now)
    node: str | None = None
    reference: StudyReference | None = None
    reason: str | None = None
    figures: Mapping[str, int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in EVENTS or self.at.tzinfo is None:
            raise ValueError(f"no such event: {self.name}")
        if self.reason is not None and self.reason not in REASONS:
            raise ValueError("an event's reason is a code of the table")
        if not all(isinstance(figure, (int, float)) for figure in self.figures.values()):
            raise ValueError(f"{self.name}: figures are numbers")


Subscriber = Callable[[Event], None]
"""Called with each event, in the thread in which it happens; must return at once."""


class EventBus:
    """Publishes the events of a run to its subscribers."""

    def __init__(self) -> None:
        self.subscribers: list[Subscriber] = []

    def subscribe(self, subscriber: Subscriber) -> None:
        """Add a subscriber; before the work begins."""
        self.subscribers.append(subscriber)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Remove a subscriber."""
        self.subscribers.remove(subscriber)

    def publish(self, event: Event) -> None:
        """Call every subscriber; an error of one affects neither the run nor the others."""
        for subscriber in self.subscribers:
            try:
                subscriber(event)
            except Exception as error:
                log.warning("no subscriber got %s: %s", event.name, type(error).__name__)
