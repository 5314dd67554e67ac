"""What an S3 service, or the way to it, says when it does not do what was asked.

Services word their errors differently; here each becomes one :class:`Fault`. Nothing of a
response but its status and its error code gets into a message: bodies and URLs hold keys, and
keys hold UIDs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from botocore.exceptions import ClientError

from prefect_dicom.core.errors import ArchiveConflict, ArchiveError

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
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",
    "EC2ThrottledException",
    "InternalError",
    "KMS.ThrottlingException",
    "LimitExceededException",
    "OperationAborted",
    "PriorRequestNotComplete",
    "ProvisionedThroughputExceededException",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "SlowDown",
    "ThrottledException",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "TooManyRequestsException",
    "TransactionInProgressException",
}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity"}
_REGION = {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed"}
_SETTINGS = re.compile(
    r"KMS\..*|Invalid.*|Encryption.*|AccessDenied|NotImplemented|IllegalLocationConstraintException"
)


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


_LOST = Fault("archive-unavailable", "no answer ({})", again=True, answered=False)
_NO_CREDENTIALS = Fault("archive-refused", "no credentials were found")
_SETUP = Fault("archive-refused", "the configuration of the AWS client cannot be used ({})")
_OURS = Fault("unexpected", "the S3 client failed ({})")

FAULTS: dict[str, Fault] = {
    "ConnectionError": _LOST,
    "HTTPClientError": _LOST,
    "IncompleteReadError": _LOST,
    "SSLError": Fault("archive-refused", "TLS with the service failed; check its certificate"),
    "CapacityNotAvailableError": Fault("archive-unavailable", "the client is throttled", True),
    "ResponseParserError": Fault("archive-unavailable", "the answer is not one of S3", True),
    "ChecksumError": Fault("archive-checksum", "the answer's checksum is wrong"),
    "FlexibleChecksumError": Fault("archive-checksum", "the answer's checksum is wrong"),
    # Credentials: none, or those who hand them out are away, or want a person.
    "NoCredentialsError": _NO_CREDENTIALS,
    "PartialCredentialsError": _NO_CREDENTIALS,
    "NoAuthTokenError": _NO_CREDENTIALS,
    "ProfileNotFound": Fault(
        "archive-refused", "the profile is not in the AWS configuration files"
    ),
    **dict.fromkeys(
        ("CredentialRetrievalError", "MetadataRetrievalError", "TokenRetrievalError"),
        Fault("archive-unavailable", "credentials could not be refreshed", again=True),
    ),
    **dict.fromkeys(
        ("LoginError", "RefreshWithMFAUnsupportedError", "SSOError"),
        Fault("archive-refused", "the credentials want a person to log in ({})"),
    ),
    # What stands in the AWS configuration files, the environment or the site file.
    "InvalidProxiesConfigError": Fault(
        "archive-refused", "the configuration of the proxy cannot be used"
    ),
    **dict.fromkeys(
        (
            "BaseEndpointResolverError",
            "ConfigNotFound",
            "ConfigParseError",
            "EndpointProviderError",
            "InvalidChecksumConfigError",
            "InvalidConfigError",
            "InvalidDNSNameError",
            "InvalidDefaultsMode",
            "InvalidEndpointConfigurationError",
            "InvalidEndpointDiscoveryConfigurationError",
            "InvalidHostLabelError",
            "InvalidIMDSEndpointError",
            "InvalidIMDSEndpointModeError",
            "InvalidRegionError",
            "InvalidRetryConfigurationError",
            "InvalidS3AddressingStyleError",
            "InvalidS3UsEast1RegionalEndpointConfigError",
            "InvalidSTSRegionalEndpointsConfigError",
            "MissingDependencyException",
            "ServiceNotInRegionError",
            "UnknownCredentialError",
            "UnknownRegionError",
            "UnknownSignatureVersionError",
            "UnknownTokenProviderError",
            "UnsupportedOutpostResourceError",
            "UnsupportedS3AccesspointConfigurationError",
            "UnsupportedS3ArnError",
            "UnsupportedS3ConfigurationError",
            "UnsupportedS3ControlArnError",
            "UnsupportedS3ControlConfigurationError",
            "UnsupportedSignatureVersionError",
        ),
        _SETUP,
    ),
    # Mistakes of this software, or an installation that does not fit together.
    **dict.fromkeys(
        (
            "ApiVersionNotFoundError",
            "AwsChunkedWrapperError",
            "DataNotFoundError",
            "InvalidExpressionError",
            "MD5UnavailableError",
            "MissingParametersError",
            "OperationNotPageableError",
            "PaginationError",
            "ParamValidationError",
            "StubResponseError",
            "UndefinedModelAttributeError",
            "UnknownClientMethodError",
            "UnknownServiceStyle",
            "UnseekableStreamError",
            "UnsupportedServiceProtocolsError",
            "ValidationError",
            "WaiterConfigError",
            "WaiterError",
        ),
        _OURS,
    ),
}
"""What each class of botocore's errors means, by name: a subclass means what its base does
unless it stands here itself. Names, because not every version of botocore has all of them."""


def fault_of(error: Exception) -> Fault:
    """What the error of a request means."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return _fault_of_answer(status, str(error.response.get("Error", {}).get("Code", "")))
    cause = getattr(error, "kwargs", {}).get("error")
    if isinstance(cause, ArchiveError):
        # The body could not be read on while it was sent.
        return Fault(cause.code, cause.detail)
    known = (FAULTS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in FAULTS)
    fault = next(known, _OURS)
    return replace(fault, detail=fault.detail.format(type(error).__name__))


def _fault_of_answer(status: int, name: str) -> Fault:
    # Of an answer without a body botocore calls the status its code.
    if not _CODE.fullmatch(name) or name == str(status):
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
