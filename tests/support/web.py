"""Sites around a DICOMweb server, and Orthanc with its plugin as one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import yaml

from tests.support.peers import Orthanc
from tests.support.sites import Place

_FOLDERS = ("/usr/lib/orthanc", "/usr/share/orthanc/plugins")


def dicomweb_plugin() -> Path | None:
    """The plugin for DICOMweb that is installed; the file itself, not a link to it."""
    found = (path for folder in _FOLDERS for path in Path(folder).glob("*OrthancDicomWeb.so*"))
    return next((path.resolve() for path in found), None)


def web_settings() -> dict:
    """What Orthanc needs in its configuration to speak DICOMweb."""
    return {
        "Plugins": [str(dicomweb_plugin())],
        "DicomWeb": {
            "Enable": True,
            "Root": "/dicom-web/",
            "EnableWado": False,
            "Host": "127.0.0.1",
            "Ssl": False,
        },
        "DefaultEncoding": "Utf8",
    }


class WebOrthanc(Orthanc):
    """Orthanc with its plugin for DICOMweb (Debian package orthanc-dicomweb)."""

    package = "orthanc-dicomweb"

    def __init__(self, directory: Path, **settings) -> None:
        super().__init__(directory, **{**web_settings(), **settings})

    @classmethod
    def absent(cls) -> str | None:
        """Why it cannot be used here, or None."""
        if dicomweb_plugin() is None:
            return f"Orthanc's plugin for DICOMweb is not installed (Debian package {cls.package})"
        return super().absent()

    @property
    def url(self) -> str:
        """Base URL of its DICOMweb services."""
        return f"http://127.0.0.1:{self.http_port}/dicom-web"

    def hashes(self) -> dict[str, str]:
        """By SOP Instance UID, the SHA-256 of the file it holds."""
        return {
            held.sop: hashlib.sha256(self.file(held.id)).hexdigest() for held in self.instances()
        }


def web_site(folder: Path, url: str, pacs=None, **parts) -> Place:
    """A site with one DICOMweb node and an archive in a directory; no receiver."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "archive").mkdir()
    node = {
        "dicomweb": url,
        "limits": {"associations": 2},
        "timeouts": {
            "connect_seconds": 5,
            "acse_seconds": 10,
            "find_seconds": 20,
            "first_byte_seconds": 20,
            "stall_seconds": 10,
        },
    }
    document = {
        "nodes": {"pacs": {**node, **parts.pop("node", {})}},
        "archive": {"directory": "archive"},
        "spool": {"path": "spool", "reserve_bytes": 0},
        "retry_after_seconds": [0.05, 0.1],
        **parts,
    }
    file = folder / "site.yaml"
    file.write_text(yaml.safe_dump(document))
    return Place(folder, file, pacs)


def archived_hashes(place: Place) -> dict[str, str]:
    """By SOP Instance UID, the SHA-256 of what lies in the archive."""
    return {
        key.rsplit("/", 1)[1].removesuffix(".dcm"): hashlib.sha256(data).hexdigest()
        for key, data in place.archived().items()
        if key.endswith(".dcm")
    }


def rows_of(uids: Iterable[str]) -> list[dict[str, str]]:
    """A row for each study, which names it by its UID."""
    return [{"StudyInstanceUID": uid} for uid in sorted(set(uids))]
