"""The HTTP side of the S3 of the tests: signatures, operations and answers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import re
import shutil
import socket
import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from tests.support.s3_objects import Refusal, SeenRequest, StoredObject, Upload, base64_of

if TYPE_CHECKING:
    from tests.support.s3_server import S3Server

_BLOCK = 256 * 1024
_SKEW_SECONDS = 900
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/,]+)/(\d{8})/([^/,]+)/([^/,]+)/aws4_request, ?"
    r"SignedHeaders=([^,]+), ?Signature=([0-9a-f]{64})"
)
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


class HttpServer(ThreadingHTTPServer):
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


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 64 * 1024
    server: HttpServer

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
        self._low = {name.lower(): value for name, value in self.headers.items()}
        self._bucket, self._key, self._in_path = self._addressed()
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
            if self._s3.virtual_hosts_only and self._in_path:
                raise Refusal(403, "SecondLevelDomainForbidden")
            self._s3.judge(operation, self._low, self._text())
            if self._bucket != self._s3.bucket:
                raise Refusal(404, "NoSuchBucket")
            getattr(self, f"_{operation}", self._unknown)()
        except Refusal as refusal:
            self.error(refusal.status, refusal.code)
            return
        if script is not None:
            script.act(self)
        else:
            self.send_answer()

    def _addressed(self) -> tuple[str, str, bool]:
        """Bucket and key of the request, and whether the bucket stands in the path."""
        path = unquote(self._url.path).lstrip("/")
        name, _, below = self._low.get("host", "").partition(":")[0].partition(".")
        if below and not below.replace(".", "").isdigit():
            return name, path, False
        bucket, _, key = path.partition("/")
        return bucket, key, True

    def _text(self) -> str:
        """The body of a request that is no object's: names of its XML elements."""
        if self.command != "POST" or self._body is None:
            return ""
        with self._body.open() as file:
            return file.read().decode("utf-8", "replace")

    def _operation(self) -> str:
        query, method = self._query, self.command
        if not self._key:
            listing = "ListObjectsV2" if query.get("list-type") == "2" else "ListObjects"
            return {"GET": listing, "HEAD": "HeadBucket"}.get(method, "Unknown")
        if method == "POST":
            return "CreateMultipartUpload" if "uploads" in query else "CompleteMultipartUpload"
        if "uploadId" in query:
            return {"PUT": "UploadPart", "DELETE": "AbortMultipartUpload"}.get(method, "Unknown")
        if method == "PUT" and "/probes/" in f"/{self._key}":
            return "PutProbe"
        return f"{method.title()}Object"

    def _unknown(self) -> None:
        raise Refusal(501, "NotImplemented")

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
            raise Refusal(403, "AccessDenied")
        found = _AUTHORIZATION.fullmatch(self._low["authorization"])
        if found is None:
            raise Refusal(400, "AuthorizationHeaderMalformed")
        access_key, day, region, service, names, signature = found.groups()
        secret = self._s3.secret_of(access_key, self._low.get("x-amz-security-token"))
        stamp = self._low.get("x-amz-date", "")
        try:
            then = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        except ValueError:
            raise Refusal(403, "AccessDenied") from None
        behind = (datetime.now(UTC) - then).total_seconds() + self._s3.clock_offset_seconds
        if abs(behind) > _SKEW_SECONDS:
            raise Refusal(403, "RequestTimeTooSkewed")
        if any(
            name not in names.split(";")
            for name in self._low
            if name == "host" or name.startswith("x-amz-")
        ):
            raise Refusal(403, "AccessDenied")
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
        reported = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{reported}"
        key = f"AWS4{secret}".encode()
        for step in (day, region, service, "aws4_request", text):
            key = hmac.digest(key, step.encode(), "sha256")
        if not hmac.compare_digest(key.hex(), signature):
            raise Refusal(403, "SignatureDoesNotMatch")

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
            raise Refusal(501, "NotImplemented")
        ignored = self._s3.ignore_payload_hash or (
            self._s3.ignore_part_hash and "partNumber" in self._query
        )
        unchecked = self._s3.ignore_checksums or (
            self._s3.ignore_part_hash and "partNumber" in self._query
        )
        if said not in ("UNSIGNED-PAYLOAD", sha256.hexdigest()) and not ignored:
            raise Refusal(400, "XAmzContentSHA256Mismatch")
        for name, digest in (("content-md5", md5), ("x-amz-checksum-sha256", sha256)):
            reported = self._low.get(name)
            wrong = reported is not None and reported != base64.b64encode(digest.digest()).decode()
            if wrong and not unchecked:
                raise Refusal(400, "BadDigest")

    # -------------------------------------------------------------- operations

    def _HeadBucket(self) -> None:
        """It is there."""

    def _PutObject(self) -> None:
        body = self._body
        checksum = self._low.get("x-amz-checksum-sha256")
        stored = self._store(body, body.etag, checksum, self._described(), "if-none-match")
        if stored.checksum:
            self.answer_headers["x-amz-checksum-sha256"] = stored.checksum

    def _PutProbe(self) -> None:
        self._PutObject()

    def _HeadObject(self) -> None:
        self._GetObject()

    def _GetObject(self) -> None:
        with self._s3.lock:
            found = self._s3.objects.get(self._key)
        if found is None:
            raise Refusal(404, "NoSuchKey")
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
        start = "" if self._s3.ignore_start_after else self._query.get("start-after", "")
        after = self._query.get("continuation-token") or start
        page, more = self._page(after)
        token = ""
        if more and self._s3.listing_tokens:
            token = f"<NextContinuationToken>{escape(page[-1][0])}</NextContinuationToken>"
        self._listing(page, more, token, f"<KeyCount>{len(page)}</KeyCount>")

    def _ListObjects(self) -> None:
        page, more = self._page(self._query.get("marker", ""))
        self._listing(page, more, "", "")

    def _page(self, after: str) -> tuple[list[tuple[str, StoredObject]], bool]:
        prefix = self._query.get("prefix", "")
        limit = min(int(self._query.get("max-keys", 1000)), 1000)
        with self._s3.lock:
            wanted = sorted(k for k in self._s3.objects if k.startswith(prefix) and k > after)
            return [(key, self._s3.objects[key]) for key in wanted[:limit]], len(wanted) > limit

    def _listing(
        self, page: list[tuple[str, StoredObject]], more: bool, token: str, count: str
    ) -> None:
        urls = self._query.get("encoding-type") == "url"
        told = f"<IsTruncated>{str(more).lower()}</IsTruncated>"
        self._xml(
            "ListBucketResult",
            (told if self._s3.listing_flags else "")
            + count
            + token
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
            algorithm = self._low.get("x-amz-checksum-algorithm")
            self._s3.uploads[number] = Upload(self._key, self._described(), algorithm)
        self._xml("InitiateMultipartUploadResult", f"<UploadId>{number}</UploadId>")

    def _UploadPart(self) -> None:
        upload = self._upload()
        told = "x-amz-checksum-sha256" in self._low
        if self._s3.strict_multipart and told and upload.algorithm is None:
            # Checksum Type mismatch occurred, expected checksum Type: null
            raise Refusal(400, "InvalidRequest")
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
            if self._s3.strict_multipart and upload.algorithm is not None and said is None:
                # The complete request must include the checksum for each part.
                raise Refusal(400, "InvalidRequest")
            told_right = said in (None, base64_of(held.sha256)) if held else False
            if held is None or held.etag.strip('"') != part["ETag"].strip('"') or not told_right:
                raise Refusal(400, "InvalidPart")
            parts.append(held)
        if any(part.size_bytes < self._s3.least_part_bytes for part in parts[:-1]):
            raise Refusal(400, "EntityTooSmall")
        md5s = b"".join(bytes.fromhex(part.md5) for part in parts)
        etag = f'"{hashlib.md5(md5s, usedforsecurity=False).hexdigest()}-{len(parts)}"'
        sha256s = b"".join(bytes.fromhex(part.sha256) for part in parts)
        composite = f"{base64_of(hashlib.sha256(sha256s).hexdigest())}-{len(parts)}"
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

    def _upload(self) -> Upload:
        with self._s3.lock:
            upload = self._s3.uploads.get(self._query.get("uploadId", ""))
        if upload is None or upload.key != self._key:
            raise Refusal(404, "NoSuchUpload")
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
                raise Refusal(self._s3.exists_status, "PreconditionFailed")
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
        # RFC 9110, 15.4.5: a 304 has no body.
        body = f"<Error><Code>{code}</Code><Message>scripted</Message></Error>"
        self.answer_body = b"" if status == 304 else body.encode()
        self.send_answer()

    def send_answer(self) -> None:
        """Send what was prepared."""
        body = self.answer_body
        length = body.size_bytes if isinstance(body, StoredObject) else len(body)
        self.send_response_only(self.answer_status)
        for name, value in self.answer_headers.items():
            self.send_header(name, value)
        if self.answer_status not in (204, 304):
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
        reported = base64_of(self._s3.objects[self._key].sha256)
        self.answer_headers["x-amz-checksum-sha256"] = reported
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
