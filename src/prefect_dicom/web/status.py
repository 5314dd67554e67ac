"""HTTP statuses as reason codes, RFC 9110 15 and PS3.18 8.5: one table for both services."""

from __future__ import annotations

from enum import StrEnum

NO_CONTENT = 204
REDIRECTIONS = frozenset({301, 302, 303, 307, 308})
UNAUTHORIZED = 401

LONGEST_RETRY_AFTER_SECONDS = 900.0
"""A Retry-After beyond is cut to this: a clock that is wrong must not end a run."""


class WebService(StrEnum):
    """Services of DICOMweb that this package requests."""

    SEARCH = "QIDO-RS"
    RETRIEVE = "WADO-RS"


_ANY = {
    400: "request-refused",
    401: "not-permitted",
    403: "not-permitted",
    # Whether the study is gone, or listed and not to be had, a second listing shows.
    404: "pacs-failure",
    405: "service-not-offered",
    406: "request-refused",
    407: "not-permitted",
    408: "pacs-busy",
    410: "pacs-failure",
    415: "request-refused",
    425: "pacs-busy",
    429: "pacs-busy",
    500: "pacs-failure",
    501: "service-not-offered",
    502: "pacs-busy",
    503: "pacs-busy",
    504: "pacs-busy",
    505: "protocol-not-supported",
}
_OF_SERVICE = {
    # A search that finds nothing is answered with 200 or 204: there is no such resource.
    (WebService.SEARCH, 404): "service-not-offered",
    (WebService.SEARCH, 413): "answers-capped",
    (WebService.RETRIEVE, 406): "transfer-syntax-not-offered",
}


def reason_for_http(service: WebService, status: int) -> str | None:
    """The reason code of a status, or None where the request succeeded.

    What succeeded is not whole for that: 200 and 206 are both judged by what came.

    Examples
    --------
    >>> reason_for_http(WebService.RETRIEVE, 404), reason_for_http(WebService.SEARCH, 206)
    ('pacs-failure', None)
    """
    if 200 <= status < 300:
        return None
    if code := _OF_SERVICE.get((service, status)) or _ANY.get(status):
        return code
    if 300 <= status < 400:
        return "service-not-offered"
    return "request-refused" if 400 <= status < 500 else "pacs-failure"
