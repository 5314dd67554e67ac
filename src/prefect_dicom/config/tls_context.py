"""TLS contexts from settings, made anew when a file of theirs has changed.

Python's ``ssl`` does the protocol. What PS3.15 B.12 and B.13 leave to us is set here: versions,
suites, verification in both directions, no compression, no renegotiation, no tickets.
"""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

from prefect_dicom.config.tls import SYSTEM_TRUST, Tls, TlsProfile

log = logging.getLogger(__name__)

# RFC 9325 4.2; TLS 1.3 has suites of its own, which all are fit for both profiles.
_RECOMMENDED = (
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
)
# No DHE: the length of its key cannot be set here, and no RSA key exchange.
_FURTHER_OF_B13 = (
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES256-CCM",
    "ECDHE-ECDSA-AES128-CCM",
)
_SUITES = {
    TlsProfile.BCP195: _RECOMMENDED,
    TlsProfile.BCP195_MODIFIED: (*_RECOMMENDED, *_FURTHER_OF_B13),
}
# 112 bits: RSA keys of 2048 bits and EC keys of 224 bits at least, wherever OpenSSL was built.
_SECURITY_LEVEL = "@SECLEVEL=2"


_RENEWAL_SECONDS = 0.5
_LOOK_SECONDS = 0.1
_MOST_LOOKS = 10


class EncryptedKeyError(ValueError):
    """A key asks for a passphrase, which nobody can type here."""


def client_context(tls: Tls) -> ssl.SSLContext:
    """A context to connect with: chain and name of the server are verified.

    Raises
    ------
    OSError
        A file cannot be read; as ``ssl.SSLError``, it holds nothing that can be used.
    EncryptedKeyError
        The key is encrypted.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return _prepared(context, tls)


def server_context(tls: Tls, *, require_certificate: bool = True) -> ssl.SSLContext:
    """A context to accept connections with: clients show a certificate, which is verified.

    Parameters
    ----------
    require_certificate : bool
        False: who shows none is served too. One that is shown is verified all the same.

    Raises
    ------
    OSError, EncryptedKeyError
        As :func:`client_context`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED if require_certificate else ssl.CERT_OPTIONAL
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_TICKET
    context.num_tickets = 0
    return _prepared(context, tls)


def _prepared(context: ssl.SSLContext, tls: Tls) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_ciphers(":".join((*_SUITES[tls.profile], _SECURITY_LEVEL)))
    if tls.trust == SYSTEM_TRUST:
        context.load_default_certs(
            ssl.Purpose.SERVER_AUTH
            if context.protocol is ssl.PROTOCOL_TLS_CLIENT
            else ssl.Purpose.CLIENT_AUTH
        )
    else:
        context.load_verify_locations(tls.trust)
    if tls.crl is not None:
        context.load_verify_locations(tls.crl)
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key, _refuse_to_decrypt)
    return context


def _refuse_to_decrypt() -> str:
    raise EncryptedKeyError("the key is encrypted")


class ReloadedContext:
    """A context that follows its files. Thread-safe.

    While the files cannot be used, as between the two writes of a renewal, the last context that
    could be made stays in use, and a warning is logged.

    Parameters
    ----------
    files : sequence of Path
        What the context is made of.
    make : callable
        Makes it; raises ``OSError`` or :class:`EncryptedKeyError`.
    """

    def __init__(self, files: tuple[Path, ...], make: Callable[[], ssl.SSLContext]) -> None:
        self._files = files
        self._make = make
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._state: tuple[object, ...] = ()

    def __call__(self) -> ssl.SSLContext:
        """The context for a new connection.

        Raises
        ------
        OSError, EncryptedKeyError
            The first one cannot be made.
        """
        with self._lock:
            state = tuple(map(_state_of, self._files))
            if self._context is not None and state == self._state:
                return self._context
            try:
                context = self._make() if self._context else self._make_first()
            except (OSError, EncryptedKeyError) as error:
                if self._context is None:
                    raise
                if state != self._state:
                    log.warning("the TLS files cannot be used (%s); the last ones stay", error)
                    # Read again when one of them changes: a renewal writes them one by one.
                    self._state = state
                return self._context
            if self._context is not None:
                log.info("the TLS files have changed: new connections use the new ones")
            self._context, self._state = context, state
            return context

    def _make_first(self) -> ssl.SSLContext:
        """Make it, waiting a moment for a renewal that is under way."""
        for _ in looks_at(self._files):
            with contextlib.suppress(OSError, EncryptedKeyError):
                return self._make()
        return self._make()


def looks_at(files: Sequence[Path]) -> Iterator[None]:
    """Yield for as long as another look at files may find what this one has not.

    One of them has been written within the last half second: a renewal writes them one by one.
    """
    for _ in range(_MOST_LOOKS):
        yield
        states = filter(None, map(_state_of, files))
        newest = max((written / 1e9 for _, _, written in states), default=0.0)
        if time.time() - newest > _RENEWAL_SECONDS:
            return
        time.sleep(_LOOK_SECONDS)


@lru_cache(maxsize=64)
def current_client_context(tls: Tls) -> ReloadedContext:
    """The context of these settings to connect with, kept for as long as its files are the same."""
    return ReloadedContext(files_of(tls), partial(client_context, tls))


def current_server_context(tls: Tls, *, require_certificate: bool = True) -> ReloadedContext:
    """The context of these settings to accept connections with, see :class:`ReloadedContext`."""
    make = partial(server_context, tls, require_certificate=require_certificate)
    return ReloadedContext(files_of(tls), make)


def files_of(tls: Tls) -> tuple[Path, ...]:
    """The files that the settings name."""
    named = (tls.certificate, tls.key, tls.trust, tls.crl)
    return tuple(path for path in named if isinstance(path, Path))


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
