"""Events of connections and associations of a storage SCP, for counters and logs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from prefect_dicom.network.storage_scp.close_reason import CloseReason
from prefect_dicom.network.storage_scp.transfer import AssociationInfo
from prefect_dicom.network.tls import TlsPeer

# PS3.8 9.3.4: result, source, reason
REJECTED_APPLICATION_CONTEXT = (1, 1, 2)
REJECTED_CALLING_AE_TITLE = (1, 1, 3)
REJECTED_CALLED_AE_TITLE = (1, 1, 7)
REJECTED_PROTOCOL_VERSION = (1, 2, 2)
REJECTED_LOCAL_LIMIT = (2, 3, 2)


class Happening(StrEnum):
    """Kind of an :class:`AssociationEvent`."""

    NOT_ALLOWED = "not-allowed"
    """The peer's address is not on the allow-list; closed without reading a byte."""
    CROWDED = "crowded"
    """Too many connections; this one, closed for the sake of another, had no association."""
    UNINTELLIGIBLE = "unintelligible"
    """TLS handshake or A-ASSOCIATE-RQ failed, was too slow, or was not DICOM."""
    REJECTED = "rejected"
    ACCEPTED = "accepted"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class AssociationEvent:
    """Something that happened to a connection, for the audit trail and counters.

    ``instances`` and ``end`` are set for ENDED only, ``rejection`` (result, source, reason) for
    REJECTED. AE titles are what the peer wrote.
    """

    happening: Happening
    peer_address: str
    calling_ae_title: str = ""
    called_ae_title: str = ""
    rejection: tuple[int, int, int] | None = None
    instances: int = 0
    end: CloseReason | None = None
    detail: str = ""
    """Of UNINTELLIGIBLE: what it was, in words; empty where nothing was said. Of REJECTED: what
    is wrong with its certificate."""
    code: str = ""
    """Reason code, where it has one of its own: certificates, and TLS on one side only."""
    tls: TlsPeer | None = None
    """Of ACCEPTED: how the peer was verified; None without TLS."""

    @classmethod
    def of(
        cls,
        happening: Happening,
        info: AssociationInfo,
        *,
        rejection: tuple[int, int, int] | None = None,
        instances: int = 0,
        end: CloseReason | None = None,
    ) -> AssociationEvent:
        """An event of an association whose peers are known."""
        return cls(
            happening,
            info.address,
            info.calling_ae_title,
            info.called_ae_title,
            rejection,
            instances,
            end,
        )
