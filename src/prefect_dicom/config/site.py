"""A site in one YAML file: its PACS nodes, receiver, archive, ledger and spool.

Typed with pydantic; :func:`load_site` reports every fault of a file at once. Secrets are never
in the file: they come from the environment (boto3's own chain, ``PREFECT_DICOM_LEDGER_URL``)
or from Prefect blocks. So does what differs between the hosts of a site
(:data:`HOST_VARIABLES`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    PrivateAttr,
    SecretStr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from prefect_dicom.config.archive import AnyArchive, DirectoryArchive, S3Archive
from prefect_dicom.config.capabilities import NodeCapabilities, load_all_capabilities
from prefect_dicom.config.fields import NodeName, PlacedPath
from prefect_dicom.config.messages import SECRET_KEY, faults_of, format_fault
from prefect_dicom.config.node import NodeSettings, PacsNode
from prefect_dicom.config.projects import Project
from prefect_dicom.config.receiver import Metrics, Receiver
from prefect_dicom.config.settings import Settings
from prefect_dicom.config.tls import Tls
from prefect_dicom.config.tls_files import tls_faults
from prefect_dicom.config.web_node import WebNode
from prefect_dicom.config.yaml import LEDGER_URL_VARIABLE, Document, text_of
from prefect_dicom.core.errors import ConfigurationError
from prefect_dicom.core.model import Evidence, RetrieveMethod

HOST_VARIABLES = {
    "PREFECT_DICOM_RECEIVER_AE_TITLE": "ae_title",
    "PREFECT_DICOM_RECEIVER_BIND": "bind",
    "PREFECT_DICOM_RECEIVER_PORT": "port",
}
"""Environment variables that override keys of ``receiver``: each host has its own."""

CALLING_VARIABLE = "PREFECT_DICOM_CALLING_AE_TITLE"
"""Environment variable that overrides every node's ``calling_ae_title``."""

_SETTLES_WITHIN = 2
"""Factor on the settle time among the capabilities: the next one may be slower."""


_NO_TLS = "expected the keys of TLS here, or a group `tls` beside `nodes`"

Plain = TypeVar("Plain", bound=Settings)


def kind_of_node(value: Any) -> str:
    """Which protocol a node speaks, so that only the faults of its own keys are reported."""
    if isinstance(value, Mapping):
        return "dicomweb" if "dicomweb" in value else "dimse"
    return "dicomweb" if isinstance(value, WebNode) else "dimse"


AnyNode = Annotated[
    Annotated[PacsNode, Tag("dimse")] | Annotated[WebNode, Tag("dicomweb")],
    Discriminator(kind_of_node),
]


class Ledger(Settings):
    """Where the state of every study is kept: a SQLite file, or PostgreSQL by URL.

    A URL with a password belongs into ``PREFECT_DICOM_LEDGER_URL``, not into the file. With
    neither of the two it is the SQLite file ``ledger.sqlite`` beside the site file.
    """

    path: PlacedPath | None = Field(
        default=None,
        description="SQLite file; ledger.sqlite beside the site file if there is no url.",
    )
    url: SecretStr | None = Field(
        default=None, description="postgresql+psycopg://… URL without a password, instead of path."
    )

    @model_validator(mode="before")
    @classmethod
    def _file_beside_the_site(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("path") is values.get("url") is None:
            return {**values, "path": "ledger.sqlite"}
        return values

    @field_validator("path")
    @classmethod
    def _path_fits_into_a_url(cls, path: Path | None) -> Path | None:
        if path is not None and "?" in str(path):
            raise ValueError("expected a path without a question mark")
        return path

    @field_validator("url")
    @classmethod
    def _one_place(cls, url: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if url is None:
            return None
        if info.data.get("path") is not None:
            raise ValueError("expected only one of `path` and `url`; leave one out")
        text = url.get_secret_value()
        try:
            parts = urlsplit(text)
            faulty = parts.scheme not in ("postgresql", "postgresql+psycopg") or parts.port == 0
        except ValueError:
            faulty = True
        if faulty or len(parts.path) < 2 or re.search(r"\s", text):
            raise ValueError(
                "expected postgresql+psycopg://user@host:5432/database; for SQLite give `path`"
            )
        return url


class Spool(Settings):
    """Where received instances lie until they are archived."""

    path: PlacedPath = Field(description="A directory of its own on a local disk, mode 0700.")
    reserve_bytes: int = Field(
        default=2 * 1024**3, ge=0, description="Free space that is never used; 0xA700 below it."
    )


class Validation(Settings):
    """What is archived: instances that are faulty at their source, studies proven in other ways."""

    faulty: Literal["archive", "leave-out"] = Field(
        default="archive",
        description="archive an instance that arrives faulty twice with a warning, or leave-out "
        "and name it.",
    )
    evidence: Evidence = Field(
        # Counts of series are the PACS's own word on what it holds, read before and after the
        # transfer; counts of sub-operations are of the transfer that is to be judged.
        default=Evidence.SERIES_COUNTS,
        description="The weakest proof of a study's completeness that is accepted, where the PACS "
        "lists no instances: instance-list, series-counts or suboperation-counts.",
    )


class Site(Settings):
    """One site: everything a run needs to know but the cohort."""

    tls: Tls | None = Field(
        default=None, description="TLS of the nodes and the receiver that have `tls: true`."
    )
    nodes: dict[NodeName, AnyNode] = Field(
        min_length=1, description="PACS nodes by a name of your choice."
    )
    receiver: Receiver = Field(default_factory=Receiver, description="The managed receiver.")
    archive: AnyArchive = Field(description="Where studies are archived.")
    ledger: Ledger = Field(default_factory=Ledger, description="Where state is kept.")
    spool: Spool = Field(description="Where received instances lie.")
    validation: Validation = Field(default_factory=Validation, description="Faulty instances.")
    projects: dict[NodeName, Project] = Field(
        default_factory=dict, description="Projects that get de-identified copies, by name."
    )
    retry_after_seconds: tuple[NonNegativeFloat, ...] = Field(
        default=(30, 60, 120, 240),
        description="How long a PACS node is waiting after it failed for the first, second, … "
        "time in a row, and before the next pass over what failed for a transient reason. After "
        "the last of these waits it is left for a rerun.",
    )
    reports: PlacedPath = Field(
        default=Path("reports"), description="Where result tables are written."
    )
    metrics: Metrics = Field(default_factory=Metrics, description="Counts for Prometheus.")
    _capabilities: dict[str, NodeCapabilities] = PrivateAttr(default_factory=dict)

    @property
    def capabilities(self) -> Mapping[str, NodeCapabilities]:
        """Capabilities of each node; empty where there is no file beside the site file."""
        return {name: self._capabilities.get(name, NodeCapabilities()) for name in self.nodes}

    def effective_node(self, node: str) -> NodeSettings:
        """Node within its capabilities: no more associations, no shorter settle time."""
        known, plain = self.capabilities[node], self.nodes[node]
        most = min(plain.limits.associations, known.associations or plain.limits.associations)
        quiet = max(plain.timeouts.settle_seconds, _SETTLES_WITHIN * (known.settle_seconds or 0))
        return plain.model_copy(
            update={
                "limits": plain.limits.model_copy(update={"associations": most}),
                "timeouts": plain.timeouts.model_copy(update={"settle_seconds": quiet}),
            }
        )

    @property
    def receives(self) -> bool:
        """Whether a PACS can be asked to send here: a node is, or the receiver is configured."""
        by_move = any(node.retrieve is RetrieveMethod.C_MOVE for node in self.nodes.values())
        return by_move or self.receiver != Receiver()

    @field_validator("nodes")
    @classmethod
    def _nodes_have_their_tls(
        cls, nodes: dict[str, AnyNode], info: ValidationInfo
    ) -> dict[str, AnyNode]:
        site = info.data.get("tls")
        if "tls" in info.data and site is None:
            for name, node in nodes.items():
                if node.tls is True:
                    raise ValueError(f"{name} has `tls: true`; {_NO_TLS}")
        return {
            name: node.model_copy(update={"tls": site}) if node.tls is True and site else node
            for name, node in nodes.items()
        }

    @field_validator("receiver")
    @classmethod
    def _receiver_has_its_tls(cls, receiver: Receiver, info: ValidationInfo) -> Receiver:
        site = info.data.get("tls")
        if receiver.tls is not True or "tls" not in info.data:
            return receiver
        if site is None:
            raise ValueError(f"it has `tls: true`; {_NO_TLS}")
        if site.certificate is None:
            raise ValueError(
                "it has `tls: true`; expected `certificate` and `key` in the site's `tls`: a TLS "
                "server has its own"
            )
        return receiver.model_copy(update={"tls": site})

    def check_tls_files(self) -> None:
        """Check the files of all TLS settings, before anything is sent or received.

        Not as the site is loaded: whoever reads a report of it need not be able to read its keys.

        Raises
        ------
        ConfigurationError
            With every fault of every file.
        """
        faults = [
            fault for key, tls in self.tls_settings().items() for fault in tls_faults(tls, key)
        ]
        if faults:
            raise ConfigurationError("the TLS settings of the site", faults)

    def tls_settings(self) -> dict[str, Tls]:
        """All TLS settings, each once, by where they are in the site file."""
        groups = {"tls": self.tls, "receiver.tls": self.receiver.tls}
        groups |= {f"nodes.{name}.tls": node.tls for name, node in self.nodes.items()}
        found: dict[Tls, str] = {}
        for key, tls in groups.items():
            if isinstance(tls, Tls):
                found.setdefault(tls, key)
        return {key: tls for tls, key in found.items()}

    @field_validator("spool")
    @classmethod
    def _spool_and_archive_are_apart(cls, spool: Spool, info: ValidationInfo) -> Spool:
        directory = getattr(info.data.get("archive"), "directory", None)
        if directory is None:
            return spool
        inner, outer = (Path(os.path.realpath(place)) for place in (spool.path, directory))
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise ValueError(
                "expected spool and archive in separate directories: spool files are deleted, "
                "archived ones never; change `spool.path` or `archive.directory`"
            )
        return spool

    @field_validator("projects")
    @classmethod
    def _copies_are_apart(
        cls, projects: dict[str, Project], info: ValidationInfo
    ) -> dict[str, Project]:
        places = [_place(info.data.get("archive"))]
        for project in projects.values():
            places.append(_place(project.archive))
        for number, place in enumerate(places):
            if place and any(_overlap(place, other) for other in places[:number] if other):
                raise ValueError(
                    "expected an archive of its own for each project, neither within another "
                    "one nor around it; change `archive.directory`, or `archive.prefix`"
                )
        return projects


def _place(archive: S3Archive | DirectoryArchive | None) -> tuple[str, ...]:
    """Where an archive lies, as components; empty where it is faulty."""
    if archive is None:
        return ()
    if isinstance(archive, DirectoryArchive):
        return Path(os.path.realpath(archive.directory)).parts
    return ("s3", archive.endpoint or "", archive.bucket, *filter(None, archive.prefix.split("/")))


def _overlap(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def load_site(path: str | Path, environ: Mapping[str, str] = os.environ) -> Site:
    """Read a site file.

    Parameters
    ----------
    path : str or Path
        A YAML file. Relative paths in it are seen from its folder; ``~`` is the user's home.
        A key without a value counts as left out.
    environ : mapping, optional
        Where ``PREFECT_DICOM_LEDGER_URL`` is looked up, which takes the place of ``ledger``, and
        what :func:`on_this_host` looks for.

    Returns
    -------
    Site

    Raises
    ------
    ConfigurationError
        With every fault of the file, or of the first faulty file of capabilities beside it: its
        key, what was found in which line, what was expected. Neither secrets nor the lines
        themselves are repeated.
    """
    source = str(path)
    document = Document(text_of(source, path), source, "nodes, archive, spool; see configs/")
    faults = document.faults
    values = document.values
    _refuse_ledger_password(values, faults)
    # Defaults are not seen from the file's folder, so the one with a path is asked for by name.
    values.setdefault("ledger", {})
    site = None
    folder = Path(path).expanduser().absolute().parent
    try:
        site = Site.model_validate(values, context={"folder": folder})
    except ValidationError as error:
        faults += faults_of(error, Site, document.lines)
    if url := environ.get(LEDGER_URL_VARIABLE):
        try:
            ledger = Ledger(url=SecretStr(url))
        except ValidationError as error:
            text = "; ".join(format_fault(item) for item in error.errors(include_url=False))
            faults.append(f"environment variable {LEDGER_URL_VARIABLE}: {text}")
        else:
            site = site and site.model_copy(update={"ledger": ledger})
    if site is not None:
        try:
            site = on_this_host(site, environ)
        except ConfigurationError as error:
            faults += error.faults
    if faults or site is None:
        raise ConfigurationError(source, faults)
    site._capabilities.update(load_all_capabilities(folder, site.nodes))
    return site


def on_this_host(site: Site, environ: Mapping[str, str] = os.environ) -> Site:
    """The site with what the environment says of this host: one file or block serves many.

    Parameters
    ----------
    environ : mapping, optional
        Where :data:`HOST_VARIABLES` and :data:`CALLING_VARIABLE` are looked up; one that is
        empty counts as left out.

    Raises
    ------
    ConfigurationError
        With every variable that says what cannot be.
    """
    faults: list[str] = []

    def with_values(part: Plain, variables: Mapping[str, str]) -> Plain:
        given = {v: field for v, field in variables.items() if environ.get(v)}
        if not given:
            return part
        values = {field: environ[variable] for variable, field in given.items()}
        try:
            return type(part).model_validate({**part.model_dump(), **values})
        except ValidationError as error:
            for item in error.errors(include_url=False):
                field = str(item["loc"][0])
                its_own = [variable for variable in given if given[variable] == field]
                names = ", ".join(its_own or given)
                expected = format_fault(item, type(part).model_fields[field])
                faults.append(f"environment variable {names}: {expected}")
            return part

    receiver = with_values(site.receiver, HOST_VARIABLES)
    calling = {CALLING_VARIABLE: "calling_ae_title"}
    nodes = {
        name: with_values(node, calling) if isinstance(node, PacsNode) else node
        for name, node in site.nodes.items()
    }
    if faults:
        raise ConfigurationError("the environment", list(dict.fromkeys(faults)))
    return site.model_copy(update={"receiver": receiver, "nodes": nodes})


def ledger_url(site: Site) -> str:
    """The SQLAlchemy URL of the site's ledger. It may hold a password: never log it."""
    if site.ledger.url is not None:
        url = site.ledger.url.get_secret_value()
        # SQLAlchemy would take another driver for the plain scheme.
        return re.sub(r"^postgresql://", "postgresql+psycopg://", url)
    return f"sqlite:///{site.ledger.path}"


def _refuse_ledger_password(values: dict[str, Any], faults: list[str]) -> None:
    ledger = values.get("ledger")
    url = ledger.get("url") if isinstance(ledger, dict) else None
    if not isinstance(url, str):
        return
    try:
        parts = urlsplit(url)
    except ValueError:
        return
    if parts.password is not None or any(
        SECRET_KEY.search(k.lower()) for k in parse_qs(parts.query)
    ):
        faults.append(
            "ledger.url: found a URL with a password; expected one without: put the whole URL "
            f"into the environment variable {LEDGER_URL_VARIABLE}"
        )
