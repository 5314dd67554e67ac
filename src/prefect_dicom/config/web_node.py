"""A node that speaks DICOMweb: its URL, and how requests to it are authenticated.

No secret is in the file: a password or client secret comes from an environment variable that the
file names, a bearer token from a file that others keep fresh, SigV4 keys from the chain of
botocore.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from prefect_dicom.config.destination import Destination
from prefect_dicom.config.fields import PlacedPath, http_url
from prefect_dicom.config.node import NodeSettings
from prefect_dicom.config.settings import Settings
from prefect_dicom.config.tls import OwnTls
from prefect_dicom.core.model import RetrieveMethod
from prefect_dicom.core.proxies import is_loopback


class AuthenticationScheme(StrEnum):
    """How the requests to a DICOMweb node are authenticated."""

    BASIC = "basic"
    BEARER = "bearer"
    CLIENT_CREDENTIALS = "client-credentials"
    SIGV4 = "sigv4"


_KEYS = {
    AuthenticationScheme.BASIC: ({"user", "variable"}, set[str]()),
    AuthenticationScheme.BEARER: ({"file"}, set[str]()),
    AuthenticationScheme.CLIENT_CREDENTIALS: ({"endpoint", "client", "variable"}, {"scope"}),
    AuthenticationScheme.SIGV4: ({"region", "service"}, {"profile"}),
}
"""By scheme, the keys that it needs and those that it may have."""


def _url(url: str) -> str:
    """An absolute HTTP URL without credentials, query or fragment, and no slash at its end."""
    parts = http_url(url)
    if parts is None or re.search(r"[\s\"<>\\^`{|}]|[^\x21-\x7e]", url):
        raise ValueError("expected a URL like https://pacs.example.org/dicom-web")
    if "@" in parts.netloc:
        raise ValueError(
            "expected a URL without credentials; `authentication` says where they come from"
        )
    if parts.query or parts.fragment:
        raise ValueError("expected a URL of scheme, host, port and path alone")
    return url.rstrip("/")


def _path(path: str) -> str:
    if not re.fullmatch(r"[\w.~-]+(/[\w.~-]+)*", path) or ".." in path.split("/"):
        raise ValueError(
            "expected a path below `dicomweb` without slashes at its ends, like qido-rs"
        )
    return path


Url = Annotated[str, AfterValidator(_url)]
PathBelow = Annotated[str, AfterValidator(_path)]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
Words = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$")]


class Authentication(Settings):
    """How requests are authenticated; which keys there are depends on the scheme."""

    scheme: AuthenticationScheme = Field(
        description="basic (user, variable), bearer (file), client-credentials (endpoint, client, "
        "variable, scope) or sigv4 (region, service, profile)."
    )
    user: Words | None = Field(default=None, description="User name, for basic.")
    variable: Variable | None = Field(
        default=None,
        description="Environment variable that holds the password of a user, or the secret of a "
        "client.",
    )
    file: PlacedPath | None = Field(
        default=None, description="File with a bearer token, read again when it has changed."
    )
    endpoint: Url | None = Field(
        default=None, description="URL that issues tokens, for client-credentials."
    )
    client: Words | None = Field(default=None, description="Client ID, for client-credentials.")
    scope: Words | None = Field(default=None, description="Scope of the tokens that are requested.")
    region: Words | None = Field(default=None, description="AWS region, for sigv4.")
    service: Words | None = Field(
        default=None, description="AWS service, for sigv4: medical-imaging."
    )
    profile: Words | None = Field(default=None, description="AWS profile with the keys, for sigv4.")

    @model_validator(mode="after")
    def _has_the_keys_of_its_scheme(self) -> Authentication:
        needed, possible = _KEYS[self.scheme]
        given = {name for name in type(self).model_fields if getattr(self, name) is not None}
        missing = sorted(needed - given)
        unused = sorted(given - needed - possible - {"scheme"})
        words = [f"expected `{name}` too" for name in missing]
        words += [f"found `{name}`, which it has no use for" for name in unused]
        if words:
            raise ValueError(f"`scheme: {self.scheme}`: {'; '.join(words)}")
        if self.endpoint is not None and not _is_private(self.endpoint):
            raise ValueError(
                "expected an `endpoint` of https: the secret would be sent in plain text"
            )
        return self


class WebNode(NodeSettings):
    """One server of DICOMweb, PS3.18: its URL, and how requests are authenticated."""

    dicomweb: Url = Field(description="Base URL, like https://pacs.example.org/dicom-web.")
    search_path: PathBelow | None = Field(
        default=None, description="Path of QIDO-RS below the base URL, if it has one of its own."
    )
    retrieve_path: PathBelow | None = Field(
        default=None, description="Path of WADO-RS below the base URL, if it has one of its own."
    )
    authentication: Authentication | None = Field(
        default=None, description="How requests are authenticated; without it, not at all."
    )
    tls: OwnTls = Field(
        default=False,
        description="Of https: true with the site's `tls`, or keys of its own; without it the "
        "certificate has to lead to a CA of the operating system.",
    )
    retrieve: RetrieveMethod = Field(
        default=RetrieveMethod.WADO_RS, description="wado-rs, the only way so far."
    )

    @field_validator("tls")
    @classmethod
    def _tls_is_of_https(cls, tls: Any, info: ValidationInfo) -> Any:
        if tls and info.data.get("dicomweb", "https").startswith("http:"):
            raise ValueError("expected it only together with `dicomweb: https://…`")
        return tls

    @field_validator("retrieve")
    @classmethod
    def _retrieves_by_web(cls, method: RetrieveMethod) -> RetrieveMethod:
        if method is not RetrieveMethod.WADO_RS:
            raise ValueError(
                "expected wado-rs; a node with `dicomweb` speaks HTTP: one that is retrieved from "
                "by c-move or c-get has `host`, `port` and `called_ae_title` instead"
            )
        return method

    @field_validator("authentication")
    @classmethod
    def _secrets_travel_encrypted(
        cls, authentication: Authentication | None, info: ValidationInfo
    ) -> Authentication | None:
        url = info.data.get("dicomweb")
        if authentication is not None and url is not None and not _is_private(url):
            raise ValueError(
                "expected `dicomweb: https://…` where requests are authenticated: over http the "
                "password or token would be sent in plain text"
            )
        return authentication

    @property
    def destination(self) -> Destination | None:
        """None: nothing is delivered by DICOMweb yet."""
        return None

    @property
    def search_url(self) -> str:
        """Base URL of searches, PS3.18 10.6."""
        return _joined(self.dicomweb, self.search_path)

    @property
    def retrieve_url(self) -> str:
        """Base URL of retrievals, PS3.18 10.4."""
        return _joined(self.dicomweb, self.retrieve_path)


def _joined(base: str, path: str | None) -> str:
    return base if path is None else f"{base}/{path}"


def _is_private(url: str) -> bool:
    """Whether nobody on the way reads what is sent to a URL."""
    parts = urlsplit(url)
    return parts.scheme == "https" or is_loopback(parts.hostname or "")
