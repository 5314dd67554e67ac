"""Protocol of an archive, a bucket or a directory.

An object is put once and never replaced: a second put of the same bytes succeeds, other bytes are
a conflict. Every put states the SHA-256 taken on arrival, and fails unless the bytes still have
it.
"""

from __future__ import annotations

import hashlib
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from prefect_dicom.core.clock import Clock
from prefect_dicom.core.errors import ArchiveError
from prefect_dicom.core.model import ArchivedInstance

BLOCK_BYTES = 256 * 1024
"""Bytes of an object in memory at a time."""

PROBES = "probes/"
"""Beginning of the keys of objects by which a back end is tried; they are no part of an archive."""

_READS = 3
"""Attempts to read an object: a broken stream is read again from its beginning."""
_POLL_SECONDS = 0.5
_T = TypeVar("_T")
_COMPONENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """Metadata of an object in the archive.

    Attributes
    ----------
    size_bytes : int
        Size of the object.
    sha256 : str or None
        Hexadecimal hash; None if the archive keeps none.
    version_id, etag : str or None
        As the store answers them.
    sha256_by_store : bool
        Whether the store computed the hash from its bytes; else it is the one recorded with the
        put.
    """

    size_bytes: int
    sha256: str | None = None
    version_id: str | None = None
    etag: str | None = None
    sha256_by_store: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """One result of a self-test. If it is not ``required``, failing only weakens a proof."""

    name: str
    ok: bool
    advice: str = ""
    required: bool = True


class Archive(ABC):
    """Destination of studies. Keys are relative; all methods are thread-safe."""

    stopping: Callable[[], bool] = staticmethod(lambda: False)
    """Whether the run is to stop: polled while a file is put, and between attempts to reach a
    service. The call under way then ends with :class:`~prefect_dicom.core.errors.Interrupted`."""
    clock = Clock()
    """How to wait between attempts to reach a service."""

    def sleep(self, seconds: float) -> bool:
        """Wait between two attempts; returns False, and earlier, where the run is to stop."""
        never = threading.Event()
        until = self.clock.monotonic() + seconds
        while not self.stopping():
            if (left := until - self.clock.monotonic()) <= 0:
                return True
            self.clock.wait(never, min(left, _POLL_SECONDS))
        return False

    @abstractmethod
    def check_usable(self) -> None:
        """Check that the archive is there, and that nothing in it can be overwritten.

        Some cheap requests, once; the first put does the same.

        Raises
        ------
        ArchiveError
            Why nothing can be archived, ``archive-overwrites`` among others.
        """

    @abstractmethod
    def put_file(self, key: str, path: Path, sha256: str, size_bytes: int) -> ArchivedInstance:
        """Put a file under a new key.

        Parameters
        ----------
        key : str
            Components of letters, digits, ``.``, ``_`` and ``-``, separated by slashes.
        path : Path
            The file; it is read in blocks.
        sha256 : str
            Hexadecimal hash taken on arrival.
        size_bytes : int
            Size of the file in bytes.

        Returns
        -------
        ArchivedInstance
            With ``already_there`` if the same bytes were under the key before.

        Raises
        ------
        ArchiveConflict
            Other bytes are under the key.
        ArchiveError
            ``spool-damaged`` where the file no longer has the hash, ``archive-checksum`` where
            it has and the archive got other bytes, or why the archive did not take it.
        """

    @abstractmethod
    def put_bytes(self, key: str, data: bytes) -> ArchivedInstance:
        """Put bytes in memory, by the same rules as :meth:`put_file`."""

    @abstractmethod
    def head(self, key: str) -> ObjectFacts | None:
        """Return the metadata of an object; None if there is none."""

    @abstractmethod
    def read(self, key: str) -> Iterator[bytes]:
        """Yield the object in blocks; it is opened with the first one.

        Raises
        ------
        ArchiveError
            ``archive-object-missing`` if there is none.
        """

    def load(self, key: str) -> bytes:
        """Return a small object as a whole; raises as :meth:`read`."""
        return self._retry_once(lambda: b"".join(self.read(key)))

    def digest(self, key: str) -> str:
        """Read an object and return its SHA-256 (hex); raises as :meth:`read`."""

        def read() -> str:
            digest = hashlib.sha256()
            for block in self.read(key):
                digest.update(block)
            return digest.hexdigest()

        return self._retry_once(read)

    @staticmethod
    def _retry_once(read: Callable[[], _T]) -> _T:
        for _ in range(_READS - 1):
            try:
                return read()
            except ArchiveError as error:
                if error.code != "archive-unavailable":
                    raise
        return read()

    @abstractmethod
    def keys(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Yield key and size in bytes of all objects with a prefix, in the order of keys.

        Probe objects are left out, unless the prefix names them.
        """

    @abstractmethod
    def check(self) -> list[Check]:
        """Self-test with probe objects: what the archive honours, and which proofs it can give."""

    @abstractmethod
    def close(self) -> None:
        """Close connections; the archive is not used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checked_key(key: str) -> str:
    """Return the key if all components are plain names.

    Raises
    ------
    ArchiveError
        A component is empty, begins with a dot or has other characters: the key was not built
        by :mod:`prefect_dicom.core.uids`.

    Examples
    --------
    >>> checked_key("studies/1.2.3/manifest.json")
    'studies/1.2.3/manifest.json'
    >>> checked_key("studies/../../etc")
    Traceback (most recent call last):
    prefect_dicom.core.errors.ArchiveError: unexpected: a key has a component that is no plain name
    """
    if all(_COMPONENT.fullmatch(component) for component in key.split("/")):
        return key
    raise ArchiveError("unexpected", "a key has a component that is no plain name")
