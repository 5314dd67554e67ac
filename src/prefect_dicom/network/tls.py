"""TLS of the connections that we open: the handshake, its faults as reasons, and who the peer is.

Whatever goes wrong is told apart by who refused whom: the peer our certificate, we the peer's, or
neither, because the two have no version or suite in common or one does not speak TLS at all.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from prefect_dicom.config.certificates import Certificate
from prefect_dicom.config.node import PacsNode
from prefect_dicom.config.tls import Tls
from prefect_dicom.config.tls_context import EncryptedKeyError, current_client_context
from prefect_dicom.core.errors import PacsError

TLS_HANDSHAKE, TLS_ALERT = 0x16, 0x15
"""First byte of a connection that begins with TLS, and of its alerts."""


class TlsNode(Protocol):
    """Settings of a node as far as TLS goes."""

    @property
    def tls(self) -> Tls | bool:
        """Its TLS settings; False for none."""

    @property
    def tls_name(self) -> str | None:
        """The name in its certificate, where that is not its host."""

    @property
    def host(self) -> str:
        """Host name or address."""


class Verification(IntEnum):
    """Some results of OpenSSL's verification of a chain, X509_V_ERR."""

    NO_CRL = 3
    NOT_YET_VALID = 9
    EXPIRED = 10
    CRL_EXPIRED = 12
    SELF_SIGNED = 18
    SELF_SIGNED_IN_CHAIN = 19
    NO_ISSUER = 20
    LEAF_UNVERIFIED = 21
    REVOKED = 23
    PURPOSE = 26
    HOST_NAME = 62
    ADDRESS = 64
    KEY_TOO_SMALL = 66


_ALERT_SECONDS = 1.0
_UNREAD_BYTES = 64 * 1024
_VERIFICATION_WORDS: dict[int, str] = {
    Verification.NOT_YET_VALID: "it is not valid yet",
    Verification.EXPIRED: "it, or a CA of its chain, has expired",
    Verification.SELF_SIGNED: "it is self-signed, and not in `trust`",
    Verification.SELF_SIGNED_IN_CHAIN: "its root CA is not in `trust`",
    Verification.NO_ISSUER: "its issuer is not in `trust`, or an intermediate CA is missing",
    Verification.LEAF_UNVERIFIED: "its issuer is not in `trust`, or an intermediate CA is missing",
    Verification.REVOKED: "it has been revoked",
    Verification.NO_CRL: "the file of `crl` is not of its CA",
    Verification.CRL_EXPIRED: "the revocation list of `crl` has expired",
    Verification.PURPOSE: "it is not made for this side of a connection (Extended Key Usage)",
    Verification.HOST_NAME: "it has other names",
    Verification.ADDRESS: "it has other names",
    Verification.KEY_TOO_SMALL: "its key is too short to be safe",
}

ALERTS_ABOUT_OUR_CERTIFICATE = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "none was shown",
    "TLSV1_ALERT_UNKNOWN_CA": "its CA is unknown there",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it has expired",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "it has been revoked",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "for a reason that the alert does not say",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it is bad",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it is of a kind that is not supported there",
    "TLSV1_ALERT_ACCESS_DENIED": "it is not permitted there",
    "TLSV1_ALERT_DECRYPT_ERROR": "its signature could not be verified",
}
"""Alerts of a peer that refuses our certificate, and what they say of it."""

NO_COMMON_PROFILE = frozenset(
    {
        "SSLV3_ALERT_HANDSHAKE_FAILURE",
        "TLSV1_ALERT_PROTOCOL_VERSION",
        "TLSV1_ALERT_INSUFFICIENT_SECURITY",
        "NO_SHARED_CIPHER",
        "NO_SUITABLE_SIGNATURE_ALGORITHM",
        "NO_SUITABLE_KEY_SHARE",
        "UNSUPPORTED_PROTOCOL",
        "WRONG_SSL_VERSION",
        "VERSION_TOO_LOW",
        "DH_KEY_TOO_SMALL",
    }
)
"""What OpenSSL says where two sides have no version or suite in common."""

NOT_TLS = frozenset(
    {
        "WRONG_VERSION_NUMBER",
        "RECORD_LAYER_FAILURE",
        "UNEXPECTED_EOF_WHILE_READING",
        "HTTP_REQUEST",
        "HTTPS_PROXY_REQUEST",
        "PACKET_LENGTH_TOO_LONG",
        "BAD_RECORD_TYPE",
    }
)
"""What OpenSSL says of bytes that are no TLS, or of an end where TLS was due."""


@dataclass(frozen=True, slots=True)
class TlsPeer:
    """How a peer was verified: version, suite, and its chain, its own certificate first."""

    version: str
    suite: str
    chain: tuple[Certificate, ...]


def secure(connection: socket.socket, node: TlsNode, seconds: float) -> socket.socket:
    """Shake hands on a connection to a node that has TLS; others are returned as they are.

    The refusal of our certificate may still come: with TLS 1.3 the peer verifies it after the
    handshake has ended here. :func:`refusal` knows it, when it is read.

    Parameters
    ----------
    seconds : float
        For the whole handshake.

    Raises
    ------
    PacsError
        With the cause. The connection is closed.
    """
    if not isinstance(node.tls, Tls):
        return _plain(connection, node)
    try:
        context = current_client_context(node.tls)()
    except (OSError, EncryptedKeyError) as error:
        connection.close()
        name = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise PacsError("tls-files-unusable", str(name)) from None
    secured: ssl.SSLSocket | None = None
    try:
        secured = context.wrap_socket(
            connection,
            server_hostname=node.tls_name or node.host,
            do_handshake_on_connect=False,
        )
        secured.settimeout(seconds)
        secured.do_handshake()
    except TimeoutError:
        error_of_it = PacsError("pacs-silent", f"no TLS handshake within {seconds:g} s")
    except (OSError, ValueError) as error:
        error_of_it = _failure(error, node, secured)
    else:
        return secured
    (secured or connection).close()
    raise error_of_it from None


def _plain(connection: socket.socket, node: TlsNode) -> socket.socket:
    if node.tls:
        # Only a site knows its own keys: a node by itself must not fall back to plain DICOM.
        connection.close()
        raise PacsError("tls-files-unusable", "`tls: true` of a node outside of its site")
    return connection


def _failure(
    error: OSError | ValueError, node: TlsNode, secured: ssl.SSLSocket | None
) -> PacsError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return _not_trusted(error, node)
    if isinstance(error, ValueError):
        return PacsError("tls-name-mismatch", "no certificate can have the name of `tls_name`")
    if (refused := refusal(error)) is not None:
        return refused
    name = reason_name(error)
    has_answered = secured is not None and _has_shown_its_certificate(secured)
    if name == "SSLV3_ALERT_HANDSHAKE_FAILURE" and has_answered:
        # TLS 1.2 has no other alert for it, RFC 5246 7.4.6.
        shown = "it was refused" if _shows_a_certificate(node) else "none was shown"
        return PacsError("tls-client-certificate-refused", shown)
    if name in NO_COMMON_PROFILE:
        return PacsError("tls-profile-not-supported", name.replace("_", " ").lower())
    if not has_answered and (name in NOT_TLS or isinstance(error, ConnectionError)):
        return PacsError("tls-not-spoken", "the connection ended in the handshake")
    return PacsError("tls-handshake-failed", name.replace("_", " ").lower())


def _not_trusted(error: ssl.SSLCertVerificationError, node: TlsNode) -> PacsError:
    code = error.verify_code
    words = verification_words(code)
    if code in (Verification.HOST_NAME, Verification.ADDRESS):
        words = f"expected the name {node.tls_name or node.host}"
        return PacsError("tls-name-mismatch", words)
    if code in (Verification.EXPIRED, Verification.NOT_YET_VALID):
        return PacsError("tls-expired", words)
    return PacsError("tls-server-not-trusted", words)


def refusal(error: BaseException) -> PacsError | None:
    """The error for an alert by which the peer refuses our certificate; None for others."""
    words = ALERTS_ABOUT_OUR_CERTIFICATE.get(reason_name(error))
    return None if words is None else PacsError("tls-client-certificate-refused", words)


def refusal_after(error: OSError, connection: socket.socket) -> PacsError | None:
    """The refusal of our certificate in an error, or unread in the connection that it ended.

    With TLS 1.3 a peer refuses after the handshake: where we are sending then, that fails first.
    """
    refused = refusal(error)
    if refused is not None or not isinstance(connection, ssl.SSLSocket):
        return refused
    deadline = time.monotonic() + _ALERT_SECONDS
    try:
        while (left := deadline - time.monotonic()) > 0:
            connection.settimeout(left)
            if not connection.recv(_UNREAD_BYTES):
                break
    except OSError as error:
        return refusal(error)
    return None


def reason_name(error: BaseException) -> str:
    """OpenSSL's name of what went wrong; of other errors their type."""
    reason = getattr(error, "reason", None)
    # Without a reason in Python 3.11.2, which takes the end in a handshake for one in good order.
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "UNEXPECTED_EOF_WHILE_READING"
    return reason if isinstance(reason, str) and reason else type(error).__name__


def verification_words(code: int) -> str:
    """What a result of OpenSSL's verification says of a certificate, in words."""
    return _VERIFICATION_WORDS.get(code) or f"X509_V_ERR {code}"


def peer_of(connection: socket.socket) -> TlsPeer | None:
    """Who is at the other end of a connection; None where it has no TLS."""
    if not isinstance(connection, ssl.SSLSocket):
        return None
    suite = connection.cipher()
    chain = []
    for der in _chain_of(connection) or filter(None, [connection.getpeercert(True)]):
        with contextlib.suppress(ValueError):
            chain.append(Certificate.from_der(der))
    return TlsPeer(connection.version() or "", suite[0] if suite else "", tuple(chain))


def shown_chain(node: PacsNode) -> tuple[Certificate, ...]:
    """What a node shows whose certificate is not accepted, for people to compare.

    Nothing is sent on this connection but the handshake, and it is closed then.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    address, seconds = (node.host, node.port), node.timeouts.connect_seconds
    found = []
    with contextlib.suppress(OSError, UnicodeError, ValueError):
        connection = socket.create_connection(address, seconds)
        with context.wrap_socket(connection, server_hostname=node.tls_name or node.host) as shown:
            for der in _chain_of(shown, verified=False):
                found.append(Certificate.from_der(der))
    return tuple(found)


def _shows_a_certificate(node: TlsNode) -> bool:
    return isinstance(node.tls, Tls) and node.tls.certificate is not None


def _has_shown_its_certificate(secured: ssl.SSLSocket) -> bool:
    return bool(_chain_of(secured, verified=False))


def _chain_of(connection: ssl.SSLSocket, *, verified: bool = True) -> list[bytes]:
    """The peer's chain in DER form, empty where Python does not say.

    Public from Python 3.13 on, and there before under the socket.
    """
    name = "get_verified_chain" if verified else "get_unverified_chain"
    read = getattr(connection, name, None) or getattr(
        getattr(connection, "_sslobj", None), name, None
    )
    try:
        found = read() if read else None
    except (OSError, ValueError):
        return []
    return [one if isinstance(one, bytes) else one.public_bytes(_DER) for one in found or ()]


_DER = 2
"""``_ssl.ENCODING_DER``."""
