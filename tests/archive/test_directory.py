"""What a directory archive does beyond the protocol: modes, sweeping, a full disk."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import subprocess

import pytest

from prefect_dicom.archive import open_archive
from prefect_dicom.config.archive import DirectoryArchive
from prefect_dicom.core.errors import ArchiveConflict, ArchiveError
from prefect_dicom.core.model import Disposition
from prefect_dicom.core.uids import object_key

KEY = object_key("1.2.3", "1.2.3.4", "1.2.3.4.5")


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "archive"
    root.mkdir(mode=0o700)
    return root


def opened(root):
    return open_archive(DirectoryArchive(directory=root))


def failing_with(monkeypatch, function: str, number: int) -> None:
    def fail(*_, **__):
        raise OSError(number, os.strerror(number), "/a/path/with/1.2.3")

    monkeypatch.setattr(os, function, fail)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_files_and_directories_are_for_their_owner_only_whatever_the_umask(root):
    before = os.umask(0)
    try:
        opened(root).put_bytes(KEY, b"bytes")
    finally:
        os.umask(before)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*")}
    assert found.pop(root / KEY) == 0o600
    assert set(found.values()) == {0o700}


def test_nothing_of_an_object_is_seen_before_it_is_on_the_disk(root, monkeypatch):
    synced: list[str] = []
    truly_link, truly_sync = os.link, os.fsync

    def sync(descriptor: int) -> None:
        truly_sync(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def link(source, target) -> None:
        assert synced[-1] == str(source)
        truly_link(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "link", link)
    opened(root).put_bytes(KEY, b"bytes")
    # Each directory is durable in the one above, and last the name of the object itself.
    folders = [root, root / "studies", root / "studies/1.2.3", root / "studies/1.2.3/1.2.3.4"]
    assert [path for path in synced if not path.endswith(".part")] == [str(f) for f in folders]


def test_what_a_dead_writer_left_is_swept_and_a_living_ones_file_is_not(root):
    with opened(root) as archive:
        archive.put_bytes(KEY, b"bytes")
    dead, living = root / ".incoming/dead.part", root / ".incoming/living.part"
    dead.write_bytes(b"half an obj")
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with opened(root) as archive:
            archive.put_bytes(KEY, b"bytes")
        assert not dead.exists()
        assert living.exists()
    assert [key for key, _ in opened(root).keys()] == [KEY]  # noqa: SIM118


def test_what_another_left_that_died_meanwhile_is_swept_at_the_end(root):
    with opened(root) as archive:
        archive.put_bytes(KEY, b"bytes")
        dead = root / ".incoming/dead.part"
        dead.write_bytes(b"half an obj")
    assert not dead.exists()


def test_a_failed_put_leaves_nothing_behind(root, tmp_path):
    path = tmp_path / "arrived.dcm"
    path.write_bytes(b"changed")
    with opened(root) as archive, pytest.raises(ArchiveError):
        archive.put_file(KEY, path, hashlib.sha256(b"arrived").hexdigest(), 7)
    assert [found for found in root.rglob("*") if found.is_file()] == []


def test_a_full_disk_is_reported_and_the_next_smaller_object_still_fits(small_disk, tmp_path):
    data = os.urandom(1024**2)
    path = tmp_path / "arrived.dcm"
    path.write_bytes(data)
    with opened(small_disk) as archive:
        with pytest.raises(ArchiveError) as caught:
            archive.put_file(KEY, path, hashlib.sha256(data).hexdigest(), len(data))
        assert caught.value.code == "archive-full"
        assert caught.value.disposition is Disposition.OPERATOR
        archive.put_bytes(KEY, b"small")
        assert list(archive.keys()) == [(KEY, 5)]


@pytest.mark.parametrize(
    ("function", "number", "code"),
    [
        ("link", errno.EPERM, "archive-refused"),
        ("link", errno.EOPNOTSUPP, "archive-refused"),
        ("link", errno.EDQUOT, "archive-full"),
        ("write", errno.ENOSPC, "archive-full"),
        ("write", errno.EIO, "archive-unavailable"),
        ("fsync", errno.EIO, "archive-unavailable"),
        ("fsync", errno.EINVAL, "unexpected"),
    ],
)
def test_errors_of_the_file_system_have_a_reason_and_name_no_path(
    root, monkeypatch, function, number, code
):
    with opened(root) as archive:
        archive.put_bytes("studies/1/1/1.dcm", b"bytes")
        with monkeypatch.context() as patched:
            failing_with(patched, function, number)
            with pytest.raises(ArchiveError) as caught:
                archive.put_bytes(KEY, b"bytes")
        assert caught.value.code == code
        assert "1.2.3" not in str(caught.value)
        assert not (root / KEY).exists()
        assert list((root / ".incoming").iterdir()) == []


def test_a_directory_that_is_not_there_is_not_made(root):
    root.rmdir()
    with opened(root) as archive:
        for attempt in (lambda: archive.put_bytes(KEY, b""), lambda: list(archive.keys())):
            with pytest.raises(ArchiveError) as caught:
                attempt()
            assert caught.value.code == "archive-missing"
        (check,) = archive.check()
        assert not check.ok
    assert not root.exists()


def test_a_name_taken_by_something_else_than_a_file_is_a_conflict(root, tmp_path):
    (root / KEY).parent.mkdir(parents=True)
    (root / KEY).symlink_to(tmp_path / "elsewhere")
    with opened(root) as archive, pytest.raises(ArchiveConflict):
        archive.put_bytes(KEY, b"bytes")
    assert not (tmp_path / "elsewhere").exists()


def test_a_check_up_tells_a_directory_that_others_may_enter(root):
    root.chmod(0o755)
    *others, last = opened(root).check()
    assert all(check.ok for check in others)
    assert not last.ok
    assert not last.required
    assert "0755" in last.advice
