"""Classification of S3 errors: answers of the service and failures of botocore.

Services word their errors differently; here each becomes one :class:`S3Error`. Only the status
and the error code of a response get into a message: bodies and URLs hold keys, and keys hold UIDs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from botocore.exceptions import ClientError, ProxyConnectionError

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
_ADDRESSING = re.compile(
    r"SecondLevelDomainForbidden|InvalidPathAccess|.*PathStyle.*|VirtualHost.*|.*VirtualHosted.*"
)
# Beside 412 of AWS: 304 by RFC 9110, 13.1.2, for other methods than PUT; 409 of services that
# have a name of their own for it.
_EXISTS = {"PreconditionFailed", "FileAlreadyExists", "ObjectAlreadyExists", "KeyAlreadyExists"}
_HEADER_STATUSES = {400, 405, 411, 415, 501}
# Of these the code says what was meant, and that no header is the cause that could be left out.
_NO_HEADER = re.compile(
    r"KMS\..*|Encryption.*|Entity.*|Key.*|Metadata.*|AccessDenied|Authorization.*|Illegal.*"
    r"|Invalid(StorageClass|AccessKeyId|BucketName|BucketState|ObjectState|Token|Security|Part.*"
    r"|Prefix|WriteOffset|Encryption.*)"
)
_SETTINGS = re.compile(
    r"KMS\..*|Invalid.*|Encryption.*|AccessDenied|NotImplemented|IllegalLocationConstraintException"
)


@dataclass(frozen=True, slots=True)
class S3Error:
    """A failed request. ``code`` and ``detail`` are those of the resulting ArchiveError."""

    code: str
    detail: str
    retryable: bool = False
    """The same request may succeed in a moment."""
    expired: bool = False
    """The credentials expired; others may have been provided since."""
    exists: bool = False
    """The condition of a put did not hold: the object exists."""
    absent: bool = False
    """The object (or the multipart upload) does not exist."""
    answered: bool = True
    """The service answered; False where its answer was lost and the effect is unknown."""
    may_be_a_header: bool = False
    """The service may have refused a header of the request, or the lack of one."""


class S3RequestError(Exception):
    """A request failed for good; the caller knows what was intended."""

    def __init__(self, error: S3Error) -> None:
        self.s3_error = error
        super().__init__(error.code)

    def archive_error(self) -> ArchiveError:
        """Return the error for a caller of the archive."""
        if self.s3_error.exists:
            return ArchiveConflict(detail=self.s3_error.detail)
        return ArchiveError(self.s3_error.code, self.s3_error.detail)


_PROXY = "the proxy of HTTP_PROXY or HTTPS_PROXY"
_TUNNEL = re.compile(r"Tunnel connection failed: (\d{3})")
_LOST = S3Error("archive-unavailable", "no answer ({})", retryable=True, answered=False)
_NO_CREDENTIALS = S3Error("archive-refused", "no credentials were found")
_SETUP = S3Error("archive-refused", "the configuration of the AWS client cannot be used ({})")
_OURS = S3Error("unexpected", "the S3 client failed ({})")

S3_ERRORS: dict[str, S3Error] = {
    "ConnectionError": _LOST,
    "HTTPClientError": _LOST,
    "IncompleteReadError": _LOST,
    "SSLError": S3Error("archive-refused", "TLS with the service failed; check its certificate"),
    "CapacityNotAvailableError": S3Error("archive-unavailable", "the client is throttled", True),
    "ResponseParserError": S3Error("archive-unavailable", "the answer is not one of S3", True),
    "ChecksumError": S3Error("archive-checksum", "the answer's checksum is wrong"),
    "FlexibleChecksumError": S3Error("archive-checksum", "the answer's checksum is wrong"),
    # Credentials: none, or those who hand them out are away, or want a person.
    "NoCredentialsError": _NO_CREDENTIALS,
    "PartialCredentialsError": _NO_CREDENTIALS,
    "NoAuthTokenError": _NO_CREDENTIALS,
    "ProfileNotFound": S3Error(
        "archive-refused", "the profile is not in the AWS configuration files"
    ),
    **dict.fromkeys(
        ("CredentialRetrievalError", "MetadataRetrievalError", "TokenRetrievalError"),
        S3Error("archive-unavailable", "credentials could not be refreshed", retryable=True),
    ),
    **dict.fromkeys(
        ("LoginError", "RefreshWithMFAUnsupportedError", "SSOError"),
        S3Error("archive-refused", "the credentials want a person to log in ({})"),
    ),
    # What stands in the AWS configuration files, the environment or the site file.
    "InvalidProxiesConfigError": S3Error(
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
"""S3 error by the name of botocore's exception class; a subclass not listed inherits from its base.
Names, because not every version of botocore has all of them."""


def classify_error(error: Exception) -> S3Error:
    """Return what the error of a request means."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return _classify_answer(status, str(error.response.get("Error", {}).get("Code", "")))
    cause = getattr(error, "kwargs", {}).get("error")
    if isinstance(cause, ArchiveError):
        # The body could not be read on while it was sent.
        return S3Error(cause.code, cause.detail)
    if isinstance(error, ProxyConnectionError):
        return _classify_proxy(str(cause))
    known = (S3_ERRORS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in S3_ERRORS)
    found = next(known, _OURS)
    return replace(found, detail=found.detail.format(type(error).__name__))


def _classify_proxy(text: str) -> S3Error:
    """Return what the failure of a proxy means; its text has the status of the tunnel, if any."""
    found = _TUNNEL.search(text)
    if found is None:
        return replace(_LOST, detail=f"{_PROXY} does not answer")
    status = int(found[1])
    if status == 407:
        return _classify_answer(status, "")
    if status >= 500:
        return S3Error("archive-unavailable", f"{_PROXY} answered {status}", retryable=True)
    return S3Error("archive-refused", f"{_PROXY} refused the way to the service with {status}")


def _classify_answer(status: int, name: str) -> S3Error:
    # Of an answer without a body botocore calls the status its code.
    if not _CODE.fullmatch(name) or name == str(status):
        name = ""
    said = f"HTTP {status} {name}".strip()
    if status in (304, 412) or name in _EXISTS:
        return S3Error("archive-conflict", said, exists=True)
    if name == "NoSuchBucket":
        return S3Error("archive-missing", said)
    if status == 404:
        return S3Error("archive-object-missing", said, absent=True)
    if name in _CHECKSUM:
        return S3Error("archive-checksum", said)
    if name in _EXPIRED:
        return S3Error("archive-refused", said, retryable=True, expired=True)
    if name in _CLOCK:
        return S3Error("archive-refused", f"{said}: the clocks of this host and the service differ")
    if status == 407:
        return S3Error("archive-refused", f"{said}: {_PROXY} wants a user name and a password")
    if _ADDRESSING.fullmatch(name):
        return S3Error(
            "archive-refused",
            f"{said}: the service wants the bucket in the host name; "
            "set `archive.addressing: virtual`",
        )
    if name in _FULL or status == 507:
        return S3Error("archive-full", said)
    if status in (301, 302, 307, 308) or name in _REGION:
        return S3Error("archive-refused", f"{said}: the bucket is in another region or place")
    if name in _BUSY or status in (408, 429):
        return S3Error("archive-unavailable", said, retryable=True)
    # What strips headers that were signed, on the way, makes the signature a wrong one.
    header = name == "SignatureDoesNotMatch" or (
        status in _HEADER_STATUSES and not _NO_HEADER.fullmatch(name)
    )
    if status == 501 or status in (401, 403) or _SETTINGS.fullmatch(name):
        return S3Error("archive-refused", said, may_be_a_header=header)
    if status >= 500:
        return S3Error("archive-unavailable", said, retryable=True)
    return S3Error("unexpected", said, may_be_a_header=header)
