"""Process-wide switches of pynetdicom, set so that no patient data reaches a log."""

from __future__ import annotations

import logging
import warnings

from pynetdicom import _config


def quiet_pynetdicom() -> None:
    """Silence pynetdicom, and pydicom: no identifiers, no dumps, no tracebacks of bad data sets.

    By default it logs request and response identifiers (patient names and IDs) at INFO, and the
    text of an answer it cannot decode at ERROR; pydicom repeats values it doubts in its warnings,
    be they of 64 KiB. What happened is told by this package's own errors and outcomes. To be
    called before the first association of a process; again is fine.
    """
    _config.LOG_HANDLER_LEVEL = "none"
    _config.LOG_REQUEST_IDENTIFIERS = False
    _config.LOG_RESPONSE_IDENTIFIERS = False
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"pydicom\.")
