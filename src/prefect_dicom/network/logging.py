"""Logging configuration of pynetdicom and pydicom: no patient data in logs."""

from __future__ import annotations

import logging
import warnings

from pynetdicom import _config


def configure_logging() -> None:
    """Switch off the logs of pynetdicom and pydicom: identifiers, dumps, tracebacks.

    By default it logs request and response identifiers (patient names and IDs) at INFO, and the
    text of an answer it cannot decode at ERROR; pydicom repeats values it doubts in its warnings,
    even if they have 64 KiB. This package reports by its own errors and results. Call it before
    the first association of a process; repeated calls do no harm.
    """
    _config.LOG_HANDLER_LEVEL = "none"
    _config.LOG_REQUEST_IDENTIFIERS = False
    _config.LOG_RESPONSE_IDENTIFIERS = False
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"pydicom\.")
