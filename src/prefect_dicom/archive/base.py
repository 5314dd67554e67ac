"""What an archive promises, whichever it is: a bucket or a directory.

An object is put once and never replaced: a second put of the same bytes finds them there, other
bytes are a conflict. The SHA-256 taken when the bytes arrived goes with every put, and the put
fails unless the bytes still have it.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from prefect_dicom.core.errors import ArchiveError
from prefect_dicom.core.model import ArchivedInstance

BLOCK_BYTES = 256 * 1024
"""How much of an object is in memory at a time."""

_READS = 3
"""A stream that breaks says nothing of the object: it is read from its beginning again."""
_T = TypeVar("_T")
_COMPONENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True, slots=True)
class ObjectFacts:
    """What the archive says of an object without handing it out.

    ``sha256`` (hex) is None where the archive keeps none. ``sha256_by_store`` tells whether the
    store computed it from the bytes it holds; otherwise it is what was recorded with the put.
    """

    size_bytes: int
    sha256: str | None = None
    version_id: str | None = None
    etag: str | None = None
    sha256_by_store: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a check-up. Where it is not ``required``, failing weakens a proof only."""

    name: str
    ok: bool
    advice: str = ""
    required: bool = True


class Archive(ABC):
    """Where studies are kept. Keys are relative; all methods may be called from any thread."""

    stopping: Callable[[], bool] = staticmethod(lambda: False)
    """Whether the run is to stop: asked while a file is put, and between tries of a service that
    is away. What is under way then ends with :class:`~prefect_dicom.core.errors.Interrupted`."""

    @abstractmethod
    def put_file(self, key: str, path: Path, sha256: str, size_bytes: int) -> ArchivedInstance:
        """Put a file under a key that nothing has yet.

        Parameters
        ----------
        key : str
            Components of letters, digits, ``.``, ``_`` and ``-``, parted by slashes.
        path : Path
            The file; it is read in blocks.
        sha256 : str
            Hexadecimal, taken when the bytes arrived.
        size_bytes : int
            Size of the file in bytes.

        Returns
        -------
        ArchivedInstance
            With ``already_there`` where the same bytes were under the key before.

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
        """Put bytes that are in memory, by the same rules as :meth:`put_file`."""

    @abstractmethod
    def head(self, key: str) -> ObjectFacts | None:
        """What the archive says of the object; None where there is none."""

    @abstractmethod
    def read(self, key: str) -> Iterator[bytes]:
        """The object in blocks; opened when the first one is asked for.

        Raises
        ------
        ArchiveError
            ``archive-object-missing`` where there is none.
        """

    def load(self, key: str) -> bytes:
        """A small object as a whole; raises as :meth:`read`."""
        return self._retry_once(lambda: b"".join(self.read(key)))

    def digest(self, key: str) -> str:
        """The SHA-256 (hex) of the object's bytes, which are read; raises as :meth:`read`."""

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
        """Key and size in bytes of all objects whose key begins so, in the keys' order."""

    @abstractmethod
    def check(self) -> list[Check]:
        """Try on probe objects what this archive honours, and so which proofs it can give."""

    @abstractmethod
    def close(self) -> None:
        """Let go of connections; the archive is not used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checked_key(key: str) -> str:
    """The key itself, if no component can be anything but a plain name.

    Raises
    ------
    ArchiveError
        A component is empty, begins with a dot or has other characters: whoever built the key
        did not use :mod:`prefect_dicom.core.uids`.

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
