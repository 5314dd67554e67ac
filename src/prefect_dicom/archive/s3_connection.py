"""Connection to an S3 service: clients, credentials and the one retry policy.

boto3's own retries are off.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    HTTPClientError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from prefect_dicom.archive.s3_dialect import S3Dialect
from prefect_dicom.archive.s3_errors import S3Error, S3RequestError, classify_error
from prefect_dicom.archive.s3_put import SignedPut, proxies_for
from prefect_dicom.config.archive import S3Archive
from prefect_dicom.core.errors import Interrupted

logger = logging.getLogger(__name__)

S3_FAILURES = (BotoCoreError, HTTPClientError, ClientError, HTTPError, ResponseParserError)
"""Exceptions of boto3 and of the connections below it."""

_T = TypeVar("_T")

# Their DEBUG lines hold URLs and canonical requests, and those hold UIDs.
for _name in ("boto3", "botocore", "urllib3"):
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Retry policy of one request: exponential backoff with jitter.

    Attributes
    ----------
    attempts : int
        Attempts in all.
    first_pause_seconds, longest_pause_seconds : float
        Bounds of the pause after an attempt; it doubles from the one to the other.
    connect_seconds, read_seconds : float
        Time-outs; ``read_seconds`` between two packets, not for a whole object.
    """

    attempts: int = 5
    first_pause_seconds: float = 0.25
    longest_pause_seconds: float = 8
    connect_seconds: float = 10
    read_seconds: float = 60

    def pause(self, attempt: int) -> float:
        """Return the seconds to wait after an attempt (the first is 1)."""
        longest = min(self.first_pause_seconds * 2 ** (attempt - 1), self.longest_pause_seconds)
        return random.uniform(longest / 2, longest)


RETRY_POLICY = RetryPolicy()


class Contradiction(Exception):
    """The service answers that an object exists and that it does not."""


@dataclass(frozen=True, slots=True)
class S3Clients:
    """Clients of the service with one set of credentials."""

    client: Any
    put: SignedPut


class S3Connection:
    """Clients of one bucket, and calls with retries.

    Parameters
    ----------
    settings : S3Archive
        Bucket, prefix, endpoint and credentials.
    retries : RetryPolicy
        Attempts, pauses and time-outs of one request.
    sleep : callable
        Waits so many seconds between attempts; returns False where the run is to stop.

    Attributes
    ----------
    prefix : str
        Prefix of all keys, with its slash; empty for none.
    dialect : S3Dialect
        The forms of requests that the service takes.
    """

    def __init__(
        self, settings: S3Archive, retries: RetryPolicy, sleep: Callable[[float], bool]
    ) -> None:
        self.prefix = f"{settings.prefix.strip('/')}/" if settings.prefix.strip("/") else ""
        self.dialect = S3Dialect()
        self._settings = settings
        self._retries = retries
        self._sleep = sleep
        self._lock = threading.Lock()
        self._clients: S3Clients | None = None

    def call(self, call: Callable[[S3Clients], _T]) -> _T:
        """Send one request, with retries while they can help.

        Parameters
        ----------
        call : callable
            Sends the request with the clients it is given.

        Raises
        ------
        S3RequestError
            The request failed for good.
        Interrupted
            The run is to stop.
        """
        attempt = 0
        clients: S3Clients | None = None
        while True:
            attempt += 1
            try:
                clients = self.clients()
                return call(clients)
            except (*S3_FAILURES, Contradiction) as failure:
                error = self._explain(failure)
            if not error.retryable or attempt >= self._retries.attempts:
                raise S3RequestError(error)
            if error.expired and clients is not None:
                self._drop(clients)
            if not self._sleep(self._retries.pause(attempt)):
                raise Interrupted()

    def _explain(self, failure: Exception) -> S3Error:
        """Classify a failure; name the setting where it can be the cause."""
        error = classify(failure)
        if isinstance(failure, EndpointConnectionError) and self._settings.addressing == "virtual":
            words = f"{error.detail}: with `archive.addressing: virtual` BUCKET.HOST has to resolve"
            return replace(error, detail=words)
        return error

    def abort_upload(self, name: str, upload: str) -> None:
        """Abort a multipart upload, in one attempt; a failure is logged.

        Parameters
        ----------
        name : str
            Key with the prefix.
        upload : str
            UploadId.
        """
        clients = self._clients
        try:
            if clients is not None:
                clients.client.abort_multipart_upload(
                    Bucket=self._settings.bucket, Key=name, UploadId=upload
                )
        except S3_FAILURES as failure:
            error = classify(failure)
            if not error.absent:
                logger.warning(
                    "A multipart upload could not be aborted (%s); a lifecycle rule of the "
                    "bucket should remove incomplete uploads.",
                    error.detail,
                )

    def close(self) -> None:
        """Close the pooled connections; the next call opens others."""
        with self._lock:
            clients, self._clients = self._clients, None
        if clients is not None:
            clients.put.close()
            clients.client.close()

    def clients(self) -> S3Clients:
        """Return the clients with the present credentials."""
        with self._lock:
            if self._clients is None:
                self._clients = self._connect()
            return self._clients

    def _drop(self, clients: S3Clients) -> None:
        """Drop clients with expired credentials; other threads may still use them."""
        with self._lock:
            if self._clients is clients:
                self._clients = None

    def _connect(self) -> S3Clients:
        settings, retries = self._settings, self._retries
        core = botocore.session.Session(profile=settings.profile)
        if settings.access_key_id and settings.secret_access_key:
            token = settings.session_token
            core.set_credentials(
                settings.access_key_id.get_secret_value(),
                settings.secret_access_key.get_secret_value(),
                token.get_secret_value() if token else None,
            )
        session = boto3.Session(botocore_session=core, region_name=settings.region)
        # Services other than AWS take any region, but a signature needs one.
        region = session.region_name or ("us-east-1" if settings.endpoint else None)
        client = session.client(
            "s3",
            endpoint_url=settings.endpoint,
            region_name=region,
            config=Config(
                signature_version="s3v4",
                s3={
                    # Not "auto": botocore then writes URLs of the one global endpoint, which
                    # redirects. Names that cannot be virtual hosts become paths all the same.
                    "addressing_style": settings.addressing
                    or ("path" if settings.endpoint else "virtual"),
                    "payload_signing_enabled": True,
                },
                max_pool_connections=settings.connections,
                proxies=proxies_for(settings.endpoint) if settings.endpoint else None,
                retries={"total_max_attempts": 1},
                connect_timeout=retries.connect_seconds,
                read_timeout=retries.read_seconds,
                tcp_keepalive=True,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        client.meta.events.register("before-call.s3.CompleteMultipartUpload", _add_md5)
        put = SignedPut(
            client,
            session.get_credentials(),
            settings.bucket,
            self.prefix,
            ca_bundle=core.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE"),
            timeouts=(retries.connect_seconds, retries.read_seconds),
            connections=settings.connections,
        )
        return S3Clients(client, put)


def classify(failure: Exception) -> S3Error:
    """Return what the failure of a request means."""
    if isinstance(failure, Contradiction):
        return S3Error("archive-unavailable", "an object is there and is not shown", retryable=True)
    if isinstance(failure, HTTPError):
        return S3Error(
            "archive-unavailable", "the answer broke off", retryable=True, answered=False
        )
    return classify_error(failure)


def _add_md5(params: dict[str, Any], **_: object) -> None:
    """Add ``Content-MD5`` to a request with a body: some services want it of every one.

    Not for security: the signed hash is.
    """
    md5 = hashlib.md5(params["body"], usedforsecurity=False)
    params["headers"]["Content-MD5"] = base64.b64encode(md5.digest()).decode()
