"""Settings of one PACS node: address, limits, time-outs and access schedule."""

from __future__ import annotations

import re

from pydantic import Field, ValidationInfo, field_validator

from prefect_dicom.config.access_schedule import AccessSchedule
from prefect_dicom.config.destination import Destination
from prefect_dicom.config.fields import AeTitle, ip_address
from prefect_dicom.config.settings import Settings
from prefect_dicom.config.tls import OwnTls
from prefect_dicom.core.deliveries import DeliveryEvidence
from prefect_dicom.core.model import InformationModel, RetrieveMethod


class Timeouts(Settings):
    """How long to wait for a PACS node, in seconds."""

    connect_seconds: float = Field(default=10, gt=0, description="For the TCP connection.")
    acse_seconds: float = Field(
        default=30, gt=0, description="For the answer to an A-ASSOCIATE-RQ."
    )
    find_seconds: float = Field(default=300, gt=0, description="Between two answers of a C-FIND.")
    first_byte_seconds: float = Field(
        default=1800, gt=0, description="From a retrieve request to the first instance or answer."
    )
    stall_seconds: float = Field(
        default=300, gt=0, description="Between two instances or answers of a retrieve."
    )
    settle_seconds: float = Field(
        default=10,
        ge=0,
        description="Quiet time after which nothing more is expected from a finished C-MOVE.",
    )


class Limits(Settings):
    """What a node may be asked for at a time."""

    associations: int = Field(
        default=2, ge=1, le=64, description="Chunks retrieved, or rows queried, at the same time."
    )
    chunk_studies: int = Field(default=20, ge=1, le=200, description="Studies in one chunk.")
    chunk_instances: int = Field(default=2000, ge=1, description="Listed instances in one request.")
    chunk_bytes: int = Field(
        default=2 * 1024**3, ge=1, description="Estimated bytes in one request; see instance_bytes."
    )
    instance_bytes: int = Field(
        default=524_288, ge=1, description="Estimated size of one instance, for chunk_bytes."
    )
    uids_per_request: int = Field(
        default=50, ge=1, le=1000, description="UIDs in one list of a C-MOVE, C-GET or C-FIND."
    )

    @property
    def request_instances(self) -> int:
        """The most listed instances of one request, by their number and by their estimated size."""
        return max(1, min(self.chunk_instances, self.chunk_bytes // self.instance_bytes))


class NodeSettings(Settings):
    """What every node has, whatever protocol it speaks: its limits, time-outs and schedule."""

    retrieve: RetrieveMethod = Field(description="How its instances are retrieved.")
    limits: Limits = Field(default_factory=Limits, description="What it may be asked at a time.")
    timeouts: Timeouts = Field(default_factory=Timeouts, description="How long to wait for it.")
    access_schedule: AccessSchedule | None = Field(
        default=None,
        description="When requests may be sent, and at what rates; without it, always.",
    )

    @field_validator("access_schedule")
    @classmethod
    def _limits_are_the_ceiling(
        cls, schedule: AccessSchedule | None, info: ValidationInfo
    ) -> AccessSchedule | None:
        if schedule is None or "limits" not in info.data:
            return schedule
        most = info.data["limits"].associations
        parts = (*schedule.windows, *filter(None, [schedule.outside]))
        if (found := max(part.associations or 1 for part in parts)) > most:
            raise ValueError(
                f"found {found} associations in a window; expected at most {most}, which "
                "`limits.associations` allows at any time"
            )
        return schedule

    @property
    def query_model(self) -> InformationModel:
        """The information model in which it is queried."""
        return InformationModel.STUDY_ROOT


class PacsNode(NodeSettings):
    """One PACS that speaks DIMSE: its address, our name there, how it hands over instances."""

    host: str = Field(description="Host name or IP address of the PACS.")
    port: int = Field(ge=1, le=65535, description="Port of the PACS.")
    called_ae_title: AeTitle = Field(description="AE title of the PACS, in exact case.")
    calling_ae_title: AeTitle = Field(
        default="PREFECTDICOM", description="Our AE title at the PACS."
    )
    information_model: InformationModel = Field(
        default=InformationModel.STUDY_ROOT, description="Query/Retrieve information model."
    )
    retrieve: RetrieveMethod = Field(
        default=RetrieveMethod.C_MOVE, description="c-move (needs the receiver) or c-get."
    )
    tls: OwnTls = Field(
        default=False,
        description="DICOM over TLS: true with the site's `tls`, or keys of its own; false is "
        "plain DICOM.",
    )
    tls_name: str | None = Field(
        default=None,
        description="Name that the PACS's certificate must have; `host` by default.",
    )
    destination: Destination | None = Field(
        default=None,
        description="How studies are delivered to it; without it, none are. A node with it is "
        "queried for a cohort only if it is named.",
    )

    @property
    def query_model(self) -> InformationModel:
        """The information model in which it is queried."""
        return self.information_model

    @field_validator("tls_name")
    @classmethod
    def _name_is_for_tls(cls, name: str | None, info: ValidationInfo) -> str | None:
        if name is None:
            return None
        if info.data.get("tls") is False:
            raise ValueError("expected it only together with `tls`")
        if not re.fullmatch(r"[\w:][\w.:-]*", name):
            raise ValueError("expected a host name or an IP address, as in the certificate")
        return name

    @field_validator("destination")
    @classmethod
    def _instances_can_be_read_back(
        cls, destination: Destination | None, info: ValidationInfo
    ) -> Destination | None:
        wants = destination is not None and destination.evidence is DeliveryEvidence.READ_BACK
        if wants and info.data.get("retrieve") is not RetrieveMethod.C_GET:
            raise ValueError(
                "found evidence: read-back; expected `retrieve: c-get` beside it, by which "
                "instances are read back"
            )
        return destination

    @field_validator("retrieve")
    @classmethod
    def _retrieves_by_dimse(cls, method: RetrieveMethod) -> RetrieveMethod:
        if method is RetrieveMethod.WADO_RS:
            raise ValueError(
                "expected c-move or c-get; a node with `host` speaks DIMSE: one that is retrieved "
                "from by wado-rs has `dicomweb`, its URL, instead"
            )
        return method

    @field_validator("host")
    @classmethod
    def _host_names_one_peer(cls, host: str) -> str:
        if address := ip_address(host):
            if address.is_unspecified:
                raise ValueError(
                    "expected the address of the PACS; this one is for listening on every "
                    "interface and reaches no peer"
                )
            return host
        if re.fullmatch(r"\[.*\]", host):
            raise ValueError("expected an IPv6 address without brackets")
        if re.fullmatch(r"[^:/@\s]+:[0-9]+", host):
            raise ValueError("expected a host alone; write the number after the colon as `port`")
        if re.fullmatch(r"[0-9.]+", host):
            raise ValueError("expected an IP address of four numbers from 0 to 255, or a host name")
        if not re.fullmatch(r"[\w.-]+", host):
            raise ValueError("expected a host name or an IP address, with nothing around it")
        return host
