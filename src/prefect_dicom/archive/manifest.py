"""Manifest of a study: the last object written of it, and the proof that it is complete.

Canonical JSON, so that equal manifests are equal bytes. ``listed_at`` alone may differ
between two runs that archived the same study, see :func:`same_manifest`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from datetime import datetime
from typing import Any, TypeVar

from prefect_dicom.archive.base import Archive
from prefect_dicom.core.errors import ArchiveConflict, ArchiveError
from prefect_dicom.core.model import Evidence, ManifestInstance, StudyManifest, WithheldInstance
from prefect_dicom.core.uids import is_name, is_sha256, manifest_key, object_key, study_prefix

FORMAT = "prefect-dicom/study-manifest"
VERSION = 1
_VERSION_OF_A_SELECTION = 2
"""Version of the manifest of a selection, which no software must take for a whole study."""
_VERSION_WITH_MISSING = 3
"""Version of the manifest of a study that lacks instances, as a person has accepted; neither."""
_SELECTION = ("selection", "unwanted_series")
_ACCEPTED = ("missing", "accepted_by", "accepted_at")

_Entry = TypeVar("_Entry", ManifestInstance, WithheldInstance)


def encode_manifest(manifest: StudyManifest) -> bytes:
    """Encode a manifest as canonical JSON: sorted keys, sorted lists, ASCII, a final newline."""
    body = asdict(_in_order(manifest))
    body |= {"format": FORMAT, "version": VERSION, "evidence": manifest.evidence.value}
    if manifest.selection:
        body["version"] = _VERSION_OF_A_SELECTION
    if manifest.missing:
        body["version"] = _VERSION_WITH_MISSING
    absent = (() if manifest.selection else _SELECTION) + (() if manifest.missing else _ACCEPTED)
    for name in absent:
        del body[name]
    # ASCII: a UID may hold bytes that are no text, which survive as escapes only.
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode("ascii")


def decode_manifest(data: bytes) -> StudyManifest:
    """Decode a manifest.

    Raises
    ------
    ArchiveError
        ``manifest-unreadable``: not JSON, not a manifest, of a newer version, or incomplete.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise _unreadable("it is not JSON") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise _unreadable("it is not a study manifest")
    version = body.get("version")
    if version not in (VERSION, _VERSION_OF_A_SELECTION, _VERSION_WITH_MISSING):
        raise _unreadable("it is of another version")
    accepted = version == _VERSION_WITH_MISSING
    if "missing" in body and not accepted:
        raise _unreadable("its version does not know of missing instances")
    selected = version == _VERSION_OF_A_SELECTION or (accepted and "selection" in body)
    try:
        manifest = StudyManifest(
            study_instance_uid=_text(body["study_instance_uid"]),
            node=_text(body["node"]),
            evidence=Evidence(body["evidence"]),
            listed_at=_text(body["listed_at"]),
            instances=tuple(_entry(ManifestInstance, each) for each in body["instances"]),
            withheld=tuple(_entry(WithheldInstance, each) for each in body["withheld"]),
            warnings=_texts(body["warnings"]),
            selection=_text(body["selection"]) if selected else "",
            unwanted_series=_texts(body["unwanted_series"]) if selected else (),
            missing=tuple(_entry(WithheldInstance, each) for each in body["missing"])
            if accepted
            else (),
            accepted_by=_text(body["accepted_by"]) if accepted else "",
            accepted_at=_text(body["accepted_at"]) if accepted else "",
        )
    except (KeyError, TypeError, ValueError):
        raise _unreadable("a field is missing or of another kind") from None
    if selected and not manifest.selection:
        raise _unreadable("it is of a part of the study, and does not say of which")
    if accepted and not (manifest.missing and manifest.accepted_by):
        raise _unreadable("it is of a study with gaps, and does not say which or who accepted them")
    if not all(is_sha256(each.sha256) for each in manifest.instances):
        raise _unreadable("a SHA-256 is malformed")
    return manifest


def manifest_at(prefix: str, data: bytes) -> StudyManifest:
    """Decode a manifest and check that it can prove the study at the prefix.

    For a manifest unknown to the ledger: its keys must be those this software would have used.

    Raises
    ------
    ArchiveError
        ``manifest-unreadable``, also where it names nothing, an instance twice, another study
        or other keys than its UIDs make.
    """
    manifest = decode_manifest(data)
    uid = manifest.study_instance_uid
    if study_prefix(uid) != prefix:
        raise _unreadable("it is of another study than its place")
    for each in manifest.instances:
        if each.key != object_key(uid, each.series_instance_uid, each.sop_instance_uid):
            raise _unreadable("it names a key that its UIDs do not make")
    if not manifest.entries or len(manifest.keys) < len(manifest.entries):
        raise _unreadable("it names nothing, or something twice")
    try:
        listed = datetime.fromisoformat(manifest.listed_at)
    except ValueError:
        listed = None
    if listed is None or listed.tzinfo is None or not is_name(manifest.node):
        raise _unreadable("its node or its time is malformed")
    return manifest


def same_manifest(one: bytes, other: bytes) -> bool:
    """Whether two manifests describe a study equally; an unreadable one never does.

    The time of listing may differ, the series of the PACS beside those selected, and who has
    accepted what is missing.
    """
    try:
        first, second = decode_manifest(one), decode_manifest(other)
    except ArchiveError:
        return False
    first, second = (
        _in_order(replace(each, listed_at="", unwanted_series=(), accepted_by="", accepted_at=""))
        for each in (first, second)
    )
    return first == second


def held_manifest(archive: Archive, study_instance_uid: str) -> bytes | None:
    """Read the manifest of a study from the archive; None if there is none."""
    key = manifest_key(study_instance_uid)
    return None if archive.head(key) is None else archive.load(key)


def put_manifest(archive: Archive, manifest: StudyManifest) -> bytes:
    """Put the manifest, last and once; an equal one in the archive counts as put.

    The latter happens after a crash between this put and the ledger's commit.

    Returns
    -------
    bytes
        The manifest in the archive, whose time of listing may differ from the given one.

    Raises
    ------
    ArchiveConflict
        Another manifest of the study is in the archive.
    """
    key = manifest_key(manifest.study_instance_uid)
    data = encode_manifest(manifest)
    try:
        archive.put_bytes(key, data)
        return data
    except ArchiveConflict:
        held = held_manifest(archive, manifest.study_instance_uid)
        if held is None or not same_manifest(held, data):
            raise ArchiveConflict(
                detail="the study's manifest is there and says something else"
            ) from None
        # Putting the held bytes again compares their hash.
        archive.put_bytes(key, held)
        return held


def _in_order(manifest: StudyManifest) -> StudyManifest:
    def place(entry: ManifestInstance | WithheldInstance) -> tuple[str, ...]:
        last = entry.key if isinstance(entry, ManifestInstance) else entry.reason
        return entry.series_instance_uid, entry.sop_instance_uid, last

    return replace(
        manifest,
        instances=tuple(sorted(manifest.instances, key=place)),
        withheld=tuple(sorted(manifest.withheld, key=place)),
        missing=tuple(sorted(manifest.missing, key=place)),
        warnings=tuple(sorted(manifest.warnings)),
        unwanted_series=tuple(sorted(manifest.unwanted_series)),
    )


def _entry(kind: type[_Entry], body: dict[str, Any]) -> _Entry:
    readers: dict[str, Callable[[object], Any]]
    readers = {"size_bytes": _size, "version_id": _text_or_none, "warnings": _texts}
    return kind(
        **{each.name: readers.get(each.name, _text)(body[each.name]) for each in fields(kind)}
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _text_or_none(value: object) -> str | None:
    return None if value is None else _text(value)


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError
    return tuple(_text(value) for value in values)


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError
    return value


def _unreadable(why: str) -> ArchiveError:
    return ArchiveError("manifest-unreadable", why)
