"""A site in one YAML file: its PACS nodes, receiver, archive, ledger and spool.

Typed with pydantic; :func:`load_site` reports every fault of a file at once. Secrets are never
in the file: they come from the environment (boto3's own chain, ``PREFECT_DICOM_LEDGER_URL``)
or from Prefect blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from prefect_dicom.model import InformationModel, RetrieveMethod


class Settings(BaseModel):
    """Base of all parts: unknown keys are faults, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Timeouts(Settings):
    """How long to wait for a PACS node, in seconds."""

    connect_seconds: float = Field(10, gt=0, description="For the TCP connection.")
    acse_seconds: float = Field(30, gt=0, description="For the answer to an A-ASSOCIATE-RQ.")
    find_seconds: float = Field(300, gt=0, description="Between two answers of a C-FIND.")
    first_byte_seconds: float = Field(
        1800, gt=0, description="From a retrieve request to the first instance or answer."
    )
    stall_seconds: float = Field(
        300, gt=0, description="Between two instances or answers of a retrieve."
    )
    settle_seconds: float = Field(
        10,
        ge=0,
        description="Quiet time after which nothing more is expected from a finished C-MOVE.",
    )


class Limits(Settings):
    """What a node may be asked for at a time."""

    associations: int = Field(2, ge=1, le=64, description="Chunks retrieved at the same time.")
    chunk_studies: int = Field(20, ge=1, le=200, description="Studies in one chunk.")
    chunk_instances: int = Field(2000, ge=1, description="Listed instances in one request.")
    chunk_bytes: int = Field(
        2 * 1024**3, ge=1, description="Estimated bytes in one request; see instance_bytes."
    )
    instance_bytes: int = Field(
        524_288, ge=1, description="Estimated size of one instance, for chunk_bytes."
    )
    uids_per_request: int = Field(
        50, ge=1, le=1000, description="UIDs in one list of a C-MOVE, C-GET or C-FIND."
    )


class PacsNode(Settings):
    """One PACS: its address, our name there, and how it hands over instances."""

    host: str = Field(min_length=1, description="Host name or IP address of the PACS.")
    port: int = Field(ge=1, le=65535, description="Port of the PACS.")
    called_ae_title: str = Field(description="AE title of the PACS, in exact case.")
    calling_ae_title: str = Field("PREFECTDICOM", description="Our AE title at the PACS.")
    information_model: InformationModel = Field(
        InformationModel.STUDY_ROOT, description="Query/Retrieve information model."
    )
    retrieve: RetrieveMethod = Field(
        RetrieveMethod.C_MOVE, description="c-move (needs the receiver) or c-get."
    )
    limits: Limits = Field(default_factory=Limits, description="What it may be asked at a time.")
    timeouts: Timeouts = Field(default_factory=Timeouts, description="How long to wait for it.")


class Receiver(Settings):
    """The managed storage SCP that C-MOVE sends to."""

    ae_title: str = Field("PREFECTDICOM", description="AE title the PACS knows as destination.")
    bind: str = Field("127.0.0.1", description="Address of this host to listen on.")
    port: int = Field(11112, ge=1, le=65535, description="Port to listen on.")
    allowed_senders: tuple[str, ...] = Field(
        (),
        description="Addresses or networks (CIDR) that may connect. Empty: those of the nodes.",
    )
    associations: int = Field(64, ge=1, description="Associations at the same time.")
    idle_seconds: float = Field(
        30, ge=0, description="How long it stays after the last run has left."
    )


class S3Archive(Settings):
    """A bucket. Credentials come from boto3's own chain or a Prefect block."""

    bucket: str = Field(min_length=3, max_length=63, description="Name of the bucket.")
    prefix: str = Field("", description="Prefix of all keys, without a leading slash.")
    endpoint: str | None = Field(None, description="URL of the S3 service; empty for AWS.")
    region: str | None = Field(None, description="Region name.")
    profile: str | None = Field(None, description="Profile of the AWS configuration files.")
    encryption: Literal["none", "AES256", "aws:kms"] = Field(
        "none", description="Server-side encryption to ask for."
    )
    kms_key_id: str | None = Field(None, description="Key for aws:kms.")
    storage_class: str | None = Field(None, description="Storage class of the objects.")
    part_bytes: int = Field(
        64 * 1024**2,
        ge=5 * 1024**2,
        description="Objects larger than this are sent in parts of this size.",
    )
    connections: int = Field(16, ge=1, le=256, description="Uploads at the same time.")


class DirectoryArchive(Settings):
    """A directory with the same protocol as a bucket: temporary name, fsync, rename."""

    directory: Path = Field(description="Where the archive lies.")
    connections: int = Field(4, ge=1, le=64, description="Writes at the same time.")


class Ledger(Settings):
    """Where the state of every study is kept: a SQLite file, or PostgreSQL by URL.

    A URL with a password belongs into ``PREFECT_DICOM_LEDGER_URL``, not into the file.
    """

    path: Path | None = Field(None, description="SQLite file.")
    url: str | None = Field(None, description="postgresql+psycopg://… URL without a password.")


class Spool(Settings):
    """Where arriving objects lie until they are archived."""

    path: Path = Field(description="A directory of its own on a local disk, mode 0700.")
    reserve_bytes: int = Field(
        2 * 1024**3, ge=0, description="Free space that is never used; 0xA700 below it."
    )


class Validation(Settings):
    """What to do with an instance that is faulty at its source (it arrives the same twice)."""

    faulty: Literal["archive", "leave-out"] = Field(
        "archive", description="archive it with a warning, or leave-out and name it."
    )


class Site(Settings):
    """One site: everything a run needs to know but the cohort."""

    nodes: dict[str, PacsNode] = Field(description="PACS nodes by a name of your choice.")
    receiver: Receiver = Field(default_factory=Receiver, description="The managed receiver.")
    archive: S3Archive | DirectoryArchive = Field(description="Where studies are archived.")
    ledger: Ledger = Field(default_factory=Ledger, description="Where state is kept.")
    spool: Spool = Field(description="Where arriving objects lie.")
    validation: Validation = Field(default_factory=Validation, description="Faulty instances.")
    reports: Path = Field(Path("reports"), description="Where result tables are written.")
