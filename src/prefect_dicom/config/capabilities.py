"""Capabilities of a PACS node, as found by a probe: a YAML file beside the site file.

``prefect-dicom doctor --probe`` writes it, a person may edit it, and a run starts from it instead
of finding out for itself. Nothing in it is proof: what a run sees otherwise counts more. It holds
no patient data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError

from prefect_dicom.config.messages import faults_of
from prefect_dicom.config.settings import Settings
from prefect_dicom.config.yaml import Document, text_of
from prefect_dicom.core.errors import ConfigurationError
from prefect_dicom.core.files import atomic_write, create_file
from prefect_dicom.core.model import InformationModel

FOLDER = "capabilities"
"""Beside the site file; the file of a node has its name and ``.yaml``."""
_LONGEST_LINE = 100
_MANY = 6
"""Values of a list up to which a person wants to read them all."""

Keyword = Annotated[str, StringConstraints(pattern="^[A-Z][A-Za-z0-9]{0,63}$")]
Uid = Annotated[str, StringConstraints(pattern=r"^[0-9.]{1,64}$")]


class QueryLevel(StrEnum):
    """Levels of a C-FIND, PS3.4 C.6.1.1."""

    PATIENT = "PATIENT"
    STUDY = "STUDY"
    SERIES = "SERIES"
    IMAGE = "IMAGE"


class Service(StrEnum):
    """Result of one small request for a service."""

    WORKS = "works"
    REFUSED = "refused"
    """Offered in the negotiation, and refused or aborted when it is asked for."""
    NOT_OFFERED = "not-offered"
    NOTHING_ARRIVED = "nothing-arrived"
    """Reported as carried out, or failed for another cause; the instance did not arrive."""


class Match(StrEnum):
    """Result of a query with a matching key, PS3.4 C.2.2.2."""

    MATCHED = "matched"
    IGNORED = "ignored"
    """Answered as if the key were not there."""
    EMPTIES = "empties"
    """Nothing is found, or the query is refused, though the value is the study's own."""


class KeyCapability(Settings):
    """How a node treats one matching key."""

    match: Match | None = Field(default=None, description="Result of a query with this key.")
    wildcards: bool | None = Field(default=None, description="Whether * matches any text in it.")
    case_sensitive: bool | None = Field(default=None, description="Whether it is matched by case.")


class NodeCapabilities(Settings):
    """Capabilities of a node; a key that is left out is unknown."""

    # --- queries
    find_models: tuple[InformationModel, ...] | None = Field(
        default=None, description="Information models it accepts for C-FIND."
    )
    levels: tuple[QueryLevel, ...] | None = Field(
        default=None,
        description="Levels at which it answers a C-FIND in the node's information model.",
    )
    relational_queries: bool | None = Field(
        default=None,
        description="Whether it answers queries below STUDY level without the UIDs above.",
    )
    uid_lists_in_queries: bool | None = Field(
        default=None,
        description="Whether a C-FIND by a list of UIDs finds all of them.",
    )
    uid_lists_above: bool | None = Field(
        default=None,
        description="Whether it lists the series of several studies by such a list.",
    )
    answer_cap: int | None = Field(
        default=None,
        ge=1,
        description="Number of answers at which it was seen to cut a list short.",
    )
    answer_cap_status: Annotated[str, StringConstraints(pattern="^[0-9A-F]{4}$")] | None = Field(
        default=None,
        min_length=4,
        max_length=4,
        description="Status with which it cuts a list short, in hexadecimal; 0000 is success.",
    )
    longest_list: int | None = Field(
        default=None, ge=0, description="Longest list of answers that was not cut short."
    )
    study_counts: bool | None = Field(
        default=None,
        description="Whether it returns the counts of series and instances of a study.",
    )
    series_counts: bool | None = Field(
        default=None, description="Whether it returns the count of instances of a series."
    )
    optional_return_keys: bool | None = Field(
        default=None,
        description="Whether it finds a study when ModalitiesInStudy, StudyDescription and the "
        "counts are to be returned.",
    )
    keys: dict[Keyword, KeyCapability] | None = Field(
        default=None, description="How it treats matching keys at STUDY level."
    )
    answer_character_sets: tuple[str, ...] | None = Field(
        default=None,
        description="Specific Character Sets its answers declare; ISO_IR 6 where they declare "
        "none.",
    )
    percent_decoding: bool | None = Field(
        default=None,
        description="Whether a DICOMweb server finds a study by a value with percent-encoded "
        "characters.",
    )
    query_character_sets: tuple[str, ...] | None = Field(
        default=None, description="Specific Character Sets in which a query for a name finds it."
    )
    # --- retrieval
    move_models: tuple[InformationModel, ...] | None = Field(
        default=None, description="Information models it accepts for C-MOVE."
    )
    get_models: tuple[InformationModel, ...] | None = Field(
        default=None, description="Information models it accepts for C-GET."
    )
    c_move: Service | None = Field(default=None, description="Result of a C-MOVE of one instance.")
    c_get: Service | None = Field(default=None, description="Result of a C-GET of one instance.")
    wado_rs: Service | None = Field(
        default=None, description="Result of a WADO-RS request for one instance."
    )
    get_roles: bool | None = Field(
        default=None,
        description="Whether it accepts us as storage SCP in a C-GET (role selection).",
    )
    get_transfer_syntaxes: tuple[Uid, ...] | None = Field(
        default=None, description="Transfer syntaxes it accepts for the instances of a C-GET."
    )
    image_level_retrieve: bool | None = Field(
        default=None, description="Whether it sends single instances."
    )
    uid_lists_in_retrieves: bool | None = Field(
        default=None, description="Whether it sends all instances of a list of UIDs."
    )
    originator: bool | None = Field(
        default=None,
        description="Whether instances of a C-MOVE name their request (Move Originator).",
    )
    settle_seconds: float | None = Field(
        default=None,
        ge=0,
        description="Longest time from the end of a C-MOVE to its last instance, in seconds.",
    )
    # --- associations
    associations: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Associations it served at the same time, as far as tried.",
    )
    asynchronous_operations: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Outstanding C-MOVE operations it allows at a time; 0: any number.",
    )


def capabilities_path(folder: Path, node: str) -> Path:
    """Path of the capabilities of a node, given the folder of its site file."""
    return folder / FOLDER / f"{node}.yaml"


def load_all_capabilities(folder: Path, nodes: Iterable[str]) -> dict[str, NodeCapabilities]:
    """Read the capabilities of those nodes that have a file of them.

    Raises
    ------
    ConfigurationError
        With every fault of the first faulty file.
    """
    found = {}
    for node in nodes:
        path = capabilities_path(folder, node)
        if path.exists():
            found[node] = load_capabilities(path)
    return found


def load_capabilities(path: Path) -> NodeCapabilities:
    """Read one file of capabilities.

    Raises
    ------
    ConfigurationError
        With every fault of the file.
    """
    source = str(path)
    document = Document(text_of(source, path), source, ", ".join(NodeCapabilities.model_fields))
    faults = document.faults
    try:
        capabilities = NodeCapabilities.model_validate(document.values)
    except ValidationError as error:
        faults += faults_of(error, NodeCapabilities, document.lines)
    if faults:
        raise ConfigurationError(source, faults)
    return capabilities


def write_capabilities(path: Path, capabilities: NodeCapabilities, probed_at: datetime) -> None:
    """Write a file of capabilities atomically: a run that starts meanwhile reads all or nothing.

    Parameters
    ----------
    probed_at : datetime
        When the node was probed; written into the file for its reader.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = capabilities_text(capabilities, probed_at)
    with (
        atomic_write(path, sync=True) as draft,
        open(create_file(draft), "w", encoding="utf-8") as file,
    ):
        file.write(text)


def capabilities_text(capabilities: NodeCapabilities, probed_at: datetime) -> str:
    """YAML text of the capabilities, with a line of explanation for each key."""
    lines = [
        f"# Found by `prefect-dicom doctor --probe` at {probed_at.astimezone(UTC):%Y-%m-%d %H:%M} "
        "UTC.",
        "# It may be edited: a key that is left out is not known, and found out by each run. What",
        "# a run sees otherwise counts more. Probing again writes it anew. Keys:",
        "# docs/capabilities.md.",
    ]
    for name, value in values_of(capabilities).items():
        lines.append(f"\n# {NodeCapabilities.model_fields[name].description}")
        # JSON is YAML too, with every text in quotes: 0000 stays a text.
        line = f"{name}: {json.dumps(value)}"
        if isinstance(value, dict):
            line = "\n".join([f"{name}:", *(f"  {k}: {json.dumps(v)}" for k, v in value.items())])
        elif len(line) > _LONGEST_LINE:
            line = "\n".join([f"{name}:", *(f"  - {json.dumps(one)}" for one in value)])
        lines.append(line)
    return "\n".join(lines) + "\n"


def values_of(capabilities: NodeCapabilities) -> dict[str, Any]:
    """Known capabilities as plain values."""
    return capabilities.model_dump(mode="json", exclude_none=True)


def format_capabilities(capabilities: NodeCapabilities) -> list[tuple[str, str, str]]:
    """Every key with its value and meaning, for people; unknown ones have no value."""
    known = values_of(capabilities)
    lines = []
    for name, field in NodeCapabilities.model_fields.items():
        value = known.get(name)
        if isinstance(value, dict):
            words = "\n".join(
                f"{key}: {_format_key(capability)}" for key, capability in value.items()
            )
        elif isinstance(value, list):
            words = f"{len(value)}" if len(value) > _MANY else ", ".join(map(str, value)) or "none"
        elif isinstance(value, bool):
            words = "yes" if value else "no"
        else:
            words = "not known" if value is None else str(value)
        lines.append((name, words, field.description or ""))
    return lines


def _format_key(capability: dict[str, Any]) -> str:
    words = [capability.get("match", "not known")]
    if "wildcards" in capability:
        words.append("wildcards" if capability["wildcards"] else "no wildcards")
    if "case_sensitive" in capability:
        words.append("case counts" if capability["case_sensitive"] else "in any case")
    return ", ".join(words)
