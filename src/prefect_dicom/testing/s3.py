"""A small S3 of our own for tests: strict where an archive relies on it, and scriptable.

It verifies Signature V4 (written from AWS's description of it, without botocore), the signed
payload hash, ``x-amz-checksum-sha256``, ``Content-MD5``, ``If-None-Match`` on PutObject and
CompleteMultipartUpload, and the least size of a part. Faults are scripted per operation::

    with S3Server() as s3:
        s3.fail("PutObject", times=2, status=503, code="SlowDown")
        s3.reset("PutObject", committed=True)       # stored, and the answer is lost
        ...
        assert s3.requests["PutObject"] == 4

What a service, or the way to it, does, and how it is scripted:

============================================  ====================================================
overloaded, broken, throttling                ``fail`` with 503 SlowDown, 500, 502, 429
connection reset before it stored the object  ``reset``, or within the body ``reset(after_bytes=)``
... after it stored the object                ``reset(committed=True)``
silent                                        ``stall``, before or after it stored the object
an answer that breaks off                     ``truncate``
other bytes stored than were sent             ``damage``
another checksum, no ETag                     ``alter``
something is there already                    ``put`` under its key before
credentials that end                          ``expire``; ``add_user`` lets others in
a clock that differs                          ``clock_offset_seconds``
an object that is not shown yet               ``fail("HeadObject", status=404)``
an error in an answer that says 200           ``fail(status=200)``
not an S3 service at all                      ``reply``
a part, a completion, an abort that fails     ``fail("UploadPart")``, ...
the bucket is gone, and back                  ``remove_bucket``, ``make_bucket``
any of these in the middle of a run           ``meanwhile``, or ``skip=`` of the others
versions                                      ``versioned=True``
no permission, no use of the KMS key          ``fail`` with 403 AccessDenied, 400 KMS.*
conditions or checksums are ignored           ``ignore_conditions=True``, ``ignore_checksums=True``
============================================  ====================================================

It is no store for anything but tests: one process, no permissions, nothing survives it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import itertools
import re
import secrets
import shutil
import socket
import ssl
import struct
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

_BLOCK = 256 * 1024
_SKEW_SECONDS = 900
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/,]+)/(\d{8})/([^/,]+)/([^/,]+)/aws4_request, ?"
    r"SignedHeaders=([^,]+), ?Signature=([0-9a-f]{64})"
)
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


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
class _Upload:
    key: str
    metadata: Mapping[str, str]
    parts: dict[int, StoredObject] = field(default_factory=dict)


@dataclass
class _Script:
    """What to do to the next requests of one operation."""

    operation: str
    skip: int
    times: int | None
    committed: bool
    act: Callable[[_Handler], None]
    goes_on: bool = False
    """Whether the request is served after this as if nothing were scripted."""


class _Refusal(Exception):
    def __init__(self, status: int, code: str) -> None:
        self.status = status
        self.code = code
        super().__init__(code)


class S3Server:
    """An S3 service on a free port of loopback, running while used as a context.

    Parameters
    ----------
    bucket : str
        The only bucket.
    directory : Path, optional
        Keep objects in files here instead of in memory.
    ignore_conditions, ignore_completion_condition : bool
        Behave as services do that let ``If-None-Match`` pass, everywhere or on
        CompleteMultipartUpload only.
    ignore_payload_hash, ignore_part_hash, ignore_checksums : bool
        The same with the signed hash, everywhere or of parts only, and with checksum headers
        (which HEAD then does not return either).
    versioned : bool
        Give version ids.
    public : bool
        Let everybody read.
    least_part_bytes : int
        Parts but the last must have this size.
    tls : ssl.SSLContext, optional
        Serve HTTPS, as ``localhost``.

    Attributes
    ----------
    endpoint : str
        URL of the service.
    access_key, secret_key : str
        Of the user that exists from the start.
    requests : Counter
        Requests by operation, failed ones included.
    seen : list of SeenRequest
        All requests in order.
    objects : dict of str to StoredObject
        What is stored, by key; tests may look and tamper.
    uploads : dict
        Multipart uploads that were neither completed nor aborted.
    clock_offset_seconds : float
        How far the server's clock is ahead of this host's; beyond 15 minutes no signature counts.
    """

    def __init__(
        self,
        bucket: str = "archive",
        *,
        directory: Path | None = None,
        ignore_conditions: bool = False,
        ignore_completion_condition: bool = False,
        ignore_payload_hash: bool = False,
        ignore_part_hash: bool = False,
        ignore_checksums: bool = False,
        versioned: bool = False,
        public: bool = False,
        least_part_bytes: int = 5 * 1024**2,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.bucket = bucket
        self.access_key = "archivist"
        self.secret_key = secrets.token_urlsafe(24)
        self.requests: Counter[str] = Counter()
        self.seen: list[SeenRequest] = []
        self.objects: dict[str, StoredObject] = {}
        self.uploads: dict[str, _Upload] = {}
        self.ignore_conditions = ignore_conditions
        self.ignore_completion_condition = ignore_completion_condition
        self.ignore_payload_hash = ignore_payload_hash
        self.ignore_part_hash = ignore_part_hash
        self.ignore_checksums = ignore_checksums
        self.versioned = versioned
        self.public = public
        self.least_part_bytes = least_part_bytes
        self.tls = tls
        self.clock_offset_seconds = 0.0
        self.lock = threading.RLock()
        self.released = threading.Event()
        self._directory = directory
        self._users: dict[str, tuple[str, str | None]] = {self.access_key: (self.secret_key, None)}
        self._expired: set[str] = set()
        self._scripts: list[_Script] = []
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.s3 = self
        where = "https://localhost" if self.tls else "http://127.0.0.1"
        self.endpoint = f"{where}:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="s3-for-tests", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.cut_all()
        self._server.server_close()
        self._thread.join()

    # ------------------------------------------------------------------ script

    def fail(
        self,
        operation: str,
        *,
        status: int = 503,
        code: str = "SlowDown",
        times: int | None = 1,
        skip: int = 0,
        committed: bool = False,
    ) -> None:
        """Answer with an error.

        Parameters
        ----------
        operation : str
            ``PutObject``, ``UploadPart``, ``CompleteMultipartUpload``, ...; or ``*``.
        status, code : int, str
            HTTP status and the ``Code`` of the error document. A status of 200 makes it an
            answer that says 200 and holds an error.
        times : int or None
            How many requests; None for all from now on.
        skip : int
            How many to let pass before, of those that no earlier script answers.
        committed : bool
            Do what was asked, and then answer so.
        """
        self._script(operation, times, skip, committed, lambda handler: handler.error(status, code))

    def reset(
        self,
        operation: str,
        *,
        times: int | None = 1,
        skip: int = 0,
        committed: bool = False,
        after_bytes: int = 0,
    ) -> None:
        """Cut the connection: when so much of the body was read, or instead of the answer.

        The latter with ``committed``: what was asked for was done.
        """
        self._script(operation, times, skip, committed, lambda handler: handler.cut(after_bytes))

    def stall(
        self, operation: str, *, times: int | None = 1, skip: int = 0, committed: bool = False
    ) -> None:
        """Say nothing more, until the client goes or ``released`` is set."""
        self._script(operation, times, skip, committed, lambda handler: handler.stall())

    def truncate(self, operation: str = "GetObject", *, times: int | None = 1) -> None:
        """Cut the connection in the middle of the answer's body."""
        self._script(operation, times, 0, True, lambda handler: handler.send_half())

    def alter(
        self,
        operation: str,
        *,
        headers: Mapping[str, str] | None = None,
        without: tuple[str, ...] = (),
        times: int | None = 1,
    ) -> None:
        """Do what was asked and answer with other headers, or without some."""

        def act(handler: _Handler) -> None:
            for name in without:
                handler.answer_headers.pop(name, None)
            handler.answer_headers.update(headers or {})
            handler.send_answer()

        self._script(operation, times, 0, True, act)

    def reply(
        self, operation: str, body: bytes, *, status: int = 200, times: int | None = 1
    ) -> None:
        """Answer as something that is no S3 service: a proxy, a login page."""
        self._script(operation, times, 0, False, lambda handler: handler.reply(status, body))

    def damage(self, operation: str = "PutObject", *, times: int | None = 1) -> None:
        """Store the object with a byte changed, and answer with the checksum of that."""
        self._script(operation, times, 0, True, lambda handler: handler.damage())

    def meanwhile(self, operation: str, do: Callable[[], object], *, skip: int = 0) -> None:
        """Call a function when a request has come, and then serve it: a fault in mid-run."""
        self._script(operation, 1, skip, False, lambda handler: do(), goes_on=True)

    def behave(self) -> None:
        """Forget what is scripted and was not done yet."""
        with self.lock:
            self._scripts.clear()

    def put(self, key: str, data: bytes, metadata: Mapping[str, str] | None = None) -> None:
        """Store an object as somebody else would."""
        sha256, md5 = hashlib.sha256(data), hashlib.md5(data, usedforsecurity=False).hexdigest()
        self.objects[key] = StoredObject(
            len(data),
            md5,
            sha256.hexdigest(),
            f'"{md5}"',
            data,
            checksum=None if self.ignore_checksums else _base64(sha256.hexdigest()),
            metadata=metadata or {},
        )

    def add_user(self, access_key: str, secret_key: str, session_token: str | None = None) -> None:
        """Let somebody else in, or again."""
        self._users[access_key] = (secret_key, session_token)
        self._expired.discard(access_key)

    def expire(self, access_key: str) -> None:
        """From now on this user's requests are answered with ExpiredToken."""
        self._expired.add(access_key)

    def remove_bucket(self) -> None:
        """The bucket is gone, with all it held."""
        with self.lock:
            self.bucket = ""
            self.objects.clear()

    def make_bucket(self, bucket: str) -> None:
        """There is a bucket again, of this name, and empty."""
        with self.lock:
            self.bucket = bucket

    def body(self, key: str) -> bytes:
        """The bytes under a key."""
        with self.objects[key].open() as file:
            return file.read()

    def _script(
        self,
        operation: str,
        times: int | None,
        skip: int,
        committed: bool,
        act: Callable[[_Handler], None],
        goes_on: bool = False,
    ) -> None:
        with self.lock:
            self._scripts.append(_Script(operation, skip, times, committed, act, goes_on))

    # ----------------------------------------------------- used by the handler

    def scripted(self, operation: str) -> _Script | None:
        """Count a request and return what is scripted for it."""
        with self.lock:
            self.requests[operation] += 1
            for script in self._scripts:
                if script.operation not in (operation, "*"):
                    continue
                if script.skip:
                    script.skip -= 1
                    continue
                if script.times is not None:
                    script.times -= 1
                    if script.times == 0:
                        self._scripts.remove(script)
                return script
        return None

    def secret_of(self, access_key: str, session_token: str | None) -> str:
        """The user's secret key, or the refusal of the user."""
        if access_key not in self._users:
            raise _Refusal(403, "InvalidAccessKeyId")
        secret, token = self._users[access_key]
        if access_key in self._expired:
            raise _Refusal(400, "ExpiredToken")
        if token is not None and token != session_token:
            raise _Refusal(403, "InvalidToken")
        return secret

    def next_number(self) -> int:
        """A number that was not given before."""
        return next(self._numbers)

    def new_file(self) -> BinaryIO:
        """Where the body of a request is written to."""
        if self._directory is None:
            return io.BytesIO()
        return tempfile.NamedTemporaryFile(dir=self._directory, suffix=".object", delete=False)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    s3: S3Server

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self._open: set[socket.socket] = set()

    def get_request(self):
        connection, address = super().get_request()
        if self.s3.tls is not None:
            # The handshake is made with the first read, off the thread that accepts.
            connection = self.s3.tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address

    def process_request(self, request, client_address) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no error of the server."""

    def cut_all(self) -> None:
        for connection in list(self._open):
            _cut(connection)


def _cut(connection: socket.socket) -> None:
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 64 * 1024
    server: _Server

    # ---------------------------------------------------------------- requests

    def do_PUT(self) -> None:
        self._serve()

    do_GET = do_HEAD = do_DELETE = do_POST = do_PUT

    def log_message(self, *_: object) -> None:
        """Quiet: paths hold UIDs."""

    def _serve(self) -> None:
        self._s3 = self.server.s3
        self._url = urlsplit(self.path)
        self._query = dict(parse_qsl(self._url.query, keep_blank_values=True))
        self._bucket, _, self._key = unquote(self._url.path).lstrip("/").partition("/")
        self._low = {name.lower(): value for name, value in self.headers.items()}
        self._left = int(self._low.get("content-length", 0))
        self._body: StoredObject | None = None
        self.answer_status, self.answer_headers = 200, {}
        self.answer_body: bytes | StoredObject = b""
        operation = self._operation()
        with self._s3.lock:
            self._s3.seen.append(SeenRequest(operation, self._key, self._low))
        script = self._s3.scripted(operation)
        if script is not None and not script.committed:
            script.act(self)
            if not script.goes_on:
                return
            script = None
        try:
            self._authorize(operation)
            self._receive()
            if self._bucket != self._s3.bucket:
                raise _Refusal(404, "NoSuchBucket")
            getattr(self, f"_{operation}", self._unknown)()
        except _Refusal as refusal:
            self.error(refusal.status, refusal.code)
            return
        if script is not None:
            script.act(self)
        else:
            self.send_answer()

    def _operation(self) -> str:
        query, method = self._query, self.command
        if not self._key:
            return {"GET": "ListObjectsV2", "HEAD": "HeadBucket"}.get(method, "Unknown")
        if method == "POST":
            return "CreateMultipartUpload" if "uploads" in query else "CompleteMultipartUpload"
        if "uploadId" in query:
            return {"PUT": "UploadPart", "DELETE": "AbortMultipartUpload"}.get(method, "Unknown")
        return f"{method.title()}Object"

    def _unknown(self) -> None:
        raise _Refusal(501, "NotImplemented")

    def handle_expect_100(self) -> bool:
        """Ask for the body at once; the answer is buffered, so flush it."""
        super().handle_expect_100()
        self.wfile.flush()
        return True

    # --------------------------------------------------------------- integrity

    def _authorize(self, operation: str) -> None:
        """Signature V4 in the Authorization header; nothing else lets anybody in."""
        if "authorization" not in self._low:
            if self._s3.public and operation in ("GetObject", "HeadObject"):
                return
            raise _Refusal(403, "AccessDenied")
        found = _AUTHORIZATION.fullmatch(self._low["authorization"])
        if found is None:
            raise _Refusal(400, "AuthorizationHeaderMalformed")
        access_key, day, region, service, names, signature = found.groups()
        secret = self._s3.secret_of(access_key, self._low.get("x-amz-security-token"))
        stamp = self._low.get("x-amz-date", "")
        try:
            then = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        except ValueError:
            raise _Refusal(403, "AccessDenied") from None
        behind = (datetime.now(UTC) - then).total_seconds() + self._s3.clock_offset_seconds
        if abs(behind) > _SKEW_SECONDS:
            raise _Refusal(403, "RequestTimeTooSkewed")
        if any(
            name not in names.split(";")
            for name in self._low
            if name == "host" or name.startswith("x-amz-")
        ):
            raise _Refusal(403, "AccessDenied")
        pairs = sorted(tuple(f"{p}=".split("=")[:2]) for p in self._url.query.split("&") if p)
        canonical = "\n".join(
            (
                self.command,
                self._url.path,
                "&".join(f"{name}={value}" for name, value in pairs),
                *(
                    f"{name}:{' '.join(self._low.get(name, '').split())}"
                    for name in names.split(";")
                ),
                "",
                names,
                self._low.get("x-amz-content-sha256", ""),
            )
        )
        scope = f"{day}/{region}/{service}/aws4_request"
        told = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{told}"
        key = f"AWS4{secret}".encode()
        for step in (day, region, service, "aws4_request", text):
            key = hmac.digest(key, step.encode(), "sha256")
        if not hmac.compare_digest(key.hex(), signature):
            raise _Refusal(403, "SignatureDoesNotMatch")

    def _receive(self) -> None:
        """Read the body, and compare it with everything that was said of it."""
        md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
        size = 0
        with self._s3.new_file() as file:
            while self._left:
                block = self.rfile.read(min(self._left, _BLOCK))
                if not block:
                    raise ConnectionResetError
                self._left -= len(block)
                size += len(block)
                md5.update(block)
                sha256.update(block)
                file.write(block)
            in_memory = isinstance(file, io.BytesIO)
            data = file.getvalue() if in_memory else None
            path = None if in_memory else Path(file.name)
        self._body = StoredObject(
            size, md5.hexdigest(), sha256.hexdigest(), f'"{md5.hexdigest()}"', data, path
        )
        said = self._low.get("x-amz-content-sha256", "UNSIGNED-PAYLOAD")
        if said.startswith("STREAMING-"):
            raise _Refusal(501, "NotImplemented")
        ignored = self._s3.ignore_payload_hash or (
            self._s3.ignore_part_hash and "partNumber" in self._query
        )
        if said not in ("UNSIGNED-PAYLOAD", sha256.hexdigest()) and not ignored:
            raise _Refusal(400, "XAmzContentSHA256Mismatch")
        for name, digest in (("content-md5", md5), ("x-amz-checksum-sha256", sha256)):
            told = self._low.get(name)
            wrong = told is not None and told != base64.b64encode(digest.digest()).decode()
            if wrong and not self._s3.ignore_checksums:
                raise _Refusal(400, "BadDigest")

    # -------------------------------------------------------------- operations

    def _HeadBucket(self) -> None:
        """It is there."""

    def _PutObject(self) -> None:
        body = self._body
        checksum = self._low.get("x-amz-checksum-sha256")
        stored = self._store(body, body.etag, checksum, self._described(), "if-none-match")
        if stored.checksum:
            self.answer_headers["x-amz-checksum-sha256"] = stored.checksum

    def _HeadObject(self) -> None:
        self._GetObject()

    def _GetObject(self) -> None:
        with self._s3.lock:
            found = self._s3.objects.get(self._key)
        if found is None:
            raise _Refusal(404, "NoSuchKey")
        self.answer_body = found
        self.answer_headers = {"ETag": found.etag, **found.metadata}
        if found.checksum and self._low.get("x-amz-checksum-mode") == "ENABLED":
            self.answer_headers["x-amz-checksum-sha256"] = found.checksum
        if found.version_id:
            self.answer_headers["x-amz-version-id"] = found.version_id

    def _DeleteObject(self) -> None:
        with self._s3.lock:
            self._s3.objects.pop(self._key, None)
        self.answer_status = 204

    def _ListObjectsV2(self) -> None:
        prefix = self._query.get("prefix", "")
        limit = min(int(self._query.get("max-keys", 1000)), 1000)
        after = self._query.get("continuation-token") or self._query.get("start-after", "")
        with self._s3.lock:
            wanted = sorted(k for k in self._s3.objects if k.startswith(prefix) and k > after)
            page = [(key, self._s3.objects[key]) for key in wanted[:limit]]
        urls = self._query.get("encoding-type") == "url"
        more = len(wanted) > limit
        self._xml(
            "ListBucketResult",
            f"<IsTruncated>{str(more).lower()}</IsTruncated><KeyCount>{len(page)}</KeyCount>"
            + (
                f"<NextContinuationToken>{escape(page[-1][0])}</NextContinuationToken>"
                if more
                else ""
            )
            + ("<EncodingType>url</EncodingType>" if urls else "")
            + "".join(
                f"<Contents><Key>{quote(key) if urls else escape(key)}</Key>"
                f"<ETag>{escape(each.etag)}</ETag><Size>{each.size_bytes}</Size></Contents>"
                for key, each in page
            ),
        )

    def _CreateMultipartUpload(self) -> None:
        number = f"upload-{self._s3.next_number()}"
        with self._s3.lock:
            self._s3.uploads[number] = _Upload(self._key, self._described())
        self._xml("InitiateMultipartUploadResult", f"<UploadId>{number}</UploadId>")

    def _UploadPart(self) -> None:
        upload = self._upload()
        with self._s3.lock:
            upload.parts[int(self._query["partNumber"])] = self._body
        self.answer_headers["ETag"] = self._body.etag

    def _CompleteMultipartUpload(self) -> None:
        upload = self._upload()
        with self._body.open() as file:
            named = [
                {child.tag.rpartition("}")[2]: child.text for child in part}
                for part in ElementTree.parse(file).getroot()
            ]
        parts = []
        for part in named:
            held = upload.parts.get(int(part["PartNumber"]))
            said = part.get("ChecksumSHA256")
            told_right = said in (None, _base64(held.sha256)) if held else False
            if held is None or held.etag.strip('"') != part["ETag"].strip('"') or not told_right:
                raise _Refusal(400, "InvalidPart")
            parts.append(held)
        if any(part.size_bytes < self._s3.least_part_bytes for part in parts[:-1]):
            raise _Refusal(400, "EntityTooSmall")
        md5s = b"".join(bytes.fromhex(part.md5) for part in parts)
        etag = f'"{hashlib.md5(md5s, usedforsecurity=False).hexdigest()}-{len(parts)}"'
        sha256s = b"".join(bytes.fromhex(part.sha256) for part in parts)
        composite = f"{_base64(hashlib.sha256(sha256s).hexdigest())}-{len(parts)}"
        condition = "" if self._s3.ignore_completion_condition else "if-none-match"
        self._store(self._joined(parts), etag, composite, upload.metadata, condition)
        with self._s3.lock:
            self._s3.uploads.pop(self._query["uploadId"], None)
        self._xml("CompleteMultipartUploadResult", f"<ETag>{escape(etag)}</ETag>")

    def _AbortMultipartUpload(self) -> None:
        self._upload()
        with self._s3.lock:
            self._s3.uploads.pop(self._query["uploadId"], None)
        self.answer_status = 204

    def _upload(self) -> _Upload:
        with self._s3.lock:
            upload = self._s3.uploads.get(self._query.get("uploadId", ""))
        if upload is None or upload.key != self._key:
            raise _Refusal(404, "NoSuchUpload")
        return upload

    def _described(self) -> dict[str, str]:
        kept = ("content-type", "x-amz-storage-class")
        begins = ("x-amz-meta-", "x-amz-server-side-encryption")
        return {k: v for k, v in self._low.items() if k in kept or k.startswith(begins)}

    def _store(
        self,
        body: StoredObject,
        etag: str,
        checksum: str | None,
        metadata: Mapping[str, str],
        condition: str,
    ) -> StoredObject:
        stored = StoredObject(
            body.size_bytes,
            body.md5,
            body.sha256,
            etag,
            body.data,
            body.path,
            None if self._s3.ignore_checksums else checksum,
            metadata,
            f"v{self._s3.next_number()}" if self._s3.versioned else None,
        )
        with self._s3.lock:
            exists = self._key in self._s3.objects and not self._s3.ignore_conditions
            if exists and self._low.get(condition) == "*":
                raise _Refusal(412, "PreconditionFailed")
            self._s3.objects[self._key] = stored
        self.answer_headers["ETag"] = stored.etag
        if stored.version_id:
            self.answer_headers["x-amz-version-id"] = stored.version_id
        return stored

    def _joined(self, parts: list[StoredObject]) -> StoredObject:
        whole = hashlib.sha256()
        with self._s3.new_file() as file:
            for part in parts:
                with part.open() as piece:
                    shutil.copyfileobj(piece, _Hashing(file, whole), _BLOCK)
            size = file.tell()
            in_memory = isinstance(file, io.BytesIO)
            data = file.getvalue() if in_memory else None
            path = None if in_memory else Path(file.name)
        return StoredObject(size, "", whole.hexdigest(), "", data, path)

    # ----------------------------------------------------------------- answers

    def _xml(self, root: str, inner: str) -> None:
        self.answer_headers["Content-Type"] = "application/xml"
        self.answer_body = (
            f'<?xml version="1.0" encoding="UTF-8"?><{root} xmlns="{_NAMESPACE}">{inner}</{root}>'
        ).encode()

    def error(self, status: int, code: str) -> None:
        """Answer with an error document."""
        self._drain()
        self.answer_status, self.answer_headers = status, {"Content-Type": "application/xml"}
        self.answer_body = f"<Error><Code>{code}</Code><Message>scripted</Message></Error>".encode()
        self.send_answer()

    def send_answer(self) -> None:
        """Send what was prepared."""
        body = self.answer_body
        length = body.size_bytes if isinstance(body, StoredObject) else len(body)
        self.send_response_only(self.answer_status)
        for name, value in self.answer_headers.items():
            self.send_header(name, value)
        if self.answer_status != 204:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD" or not length:
            return
        with body.open() if isinstance(body, StoredObject) else io.BytesIO(body) as file:
            shutil.copyfileobj(file, self.wfile, _BLOCK)

    def send_half(self) -> None:
        """Send the headers and half of the body, and cut the connection in an orderly way."""
        body = self.answer_body
        with body.open() if isinstance(body, StoredObject) else io.BytesIO(body) as file:
            data = file.read()
        self.send_response_only(self.answer_status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True

    def reply(self, status: int, body: bytes) -> None:
        """Answer with a page."""
        self._drain()
        self.answer_status, self.answer_headers = status, {"Content-Type": "text/html"}
        self.answer_body = body
        self.send_answer()

    def damage(self) -> None:
        """Change a byte of what was just stored, and answer with the checksum of that."""
        held = self._s3.objects[self._key]
        changed = bytearray(self._s3.body(self._key))
        changed[len(changed) // 2] ^= 1
        self._s3.put(self._key, bytes(changed), held.metadata)
        told = _base64(self._s3.objects[self._key].sha256)
        self.answer_headers["x-amz-checksum-sha256"] = told
        self.send_answer()

    def cut(self, after_bytes: int = 0) -> None:
        """Reset the connection, when so much of the body was read."""
        if self._left:
            self.rfile.read(min(self._left, after_bytes))
        self.close_connection = True
        _cut(self.connection)

    def stall(self) -> None:
        """Keep the connection and say nothing, until the client closes it."""
        self.close_connection = True
        self.connection.settimeout(0.05)
        while not self.server.s3.released.is_set():
            try:
                if not self.connection.recv(_BLOCK):
                    return
            except TimeoutError:
                continue
            except OSError:
                return

    def _drain(self) -> None:
        """Read the rest of the body, or the connection could not be used again."""
        while self._left:
            block = self.rfile.read(min(self._left, _BLOCK))
            if not block:
                self.close_connection = True
                return
            self._left -= len(block)


class _Hashing:
    """Hashes what is written through it."""

    def __init__(self, file: BinaryIO, digest) -> None:
        self._file = file
        self._digest = digest

    def write(self, block: bytes) -> int:
        self._digest.update(block)
        return self._file.write(block)


def _base64(sha256: str) -> str:
    return base64.b64encode(bytes.fromhex(sha256)).decode()
