"""Upload of received instances from the spool into the archive."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from prefect_dicom.archive import Archive
from prefect_dicom.archive.spool import Spool
from prefect_dicom.core.errors import ArchiveError, Interrupted, PrefectDicomError
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.metrics import upload_ended, upload_waits, uploaded
from prefect_dicom.core.model import (
    ArchivedInstance,
    InstanceKey,
    ReceivedInstance,
    StudyReference,
)
from prefect_dicom.core.uids import object_key
from prefect_dicom.retrieval.study_task import StudyTask
from prefect_dicom.run.context import RunContext

_STORED_PER_WRITE = 200
_NICE = 10

_Stored = tuple[InstanceKey, ArchivedInstance, tuple[str, ...]]
"""An instance, what the archive says of it, and the warnings of its validation."""


def give_way() -> None:
    """Let receivers and requests have the processor before this thread, where Linux allows it.

    A burst of uploads would otherwise delay the answer that a PACS waits for.
    """
    if sys.platform == "linux":
        nice = max(_NICE, os.getpriority(os.PRIO_PROCESS, 0))
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


class Uploader:
    """Uploads instances over many connections, and records them in batches. Thread-safe.

    Parameters
    ----------
    pool : ThreadPoolExecutor
        Has a thread for each connection.
    """

    def __init__(
        self, context: RunContext, spool: Spool, archive: Archive, pool: ThreadPoolExecutor
    ) -> None:
        self._context = context
        self._spool = spool
        self._archive = archive
        self._pool = pool

    def upload(self, tasks: Sequence[StudyTask]) -> None:
        """Store all received instances of the studies, many at once, recorded in batches.

        Raises
        ------
        ArchiveError
            One could not be stored. What could is recorded, of all studies.
        """
        received = [
            (task, instance) for task in tasks for instance in task.instances.received.values()
        ]
        for first in range(0, len(received), _STORED_PER_WRITE):
            self._context.control.check()
            self._upload_batch(tasks, received[first : first + _STORED_PER_WRITE])

    def _upload_batch(
        self, tasks: Sequence[StudyTask], batch: Sequence[tuple[StudyTask, ReceivedInstance]]
    ) -> None:
        trouble: PrefectDicomError | None = None
        futures = [(task, instance, self._submit(task, instance)) for task, instance in batch]
        done: dict[StudyReference, list[_Stored]] = defaultdict(list)
        for task, instance, future in futures:
            if trouble is not None and future.cancel():
                continue
            try:
                stored = future.result()
            except (ArchiveError, Interrupted) as error:
                if error.code == "spool-damaged":
                    self._forget_damaged(task, instance)
                else:
                    trouble = trouble or error
                continue
            warnings = task.instances.findings_of(instance.key)
            done[task.reference].append((instance.key, stored, warnings))
            failpoint("put-answered")
        for task in tasks:
            if task.reference in done:
                self._record_stored(task, done[task.reference])
        if trouble is not None:
            raise trouble

    def _submit(self, task: StudyTask, instance: ReceivedInstance) -> Future[ArchivedInstance]:
        key = object_key(task.claim.study_instance_uid, *instance.key)
        path = self._spool.file(task.reference, instance.sha256)
        upload_waits()
        future = self._pool.submit(self._put_file, key, path, instance)
        future.add_done_callback(upload_ended)
        return future

    def _put_file(self, key: str, path: Path, instance: ReceivedInstance) -> ArchivedInstance:
        began = time.monotonic()
        stored = self._archive.put_file(key, path, instance.sha256, instance.size_bytes)
        uploaded(instance.size_bytes, time.monotonic() - began)
        return stored

    def _record_stored(self, task: StudyTask, done: list[_Stored]) -> None:
        self._context.ledger.instances.record_stored(task.claim, done)
        failpoint("stored-recorded")
        for key, stored, _ in done:
            task.instances.record_stored(key, stored.sha256)
            self._spool.remove(task.reference, stored.sha256)

    def _forget_damaged(self, task: StudyTask, instance: ReceivedInstance) -> None:
        self._spool.remove(task.reference, instance.sha256)
        self._context.ledger.instances.record_lost(task.claim, [instance.key])
        task.record_damaged(instance)
