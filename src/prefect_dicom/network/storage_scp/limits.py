"""What an association of a storage SCP may take."""

from __future__ import annotations

from dataclasses import dataclass

from prefect_dicom.network.upper_layer.pdu import ANNOUNCED_PDU_BYTES


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of an association. All times in seconds; None is no limit.

    Parameters
    ----------
    pdu_bytes : int
        The maximum PDU length announced; 0 announces "unlimited". Longer ones are taken as well;
        a P-DATA-TF of more than 64 MiB ends the association.
    pdu_seconds : float
        From the first byte of a PDU to its last, and for sending an answer. A PDU that is longer
        than announced has as much more time.
    idle_seconds : float or None
        Between two PDUs.
    message_seconds : float or None
        From the first byte of a command to the end of its data set.
    """

    pdu_bytes: int = ANNOUNCED_PDU_BYTES
    pdu_seconds: float = 30.0
    idle_seconds: float | None = 600.0
    message_seconds: float | None = 4 * 3600.0

    def seconds_of(self, length: int) -> float:
        """The time that a PDU of this length may take."""
        return self.pdu_seconds * max(1.0, length / (self.pdu_bytes or ANNOUNCED_PDU_BYTES))
