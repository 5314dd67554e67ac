"""A site in one YAML file: its PACS nodes, receiver, archive, ledger and spool.

Typed with pydantic; :func:`load_site` reports every fault of a file at once. Secrets are never
in the file: they come from the environment (boto3's own chain, ``PREFECT_DICOM_LEDGER_URL``)
or from Prefect blocks. So does what differs between the hosts of a site
(:data:`HOST_VARIABLES`).
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AfterValidator,
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

from prefect_dicom.config.access_schedule import AccessSchedule
from prefect_dicom.config.capabilities import NodeCapabilities, load_all_capabilities
from prefect_dicom.config.yaml import (
    LEDGER_URL_VARIABLE,
    SECRET_KEY,
    Document,
    Settings,
    faults_of,
    format_fault,
    shown,
    text_of,
)
from prefect_dicom.core.errors import ConfigurationError
from prefect_dicom.core.model import Evidence, InformationModel, RetrieveMethod
from prefect_dicom.core.uids import ae_title_fault, is_name

HOST_VARIABLES = {
    "PREFECT_DICOM_RECEIVER_AE_TITLE": "ae_title",
    "PREFECT_DICOM_RECEIVER_BIND": "bind",
    "PREFECT_DICOM_RECEIVER_PORT": "port",
}
"""Environment variables that take the place of keys of ``receiver``: each host has its own."""

CALLING_VARIABLE = "PREFECT_DICOM_CALLING_AE_TITLE"
"""Environment variable that takes the place of every node's ``calling_ae_title``."""

_SETTLES_WITHIN = 2
"""Factor on the settle time among the capabilities: the next one may be slower."""


def _ae_title(title: str) -> str:
    if fault := ae_title_fault(title):
        raise ValueError(f"expected an AE title of 1 to 16 ASCII characters; it {fault}")
    return title


def _node_name(name: str) -> str:
    if not is_name(name):
        raise ValueError(
            "expected a name of letters, digits, '.', '_' and '-' (64 at most, no blanks); "
            "it appears in paths and logs"
        )
    return name


def _placed(path: Path, info: ValidationInfo) -> Path:
    """The path with ``~`` expanded, and seen from the site file's folder where there is one."""
    if path == Path() or any(ord(c) < 32 for c in str(path)):
        raise ValueError("expected a path that names something, without control characters")
    try:
        path = path.expanduser()
    except RuntimeError:
        raise ValueError("expected a path; the home directory it begins with is unknown") from None
    folder = (info.context or {}).get("folder")
    return folder / path if folder else path


AeTitle = Annotated[str, AfterValidator(_ae_title)]
NodeName = Annotated[str, AfterValidator(_node_name)]
PlacedPath = Annotated[Path, AfterValidator(_placed)]
Plain = TypeVar("Plain", bound=Settings)


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

    associations: int = Field(
        2, ge=1, le=64, description="Chunks retrieved, or rows asked for, at the same time."
    )
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

    @property
    def request_instances(self) -> int:
        """The most listed instances of one request, by their number and by their estimated size."""
        return max(1, min(self.chunk_instances, self.chunk_bytes // self.instance_bytes))


class PacsNode(Settings):
    """One PACS: its address, our name there, and how it hands over instances."""

    host: str = Field(description="Host name or IP address of the PACS.")
    port: int = Field(ge=1, le=65535, description="Port of the PACS.")
    called_ae_title: AeTitle = Field(description="AE title of the PACS, in exact case.")
    calling_ae_title: AeTitle = Field("PREFECTDICOM", description="Our AE title at the PACS.")
    information_model: InformationModel = Field(
        InformationModel.STUDY_ROOT, description="Query/Retrieve information model."
    )
    retrieve: RetrieveMethod = Field(
        RetrieveMethod.C_MOVE, description="c-move (needs the receiver) or c-get."
    )
    limits: Limits = Field(default_factory=Limits, description="What it may be asked at a time.")
    timeouts: Timeouts = Field(default_factory=Timeouts, description="How long to wait for it.")
    access_schedule: AccessSchedule | None = Field(
        None, description="When it may be asked, and for how much; without it, always."
    )

    @field_validator("access_schedule")
    @classmethod
    def _limits_are_the_ceiling(
        cls, schedule: AccessSchedule | None, info: ValidationInfo
    ) -> AccessSchedule | None:
        if schedule is None or "limits" not in info.data:
            return schedule
        most = info.data["limits"].associations
        parts = (*schedule.windows, *filter(None, [schedule.outside]))
        if (found := max(part.associations or 1 for part in parts)) > most:
            raise ValueError(
                f"found {found} associations in a window; expected at most {most}, which "
                "`limits.associations` allows at any time"
            )
        return schedule

    @field_validator("host")
    @classmethod
    def _host_names_one_peer(cls, host: str) -> str:
        if address := _ip_address(host):
            if address.is_unspecified:
                raise ValueError(
                    "expected the address of the PACS; this one is for listening on every "
                    "interface and reaches no peer"
                )
            return host
        if re.fullmatch(r"\[.*\]", host):
            raise ValueError("expected an IPv6 address without brackets")
        if re.fullmatch(r"[^:/@\s]+:[0-9]+", host):
            raise ValueError("expected a host alone; write the number after the colon as `port`")
        if re.fullmatch(r"[0-9.]+", host):
            raise ValueError("expected an IP address of four numbers from 0 to 255, or a host name")
        if not re.fullmatch(r"[\w.-]+", host):
            raise ValueError("expected a host name or an IP address, with nothing around it")
        return host


class Receiver(Settings):
    """The managed storage SCP that C-MOVE sends to."""

    ae_title: AeTitle = Field("PREFECTDICOM", description="AE title the PACS knows as destination.")
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

    @field_validator("bind")
    @classmethod
    def _bind_is_an_address(cls, bind: str) -> str:
        return _address_of_this_host(bind)

    @field_validator("allowed_senders")
    @classmethod
    def _senders_are_addresses(
        cls, senders: tuple[str, ...], info: ValidationInfo
    ) -> tuple[str, ...]:
        for sender in senders:
            try:
                network = ipaddress.ip_network(sender, strict=False)
            except ValueError:
                raise ValueError(
                    f"{shown(sender)} is none; expected IP addresses or networks like "
                    "10.20.0.0/16 (host names are not resolved here)"
                ) from None
            if "/" in sender and ipaddress.ip_interface(sender).ip != network.network_address:
                raise ValueError(
                    f"{shown(sender)} is a host within a network; expected {network} for all of "
                    f"it, or {ipaddress.ip_interface(sender).ip} for that host"
                )
        address = _ip_address(info.data.get("bind", ""))
        if address and address.is_unspecified and not senders:
            raise ValueError(
                f"expected at least one address, because `bind: {address}` listens on every "
                "interface of this host and AE titles prove nothing; name the addresses that "
                "may connect, or bind to one address"
            )
        return senders


class Metrics(Settings):
    """Where Prometheus finds what receiver and runs of this host count; off without a port."""

    bind: str = Field("127.0.0.1", description="Address of this host to listen on.")
    port: int | None = Field(
        None, ge=1, le=65535, description="Port to listen on; left out: nothing is counted."
    )

    @field_validator("bind")
    @classmethod
    def _bind_is_an_address(cls, bind: str) -> str:
        return _address_of_this_host(bind)


class S3Settings(Settings):
    """A bucket and how objects are put into it, without the secrets."""

    bucket: str = Field(min_length=3, max_length=63, description="Name of the bucket.")
    prefix: str = Field("", description="Prefix of all keys, without slashes around it.")
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

    @field_validator("endpoint", "region", "profile", "kms_key_id", "storage_class", mode="before")
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
        try:
            url = urlsplit(endpoint)
            faulty = url.scheme not in ("http", "https") or not url.hostname or url.port == 0
        except ValueError:
            faulty = True
        if faulty or re.search(r"\s", endpoint):
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

    access_key_id: SecretStr | None = Field(None, description="Access key, from a block only.")
    secret_access_key: SecretStr | None = Field(None, description="Its secret.")
    session_token: SecretStr | None = Field(None, description="Token of temporary credentials.")

    @model_validator(mode="after")
    def _key_and_secret_come_together(self) -> S3Archive:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError("expected an access key and its secret together, or neither")
        return self


class DirectoryArchive(Settings):
    """A directory with the same protocol as a bucket: temporary name, fsync, rename."""

    directory: PlacedPath = Field(description="Where the archive lies.")
    connections: int = Field(4, ge=1, le=64, description="Writes at the same time.")


class Ledger(Settings):
    """Where the state of every study is kept: a SQLite file, or PostgreSQL by URL.

    A URL with a password belongs into ``PREFECT_DICOM_LEDGER_URL``, not into the file. With
    neither of the two it is the SQLite file ``ledger.sqlite`` beside the site file.
    """

    path: PlacedPath | None = Field(
        None, description="SQLite file; ledger.sqlite beside the site file if there is no url."
    )
    url: SecretStr | None = Field(
        None, description="postgresql+psycopg://… URL without a password, instead of path."
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
    """Where arriving objects lie until they are archived."""

    path: PlacedPath = Field(description="A directory of its own on a local disk, mode 0700.")
    reserve_bytes: int = Field(
        2 * 1024**3, ge=0, description="Free space that is never used; 0xA700 below it."
    )


class Validation(Settings):
    """What is archived: instances that are faulty at their source, studies proven in other ways."""

    faulty: Literal["archive", "leave-out"] = Field(
        "archive",
        description="archive an instance that arrives faulty twice with a warning, or leave-out "
        "and name it.",
    )
    evidence: Evidence = Field(
        # Counts of series are the PACS's own word on what it holds, read before and after the
        # transfer; counts of sub-operations are of the transfer that is to be judged.
        Evidence.SERIES_COUNTS,
        description="The weakest proof of a study's completeness that is accepted, where the PACS "
        "lists no instances: instance-list, series-counts or suboperation-counts.",
    )


def _address_of_this_host(bind: str) -> str:
    if _ip_address(bind) is None:
        raise ValueError(
            "expected an IP address of this host; `ip address` lists them "
            "(a name may resolve to another interface tomorrow)"
        )
    return bind


def _kind_of_archive(value: Any) -> str | None:
    """Which of the two archives is meant, so that only its own faults are reported."""
    if isinstance(value, S3Archive):
        return "bucket"
    if isinstance(value, DirectoryArchive):
        return "directory"
    if not isinstance(value, Mapping) or ("bucket" in value) == ("directory" in value):
        return None
    return "bucket" if "bucket" in value else "directory"


class Site(Settings):
    """One site: everything a run needs to know but the cohort."""

    nodes: dict[NodeName, PacsNode] = Field(
        min_length=1, description="PACS nodes by a name of your choice."
    )
    receiver: Receiver = Field(default_factory=Receiver, description="The managed receiver.")
    archive: Annotated[
        Annotated[S3Archive, Tag("bucket")] | Annotated[DirectoryArchive, Tag("directory")],
        Discriminator(
            _kind_of_archive,
            custom_error_type="archive_choice",
            custom_error_message="expected exactly one of `bucket` (S3) and `directory`",
        ),
    ] = Field(description="Where studies are archived.")
    ledger: Ledger = Field(default_factory=Ledger, description="Where state is kept.")
    spool: Spool = Field(description="Where arriving objects lie.")
    validation: Validation = Field(default_factory=Validation, description="Faulty instances.")
    retry_after_seconds: tuple[NonNegativeFloat, ...] = Field(
        (30, 60, 120, 240),
        description="How long a PACS node is left alone after it failed for the first, second, … "
        "time in a row, and before the next pass over what failed for a passing reason. After "
        "the last of these waits it is left for a rerun.",
    )
    reports: PlacedPath = Field(Path("reports"), description="Where result tables are written.")
    metrics: Metrics = Field(default_factory=Metrics, description="Counts for Prometheus.")
    _capabilities: dict[str, NodeCapabilities] = PrivateAttr(default_factory=dict)

    @property
    def capabilities(self) -> Mapping[str, NodeCapabilities]:
        """Capabilities of each node; empty where there is no file beside the site file."""
        return {name: self._capabilities.get(name, NodeCapabilities()) for name in self.nodes}

    def effective_node(self, node: str) -> PacsNode:
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
                field = item["loc"][0]
                its_own = [variable for variable in given if given[variable] == field]
                names = ", ".join(its_own or given)
                told = format_fault(item, type(part).model_fields[field])
                faults.append(f"environment variable {names}: {told}")
            return part

    receiver = with_values(site.receiver, HOST_VARIABLES)
    calling = {CALLING_VARIABLE: "calling_ae_title"}
    nodes = {name: with_values(node, calling) for name, node in site.nodes.items()}
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


def _ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
