"""The error tree. Every error carries a reason, and through it the one retry decision.

::

    PrefectDicomError
    ├── ConfigurationError    the site file, its environment or its blocks
    ├── CohortError           the cohort file; all its complaints at once
    ├── PacsError             association, DIMSE status, silence
    ├── ReceiverError         the managed receiver cannot run or be reached
    ├── SpoolFull             the disk reserve is reached
    ├── InstanceRejected      one object is not what was expected
    ├── ArchiveError          the object store or directory
    │   └── ArchiveConflict   other bytes lie under the key already
    ├── LedgerError           the database
    ├── ClaimLost             another run owns the study now
    └── Interrupted           the run was told to stop
        └── WindowClosed      the node may not be asked at this time of the week

Messages hold no patient data and no UIDs: they reach logs and Prefect's database. What a peer
said is kept in the ledger, beside the study it concerns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons import Reason, Scope, reason_for


class PrefectDicomError(Exception):
    """Base of all errors of this package.

    Parameters
    ----------
    code : str
        A code of :mod:`prefect_dicom.core.reasons`.
    detail : str
        What happened, in figures and our own words; no text of a peer, no identifiers.
    """

    def __init__(self, code: str, detail: str = "") -> None:
        self.code = code
        self.detail = detail
        super().__init__(f"{code}: {detail}" if detail else code)

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self.code, self.detail)

    @property
    def reason(self) -> Reason:
        """The row of the reason table this error belongs to."""
        return reason_for(self.code)

    @property
    def disposition(self) -> Disposition:
        """Whether trying again can help, and who has to act."""
        return self.reason.disposition

    @property
    def scope(self) -> Scope:
        """How far the error reaches: what else fails with it."""
        return self.reason.scope


class FaultyFileError(PrefectDicomError):
    """A file of the user's with faults; all of them, each with its place and its remedy."""

    code_of_class = ""

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.source = source
        self.faults = tuple(faults)
        lines = "".join(f"\n  - {fault}" for fault in self.faults)
        super().__init__(self.code_of_class, f"{source}{lines}")

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self.source, self.faults)


class ConfigurationError(FaultyFileError):
    """The site's configuration cannot be used."""

    code_of_class = "configuration-faulty"


class CohortError(FaultyFileError):
    """The cohort file cannot be used."""

    code_of_class = "cohort-faulty"


class PacsError(PrefectDicomError):
    """A PACS node refused, failed, fell silent or answered what cannot be used."""


class ReceiverError(PrefectDicomError):
    """The managed receiver cannot be started, reached or shared."""


class SpoolFull(PrefectDicomError):
    """Taking more would eat the disk reserve."""

    def __init__(self, code: str = "spool-full", detail: str = "") -> None:
        super().__init__(code, detail)


class InstanceRejected(PrefectDicomError):
    """One object is unreadable or is not what was asked for."""


class ArchiveError(PrefectDicomError):
    """The archive did not take, hold or return an object."""


class ArchiveConflict(ArchiveError):
    """The key holds other bytes already; nothing archived is ever overwritten."""

    def __init__(self, code: str = "archive-conflict", detail: str = "") -> None:
        super().__init__(code, detail)


class LedgerError(PrefectDicomError):
    """The ledger cannot be opened, read or written."""


class ClaimLost(PrefectDicomError):
    """Another run took the study over; this one must not write about it any more."""

    def __init__(self, code: str = "claim-lost", detail: str = "") -> None:
        super().__init__(code, detail)


class Interrupted(PrefectDicomError):
    """The run was asked to stop; what was under way is left for the next one."""

    def __init__(self, code: str = "interrupted", detail: str = "") -> None:
        super().__init__(code, detail)


class WindowClosed(Interrupted):
    """The node may not be asked now; nothing has failed, and the next run goes on."""

    def __init__(self, code: str = "window-closed", detail: str = "") -> None:
        super().__init__(code, detail)


def passes_by_itself(error: object) -> bool:
    """Whether this is an error that may be gone the next time, without anybody doing anything."""
    return (
        isinstance(error, PrefectDicomError)
        and error.disposition is Disposition.TRANSIENT
        and not isinstance(error, Interrupted)
    )
