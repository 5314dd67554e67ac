"""What the doctor finds: one check each, with details and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from prefect_dicom.core.errors import PrefectDicomError

_HERE = "`prefect-dicom doctor` prints the line to add."
_AT_ONCE_SECONDS = 5.0
_ENDED_AT_ONCE = (
    "The PACS ended the connection at once, over this request; no time-out of a firewall is as "
    "short. Its log of this minute says why. Try another study: --study, --accession or --patient."
)


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check. One that is ``ok`` and has an advice is a warning.

    Attributes
    ----------
    part : str
        What was checked: ``ledger``, ``spool``, ``archive``, ``receiver`` or the name of a node.
    check : str
        The check.
    ok : bool
        Whether it passed.
    words : str
        Details of the result.
    advice : str
        What to do.
    """

    part: str
    check: str
    ok: bool
    words: str = ""
    advice: str = ""


def error_words(error: PrefectDicomError) -> str:
    """What an error means, with its code and detail."""
    return f"{error.reason.meaning} ({error.code}{': ' + error.detail if error.detail else ''})"


def failed_finding(
    part: str, check: str, error: PrefectDicomError, seconds: float = math.inf
) -> Finding:
    """The finding for an error that came so many seconds after the check began."""
    words = error_words(error)
    if error.code == "association-lost" and seconds < _AT_ONCE_SECONDS:
        return Finding(part, check, False, words, _ENDED_AT_ONCE)
    # The advice of the reason refers to this command, which prints the lines at the end.
    advice = error.reason.what_to_do.replace(_HERE, "The line to add is below.")
    return Finding(part, check, False, words, advice)


def checked(part: str, check: str, run: Callable[[], str]) -> Finding:
    """The finding of a check that returns the details of its result, or raises why it failed."""
    try:
        return Finding(part, check, True, run())
    except PrefectDicomError as error:
        return failed_finding(part, check, error)
