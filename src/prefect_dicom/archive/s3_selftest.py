"""Self-test of a bucket: what the service honours, tried on probe objects below ``probes/``."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from prefect_dicom.archive.base import Archive, Check
from prefect_dicom.archive.s3_connection import S3Connection
from prefect_dicom.archive.s3_errors import S3RequestError
from prefect_dicom.archive.s3_put import base64_digest
from prefect_dicom.archive.source import BytesSource
from prefect_dicom.core.errors import ArchiveConflict, ArchiveError
from prefect_dicom.core.reasons import reason_for

_UNSIGNED = (
    "The service does not compare what it gets with the signature: bytes may change on the way to "
    "it unseen. Use another service; with this one only TLS and `prefect-dicom verify --level "
    "read` guard the bytes."
)


class S3SelfTest:
    """Self-test of one bucket. Each step returns an advice, empty if the step passed.

    Parameters
    ----------
    archive : Archive
        The archive in the bucket.
    connection : S3Connection
        Its connection.
    bucket : str
        Its bucket.
    """

    def __init__(self, archive: Archive, connection: S3Connection, bucket: str) -> None:
        self._archive = archive
        self._s3 = connection
        self._bucket = bucket
        self._key = f"probes/{secrets.token_hex(8)}"
        self._name = connection.prefix + self._key
        self._written: set[str] = set()

    def checks(self) -> list[Check]:
        """Run all steps; stops early if the bucket cannot be listed or written."""
        checks = [
            self._check_step("the bucket exists and may be listed", True, self._listed),
        ]
        if checks[-1].ok:
            checks.append(self._check_step("objects can be written", True, self._writable))
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
            checks.append(self._check_step(name, required, step))
        return checks

    def _check_step(self, name: str, required: bool, step: Callable[[], str]) -> Check:
        try:
            advice = step()
        except S3RequestError as refused:
            error = refused.archive_error()
            advice = f"{error}. {error.reason.what_to_do}"
        except ArchiveError as error:
            advice = f"{error}. {error.reason.what_to_do}"
        return Check(name, not advice, advice, required)

    def _listed(self) -> str:
        try:
            self._s3.call(lambda s3: s3.client.head_bucket(Bucket=self._bucket))
        except S3RequestError as refused:
            if refused.s3_error.absent:
                # HEAD has no body that could tell a bucket from an object.
                raise ArchiveError("archive-missing", refused.s3_error.detail) from None
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
            "The service replaces objects despite the condition; deny that by bucket policy or "
            "object lock, or use another service."
        )

    def _signed_payload(self) -> str:
        # The checksum header is right, so that only the signature can be the cause.
        if self._refused("-signed", signed=b"other", checksum=b"sent"):
            return ""
        return _UNSIGNED

    def _signed_part(self) -> str:
        source = BytesSource(b"sent")
        with self._upload() as upload:
            header = {"x-amz-checksum-sha256": base64_digest(source.sha256)}
            query = {"partNumber": "1", "uploadId": upload}
            other = BytesSource(b"other").sha256
            try:
                self._send(source, header, other, query)
            except S3RequestError as refused:
                if reason_for(refused.s3_error.code).refuses_wrong_hash:
                    return ""
                raise
        return _UNSIGNED

    def _checksum(self) -> str:
        if self._refused("-checksum", signed=b"sent", checksum=b"other"):
            return ""
        return "The service ignores checksum headers; the signed hash has to do."

    def _refused(self, suffix: str, *, signed: bytes, checksum: bytes) -> bool:
        """Whether the service refuses the bytes ``sent`` with hashes of other bytes."""
        header = {"x-amz-checksum-sha256": base64_digest(hashlib.sha256(checksum).hexdigest())}
        signature = hashlib.sha256(signed).hexdigest()
        source = BytesSource(b"sent")
        try:
            self._send(source, header, signature, suffix=suffix)
        except S3RequestError as refused:
            if reason_for(refused.s3_error.code).refuses_wrong_hash:
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
        source = BytesSource(b"other")
        with self._upload() as upload:
            query = {"partNumber": "1", "uploadId": upload}
            part = self._send(source, {}, source.sha256, query)
            try:
                self._s3.call(
                    lambda s3: s3.client.complete_multipart_upload(
                        Bucket=self._bucket,
                        Key=self._name,
                        UploadId=upload,
                        MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
                        IfNoneMatch="*",
                    )
                )
            except S3RequestError as refused:
                if refused.s3_error.exists:
                    return ""
                raise
        return (
            "The service ignores the condition of a completion; objects above `part_bytes` are "
            "looked for before and after instead."
        )

    @contextmanager
    def _upload(self) -> Iterator[str]:
        """Start a multipart upload over the probe object; it is aborted at the end."""
        upload = self._s3.call(
            lambda s3: s3.client.create_multipart_upload(Bucket=self._bucket, Key=self._name)
        )["UploadId"]
        try:
            yield upload
        finally:
            self._s3.abort_upload(self._name, upload)

    def _private(self) -> str:
        if self._s3.call(lambda s3: s3.put.is_public(self._key)):
            return "Anybody can read the archive: block public access to the bucket."
        return ""

    def _cleaned(self) -> str:
        left = [name for name in sorted(self._written) if not self._delete(name)]
        if not left:
            return ""
        return (
            "These credentials may not delete, which is right for an archive. Left behind: "
            + ", ".join(left)
        )

    def _delete(self, name: str) -> bool:
        bucket = self._bucket
        try:
            self._s3.call(lambda s3: s3.client.delete_object(Bucket=bucket, Key=name))
        except S3RequestError:
            return False
        return True

    def _send(
        self,
        source: BytesSource,
        headers: Mapping[str, str],
        sha256: str,
        query: Mapping[str, str] | None = None,
        suffix: str = "",
    ) -> Mapping[str, str]:
        key = self._key + suffix
        return self._s3.call(
            lambda s3: s3.put.send(key, source, headers, sha256=sha256, query=query)
        )
