"""How often a node is asked for the same thing in vain: one table, counted in tests by the PACS.

Where a request may bring something, it is sent; where it cannot help, it is not. Each bound has
the case it is for, and what it counts.
"""

from __future__ import annotations

from typing import NamedTuple


class Bound(NamedTuple):
    """The most requests of one kind in one case."""

    case: str
    """What the node does."""
    counted: str
    """What is counted, and for what."""
    most: int


UNSENT = Bound(
    "says of an instance that it cannot send it, in an answer that accounts for everything",
    "requests that name the instance, at once",
    2,
)
SYNTAX_SEARCH = Bound(
    "sends by C-GET nothing of a series, though it accepts its class in several transfer syntaxes",
    "requests with one syntax each; in vain once a run for each class",
    10,
)
CLASS_NOT_TOLD = Bound(
    "does not return the class of an instance that C-GET has to name",
    "C-GETs for each study, which propose all classes of the standard in turn",
    40,
)
FAULTY_SAMPLE = Bound(
    "sends instances of a study that are all faulty in the same way",
    "instances that are requested a second time, of each fault",
    3,
)
FRUITLESS_SINGLES = Bound(
    "ends requests for single instances with nothing, and accounts for nothing",
    "such requests in a row for the studies of a chunk",
    20,
)
UNLISTED_ROUNDS = Bound(
    "lists no instances of a study, and requests for it bring nothing new",
    "rounds for the study by C-MOVE; by C-GET one more, for other transfer syntaxes",
    2,
)
SPARE_ROUNDS = Bound(
    "sends only faulty instances, or breaks off in ways that say nothing about it",
    "rounds for the studies of a chunk that are repeated as they were",
    3,
)

BOUNDS = (
    UNSENT,
    SYNTAX_SEARCH,
    CLASS_NOT_TOLD,
    FAULTY_SAMPLE,
    FRUITLESS_SINGLES,
    UNLISTED_ROUNDS,
    SPARE_ROUNDS,
)


def bounds_table() -> str:
    """All bounds as a Markdown table."""
    lines = ["| the PACS | at most | counted are |", "|---|---|---|"]
    lines += [f"| {bound.case} | {bound.most} | {bound.counted} |" for bound in BOUNDS]
    return "\n".join(lines) + "\n"
