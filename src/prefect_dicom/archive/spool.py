"""Spool: directory of received instances between the PACS and the archive.

::

    incoming/<random>.part          being written
    ready/<study>/<sha256>.dcm      complete, attributed to a study (by its reference)
    suspect/<study>/<sha256>.dcm    faulty on arrival; requested again before it is judged
    quarantine/<sha256>.dcm, .json  complete, but not requested, or of another patient

A file's name is the SHA-256 taken as its bytes arrived, so a file proves itself: the archive
refuses it when its bytes no longer have that hash. ``ready`` is therefore the complete record of
what has arrived, for the process that received it and for one that starts after a crash. The
spool is a cache of the PACS: nothing here needs fsync (after a power loss damaged files fail
their hash and are requested again), while ledger and archive are durable.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect_dicom.core.background import Background
from prefect_dicom.core.errors import PrefectDicomError, SpoolFull
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.files import create_part, sweep_parts
from prefect_dicom.core.model import StoreRequest, StudyReference
from prefect_dicom.core.reasons import REASONS
from prefect_dicom.core.uids import is_sha256
from prefect_dicom.dicom import part10

_CHECK_EVERY_BYTES = 16 * 1024**2
# Handing over costs some 30 us, as much as hashing 40 KB here does.
_LEAST_IN_BACKGROUND_BYTES = 64 * 1024
_HANDED_OVER_BYTES = 256 * 1024
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An instance in quarantine, by its note; the instance itself is not read.

    Attributes
    ----------
    sha256 : str
        Hash of its bytes, and its name.
    reason : str
        Reason code.
    since : datetime
        When it was put into quarantine.
    size_bytes : int
        Size of the file.
    study : StudyReference or None
        Study it had been attributed to.
    sender : str
        Calling AE title and address of its sender, if known.
    """

    sha256: str
    reason: str
    since: datetime
    size_bytes: int
    study: StudyReference | None = None
    sender: str = ""


class IncomingInstance:
    """An instance being received: its bytes go to a file and into a SHA-256.

    With a background, much of it is hashed there, in the buffers that it arrived in, beside the
    transfer; little of it is hashed at once, which is sooner done than handed over.

    The file's lock is held while it is written, so that a sweep can tell a file under way
    from what a dead process left behind.
    """

    __slots__ = (
        "_background",
        "_data_set_at",
        "_descriptor",
        "_hash",
        "_is_handed_over",
        "_meta",
        "_name",
        "_spool",
        "_unchecked",
        "_unhashed",
        "_unhashed_bytes",
        "_whole_file",
        "began",
        "request",
        "size_bytes",
    )

    def __init__(
        self,
        spool: Spool,
        request: StoreRequest,
        background: Background | None = None,
        *,
        whole_file: bool = False,
    ) -> None:
        self.request = request
        self._background = background
        self._is_handed_over = False
        """Whether the hash is the background's."""
        self._unhashed: list[bytes | memoryview] = []
        self._unhashed_bytes = 0
        self.began = time.monotonic()
        self._spool = spool
        self._unchecked = 0
        # Written with the first bytes of the data set, in one call instead of two.
        # Of a whole file it is the sender's own.
        self._meta = b"" if whole_file else part10.file_meta(request)
        self._hash = hashlib.sha256(self._meta)
        self.size_bytes = self._data_set_at = len(self._meta)
        self._whole_file = whole_file
        try:
            spool.check_reserve()
            self._create()
        except (OSError, SpoolFull) as error:
            raise spool.refuse(error) from None

    def _create(self) -> None:
        self._name, self._descriptor = create_part(self._spool.incoming_path)

    @property
    def path(self) -> Path:
        """Path of the file while it is being written."""
        return Path(self._name)

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the Part 10 file, of the bytes written so far."""
        return self._hash.hexdigest()

    def write(self, fragments: Sequence[bytes | memoryview]) -> None:
        """Append bytes of the data set.

        The buffers are used only during the call; with a background until :meth:`give_back`.

        Raises
        ------
        SpoolFull
            The disk is full, or its reserve is reached.
        """
        size = sum(map(len, fragments))
        pieces: Sequence[bytes | memoryview]
        if self._meta or not self.size_bytes:
            failpoint("part-begun")
        if self._meta:
            pieces, self._meta = (self._meta, *fragments), b""
        else:
            pieces = fragments
        self._unhashed += fragments
        self._unhashed_bytes += size
        if self._background is None:
            self._update(self._take_unhashed())
        elif self._unhashed_bytes >= _HANDED_OVER_BYTES:
            self._hand_over()
        try:
            self._write_out(pieces)
            self.size_bytes += size
            self._unchecked += size
            if self._unchecked >= _CHECK_EVERY_BYTES:
                self._unchecked = 0
                self._spool.check_reserve()
        except (OSError, SpoolFull) as error:
            raise self._spool.refuse(error) from None

    def give_back(self, *, all_of_it: bool) -> bool:
        """Whether buffers of :meth:`write` are needed no more, but by the background.

        Parameters
        ----------
        all_of_it : bool
            Give them back even if they will be hashed better together with what follows.
        """
        if all_of_it or self._unhashed_bytes < _LEAST_IN_BACKGROUND_BYTES:
            self._finish_hash()
        return not self._unhashed

    def finish_hash(self) -> bool:
        """Hash what is left if it is little, else have it hashed; whether the hash is there."""
        self._finish_hash()
        return not self._is_handed_over

    def when_hashed(self, then: Callable[[], object]) -> None:
        """Have something done, in the background that hashes the instance, behind that."""
        if self._background is not None:
            self._background.hand_over(then)

    def _finish_hash(self) -> None:
        """Hash what is left, or hand it over."""
        if self._is_handed_over or self._unhashed_bytes >= _LEAST_IN_BACKGROUND_BYTES:
            self._hand_over()
        else:
            self._update(self._take_unhashed())

    def _hand_over(self) -> None:
        if self._unhashed and self._background is not None:
            self._is_handed_over = True
            self._background.hand_over(functools.partial(self._update, self._take_unhashed()))

    def _take_unhashed(self) -> list[bytes | memoryview]:
        fragments, self._unhashed, self._unhashed_bytes = self._unhashed, [], 0
        return fragments

    def _update(self, fragments: list[bytes | memoryview]) -> None:
        for fragment in fragments:
            self._hash.update(fragment)

    def _write_out(self, pieces: Sequence[bytes | memoryview]) -> None:
        written = os.writev(self._descriptor, pieces)
        if written < sum(map(len, pieces)):
            rest = memoryview(b"".join(pieces))[written:]
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]

    def study_instance_uid(self) -> str | None:
        """Read the StudyInstanceUID from the data set; None if it has none or is unreadable."""
        if self._whole_file:
            return part10.study_of(self._descriptor)
        if self._meta:
            self.write(())
        return part10.study_of(
            self._descriptor, self._data_set_at, self.request.transfer_syntax_uid
        )

    def move(self, target: str) -> None:
        """Move the complete file to its place and close it."""
        if self._meta:
            self.write(())
        failpoint("part-whole")
        # Renamed before it is closed: the lock keeps a sweep away until it has its name.
        os.replace(self._name, target)
        failpoint("part-kept")
        self.close()

    def close(self) -> None:
        """Close the file, which is complete and still in ``incoming``."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def discard(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)
        self.close()


class Spool:
    """A spool directory.

    Parameters
    ----------
    path : Path
        Directory; created with mode 0700 if it does not exist.
    reserve_bytes : int
        Free space on its file system that is kept free.

    Raises
    ------
    PrefectDicomError
        ``spool-unsafe`` if it is a symbolic link or open to other users, ``spool-unusable`` if
        it cannot be created.
    """

    def __init__(self, path: Path, reserve_bytes: int = 0) -> None:
        self.path = path
        self.reserve_bytes = reserve_bytes
        self.incoming = path / "incoming"
        self.ready = path / "ready"
        # Text for operations per instance: making a Path costs more than a rename.
        self.incoming_path = str(self.incoming)
        self._ready_path = str(self.ready)
        self._path = str(path)
        self.refusals = 0
        """Instances that could not be written, whose senders got a failure status."""
        self.refusal = ""
        """Reason code of the last refusal."""
        self.suspect = path / "suspect"
        self.quarantined = path / "quarantine"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.is_symlink() or path.stat().st_mode & 0o077:
                raise PrefectDicomError("spool-unsafe", "the spool directory")
            for folder in (self.incoming, self.ready, self.suspect, self.quarantined):
                folder.mkdir(mode=0o700, exist_ok=True)
            if os.statvfs(path).f_flag & os.ST_RDONLY:
                raise PrefectDicomError("spool-unusable", "its file system is read-only")
        except OSError as error:
            raise PrefectDicomError("spool-unusable", os.strerror(error.errno or 0)) from None

    def free_bytes(self) -> int:
        """Return the bytes free above the reserve; may be negative."""
        facts = os.statvfs(self._path)
        return facts.f_bavail * facts.f_frsize - self.reserve_bytes

    def check_reserve(self) -> None:
        """Raise SpoolFull when the reserve is reached."""
        if self.free_bytes() <= 0:
            raise SpoolFull()

    def refuse(self, error: OSError | SpoolFull) -> OSError | SpoolFull:
        """Count an instance that could not be written; returns the error to raise."""
        if isinstance(error, OSError) and error.errno in _FULL:
            error = SpoolFull("spool-full", "the disk is full")
        self.refusal = error.code if isinstance(error, SpoolFull) else "spool-unusable"
        self.refusals += 1
        return error

    # --- receiving

    def begin(
        self,
        request: StoreRequest,
        background: Background | None = None,
        *,
        whole_file: bool = False,
    ) -> IncomingInstance:
        """Begin to receive an instance, hashed in the background; raises SpoolFull.

        Parameters
        ----------
        whole_file : bool
            Whether a Part 10 file follows, with the file meta of its sender, and not a data set.
        """
        return IncomingInstance(self, request, background, whole_file=whole_file)

    def keep(self, incoming: IncomingInstance, study: StudyReference) -> None:
        """Move a complete instance to its study. The same bytes again change nothing."""
        target = f"{self._ready_path}/{int(study)}/{incoming.sha256}.dcm"
        try:
            incoming.move(target)
        except FileNotFoundError:
            # Its first instance, or the first after the study was dropped.
            self._study_folder(self.ready, study)
            incoming.move(target)

    def quarantine(self, incoming: IncomingInstance, reason: str) -> None:
        """Move a complete instance to quarantine, with a note of its sender and the reason."""
        request = incoming.request
        note = {
            "calling_ae_title": request.calling_ae_title,
            "peer_address": request.peer_address,
            "sop_instance_uid": request.sop_instance_uid,
            "size_bytes": incoming.size_bytes,
        }
        self._note(incoming.sha256, reason, note)
        incoming.move(f"{self.quarantined}/{incoming.sha256}.dcm")

    # --- contents

    def files(self, study: StudyReference) -> list[Path]:
        """Return the files received for a study, in no order."""
        return self._files(self.ready / str(study))

    def studies(self) -> set[StudyReference]:
        """Return the references of all studies with files in the spool."""
        parents = (self.ready, self.suspect)
        names = {entry.name for parent in parents for entry in os.scandir(parent)}
        return {int(name) for name in names if name.isdigit()}

    def waiting_bytes(self) -> int:
        """Return the bytes of received instances that are not archived; stats each file."""
        waiting = 0
        for study in os.scandir(self.ready):
            # Studies end, and files go, meanwhile.
            with contextlib.suppress(OSError):
                waiting += sum(file.stat().st_size for file in os.scandir(study))
        return waiting

    def suspects(self, study: StudyReference) -> set[str]:
        """Return the hashes of the study's instances that were set aside as faulty."""
        return {path.stem for path in self._files(self.suspect / str(study))}

    def is_damaged(self, study: StudyReference, sha256: str) -> bool:
        """Whether an instance's bytes differ from the hash in its name; reads all of them."""
        with self.file(study, sha256).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() != sha256

    def file(self, study: StudyReference, sha256: str) -> Path:
        """Return the path of an instance received for a study."""
        return self.ready / str(study) / f"{sha256}.dcm"

    def set_aside(self, study: StudyReference, sha256: str) -> None:
        """Set a faulty instance aside until it has been requested once more."""
        folder = self._study_folder(self.suspect, study)
        os.replace(self.file(study, sha256), folder / f"{sha256}.dcm")

    def bring_back(self, study: StudyReference) -> None:
        """Move the instances of a study that were set aside back to the received ones."""
        for path in self._files(self.suspect / str(study)):
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, self._study_folder(self.ready, study) / path.name)

    def quarantine_file(self, study: StudyReference, sha256: str, reason: str) -> None:
        """Move an instance that had been attributed to a study into quarantine."""
        self._note(sha256, reason, {"study": study})
        os.replace(self.file(study, sha256), self.quarantined / f"{sha256}.dcm")

    def quarantine_entries(self) -> Iterator[Quarantined]:
        """Yield the instances in quarantine, in no order."""
        with os.scandir(self.quarantined) as found:
            for entry in found:
                sha256 = entry.name.removesuffix(".dcm")
                if sha256 != entry.name and is_sha256(sha256):
                    yield _as_noted(sha256, entry.stat(), self._read_note(sha256))

    def quarantine_path(self, sha256: str) -> Path:
        """Return the path of an instance in quarantine."""
        return self.quarantined / f"{sha256}.dcm"

    def give_back(self, sha256: str, study: StudyReference) -> None:
        """Move an instance from quarantine to the received instances of a study."""
        folder = self._study_folder(self.ready, study)
        os.replace(self.quarantine_path(sha256), folder / f"{sha256}.dcm")
        self._note_path(sha256).unlink(missing_ok=True)

    def forget_quarantined(self, sha256: str) -> None:
        """Delete an instance in quarantine."""
        self.quarantine_path(sha256).unlink(missing_ok=True)
        self._note_path(sha256).unlink(missing_ok=True)

    def remove(self, study: StudyReference, sha256: str) -> None:
        """Delete one instance of a study (archived, or rejected and recorded)."""
        self.file(study, sha256).unlink(missing_ok=True)

    def drop(self, study: StudyReference) -> None:
        """Delete all files of a study; only after it is archived."""
        for folder in (self.ready, self.suspect):
            shutil.rmtree(folder / str(study), ignore_errors=True)
            failpoint("half-dropped")

    def sweep(self) -> int:
        """Delete incoming files of dead writers; returns how many."""
        return sweep_parts(self.incoming)

    # --- private

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        try:
            with os.scandir(folder) as entries:
                names = [e.name for e in entries if e.is_file(follow_symlinks=False)]
        except FileNotFoundError:
            return []
        return [folder / n for n in names if n.endswith(".dcm") and is_sha256(n[:-4])]

    @staticmethod
    def _study_folder(parent: Path, study: StudyReference) -> Path:
        folder = parent / str(int(study))
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def _note(self, sha256: str, reason: str, note: dict[str, Any]) -> None:
        note = {"reason": reason, "since": datetime.now(UTC).isoformat(), **note}
        self._note_path(sha256).write_text(json.dumps(note, indent=1))
        failpoint("quarantine-noted")

    def _note_path(self, sha256: str) -> Path:
        return self.quarantined / f"{sha256}.json"

    def _read_note(self, sha256: str) -> dict[str, Any]:
        try:
            note = json.loads(self._note_path(sha256).read_bytes())
        except (OSError, ValueError):
            # Lost or cut short in a crash; the instance is there all the same.
            return {}
        return note if isinstance(note, dict) else {}


def _as_noted(sha256: str, facts: os.stat_result, note: dict[str, Any]) -> Quarantined:
    reason, study = note.get("reason"), note.get("study")
    try:
        since = datetime.fromisoformat(note["since"]).astimezone(UTC)
    except (KeyError, TypeError, ValueError):
        since = datetime.fromtimestamp(facts.st_mtime, UTC)
    sender = [note.get("calling_ae_title"), note.get("peer_address")]
    return Quarantined(
        sha256,
        reason if isinstance(reason, str) and reason in REASONS else "unexpected",
        since,
        facts.st_size,
        study if isinstance(study, int) else None,
        " at ".join(text for text in sender if isinstance(text, str) and text),
    )
