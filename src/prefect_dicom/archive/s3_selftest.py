"""Self-test of a bucket: what the service honours, tried on probe objects below ``probes/``.

Over the same requests as those of runs, in the same forms.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

from prefect_dicom.archive.base import PROBES, Check
from prefect_dicom.archive.s3_connection import S3Connection
from prefect_dicom.archive.s3_dialect import Operation
from prefect_dicom.archive.s3_errors import S3RequestError
from prefect_dicom.archive.s3_listing import list_objects
from prefect_dicom.archive.s3_multipart import MultipartUpload
from prefect_dicom.archive.s3_put import content_headers
from prefect_dicom.archive.source import BytesSource
from prefect_dicom.core.errors import ArchiveError
from prefect_dicom.core.reasons import reason_for

if TYPE_CHECKING:
    from prefect_dicom.archive.s3 import BucketArchive

_UNSIGNED = (
    "The service does not compare what it gets with the signature: bytes may change on the way to "
    "it unseen. Use another service; with this one only TLS and `prefect-dicom verify --level "
    "read` guard the bytes."
)


class S3SelfTest:
    """Self-test of one bucket. Each step returns an advice, empty if the step passed.

    Parameters
    ----------
    archive : BucketArchive
        The archive in the bucket.
    connection : S3Connection
        Its connection.
    bucket : str
        Its bucket.
    probe_key : str
        Key of the probe object of runs.
    """

    def __init__(
        self, archive: BucketArchive, connection: S3Connection, bucket: str, probe_key: str
    ) -> None:
        self._archive = archive
        self._s3 = connection
        self._bucket = bucket
        self._probe_key = probe_key
        self._overwrites: ArchiveError | None = None
        self._key = f"{PROBES}{secrets.token_hex(8)}"
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
            ("requests are taken as AWS takes them", False, self._dialect),
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
        # Not HeadBucket, whose answer has no body to tell what is wrong.
        next(list_objects(self._s3, self._bucket, self._s3.prefix + self._key), None)
        return ""

    def _writable(self) -> str:
        if self._archive.head(self._probe_key) is None:
            self._written.add(self._s3.prefix + self._probe_key)
        try:
            self._archive.check_usable()
        except ArchiveError as error:
            if error.code != "archive-overwrites":
                raise
            self._overwrites = error
        self._archive.put_probe(self._key, b"probe", condition=self._overwrites is None)
        self._written.add(self._name)
        return ""

    def _condition(self) -> str:
        if self._overwrites is not None:
            raise self._overwrites
        if self._archive.put_probe(self._key, b"other"):
            raise ArchiveError("archive-overwrites", "other bytes have replaced an object")
        return ""

    def _signed_payload(self) -> str:
        # The checksum header is right, so that only the signature can be the cause.
        if self._refused("-signed", signed=b"other", checksum=b"sent"):
            return ""
        return _UNSIGNED

    def _signed_part(self) -> str:
        sent, other = BytesSource(b"sent"), BytesSource(b"other")
        with self._upload() as upload:
            # A right part is taken, so that only the signature can be the cause.
            upload.send(sent, sent.sha256, 0, sent.size_bytes)
            try:
                upload.send(sent, sent.sha256, 0, sent.size_bytes, signed=other.sha256)
            except S3RequestError as refused:
                if not reason_for(refused.s3_error.code).refuses_wrong_hash:
                    raise
                advice = ""
            else:
                advice = _UNSIGNED
            upload.abort()
        return advice

    def _checksum(self) -> str:
        if not self._s3.dialect.form(Operation.PUT).checksum:
            return "The service refuses checksum headers; the signed hash has to do."
        if self._refused("-checksum", signed=b"sent", checksum=b"other"):
            return ""
        return "The service ignores checksum headers; the signed hash has to do."

    def _refused(self, suffix: str, *, signed: bytes, checksum: bytes) -> bool:
        """Whether the service refuses the bytes ``sent`` with hashes of other bytes.

        What it takes with the right hashes is known: it has taken the probe object.
        """
        source = BytesSource(b"sent")
        headers = content_headers(
            self._s3.dialect.form(Operation.PUT), source, BytesSource(checksum).sha256
        )
        key, signature = self._key + suffix, BytesSource(signed).sha256
        try:
            self._s3.call(lambda s3: s3.put.send(key, source, headers, sha256=signature))
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
        other = BytesSource(b"other")
        try:
            with self._upload() as upload:
                upload.send(other, other.sha256, 0, other.size_bytes)
                upload.complete()
        except S3RequestError as refused:
            if refused.s3_error.exists:
                return ""
            raise
        return (
            "The service ignores the condition of a completion; objects above `part_bytes` are "
            "looked for before and after instead."
        )

    def _upload(self) -> MultipartUpload:
        """A multipart upload over the probe object."""
        return MultipartUpload(self._s3, self._bucket, self._key)

    def _dialect(self) -> str:
        if differences := self._s3.dialect.differences():
            return "; ".join(differences) + ". Requests are sent so; the signed hash guards them."
        return ""

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
