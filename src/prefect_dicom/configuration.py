"""A site in one YAML file: its PACS nodes, receiver, archive, ledger and spool.

Typed with pydantic; :func:`load_site` reports every fault of a file at once. Secrets are never
in the file: they come from the environment (boto3's own chain, ``PREFECT_DICOM_LEDGER_URL``)
or from Prefect blocks.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import parse_qs, urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    SecretStr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from prefect_dicom.errors import ConfigurationError
from prefect_dicom.identifiers import ae_title_fault, is_name
from prefect_dicom.model import InformationModel, RetrieveMethod

LEDGER_URL_VARIABLE = "PREFECT_DICOM_LEDGER_URL"
"""Environment variable whose PostgreSQL URL takes the place of the file's ``ledger``."""


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


class Settings(BaseModel):
    """Base of all parts: unknown keys are faults, values do not change.

    Validation messages do not repeat the input: it may be a URL with a password.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any) -> Any:
        # pydantic would take `port: true` for 1.
        if isinstance(value, bool):
            raise PydanticCustomError("truth_value", "true and false are values of no key")
        return value


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
        if _ip_address(bind) is None:
            raise ValueError(
                "expected an IP address of this host; `ip address` lists them "
                "(a name may resolve to another interface tomorrow)"
            )
        return bind

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
                    f"{_shown(sender)} is none; expected IP addresses or networks like "
                    "10.20.0.0/16 (host names are not resolved here)"
                ) from None
            if "/" in sender and ipaddress.ip_interface(sender).ip != network.network_address:
                raise ValueError(
                    f"{_shown(sender)} is a host within a network; expected {network} for all of "
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
    """What to do with an instance that is faulty at its source (it arrives the same twice)."""

    faulty: Literal["archive", "leave-out"] = Field(
        "archive", description="archive it with a warning, or leave-out and name it."
    )


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
        Where ``PREFECT_DICOM_LEDGER_URL`` is looked up; it takes the place of ``ledger``.

    Returns
    -------
    Site

    Raises
    ------
    ConfigurationError
        With every fault of the file: its key, what was found in which line, what was expected.
        Neither secrets nor the lines themselves are repeated.
    """
    source = str(path)
    document = _Document(_text_of(source, path), source)
    faults = document.faults
    values = document.values
    _refuse_ledger_password(values, faults)
    # Defaults are not seen from the file's folder, so the one with a path is asked for by name.
    values.setdefault("ledger", {})
    site = None
    try:
        folder = Path(path).expanduser().absolute().parent
        site = Site.model_validate(values, context={"folder": folder})
    except ValidationError as error:
        faults += faults_of(error, Site, document.lines)
    if url := environ.get(LEDGER_URL_VARIABLE):
        try:
            ledger = Ledger(url=SecretStr(url))
        except ValidationError as error:
            text = "; ".join(_told(item) for item in error.errors(include_url=False))
            faults.append(f"environment variable {LEDGER_URL_VARIABLE}: {text}")
        else:
            site = site and site.model_copy(update={"ledger": ledger})
    if faults or site is None:
        raise ConfigurationError(source, faults)
    return site


def ledger_url(site: Site) -> str:
    """The SQLAlchemy URL of the site's ledger. It may hold a password: never log it."""
    if site.ledger.url is not None:
        url = site.ledger.url.get_secret_value()
        # SQLAlchemy would take another driver for the plain scheme.
        return re.sub(r"^postgresql://", "postgresql+psycopg://", url)
    return f"sqlite:///{site.ledger.path}"


# ---------------------------------------------------------------------- the text of a site file


def _text_of(source: str, path: str | Path) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        fault = "is not UTF-8 text; save it as UTF-8"
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a usable path"
        fault = f"cannot be read ({reason}); give the path of a site file"
    raise ConfigurationError(source, [fault])


_SECRET_KEY = re.compile(r"passw(or)?d|passphrase|pwd|secret|access_?key|api_?key|token|credential")
_WHERE_SECRETS_BELONG = (
    "a secret does not belong into this file; the archive's credentials come from the "
    "environment (AWS_ACCESS_KEY_ID …, or `profile`) or from the Prefect block DicomArchive, "
    f"the ledger's password from {LEDGER_URL_VARIABLE}"
)

# Plain scalars as YAML 1.2 has them. YAML 1.1 would read an AE title NO as false, and a port
# 0104 as the octal number 68.
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOLEAN = re.compile(r"true|True|TRUE|false|False|FALSE")
_WHOLE = re.compile(r"[-+]?[0-9]{1,100}")
_DECIMAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,3})?")


class _Document:
    """A YAML document as plain values, with the line of every key and the faults of its text.

    Built from the node graph of PyYAML's safe loader, which knows lines and duplicates; no tag
    constructs anything. Keys are texts. Keys without a value are left out, and so are keys that
    look like secrets, after being complained about.
    """

    def __init__(self, text: str, source: str) -> None:
        self.faults: list[str] = []
        self.lines: dict[tuple[str | int, ...], int] = {}
        loader = None
        try:
            loader = yaml.SafeLoader(text)
            root = loader.get_single_node()
        except yaml.YAMLError as error:
            raise ConfigurationError(source, [_syntax_fault(error, text)]) from None
        except RecursionError:
            raise ConfigurationError(source, ["is nested too deeply for a site file"]) from None
        finally:
            if loader is not None:
                loader.dispose()
        if not isinstance(root, yaml.MappingNode):
            raise ConfigurationError(
                source,
                ["expected keys at the outermost level: nodes, archive, spool; see configs/"],
            )
        self._open: set[int] = set()
        self._built: dict[int, Any] = {}
        self.values: dict[str, Any] = self._mapping(root, ())

    def _value(self, node: yaml.Node, place: tuple[str | int, ...]) -> Any:
        if id(node) in self._open:
            self.faults.append(f"{_dotted(place)}: refers to itself (line {_line(node)})")
            return None
        if not node.tag.startswith("tag:yaml.org,2002:"):
            self.faults.append(
                f"{_dotted(place)}: found a YAML tag (line {_line(node)}); "
                "expected a plain value; a text that begins with '!' goes in quotes"
            )
            return None
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        # What several aliases refer to is built once, its faults are told once.
        if id(node) not in self._built:
            self._open.add(id(node))
            self._built[id(node)] = (
                self._mapping(node, place)
                if isinstance(node, yaml.MappingNode)
                else [self._value(item, (*place, i)) for i, item in enumerate(node.value)]
            )
            self._open.discard(id(node))
        return self._built[id(node)]

    def _mapping(self, node: yaml.MappingNode, place: tuple[str | int, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.faults.append(
                    f"{_dotted(place)}: found a list or mapping as a key "
                    f"(line {_line(key_node)}); expected a name"
                )
                continue
            if key_node.tag == "tag:yaml.org,2002:merge":
                others = self._value(value_node, place)
                for other in others if isinstance(others, list) else [others]:
                    if isinstance(other, dict):
                        merged = {**other, **merged}
                    else:
                        self.faults.append(
                            f"{_dotted(place)}: found '<<' without a group of keys "
                            f"(line {_line(key_node)}); expected an alias like *other"
                        )
                continue
            key, line = key_node.value, _line(key_node)
            here = (*place, key)
            if key in first_lines:
                self.faults.append(
                    f"{_dotted(here)}: found twice, in lines {first_lines[key]} and {line}; "
                    "leave one out"
                )
                continue
            first_lines[key] = self.lines[here] = line
            if place != ("nodes",) and _SECRET_KEY.search(key.lower().replace("-", "_")):
                self.faults.append(
                    f"{_dotted(here)}: found in line {line}; {_WHERE_SECRETS_BELONG}"
                )
                continue
            value = self._value(value_node, here)
            if value is not None:
                values[key] = value
        return {**merged, **values}


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    text = node.value
    if node.style is not None:
        return text
    if _NULL.fullmatch(text):
        return None
    if _BOOLEAN.fullmatch(text):
        return text.lower() == "true"
    if _WHOLE.fullmatch(text):
        return int(text)
    if _DECIMAL.fullmatch(text):
        return float(text)
    return text


def _syntax_fault(error: yaml.YAMLError, text: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        line, column = mark.line + 1, mark.column + 1
    else:
        before = text[: getattr(error, "position", 0)]
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
    # What the parser quotes may be a piece of a secret; single characters and its own names for
    # tokens are not.
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
    problem = re.sub(r"'(?!<)[^']{2,}'", "…", problem)
    return (
        f"line {line}, column {column}: is not YAML: {problem}; check the indentation, and put "
        "texts with special characters in quotes"
    )


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
        _SECRET_KEY.search(k.lower()) for k in parse_qs(parts.query)
    ):
        faults.append(
            "ledger.url: found a URL with a password; expected one without: put the whole URL "
            f"into the environment variable {LEDGER_URL_VARIABLE}"
        )


# ------------------------------------------------------------------------------- saying faults


def faults_of(
    error: ValidationError,
    model: type[BaseModel],
    lines: Mapping[tuple[str | int, ...], int] | None = None,
) -> list[str]:
    """The faults of a validation, one line each: place, what was found, what was expected.

    Parameters
    ----------
    model : type of BaseModel
        What was validated; its fields say what was expected.
    lines : mapping, optional
        Lines of the places in a file.
    """
    faults = []
    for item in error.errors(include_url=False):
        place, field, owner = _place_of(item["loc"], model)
        line = (lines or {}).get(place)
        where = f" (line {line})" if line else ""
        if item["type"] == "extra_forbidden":
            told = f"unknown key{where}; {_suggestion(str(place[-1]), owner)}"
        elif item["type"] == "missing":
            told = f"missing; expected {_expected(field)}: {_lower(field.description)}"
        elif item["type"] == "value_error" and _is_group(item["input"]):
            told = f"{_told(item, field)}{where}"
        elif item["type"] == "archive_choice" and _is_group(item["input"]):
            found = "both" if "bucket" in item["input"] else "neither"
            told = f"found {found}{where}; {_told(item, field)}"
        else:
            told = f"found {_shown(item['input'])}{where}; {_told(item, field)}"
        faults.append(f"{_dotted(place)}: {told}" if place else told)
    return faults


def _told(item: Mapping[str, Any], field: FieldInfo | None = None) -> str:
    """What was expected: in a validator's own words, or in those of the field."""
    if item["type"] == "archive_choice":
        return str(item["msg"])
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if field is None:
        return "expected something else"
    expected = _expected(field)
    if expected.startswith(("a text", "a path")) and isinstance(item["input"], (int, float)):
        expected += "; put it in quotes"
    return f"expected {expected} ({field.description})"


def _dotted(place: tuple[str | int, ...]) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{_key_text(part)}"
    return text.removeprefix(".")


def _key_text(key: str) -> str:
    return key if re.fullmatch(r"[\w-]{1,64}", key) else ascii(key[:64])


def _shown(value: Any) -> str:
    """A value as it may be repeated to the user, whatever it is."""
    if _is_group(value):
        return "a list" if isinstance(value, (list, tuple)) else "a group of keys"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, SecretStr) or (isinstance(value, str) and "@" in value):
        return "a value that may hold a password (not shown)"
    text = ascii(str(value)) if isinstance(value, (str, Path)) else str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _is_group(value: Any) -> bool:
    return isinstance(value, (Mapping, BaseModel, list, tuple))


def _lower(sentence: str | None) -> str:
    text = sentence or ""
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


def _place_of(
    loc: tuple[str | int, ...], model: type[BaseModel]
) -> tuple[tuple[str | int, ...], FieldInfo | None, type[BaseModel] | None]:
    """Where an error lies as the user wrote it, the field there, and the model it belongs to."""
    place: list[str | int] = []
    annotation: Any = model
    field: FieldInfo | None = None
    owner: type[BaseModel] | None = None
    for part in loc:
        if part == "[key]":
            continue
        choices = {
            tag.tag: get_args(choice)[0]
            for choice in _alternatives(annotation)
            for tag in getattr(choice, "__metadata__", ())
            if isinstance(tag, Tag)
        }
        if part in choices:
            annotation = choices[part]
            continue
        place.append(part)
        annotation = next(iter(_alternatives(annotation)), None)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            owner = annotation
            field = annotation.model_fields.get(str(part))
            annotation = field.annotation if field else None
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
    return tuple(place), field, owner


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union but None; anything else is its own only member."""
    if get_origin(annotation) in (Union, UnionType):
        yield from (member for member in get_args(annotation) if member is not NoneType)
    else:
        yield annotation


def _expected(field: FieldInfo | None) -> str:
    if field is None:
        return "something else"
    alternatives = [
        get_args(member)[0] if get_origin(member) is Annotated else member
        for member in _alternatives(field.annotation)
    ]
    annotation = alternatives[0]
    bounds = {
        name: value
        for constraint in field.metadata
        for name in ("ge", "gt", "le", "min_length", "max_length")
        if (value := getattr(constraint, name, None)) is not None
    }
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(get_args(annotation))
    if get_origin(annotation) is tuple:
        return "a list"
    if get_origin(annotation) is dict:
        return "at least one name with its keys below it"
    if issubclass(annotation, BaseModel):
        return "a group of keys: " + ", or ".join(
            ", ".join(_public(model.model_fields)) for model in alternatives
        )
    if issubclass(annotation, Enum):
        return "one of " + ", ".join(member.value for member in annotation)
    if annotation in (int, float):
        return ("a whole number" if annotation is int else "a number") + _range(bounds)
    if annotation is Path:
        return "a path"
    if "min_length" in bounds:
        return f"a text of {bounds['min_length']} to {bounds['max_length']} characters"
    return "a text"


def _range(bounds: Mapping[str, Any]) -> str:
    if "le" in bounds:
        return f" from {bounds['ge']} to {bounds['le']}"
    if "gt" in bounds:
        return f" greater than {bounds['gt']}"
    return f" of at least {bounds['ge']}"


def _public(fields: Mapping[str, FieldInfo]) -> list[str]:
    """Names of the fields that may be written into a file."""
    return [name for name in fields if not _SECRET_KEY.search(name)]


def _suggestion(key: str, owner: type[BaseModel] | None) -> str:
    """The known key that was probably meant, here or in a group below."""
    fields = dict(owner.model_fields) if owner else {}
    known = _public(fields)
    if near := difflib.get_close_matches(key, known, n=1):
        return f"did you mean `{near[0]}`?"
    for name, field in fields.items():
        group = next(_alternatives(field.annotation))
        if isinstance(group, type) and issubclass(group, BaseModel) and key in group.model_fields:
            return f"it belongs under `{name}`"
    return "known keys here: " + ", ".join(known)


def _ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
