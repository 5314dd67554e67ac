"""Multipart upload of one object: the same requests for runs and for the self-test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from prefect_dicom.archive.s3_connection import S3Clients, S3Connection
from prefect_dicom.archive.s3_dialect import Operation, RequestForm
from prefect_dicom.archive.s3_errors import S3Error, S3RequestError
from prefect_dicom.archive.s3_put import base64_digest, check_echo, content_headers
from prefect_dicom.archive.source import Source


class MultipartUpload:
    """An upload in parts; a context manager that aborts it where the block ends by an error.

    Parameters
    ----------
    connection : S3Connection
        Connection to the bucket.
    bucket : str
        The bucket.
    key : str
        Key without the prefix.
    arguments : mapping, optional
        What is said of the object at its creation, as arguments of boto3.
    """

    def __init__(
        self,
        connection: S3Connection,
        bucket: str,
        key: str,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self._s3 = connection
        self._key = key
        self._where = {"Bucket": bucket, "Key": connection.prefix + key}
        self._arguments = arguments or {}
        self._parts: list[dict[str, Any]] = []
        self._upload = ""

    def __enter__(self) -> Self:
        def create(form: RequestForm) -> Mapping[str, Any]:
            algorithm = {"ChecksumAlgorithm": "SHA256"} if form.checksum else {}
            arguments = {**self._where, **algorithm, **self._arguments}

            def request(clients: S3Clients) -> Mapping[str, Any]:
                answer: Mapping[str, Any] = clients.client.create_multipart_upload(**arguments)
                return answer

            return self._s3.call(request)

        upload = self._s3.dialect.send(Operation.CREATE, create).get("UploadId")
        if not upload:
            raise S3RequestError(
                S3Error("archive-unavailable", "an upload was answered without UploadId")
            )
        self._upload = upload
        return self

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            self.abort()

    def abort(self) -> None:
        """Abort the upload; a failure is logged."""
        self._s3.abort_upload(self._where["Key"], self._upload)

    def send(
        self, source: Source, sha256: str, offset: int, length: int, *, signed: str | None = None
    ) -> None:
        """Send the next part.

        Parameters
        ----------
        sha256 : str
            Hexadecimal hash of the part.
        signed : str, optional
            Hash to sign instead, for the self-test.

        Raises
        ------
        S3RequestError
            The part was refused, or is not answered as one.
        """
        number = len(self._parts) + 1
        query = {"partNumber": str(number), "uploadId": self._upload}

        def send(form: RequestForm) -> tuple[Mapping[str, str], RequestForm]:
            headers = content_headers(form, source, sha256, offset, length)
            answer = self._s3.call(
                lambda clients: clients.put.send(
                    self._key,
                    source,
                    headers,
                    sha256=signed or sha256,
                    offset=offset,
                    length=length,
                    query=query,
                )
            )
            return answer, form

        answer, form = self._s3.dialect.send(Operation.PART, send)
        etag = answer.get("ETag")
        if etag is None:
            no_etag = S3Error("archive-unavailable", "a part was answered without ETag")
            raise S3RequestError(no_etag)
        check_echo(answer, sha256)
        part = {"PartNumber": number, "ETag": etag}
        if form.checksum:
            part["ChecksumSHA256"] = base64_digest(sha256)
        self._parts.append(part)

    def complete(self) -> None:
        """Make the object of the parts, on condition that none is there.

        Raises
        ------
        S3RequestError
            Also where the answer was lost: then the object may be there.
        """

        def complete(form: RequestForm) -> Mapping[str, Any]:
            parts = self._parts if form.checksum else [_without_checksum(p) for p in self._parts]
            condition = {"IfNoneMatch": "*"} if form.condition else {}

            def request(clients: S3Clients) -> Mapping[str, Any]:
                answer: Mapping[str, Any] = clients.client.complete_multipart_upload(
                    **self._where,
                    **condition,
                    UploadId=self._upload,
                    MultipartUpload={"Parts": parts},
                )
                return answer

            return self._s3.call(request)

        self._s3.dialect.send(Operation.COMPLETE, complete)


def _without_checksum(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name != "ChecksumSHA256"}
