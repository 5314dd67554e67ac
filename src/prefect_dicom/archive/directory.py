"""An archive in a directory, with the same protocol as a bucket.

::

    <directory>/.incoming/<random>.part     being written, locked by its writer
    <directory>/studies/...                 complete

A hard link is the conditional put: it fails if the name exists, and a name appears only when all
its bytes are on the disk.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prefect_dicom.archive.base import BLOCK_BYTES, PROBES, Archive, Check, ObjectFacts, checked_key
from prefect_dicom.archive.source import BytesSource, FileSource, Source, sha256_of
from prefect_dicom.config.archive import DirectoryArchive
from prefect_dicom.core.errors import ArchiveConflict, ArchiveError
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.files import create_part, sweep_parts, sync_directory
from prefect_dicom.core.model import ArchivedInstance

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EOPNOTSUPP, errno.EMLINK}
_UNAVAILABLE = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN}


class FolderArchive(Archive):
    """An archive in a local or mounted directory.

    Parameters
    ----------
    settings : DirectoryArchive
        The directory, which must exist: a missing one is rather a disk that is not mounted.
    """

    def __init__(self, settings: DirectoryArchive) -> None:
        self._root = settings.directory
        self._incoming = self._root / ".incoming"
        self._lock = threading.Lock()
        self._swept = False

    def check_usable(self) -> None:
        """Check that the directory exists, and that files can be made in it."""
        with _translated_errors():
            self._must_exist()
            self._sweep_once()
            with self._incoming_file():
                pass

    def put_file(self, key: str, path: Path, sha256: str, size_bytes: int) -> ArchivedInstance:
        """Put a file under a new key."""
        target = self._path(key)
        with FileSource(path, sha256, size_bytes, self.stopping) as source:
            return self._put(key, target, source)

    def put_bytes(self, key: str, data: bytes) -> ArchivedInstance:
        """Put bytes in memory under a new key."""
        return self._put(key, self._path(key), BytesSource(data))

    def head(self, key: str) -> ObjectFacts | None:
        """Return the size only: a file system keeps no hash. :meth:`read` proves more."""
        with _translated_errors():
            size = _size_of_file(self._path(key))
            if size is None:
                # Without the directory every object would seem missing and be requested again.
                self._must_exist()
        return None if size is None else ObjectFacts(size)

    def read(self, key: str) -> Iterator[bytes]:
        """Yield an object in blocks."""
        target = self._path(key)
        with _translated_errors():
            try:
                file = target.open("rb", buffering=0)
            except FileNotFoundError:
                raise ArchiveError("archive-object-missing") from None
            with file:
                while block := file.read(BLOCK_BYTES):
                    yield block

    def keys(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Yield key and size in bytes of all objects with a prefix, in the order of keys."""
        with _translated_errors():
            self._must_exist()
            yield from _walk(self._root, "", prefix)

    def check(self) -> list[Check]:
        """Run the self-test of the directory."""
        name = "the directory exists"
        try:
            self._must_exist()
        except ArchiveError as error:
            return [Check(name, False, error.reason.what_to_do)]
        checks = [Check(name, True)]
        key = f"{PROBES}{secrets.token_hex(8)}"
        name = "objects can be written"
        try:
            self.put_bytes(key, b"probe")
        except ArchiveError as error:
            return [*checks, Check(name, False, f"{error}. {error.reason.what_to_do}")]
        checks.append(Check(name, True))
        checks.append(self._check_condition(key))
        checks.append(self._check_bytes(key))
        with suppress(OSError):
            self._path(key).unlink()
            self._path(key).parent.rmdir()
        mode = stat.S_IMODE(self._root.stat().st_mode)
        checks.append(
            Check(
                "other users are kept out",
                mode & 0o077 == 0,
                "" if mode & 0o077 == 0 else f"The directory has mode {mode:04o}: chmod 0700.",
                required=False,
            )
        )
        return checks

    def close(self) -> None:
        """Remove files of writers that died meanwhile; nothing is held open."""
        with suppress(OSError):
            sweep_parts(self._incoming, strict=True)

    def _check_condition(self, key: str) -> Check:
        name = "nothing is overwritten"
        try:
            self.put_bytes(key, b"other")
        except ArchiveConflict:
            return Check(name, True)
        return Check(name, False, "The file system replaces files on link; use another one.")

    def _check_bytes(self, key: str) -> Check:
        held = b"".join(self.read(key))
        return Check(
            "bytes come back as they were written",
            held == b"probe",
            "" if held == b"probe" else "Check the disk before anything is archived on it.",
        )

    def _path(self, key: str) -> Path:
        return self._root / checked_key(key)

    def _must_exist(self) -> None:
        if not self._root.is_dir():
            raise ArchiveError("archive-missing", "the directory of the archive does not exist")

    def _put(self, key: str, target: Path, source: Source) -> ArchivedInstance:
        with _translated_errors():
            self._must_exist()
            self._sweep_once()
            if (found := _size_of_file(target)) is not None:
                return self._compared(key, target, source, found)
            self._make_directories(target.parent)
            with self._incoming_file() as (incoming, descriptor):
                _copy(source, descriptor)
                os.fsync(descriptor)
                try:
                    os.link(incoming, target)
                except FileExistsError:
                    return self._compared(key, target, source, _size_of_file(target))
                failpoint("object-linked")
            sync_directory(target.parent)
        return ArchivedInstance(key, source.sha256, source.size_bytes)

    def _compared(
        self, key: str, target: Path, source: Source, found: int | None
    ) -> ArchivedInstance:
        if found != source.size_bytes:
            raise ArchiveConflict(detail=f"{found} bytes there, {source.size_bytes} bytes here")
        if sha256_of(self.read(key)) != source.sha256:
            raise ArchiveConflict(detail="same size, another SHA-256")
        # The process that linked it may have died before that was durable.
        sync_directory(target.parent)
        return ArchivedInstance(key, source.sha256, source.size_bytes, already_there=True)

    def _make_directories(self, directory: Path) -> None:
        """Create directories with mode 0700, each durable in its parent."""
        if directory == self._root or directory.is_dir():
            return
        self._make_directories(directory.parent)
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        sync_directory(directory.parent)

    @contextmanager
    def _incoming_file(self) -> Iterator[tuple[str, int]]:
        """Create a file in ``.incoming``, locked until its writer ends or dies, then deleted."""
        incoming, descriptor = create_part(self._incoming)
        try:
            yield incoming, descriptor
        finally:
            with suppress(FileNotFoundError):
                os.unlink(incoming)
            os.close(descriptor)

    def _sweep_once(self) -> None:
        with self._lock:
            if self._swept:
                return
            with suppress(FileExistsError):
                self._incoming.mkdir(mode=0o700)
            sweep_parts(self._incoming, strict=True)
            self._swept = True


def _copy(source: Source, descriptor: int) -> None:
    digest = hashlib.sha256()
    for block in source.blocks(0, source.size_bytes):
        digest.update(block)
        view = memoryview(block)
        while view:
            view = view[os.write(descriptor, view) :]
    if digest.hexdigest() != source.sha256:
        raise ArchiveError("spool-damaged", "the file has another SHA-256 than on arrival")


def _size_of_file(path: Path) -> int | None:
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):
        raise ArchiveConflict(detail="something that is no file has the name")
    return found.st_size


def _walk(directory: Path, above: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield the files below in the order of keys; a directory sorts as its name and a slash."""
    with os.scandir(directory) as entries:
        names = sorted(
            f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
            for entry in entries
            if not entry.name.startswith(".")
        )
    for name in names:
        key = above + name
        if name.endswith("/"):
            if key.startswith(prefix) or prefix.startswith(key):
                yield from _walk(directory / name, key, prefix)
        elif key.startswith(prefix):
            size = None
            # A symbolic link is no object of the archive.
            with suppress(ArchiveConflict):
                size = _size_of_file(directory / name)
            if size is not None:
                yield key, size


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Translate file-system errors into ArchiveError, without the path, which holds UIDs."""
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        if number in _FULL:
            code = "archive-full"
        elif number in _REFUSED:
            code = "archive-refused"
        elif number in _UNAVAILABLE:
            code = "archive-unavailable"
        else:
            code = "unexpected"
        raise ArchiveError(code, f"the file system says: {error.strerror}") from None
