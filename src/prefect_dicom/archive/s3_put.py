"""PutObject and UploadPart with a known hash, at about half of boto3's CPU time.

The SHA-256 taken when the bytes arrived is signed as ``x-amz-content-sha256`` (AWS Signature
Version 4), over HTTPS too, where boto3 would leave it out. A service that checks signatures
thereby checks the bytes, also where it ignores the newer checksum headers. The file is sent
from the disk and read once.

Credentials, the signature, the connection pool, proxies and TLS are botocore's.
"""

from __future__ import annotations

import base64
import hashlib
import re
import socket
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import parse_qs, quote, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSPreparedRequest, AWSRequest, HeadersDict
from botocore.credentials import Credentials
from botocore.exceptions import ClientError, NoCredentialsError
from botocore.httpsession import URLLib3Session
from botocore.utils import get_environ_proxies

from prefect_dicom.archive.s3_dialect import RequestForm
from prefect_dicom.archive.s3_errors import S3Error, S3RequestError
from prefect_dicom.archive.source import Source
from prefect_dicom.core.proxies import is_loopback

_ERROR_CODE = re.compile(rb"<Code>\s*([^<]*?)\s*</Code>")
_STAND_IN = "x"
_EXPECTATION_FAILED = 417
"""Of services, and proxies before them, that do not know ``Expect``."""


class _KnownPayload(S3SigV4Auth):  # type: ignore[misc]  # botocore has no types
    """Signs a given hash instead of reading the body for it."""

    def payload(self, request: AWSRequest) -> str:
        return request.context["sha256"]  # type: ignore[no-any-return]  # see the class


class SignedPut:
    """PUTs under one prefix of one bucket.

    Parameters
    ----------
    client : botocore client
        Made with ``signature_version="s3v4"``. Says where objects of the bucket lie (path or
        virtual host, region), by its public ``generate_presigned_url``.
    credentials : Credentials or None
        Credentials of the session; botocore refreshes those that expire.
    ca_bundle : str or None
        File with the certificates to trust; None for botocore's own.
    timeouts : tuple of float
        Time-outs in seconds: to connect, and between two packets.
    connections : int
        Size of the connection pool.

    Attributes
    ----------
    base_url : str
        URL to which a key is appended.
    region : str
        Region of the signature.
    """

    def __init__(
        self,
        client: Any,
        credentials: Credentials | None,
        bucket: str,
        prefix: str,
        *,
        ca_bundle: str | None,
        timeouts: tuple[float, float],
        connections: int,
    ) -> None:
        if credentials is None:
            raise NoCredentialsError
        self._credentials = credentials
        url = urlsplit(
            client.generate_presigned_url(
                "put_object", Params={"Bucket": bucket, "Key": prefix + _STAND_IN}
            )
        )
        scope = parse_qs(url.query)["X-Amz-Credential"][0].split("/")
        self.region, self._service = scope[-3], scope[-2]
        self.base_url = f"{url.scheme}://{url.netloc}{url.path.removesuffix(_STAND_IN)}"
        self._http = URLLib3Session(
            verify=ca_bundle or True,
            proxies=proxies_for(self.base_url),
            timeout=timeouts,
            max_pool_connections=connections,
            socket_options=[
                (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            ],
        )

    def send(
        self,
        key: str,
        source: Source,
        headers: Mapping[str, str],
        *,
        sha256: str,
        offset: int = 0,
        length: int | None = None,
        query: Mapping[str, str] | None = None,
        wait_for_answer: bool = False,
    ) -> Mapping[str, str]:
        """PUT ``length`` bytes of the source, whose SHA-256 (hex) is given, in one attempt.

        Parameters
        ----------
        headers : mapping
            Besides the signed hash and the length.
        query : mapping, optional
            ``partNumber`` and ``uploadId`` of a part.
        wait_for_answer : bool
            Let the service refuse before the body is sent (``Expect: 100-continue``).

        Returns
        -------
        mapping
            The headers of the answer.

        Raises
        ------
        ClientError
            The service refused, worded as by boto3.
        BotoCoreError
            Connecting, sending or reading the answer failed; the object may be there.
        """
        length = source.size_bytes if length is None else length
        url = self.base_url + key
        if query:
            url += "?" + "&".join(f"{k}={quote(query[k], safe='-_.~')}" for k in sorted(query))
        request = AWSRequest(
            "PUT",
            url,
            headers={
                "User-Agent": "prefect-dicom",
                "Content-Length": str(length),
                **headers,
            },
        )
        if wait_for_answer:
            request.headers["Expect"] = "100-continue"
        request.context["sha256"] = sha256
        credentials = self._credentials.get_frozen_credentials()
        _KnownPayload(credentials, self._service, self.region).add_auth(request)
        answer = self._http.send(
            AWSPreparedRequest(
                "PUT",
                url,
                HeadersDict(request.headers.items()),
                source.blocks(offset, length),
                False,
            )
        )
        if answer.status_code == _EXPECTATION_FAILED and wait_for_answer:
            return self.send(
                key, source, headers, sha256=sha256, offset=offset, length=length, query=query
            )
        if answer.status_code >= 300:
            found = _ERROR_CODE.search(answer.content)
            name = found[1].decode("ascii", "replace") if found else ""
            raise ClientError(
                {
                    "Error": {"Code": name},
                    "ResponseMetadata": {"HTTPStatusCode": answer.status_code},
                },
                "PutObject",
            )
        return cast(Mapping[str, str], answer.headers)

    def is_public(self, key: str) -> bool:
        """Whether a request without a signature gets the object."""
        answer = self._http.send(
            AWSPreparedRequest("GET", self.base_url + key, HeadersDict(), None, False)
        )
        return int(answer.status_code) == 200

    def close(self) -> None:
        """Close the pooled connections."""
        self._http.close()


def proxies_for(url: str) -> dict[str, str]:
    """Return the proxies of the environment; none for loopback, which no proxy can reach for us."""
    if is_loopback(urlsplit(url).hostname or ""):
        return {}
    return cast(dict[str, str], get_environ_proxies(url))


def content_headers(
    form: RequestForm, source: Source, sha256: str, offset: int = 0, length: int | None = None
) -> dict[str, str]:
    """Return the headers about the bytes that a form of a PUT has, beside the signed hash."""
    headers = {}
    if form.checksum:
        headers["x-amz-checksum-sha256"] = base64_digest(sha256)
    if form.md5:
        # Not for security: the signed hash is.
        md5 = hashlib.md5(usedforsecurity=False)
        for block in source.blocks(offset, source.size_bytes if length is None else length):
            md5.update(block)
        headers["Content-MD5"] = base64.b64encode(md5.digest()).decode()
    return headers


def check_echo(answer: Mapping[str, str], sha256: str) -> None:
    """Raise if the answer holds another checksum than that of the bytes sent."""
    echo = answer.get("x-amz-checksum-sha256")
    if echo is not None and echo != base64_digest(sha256):
        raise S3RequestError(S3Error("archive-checksum", "the service computed another SHA-256"))


def base64_digest(sha256: str) -> str:
    """Return a hexadecimal SHA-256 in Base64, as checksum headers have it."""
    return base64.b64encode(bytes.fromhex(sha256)).decode()
