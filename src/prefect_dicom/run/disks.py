"""A warning before the disks of the spool and the archive are full."""

from __future__ import annotations

import logging
import shutil

from prefect_dicom.archive.spool import Spool
from prefect_dicom.config.archive import DirectoryArchive
from prefect_dicom.core.events import Event
from prefect_dicom.run.context import RunContext

log = logging.getLogger(__name__)

_LOOK_SECONDS = 30.0


class DiskWatch:
    """Warns once when the space for objects comes to its end: before it stops the work.

    That is below twice the spool's reserve, or below the reserve where the archive is a directory.
    """

    def __init__(self, context: RunContext, spool: Spool) -> None:
        self._context = context
        self._spool = spool
        self._low: set[str] = set()
        self._look_at = float("-inf")

    def look(self) -> None:
        """Look at the free space, twice a minute at most."""
        now = self._context.clock.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_SECONDS
        reserve = self._spool.reserve_bytes
        free_bytes = {"spool-full": self._spool.free_bytes()}
        archive = self._context.site.archive
        if isinstance(archive, DirectoryArchive):
            free_bytes["archive-full"] = shutil.disk_usage(archive.directory).free
        for code, free in free_bytes.items():
            if free >= reserve:
                self._low.discard(code)
            elif code not in self._low:
                self._low.add(code)
                self._warn(code, max(0, free))

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
