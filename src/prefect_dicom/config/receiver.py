"""Settings of the receiver on this host, and of the metrics of receiver and runs."""

from __future__ import annotations

import ipaddress

from pydantic import Field, ValidationInfo, field_validator

from prefect_dicom.config.fields import AeTitle, address_of_this_host, ip_address
from prefect_dicom.config.messages import shown
from prefect_dicom.config.settings import Settings


class Receiver(Settings):
    """The managed storage SCP that C-MOVE sends to."""

    ae_title: AeTitle = Field(
        default="PREFECTDICOM", description="AE title the PACS knows as destination."
    )
    bind: str = Field(default="127.0.0.1", description="Address of this host to listen on.")
    port: int = Field(default=11112, ge=1, le=65535, description="Port to listen on.")
    allowed_senders: tuple[str, ...] = Field(
        default=(),
        description="Addresses or networks (CIDR) that may connect. Empty: those of the nodes.",
    )
    associations: int = Field(default=64, ge=1, description="Associations at the same time.")
    idle_seconds: float = Field(
        default=30, ge=0, description="How long it stays after the last run has left."
    )

    @field_validator("bind")
    @classmethod
    def _bind_is_an_address(cls, bind: str) -> str:
        return address_of_this_host(bind)

    @field_validator("allowed_senders")
    @classmethod
    def _senders_are_addresses(
        cls, senders: tuple[str, ...], info: ValidationInfo
    ) -> tuple[str, ...]:
        for sender in senders:
            try:
                network = ipaddress.ip_network(sender, strict=False)
            except ValueError:
                raise ValueError(
                    f"{shown(sender)} is none; expected IP addresses or networks like "
                    "10.20.0.0/16 (host names are not resolved here)"
                ) from None
            if "/" in sender and ipaddress.ip_interface(sender).ip != network.network_address:
                raise ValueError(
                    f"{shown(sender)} is a host within a network; expected {network} for all of "
                    f"it, or {ipaddress.ip_interface(sender).ip} for that host"
                )
        address = ip_address(info.data.get("bind", ""))
        if address and address.is_unspecified and not senders:
            raise ValueError(
                f"expected at least one address, because `bind: {address}` listens on every "
                "interface of this host and AE titles prove nothing; name the addresses that "
                "may connect, or bind to one address"
            )
        return senders


class Metrics(Settings):
    """Where Prometheus finds what receiver and runs of this host count; off without a port."""

    bind: str = Field(default="127.0.0.1", description="Address of this host to listen on.")
    port: int | None = Field(
        default=None, ge=1, le=65535, description="Port to listen on; left out: nothing is counted."
    )

    @field_validator("bind")
    @classmethod
    def _bind_is_an_address(cls, bind: str) -> str:
        return address_of_this_host(bind)
