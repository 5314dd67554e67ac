"""Authentication of requests: Basic, bearer tokens, OAuth 2.0 client credentials, AWS SigV4.

Secrets and tokens are in no log, no error, no ledger and no ``repr``. They are sent to the origin
of the node alone. A token is checked when a request begins: a transfer that outlives it goes on.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote, urlencode

from prefect_dicom.config.web_node import Authentication, AuthenticationScheme
from prefect_dicom.core.errors import PacsError
from prefect_dicom.web.connection import HttpConnection, Patience

_MOST_TOKEN_BYTES = 64 * 1024
_REFRESH_AFTER = 0.8
"""Of its life time: a token is replaced before it ends."""
_SHORTEST_LIFE_SECONDS = 10.0
_LIFE_SECONDS = 300.0
"""Of a token whose issuer does not say."""


class Authenticator(ABC):
    """Makes the headers that authenticate requests to one node. Thread-safe."""

    @abstractmethod
    def headers(self, method: str, url: str) -> Mapping[str, str]:
        """The headers of a request.

        Raises
        ------
        PacsError
            ``credentials-missing``, or what kept a token from being issued.
        """

    def renew(self) -> bool:
        """Forget what was refused; whether another try has something else to send."""
        return False

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class NoAuthentication(Authenticator):
    """Requests are not authenticated."""

    def headers(self, method: str, url: str) -> Mapping[str, str]:
        """None."""
        return {}


class BasicAuthentication(Authenticator):
    """User and password, RFC 7617."""

    def __init__(self, user: str, variable: str) -> None:
        self._user = user
        self._variable = variable

    def headers(self, method: str, url: str) -> Mapping[str, str]:
        """User and password."""
        pair = f"{self._user}:{_secret(self._variable)}"
        return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


class TokenFile(Authenticator):
    """A bearer token in a file that something else keeps fresh, RFC 6750."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._read: tuple[tuple[int, int], str] | None = None

    def headers(self, method: str, url: str) -> Mapping[str, str]:
        """The token; the file is read again where it has changed."""
        with self._lock:
            try:
                facts = self._path.stat()
                version = facts.st_mtime_ns, facts.st_size
                if self._read is None or self._read[0] != version:
                    text = self._path.read_bytes()[: _MOST_TOKEN_BYTES + 1].decode("ascii")
                    self._read = version, text.strip()
            except (OSError, ValueError):
                raise PacsError(
                    "credentials-missing", "the file of the bearer token cannot be read"
                ) from None
            return {"Authorization": f"Bearer {_checked_token(self._read[1])}"}

    def renew(self) -> bool:
        """Read the file again at the next request; whether it has another token now."""
        with self._lock:
            before = self._read
            self._read = None
        if before is None:
            return False
        return self.headers("GET", "")["Authorization"] != f"Bearer {before[1]}"


class ClientCredentials(Authenticator):
    """Tokens from an issuer, RFC 6749 4.4, shared by all connections to a node."""

    def __init__(
        self,
        settings: Authentication,
        connection: HttpConnection,
        patience: Patience,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._connection = connection
        self._patience = patience
        self._now = now
        self._lock = threading.Lock()
        self._token = ""
        self._good_until = 0.0

    def headers(self, method: str, url: str) -> Mapping[str, str]:
        """The current token, or a new one where that is about to end."""
        with self._lock:
            if not self._token or self._now() >= self._good_until:
                self._issue()
            return {"Authorization": f"Bearer {self._token}"}

    def renew(self) -> bool:
        """Have another token issued for the next request."""
        with self._lock:
            self._token = ""
        return True

    def _issue(self) -> None:
        settings = self._settings
        assert settings.endpoint is not None and settings.client is not None
        assert settings.variable is not None
        form = {"grant_type": "client_credentials"}
        if settings.scope is not None:
            form["scope"] = settings.scope
        # RFC 6749 2.3.1: both are form-encoded before they are joined.
        pair = f"{quote(settings.client, safe='')}:{quote(_secret(settings.variable), safe='')}"
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}",
            "Content-Type": "application/x-www-form-urlencoded",
        }
        body = urlencode(form).encode("ascii")
        try:
            with self._connection.request(
                settings.endpoint, headers, self._patience, method="POST", body=body
            ) as response:
                status, answer = response.status, response.read(_MOST_TOKEN_BYTES)
        except PacsError as error:
            raise PacsError("token-not-issued", f"the issuer: {error}") from None
        if status != 200:
            raise PacsError("token-not-issued", f"the issuer answers with status {status}")
        try:
            found = json.loads(answer)
            self._token = _checked_token(str(found["access_token"]))
            life = float(found.get("expires_in") or _LIFE_SECONDS)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise PacsError("token-not-issued", "the issuer's answer holds no token") from None
        life = max(_SHORTEST_LIFE_SECONDS, life if life == life else _LIFE_SECONDS)
        self._good_until = self._now() + _REFRESH_AFTER * life


class SignatureV4(Authenticator):
    """AWS Signature Version 4, with the keys of botocore's own chain."""

    def __init__(self, settings: Authentication) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._credentials: object = None

    def headers(self, method: str, url: str) -> Mapping[str, str]:
        """The signature of a request, its time, and the session token where there is one."""
        # Most nodes need none of it, and it takes a while to import.
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.exceptions import BotoCoreError
        from botocore.session import Session

        settings = self._settings
        try:
            with self._lock:
                if self._credentials is None:
                    self._credentials = Session(profile=settings.profile).get_credentials()
                if self._credentials is None:
                    raise PacsError("credentials-missing", "no AWS credentials are found")
                frozen = self._credentials.get_frozen_credentials()  # type: ignore[attr-defined]
            request = AWSRequest(method, url)
            SigV4Auth(frozen, settings.service, settings.region).add_auth(request)
        except BotoCoreError as error:
            raise PacsError("credentials-missing", f"AWS: {type(error).__name__}") from None
        return dict(request.headers.items())

    def renew(self) -> bool:
        """Look the keys up again."""
        with self._lock:
            self._credentials = None
        return True


def authenticator_for(
    settings: Authentication | None, connection: Callable[[], HttpConnection], patience: Patience
) -> Authenticator:
    """The authenticator of a node.

    Parameters
    ----------
    connection : callable
        Makes a connection for the issuer of tokens.
    """
    if settings is None:
        return NoAuthentication()
    match settings.scheme:
        case AuthenticationScheme.BASIC:
            assert settings.user is not None and settings.variable is not None
            return BasicAuthentication(settings.user, settings.variable)
        case AuthenticationScheme.BEARER:
            assert settings.file is not None
            return TokenFile(settings.file)
        case AuthenticationScheme.CLIENT_CREDENTIALS:
            return ClientCredentials(settings, connection(), patience)
        case AuthenticationScheme.SIGV4:
            return SignatureV4(settings)


def _secret(variable: str) -> str:
    secret = os.environ.get(variable)
    if not secret:
        raise PacsError("credentials-missing", f"the environment variable {variable} is not set")
    return secret


def _checked_token(token: str) -> str:
    if not token or len(token) > _MOST_TOKEN_BYTES or any(not "!" <= c <= "~" for c in token):
        raise PacsError("credentials-missing", "what should be a token is none")
    return token
