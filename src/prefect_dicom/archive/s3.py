"""An archive in a bucket of any service that speaks S3.

Objects up to ``part_bytes`` are put by :class:`~prefect_dicom.archive.s3_put.SignedPut`, larger
ones as multipart uploads whose parts are put the same way; everything else is boto3. The SHA-256
taken on arrival is signed with the bytes, sent as their checksum where the service takes that, and
recorded as metadata (``x-amz-meta-sha256``), which services return that drop checksums.

Before the first object a probe object is put on condition that there is none: a service that does
not keep to the condition would overwrite what is archived, and gets nothing.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from botocore.exceptions import ClientError

from prefect_dicom.archive.base import (
    BLOCK_BYTES,
    PROBES,
    Archive,
    Check,
    ObjectFacts,
    checked_key,
)
from prefect_dicom.archive.s3_connection import (
    RETRY_POLICY,
    S3_FAILURES,
    Contradiction,
    RetryPolicy,
    S3Clients,
    S3Connection,
    classify,
)
from prefect_dicom.archive.s3_dialect import Operation, RequestForm
from prefect_dicom.archive.s3_errors import S3Error, S3RequestError
from prefect_dicom.archive.s3_listing import list_objects
from prefect_dicom.archive.s3_multipart import MultipartUpload
from prefect_dicom.archive.s3_put import check_echo, content_headers
from prefect_dicom.archive.s3_selftest import S3SelfTest
from prefect_dicom.archive.source import BytesSource, FileSource, Source, sha256_of
from prefect_dicom.config.archive import S3Archive
from prefect_dicom.core.errors import ArchiveConflict, ArchiveError
from prefect_dicom.core.model import ArchivedInstance
from prefect_dicom.core.uids import is_sha256

PROBE_KEY = f"{PROBES}if-none-match"
"""Key of the object that shows whether the service keeps to the condition of a put."""
PROBE = b"prefect-dicom puts these bytes to see that nothing is overwritten\n"
"""Its bytes, always the same ones: nothing is lost where they replace themselves."""
_UNSAID = {400, 403, 405, 501}
"""Statuses whose cause is in the body, which the answer to a HEAD does not have."""

_T = TypeVar("_T")


class _Exists(S3RequestError):
    """The condition of a put did not hold, at the given attempt."""

    def __init__(self, error: S3Error, sent: int) -> None:
        super().__init__(error)
        self.sent = sent


class BucketArchive(Archive):
    """An archive in a bucket; connects on first use.

    Parameters
    ----------
    settings : S3Archive
        Bucket, prefix, endpoint and credentials.
    retries : RetryPolicy, optional
        Attempts, pauses and time-outs of one request.

    Raises
    ------
    ArchiveError
        By any method: ``archive-refused`` (credentials, permission, settings),
        ``archive-missing`` (no such bucket), ``archive-unavailable`` (no answer, overload),
        ``archive-overwrites`` (conditions are not kept), ``archive-listing-faulty``,
        ``archive-full``, ``archive-checksum``, ``unexpected``.
    """

    def __init__(self, settings: S3Archive, retries: RetryPolicy = RETRY_POLICY) -> None:
        self._settings = settings
        self._s3 = S3Connection(settings, retries, self.sleep)
        self._prefix = self._s3.prefix
        self._probing = threading.Lock()
        self._usable = False

    def put_file(self, key: str, path: Path, sha256: str, size_bytes: int) -> ArchivedInstance:
        """Put a file under a new key."""
        checked_key(key)
        with FileSource(path, sha256, size_bytes, self.stopping) as source:
            return self._put(key, source)

    def put_bytes(self, key: str, data: bytes) -> ArchivedInstance:
        """Put bytes in memory under a new key."""
        return self._put(checked_key(key), BytesSource(data))

    def head(self, key: str) -> ObjectFacts | None:
        """Return the metadata of an object; None if there is none."""
        name = self._prefix + checked_key(key)
        try:
            return _facts(self._s3.call(lambda clients: self._head(clients, name)))
        except S3RequestError as refused:
            if refused.s3_error.absent:
                return None
            raise refused.archive_error() from None

    def read(self, key: str) -> Iterator[bytes]:
        """Yield an object in blocks."""
        name = self._prefix + checked_key(key)
        try:
            body = self._s3.call(
                lambda clients: clients.client.get_object(Bucket=self._settings.bucket, Key=name)
            )["Body"]
        except S3RequestError as refused:
            raise refused.archive_error() from None
        try:
            yield from body.iter_chunks(BLOCK_BYTES)
        except S3_FAILURES as error:
            raise S3RequestError(classify(error)).archive_error() from None
        finally:
            body.close()

    def keys(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Yield key and size in bytes of all objects with a prefix, in the order of keys."""
        try:
            for name, size in list_objects(self._s3, self._settings.bucket, self._prefix + prefix):
                key = name.removeprefix(self._prefix)
                if not key.startswith(PROBES) or prefix.startswith(PROBES):
                    yield key, size
        except S3RequestError as refused:
            raise refused.archive_error() from None

    def check_usable(self) -> None:
        """Put the probe object, which a service that keeps to the condition holds once."""
        with self._probing:
            if self._usable:
                return
            try:
                stored = self.put_probe(PROBE_KEY, PROBE) and self.put_probe(PROBE_KEY, PROBE)
            except S3RequestError as refused:
                raise self._why_refused(refused) from None
            if stored:
                raise ArchiveError("archive-overwrites", "a second put has replaced the first")
            self._usable = True

    def put_probe(self, key: str, data: bytes, *, condition: bool = True) -> bool:
        """Put a probe object, with the headers of any other; returns whether it was stored.

        Raises
        ------
        S3RequestError
            It was refused for another reason than that an object is there.
        """
        try:
            self._send_whole(checked_key(key), BytesSource(data), condition=condition)
        except S3RequestError as refused:
            if refused.s3_error.exists:
                return False
            raise
        return True

    def _why_refused(self, refused: S3RequestError) -> ArchiveError:
        """Return the error for a refused probe; is the condition the cause?"""
        error = refused.s3_error
        if error.may_be_a_header:
            with contextlib.suppress(S3RequestError):
                # The same bytes each time: nothing is lost if they replace themselves.
                self.put_probe(PROBE_KEY, PROBE, condition=False)
                return ArchiveError(
                    "archive-overwrites", f"{error.detail}: the service knows no If-None-Match"
                )
        return refused.archive_error()

    def check(self) -> list[Check]:
        """Run the self-test of the bucket."""
        return S3SelfTest(self, self._s3, self._settings.bucket, PROBE_KEY).checks()

    def close(self) -> None:
        """Close the connections."""
        self._s3.close()

    # ------------------------------------------------------------------ putting

    def _put(self, key: str, source: Source) -> ArchivedInstance:
        if not self._usable:
            self.check_usable()
        # Ceph takes an empty body under any signed hash.
        if not source.size_bytes and (damage := source.damage()):
            raise ArchiveError("spool-damaged", damage)
        try:
            if source.size_bytes <= self._settings.part_bytes:
                return self._put_whole(key, source)
            return self._put_parts(key, source)
        except S3RequestError as refused:
            if refused.s3_error.code == "archive-checksum":
                raise _who_is_damaged(source, refused.s3_error) from None
            raise refused.archive_error() from None

    def _put_whole(self, key: str, source: Source) -> ArchivedInstance:
        try:
            answer = self._send_whole(key, source)
        except _Exists as there:
            # After a lost answer this is probably our own put.
            return self._compared(key, source, already_there=there.sent == 1)
        if answer.get("ETag") is None:
            # Not the answer of an object store: compare what is under the key.
            return self._compared(key, source, already_there=False)
        check_echo(answer, source.sha256)
        return ArchivedInstance(
            key,
            source.sha256,
            source.size_bytes,
            version_id=_version(answer.get("x-amz-version-id")),
        )

    def _send_whole(self, key: str, source: Source, *, condition: bool = True) -> Mapping[str, str]:
        """Put an object in one request, by default on condition that none is there.

        Raises
        ------
        _Exists
            There is one.
        """

        def put(form: RequestForm) -> Mapping[str, str]:
            headers = {
                **self._object_headers(key, source.sha256),
                **content_headers(form, source, source.sha256),
                **({"If-None-Match": "*"} if condition else {}),
            }
            sent = 0

            def send(clients: S3Clients) -> Mapping[str, str]:
                nonlocal sent
                sent += 1
                return clients.put.send(
                    key, source, headers, sha256=source.sha256, wait_for_answer=sent > 1
                )

            try:
                return self._s3.call(send)
            except S3RequestError as refused:
                if refused.s3_error.exists:
                    raise _Exists(refused.s3_error, sent) from None
                raise

        return self._s3.dialect.send(Operation.PUT, put)

    def _put_parts(self, key: str, source: Source) -> ArchivedInstance:
        # Not every service honours the condition of the completion: check before and after.
        if self.head(key) is not None:
            return self._compared(key, source, already_there=True)
        bucket, arguments = self._settings.bucket, self._object_arguments(key, source.sha256)
        with MultipartUpload(self._s3, bucket, key, arguments) as upload:
            self._send_parts(source, upload)
            self._complete(key, source, upload)
        # Each part was signed with its own hash; compare for what was put in between.
        return self._compared(key, source, already_there=False, proven=True)

    def _send_parts(self, source: Source, upload: MultipartUpload) -> None:
        """Send the parts. Each is read twice: for its hash, which is signed, and for sending."""
        whole = hashlib.sha256()
        for offset in range(0, source.size_bytes, self._settings.part_bytes):
            length = min(self._settings.part_bytes, source.size_bytes - offset)
            part = hashlib.sha256()
            for block in source.blocks(offset, length):
                part.update(block)
                whole.update(block)
            upload.send(source, part.hexdigest(), offset, length)
        if whole.hexdigest() != source.sha256:
            raise ArchiveError("spool-damaged", "the file has another SHA-256 than on arrival")

    def _complete(self, key: str, source: Source, upload: MultipartUpload) -> None:
        try:
            upload.complete()
        except S3RequestError:
            # The repeat of a completion whose answer was lost gets 412 or an unknown upload.
            # What is under the key now decides.
            if self.head(key) is None:
                raise
            self._compared(key, source, already_there=False)

    def _compared(
        self, key: str, source: Source, *, already_there: bool, proven: bool = False
    ) -> ArchivedInstance:
        """Compare the object under the key with the source; other bytes are a conflict.

        A recorded hash only says what was meant to be put. Unless the bytes are ``proven`` by
        how they were put, they are read.
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
        def ask(clients: S3Clients) -> Mapping[str, Any]:
            try:
                return self._head(clients, self._prefix + key)
            except ClientError as error:
                if classify(error).absent:
                    raise Contradiction from None
                raise

        return _facts(self._call(ask))

    def _head(self, clients: S3Clients, name: str) -> Mapping[str, Any]:
        where = {"Bucket": self._settings.bucket, "Key": name}

        def ask(form: RequestForm) -> Mapping[str, Any]:
            mode = {"ChecksumMode": "ENABLED"} if form.checksum else {}
            try:
                facts: Mapping[str, Any] = clients.client.head_object(**where, **mode)
            except ClientError as error:
                if not form.checksum or _status(error) not in _UNSAID:
                    raise
                # The answer to a HEAD has no body to tell whether a header is the cause.
                raise S3RequestError(replace(classify(error), may_be_a_header=True)) from error
            return facts

        try:
            return self._s3.dialect.send(Operation.HEAD, ask)
        except (S3RequestError, ClientError) as error:
            refused = error.__cause__ if isinstance(error, S3RequestError) else error
        assert refused is not None, "raised from the answer"
        if _status(refused) in _UNSAID:
            # Nor why else: expired, another clock, a region.
            clients.client.get_object(**where, Range="bytes=0-0")["Body"].close()
        raise refused

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
        """Same as :meth:`_object_headers`, as arguments of boto3."""
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

    def _call(self, call: Callable[[S3Clients], _T]) -> _T:
        try:
            return self._s3.call(call)
        except S3RequestError as refused:
            raise refused.archive_error() from None


def _who_is_damaged(source: Source, error: S3Error) -> ArchiveError:
    """Return the error for other bytes at the service: damaged in the spool or on the way."""
    damage = source.damage()
    if damage is not None:
        return ArchiveError("spool-damaged", damage)
    return ArchiveError("archive-checksum", error.detail)


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
    if "ContentLength" not in answer:
        raise ArchiveError("archive-unavailable", "an object was answered without its size")
    return ObjectFacts(
        size_bytes=answer["ContentLength"],
        sha256=sha256,
        version_id=_version(answer.get("VersionId")),
        etag=answer.get("ETag"),
        sha256_by_store=by_store,
    )


def _status(error: object) -> int:
    """HTTP status of an answer that is an error; 0 where there is none."""
    response = getattr(error, "response", {})
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _version(version_id: str | None) -> str | None:
    # "null" names the object of a bucket without versions.
    return None if version_id in (None, "", "null") else version_id


def _content_type(key: str) -> str:
    if key.endswith(".dcm"):
        return "application/dicom"
    return "application/json" if key.endswith(".json") else "application/octet-stream"
