"""Disks of a test's own: small, full, read-only or with a quota."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(path: Path, *, mebibytes: int = 4, inodes: int | None = None) -> Iterator[Path]:
    """A file system of a few MiB at a new directory; skips where nothing can be mounted."""
    path.mkdir(parents=True)
    options = f"size={mebibytes}m,mode=0700" + (f",nr_inodes={inodes}" if inodes else "")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield path
    finally:
        # Lazily: what a receiver still holds open goes with it.
        subprocess.run(["umount", "--lazy", path], check=True)


def remount(path: Path, options: str) -> bool:
    """Change a mounted disk: ``ro``, ``rw``; False while a file that is open hinders it."""
    changed = subprocess.run(
        ["mount", "-o", f"remount,{options}", path], capture_output=True, check=False
    )
    return changed.returncode == 0


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[Path]:
    """A directory in which nothing can be written any more, whatever is open there."""
    subprocess.run(["mount", "--bind", path, path], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def fill(path: Path, *, but: int = 0) -> Path:
    """Fill a disk but for so many bytes, with one file, which is returned."""
    filler = path / "filler"
    facts = os.statvfs(path)
    size = facts.f_bavail * facts.f_frsize - but
    with filler.open("wb") as file:
        file.write(bytes(max(size, 0)))
    return filler
