"""Manifest of a verified delivery: what the target has, and by what evidence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from prefect_dicom.core.deliveries import DeliveryEvidence, DeliveryMethod

FORMAT = "prefect-dicom/delivery-manifest"
VERSION = 1
NOT_SEEN = "not seen"
"""In the place of a SHA-256: the bytes did not come by us."""


@dataclass(frozen=True, slots=True)
class DeliveredEntry:
    """One instance in the manifest of a delivery.

    Parameters
    ----------
    sha256 : str
        Of the archived file that was sent; :data:`NOT_SEEN` where another node has sent it.
    status : int or None
        Status of its C-STORE; None where it is not known.
    evidence : DeliveryEvidence
        The strongest for this instance.
    """

    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    sha256: str
    status: int | None
    evidence: DeliveryEvidence


def encode_delivery(
    study_instance_uid: str,
    target: str,
    method: DeliveryMethod,
    evidence: DeliveryEvidence,
    verified_at: datetime,
    entries: Sequence[DeliveredEntry],
    more: Mapping[str, str] | None = None,
) -> bytes:
    """Encode the manifest of a delivery as canonical JSON: sorted keys and instances, ASCII."""
    ordered = sorted(entries, key=lambda e: (e.series_instance_uid, e.sop_instance_uid))
    body = {
        "format": FORMAT,
        "version": VERSION,
        "study_instance_uid": study_instance_uid,
        "target": target,
        "method": method.value,
        "evidence": evidence.value,
        "verified_at": verified_at.isoformat(timespec="seconds"),
        "instances": [asdict(entry) for entry in ordered],
        **(more or {}),
    }
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode("ascii")
