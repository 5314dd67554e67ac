"""The spool: where arriving objects lie between the PACS and the archive.

::

    incoming/<random>.part          being written
    ready/<study>/<sha256>.dcm      whole, attributed to a study (by its reference)
    suspect/<study>/<sha256>.dcm    faulty as it arrived; asked for again before it is judged
    quarantine/<sha256>.dcm, .json  whole, but nobody asked for it, or it is somebody else's

A file's name is the SHA-256 taken as its bytes arrived, so a file proves itself: the archive
refuses it when its bytes no longer have that hash. What lies in ``ready`` is therefore the whole
truth about what has arrived, for the process that received it as for one that starts after a
crash. The spool is a cache of the PACS: nothing here needs fsync (after a power loss damaged
files fail their hash and are asked for again), while ledger and archive are durable.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from prefect_dicom.core.errors import PrefectDicomError, SpoolFull
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.files import create_part, sweep_parts
from prefect_dicom.core.model import StoreRequest, StudyReference
from prefect_dicom.core.reasons import REASONS
from prefect_dicom.core.uids import is_sha256
from prefect_dicom.dicom import part10

_CHECK_EVERY_BYTES = 16 * 1024**2
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An object in quarantine, as its note tells it; nothing of the object has been read.

    ``sha256`` is of its bytes, and its name for good. ``study`` is the study it had been
    attributed to, ``sender`` the calling AE title and the address it came from, where known.
    """

    sha256: str
    reason: str
    since: datetime
    size_bytes: int
    study: StudyReference | None = None
    sender: str = ""


class Part:
    """An object being received: its bytes go to a file and, on the way, into a SHA-256.

    The file's lock is held while it is written, so that a sweep can tell a part somebody is
    writing from what a dead process left behind.
    """

    __slots__ = (
        "_data_set_at",
        "_descriptor",
        "_hash",
        "_meta",
        "_name",
        "_spool",
        "_unchecked",
        "began",
        "request",
        "size_bytes",
    )

    def __init__(self, spool: Spool, request: StoreRequest) -> None:
        self.request = request
        self.began = time.monotonic()
        self._spool = spool
        self._unchecked = 0
        # Goes to the disk with the first bytes of the data set, for one call instead of two.
        self._meta = part10.file_meta(request)
        self._hash = hashlib.sha256(self._meta)
        self.size_bytes = self._data_set_at = len(self._meta)
        try:
            spool.check_reserve()
            self._create()
        except (OSError, SpoolFull) as error:
            raise spool.refuse(error) from None

    def _create(self) -> None:
        self._name, self._descriptor = create_part(self._spool.incoming_path)

    @property
    def path(self) -> Path:
        """The file while it is being written."""
        return Path(self._name)

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the Part 10 file, of the bytes written so far."""
        return self._hash.hexdigest()

    def write(self, fragments: Sequence[bytes | memoryview]) -> None:
        """Append bytes of the data set, which are only used during the call.

        Raises
        ------
        SpoolFull
            The disk, or the reserve that is kept on it, is reached.
        """
        size = sum(map(len, fragments))
        if self._meta:
            failpoint("part-begun")
            pieces, self._meta = (self._meta, *fragments), b""
        else:
            pieces = fragments
        for fragment in fragments:
            self._hash.update(fragment)
        try:
            self._write_out(pieces)
            self.size_bytes += size
            self._unchecked += size
            if self._unchecked >= _CHECK_EVERY_BYTES:
                self._unchecked = 0
                self._spool.check_reserve()
        except (OSError, SpoolFull) as error:
            raise self._spool.refuse(error) from None

    def _write_out(self, pieces: Sequence[bytes | memoryview]) -> None:
        written = os.writev(self._descriptor, pieces)
        if written < sum(map(len, pieces)):
            rest = memoryview(b"".join(pieces))[written:]
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]

    def study_instance_uid(self) -> str | None:
        """What the data set says; None where it does not, or cannot be read."""
        if self._meta:
            self.write(())
        return part10.study_of(
            self._descriptor, self._data_set_at, self.request.transfer_syntax_uid
        )

    def move(self, target: str) -> None:
        """Give the whole part its place and end writing."""
        if self._meta:
            self.write(())
        failpoint("part-whole")
        # Renamed before it is closed: the lock keeps a sweep away until it has its name.
        os.replace(self._name, target)
        failpoint("part-kept")
        self.close()

    def close(self) -> None:
        """End writing. The part is whole now; it still lies in ``incoming``."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def discard(self) -> None:
        """Forget the part and free its space."""
        self.path.unlink(missing_ok=True)
        self.close()


class Spool:
    """A spool directory.

    Parameters
    ----------
    path : Path
        Created with mode 0700 where it does not exist.
    reserve_bytes : int
        Free space on its file system that is never used.

    Raises
    ------
    PrefectDicomError
        ``spool-unsafe`` if it is a symbolic link or open to other users, ``spool-unusable`` if
        it cannot be made.
    """

    def __init__(self, path: Path, reserve_bytes: int = 0) -> None:
        self.path = path
        self.reserve_bytes = reserve_bytes
        self.incoming = path / "incoming"
        self.ready = path / "ready"
        # As text, for what happens with every object: making a Path costs more than a rename.
        self.incoming_path = str(self.incoming)
        self._ready_path = str(self.ready)
        self._path = str(path)
        self.refusals = 0
        """How many objects could not be written; a sender was told so, the run was not."""
        self.refusal = ""
        """Why the last of them could not, a reason code."""
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
        """Bytes that may still be written before the reserve is touched; may be negative."""
        facts = os.statvfs(self._path)
        return facts.f_bavail * facts.f_frsize - self.reserve_bytes

    def check_reserve(self) -> None:
        """Raise SpoolFull when the reserve is reached."""
        if self.free_bytes() <= 0:
            raise SpoolFull()

    def refuse(self, error: OSError | SpoolFull) -> OSError | SpoolFull:
        """Note that an object could not be written; returns the error to raise."""
        if isinstance(error, OSError) and error.errno in _FULL:
            error = SpoolFull("spool-full", "the disk is full")
        self.refusal = error.code if isinstance(error, SpoolFull) else "spool-unusable"
        self.refusals += 1
        return error

    # --- arriving

    def begin(self, request: StoreRequest) -> Part:
        """Begin to receive an object; raises SpoolFull."""
        return Part(self, request)

    def keep(self, part: Part, study: StudyReference) -> None:
        """Move a whole part to the study it belongs to. The same bytes again change nothing."""
        target = f"{self._ready_path}/{int(study)}/{part.sha256}.dcm"
        try:
            part.move(target)
        except FileNotFoundError:
            # Its first object, or the first after the study was dropped.
            self._study_folder(self.ready, study)
            part.move(target)

    def quarantine(self, part: Part, reason: str) -> None:
        """Keep a whole part apart, with a note of where it came from and why it is here."""
        request = part.request
        note = {
            "calling_ae_title": request.calling_ae_title,
            "peer_address": request.peer_address,
            "sop_instance_uid": request.sop_instance_uid,
            "size_bytes": part.size_bytes,
        }
        self._note(part.sha256, reason, note)
        part.move(f"{self.quarantined}/{part.sha256}.dcm")

    # --- what lies in it

    def files(self, study: StudyReference) -> list[Path]:
        """The files that have arrived for a study, in no order."""
        return self._files(self.ready / str(study))

    def studies(self) -> set[StudyReference]:
        """The references of all studies of which something lies here."""
        parents = (self.ready, self.suspect)
        names = {entry.name for parent in parents for entry in os.scandir(parent)}
        return {int(name) for name in names if name.isdigit()}

    def waiting_bytes(self) -> int:
        """Bytes of the objects that have arrived and are not archived; looks at each of them."""
        waiting = 0
        for study in os.scandir(self.ready):
            # Studies end, and files go, while somebody looks.
            with contextlib.suppress(OSError):
                waiting += sum(file.stat().st_size for file in os.scandir(study))
        return waiting

    def suspects(self, study: StudyReference) -> set[str]:
        """The hashes of the study's objects that were set aside as faulty."""
        return {path.stem for path in self._files(self.suspect / str(study))}

    def is_damaged(self, study: StudyReference, sha256: str) -> bool:
        """Whether an object's bytes are not those that its name was made of; reads all of them."""
        with self.file(study, sha256).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() != sha256

    def file(self, study: StudyReference, sha256: str) -> Path:
        """The path of an object that has arrived for a study."""
        return self.ready / str(study) / f"{sha256}.dcm"

    def set_aside(self, study: StudyReference, sha256: str) -> None:
        """Take a faulty object out of the way until it has been asked for once more."""
        folder = self._study_folder(self.suspect, study)
        os.replace(self.file(study, sha256), folder / f"{sha256}.dcm")

    def quarantine_file(self, study: StudyReference, sha256: str, reason: str) -> None:
        """Move an object that had been attributed to a study into quarantine."""
        self._note(sha256, reason, {"study": study})
        os.replace(self.file(study, sha256), self.quarantined / f"{sha256}.dcm")

    def quarantine_entries(self) -> Iterator[Quarantined]:
        """What lies in quarantine, in no order."""
        with os.scandir(self.quarantined) as found:
            for entry in found:
                sha256 = entry.name.removesuffix(".dcm")
                if sha256 != entry.name and is_sha256(sha256):
                    yield _as_noted(sha256, entry.stat(), self._read_note(sha256))

    def quarantine_path(self, sha256: str) -> Path:
        """The file of an object in quarantine."""
        return self.quarantined / f"{sha256}.dcm"

    def give_back(self, sha256: str, study: StudyReference) -> None:
        """Move an object out of quarantine, to what has arrived for a study."""
        folder = self._study_folder(self.ready, study)
        os.replace(self.quarantine_path(sha256), folder / f"{sha256}.dcm")
        self._note_path(sha256).unlink(missing_ok=True)

    def forget_quarantined(self, sha256: str) -> None:
        """Delete an object in quarantine, for good."""
        self.quarantine_path(sha256).unlink(missing_ok=True)
        self._note_path(sha256).unlink(missing_ok=True)

    def remove(self, study: StudyReference, sha256: str) -> None:
        """Delete one object of a study (it is archived, or rejected and recorded)."""
        self.file(study, sha256).unlink(missing_ok=True)

    def drop(self, study: StudyReference) -> None:
        """Delete all that lies here for a study; only after it is archived."""
        for folder in (self.ready, self.suspect):
            shutil.rmtree(folder / str(study), ignore_errors=True)
            failpoint("half-dropped")

    def sweep(self) -> int:
        """Delete parts whose writers are dead; returns how many."""
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

    def _note(self, sha256: str, reason: str, note: dict) -> None:
        note = {"reason": reason, "since": datetime.now(UTC).isoformat(), **note}
        self._note_path(sha256).write_text(json.dumps(note, indent=1))
        failpoint("quarantine-noted")

    def _note_path(self, sha256: str) -> Path:
        return self.quarantined / f"{sha256}.json"

    def _read_note(self, sha256: str) -> dict:
        try:
            note = json.loads(self._note_path(sha256).read_bytes())
        except (OSError, ValueError):
            # Lost or cut short in a crash: the object is there all the same.
            return {}
        return note if isinstance(note, dict) else {}


def _as_noted(sha256: str, facts: os.stat_result, note: dict) -> Quarantined:
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
        " at ".join(part for part in sender if isinstance(part, str) and part),
    )
