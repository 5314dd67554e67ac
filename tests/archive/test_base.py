"""Directory, our small S3 and a real Ceph gateway: one protocol, put to the same tests."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefect_dicom.archive import open_archive
from prefect_dicom.archive.base import BLOCK_BYTES
from prefect_dicom.archive.manifest import encode_manifest, put_manifest
from prefect_dicom.config.archive import DirectoryArchive, S3Archive
from prefect_dicom.core.errors import ArchiveConflict, ArchiveError, Interrupted
from prefect_dicom.core.model import Evidence, ManifestInstance, StudyManifest
from prefect_dicom.core.uids import manifest_key, object_key
from tests.support.s3_server import S3Server

PART_BYTES = 5 * 1024**2
KEY = object_key("1.2.3", "1.2.3.4", "1.2.3.4.5")
SIZES = pytest.mark.parametrize(
    "size", [0, 1, 100_000, 2 * PART_BYTES + 1], ids=["empty", "one byte", "one part", "parts"]
)

INVERTED = bytes(range(255, -1, -1))


def bucket_settings(service, **changes) -> S3Archive:
    return S3Archive(
        **{
            "bucket": service.bucket,
            "endpoint": service.endpoint,
            "access_key_id": service.access_key,
            "secret_access_key": service.secret_key,
            "prefix": f"site/{uuid.uuid4().hex}",
            "part_bytes": PART_BYTES,
            "connections": 8,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def s3_server():
    with S3Server() as service:
        yield service


@pytest.fixture(params=["directory", "s3", "radosgw"])
def archive(request, tmp_path):
    if request.param == "directory":
        root = tmp_path / "archive"
        root.mkdir(mode=0o700)
        settings = DirectoryArchive(directory=root)
    elif request.param == "radosgw":
        settings = bucket_settings(request.getfixturevalue("rados_gateway"))
    else:
        settings = bucket_settings(request.getfixturevalue("s3_server"))
    with open_archive(settings) as opened:
        yield opened


def arrival(tmp_path: Path, data: bytes) -> tuple[Path, str, int]:
    path = tmp_path / f"{uuid.uuid4().hex}.dcm"
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest(), len(data)


def everything(archive, key: str) -> bytes:
    return b"".join(archive.read(key))


@SIZES
def test_a_file_comes_back_byte_for_byte_with_the_hash_of_its_arrival(archive, tmp_path, size):
    data = os.urandom(size)
    path, sha256, _ = arrival(tmp_path, data)
    stored = archive.put_file(KEY, path, sha256, size)
    assert (stored.key, stored.sha256, stored.size_bytes) == (KEY, sha256, size)
    assert not stored.already_there
    assert everything(archive, KEY) == data
    assert archive.head(KEY).size_bytes == size
    assert archive.head(KEY).sha256 in (sha256, None)


@pytest.mark.parametrize(
    "size, blocks",
    [(1, 0), (2 * BLOCK_BYTES, 1), (2 * PART_BYTES + 1, PART_BYTES // BLOCK_BYTES + 9)],
)
def test_a_put_that_is_stopped_ends_half_way_and_leaves_nothing(archive, tmp_path, size, blocks):
    file = arrival(tmp_path, os.urandom(size))
    looks = itertools.count()
    archive.stopping = lambda: next(looks) >= blocks
    with pytest.raises(Interrupted):
        archive.put_file(KEY, *file)
    assert archive.head(KEY) is None
    del archive.stopping
    assert not archive.put_file(KEY, *file).already_there


def test_bytes_are_put_by_the_same_rules(archive):
    assert not archive.put_bytes(KEY, b"once").already_there
    assert archive.put_bytes(KEY, b"once").already_there
    with pytest.raises(ArchiveConflict):
        archive.put_bytes(KEY, b"1nce")
    assert everything(archive, KEY) == b"once"


@SIZES
def test_the_same_bytes_again_are_found_and_nothing_is_written(archive, tmp_path, size):
    file = arrival(tmp_path, os.urandom(size))
    archive.put_file(KEY, *file)
    before = archive.head(KEY)
    again = archive.put_file(KEY, *file)
    assert again.already_there
    assert again.sha256 == file[1]
    assert archive.head(KEY) == before


@SIZES
def test_other_bytes_are_a_conflict_and_those_that_were_first_stay(archive, tmp_path, size):
    first = os.urandom(size)
    archive.put_file(KEY, *arrival(tmp_path, first))
    for other in (first.translate(INVERTED) or b"longer", first + b"longer"):
        with pytest.raises(ArchiveConflict):
            archive.put_file(KEY, *arrival(tmp_path, other))
    assert everything(archive, KEY) == first


@SIZES
def test_a_file_that_changed_since_its_arrival_is_not_archived(archive, tmp_path, size):
    path, sha256, _ = arrival(tmp_path, b"x" * size)
    if size:
        with path.open("r+b") as file:
            file.seek(size - 1)
            file.write(b"y")
    else:
        sha256 = hashlib.sha256(b"not empty").hexdigest()
    with pytest.raises(ArchiveError) as caught:
        archive.put_file(KEY, path, sha256, size)
    assert caught.value.code == "spool-damaged"
    assert archive.head(KEY) is None
    assert list(archive.keys()) == []


@pytest.mark.parametrize("change", ["shorter", "longer", "gone"])
def test_a_file_of_another_size_or_none_is_damaged_before_anything_is_sent(
    archive, tmp_path, change
):
    path, sha256, size = arrival(tmp_path, b"x" * 1000)
    if change == "gone":
        path.unlink()
    else:
        os.truncate(path, 999 if change == "shorter" else 1001)
    with pytest.raises(ArchiveError) as caught:
        archive.put_file(KEY, path, sha256, size)
    assert caught.value.code == "spool-damaged"
    assert archive.head(KEY) is None


def test_nothing_is_at_a_key_that_was_not_put(archive):
    assert archive.head(KEY) is None
    with pytest.raises(ArchiveError) as caught:
        everything(archive, KEY)
    assert caught.value.code == "archive-object-missing"
    assert list(archive.keys()) == []


def test_keys_are_listed_with_their_sizes_in_the_order_of_the_keys(archive):
    keys = [
        manifest_key("1.2"),
        object_key("1.2", "1.2.1", "1.2.1.1"),
        object_key("1.2", "1.2.1", "1.2.1.10"),
        object_key("1.2.3", "1.2", "1.2"),
        object_key("1.20", "1", "1"),
        object_key("an unusual uid", "..", ""),
    ]
    for number, key in enumerate(keys):
        archive.put_bytes(key, b"x" * number)
    sizes = {key: number for number, key in enumerate(keys)}
    assert list(archive.keys()) == sorted(sizes.items())
    assert dict(archive.keys("studies/1.2/")) == {key: sizes[key] for key in keys[:3]}
    assert dict(archive.keys("studies/1.2")) == {key: sizes[key] for key in keys[:5]}
    assert list(archive.keys("studies/9")) == []


def test_a_key_that_is_not_made_of_plain_names_reaches_no_archive(archive, tmp_path):
    for key in (
        *("", "/", "/etc/passwd", "a//b", "a/", "../a", "a/..", "a/./b"),
        *(".hidden", "a\0b", "a\nb", "ä", "a b", "x" * 256),
    ):
        for attempt in (
            lambda key=key: archive.put_bytes(key, b""),
            lambda key=key: archive.put_file(key, *arrival(tmp_path, b"")),
            lambda key=key: archive.head(key),
            lambda key=key: everything(archive, key),
        ):
            with pytest.raises(ArchiveError) as caught:
                attempt()
            assert caught.value.code == "unexpected"
    assert list(archive.keys()) == []


def test_of_many_that_put_the_same_object_at_once_all_succeed_and_one_is_stored(archive, tmp_path):
    file = arrival(tmp_path, os.urandom(100_000))
    together = threading.Barrier(8)

    def put(_: int) -> bool:
        together.wait()
        return archive.put_file(KEY, *file).already_there

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(put, range(8))) == [False] + [True] * 7
    assert list(archive.keys()) == [(KEY, 100_000)]


def test_of_many_that_put_different_bytes_at_once_one_wins_and_the_others_conflict(
    archive, tmp_path
):
    files = [arrival(tmp_path, os.urandom(100_000)) for _ in range(8)]
    together = threading.Barrier(8)

    def put(file) -> str | None:
        together.wait()
        try:
            return archive.put_file(KEY, *file).sha256
        except ArchiveConflict:
            return None

    with ThreadPoolExecutor(8) as pool:
        winners = [sha256 for sha256 in pool.map(put, files) if sha256]
    assert len(winners) == 1
    assert hashlib.sha256(everything(archive, KEY)).hexdigest() == winners[0]


def test_a_check_up_finds_every_required_proof_and_leaves_nothing_behind(archive):
    checks = archive.check()
    assert len(checks) >= 5
    assert [check for check in checks if check.required and not check.ok] == []
    assert all(check.advice for check in checks if not check.ok)
    assert list(archive.keys()) == []


def test_no_error_names_the_key(archive, tmp_path):
    archive.put_bytes(KEY, b"first")
    path, sha256, size = arrival(tmp_path, b"x" * 10)
    path.write_bytes(b"y" * 10)
    for attempt in (
        lambda: archive.put_bytes(KEY, b"other"),
        lambda: archive.put_file(KEY + "x", path, sha256, size),
        lambda: everything(archive, KEY + "y"),
    ):
        with pytest.raises(ArchiveError) as caught:
            attempt()
        assert "1.2.3" not in "".join(traceback.format_exception(caught.value))


def test_a_manifest_is_put_once_and_one_that_says_the_same_is_found(archive):
    instance = ManifestInstance("1.2.3.4", "1.2.3.4.5", "1.2.840", "1.2", KEY, 10, "ab" * 32)
    manifest = StudyManifest(
        "1.2.3", "pacs", Evidence.INSTANCE_LIST, "2026-11-21T10:00:00+00:00", (instance,)
    )
    rerun = StudyManifest(
        "1.2.3", "pacs", Evidence.INSTANCE_LIST, "2026-11-21T11:11:11+00:00", (instance,)
    )
    changed = StudyManifest("1.2.3", "pacs", Evidence.SERIES_COUNTS, "", (instance,))
    first = encode_manifest(manifest)
    assert put_manifest(archive, manifest) == first
    assert put_manifest(archive, manifest) == first
    assert put_manifest(archive, rerun) == first != encode_manifest(rerun)
    assert everything(archive, manifest_key("1.2.3")) == first
    with pytest.raises(ArchiveConflict):
        put_manifest(archive, changed)
