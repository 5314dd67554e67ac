"""A search, page by page, PS3.18 8.3.4.4, with paging that trusts nothing.

A short page is not the last one: some servers leave entities out of a page after they have counted
them. Only an empty page is the end. Behind a full page the next one is asked for from the last
answer that is known: a server gives that answer first, unless the set has changed meanwhile, and
then the list is read again. Some servers ignore ``offset``, or ``limit`` too, and give the same
page whatever is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from pydicom.dataset import Dataset

from prefect_dicom.core.errors import PacsError
from prefect_dicom.network.find.answers import text_of, uid_of
from prefect_dicom.web.query_string import UNIQUE_KEYS, Search

PAGE_ANSWERS = 200
"""Answers of a page: some servers refuse to give more."""
_IDENTIFIERS = ("PatientID", "AccessionNumber")
"""Keys of which so many answers as fill a page hold the value that was searched for, if any."""
_MOST_ANSWERS = 1_000_000
_MOST_READS = 3
"""How often a list is read that changes while it is read."""
_MOST_IDLE_PAGES = 3
"""Pages in a row that bring nothing new, and are not the last one either."""


@dataclass(frozen=True, slots=True)
class Page:
    """The answers to one request, and whether the server says that there are more (Warning 299)."""

    answers: Sequence[Dataset]
    says_more: bool = False


FetchPage = Callable[[int, int], Page]
"""Requests one page, given ``limit`` and ``offset``."""


@dataclass(slots=True)
class _Reading:
    """One reading of a list, from its first page to its last."""

    level: str
    seen: set[tuple[str, ...]]
    offset: int = 0
    first: list[tuple[str, ...]] = field(default_factory=list)
    last: tuple[str, ...] | None = None
    """The last answer of a page that was full; the next page begins with it."""
    says_more: bool = False
    moved: bool = False
    """Whether a page did not go on where the one before ended."""
    brought: int = 0
    """Answers that no reading before had."""
    idle_pages: int = 0

    @property
    def next_offset(self) -> int:
        """Where the next page begins."""
        return self.offset if self.last is None else self.offset - 1

    def take(self, page: Page) -> tuple[list[Dataset], bool]:
        """The new answers of a page, and whether the list ends with it.

        Raises
        ------
        PacsError
            ``answers-capped`` where the list ends before its end.
        """
        keys = [_identity(answer, self.level) for answer in page.answers]
        new = []
        for key, answer in zip(keys, page.answers, strict=True):
            if key not in self.seen:
                self.seen.add(key)
                new.append(answer)
        self.brought += len(new)
        overlap = self.last is not None and bool(keys) and keys[0] == self.last
        self.moved |= self.last is not None and not overlap
        if not keys:
            if self.says_more or page.says_more:
                raise PacsError("answers-capped", "the server says that there are more answers")
            return new, True
        self.says_more = page.says_more
        if self.first and keys == self.first:
            return new, self._ends_without_paging(len(keys))
        self.first = self.first or keys
        self.idle_pages = 0 if new else self.idle_pages + 1
        if self.idle_pages >= _MOST_IDLE_PAGES or len(self.seen) > _MOST_ANSWERS:
            raise PacsError("answers-capped", "a list without an end")
        self.offset += len(keys) - overlap
        self.last = keys[-1] if len(keys) == PAGE_ANSWERS else None
        return new, False

    def _ends_without_paging(self, size: int) -> bool:
        """Whether a list is whole of which the first page came twice."""
        if size == PAGE_ANSWERS or self.says_more:
            raise PacsError("answers-capped", "the server ignores where a page is to begin")
        self.moved = False
        return True


def pages(search: Search, fetch: FetchPage) -> Generator[Dataset]:
    """Every answer to a search once, as the pages come.

    Raises
    ------
    PacsError
        What ``fetch`` raises; ``answers-capped`` where the list ends before its end;
        ``answer-unusable`` where the server matches by something else than the identifier that
        was searched for, or where the list never stays the same while it is read.
    """
    seen: set[tuple[str, ...]] = set()
    for _ in range(_MOST_READS):
        reading = _Reading(search.level, seen)
        ended = False
        while not ended:
            page = fetch(PAGE_ANSWERS, reading.next_offset)
            new, ended = reading.take(page)
            _check_matched(search, page.answers)
            yield from new
        # Where it moves, and nothing of it is new, what was there is known.
        if not reading.moved or reading.brought == 0:
            return
    raise PacsError("answer-unusable", "the list changes whenever it is read")


def _check_matched(search: Search, answers: Sequence[Dataset]) -> None:
    """Raise where a page is full of what was not searched for: the whole archive would follow."""
    _check_named(search, answers)
    if search.level != "STUDY" or search.encodes or len(answers) < PAGE_ANSWERS:
        return
    for keyword in _IDENTIFIERS:
        values = [value for value in search.match.get(keyword, ()) if "*" not in value]
        if values and not any(text_of(answer, keyword) in values for answer in answers):
            raise PacsError("answer-unusable", f"answers to another search than by {keyword}")


def _check_named(search: Search, answers: Sequence[Dataset]) -> None:
    """As :func:`_check_matched`, for the unique key of the search's own level."""
    named = set(search.named)
    if not named or len(answers) <= len(named):
        return
    keyword = UNIQUE_KEYS[search.level]
    foreign = sum(uid_of(answer, keyword) not in named for answer in answers)
    if foreign == len(answers) or (foreign and len(answers) >= PAGE_ANSWERS):
        raise PacsError("answer-unusable", f"answers to another search than by {keyword}")


def _identity(answer: Dataset, level: str) -> tuple[str, ...]:
    """What tells an answer from others: one study may be answered for two patients."""
    keywords = {
        "STUDY": ("StudyInstanceUID", "PatientID"),
        "SERIES": ("StudyInstanceUID", "SeriesInstanceUID"),
        "IMAGE": ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"),
    }[level]
    identity = tuple(uid_of(answer, keyword) for keyword in keywords)
    if uid_of(answer, UNIQUE_KEYS[level]):
        return identity
    return (*identity, *(repr(answer.get_item(tag).value) for tag in sorted(answer.keys())))
