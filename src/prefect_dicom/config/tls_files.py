"""What is wrong with the files that TLS settings name, and when our certificates expire."""

from __future__ import annotations

import contextlib
import os
import ssl
import stat
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from prefect_dicom.config.certificates import read_certificates
from prefect_dicom.config.tls import SYSTEM_TRUST, Tls
from prefect_dicom.config.tls_context import (
    EncryptedKeyError,
    client_context,
    files_of,
    looks_at,
)
from prefect_dicom.core.metrics import Value

_RENEW = "have it renewed by who issued it"
_NEW_KEY = "make a new key (RSA of 2048 bits at least, or EC P-256) and have it certified"
_ADVICE_OF_SSL = {
    "KEY_VALUES_MISMATCH": "is not the key of `certificate`; name the two that belong together",
    "EE_KEY_TOO_SMALL": f"belongs to a key that is too short to be safe; {_NEW_KEY}",
    "CA_KEY_TOO_SMALL": f"is certified by a CA key that is too short to be safe; {_NEW_KEY}",
    "CA_MD_TOO_WEAK": "is signed with a hash that is broken; have it issued with SHA-256",
}


def tls_faults(tls: Tls, key: str) -> list[str]:
    """The faults of the files of one group of TLS settings, one line each.

    Parameters
    ----------
    tls : Tls
        The settings.
    key : str
        Where they are in the site file, like ``nodes.main.tls``.
    """
    faults: list[str] = []
    for _ in looks_at(files_of(tls)):
        if not (faults := [f"{key}.{fault}" for fault in _faults(tls)]):
            break
    return faults


def certificate_values(groups: Mapping[str, Tls]) -> Iterator[Value]:
    """The metric of each certificate of ours, by the place of its settings."""
    for key, tls in groups.items():
        if tls.certificate is None:
            continue
        with contextlib.suppress(OSError, ValueError):
            left = read_certificates(tls.certificate)[0].seconds_left()
            yield Value("prefect_dicom_certificate_seconds_left", left, {"certificate": key})


def _faults(tls: Tls) -> Iterator[str]:
    readable = True
    if tls.certificate is not None and tls.key is not None:
        certificate = list(_of_certificate(tls.certificate))
        private = list(_of_key(tls.key))
        yield from (f"certificate: {tls.certificate} {fault}" for fault in certificate)
        yield from (f"key: {tls.key} {fault}" for fault in private)
        readable = not certificate and not private
    if tls.trust != SYSTEM_TRUST:
        trust = list(_of_trust(Path(tls.trust)))
        yield from (f"trust: {tls.trust} {fault}" for fault in trust)
        readable = readable and not trust
    if tls.crl is not None:
        crl = list(_of_crl(tls.crl))
        yield from (f"crl: {tls.crl} {fault}" for fault in crl)
        readable = readable and not crl
    if readable:
        yield from _of_the_whole(tls)


def _of_the_whole(tls: Tls) -> Iterator[str]:
    """What only shows when a context is made of all files."""
    try:
        client_context(tls)
    except EncryptedKeyError:
        yield f"key: {tls.key} is encrypted; decrypt it (`openssl pkey -in FILE -out FILE`)"
    except ssl.SSLError as error:
        words = _ADVICE_OF_SSL.get(error.reason or "")
        part = "certificate" if (error.reason or "").startswith(("EE_", "CA_")) else "key"
        words = words or f"cannot be used ({error.reason or 'it is cut short'})"
        yield f"{part}: {getattr(tls, part)} {words}"
    except OSError as error:
        yield f"certificate: {tls.certificate} cannot be used ({error.strerror or 'unreadable'})"


def _read(path: Path) -> tuple[bytes, str]:
    """The bytes of a file, and its fault where it cannot be read."""
    try:
        return path.read_bytes(), ""
    except OSError as error:
        return b"", f"cannot be read ({error.strerror}); name a PEM file that this user may read"


def _of_certificate(path: Path) -> Iterator[str]:
    _, fault = _read(path)
    if fault:
        yield fault
        return
    try:
        own = read_certificates(path)[0]
    except ValueError:
        yield "holds no certificate; expected PEM text (-----BEGIN CERTIFICATE-----)"
        return
    now = datetime.now(UTC)
    if own.not_before > now:
        yield f"is not valid before {own.not_before:%Y-%m-%d %H:%M} UTC; check this host's clock"
    if own.not_after <= now:
        yield f"expired on {own.not_after:%Y-%m-%d %H:%M} UTC; {_RENEW}"


def _of_key(path: Path) -> Iterator[str]:
    text, fault = _read(path)
    if fault:
        yield fault
        return
    if b"PRIVATE KEY-----" not in text:
        yield "holds no private key; expected PEM text (-----BEGIN PRIVATE KEY-----)"
    yield from _of_permissions(os.stat(path))


def _of_permissions(status: os.stat_result) -> Iterator[str]:
    # A group may read a key that root owns and hands to it, as systemd and Kubernetes do.
    mode = stat.S_IMODE(status.st_mode)
    allowed = 0o740 if status.st_uid == 0 else 0o700
    if mode & ~allowed & 0o077:
        yield f"has the mode {mode:04o}, so that others may use it; set it to 0600 (`chmod 600`)"


def _of_trust(path: Path) -> Iterator[str]:
    _, fault = _read(path)
    if fault:
        yield fault
        return
    try:
        read_certificates(path)
    except ValueError:
        yield "holds no certificate; expected those of the CAs, as PEM text"


def _of_crl(path: Path) -> Iterator[str]:
    text, fault = _read(path)
    if fault:
        yield fault
        return
    try:
        crl = x509.load_pem_x509_crl(text)
    except ValueError:
        yield "holds no revocation list; expected PEM text (-----BEGIN X509 CRL-----)"
        return
    ends = crl.next_update_utc
    if ends is not None and ends <= datetime.now(UTC):
        yield (
            f"was to be replaced by {ends:%Y-%m-%d %H:%M} UTC; without a current one every peer "
            "is refused: have it fetched again"
        )
