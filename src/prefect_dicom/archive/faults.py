"""What an S3 service, or the way to it, says when it does not do what was asked.

Services word their errors differently; here each becomes one :class:`Fault`. Nothing of a
response but its status and its error code gets into a message: bodies and URLs hold keys, and
keys hold UIDs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    InvalidProxiesConfigError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)

from prefect_dicom.errors import ArchiveConflict, ArchiveError

_CODE = re.compile(r"[A-Za-z0-9_.]{1,64}")
_CHECKSUM = {
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
    "BadDigest",
    "ContentSHA256Mismatch",
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_CLOCK = {"RequestTimeTooSkewed", "RequestInTheFuture"}
_BUSY = {
    "SlowDown",
    "ServiceUnavailable",
    "InternalError",
    "RequestTimeout",
    "OperationAborted",
    "ConditionalRequestConflict",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "RequestLimitExceeded",
    "KMS.ThrottlingException",
}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity"}
_REGION = {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed"}
_SETTINGS = re.compile(r"KMS\..*|Invalid.*|NotImplemented|IllegalLocationConstraintException")


@dataclass(frozen=True, slots=True)
class Fault:
    """One failed request. ``code`` and ``detail`` are those of the ArchiveError it ends as."""

    code: str
    detail: str
    again: bool = False
    """The same request may succeed in a moment."""
    expired: bool = False
    """The credentials ran out; others may have been provided since."""
    exists: bool = False
    """The condition of a put did not hold: there is such an object."""
    absent: bool = False
    """There is no such object (or no such multipart upload)."""
    answered: bool = True
    """The service said so; False where its answer was lost and what it did is unknown."""


class Refused(Exception):
    """A request failed for good; carries the fault to whoever knows what was intended."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(fault.code)

    def error(self) -> ArchiveError:
        """The error a caller of the archive gets."""
        if self.fault.exists:
            return ArchiveConflict(detail=self.fault.detail)
        return ArchiveError(self.fault.code, self.fault.detail)


def fault_of(error: BotoCoreError | HTTPClientError | ClientError) -> Fault:
    """What the error of a request means."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return _fault_of_answer(status, str(error.response.get("Error", {}).get("Code", "")))
    cause = getattr(error, "kwargs", {}).get("error")
    if isinstance(cause, ArchiveError):
        # The body could not be read on while it was sent.
        return Fault(cause.code, cause.detail)
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return Fault("archive-refused", "no credentials were found")
    if isinstance(error, CredentialRetrievalError):
        return Fault("archive-unavailable", "credentials could not be refreshed", again=True)
    if isinstance(error, ProfileNotFound):
        return Fault("archive-refused", "the profile is not in the AWS configuration files")
    if isinstance(error, InvalidProxiesConfigError):
        return Fault("archive-refused", "the configuration of the proxy cannot be used")
    if isinstance(error, SSLError):
        return Fault("archive-refused", "TLS with the service failed; check its certificate")
    if isinstance(error, (ConnectionError, HTTPClientError, IncompleteReadError)):
        name = type(error).__name__
        return Fault("archive-unavailable", f"no answer ({name})", again=True, answered=False)
    return Fault("unexpected", f"the S3 client failed ({type(error).__name__})")


def _fault_of_answer(status: int, name: str) -> Fault:
    if not _CODE.fullmatch(name):
        name = ""
    said = f"HTTP {status} {name}".strip()
    if status == 412 or name == "PreconditionFailed":
        return Fault("archive-conflict", said, exists=True)
    if name == "NoSuchBucket":
        return Fault("archive-missing", said)
    if status == 404:
        return Fault("archive-object-missing", said, absent=True)
    if name in _CHECKSUM:
        return Fault("archive-checksum", said)
    if name in _EXPIRED:
        return Fault("archive-refused", said, again=True, expired=True)
    if name in _CLOCK:
        return Fault("archive-refused", f"{said}: the clocks of this host and the service differ")
    if name in _FULL or status == 507:
        return Fault("archive-full", said)
    if status in (301, 302, 307, 308) or name in _REGION:
        return Fault("archive-refused", f"{said}: the bucket is in another region or place")
    if name in _BUSY or status in (408, 429):
        return Fault("archive-unavailable", said, again=True)
    if status == 501 or status in (401, 403) or _SETTINGS.fullmatch(name):
        return Fault("archive-refused", said)
    if status >= 500:
        return Fault("archive-unavailable", said, again=True)
    return Fault("unexpected", said)
