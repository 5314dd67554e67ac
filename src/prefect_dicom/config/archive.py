"""Settings of the archive: a bucket or a directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    SecretStr,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from prefect_dicom.config.fields import PlacedPath, http_url
from prefect_dicom.config.settings import Settings


class S3Settings(Settings):
    """A bucket and how objects are put into it, without the secrets."""

    bucket: str = Field(min_length=3, max_length=63, description="Name of the bucket.")
    prefix: str = Field(default="", description="Prefix of all keys, without slashes around it.")
    endpoint: str | None = Field(default=None, description="URL of the S3 service; empty for AWS.")
    addressing: Literal["path", "virtual"] | None = Field(
        default=None,
        description="Where the bucket stands in a URL: in its path, or in the host name (virtual).",
    )
    region: str | None = Field(default=None, description="Region name.")
    profile: str | None = Field(default=None, description="Profile of the AWS configuration files.")
    encryption: Literal["none", "AES256", "aws:kms"] = Field(
        default="none", description="Server-side encryption to ask for."
    )
    kms_key_id: str | None = Field(default=None, description="Key for aws:kms.")
    storage_class: str | None = Field(default=None, description="Storage class of the objects.")
    part_bytes: int = Field(
        default=64 * 1024**2,
        ge=5 * 1024**2,
        description="Objects larger than this are sent in parts of this size.",
    )
    connections: int = Field(default=16, ge=1, le=256, description="Uploads at the same time.")

    @field_validator(
        "endpoint", "addressing", "region", "profile", "kms_key_id", "storage_class", mode="before"
    )
    @classmethod
    def _empty_is_left_out(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator("bucket")
    @classmethod
    def _bucket_is_a_name(cls, bucket: str | None) -> str | None:
        if bucket is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
            raise ValueError("expected the name of the bucket alone; `prefix` says where in it")
        return bucket

    @field_validator("prefix")
    @classmethod
    def _prefix_is_relative(cls, prefix: str) -> str:
        parts = prefix.removesuffix("/").split("/") if prefix else []
        if any(part in ("", ".", "..") for part in parts) or any(ord(c) < 32 for c in prefix):
            raise ValueError(
                "expected names with single slashes between them, like research/cohorts"
            )
        return prefix.removesuffix("/")

    @field_validator("endpoint")
    @classmethod
    def _endpoint_is_a_url(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        url = http_url(endpoint)
        if url is None or re.search(r"\s", endpoint):
            raise ValueError("expected a URL like https://s3.example.org:9000")
        if "@" in url.netloc or url.query or url.fragment:
            raise ValueError(
                "expected a URL of scheme, host and port alone; credentials come from the "
                "environment or a Prefect block"
            )
        return endpoint

    @field_validator("kms_key_id")
    @classmethod
    def _key_has_its_encryption(cls, key: str | None, info: ValidationInfo) -> str | None:
        if key is not None and info.data.get("encryption", "aws:kms") != "aws:kms":
            raise ValueError(
                "expected only together with `encryption: aws:kms`; set that, or leave the key out"
            )
        return key


class S3Archive(S3Settings):
    """A bucket. Credentials come from boto3's own chain or a Prefect block.

    The three secrets are for blocks alone: a site file that names them is refused.
    """

    access_key_id: SecretStr | None = Field(
        default=None, description="Access key, from a block only."
    )
    secret_access_key: SecretStr | None = Field(default=None, description="Its secret.")
    session_token: SecretStr | None = Field(
        default=None, description="Token of temporary credentials."
    )

    @model_validator(mode="after")
    def _key_and_secret_come_together(self) -> S3Archive:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError("expected an access key and its secret together, or neither")
        return self


class DirectoryArchive(Settings):
    """A directory with the same protocol as a bucket: temporary name, fsync, rename."""

    directory: PlacedPath = Field(description="Where the archive lies.")
    connections: int = Field(default=4, ge=1, le=64, description="Writes at the same time.")


def _kind_of(value: Any) -> str | None:
    """Which of the two archives is meant, so that only its own faults are reported."""
    if isinstance(value, S3Archive):
        return "bucket"
    if isinstance(value, DirectoryArchive):
        return "directory"
    if not isinstance(value, Mapping) or ("bucket" in value) == ("directory" in value):
        return None
    return "bucket" if "bucket" in value else "directory"


AnyArchive = Annotated[
    Annotated[S3Archive, Tag("bucket")] | Annotated[DirectoryArchive, Tag("directory")],
    Discriminator(
        _kind_of,
        custom_error_type="archive_choice",
        custom_error_message="expected exactly one of `bucket` (S3) and `directory`",
    ),
]
"""A bucket or a directory, told apart by their keys."""
