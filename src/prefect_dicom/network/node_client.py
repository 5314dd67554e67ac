"""The client of one node: what discovery and retrieval ask of it, whatever protocol it speaks.

A query is an identifier of PS3.4 C.4.1.1.3 and a level, its answers are data sets; a retrieve
request is an identifier of PS3.4 C.4.2.1.4. :class:`~prefect_dicom.network.requestor.Requestor`
sends them over an association. How answers are compared, doubted and completed does not depend on
that.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from typing import Self

from pydicom.dataset import Dataset

from prefect_dicom.config.node import NodeSettings
from prefect_dicom.core.row_queries import RowTrace
from prefect_dicom.network.retrieve_result import RetrieveResult
from prefect_dicom.network.storage_scp.store_handler import StoreHandler


class NodeClient(ABC):
    """Requests to one node, one at a time. For one thread at a time. A context manager.

    Parameters
    ----------
    node : NodeSettings
        The node and its time limits.
    answered : set of str, optional
        Kept by the caller, who has several clients of the node: the services that it has ever
        answered.
    """

    def __init__(self, node: NodeSettings, answered: set[str] | None = None) -> None:
        self.node = node
        self.answers_lists = True
        """Whether lists of UIDs in queries are tried: until one was not answered completely."""
        self.stopping: Callable[[], bool] = lambda: False
        """Whether the run is to stop; called while an answer is waited for."""
        self.answered: set[str] = set() if answered is None else answered
        """The services this node has ever answered us."""
        self.ignores_keys = False
        """Whether this node has reported that it does not support all keys of a query."""
        self.characters = ""
        """The Specific Character Set of the last query with texts beyond ASCII that had answers."""
        self.now: Callable[[], float] = time.monotonic
        self.first_answer: Callable[[str, float], object] = lambda service, seconds: None
        """Called for each request with its service and the seconds of ``now`` until its first
        response."""
        self.about: Hashable = None
        """The study or row of the requests, where there is one."""
        self.trace: RowTrace | None = None
        """Takes down the queries of a row and their answers, where there is one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abstractmethod
    def echo(self) -> float:
        """Send the request that costs the node least; returns the seconds until its answer.

        Raises
        ------
        PacsError
            With the cause.
        """

    @abstractmethod
    def character_sets(self, texts: Sequence[str]) -> Iterator[str]:
        """The Specific Character Sets in which texts are tried in a query, one after the other."""

    @abstractmethod
    def answers(self, identifier: Dataset, level: str) -> Generator[Dataset]:
        """Send a query and yield its answers as they come; closed early, it is cancelled.

        Parameters
        ----------
        identifier : Dataset
            Keys to match and to return, with its QueryRetrieveLevel.
        level : str
            ``STUDY``, ``SERIES`` or ``IMAGE``.

        Raises
        ------
        PacsError
            With the cause; ``answers-capped`` at the end, where the node says that there are more.
        """

    @abstractmethod
    def get(
        self,
        identifier: Dataset,
        *,
        contexts: Sequence[tuple[str, str]],
        store_handler: StoreHandler,
        should_stop: Callable[[], bool] | None = None,
        without_roles: bool = True,
    ) -> RetrieveResult:
        """Request instances and receive them in this process.

        Parameters
        ----------
        identifier : Dataset
            Made by :func:`~prefect_dicom.network.query_keys.retrieve_identifier`.
        contexts : sequence of (SOP class UID, transfer syntax UID)
            What a C-GET proposes; a protocol without negotiation has no use for them.
        store_handler : StoreHandler
            Where instances go.
        should_stop : callable, optional
            Called again and again while the request is under way; true ends it.
        without_roles : bool
            See :func:`~prefect_dicom.network.get.c_get`.

        Raises
        ------
        PacsError
            The node cannot be used for it.
        """

    @abstractmethod
    def close(self) -> None:
        """End the connection in good order; never raises, and is fine to repeat."""

    @abstractmethod
    def abort(self) -> None:
        """End the connection at once, whatever is under way on it."""
