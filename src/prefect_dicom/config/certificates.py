"""X.509 certificates as people need them: names, dates, fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

_LONGEST_NAME = 200


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate; its texts are what its issuer wrote, cut and printable.

    Attributes
    ----------
    subject, issuer : str
        Distinguished names as in RFC 4514.
    names : tuple of str
        ``DNS:``, ``IP:`` and ``URI:`` entries of its SubjectAltName.
    not_before, not_after : datetime
        When it is valid.
    fingerprint : str
        SHA-256 of its DER form, hexadecimal.
    """

    subject: str
    issuer: str
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    fingerprint: str

    @classmethod
    def of(cls, certificate: x509.Certificate, der: bytes) -> Certificate:
        """The facts of a certificate."""
        return cls(
            _printable(certificate.subject.rfc4514_string()),
            _printable(certificate.issuer.rfc4514_string()),
            _alternative_names(certificate),
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
            hashlib.sha256(der).hexdigest(),
        )

    @classmethod
    def from_der(cls, der: bytes) -> Certificate:
        """The facts of a certificate in DER form.

        Raises
        ------
        ValueError
            It cannot be read.
        """
        return cls.of(x509.load_der_x509_certificate(der), der)

    @property
    def identities(self) -> frozenset[str]:
        """What an ``allowed_certificates`` entry may call it: its names, and its fingerprint."""
        return frozenset((*self.names, f"SHA256:{self.fingerprint}"))

    def seconds_left(self, now: datetime | None = None) -> float:
        """Seconds until it expires; negative when it has."""
        return (self.not_after - (now or datetime.now(UTC))).total_seconds()

    def days_left(self, now: datetime | None = None) -> int:
        """Whole days until it expires; negative when it has."""
        return int(self.seconds_left(now) // 86400)

    @property
    def words(self) -> str:
        """Subject, names and expiry, for people."""
        names = f" ({', '.join(self.names)})" if self.names else ""
        subject = self.subject or "a certificate without subject"
        left = self.days_left()
        ends = f"{left} days left" if left >= 0 else f"expired {-left} days ago"
        return f"{subject}{names}, until {self.not_after:%Y-%m-%d}, {ends}"


def read_certificates(path: Path) -> list[Certificate]:
    """The certificates of a PEM file, in their order.

    Raises
    ------
    OSError
        It cannot be read.
    ValueError
        It holds no certificate, or one that cannot be decoded.
    """
    from cryptography.hazmat.primitives.serialization import Encoding

    found = x509.load_pem_x509_certificates(path.read_bytes())
    return [Certificate.of(one, one.public_bytes(Encoding.DER)) for one in found]


def identities_of(der: bytes | None) -> frozenset[str]:
    """What a peer's certificate may be called; of one that cannot be decoded, its fingerprint."""
    if not der:
        return frozenset()
    try:
        return Certificate.from_der(der).identities
    except ValueError:
        return frozenset({f"SHA256:{hashlib.sha256(der).hexdigest()}"})


def _alternative_names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return ()
    names = extension.value
    return tuple(
        map(
            _printable,
            (
                *(f"DNS:{name.lower()}" for name in names.get_values_for_type(x509.DNSName)),
                *(f"IP:{name}" for name in names.get_values_for_type(x509.IPAddress)),
                *(
                    f"URI:{name}"
                    for name in names.get_values_for_type(x509.UniformResourceIdentifier)
                ),
            ),
        )
    )


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:_LONGEST_NAME]
