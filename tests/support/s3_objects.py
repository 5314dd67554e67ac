"""What the S3 of the tests holds, has seen, and is scripted to do."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from tests.support.s3_handler import Handler


@dataclass(frozen=True)
class StoredObject:
    """One object as the server holds it. ``path`` is None where the bytes are in memory."""

    size_bytes: int
    md5: str
    sha256: str
    etag: str
    data: bytes | None = None
    path: Path | None = None
    checksum: str | None = None
    """``x-amz-checksum-sha256`` as HEAD returns it."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Content type and ``x-amz-meta-``, encryption and storage class headers."""
    version_id: str | None = None

    def open(self) -> BinaryIO:
        """The bytes as a file."""
        return io.BytesIO(self.data or b"") if self.path is None else self.path.open("rb")


@dataclass(frozen=True)
class SeenRequest:
    """One request as it came, before anything was done about it."""

    operation: str
    key: str
    headers: Mapping[str, str]
    """Names in lower case."""


@dataclass
class Upload:
    key: str
    metadata: Mapping[str, str]
    algorithm: str | None = None
    """Checksum algorithm that it was created with."""
    parts: dict[int, StoredObject] = field(default_factory=dict)


@dataclass(frozen=True)
class HeaderRule:
    """What a service makes of one header, or of one XML element of a request."""

    name: str
    """A header in lower case, or an element as it is written."""
    operation: str
    status: int
    code: str
    wanted: bool
    """Whether requests without it are refused, instead of those with it."""

    def refuses(self, operation: str, headers: Mapping[str, str], body: str) -> bool:
        """Whether a request is refused by this rule."""
        there = self.name in headers or f"<{self.name}>" in body
        return self.operation in (operation, "*") and there is not self.wanted


@dataclass
class Script:
    """What to do to the next requests of one operation."""

    operation: str
    skip: int
    times: int | None
    committed: bool
    act: Callable[[Handler], None]
    goes_on: bool = False
    """Whether the request is served after this as if nothing were scripted."""


class Refusal(Exception):
    def __init__(self, status: int, code: str) -> None:
        self.status = status
        self.code = code
        super().__init__(code)


def base64_of(sha256: str) -> str:
    return base64.b64encode(bytes.fromhex(sha256)).decode()
