"""Prefect blocks: the parts of a site, stored and edited in Prefect's server instead of a file.

Each block *is* the settings of :mod:`prefect_dicom.config.site` that it is named after, with
the same checks, and adds the secrets, which a file must not hold. A block is in no folder, so its
paths are absolute.

Prefect stores a block's secrets encrypted and shows them as stars. A block object that is passed
to a flow as a parameter is stored with the stars too, and a retried run would get these: pass a
reference (``block:NAME``, :func:`resolve_site`) instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from prefect.blocks import system
from prefect.blocks.core import Block
from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from prefect_dicom.config.archive import DirectoryArchive, S3Archive, S3Settings
from prefect_dicom.config.fields import NodeName, PlacedPath
from prefect_dicom.config.messages import faults_of
from prefect_dicom.config.node import PacsNode
from prefect_dicom.config.receiver import Receiver
from prefect_dicom.config.settings import Settings
from prefect_dicom.config.site import Ledger, Plain, Site, Spool, load_site, on_this_host
from prefect_dicom.config.tls import Tls
from prefect_dicom.config.tls_context import files_of
from prefect_dicom.core.errors import ConfigurationError, PrefectDicomError

__all__ = [
    "DicomArchive",
    "DicomLedger",
    "DicomPacs",
    "DicomReceiver",
    "DicomSite",
    "resolve_site",
]

BLOCK_REFERENCE = "block:"
"""Prefix of a reference to a :class:`DicomSite` block."""

_STANDARD = "https://dicom.nema.org/medical/dicom/current/output/html/"
_ABOUT_BLOCKS = "https://docs.prefect.io/v3/concepts/blocks"
# Prefect takes a text for the URL of a block type, and declares an HttpUrl.

# Prefect writes these beside a block's own values when it stores it inside another.
_METADATA = {"block_type_slug", "_block_document_id", "_block_document_name", "_is_anonymous"}


class _BlockSettings(Settings):
    """Settings that Prefect stores: unknown keys are faults, except for Prefect's own metadata."""

    @model_validator(mode="before")
    @classmethod
    def _without_metadata(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            return {key: value for key, value in values.items() if key not in _METADATA}
        return values


def _absolute(path: Path | None) -> Path | None:
    if path is not None and not path.is_absolute():
        raise ValueError("expected an absolute path; a block lies in no folder")
    return path


def _absolute_tls(tls: bool | Tls | None) -> bool | Tls | None:
    if isinstance(tls, Tls):
        for path in files_of(tls):
            _absolute(path)
    return tls


def _plain(kind: type[Plain], block: Settings, **changed: Any) -> Plain:
    names = kind.model_fields.keys() - changed.keys()
    return kind(**{name: getattr(block, name) for name in names}, **changed)


# Blocks come first among the bases: their schema hook is kept, our stricter settings win.
class DicomPacs(Block, _BlockSettings, PacsNode):
    """One PACS: its address, our AE title there, and how instances are retrieved from it.

    Example:
        Load a PACS and send it a C-ECHO with DCMTK:
        ```python
        from prefect_dicom.blocks import DicomPacs

        pacs = DicomPacs.load("BLOCK_NAME")
        print("echoscu", "-aec", pacs.called_ae_title, pacs.host, pacs.port)
        ```
    """

    _block_type_name = "DICOM PACS"
    _block_type_slug = "dicom-pacs"
    _documentation_url = f"{_STANDARD}part04.html#chapter_C"  # type: ignore[assignment]

    _tls_is_absolute = field_validator("tls")(_absolute_tls)

    def settings(self) -> PacsNode:
        """Return the plain settings."""
        return _plain(PacsNode, self)


class DicomReceiver(Block, _BlockSettings, Receiver):
    """The managed storage SCP that C-MOVE sends to.

    Example:
        Load the receiver and print what the PACS must be configured with:
        ```python
        from prefect_dicom.blocks import DicomReceiver

        receiver = DicomReceiver.load("BLOCK_NAME")
        print(receiver.ae_title, receiver.bind, receiver.port)
        ```
    """

    _block_type_name = "DICOM Receiver"
    _block_type_slug = "dicom-receiver"
    _documentation_url = f"{_STANDARD}part04.html#chapter_B"  # type: ignore[assignment]

    _tls_is_absolute = field_validator("tls")(_absolute_tls)

    def settings(self) -> Receiver:
        """Return the plain settings."""
        return _plain(Receiver, self)


class DicomArchive(Block, _BlockSettings, S3Settings):
    """Destination of studies: a bucket, with credentials where needed, or a directory.

    Without credentials here, boto3 looks for them itself: environment, profile, instance role.

    Example:
        Load an archive and say where it lies:
        ```python
        from prefect_dicom.blocks import DicomArchive

        archive = DicomArchive.load("BLOCK_NAME")
        print(archive.bucket or archive.directory)
        ```
    """

    _block_type_name = "DICOM Archive"
    _block_type_slug = "dicom-archive"
    _documentation_url = _ABOUT_BLOCKS  # type: ignore[assignment]

    # Fields that are optional here are completed or checked by settings().
    bucket: str | None = Field(  # type: ignore[assignment]
        None, min_length=3, max_length=63, description="Name of the bucket; or give a directory."
    )
    connections: int | None = Field(  # type: ignore[assignment]
        None,
        ge=1,
        le=256,
        description="Uploads at the same time; empty for 16 to a bucket, 4 to a directory.",
    )
    directory: PlacedPath | None = Field(
        None, description="A directory to archive into, instead of a bucket."
    )
    aws_access_key_id: SecretStr | None = Field(None, description="Access key of the bucket.")
    aws_secret_access_key: SecretStr | None = Field(
        None, description="Secret that belongs to the access key."
    )
    aws_session_token: SecretStr | None = Field(
        None, description="Session token of temporary credentials."
    )

    _directory_is_absolute = field_validator("directory")(_absolute)

    @model_validator(mode="after")
    def _is_one_kind_of_archive(self) -> DicomArchive:
        try:
            self.settings()
        except ValidationError as error:
            kind = S3Archive if self.directory is None else DirectoryArchive
            raise ValueError("; ".join(faults_of(error, kind))) from None
        return self

    def settings(self) -> S3Archive | DirectoryArchive:
        """Return the plain settings, with the credentials.

        Raises
        ------
        ValueError
            If it is not exactly one of bucket and directory.
        """
        if (self.bucket is None) == (self.directory is None):
            raise ValueError("expected exactly one of `bucket` (S3) and `directory`")
        own = {} if self.connections is None else {"connections": self.connections}
        if self.directory is not None:
            of_no_use = [
                name
                for name in (DicomArchive.model_fields.keys() - {"directory", "connections"})
                if getattr(self, name) != DicomArchive.model_fields[name].default
            ]
            if of_no_use:
                raise ValueError(
                    f"expected no {', '.join(sorted(of_no_use))} together with `directory`"
                )
            return DirectoryArchive(directory=self.directory, **own)
        shared = {name: getattr(self, name) for name in S3Settings.model_fields}
        return S3Archive(
            **{**shared, "connections": S3Archive.model_fields["connections"].default, **own},
            access_key_id=self.aws_access_key_id,
            secret_access_key=self.aws_secret_access_key,
            session_token=self.aws_session_token,
        )


class DicomLedger(Block, _BlockSettings, Ledger):
    """Store of the state of every study: a SQLite file, or PostgreSQL by URL.

    Example:
        Load a ledger; its URL stays a secret:
        ```python
        from prefect_dicom.blocks import DicomLedger

        ledger = DicomLedger.load("BLOCK_NAME")
        print(ledger.path or ledger.url)
        ```
    """

    _block_type_name = "DICOM Ledger"
    _block_type_slug = "dicom-ledger"
    _documentation_url = _ABOUT_BLOCKS  # type: ignore[assignment]

    path: PlacedPath | None = Field(None, description="SQLite file; or give a URL.")
    url: SecretStr | None = Field(
        None, description="postgresql+psycopg://user:password@host:5432/database, instead of path."
    )

    _path_is_absolute = field_validator("path")(_absolute)

    @model_validator(mode="before")
    @classmethod
    def _file_beside_the_site(cls, values: Any) -> Any:
        # No file lies beside a block: there is no default.
        if isinstance(values, Mapping) and values.get("path") is values.get("url") is None:
            raise ValueError("expected exactly one of `path` and `url`")
        return values

    def settings(self) -> Ledger:
        """Return the plain settings, with the password."""
        return _plain(Ledger, self)


class DicomSite(Block, _BlockSettings, Site):
    """One site: its PACS nodes, receiver, archive, ledger and spool.

    Nodes are stored with the site; archive, ledger and receiver are referred to if they were
    saved as blocks of their own.

    Example:
        Load a site and use it where a site file could be used:
        ```python
        from prefect_dicom.blocks import DicomSite

        site_block = DicomSite.load("BLOCK_NAME")
        site = site_block.site()
        ```
    """

    _block_type_name = "DICOM Site"
    _block_type_slug = "dicom-site"
    _documentation_url = _ABOUT_BLOCKS  # type: ignore[assignment]

    nodes: dict[NodeName, DicomPacs] = Field(  # type: ignore[assignment]
        min_length=1, description="PACS nodes by a name of your choice."
    )
    receiver: DicomReceiver = Field(
        default_factory=DicomReceiver, description="The managed receiver."
    )
    archive: DicomArchive = Field(  # type: ignore[assignment]
        description="Where studies are archived."
    )
    ledger: DicomLedger = Field(description="Where state is kept.")
    reports: PlacedPath | None = Field(  # type: ignore[assignment]
        None, description="Where result tables are written; empty for reports beside the spool."
    )

    _reports_are_absolute = field_validator("reports")(_absolute)
    _tls_is_absolute = field_validator("tls")(_absolute_tls)

    # `tls: true` is stored as it is: `site` puts the site's keys in its place.

    @field_validator("nodes")
    @classmethod
    def _nodes_have_their_tls(cls, nodes: Any, info: ValidationInfo) -> Any:
        return nodes

    @field_validator("receiver")
    @classmethod
    def _receiver_has_its_tls(cls, receiver: Any, info: ValidationInfo) -> Any:
        return receiver

    @field_validator("spool")
    @classmethod
    def _spool_is_absolute(cls, spool: Spool) -> Spool:
        _absolute(spool.path)
        return spool

    def site(self) -> Site:
        """Return the plain settings, as :func:`prefect_dicom.config.site.load_site` does."""
        return _plain(
            Site,
            self,
            nodes={name: node.settings() for name, node in self.nodes.items()},
            receiver=self.receiver.settings(),
            archive=self.archive.settings(),
            ledger=self.ledger.settings(),
            reports=self.reports or self.spool.path.parent / "reports",
        )


def resolve_site(reference: str) -> Site:
    """Load the site that a flow parameter or a command names.

    Parameters
    ----------
    reference : str
        ``block:NAME`` for the :class:`DicomSite` block NAME, or the path of a site file.

    Raises
    ------
    ConfigurationError
        If the file or block does not exist or has faults.
    """
    if not reference.startswith(BLOCK_REFERENCE):
        return load_site(reference)
    name = reference.removeprefix(BLOCK_REFERENCE)
    try:
        # Also in an asynchronous flow this function returns a site and nothing to wait for.
        block = cast(DicomSite, DicomSite.load(name, _sync=True))  # type: ignore[call-arg]
    except ValueError:
        fault = f"no block of this name; save one as DicomSite(…).save({name!r}), or give a file"
        raise ConfigurationError(reference, [fault]) from None
    except RuntimeError as error:
        # How Prefect reports that a stored block no longer passes its class's checks.
        if not isinstance(error.__cause__, ValidationError):
            raise
        raise ConfigurationError(reference, faults_of(error.__cause__, DicomSite)) from None
    return on_this_host(block.site())


def secret_text(name: str) -> str:
    """Text of a Prefect Secret block: the key of a project.

    Raises
    ------
    PrefectDicomError
        ``project-key-missing``: there is none, or it cannot be read.
    """
    try:
        block = cast(
            system.Secret[str],
            system.Secret.load(name, _sync=True),  # type: ignore[call-arg]
        )
    except (ValueError, RuntimeError) as error:
        detail = f"Prefect block secret/{name}: {type(error).__name__}"
        raise PrefectDicomError("project-key-missing", detail) from None
    return str(block.get())
