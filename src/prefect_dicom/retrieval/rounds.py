"""Where the rounds of requests for the studies of a chunk stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from prefect_dicom.retrieval.bounds import FRUITLESS_SINGLES, SPARE_ROUNDS
from prefect_dicom.retrieval.strategy import RequestStrategy


@dataclass(slots=True)
class Rounds:
    """Where the rounds for listed instances stand."""

    following: Iterator[RequestStrategy]
    strategy: RequestStrategy
    fruitless_requests: int = 0
    """Single-UID requests in a row that have brought nothing."""
    spare: int = SPARE_ROUNDS.most
    diagnosed: bool = False

    @classmethod
    def starting(cls, following: Iterator[RequestStrategy]) -> Rounds:
        return cls(following, next(following))

    @property
    def is_given_up(self) -> bool:
        return self.fruitless_requests >= FRUITLESS_SINGLES.most

    def advance(self, alternatives: Sequence[RequestStrategy]) -> bool:
        """Go on to the next strategy; ``alternatives`` replace those that would follow."""
        if alternatives:
            self.following = iter(alternatives)
        strategy = next(self.following, None)
        if strategy is None or self.is_given_up:
            return False
        self.strategy = strategy
        return True


@dataclass(slots=True)
class Round:
    """Result of one round of requests."""

    received: int = 0
    undetermined: bool = False
    """A request ended in a way that says nothing about the PACS."""
    alternatives: list[RequestStrategy] = field(default_factory=list)
    """The strategies that remain after a request was refused for its form."""
