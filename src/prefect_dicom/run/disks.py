"""A warning before the disks of the spool and the archive are full."""

from __future__ import annotations

import contextlib
import logging
import shutil

from prefect_dicom.archive.spool import Spool
from prefect_dicom.config.archive import DirectoryArchive
from prefect_dicom.core.events import Event
from prefect_dicom.run.context import RunContext

log = logging.getLogger(__name__)

_LOOK_SECONDS = 30.0


class DiskWatch:
    """Warning that the disk of the spool or of a directory archive is nearly full.

    Sent once, as the event ``disk.low``, when less than the spool's reserve is left: beyond the
    reserve on the spool's disk, in all on the archive's. Sent again after there was more meanwhile.
    """

    def __init__(self, context: RunContext, spool: Spool) -> None:
        self._context = context
        self._spool = spool
        self._low: set[str] = set()
        self._look_at = float("-inf")

    def look(self) -> None:
        """Check the free space, every 30 seconds at most."""
        now = self._context.clock.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        for code, free in self._free_bytes().items():
            if free >= self._spool.reserve_bytes:
                self._low.discard(code)
            elif code not in self._low:
                self._low.add(code)
                self._warn(code, max(0, free))

    def _free_bytes(self) -> dict[str, int]:
        """Bytes left by the reason code of a full disk, without disks that cannot be read."""
        found: dict[str, int] = {}
        with contextlib.suppress(OSError):
            found["spool-full"] = self._spool.free_bytes()
        archive = self._context.site.archive
        if isinstance(archive, DirectoryArchive):
            with contextlib.suppress(OSError):
                found["archive-full"] = shutil.disk_usage(archive.directory).free
        return found

    def _warn(self, code: str, free_bytes: int) -> None:
        log.warning("%s is near: %d bytes left", code, free_bytes)
        self._context.events.publish(
            Event(
                name="disk.low",
                at=self._context.clock.now(),
                reason=code,
                figures={"free_bytes": free_bytes},
            )
        )
