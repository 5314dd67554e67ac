"""The command ``deidentify``: copies of files on disk, and what was done to each element."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from prefect_dicom.cli.app import DEFAULT_SITE, Exit, SiteOption, app, console, output
from prefect_dicom.cli.flow_runner import site_of
from prefect_dicom.core.errors import ConfigurationError, InstanceRejected
from prefect_dicom.core.reasons import REASONS

if TYPE_CHECKING:
    from prefect_dicom.config.projects import Project
    from prefect_dicom.config.site import Site
    from prefect_dicom.deidentify.copy import Treated
    from prefect_dicom.deidentify.engine import Deidentifier

ProjectName = Annotated[str, Parameter(help="A project of the site file.", show_default=False)]


def project_of(site: Site, name: str) -> Project:
    """The project of a site with this name.

    Raises
    ------
    ConfigurationError
        There is none.
    """
    project = site.projects.get(name)
    if project is None:
        there = ", ".join(sorted(site.projects)) or "none; see docs/deidentification.md"
        raise ConfigurationError(
            "command line", [f"--project: the site has no project {ascii(name)}; it has {there}"]
        )
    return project


def _secret_text(block: str) -> str:
    # Prefect takes two seconds to import.
    from prefect_dicom.blocks import secret_text

    return secret_text(block)


@app.command(sort_key=9)
def deidentify(
    files: Annotated[tuple[Path, ...], Parameter(help="Part 10 files.", show_default=False)],
    /,
    *,
    project: ProjectName,
    output_directory: Annotated[
        Path | None,
        Parameter(
            name=["--output", "-o"],
            help="Directory for the copies; each is named by its new SOPInstanceUID.",
        ),
    ] = None,
    explain: Annotated[
        bool,
        Parameter(help="Print per element what was done, and by which row of Table E.1-1."),
    ] = False,
    site: SiteOption = DEFAULT_SITE,
) -> int:
    """De-identify files on disk as a project's copies are, or show what would be done.

    The originals are not changed, and nothing is sent anywhere. What `--explain` prints names
    attributes and no values. Exit code 2: some files have no copy, for the reasons printed.
    """
    if not files or (output_directory is None and not explain):
        raise ConfigurationError(
            "command line", ["expected files, and `--output DIRECTORY` or `--explain` or both"]
        )
    from prefect_dicom.config.projects import project_key
    from prefect_dicom.deidentify.engine import Deidentifier

    settings = project_of(site_of(site), project)
    deidentifier = Deidentifier(project_key(project, settings, _secret_text), settings.options)
    trusted = frozenset(settings.trusted_modalities)
    if output_directory is not None:
        output_directory.mkdir(parents=True, exist_ok=True)
    copied = 0
    for file in files:
        copied += _one(file, deidentifier, trusted, output_directory, explain)
    console.print(f"{copied} of {len(files)} files have a de-identified copy.")
    return Exit.ALL_WELL if copied == len(files) else Exit.NOT_ALL


def _one(
    path: Path,
    deidentifier: Deidentifier,
    trusted: frozenset[str],
    directory: Path | None,
    explain: bool,
) -> bool:
    """Copy one file, or say why not; whether there is a copy."""
    from prefect_dicom.deidentify.elements import read_part_ten
    from prefect_dicom.deidentify.pixels import judge

    try:
        with path.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        console.print(f"{path}: cannot be read ({error})", markup=False, soft_wrap=True)
        return False
    if explain:
        output.print(str(path), markup=False, soft_wrap=True)
    try:
        part_ten = read_part_ten(data)
        judgement = judge(part_ten, trusted)
        copy = deidentifier.copy(part_ten, explain=_print if explain else None)
    except InstanceRejected as error:
        _withheld(path, error.code, error.detail)
        return False
    for warning in judgement.warnings:
        console.print(f"{path}: {REASONS[warning].meaning}", markup=False, soft_wrap=True)
    if judgement.reason:
        _withheld(path, judgement.reason, judgement.because)
        return False
    if directory is not None:
        with (directory / f"{copy.sop_instance_uid}.dcm").open("wb") as stream:
            for piece in copy.pieces:
                stream.write(piece)
    return True


def _print(treated: Treated) -> None:
    output.print(
        f"  {treated.path} {treated.vr}: {treated.action} ({treated.why})",
        markup=False,
        soft_wrap=True,
    )


def _withheld(path: Path, code: str, because: str) -> None:
    text = f"{path}: withheld ({code}: {because}). {REASONS[code].meaning}"
    console.print(text, markup=False, soft_wrap=True)
