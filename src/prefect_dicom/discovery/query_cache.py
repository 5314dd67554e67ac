"""Query cache: recent answers of a PACS, so that the same query is sent once.

Bounded by the number of studies it holds: cohorts have a hundred thousand rows, and the rows of
one patient stand together.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence

from prefect_dicom.core.model import Study

_MOST_STUDIES = 5000
_LONGEST = 500
"""Studies in one answer: a longer one is not kept."""

_Key = tuple[frozenset[tuple[str, str]], frozenset[str]]


class QueryCache:
    """Least recently used answers to STUDY level queries, by all of their keys. Thread-safe.

    Parameters
    ----------
    most_studies : int
        The most studies in all answers together; an empty answer counts as one.
    """

    def __init__(self, most_studies: int = _MOST_STUDIES) -> None:
        self._most = most_studies
        self._held = 0
        self._answers: OrderedDict[_Key, tuple[Study, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, keys: Mapping[str, str], returned: Collection[str]) -> list[Study] | None:
        """The answers to a query, or None where they are not in the cache.

        Parameters
        ----------
        keys : mapping of str to str
            Its matching keys.
        returned : collection of str
            The optional keys that are to be returned. With others it is another query, and may
            be sent because this one brought nothing.
        """
        key = frozenset(keys.items()), frozenset(returned)
        with self._lock:
            known = self._answers.get(key)
            if known is None:
                return None
            self._answers.move_to_end(key)
            return list(known)

    def put(
        self, keys: Mapping[str, str], returned: Collection[str], answers: Sequence[Study]
    ) -> None:
        """Cache a whole answer; the least recently used ones make room for it."""
        if len(answers) > _LONGEST:
            return
        key = frozenset(keys.items()), frozenset(returned)
        with self._lock:
            if key in self._answers:
                self._held -= _weight(self._answers.pop(key))
            self._answers[key] = tuple(answers)
            self._held += _weight(answers)
            while self._held > self._most:
                _, forgotten = self._answers.popitem(last=False)
                self._held -= _weight(forgotten)

    def clear(self) -> None:
        """Empty the cache."""
        with self._lock:
            self._answers.clear()
            self._held = 0


def _weight(answers: Sequence[Study]) -> int:
    # An empty answer costs memory too.
    return 1 + len(answers)
