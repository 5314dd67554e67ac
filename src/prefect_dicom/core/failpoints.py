"""Fail points: named places between two durable effects, where a test can make a process fail.

Between any two effects that outlive the process (a file that is renamed, a transaction, a put)
the code calls ``failpoint("name")``. That does nothing unless the environment variable
``PREFECT_DICOM_FAIL_POINT`` is set when the process starts::

    PREFECT_DICOM_FAIL_POINT=POINT:NTH:KIND[:NOTE]

The ``NTH`` time the process passes ``POINT`` (``*``: any), it is killed (``kill``), gets ENOSPC
(``enospc``) or an exception that nothing in it expects (``raise``). The receiver inherits the
variable. Where several processes have it, ``NOTE`` is a file that the first of them creates, with
its process id: that one fails, once.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from collections.abc import Mapping
from typing import NamedTuple

VARIABLE = "PREFECT_DICOM_FAIL_POINT"


class FailPoint(NamedTuple):
    """A place between two effects.

    Parameters
    ----------
    before, after : str
        The effect before it, and the one after it.
    writes : bool
        Whether what follows writes to a disk, which may be full.
    """

    before: str
    after: str
    writes: bool = False


POINTS: Mapping[str, FailPoint] = {
    "cohort-recorded": FailPoint("the cohort's rows are in the ledger", "the run begins"),
    "row-answered": FailPoint("the PACS answered a row's query", "the ledger records its studies"),
    "receiver-started": FailPoint("a receiver is being started", "it is waited for"),
    "claimed": FailPoint("the studies of a chunk are claimed", "they are listed"),
    "associated": FailPoint("an association to the PACS is established", "the request is sent"),
    "list-half-read": FailPoint("the PACS listed a study's series", "it lists their instances"),
    "list-half-written": FailPoint("a study is listed, not committed", "its instances follow"),
    "list-recorded": FailPoint("the ledger has the list", "instances are requested"),
    "listed-ahead": FailPoint("a chunk is listed", "it is its turn to be requested"),
    "expectation-noted": FailPoint("the receiver expects studies", "the run gets its answer"),
    "part-begun": FailPoint("an instance's file is created", "its bytes are written", writes=True),
    "part-whole": FailPoint("an instance's bytes are written", "its file is renamed", writes=True),
    "part-kept": FailPoint(
        "an instance has its name in the spool", "the sender gets its response, or has it"
    ),
    "store-answered": FailPoint("the sender has its response", "the ledger records the instance"),
    "request-ended": FailPoint(
        "the retrieve had its final response", "received instances are validated"
    ),
    "validated": FailPoint("an instance was validated", "the ledger records it as received"),
    "list-extended": FailPoint(
        "the ledger lists an unlisted instance", "it records it as received"
    ),
    "received-recorded": FailPoint("the ledger says received", "the instance is put"),
    "set-aside": FailPoint("a faulty instance is set aside", "it is requested again", writes=True),
    "rejection-recorded": FailPoint("the ledger says rejected", "the instance's file is deleted"),
    "quarantine-noted": FailPoint(
        "the note of a quarantined instance is written", "its file follows", writes=True
    ),
    "put-begun": FailPoint("the put of an object has begun", "its bytes go", writes=True),
    "object-linked": FailPoint("a directory archive has the object", "its part file is deleted"),
    "put-answered": FailPoint("the archive has answered a put", "the ledger records it as stored"),
    "stored-recorded": FailPoint("the ledger says stored", "the spool files are deleted"),
    "study-stored": FailPoint("all instances are in the archive", "the study is listed again"),
    "listed-again": FailPoint("the second list is the first", "the manifest is put", writes=True),
    "manifest-put": FailPoint("the manifest is in the archive", "the ledger records the study"),
    "archived-recorded": FailPoint("the ledger says archived", "the study's spool is deleted"),
    "half-dropped": FailPoint("a part of the study's spool is deleted", "the rest is", writes=True),
    "half-reported": FailPoint(
        "a report is written under a temporary name", "it is renamed", writes=True
    ),
}
"""Every name that :func:`failpoint` is called with, in the order in which a study passes them."""

DELIVERY_POINTS: Mapping[str, FailPoint] = {
    "deliveries-claimed": FailPoint("the deliveries of a chunk are claimed", "they are sent"),
    "instance-accepted": FailPoint("the target has accepted an instance", "the ledger records it"),
    "acceptance-recorded": FailPoint("the ledger says accepted", "the next instances are sent"),
    "sent-recorded": FailPoint("the ledger says sent", "the target is asked for evidence"),
    "lack-recorded": FailPoint("the ledger says what a target lacks", "it is sent again"),
    "commitment-begun": FailPoint("a request for commitment is on record", "it is sent"),
    "evidence-found": FailPoint("the target has shown evidence", "the ledger says verified"),
    "verified-recorded": FailPoint("the ledger says verified", "the next study follows"),
}
"""The same for deliveries, which a pull does not pass."""

KINDS = ("kill", "raise", "enospc")


class InjectedError(Exception):
    """An exception that nothing expects."""


class _Armed:
    """One failure that is to happen."""

    def __init__(self, point: str, nth: int, kind: str, note: str) -> None:
        if point not in (*POINTS, *DELIVERY_POINTS, "*") or kind not in KINDS or nth < 1:
            raise ValueError(f"{VARIABLE} names no point, number and kind")
        self._point, self._nth, self._kind, self._note = point, nth, kind, note
        # Threads count together: next() on it is one step of the interpreter.
        self._times = itertools.count(1)

    def pass_by(self, point: str) -> None:
        """Fail where this is the point and the time."""
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
        raise InjectedError(point)


_armed: _Armed | None = None


def arm(text: str | None) -> None:
    """Set where this process fails, in the form of the environment variable; None: nowhere.

    Raises
    ------
    ValueError
        The text does not have that form.
    """
    global _armed
    if not text:
        _armed = None
        return
    point, nth, kind, *note = text.split(":", 3)
    _armed = _Armed(point, int(nth), kind, note[0] if note else "")


def failpoint(name: str) -> None:
    """Mark a point of one of the tables; fails where this process is armed for it."""
    if _armed is not None:
        _armed.pass_by(name)


arm(os.environ.get(VARIABLE))
