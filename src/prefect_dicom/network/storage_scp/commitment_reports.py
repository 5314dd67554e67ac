"""Reports of storage commitment that come to the receiver, on record before they are answered."""

from __future__ import annotations

import logging
import threading

from prefect_dicom.core.deliveries import ReportOutcome
from prefect_dicom.core.errors import LedgerError
from prefect_dicom.ledger import Ledger
from prefect_dicom.network.commitment_report import Report
from prefect_dicom.network.status import StorageStatus

log = logging.getLogger(__name__)

_INVALID_ARGUMENT_VALUE = 0x0115


class CommitmentReports:
    """Records reports in the ledger; the status to answer each with. Thread-safe.

    Parameters
    ----------
    ledger_url : str
        Opened with the first report: a receiver without any needs no database.
    """

    def __init__(self, ledger_url: str) -> None:
        self._url = ledger_url
        self._lock = threading.Lock()
        self._ledger: Ledger | None = None

    def __call__(self, report: Report | None) -> int:
        """Record a report, or None for one that could not be read."""
        if report is None:
            log.warning("a report of storage commitment could not be read")
            return _INVALID_ARGUMENT_VALUE
        try:
            outcome = self._opened().commitments.record_report(
                report.transaction_uid, report.results
            )
        except LedgerError as error:
            log.error("a report of storage commitment was not recorded: %s", error.code)
            return StorageStatus.PROCESSING_FAILURE
        return status_of(outcome)

    def _opened(self) -> Ledger:
        with self._lock:
            if self._ledger is None:
                self._ledger = Ledger.open(self._url)
            return self._ledger


def status_of(outcome: ReportOutcome) -> int:
    """The status of the response to a report, PS3.7 10.1.1.1.8.

    A transaction that nobody has begun is no mistake of ours: somebody makes reports up, or sends
    those of another site.
    """
    if outcome is ReportOutcome.UNKNOWN:
        log.warning("security: a report of storage commitment for an unknown transaction")
        return _INVALID_ARGUMENT_VALUE
    if outcome is ReportOutcome.FOREIGN:
        log.warning("security: a report of storage commitment names instances not asked about")
    return StorageStatus.SUCCESS
