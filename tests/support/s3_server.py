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
a header or an XML element is refused         ``refuse``, of one operation or of all
a header is wanted                            ``demand``
304 where something is there already          ``exists_status=304``
501 to a condition                            ``refuse("if-none-match", status=501)``
the bucket has to stand in the host name      ``virtual_hosts_only=True``
parts need checksums where announced          ``strict_multipart=True``, as AWS does
a listing is cut short and does not go on     ``listing_tokens=False``, ``ignore_start_after=True``
a listing does not say that it is cut short   ``listing_flags=False``
============================================  ====================================================

A put below ``probes/`` is the operation ``PutProbe``: scripts and counts of ``PutObject`` are of
what is archived. A bucket in the host name (``archive.localhost``) is understood everywhere.

It is no store for anything but tests: one process, no permissions, nothing survives it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import secrets
import ssl
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Self

from tests.support.s3_handler import Handler, HttpServer
from tests.support.s3_objects import (
    HeaderRule,
    Refusal,
    Script,
    SeenRequest,
    StoredObject,
    Upload,
    base64_of,
)


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
    exists_status : int
        What a put with ``If-None-Match`` is answered where the key exists; AWS has 412.
    strict_multipart : bool
        Want checksums of parts exactly where the upload was created with an algorithm.
    virtual_hosts_only : bool
        Refuse requests with the bucket in the path.
    listing_tokens, listing_flags : bool
        Whether a page of a listing that is not the last one has a token for the next one, and
        whether it says ``IsTruncated``.
    ignore_start_after : bool
        List from the beginning whatever ``start-after`` says.
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
        exists_status: int = 412,
        strict_multipart: bool = False,
        virtual_hosts_only: bool = False,
        listing_tokens: bool = True,
        listing_flags: bool = True,
        ignore_start_after: bool = False,
        least_part_bytes: int = 5 * 1024**2,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.bucket = bucket
        self.access_key = "archivist"
        self.secret_key = secrets.token_urlsafe(24)
        self.requests: Counter[str] = Counter()
        self.seen: list[SeenRequest] = []
        self.objects: dict[str, StoredObject] = {}
        self.uploads: dict[str, Upload] = {}
        self.ignore_conditions = ignore_conditions
        self.ignore_completion_condition = ignore_completion_condition
        self.ignore_payload_hash = ignore_payload_hash
        self.ignore_part_hash = ignore_part_hash
        self.ignore_checksums = ignore_checksums
        self.versioned = versioned
        self.public = public
        self.exists_status = exists_status
        self.strict_multipart = strict_multipart
        self.virtual_hosts_only = virtual_hosts_only
        self.listing_tokens = listing_tokens
        self.listing_flags = listing_flags
        self.ignore_start_after = ignore_start_after
        self.least_part_bytes = least_part_bytes
        self.tls = tls
        self.clock_offset_seconds = 0.0
        self.lock = threading.RLock()
        self.released = threading.Event()
        self._directory = directory
        self._users: dict[str, tuple[str, str | None]] = {self.access_key: (self.secret_key, None)}
        self._expired: set[str] = set()
        self._scripts: list[Script] = []
        self._rules: list[HeaderRule] = []
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        self._server = HttpServer(("127.0.0.1", 0), Handler)
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

        def act(handler: Handler) -> None:
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

    def refuse(
        self, name: str, operation: str = "*", *, status: int = 400, code: str = "InvalidArgument"
    ) -> None:
        """Refuse requests that have a header, or an XML element in their body.

        Parameters
        ----------
        name : str
            ``x-amz-checksum-sha256``, ``if-none-match``, ``ChecksumSHA256``, ...
        """
        self._rules.append(HeaderRule(name, operation, status, code, wanted=False))

    def demand(
        self, name: str, operation: str = "*", *, status: int = 400, code: str = "InvalidRequest"
    ) -> None:
        """Refuse requests that lack a header."""
        self._rules.append(HeaderRule(name, operation, status, code, wanted=True))

    def behave(self) -> None:
        """Forget what is scripted and was not done yet, and all rules about headers."""
        with self.lock:
            self._scripts.clear()
            self._rules.clear()

    @property
    def archived(self) -> dict[str, StoredObject]:
        """What is stored by key, but for probe objects."""
        with self.lock:
            return {key: held for key, held in self.objects.items() if "probes/" not in key}

    def put(self, key: str, data: bytes, metadata: Mapping[str, str] | None = None) -> None:
        """Store an object as somebody else would."""
        sha256, md5 = hashlib.sha256(data), hashlib.md5(data, usedforsecurity=False).hexdigest()
        self.objects[key] = StoredObject(
            len(data),
            md5,
            sha256.hexdigest(),
            f'"{md5}"',
            data,
            checksum=None if self.ignore_checksums else base64_of(sha256.hexdigest()),
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
        act: Callable[[Handler], None],
        goes_on: bool = False,
    ) -> None:
        with self.lock:
            self._scripts.append(Script(operation, skip, times, committed, act, goes_on))

    # ----------------------------------------------------- used by the handler

    def scripted(self, operation: str) -> Script | None:
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

    def judge(self, operation: str, headers: Mapping[str, str], body: str) -> None:
        """Raise the refusal of a request by its headers."""
        for rule in self._rules:
            if rule.refuses(operation, headers, body):
                raise Refusal(rule.status, rule.code)

    def secret_of(self, access_key: str, session_token: str | None) -> str:
        """The user's secret key, or the refusal of the user."""
        if access_key not in self._users:
            raise Refusal(403, "InvalidAccessKeyId")
        secret, token = self._users[access_key]
        if access_key in self._expired:
            raise Refusal(400, "ExpiredToken")
        if token is not None and token != session_token:
            raise Refusal(403, "InvalidToken")
        return secret

    def next_number(self) -> int:
        """A number that was not given before."""
        return next(self._numbers)

    def new_file(self) -> BinaryIO:
        """Where the body of a request is written to."""
        if self._directory is None:
            return io.BytesIO()
        return tempfile.NamedTemporaryFile(dir=self._directory, suffix=".object", delete=False)
