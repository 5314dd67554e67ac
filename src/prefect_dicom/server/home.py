"""Prefect's home: the folder of its settings, and of the database of an embedded server.

It is chosen before Prefect is imported, which reads it once. An account of a service often has no
home, or one that it may not write to; Prefect then waits minutes for a server that cannot start.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from prefect_dicom.config.site import Site
from prefect_dicom.core.errors import ConfigurationError
from prefect_dicom.server.local import LocalServer

HOME = "PREFECT_HOME"
PROFILES = "PREFECT_PROFILES_PATH"
DATABASE = "prefect.db"
_NEW_DATABASE_BYTES = 16 * 1024**2
_LEAST_BYTES = 1024**2


@dataclass(frozen=True, slots=True)
class PrefectHome:
    """Where Prefect keeps its files.

    Attributes
    ----------
    path : Path
        The folder, which can be written.
    instead_of : str
        Why it is not the usual one; empty where it is.
    """

    path: Path
    instead_of: str = ""


def choose_home(environ: MutableMapping[str, str], site: Site | None = None) -> PrefectHome:
    """Choose a home for Prefect that can be written, and set it in the environment if need be.

    Parameters
    ----------
    environ : mutable mapping
        Environment of this process, before Prefect is imported.
    site : Site, optional
        Where the usual home cannot be written, the home is beside the site's ledger.

    Raises
    ------
    ConfigurationError
        No home can be written.
    """
    given = environ.get(HOME)
    if not given:
        # Prefect takes an empty one for the current folder.
        environ.pop(HOME, None)
    usual = Path(given or "~/.prefect").expanduser()
    trouble = _trouble_of(usual)
    if not trouble:
        return PrefectHome(usual)
    fault = f"{usual} cannot be used as Prefect's home: {trouble}"
    if given:
        raise ConfigurationError(HOME, [f"{fault}; name a folder that this user can write"])
    if site is not None:
        own = LocalServer.of(site).folder.with_name("prefect-home")
        if not (trouble := _trouble_of(own)):
            _move(environ, usual, own)
            return PrefectHome(own, fault)
        fault += f", and neither can {own}: {trouble}"
    raise ConfigurationError(
        "HOME", [f"{fault}; let HOME or {HOME} name a folder that this user can write"]
    )


def _move(environ: MutableMapping[str, str], usual: Path, own: Path) -> None:
    environ[HOME] = str(own)
    profiles = usual / "profiles.toml"
    if PROFILES not in environ and os.access(profiles, os.R_OK):
        # The address of a server may be in there: a home that is read-only is still read.
        environ[PROFILES] = str(profiles)
    # The plots' library wants a folder in the home as well, and complains on the terminal.
    environ.setdefault("MPLCONFIGDIR", str(own / "matplotlib"))


def _trouble_of(home: Path) -> str:
    """Why a folder cannot be Prefect's home; empty if it can."""
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        needed = _LEAST_BYTES if (home / DATABASE).exists() else _NEW_DATABASE_BYTES
        disk = os.statvfs(home)
        # Some network file systems tell no sizes.
        if disk.f_blocks and disk.f_bavail * disk.f_frsize < needed:
            return "its disk is full"
        with tempfile.TemporaryFile(dir=home) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return (error.strerror or type(error).__name__).lower()
    return ""
