"""Settings of the receiver on this host, and of the metrics of receiver and runs."""

from __future__ import annotations

import ipaddress

from pydantic import Field, ValidationInfo, field_validator

from prefect_dicom.config.fields import AeTitle, address_of_this_host, ip_address
from prefect_dicom.config.messages import shown
from prefect_dicom.config.settings import Settings
from prefect_dicom.config.tls import AllowedCertificate, OwnTls, Tls


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
    tls: OwnTls = Field(
        default=False,
        description="DICOM over TLS: true with the site's `tls`, or keys of its own; false is "
        "plain DICOM.",
    )
    require_certificate: bool = Field(
        default=True, description="Whether who connects over TLS has to show a certificate."
    )
    allowed_certificates: tuple[AllowedCertificate, ...] = Field(
        default=(),
        description="Certificates that may connect, of those that are trusted. Empty: all.",
    )
    associations: int = Field(default=64, ge=1, description="Associations at the same time.")
    idle_seconds: float = Field(
        default=30, ge=0, description="How long it stays after the last run has left."
    )

    @field_validator("bind")
    @classmethod
    def _bind_is_an_address(cls, bind: str) -> str:
        return address_of_this_host(bind)

    @field_validator("tls")
    @classmethod
    def _serves_with_a_certificate(cls, tls: OwnTls) -> OwnTls:
        if isinstance(tls, Tls) and tls.certificate is None:
            raise ValueError("expected `certificate` and `key` too: a TLS server has its own")
        return tls

    @field_validator("require_certificate")
    @classmethod
    def _certificates_are_for_tls(cls, required: bool, info: ValidationInfo) -> bool:
        if not required and info.data.get("tls") is False:
            raise ValueError("expected it only together with `tls`")
        return required

    @field_validator("allowed_certificates", mode="before")
    @classmethod
    def _a_name_is_a_certificate(cls, allowed: object) -> object:
        if not isinstance(allowed, (list, tuple)):
            return allowed
        return [{"certificate": one} if isinstance(one, str) else one for one in allowed]

    @field_validator("allowed_certificates")
    @classmethod
    def _certificates_are_shown(
        cls, allowed: tuple[AllowedCertificate, ...], info: ValidationInfo
    ) -> tuple[AllowedCertificate, ...]:
        if allowed and info.data.get("tls") is False:
            raise ValueError("expected it only together with `tls`")
        if allowed and info.data.get("require_certificate") is False:
            raise ValueError("expected `require_certificate: true` with it")
        return allowed

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
