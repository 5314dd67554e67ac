"""Certificate authorities and certificates for tests, made once a session, valid for two days."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from prefect_dicom.config.tls import Tls

_DAY = timedelta(days=1)
_PEM = serialization.Encoding.PEM
_PLAIN = serialization.NoEncryption()


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path

    @property
    def fingerprint(self) -> str:
        """``SHA256:`` and the digits."""
        one = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        return f"SHA256:{one.fingerprint(hashes.SHA256()).hex()}"


class Authority:
    """A certificate authority with its files in a folder.

    Parameters
    ----------
    folder : Path
        Is made where it is not there.
    """

    def __init__(self, folder: Path, name: str = "Test CA") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + 2 * _DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False
            )
        )
        self._certificate = builder.sign(self._key, hashes.SHA256())
        self.trust = folder / "ca.crt"
        self.trust.write_bytes(self._certificate.public_bytes(_PEM))

    def issue(
        self,
        file: str,
        *names: str,
        days: tuple[float, float] = (-1, 2),
        usage: tuple[str, ...] = (),
        rsa_bits: int = 0,
        passphrase: bytes = b"",
    ) -> Identity:
        """Issue a certificate for DNS names and addresses; ``127.0.0.1`` and ``localhost`` are
        the default.

        Parameters
        ----------
        days : tuple of float
            From when until when it is valid, from now on.
        usage : tuple of str
            Of "server" and "client"; empty: any.
        rsa_bits : int
            Of an RSA key in place of EC P-256.
        """
        key = (
            rsa.generate_private_key(65537, rsa_bits)
            if rsa_bits
            else ec.generate_private_key(ec.SECP256R1())
        )
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_named(file))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + days[0] * _DAY)
            .not_valid_after(now + days[1] * _DAY)
            .add_extension(
                x509.SubjectAlternativeName(
                    [*map(_general_name, names or ("127.0.0.1", "localhost"))]
                ),
                critical=False,
            )
        )
        if usage:
            kinds = {
                "server": ExtendedKeyUsageOID.SERVER_AUTH,
                "client": ExtendedKeyUsageOID.CLIENT_AUTH,
            }
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([kinds[one] for one in usage]), critical=False
            )
        certificate = builder.sign(self._key, hashes.SHA256())
        identity = Identity(self.folder / f"{file}.crt", self.folder / f"{file}.key")
        encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else _PLAIN
        identity.key.touch(mode=0o600)
        # Key first: between the two writes of a renewal the files do not belong together.
        identity.key.write_bytes(
            key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, encryption)
        )
        identity.certificate.write_bytes(certificate.public_bytes(_PEM))
        return identity

    def revoke(self, *revoked: Identity, days: tuple[float, float] = (-1, 2)) -> Path:
        """A revocation list with these certificates, as a file."""
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._name)
            .last_update(now + days[0] * _DAY)
            .next_update(now + days[1] * _DAY)
        )
        for one in revoked:
            certificate = x509.load_pem_x509_certificate(one.certificate.read_bytes())
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(certificate.serial_number)
                .revocation_date(now - _DAY)
                .build()
            )
        path = self.folder / "ca.crl"
        path.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(_PEM))
        return path

    def tls(self, identity: Identity | None, **more: object) -> Tls:
        """Settings with a certificate, and trust in this authority."""
        own = {} if identity is None else {"certificate": identity.certificate, "key": identity.key}
        return Tls.model_validate({"trust": self.trust, **own, **more})


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
