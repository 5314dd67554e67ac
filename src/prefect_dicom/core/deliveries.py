"""Deliveries: studies sent to another node, and the evidence that they are there.

A delivery is one study and one target. Its states and their order are those of
``docs/promise.md``: due, sent, and verified with evidence or failed with a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from prefect_dicom.core.model import InstanceKey, StudyReference


class DeliveryState(StrEnum):
    """Progress of a delivery. That a run works on it is a live claim, not a state."""

    DUE = "due"
    """To be sent, as a whole or what is left of it."""
    SENT = "sent"
    """The target accepted every instance; nothing is verified yet."""
    VERIFIED = "verified"
    """The evidence that the site asks for is on record, with the delivery's manifest."""
    FAILED = "failed"
    """Ended without that; the reason says why and whether a rerun can help."""


DELIVERY_TRANSITIONS: dict[DeliveryState, frozenset[DeliveryState]] = {
    DeliveryState.DUE: frozenset({DeliveryState.SENT, DeliveryState.FAILED}),
    # Due again: the target lacks an instance that it had accepted.
    DeliveryState.SENT: frozenset(
        {DeliveryState.DUE, DeliveryState.VERIFIED, DeliveryState.FAILED, DeliveryState.SENT}
    ),
    DeliveryState.VERIFIED: frozenset(),
    DeliveryState.FAILED: frozenset({DeliveryState.DUE}),
}


class DeliveryEvidence(StrEnum):
    """Evidence that a target has a study, strongest first."""

    READ_BACK = "read-back"
    """Its bytes were read back from the target, and have the SHA-256 of what was sent."""
    COMMITTED = "committed"
    """The target takes responsibility for every instance, PS3.4 Annex J."""
    LISTED = "listed"
    """The target lists every instance."""
    COUNTED = "counted"
    """The target counts as many instances in each series."""
    ACCEPTED = "accepted"
    """The target answered success to the transfer."""

    def satisfies(self, weakest: DeliveryEvidence) -> bool:
        """Whether it is at least as strong."""
        order = list(DeliveryEvidence)
        return order.index(self) <= order.index(weakest)


class DeliveryMethod(StrEnum):
    """How a study gets to its target."""

    C_STORE = "c-store"
    """We send it from the archive."""
    C_MOVE = "c-move"
    """The source sends it, and we do not see its bytes."""


class DeliveredState(StrEnum):
    """Progress of one instance of a delivery; one without a record has not been sent."""

    ACCEPTED = "accepted"
    ALTERED = "altered"
    """Accepted with a warning of coercion: its bytes at the target may be others."""
    FAILED = "failed"
    """Refused, for the recorded reason."""


@dataclass(frozen=True, slots=True)
class DeliveredInstance:
    """What became of one instance of a delivery.

    Parameters
    ----------
    key : InstanceKey
        Of the instance.
    state : DeliveredState
        Whether the target took it.
    status : int or None
        Status (0000,0900) of its C-STORE, where there was one.
    reason : str or None
        Reason code, where it was refused.
    """

    key: InstanceKey
    state: DeliveredState
    status: int | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class DeliveryClaim:
    """The right of one living run to work on a delivery; ``attempt`` is its fencing token."""

    study: StudyReference
    target: str
    run: int
    attempt: int
    state: DeliveryState


@dataclass(frozen=True, slots=True)
class CommitmentReference:
    """An instance in a request for storage commitment."""

    study: StudyReference
    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True, slots=True)
class Commitment:
    """A request for storage commitment, as far as it is about one study.

    Parameters
    ----------
    results : dict of str to int or None
        By SOP Instance UID: 0 for committed, another number for the failure reason of PS3.3 C.14,
        None where nothing was reported.
    """

    requested_at: datetime
    expires_at: datetime
    reported_at: datetime | None
    results: dict[str, int | None]


class ReportOutcome(StrEnum):
    """What was made of a report of storage commitment."""

    RECORDED = "recorded"
    FOREIGN = "foreign"
    """It names instances that were not asked about, which were left out; the rest is recorded."""
    UNKNOWN = "unknown"
    """There is no such transaction."""
