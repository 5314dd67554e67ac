"""Whether a list of answers is whole: counts, limits, and a search for what it lacks."""

from __future__ import annotations

from collections.abc import Mapping

from prefect_dicom.core.errors import PacsError
from prefect_dicom.network.find.answers import belongs_to, count_of, uid_of
from prefect_dicom.network.find.query import find
from prefect_dicom.network.node_client import NodeClient
from prefect_dicom.network.query_keys import query_identifier

_MOST_UNCOUNTED = 99
"""Answers that are taken as all there are without a count beside them. PACS that leave out
answers without reporting it stop at a round number, of which 100 is the smallest known."""
_NUMBERS_TO_TRY = 8
_NUMBERED = {
    "SERIES": ("SeriesNumber", "SeriesInstanceUID"),
    "IMAGE": ("InstanceNumber", "SOPInstanceUID"),
}
"""By level: a number that every PACS matches by (PS3.4 C.6.1.1), and the unique key."""


def may_be_short(listed: int, counted: int | None) -> bool:
    """Whether a list has fewer entries than the PACS counts, or may have met a limit."""
    if counted is None:
        return listed > _MOST_UNCOUNTED and listed % 50 == 0
    return listed < counted


def check_whole(
    requestor: NodeClient, level: str, above: Mapping[str, str], listed: int, counted: int | None
) -> None:
    """Search for entries that a list lacks, where its length gives reason to.

    Raises
    ------
    PacsError
        ``answers-capped`` where there is.
    """
    if not listed or not may_be_short(listed, counted):
        return
    keyword, unique = _NUMBERED[level]

    def answers(**key: str) -> list[tuple[str, int | None]]:
        identifier = query_identifier(
            {**above, **key}, (*above, unique, keyword), requestor.characters
        )
        return [
            (uid_of(answer, unique), count_of(answer, keyword))
            for answer in find(requestor, identifier, level)
            if all(belongs_to(answer, upper, uid) for upper, uid in above.items())
        ]

    try:
        whole = answers()
        known = {uid for uid, _ in whole}
        numbers = {number for _, number in whole if number is not None}
        if not numbers:
            return
        beyond = max(numbers) + 2 * max(1, (counted or 0) - listed)
        others = [n for n in range(min(numbers), beyond + 1) if n not in numbers]
        for number in others[:: max(1, -(-len(others) // _NUMBERS_TO_TRY))]:
            if any(uid and uid not in known for uid, _ in answers(**{keyword: str(number)})):
                raise PacsError("answers-capped", f"a list at {level} level ends before its end")
    except PacsError as error:
        if error.code != "request-refused":
            raise


def is_whole(listed: int, count: int | None, answers: int) -> bool:
    """Whether one study's or series' share of the answers to a common query is complete."""
    if count is None:
        return listed > 0 and answers <= _MOST_UNCOUNTED
    return 0 < listed == count
