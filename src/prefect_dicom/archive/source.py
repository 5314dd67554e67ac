"""Sources of a put: a file of the spool or bytes in memory, readable in blocks repeatedly."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, Self

from prefect_dicom.archive.base import BLOCK_BYTES
from prefect_dicom.core.errors import ArchiveError, Interrupted
from prefect_dicom.core.failpoints import failpoint


class Source(Protocol):
    """Bytes of one object, with their expected hash and size."""

    sha256: str
    size_bytes: int

    def blocks(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield ``length`` bytes from ``offset``; raises ``spool-damaged`` if there are fewer."""

    def damage(self) -> str | None:
        """Return how the bytes differ from their hash and size now, or None."""


class FileSource:
    """A file of the spool, open for reading; a context manager.

    Raises
    ------
    ArchiveError
        ``spool-damaged``: the file is gone, cannot be read or has another size.
    Interrupted
        While it is read, if ``stopping`` returns True.
    """

    def __init__(
        self,
        path: Path,
        sha256: str,
        size_bytes: int,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.sha256 = sha256
        self.size_bytes = size_bytes
        self._stopping = stopping
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise _unreadable(error) from None
        if os.fstat(self._file.fileno()).st_size != size_bytes:
            self._file.close()
            raise ArchiveError("spool-damaged", "the file has another size than on arrival")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def blocks(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield blocks of the file."""
        failpoint("put-begun")
        # pread has no position that a failed attempt could leave in the middle.
        end = offset + length
        while offset < end:
            if self._stopping():
                raise Interrupted()
            try:
                block = os.pread(self._file.fileno(), min(BLOCK_BYTES, end - offset), offset)
            except OSError as error:
                raise _unreadable(error) from None
            if not block:
                raise ArchiveError("spool-damaged", "the file ended before its size on arrival")
            offset += len(block)
            yield block

    def damage(self) -> str | None:
        """Return how the file differs from its hash and size now, or None."""
        if os.fstat(self._file.fileno()).st_size != self.size_bytes:
            return "the file has another size than on arrival"
        if sha256_of(self.blocks(0, self.size_bytes)) != self.sha256:
            return "the file has another SHA-256 than on arrival"
        return None


class BytesSource:
    """Bytes in memory; computes their hash."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.size_bytes = len(data)

    def blocks(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield the bytes as one block."""
        if length:
            yield self._data[offset : offset + length]

    def damage(self) -> str | None:
        """Return None: bytes in memory do not change."""
        return None


def sha256_of(blocks: Iterator[bytes]) -> str:
    """Return the SHA-256 of all blocks together, in hexadecimal."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _unreadable(error: OSError) -> ArchiveError:
    # Only the number: the text of an OSError holds the path.
    return ArchiveError("spool-damaged", f"the file cannot be read ({error.strerror})")
