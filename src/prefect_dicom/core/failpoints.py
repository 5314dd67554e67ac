"""Names for the places where a run may die, so that a test can make it die there.

Between any two effects that outlive the process (a file that is renamed, a transaction, a put)
the code says ``reached("name")``. That does nothing, unless the environment variable
``PREFECT_DICOM_FAULT`` says otherwise when the process starts::

    PREFECT_DICOM_FAULT=POINT:NTH:KIND[:NOTE]

The ``NTH`` time the process reaches ``POINT`` (``*``: any), it is killed (``kill``), finds the
disk full (``enospc``) or meets an exception that nothing in it expects (``raise``). The variable
is inherited by the receiver. Where several processes have it, ``NOTE`` is a file that the first
of them makes, with its process id: the fault happens in that one, once.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from collections.abc import Mapping
from typing import NamedTuple

VARIABLE = "PREFECT_DICOM_FAULT"


class Point(NamedTuple):
    """What is done before a point and what is still to do; whether that writes to a disk."""

    before: str
    after: str
    writes: bool = False


POINTS: Mapping[str, Point] = {
    "cohort-recorded": Point("the cohort's rows are in the ledger", "the run begins"),
    "row-answered": Point("the PACS answered a row's query", "its studies go into the ledger"),
    "receiver-started": Point("a receiver is being started", "it is waited for"),
    "claimed": Point("the studies of a chunk are claimed", "they are listed"),
    "associated": Point("an association to the PACS stands", "the request is sent"),
    "list-half-read": Point("the PACS listed a study's series", "it lists their instances"),
    "list-half-written": Point("a study is listed, not committed", "its instances follow"),
    "list-recorded": Point("the ledger has the list", "instances are asked for"),
    "expectation-noted": Point("the receiver expects studies", "the run hears of it"),
    "part-begun": Point("an object's file is made", "its bytes are written", writes=True),
    "part-whole": Point("an object's bytes are written", "it gets its name", writes=True),
    "part-kept": Point("an object has its name in the spool", "the sender gets its answer"),
    "store-answered": Point("the sender has its answer", "the ledger hears of the object"),
    "request-ended": Point("the retrieve had its final response", "what came is looked at"),
    "validated": Point("an object was found good", "the ledger hears of it"),
    "list-extended": Point("the ledger lists what came unlisted", "it hears that it is here"),
    "received-recorded": Point("the ledger says received", "the object is put"),
    "set-aside": Point("a faulty object is set aside", "it is asked for again", writes=True),
    "rejection-recorded": Point("the ledger says rejected", "the object's file is deleted"),
    "quarantine-noted": Point("a quarantined object's note is written", "it follows", writes=True),
    "put-begun": Point("the put of an object has begun", "its bytes go", writes=True),
    "object-linked": Point("a directory archive has the object", "its part file is deleted"),
    "put-answered": Point("the archive has answered a put", "the ledger hears of it"),
    "stored-recorded": Point("the ledger says stored", "the spool files are deleted"),
    "study-stored": Point("all instances are in the archive", "the study is listed again"),
    "listed-again": Point("the second list is the first", "the manifest is put", writes=True),
    "manifest-put": Point("the manifest is in the archive", "the ledger hears of it"),
    "archived-recorded": Point("the ledger says archived", "the study's spool is deleted"),
    "half-dropped": Point("a part of the study's spool is deleted", "the rest is", writes=True),
    "half-reported": Point("one report is being written", "it takes its place", writes=True),
}
"""Every name that :func:`reached` is called with, in the order a study meets them."""

KINDS = ("kill", "raise", "enospc")


class Fault(Exception):
    """An exception that nothing expects."""


class _Armed:
    """One fault that is to happen."""

    def __init__(self, point: str, nth: int, kind: str, note: str) -> None:
        if point not in (*POINTS, "*") or kind not in KINDS or nth < 1:
            raise ValueError(f"{VARIABLE} names no point, number and kind")
        self._point, self._nth, self._kind, self._note = point, nth, kind, note
        # Threads count together: next() on it is one step of the interpreter.
        self._times = itertools.count(1)

    def at(self, point: str) -> None:
        if self._point not in (point, "*") or next(self._times) != self._nth:
            return
        if self._note:
            try:
                descriptor = os.open(self._note, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                return
            os.write(descriptor, f"{os.getpid()} {point}\n".encode())
            os.close(descriptor)
        if self._kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        if self._kind == "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise Fault(point)


_armed: _Armed | None = None


def arm(fault: str | None) -> None:
    """Set this process's fault, in the words of the environment variable; None for none.

    Raises
    ------
    ValueError
        The text is no fault.
    """
    global _armed
    if not fault:
        _armed = None
        return
    point, nth, kind, *note = fault.split(":", 3)
    _armed = _Armed(point, int(nth), kind, note[0] if note else "")


def reached(point: str) -> None:
    """Say that the code is at a point of :data:`POINTS`."""
    if _armed is not None:
        _armed.at(point)


arm(os.environ.get(VARIABLE))
