"""Snapshot of a set-up for the auditor: PACS log, ledger, archive and spool, read independently.

Nothing here shares code with what it reads but the site file's settings: the ledger's tables are
read with plain SQL, manifests as JSON, instances by pydicom and hashlib, a bucket by boto3.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import boto3
import pydicom
from botocore.config import Config
from pydicom.filereader import read_partial

from prefect_dicom.config.archive import DirectoryArchive, S3Archive
from prefect_dicom.config.site import Site
from prefect_dicom.testing.pacs import ScriptedPacs

_TABLES = ("runs", "cohorts", "cohort_rows", "studies", "row_studies", "instances", "manifests")
SPOOL_FOLDERS = ("ready", "suspect", "quarantine")
_STORED_ANSWERS = {0x0000, 0xB000, 0xB006, 0xB007}

Row = dict[str, Any]
Identity = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class HeldObject:
    """An object of the archive."""

    sha256: str
    size_bytes: int
    identity: Identity | None
    """StudyInstanceUID, SeriesInstanceUID, SOPInstanceUID; None where it is no DICOM object, and
    the last alone, as requested, where it is damaged."""
    data_set_sha256: str = ""
    text: bytes = b""
    """What a manifest holds."""


@dataclass(slots=True)
class Snapshot:
    """State of the set-up at one time.

    Read in the direction in which instances move, so that a moving one is seen twice rather than
    missed: the receiver may outlive a killed run for a moment.
    """

    answered: frozenset[str]
    """SOP Instance UIDs that were answered with success."""
    tables: dict[str, list[Row]]
    objects: dict[str, HeldObject]
    spool: dict[str, tuple[str, str]]
    """SHA-256 and SOP Instance UID of the instance files, by path below the spool."""

    def by_reference(self) -> dict[int, Row]:
        """Return the ledger's studies by their reference."""
        return {row["reference"]: row for row in self.tables["studies"]}


class SetupReader:
    """Reader of the whole set-up of one site.

    Parameters
    ----------
    site : Site
        Says where ledger, archive and spool are.
    pacs : sequence of ScriptedPacs
        Every PACS of the site, once each.
    """

    def __init__(self, site: Site, pacs: Sequence[ScriptedPacs]) -> None:
        self._site = site
        self._pacs = pacs

    def look(self) -> Snapshot:
        """Take a snapshot."""
        answered = frozenset(
            sent.sop_instance_uid
            for pacs in self._pacs
            for request in list(pacs.log)
            for sent in request.sent
            if sent.status in _STORED_ANSWERS
        )
        spool = {}
        for folder in SPOOL_FOLDERS:
            for path in files_below(self._site.spool.path / folder):
                if path.suffix == ".dcm":
                    found = _describe(path.read_bytes())
                    uid = found.identity[2] if found.identity else ""
                    spool[str(path.relative_to(self._site.spool.path))] = (found.sha256, uid)
        objects = {key: _describe(data) for key, data in self._read_archive()}
        return Snapshot(answered, self._read_ledger(), objects, spool)

    def _read_ledger(self) -> dict[str, list[Row]]:
        settings = self._site.ledger
        if settings.url is not None:
            import psycopg

            url = settings.url.get_secret_value().replace("+psycopg", "", 1)
            connection: Any = psycopg.connect(url)
        elif settings.path is not None and settings.path.exists():
            connection = sqlite3.connect(f"{settings.path.absolute().as_uri()}?mode=ro", uri=True)
        else:
            return {table: [] for table in _TABLES}
        with contextlib.closing(connection):
            return {table: _rows_of(connection, table) for table in _TABLES}

    @property
    def archive_directory(self) -> Path | None:
        """Directory of the archive; None for a bucket."""
        archive = self._site.archive
        return archive.directory if isinstance(archive, DirectoryArchive) else None

    def _read_archive(self) -> Iterator[tuple[str, bytes]]:
        if self.archive_directory is not None:
            for path in files_below(self.archive_directory):
                key = str(path.relative_to(self.archive_directory))
                if not key.startswith(".incoming/"):
                    yield key, path.read_bytes()
            return
        archive, client = self._bucket(), self._client()
        for entry in self._entries(client):
            answer = client.get_object(Bucket=archive.bucket, Key=entry["Key"])
            yield entry["Key"].removeprefix(self._prefix), answer["Body"].read()

    def _bucket(self) -> S3Archive:
        archive = self._site.archive
        assert isinstance(archive, S3Archive), "asked for where the archive is no directory"
        return archive

    @property
    def _prefix(self) -> str:
        prefix = self._bucket().prefix
        return f"{prefix}/" if prefix else ""

    def _client(self) -> Any:
        archive = self._bucket()
        session = boto3.session.Session(profile_name=archive.profile, region_name=archive.region)
        style = archive.addressing or ("path" if archive.endpoint else "auto")
        config = Config(s3={"addressing_style": style})
        return session.client("s3", endpoint_url=archive.endpoint, config=config)

    def _entries(self, client: Any) -> Iterator[Row]:
        pages = client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket().bucket, Prefix=self._prefix):
            yield from page.get("Contents", ())

    def archive_objects(self) -> dict[str, HeldObject]:
        """Read every object of the archive, by key."""
        return {key: _describe(data) for key, data in self._read_archive()}

    def archive_traces(self) -> set[tuple[str, object]]:
        """Return traces of writes that leave the bytes unchanged: times and inodes."""
        if self.archive_directory is not None:
            found = ((path, path.stat()) for path in files_below(self.archive_directory))
            return {(str(path), (stat.st_mtime_ns, stat.st_ino)) for path, stat in found}
        return {(each["Key"], each.get("LastModified")) for each in self._entries(self._client())}

    def count_retrieves(self) -> int:
        """Count the C-MOVE and C-GET requests of all PACS."""
        return sum(
            len(pacs.requests(service)) for pacs in self._pacs for service in ("C-MOVE", "C-GET")
        )


def inventory_of(pacs: ScriptedPacs) -> dict[str, dict[tuple[str, str], str]]:
    """Return the SHA-256 of each data set of a PACS, by study, series and instance."""
    held: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    for stored in pacs.holdings:
        key = stored.series_instance_uid, stored.sop_instance_uid
        held[stored.study_instance_uid][key] = hashlib.sha256(stored.encoded()).hexdigest()
    return held


def files_below(directory: Path) -> Iterator[Path]:
    """Yield all files below a directory."""
    for folder, _, names in os.walk(directory):
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file():
                yield path


def _rows_of(connection: Any, table: str) -> list[Row]:
    cursor = connection.cursor()
    try:
        cursor.execute(f"SELECT * FROM {table}")
    except Exception as error:
        # A run that died before it had made the tables.
        if "no such table" in str(error) or type(error).__name__ == "UndefinedTable":
            connection.rollback()
            return []
        raise
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, values, strict=True)) for values in cursor.fetchall()]


def unescaped(text: str) -> str:
    """Undo the ledger's escapes of characters that a database cannot hold."""
    plain, *escaped = text.split("\x1a")
    return plain + "".join(chr(int(each[:4], 16)) + each[4:] for each in escaped)


def manifests_in(now: Snapshot) -> dict[str, tuple[str, Row]]:
    """Return key and content of the manifests in the archive, by StudyInstanceUID."""
    found = {}
    for key, held in now.objects.items():
        if key.endswith("/manifest.json"):
            with contextlib.suppress(ValueError):
                manifest = json.loads(held.text)
                found[manifest["study_instance_uid"]] = (key, manifest)
    return found


def key_of(each: Row) -> tuple[str, str]:
    """Return series and instance UID of an entry of a manifest."""
    return each["series_instance_uid"], each["sop_instance_uid"]


def _describe(data: bytes) -> HeldObject:
    sha256 = hashlib.sha256(data).hexdigest()
    if data[128:132] != b"DICM":
        return HeldObject(sha256, len(data), None, text=data)
    identity: Identity | None = None
    data_set_sha256 = ""
    with contextlib.suppress(Exception):
        # What can be said of an object that is damaged.
        meta = read_partial(BytesIO(data), stop_when=lambda *_: True).file_meta
        identity = ("", "", str(meta.MediaStorageSOPInstanceUID))
        # Behind the preamble, DICM and the group length, which counts the rest of group 2.
        data_set = data[144 + meta.FileMetaInformationGroupLength :]
        data_set_sha256 = hashlib.sha256(data_set).hexdigest()
        read = pydicom.dcmread(BytesIO(data), stop_before_pixels=True)
        identity = (
            str(read["StudyInstanceUID"].value),
            str(read["SeriesInstanceUID"].value),
            str(read["SOPInstanceUID"].value),
        )
    return HeldObject(sha256, len(data), identity, data_set_sha256)
