"""The journal of a flow run: what Prefect is to show of it, as lines of JSON in a file.

Where no Prefect server is needed none is started: a run writes a journal, and
:mod:`prefect_dicom.server.recorder` takes it into Prefect's database. The file is locked as long
as its run lives, so that a run that was killed is known as one.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any
from uuid import uuid4

from prefect_dicom.core.files import lock_file

log = logging.getLogger(__name__)

JOURNALS = "prefect-dicom/journals"
"""Folder of the journals in Prefect's home."""
SUFFIX = ".jsonl"
FAILED = ".failed"
"""Suffix of a journal that could not be recorded."""


class Kind(StrEnum):
    """What a line is about."""

    FLOW_RUN = "flow-run"
    TASK_RUN = "task-run"
    STATE = "state"
    ARTIFACT = "artifact"
    PROGRESS = "progress"
    LOG = "log"
    EVENT = "event"


class StateType(StrEnum):
    """Prefect's types of states that a journal has."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    CRASHED = "CRASHED"

    @property
    def is_final(self) -> bool:
        """Whether a run in such a state has ended."""
        return self not in (StateType.PENDING, StateType.RUNNING)


class Journal:
    """Writes the journal of one flow run. Use :func:`open_journal`.

    Any thread may write. What cannot be written is lost to Prefect and stops nothing.
    """

    def __init__(self, descriptor: int, flow_run: str) -> None:
        self.flow_run = flow_run
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._is_complete = True

    def begin(self, flow: str, name: str | None, parameters: Mapping[str, Any]) -> None:
        """Write what flow run it is; the first line."""
        content = {"flow": flow, "name": name, "parameters": dict(parameters)}
        self._write(Kind.FLOW_RUN, self.flow_run, content)

    def task_run(self, task: str, name: str, number: int, tag: str) -> str:
        """Write that a task run begins, the ``number``-th of its task. Returns its id."""
        content = {"task": task, "name": name, "number": number, "tag": tag}
        return self._write(Kind.TASK_RUN, str(uuid4()), content)

    def state(self, run: str, state: StateType, name: str = "", message: str = "") -> None:
        """Write the next state of the flow run or of one of its task runs."""
        content = {"run": run, "type": state, "name": name or state.capitalize()}
        self._write(Kind.STATE, str(uuid4()), content | {"message": message})

    def artifact(self, kind: str, key: str, description: str, data: Any) -> str:
        """Write an artifact as Prefect stores it. Returns its id."""
        content = {"type": kind, "key": key, "description": description, "data": data}
        return self._write(Kind.ARTIFACT, str(uuid4()), content)

    def progress(self, artifact: str, percent: float, description: str) -> None:
        """Write how far it is now."""
        content = {"artifact": artifact, "description": description, "data": percent}
        self._write(Kind.PROGRESS, str(uuid4()), content)

    def log(self, level: int, words: str) -> None:
        """Write a line of the flow run's log; ``level`` is one of :mod:`logging`."""
        self._write(Kind.LOG, str(uuid4()), {"level": level, "message": words})

    def event(self, content: Mapping[str, Any]) -> None:
        """Write an event: the arguments of Prefect's ``emit_event``."""
        self._write(Kind.EVENT, str(uuid4()), content)

    def _write(self, kind: Kind, number: str, content: Mapping[str, Any]) -> str:
        line = {"kind": kind, "id": number, "at": datetime.now(UTC), **content}
        data = json.dumps(line, default=_as_text).encode() + b"\n"
        with self._lock:
            try:
                _write_whole(self._descriptor, data)
            except OSError as error:
                if self._is_complete:
                    words = "Prefect will not show all of this run: its journal cannot be written"
                    log.warning("%s (%s)", words, error.strerror)
                self._is_complete = False
        return number


def _write_whole(descriptor: int, data: bytes) -> None:
    """Append a line, or nothing of it."""
    begin = os.fstat(descriptor).st_size
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, begin)
            os.lseek(descriptor, begin, os.SEEK_SET)
        raise


def recorder_lock(home: Path) -> Path:
    """What a recorder of Prefect's home holds while it is at work."""
    return home / JOURNALS / "recorder.lock"


def _as_text(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


@contextmanager
def open_journal(home: Path) -> Iterator[Journal]:
    """The journal of a new flow run in Prefect's home, locked until the block ends.

    Raises
    ------
    OSError
        It cannot be created.
    """
    folder = home / JOURNALS
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    flow_run = str(uuid4())
    descriptor = lock_file(folder / f"{flow_run}{SUFFIX}", wait=True, new=True)
    try:
        yield Journal(descriptor, flow_run)
    finally:
        os.close(descriptor)
