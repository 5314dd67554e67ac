"""Immediate repetition of a query that may have failed by chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from prefect_dicom.core.errors import PacsError

T = TypeVar("T")


def retry_once(ask: Callable[[], T]) -> T:
    """Retry once.

    A second lost association fails the query; a second failed connection fails the node.

    Raises
    ------
    PacsError
        The error of the second try, or of the first where its reason is no matter of chance.
    """
    try:
        return ask()
    except PacsError as error:
        if not error.reason.retry_once:
            raise
    return ask()
