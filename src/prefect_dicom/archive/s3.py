"""The archive in a bucket of any service that speaks S3.

Objects of one part are put by :class:`~prefect_dicom.archive.s3_put.SignedPut`, larger ones
as multipart uploads whose parts go the same way; everything else is boto3. The SHA-256 from
arrival is signed with the bytes, sent as their checksum, and recorded as metadata
(``x-amz-meta-sha256``), which services return that drop checksums.

There is one retry policy, :class:`Patience`; boto3's own is off.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from prefect_dicom.archive.base import BLOCK_BYTES, Archive, Check, ObjectFacts, checked_key
from prefect_dicom.archive.s3_errors import Fault, Refused, fault_of
from prefect_dicom.archive.s3_put import SignedPut
from prefect_dicom.archive.source import BytesSource, FileSource, Source, sha256_of
from prefect_dicom.config.site import S3Archive
from prefect_dicom.core.errors import ArchiveConflict, ArchiveError, Interrupted
from prefect_dicom.core.model import ArchivedInstance
from prefect_dicom.core.uids import is_sha256

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_FAULTS = (BotoCoreError, HTTPClientError, ClientError, HTTPError, ResponseParserError)
_LOOK_SECONDS = 0.5

# Their DEBUG lines hold URLs and canonical requests, and those hold UIDs.
for _name in ("boto3", "botocore", "urllib3"):
    if logging.getLogger(_name).level == logging.NOTSET:
        logging.getLogger(_name).setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one request is tried: pauses double, and vary so that clients spread out."""

    attempts: int = 5
    first_pause_seconds: float = 0.25
    longest_pause_seconds: float = 8
    connect_seconds: float = 10
    read_seconds: float = 60
    """Between two packets, so for a stalled service; not for a whole object."""

    def pause(self, attempt: int) -> float:
        """Seconds to wait after the attempt of this number (the first is 1)."""
        longest = min(self.first_pause_seconds * 2 ** (attempt - 1), self.longest_pause_seconds)
        return random.uniform(longest / 2, longest)


class _Unsettled(Exception):
    """The service says of an object that it exists and that it does not."""


@dataclass(frozen=True, slots=True)
class _Line:
    """The way to the service with one set of credentials."""

    client: Any
    put: SignedPut


class BucketArchive(Archive):
    """An archive in a bucket; connects when first used.

    Raises
    ------
    ArchiveError
        By any method: ``archive-refused`` (credentials, permission, settings),
        ``archive-missing`` (no such bucket), ``archive-unavailable`` (no answer, overload),
        ``archive-full``, ``archive-checksum``, ``unexpected``.
    """

    def __init__(self, settings: S3Archive, patience: Patience = Patience()) -> None:
        self._settings = settings
        self._patience = patience
        self._prefix = f"{settings.prefix.strip('/')}/" if settings.prefix.strip("/") else ""
        self._lock = threading.Lock()
        self._line: _Line | None = None

    def put_file(self, key: str, path: Path, sha256: str, size_bytes: int) -> ArchivedInstance:
        checked_key(key)
        with FileSource(path, sha256, size_bytes, self.stopping) as source:
            return self._put(key, source)

    def put_bytes(self, key: str, data: bytes) -> ArchivedInstance:
        return self._put(checked_key(key), BytesSource(data))

    def head(self, key: str) -> ObjectFacts | None:
        name = self._prefix + checked_key(key)
        try:
            return _facts(self._patiently(lambda line: self._head(line, name)))
        except Refused as refused:
            if refused.fault.absent:
                return None
            raise refused.error() from None

    def read(self, key: str) -> Iterator[bytes]:
        name = self._prefix + checked_key(key)
        try:
            body = self._patiently(
                lambda line: line.client.get_object(Bucket=self._settings.bucket, Key=name)
            )["Body"]
        except Refused as refused:
            raise refused.error() from None
        try:
            yield from body.iter_chunks(BLOCK_BYTES)
        except _FAULTS as error:
            raise Refused(_meaning(error)).error() from None
        finally:
            body.close()

    def keys(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        more: dict[str, str] = {}
        while True:

            def ask(line: _Line, more: dict[str, str] = more) -> Mapping[str, Any]:
                return line.client.list_objects_v2(
                    Bucket=self._settings.bucket, Prefix=self._prefix + prefix, **more
                )

            page = self._ask(ask)
            for entry in page.get("Contents", ()):
                yield entry["Key"].removeprefix(self._prefix), entry["Size"]
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def check(self) -> list[Check]:
        return _CheckUp(self).checks()

    def close(self) -> None:
        with self._lock:
            line, self._line = self._line, None
        if line is not None:
            line.put.close()
            line.client.close()

    # ------------------------------------------------------------------ putting

    def _put(self, key: str, source: Source) -> ArchivedInstance:
        # Ceph takes an empty body under any signed hash.
        if not source.size_bytes and (damage := source.damage()):
            raise ArchiveError("spool-damaged", damage)
        try:
            if source.size_bytes <= self._settings.part_bytes:
                return self._put_whole(key, source)
            return self._put_parts(key, source)
        except Refused as refused:
            if refused.fault.code == "archive-checksum":
                raise _who_is_damaged(source, refused.fault) from None
            raise refused.error() from None

    def _put_whole(self, key: str, source: Source) -> ArchivedInstance:
        headers = {
            **self._object_headers(key, source.sha256),
            "If-None-Match": "*",
        }
        sent = 0

        def send(line: _Line) -> Mapping[str, str]:
            nonlocal sent
            sent += 1
            return line.put.send(
                key, source, headers, sha256=source.sha256, wait_for_answer=sent > 1
            )

        try:
            answer = self._patiently(send)
        except Refused as refused:
            if not refused.fault.exists:
                raise
            # After a lost answer this is probably what we stored ourselves.
            return self._compared(key, source, already_there=sent == 1)
        if answer.get("ETag") is None:
            # Not the answer of an object store: believe what it shows.
            return self._compared(key, source, already_there=False)
        _check_echo(answer, source.sha256)
        return ArchivedInstance(
            key,
            source.sha256,
            source.size_bytes,
            version_id=_version(answer.get("x-amz-version-id")),
        )

    def _put_parts(self, key: str, source: Source) -> ArchivedInstance:
        # Not every service honours the condition of the completion: look before and after.
        if self.head(key) is not None:
            return self._compared(key, source, already_there=True)
        name = self._prefix + key
        upload = self._patiently(
            lambda line: line.client.create_multipart_upload(
                Bucket=self._settings.bucket,
                Key=name,
                ChecksumAlgorithm="SHA256",
                **self._object_arguments(key, source.sha256),
            )
        )["UploadId"]
        try:
            parts = self._send_parts(key, source, upload)
            self._complete(key, source, upload, parts)
        except BaseException:
            self._abort(name, upload)
            raise
        # Each part was signed with its own hash; the look is for what came in between.
        return self._compared(key, source, already_there=False, proven=True)

    def _send_parts(self, key: str, source: Source, upload: str) -> list[dict[str, Any]]:
        """Each part is read twice: for its hash, which is signed, and to be sent."""
        parts = []
        whole = hashlib.sha256()
        for number, offset in enumerate(
            range(0, source.size_bytes, self._settings.part_bytes), start=1
        ):
            length = min(self._settings.part_bytes, source.size_bytes - offset)
            part = hashlib.sha256()
            for block in source.blocks(offset, length):
                part.update(block)
                whole.update(block)
            digest = part.hexdigest()
            query = {"partNumber": str(number), "uploadId": upload}

            def send(
                line: _Line,
                digest: str = digest,
                offset: int = offset,
                length: int = length,
                query: dict[str, str] = query,
            ) -> Mapping[str, str]:
                return line.put.send(
                    key, source, {}, sha256=digest, offset=offset, length=length, query=query
                )

            answer = self._patiently(send)
            etag = answer.get("ETag")
            if etag is None:
                raise Refused(Fault("archive-unavailable", "a part was answered without ETag"))
            _check_echo(answer, digest)
            parts.append({"PartNumber": number, "ETag": etag, "ChecksumSHA256": _base64(digest)})
        if whole.hexdigest() != source.sha256:
            raise ArchiveError("spool-damaged", "the file has another SHA-256 than on arrival")
        return parts

    def _complete(self, key: str, source: Source, upload: str, parts: list[dict[str, Any]]) -> None:
        def complete(line: _Line) -> Mapping[str, Any]:
            return line.client.complete_multipart_upload(
                Bucket=self._settings.bucket,
                Key=self._prefix + key,
                UploadId=upload,
                MultipartUpload={"Parts": parts},
                IfNoneMatch="*",
            )

        try:
            self._patiently(complete)
        except Refused:
            # A completion whose answer was lost is told as 412 or as an unknown upload when
            # asked for again. What is there now decides.
            if self.head(key) is None:
                raise
            self._compared(key, source, already_there=False)

    def _abort(self, name: str, upload: str) -> None:
        line = self._line
        try:
            if line is not None:
                line.client.abort_multipart_upload(
                    Bucket=self._settings.bucket, Key=name, UploadId=upload
                )
        except _FAULTS as error:
            fault = _meaning(error)
            if not fault.absent:
                logger.warning(
                    "A multipart upload could not be aborted (%s); a lifecycle rule of the "
                    "bucket should remove incomplete uploads.",
                    fault.detail,
                )

    def _compared(
        self, key: str, source: Source, *, already_there: bool, proven: bool = False
    ) -> ArchivedInstance:
        """What is under the key is the source, or it is a conflict.

        A hash that is only recorded says what somebody meant to put. Unless the bytes are
        ``proven`` by how they were put, they are read.
        """
        facts = self._facts_of_existing(key)
        if facts.size_bytes != source.size_bytes:
            raise ArchiveConflict(
                detail=f"{facts.size_bytes} bytes there, {source.size_bytes} bytes here"
            )
        believed = facts.sha256 if facts.sha256_by_store or proven else None
        found = believed or sha256_of(self.read(key))
        if found != source.sha256:
            raise ArchiveConflict(detail="same size, another SHA-256")
        return ArchivedInstance(
            key,
            source.sha256,
            source.size_bytes,
            version_id=facts.version_id,
            already_there=already_there,
        )

    def _facts_of_existing(self, key: str) -> ObjectFacts:
        def ask(line: _Line) -> Mapping[str, Any]:
            try:
                return self._head(line, self._prefix + key)
            except ClientError as error:
                if fault_of(error).absent:
                    raise _Unsettled from None
                raise

        return _facts(self._ask(ask))

    def _head(self, line: _Line, name: str) -> Mapping[str, Any]:
        where = {"Bucket": self._settings.bucket, "Key": name}
        try:
            return line.client.head_object(**where, ChecksumMode="ENABLED")
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] in (400, 403):
                # The answer to a HEAD has no body to tell why: expired, another clock, a region.
                line.client.get_object(**where, Range="bytes=0-0")["Body"].close()
            raise

    def _object_headers(self, key: str, sha256: str) -> dict[str, str]:
        settings = self._settings
        headers = {"Content-Type": _content_type(key), "x-amz-meta-sha256": sha256}
        if settings.encryption != "none":
            headers["x-amz-server-side-encryption"] = settings.encryption
        if settings.kms_key_id:
            headers["x-amz-server-side-encryption-aws-kms-key-id"] = settings.kms_key_id
        if settings.storage_class:
            headers["x-amz-storage-class"] = settings.storage_class
        return headers

    def _object_arguments(self, key: str, sha256: str) -> dict[str, Any]:
        """The same as :meth:`_object_headers`, in boto3's words."""
        settings = self._settings
        arguments: dict[str, Any] = {
            "ContentType": _content_type(key),
            "Metadata": {"sha256": sha256},
        }
        if settings.encryption != "none":
            arguments["ServerSideEncryption"] = settings.encryption
        if settings.kms_key_id:
            arguments["SSEKMSKeyId"] = settings.kms_key_id
        if settings.storage_class:
            arguments["StorageClass"] = settings.storage_class
        return arguments

    # --------------------------------------------------------------- connecting

    def _ask(self, call: Callable[[_Line], _T]) -> _T:
        try:
            return self._patiently(call)
        except Refused as refused:
            raise refused.error() from None

    def _patiently(self, call: Callable[[_Line], _T]) -> _T:
        """The answer to one request, tried again while that can help."""
        attempt = 0
        line: _Line | None = None
        while True:
            attempt += 1
            try:
                line = self._connected()
                return call(line)
            except (*_FAULTS, _Unsettled) as error:
                fault = _meaning(error)
            if not fault.again or attempt >= self._patience.attempts:
                raise Refused(fault)
            if fault.expired and line is not None:
                self._forget(line)
            self._wait(self._patience.pause(attempt))

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self.stopping():
                raise Interrupted()
            time.sleep(min(left, _LOOK_SECONDS))

    def _connected(self) -> _Line:
        with self._lock:
            if self._line is None:
                self._line = self._connect()
            return self._line

    def _forget(self, line: _Line) -> None:
        """Look for credentials anew at the next request; others may use the old line still."""
        with self._lock:
            if self._line is line:
                self._line = None

    def _connect(self) -> _Line:
        settings, patience = self._settings, self._patience
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
                    "addressing_style": "path" if settings.endpoint else "virtual",
                    "payload_signing_enabled": True,
                },
                max_pool_connections=settings.connections,
                retries={"total_max_attempts": 1},
                connect_timeout=patience.connect_seconds,
                read_timeout=patience.read_seconds,
                tcp_keepalive=True,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        put = SignedPut(
            client,
            session.get_credentials(),
            settings.bucket,
            self._prefix,
            ca_bundle=core.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE"),
            timeouts=(patience.connect_seconds, patience.read_seconds),
            connections=settings.connections,
        )
        return _Line(client, put)


_REFUSALS = ("archive-checksum", "archive-refused")
_UNSIGNED = (
    "The service does not compare what it gets with the signature: bytes may change on the way to "
    "it unseen. Use another service; with this one only TLS and `prefect-dicom verify --level "
    "read` guard the bytes."
)


class _CheckUp:
    """What a bucket honours, tried on probe objects below ``probes/``.

    Each step answers with an advice, empty where all is well.
    """

    def __init__(self, archive: BucketArchive) -> None:
        self._archive = archive
        self._bucket = archive._settings.bucket
        self._key = f"probes/{secrets.token_hex(8)}"
        self._name = archive._prefix + self._key
        self._written: set[str] = set()

    def checks(self) -> list[Check]:
        checks = [
            self._made("the bucket exists and may be listed", True, self._listed),
        ]
        if checks[-1].ok:
            checks.append(self._made("objects can be written", True, self._writable))
        if not checks[-1].ok:
            return checks
        for name, required, step in (
            ("nothing is overwritten (If-None-Match)", True, self._condition),
            ("other bytes than signed are refused", True, self._signed_payload),
            ("other bytes than signed are refused in parts", True, self._signed_part),
            ("other bytes than in ChecksumSHA256 are refused", False, self._checksum),
            ("HEAD returns the service's own checksum", False, self._head_checksum),
            ("nothing is overwritten by a multipart upload", False, self._completion),
            ("strangers cannot read objects", True, self._private),
            ("the probe objects are removed", False, self._cleaned),
        ):
            checks.append(self._made(name, required, step))
        return checks

    def _made(self, name: str, required: bool, step: Callable[[], str]) -> Check:
        try:
            advice = step()
        except Refused as refused:
            error = refused.error()
            advice = f"{error}. {error.reason.what_to_do}"
        except ArchiveError as error:
            advice = f"{error}. {error.reason.what_to_do}"
        return Check(name, not advice, advice, required)

    def _listed(self) -> str:
        try:
            self._archive._patiently(lambda line: line.client.head_bucket(Bucket=self._bucket))
        except Refused as refused:
            if refused.fault.absent:
                # HEAD has no body that could tell a bucket from an object.
                raise ArchiveError("archive-missing", refused.fault.detail) from None
            raise
        return ""

    def _writable(self) -> str:
        self._archive.put_bytes(self._key, b"probe")
        self._written.add(self._name)
        return ""

    def _condition(self) -> str:
        try:
            self._archive.put_bytes(self._key, b"other")
        except ArchiveConflict:
            return ""
        return (
            "The service replaces objects although told not to; deny that by bucket policy or "
            "object lock, or use another service."
        )

    def _signed_payload(self) -> str:
        # The checksum header is right, so that only the signature can be the cause.
        if self._refused("-signed", signed=b"other", checksum=b"sent"):
            return ""
        return _UNSIGNED

    def _signed_part(self) -> str:
        archive, source = self._archive, BytesSource(b"sent")
        with self._upload() as upload:
            header = {"x-amz-checksum-sha256": _base64(source.sha256)}
            query = {"partNumber": "1", "uploadId": upload}
            other = BytesSource(b"other").sha256
            try:
                archive._patiently(
                    lambda line: line.put.send(self._key, source, header, sha256=other, query=query)
                )
            except Refused as refused:
                if refused.fault.code in _REFUSALS:
                    return ""
                raise
        return _UNSIGNED

    def _checksum(self) -> str:
        if self._refused("-checksum", signed=b"sent", checksum=b"other"):
            return ""
        return "The service ignores checksum headers; the signed hash has to do."

    def _refused(self, suffix: str, *, signed: bytes, checksum: bytes) -> bool:
        """Whether the service refuses the bytes ``sent`` with the hashes of these others."""
        header = {"x-amz-checksum-sha256": _base64(hashlib.sha256(checksum).hexdigest())}
        signature = hashlib.sha256(signed).hexdigest()
        source = BytesSource(b"sent")
        try:
            self._archive._patiently(
                lambda line: line.put.send(self._key + suffix, source, header, sha256=signature)
            )
        except Refused as refused:
            if refused.fault.code in _REFUSALS:
                return True
            raise
        self._written.add(self._name + suffix)
        return False

    def _head_checksum(self) -> str:
        facts = self._archive.head(self._key)
        if facts is not None and facts.sha256_by_store:
            return ""
        if facts is not None and facts.sha256 is not None:
            return "It returns what was recorded with the object; only reading proves the bytes."
        return "It returns no hash at all; only reading proves the bytes."

    def _completion(self) -> str:
        archive, source = self._archive, BytesSource(b"other")
        with self._upload() as upload:
            query = {"partNumber": "1", "uploadId": upload}
            part = archive._patiently(
                lambda line: line.put.send(self._key, source, {}, sha256=source.sha256, query=query)
            )
            try:
                archive._patiently(
                    lambda line: line.client.complete_multipart_upload(
                        Bucket=self._bucket,
                        Key=self._name,
                        UploadId=upload,
                        MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
                        IfNoneMatch="*",
                    )
                )
            except Refused as refused:
                if refused.fault.exists:
                    return ""
                raise
        return (
            "The service ignores the condition of a completion; objects above `part_bytes` are "
            "looked for before and after instead."
        )

    @contextmanager
    def _upload(self) -> Iterator[str]:
        """A multipart upload over the probe object, which is gone in the end."""
        upload = self._archive._patiently(
            lambda line: line.client.create_multipart_upload(Bucket=self._bucket, Key=self._name)
        )["UploadId"]
        try:
            yield upload
        finally:
            self._archive._abort(self._name, upload)

    def _private(self) -> str:
        if self._archive._patiently(lambda line: line.put.seen_by_strangers(self._key)):
            return "Anybody can read the archive: block public access to the bucket."
        return ""

    def _cleaned(self) -> str:
        left = []
        for name in sorted(self._written):
            try:
                self._archive._patiently(
                    lambda line, name=name: line.client.delete_object(Bucket=self._bucket, Key=name)
                )
            except Refused:
                left.append(name)
        if not left:
            return ""
        return (
            "These credentials may not delete, which is right for an archive. Left behind: "
            + ", ".join(left)
        )


def _meaning(error: Exception) -> Fault:
    if isinstance(error, _Unsettled):
        return Fault("archive-unavailable", "an object is there and is not shown", again=True)
    if isinstance(error, HTTPError):
        return Fault("archive-unavailable", "the answer broke off", again=True, answered=False)
    return fault_of(error)


def _who_is_damaged(source: Source, fault: Fault) -> ArchiveError:
    """The service got other bytes: from the disk, or on the way."""
    damage = source.damage()
    if damage is not None:
        return ArchiveError("spool-damaged", damage)
    return ArchiveError("archive-checksum", fault.detail)


def _check_echo(answer: Mapping[str, str], sha256: str) -> None:
    """Refuse an answer that tells another checksum than that of what was sent."""
    echo = answer.get("x-amz-checksum-sha256")
    if echo is not None and echo != _base64(sha256):
        raise Refused(Fault("archive-checksum", "the service computed another SHA-256"))


def _facts(answer: Mapping[str, Any]) -> ObjectFacts:
    sha256 = None
    checksum = answer.get("ChecksumSHA256")
    # That of a multipart upload is a hash of hashes, "…-<parts>".
    if checksum and "-" not in checksum and answer.get("ChecksumType") != "COMPOSITE":
        try:
            sha256 = base64.b64decode(checksum, validate=True).hex()
        except ValueError:
            sha256 = None
    by_store = sha256 is not None and is_sha256(sha256)
    recorded = answer.get("Metadata", {}).get("sha256", "")
    if not by_store:
        sha256 = recorded if is_sha256(recorded) else None
    return ObjectFacts(
        size_bytes=answer["ContentLength"],
        sha256=sha256,
        version_id=_version(answer.get("VersionId")),
        etag=answer.get("ETag"),
        sha256_by_store=by_store,
    )


def _version(version_id: str | None) -> str | None:
    # "null" names the object of a bucket without versions.
    return None if version_id in (None, "", "null") else version_id


def _content_type(key: str) -> str:
    if key.endswith(".dcm"):
        return "application/dicom"
    return "application/json" if key.endswith(".json") else "application/octet-stream"


def _base64(sha256: str) -> str:
    return base64.b64encode(bytes.fromhex(sha256)).decode()
