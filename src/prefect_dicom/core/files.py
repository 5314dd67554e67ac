"""Files that processes share: locks that end with their holder, and writes that are atomic."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from prefect_dicom.core.failpoints import failpoint

_PRIVATE = 0o600


# --- locks


def lock_file(path: str | Path, *, wait: bool, new: bool = False) -> int:
    """Lock a file exclusively with ``flock``; it is created with mode 0600 where it is missing.

    Parameters
    ----------
    wait : bool
        Wait until the lock is free, instead of raising BlockingIOError.
    new : bool
        The file must not exist yet.

    Returns
    -------
    int
        A descriptor, open for reading and writing. The lock lasts until it is closed or the
        process ends, however it ends. Programs that this one starts do not inherit it; a bare
        ``fork`` shares it.

    Raises
    ------
    BlockingIOError
        Another descriptor holds the lock, and ``wait`` is false.
    FileExistsError
        ``new`` is true and the file exists.
    """
    exclusive = os.O_EXCL if new else 0
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | exclusive, _PRIVATE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def file_lock(path: str | Path) -> Iterator[None]:
    """Hold the exclusive lock of a file during the block; wait until it is free."""
    descriptor = lock_file(path, wait=True)
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def looked_at_lock(path: str | Path, *, create: bool = False) -> Iterator[bool]:
    """Whether another descriptor holds the file's lock; where none does, none can in the block.

    Parameters
    ----------
    create : bool
        Create the file, with mode 0600, where it is missing.

    Raises
    ------
    OSError
        The file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), _PRIVATE)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            held = True
        else:
            held = False
        yield held
    finally:
        os.close(descriptor)


def is_locked(path: str | Path, *, create: bool = False) -> bool:
    """Whether another descriptor holds the file's lock; see :func:`looked_at_lock`."""
    with looked_at_lock(path, create=create) as held:
        return held


# --- parts: files under a temporary name, until they are whole


def create_part(folder: str | Path) -> tuple[str, int]:
    """Create a file for what is not whole yet, locked as long as its writer lives.

    Returns
    -------
    str
        Its path: a random name that ends with ``.part``.
    int
        The locked descriptor, open for reading and writing.
    """
    while True:
        path = f"{folder}/{secrets.token_hex(16)}.part"
        descriptor = lock_file(path, wait=True, new=True)
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        # Swept away between its creation and its lock.
        os.close(descriptor)


def sweep_parts(folder: Path, *, strict: bool = False) -> int:
    """Delete the parts whose writers are dead: those whose lock is free. Returns how many.

    Parameters
    ----------
    strict : bool
        Raise OSError where a part cannot be opened, instead of leaving it.
    """
    swept = 0
    for path in folder.glob("*.part"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as error:
            if strict and error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Renamed between glob and lock: the name is gone, nothing is deleted.
            path.unlink(missing_ok=True)
            swept += 1
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
    return swept


# --- durable and atomic writes


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: ``fsync`` of the directory itself."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(
    target: Path, *, sync: bool = False, fail_point: str | None = None
) -> Iterator[Path]:
    """A path to write to, which replaces the target in one step if the block raises nothing.

    Parameters
    ----------
    sync : bool
        ``fsync`` the file before it is renamed: after a power loss the target is the old file or
        the new one, and never an empty one.
    fail_point : str, optional
        The fail point between the block and the renaming.
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield draft
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    if sync:
        with draft.open("rb") as file:
            os.fsync(file.fileno())
    if fail_point is not None:
        failpoint(fail_point)
    draft.replace(target)


def create_file(path: Path, mode: int = _PRIVATE) -> int:
    """A descriptor of a new or emptied file, open for writing; a new one has this mode."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
