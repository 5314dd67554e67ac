"""Error tree. Every error has a reason code, which decides how it is handled.

::

    PrefectDicomError
    ├── ConfigurationError    the site file, its environment or its blocks
    ├── CohortError           the cohort file; all its faults at once
    ├── PacsError             association, DIMSE status, silence
    ├── ReceiverError         the managed receiver cannot run or be reached
    ├── SpoolFull             the disk reserve is reached
    ├── InstanceRejected      an instance is not what was expected
    ├── ArchiveError          the object store or directory
    │   └── ArchiveConflict   other bytes lie under the key already
    ├── LedgerError           the database
    ├── ClaimLost             another run owns the study now
    └── Interrupted           the run is to stop
        └── WindowClosed      the node may not be asked at this time of the week

Messages hold no patient data and no UIDs: they reach logs and Prefect's database. Texts of a peer
are kept in the ledger alone, but for the AE titles of one that was turned away.
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
        What happened, in figures and words of this package: no text of a peer, no identifiers.
    """

    def __init__(self, code: str, detail: str = "") -> None:
        self.code = code
        self.detail = detail
        super().__init__(f"{code}: {detail}" if detail else code)

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), (self.code, self.detail)

    @property
    def reason(self) -> Reason:
        """The entry of its code in the table of reasons."""
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
    """A file of the user's has faults; it lists all of them, each with its place and remedy."""

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
    """A PACS node refused, failed, did not answer or sent an unusable answer."""

    retry_after_seconds: float | None = None
    """How long the node asks not to be asked again, where it says so."""


class ReceiverError(PrefectDicomError):
    """The managed receiver cannot be started, reached or shared."""


class SpoolFull(PrefectDicomError):
    """Storing more would use up the disk reserve."""

    def __init__(self, code: str = "spool-full", detail: str = "") -> None:
        super().__init__(code, detail)


class InstanceRejected(PrefectDicomError):
    """An instance is unreadable or is not what was requested."""


class ArchiveError(PrefectDicomError):
    """The archive did not store, hold or return an object."""


class ArchiveConflict(ArchiveError):
    """Other bytes are stored under the key already; nothing archived is ever overwritten."""

    def __init__(self, code: str = "archive-conflict", detail: str = "") -> None:
        super().__init__(code, detail)


class LedgerError(PrefectDicomError):
    """The ledger cannot be opened, read or written."""


class ClaimLost(PrefectDicomError):
    """Another run took the study over; this one must not record anything about it any more."""

    def __init__(self, code: str = "claim-lost", detail: str = "") -> None:
        super().__init__(code, detail)


class Interrupted(PrefectDicomError):
    """The run is to stop; the next one continues what was under way."""

    def __init__(self, code: str = "interrupted", detail: str = "") -> None:
        super().__init__(code, detail)


class WindowClosed(Interrupted):
    """The node's access schedule is closed; nothing has failed, and the next run continues."""

    def __init__(self, code: str = "window-closed", detail: str = "") -> None:
        super().__init__(code, detail)


def is_transient(error: object) -> bool:
    """Whether the error is transient: trying again later may succeed without a person acting."""
    return (
        isinstance(error, PrefectDicomError)
        and error.disposition is Disposition.TRANSIENT
        and not isinstance(error, Interrupted)
    )
