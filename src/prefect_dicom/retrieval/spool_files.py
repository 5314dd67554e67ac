"""Files of a study in the spool, as far as a run has examined them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from prefect_dicom.core.model import InstanceKey


class SpoolFiles:
    """Files of a study in the spool that have been examined, by their SHA-256 (hex)."""

    def __init__(self) -> None:
        self._examined: set[str] = set()
        self._unlisted: dict[str, InstanceKey] = {}
        self._watched: dict[str, tuple[InstanceKey, int, int]] = {}

    @property
    def unlisted(self) -> Collection[str]:
        """The hashes of files whose instances are not on the list."""
        return self._unlisted.keys()

    def is_examined(self, sha256: str) -> bool:
        """Whether the file has been examined."""
        return sha256 in self._examined

    def record_examined(self, path: Path, key: InstanceKey, *, watch: bool) -> None:
        """Remember an examined file; ``watch`` it to notice when it is received again.

        The same bytes received again are another file of the same name.
        """
        self._examined.add(path.stem)
        if watch:
            self._watch(path, key)

    def record_repeat(self, path: Path) -> InstanceKey | None:
        """Notice that a watched file was received again; returns its instance if it was."""
        if path.stem not in self._watched:
            return None
        key, *file = self._watched[path.stem]
        facts = path.stat()
        if [facts.st_ino, facts.st_mtime_ns] == file:
            return None
        self._watched[path.stem] = (key, facts.st_ino, facts.st_mtime_ns)
        return key

    def record_unlisted(self, sha256: str, key: InstanceKey) -> None:
        """Remember an examined file whose instance is not on the list."""
        self._examined.add(sha256)
        self._unlisted[sha256] = key

    def examine_again(self, sha256: str) -> None:
        """Examine a file again if it is received again."""
        self._examined.discard(sha256)

    def examine_unlisted_again(self) -> None:
        """Examine unlisted files again: they may be on a new list."""
        self._examined.difference_update(self._unlisted)
        self._unlisted.clear()

    def forget_unlisted(self) -> None:
        """Forget the unlisted files, which have left the spool."""
        self._unlisted.clear()

    def stop_watching(self, sha256: str) -> None:
        """Stop watching a file."""
        self._watched.pop(sha256, None)

    def _watch(self, path: Path, key: InstanceKey) -> None:
        facts = path.stat()
        self._watched[path.stem] = (key, facts.st_ino, facts.st_mtime_ns)
