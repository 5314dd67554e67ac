"""Settings of TLS, PS3.15 Annex B: the profile, our certificate, and whom we trust.

Connections are always verified, in both directions; nothing here turns that off.
:mod:`prefect_dicom.config.tls_context` makes contexts of these settings, and
:mod:`prefect_dicom.config.tls_files` finds what is wrong with the files they name.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from prefect_dicom.config.fields import AeTitle, PlacedPath, ip_address
from prefect_dicom.config.messages import shown
from prefect_dicom.config.settings import Settings

SYSTEM_TRUST = "system"
"""Value of ``trust`` for the certificate authorities that the operating system trusts."""

_SHA256_DIGITS = 64


class TlsProfile(StrEnum):
    """A TLS Secure Transport Connection Profile of PS3.15 (2024e)."""

    BCP195 = "bcp195"
    """B.12, BCP 195 RFC 8996, 9325: TLS 1.2 and 1.3."""
    BCP195_MODIFIED = "bcp195-modified"
    """B.13, Modified BCP 195 RFC 8996, 9325: the same versions, a closed list of suites."""


class Tls(Settings):
    """Our certificate, and the certificate authorities whose peers we talk to."""

    profile: TlsProfile = Field(
        default=TlsProfile.BCP195, description="PS3.15 B.12 (bcp195) or B.13 (bcp195-modified)."
    )
    trust: PlacedPath | Literal["system"] = Field(
        description="PEM file of the CA certificates that peers' certificates must lead to, or "
        "`system` for those of the operating system."
    )
    certificate: PlacedPath | None = Field(
        default=None,
        description="PEM file of our certificate, followed by those of intermediate CAs.",
    )
    key: PlacedPath | None = Field(
        default=None, description="PEM file of its key, not encrypted, mode 0600."
    )
    crl: PlacedPath | None = Field(
        default=None,
        description="PEM file of the CA's certificate revocation list; every peer is then looked "
        "up in it.",
    )

    @field_validator("key")
    @classmethod
    def _certificate_and_key_belong_together(
        cls, key: Path | None, info: ValidationInfo
    ) -> Path | None:
        if "certificate" in info.data and (info.data["certificate"] is None) != (key is None):
            missing = "key" if key is None else "certificate"
            raise ValueError(
                f"expected `certificate` and `key`, or neither; `{missing}` is missing"
            )
        return key


class AllowedCertificate(Settings):
    """A certificate that may send to the receiver, by a name in it or by its fingerprint."""

    certificate: str = Field(
        description="DNS:name, IP:address or URI:uri of its SubjectAltName, or SHA256:fingerprint."
    )
    calling_ae_title: AeTitle | None = Field(
        default=None, description="AE title that only this certificate may call itself."
    )

    @field_validator("certificate")
    @classmethod
    def _is_a_name_or_a_fingerprint(cls, text: str) -> str:
        return normal_certificate_name(text)


OwnTls = Annotated[
    Annotated[bool, Tag("switch")] | Annotated[Tls, Tag("keys")],
    Discriminator(lambda value: "switch" if isinstance(value, bool) else "keys"),
]
"""``true`` for the site's settings, ``false`` for plain DICOM, or settings of one's own."""


def normal_certificate_name(text: str) -> str:
    """The one spelling of a name in a certificate, or of its fingerprint, for comparison.

    Raises
    ------
    ValueError
        It is neither.
    """
    kind, _, value = text.partition(":")
    kind, value = kind.strip().upper(), value.strip()
    if kind == "SHA256":
        digits = re.sub("[: ]", "", value).lower()
        if re.fullmatch(f"[0-9a-f]{{{_SHA256_DIGITS}}}", digits):
            return f"SHA256:{digits}"
    elif kind == "DNS" and re.fullmatch(r"[\w*.-]+", value):
        return f"DNS:{value.lower()}"
    elif kind == "IP" and (address := ip_address(value)):
        return f"IP:{address}"
    elif kind == "URI" and value:
        return f"URI:{value}"
    raise ValueError(
        f"{shown(text)} is none; expected DNS:name, IP:address or URI:uri as in the certificate's "
        f"SubjectAltName, or SHA256: with {_SHA256_DIGITS} hexadecimal digits "
        "(`openssl x509 -in FILE -noout -fingerprint -sha256`)"
    )
