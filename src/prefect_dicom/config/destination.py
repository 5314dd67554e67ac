"""Settings of a node to which studies are delivered."""

from __future__ import annotations

from pydantic import Field

from prefect_dicom.config.settings import Settings
from prefect_dicom.core.deliveries import DeliveryEvidence


class Destination(Settings):
    """How studies are delivered to a node, and what proves that they are there."""

    evidence: DeliveryEvidence = Field(
        default=DeliveryEvidence.LISTED,
        description="What a delivery has to be verified by: accepted, counted, listed, committed "
        "or read-back.",
    )
    sample: int = Field(
        default=0,
        ge=0,
        description="Instances of a study that read-back reads, chosen at random; 0: all.",
    )
    attempts: int = Field(
        default=3, ge=1, le=20, description="How often an instance is sent in one run."
    )
    commit_after_seconds: float = Field(
        default=0,
        ge=0,
        description="From the last instance to the request for storage commitment.",
    )
    commit_wait_seconds: float = Field(
        default=30, ge=0, description="How long a run waits for reports of storage commitment."
    )
    commit_within_seconds: float = Field(
        default=86_400,
        gt=0,
        description="How old a request for storage commitment becomes before it is repeated.",
    )
    test_instance: bool = Field(
        default=False,
        description="Whether `doctor` may store a synthetic instance there, which stays.",
    )
