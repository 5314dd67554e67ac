"""TLS of the connections that senders open: handshake, and whose certificate may send.

A certificate authenticates, an AE title does not: it is a label that the peer chooses. With
``allowed_certificates`` only the named ones send, and an AE title can be tied to one of them.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Sequence

from prefect_dicom.config.certificates import identities_of
from prefect_dicom.config.receiver import Receiver
from prefect_dicom.config.tls import AllowedCertificate, Tls
from prefect_dicom.config.tls_context import EncryptedKeyError, current_server_context
from prefect_dicom.core.errors import ReceiverError
from prefect_dicom.network.tls import (
    ALERTS_ABOUT_OUR_CERTIFICATE,
    NOT_TLS,
    TLS_HANDSHAKE,
    reason_name,
    verification_words,
)

_RECORD_HEADER_BYTES = 5
_LONGEST_HELLO_BYTES = 4096
"""Of a ClientHello that is waited for as a whole; with post-quantum keys it has 2 KB."""
_NO_CERTIFICATE = "PEER_DID_NOT_RETURN_A_CERTIFICATE"

MOST_HELLO_BYTES = _RECORD_HEADER_BYTES + _LONGEST_HELLO_BYTES
"""The most bytes that :func:`hello_bytes` asks for."""


class SenderRefused(Exception):
    """The handshake with a sender failed; has a reason code, and words without a peer's text."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


def hello_bytes(there: bytes) -> int:
    """How many bytes of a connection have to be there for a handshake to be worth a thread.

    Parameters
    ----------
    there : bytes
        What has arrived, from the first byte on.
    """
    if there[:1] != bytes((TLS_HANDSHAKE,)):
        return 1
    if len(there) < _RECORD_HEADER_BYTES:
        return _RECORD_HEADER_BYTES
    length = int.from_bytes(there[3:_RECORD_HEADER_BYTES], "big")
    return _RECORD_HEADER_BYTES + min(length, _LONGEST_HELLO_BYTES)


class SenderTls:
    """TLS of a storage SCP. Thread-safe.

    Parameters
    ----------
    context : callable
        The server context for a new connection.
    allowed : sequence of AllowedCertificate
        Whose certificate may send, of those that are trusted; empty: every one.
    """

    def __init__(
        self, context: Callable[[], ssl.SSLContext], allowed: Sequence[AllowedCertificate] = ()
    ) -> None:
        self._context = context
        self._allowed = tuple(allowed)

    @classmethod
    def of(cls, settings: Receiver) -> SenderTls | None:
        """The TLS of a receiver's settings; None where it has plain DICOM."""
        if not isinstance(settings.tls, Tls):
            return None
        context = current_server_context(
            settings.tls, require_certificate=settings.require_certificate
        )
        return cls(context, settings.allowed_certificates)

    def check(self) -> None:
        """Make the first context.

        Raises
        ------
        ReceiverError
            A file cannot be used.
        """
        try:
            self._context()
        except (OSError, EncryptedKeyError) as error:
            raise ReceiverError("tls-files-unusable", reason_name(error)) from None

    def wrap(self, connection: socket.socket) -> ssl.SSLSocket:
        """The connection with TLS, before its handshake."""
        return self._context().wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        )

    @staticmethod
    def shake_hands(connection: ssl.SSLSocket, seconds: float) -> None:
        """Make the handshake, the verification of the sender's certificate included.

        Raises
        ------
        SenderRefused
            It failed, and there is a cause to report.
        OSError
            The peer was too slow, or closed the connection.
        """
        connection.settimeout(seconds)
        try:
            connection.do_handshake()
        except ssl.SSLCertVerificationError as error:
            words = verification_words(error.verify_code)
            raise SenderRefused("sender-certificate-refused", words) from None
        except ssl.SSLError as error:
            if (refused := _refused(reason_name(error))) is None:
                raise
            raise refused from None

    def refuses(self, connection: socket.socket, calling_ae_title: str) -> str:
        """Why a verified sender may not send under its AE title; empty where it may."""
        if not self._allowed or not isinstance(connection, ssl.SSLSocket):
            return ""
        identities = identities_of(connection.getpeercert(True))
        named = [one for one in self._allowed if one.certificate in identities]
        if not named:
            return "its certificate is not in `allowed_certificates`"
        tied = [one for one in self._allowed if one.calling_ae_title == calling_ae_title]
        if tied:
            named = [one for one in tied if one.certificate in identities]
        else:
            named = [one for one in named if one.calling_ae_title is None]
        return "" if named else "its certificate is not the one of its AE title"


def _refused(name: str) -> SenderRefused | None:
    if name == _NO_CERTIFICATE:
        return SenderRefused("sender-certificate-refused", "it showed no certificate")
    if name in ALERTS_ABOUT_OUR_CERTIFICATE:
        words = f"it refused ours: {name.partition('ALERT_')[2].replace('_', ' ').lower()}"
        return SenderRefused("receiver-certificate-refused", words)
    if name in NOT_TLS:
        return None
    words = f"no TLS with it ({name.replace('_', ' ').lower()})"
    return SenderRefused("sender-tls-failed", words)
