"""Projects: for whom de-identified copies are made, how, and where they go."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from prefect_dicom.config.archive import AnyArchive
from prefect_dicom.config.fields import PlacedPath
from prefect_dicom.config.settings import Settings
from prefect_dicom.core.errors import ConfigurationError, PrefectDicomError
from prefect_dicom.deidentify.options import Dates, Options, Retain

if TYPE_CHECKING:
    from prefect_dicom.deidentify.keys import ProjectKey

KEY_VARIABLE = "PREFECT_DICOM_PROJECT_KEY_"
"""Beginning of the environment variables with keys of projects."""


class Project(Settings):
    """De-identified copies for one project (PS3.15 Annex E)."""

    archive: AnyArchive = Field(description="Where the copies go: an archive of the project's own.")
    key_file: PlacedPath | None = Field(
        default=None, description="File with the project's key, 64 hexadecimal digits, mode 0600."
    )
    key_block: str | None = Field(
        default=None, description="Name of a Prefect Secret block with the key, instead."
    )
    dates: Dates = Field(
        default=Dates.REMOVE,
        description="remove, modified (shifted by a number of days of each patient) or full.",
    )
    retain: tuple[Retain, ...] = Field(
        default=(),
        description="What is kept beyond the Basic Profile: patient-characteristics, device, "
        "institution, uids, safe-private.",
    )
    descriptors: dict[str, str] = Field(
        default_factory=dict,
        description="Values of descriptors that may be kept, and what is written instead.",
    )
    strict: bool = Field(
        default=False, description="Remove all text that no row of the table keeps."
    )
    trusted_modalities: tuple[str, ...] = Field(
        default=(), description="Modalities whose images are known to have no text burned in."
    )

    @field_validator("descriptors")
    @classmethod
    def _replacements_are_ascii(cls, descriptors: dict[str, str]) -> dict[str, str]:
        if not all(new.isascii() and new.isprintable() for new in descriptors.values()):
            raise ValueError(
                "expected replacements in ASCII: they are valid in every character set"
            )
        return descriptors

    @property
    def options(self) -> Options:
        """The options of PS3.15 E.3."""
        return Options(self.dates, frozenset(self.retain), self.descriptors, self.strict)


def key_variable(name: str) -> str:
    """Name of the environment variable with the key of a project.

    Examples
    --------
    >>> key_variable("lung-ai")
    'PREFECT_DICOM_PROJECT_KEY_LUNG_AI'
    """
    return KEY_VARIABLE + re.sub(r"[^A-Z0-9]", "_", name.upper())


def project_key(
    name: str,
    project: Project,
    load_block: Callable[[str], str],
    environ: Mapping[str, str] = os.environ,
) -> ProjectKey:
    """Key of a project, from the environment, its file or its block, in this order.

    Parameters
    ----------
    load_block : callable
        Reads a Prefect Secret block: ``prefect_dicom.blocks.secret_text``, which costs an import.

    Raises
    ------
    PrefectDicomError
        ``project-key-missing``, also where it cannot be read.
    ConfigurationError
        It has another form, or its file is readable by others.
    """
    from prefect_dicom.deidentify.keys import ProjectKey, parse_secret

    variable = key_variable(name)
    if text := environ.get(variable):
        return ProjectKey(name, parse_secret(text, f"environment variable {variable}"))
    if project.key_file is not None:
        text = _private_text(name, project.key_file)
        return ProjectKey(name, parse_secret(text, f"projects.{name}.key_file"))
    if project.key_block is not None:
        text = load_block(project.key_block)
        return ProjectKey(name, parse_secret(text, f"projects.{name}.key_block"))
    raise PrefectDicomError(
        "project-key-missing",
        f"set {variable}, or `key_file` or `key_block` of project {name}",
    )


def _private_text(name: str, path: Path) -> str:
    try:
        mode = path.stat().st_mode
        text = path.read_text("ascii", errors="replace")
    except OSError as error:
        detail = f"projects.{name}.key_file: {error.strerror}"
        raise PrefectDicomError("project-key-missing", detail) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        fault = "found a file that others can read; expected mode 0600: chmod 600 it"
        raise ConfigurationError(f"projects.{name}.key_file", [fault])
    return text
