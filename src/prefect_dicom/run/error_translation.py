"""Error translation at the border to Prefect.

Prefect stores exceptions, parameters and names in plain text. Our own errors hold no patient
data by construction; any other error is replaced here by its type, and only its traceback without
values goes to the local log.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator

from prefect_dicom.core.errors import PrefectDicomError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def without_phi() -> Iterator[None]:
    """Translate errors: only those of this package pass, without their causes.

    For the body of every flow and task.
    """
    try:
        yield
    except PrefectDicomError as error:
        # Prefect logs the whole chain of errors, and causes may have texts of peers.
        error.__cause__ = error.__context__ = None
        raise
    except Exception as error:
        places = "".join(traceback.format_tb(error.__traceback__))
        log.error("%s\n%s", type(error).__name__, places)
        raise PrefectDicomError("unexpected", type(error).__name__) from None
