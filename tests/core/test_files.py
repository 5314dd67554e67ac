"""Locks end with their holder, parts are swept only when nobody writes them, writes are atomic."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefect_dicom.core.files import (
    atomic_write,
    create_file,
    create_part,
    file_lock,
    is_locked,
    lock_file,
    sweep_parts,
)


def test_a_lock_is_seen_by_others_and_ends_with_its_descriptor(tmp_path):
    path = tmp_path / "one.lock"
    descriptor = lock_file(path, wait=False)
    assert path.stat().st_mode & 0o777 == 0o600
    assert is_locked(path)
    with pytest.raises(BlockingIOError):
        lock_file(path, wait=False)
    os.close(descriptor)
    assert not is_locked(path)
    os.close(lock_file(path, wait=False))


def test_a_lock_ends_with_a_process_that_is_killed(tmp_path):
    code = (
        "import sys, time; from prefect_dicom.core.files import lock_file;"
        "lock_file(sys.argv[1], wait=True); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "one.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert is_locked(tmp_path / "one.lock")
        process.kill()
    assert not is_locked(tmp_path / "one.lock")


def test_a_held_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), file_lock(tmp_path / "one.lock"):
        assert is_locked(tmp_path / "one.lock")
        raise RuntimeError
    assert not is_locked(tmp_path / "one.lock")


def test_a_lock_that_is_only_looked_at_makes_no_file_unless_it_may(tmp_path):
    with pytest.raises(FileNotFoundError):
        is_locked(tmp_path / "one.lock")
    assert not is_locked(tmp_path / "one.lock", create=True)
    assert (tmp_path / "one.lock").exists()


def test_a_new_lock_file_must_not_exist(tmp_path):
    (tmp_path / "one.lock").touch()
    with pytest.raises(FileExistsError):
        lock_file(tmp_path / "one.lock", wait=True, new=True)


def test_only_parts_without_a_writer_are_swept(tmp_path):
    living, descriptor = create_part(tmp_path)
    dead, other = create_part(tmp_path)
    os.close(other)
    (tmp_path / "link.part").symlink_to(living)
    assert sweep_parts(tmp_path) == 1
    assert sorted(tmp_path.iterdir()) == sorted([Path(living), tmp_path / "link.part"])
    os.close(descriptor)
    assert sweep_parts(tmp_path, strict=True) == 1
    assert not Path(dead).exists()


@pytest.mark.parametrize("sync", [False, True])
def test_a_write_replaces_its_target_as_a_whole(tmp_path, sync):
    target = tmp_path / "one.txt"
    target.write_text("old")
    with atomic_write(target, sync=sync) as draft:
        draft.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_write_that_fails_leaves_its_target_and_no_draft(tmp_path):
    target = tmp_path / "one.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(target) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_created_file_is_private_unless_said_otherwise(tmp_path):
    with open(create_file(tmp_path / "one"), "w") as file:
        file.write("text")
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o600
