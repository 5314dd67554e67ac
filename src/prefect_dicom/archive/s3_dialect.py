"""What a service takes of the headers that an archive can do without, found out by trying.

Half of the services that speak S3 know neither the checksum headers of AWS nor conditions on
every request, and some want ``Content-MD5`` as well. A request that is refused in a way that a
header can explain is sent in its other forms. The first form that is taken is that of all later
requests of the same operation. The signed hash of the payload and ``If-None-Match`` of a put are
in all forms: what the archive promises rests on them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from prefect_dicom.archive.s3_errors import S3Error, S3RequestError

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Operation(StrEnum):
    """Requests that have several forms."""

    PUT = "PutObject"
    CREATE = "CreateMultipartUpload"
    PART = "UploadPart"
    COMPLETE = "CompleteMultipartUpload"
    HEAD = "HeadObject"


@dataclass(frozen=True, slots=True)
class RequestForm:
    """Which of the headers that can be left out a request has.

    Attributes
    ----------
    checksum : bool
        The checksum header of the operation, or the checksums in the body of a completion.
    md5 : bool
        ``Content-MD5``, which costs another reading of the bytes.
    condition : bool
        ``If-None-Match`` of a completion.
    """

    checksum: bool = True
    md5: bool = False
    condition: bool = True

    def difference(self, operation: Operation) -> str:
        """Say what differs from a request as AWS takes it; empty if nothing does."""
        words = []
        if not self.checksum:
            words.append(f"refuses {CHECKSUM_HEADERS[operation]}")
        if self.md5:
            words.append("wants Content-MD5")
        if not self.condition:
            words.append("refuses If-None-Match")
        return " and ".join(words)


CHECKSUM_HEADERS = {
    Operation.PUT: "x-amz-checksum-sha256",
    Operation.CREATE: "x-amz-checksum-algorithm",
    Operation.PART: "x-amz-checksum-sha256",
    Operation.COMPLETE: "ChecksumSHA256",
    Operation.HEAD: "x-amz-checksum-mode",
}
"""The checksum header, or the element of the body, of each operation."""

_UPLOADS = tuple(RequestForm(checksum, md5) for md5 in (False, True) for checksum in (True, False))
_WITH_OR_WITHOUT = (RequestForm(), RequestForm(checksum=False))
FORMS: dict[Operation, tuple[RequestForm, ...]] = {
    Operation.PUT: _UPLOADS,
    Operation.CREATE: _WITH_OR_WITHOUT,
    Operation.PART: _UPLOADS,
    Operation.COMPLETE: tuple(
        RequestForm(checksum, condition=condition)
        for condition in (True, False)
        for checksum in (True, False)
    ),
    Operation.HEAD: _WITH_OR_WITHOUT,
}
"""The forms of each operation, in the order in which they are tried."""


def _tried(operation: Operation, first: S3RequestError) -> S3Error:
    """The refusal of the first form, with what was left out and added in vain."""
    forms = FORMS[operation]
    words = []
    if any(not form.checksum for form in forms):
        words.append(f"without {CHECKSUM_HEADERS[operation]}")
    if any(form.md5 for form in forms):
        words.append("with Content-MD5")
    if any(not form.condition for form in forms):
        words.append("without If-None-Match")
    error = first.s3_error
    return replace(error, detail=f"{error.detail}, also {' and '.join(words)}")


class S3Dialect:
    """The forms of requests that one service takes. Thread-safe."""

    def __init__(self) -> None:
        self._known: dict[Operation, RequestForm] = {}

    def send(self, operation: Operation, request: Callable[[RequestForm], _T]) -> _T:
        """Send a request in the form that is known, or in one form after the other.

        Parameters
        ----------
        request : callable
            Sends the request in the form that it is given.

        Raises
        ------
        S3RequestError
            The request failed, in its first form where none was taken.
        """
        if (form := self._known.get(operation)) is not None:
            return request(form)
        first: S3RequestError | None = None
        for form in FORMS[operation]:
            try:
                answer = request(form)
            except S3RequestError as refused:
                if not refused.s3_error.may_be_a_header:
                    # An answer to what was asked: this form is understood.
                    if refused.s3_error.exists:
                        self._learn(operation, form)
                    raise
                first = first or refused
            else:
                self._learn(operation, form)
                return answer
        assert first is not None, "each operation has a form"
        raise S3RequestError(_tried(operation, first)) from first.__cause__

    def form(self, operation: Operation) -> RequestForm:
        """Return the form that is known, or else the first one."""
        return self._known.get(operation) or FORMS[operation][0]

    def differences(self) -> list[str]:
        """Say what the service takes differently from AWS, as far as it is known."""
        found = ((operation, self.form(operation).difference(operation)) for operation in FORMS)
        return [f"{operation} {words}" for operation, words in found if words]

    def _learn(self, operation: Operation, form: RequestForm) -> None:
        self._known[operation] = form
        if words := form.difference(operation):
            log.warning(
                "The archive's service %s (%s); the signed hash of the bytes still guards them.",
                words,
                operation,
            )
