"""Keyed replacement values: the same for the same input, project and secret, in any process.

Every value is HMAC-SHA256 of its purpose and the original, so that nobody without the secret can
compute a replacement, and no two projects have one in common.
"""

from __future__ import annotations

import base64
import hashlib
import hmac

from prefect_dicom.core.errors import ConfigurationError

KEY_BYTES = 32
_BITS_OF_BASE32 = 5
_UUID_VARIANT, _UUID_VERSION_8 = 0b10 << 62, 0x8 << 76


def parse_secret(text: str, source: str) -> bytes:
    """Secret of a project from its text: 64 hexadecimal digits.

    Raises
    ------
    ConfigurationError
        It is of another form. The text is not repeated.
    """
    try:
        secret = bytes.fromhex(text.strip())
    except ValueError:
        secret = b""
    if len(secret) != KEY_BYTES:
        raise ConfigurationError(
            source,
            [
                f"expected the key of a project as {2 * KEY_BYTES} hexadecimal digits, as "
                "`openssl rand -hex 32` makes them"
            ],
        )
    return secret


class ProjectKey:
    """Replacement values of one project.

    Parameters
    ----------
    project : str
        Name of the project. The same secret gives other values under another name.
    secret : bytes
        256 bits.
    """

    def __init__(self, project: str, secret: bytes) -> None:
        self.project = project
        self._hmac = hmac.new(
            hmac.new(secret, b"project\0" + project.encode(), hashlib.sha256).digest(),
            digestmod=hashlib.sha256,
        )
        self._uids: dict[bytes, bytes] = {}

    def __repr__(self) -> str:
        return f"ProjectKey({self.project!r}, {self.identifier})"

    @property
    def identifier(self) -> str:
        """Identifies the key without revealing it: 8 hexadecimal digits."""
        return self._digest("identifier", b"").hex()[:8]

    def _digest(self, purpose: str, value: bytes) -> bytes:
        mac = self._hmac.copy()
        mac.update(purpose.encode() + b"\0" + value)
        return mac.digest()

    def uid(self, value: bytes) -> bytes:
        """Replacement of a UID: a UUID of version 8 (RFC 9562) under 2.25 (PS3.5 B.2)."""
        known = self._uids.get(value)
        if known is None:
            number = int.from_bytes(self._digest("uid", value)[:16], "big")
            number &= ~(0xF << 76) & ~(0b11 << 62)
            known = f"2.25.{number | _UUID_VERSION_8 | _UUID_VARIANT}".encode()
            if len(self._uids) < 100_000:
                self._uids[value] = known
        return known

    def code(self, purpose: str, value: bytes, characters: int) -> str:
        """Replacement of an identifier: upper-case letters and digits, 5 bits each."""
        text = base64.b32encode(self._digest(purpose, value)).decode()
        return text[:characters]

    def days(self, patient: bytes, most: int = 3650) -> int:
        """By how many days a patient's dates go back: 1 to ``most``."""
        return 1 + int.from_bytes(self._digest("days", patient)[:8], "big") % most
