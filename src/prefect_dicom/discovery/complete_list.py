"""Complete lists of studies: a query whose list was cut short is repeated in partitions.

An archive that stops at a number of answers, whether it says so (FE00, A700, B001) or not, stops
there with every list. So a list shorter than the longest one seen from the node is whole, and a
longer one is doubted: two halves of its days, parted at the median of what was answered, have
room for what it may lack. Where they show more, or the node had said so, the days are halved
until every partition is short; a single day that is not is queried by modality, and by the last or
first characters of an identifier (numbers that are counted up differ most at their ends).
Studies without a date are in no range of days (PS3.4 C.2.2.2.5): behind a cut list they are
looked for by these too.

No key is trusted to partition a query before that is seen: the answers to a partition have to
leave out what was known outside of it, and to bring what was known inside. What stays cut is a
gap, in words without any text of a peer but modalities and days.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import date, timedelta

from prefect_dicom.cohort.row_matching import FIRST_DAY, LAST_DAY, widened
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import DateRange, Study
from prefect_dicom.core.uids import is_safe_key, normal_uid
from prefect_dicom.dicom.value_matching import study_day, unpadded
from prefect_dicom.discovery.partition import (
    MODALITIES,
    Days,
    ListLimits,
    Partition,
    WildcardKey,
    identifier,
)
from prefect_dicom.network.find.list_studies import ListedStudies

WITHOUT_A_DATE = "studies without a date"
ANY_DATE = "studies of any date"

_LEAST_QUERIES = 30
_MOST_OF_A_DATE_WINDOW = 20_000
"""Queries for a row that wants every study of its days."""
_MOST_REFUSED = 24
"""Partitions in a row that the node ends without a single answer: more than there are halves."""
_ROUND_NUMBER = 50
"""A list of a multiple of so many answers may have been cut at a round number."""

_OFTEN_FROM = date(1990, 1, 1)
_DAY = timedelta(days=1)
_NEAR = timedelta(days=15)
_ALL_DAYS = Days(FIRST_DAY, LAST_DAY)

_WITH_WILDCARDS = ("PatientID", "AccessionNumber")
_LONGEST_IDENTIFIER = 64
"""Characters of a LO, PS3.5 6.2."""
_CHARACTERS = "".join(chr(code) for code in range(32, 127) if chr(code) not in "*?\\")
_SQL_WILDCARDS = "%_"
"""Wildcards of LIKE. Orthanc hands them on, so that what ends with them cannot be queried."""


StudyQuery = Callable[[Mapping[str, str], Mapping[str, str]], ListedStudies]
"""Queries by keys, and by others with a wildcard."""
SampleQuery = Callable[[date, date, int], list[Study]]
"""Queries up to so many studies of a range of days, of any patient."""


class _DoesNotPartition(Exception):
    """The key does not partition the query."""


def complete_list(
    listed: ListedStudies,
    keys: Mapping[str, str],
    days: DateRange | None,
    limits: ListLimits,
    query: StudyQuery,
    sample: SampleQuery,
) -> tuple[list[Study], tuple[str, ...]]:
    """Every study that the keys match, from a list that may have been cut, and its gaps.

    Parameters
    ----------
    listed : ListedStudies
        The answers to ``keys``.
    keys : mapping of str to str
        Those of the row; a StudyDate among them is of ``days`` and one day wider at each end.
    days : DateRange or None
        Studies of other days are not wanted, nor those without a date. None: all are.
    limits : ListLimits
        Of the node; grows.
    query, sample : callable
        Send queries to the node.

    Returns
    -------
    tuple of list of Study and tuple of str
        All answers, those to the partitions behind the others, and the gaps.

    Raises
    ------
    PacsError
        As ``query`` does, but for ``request-refused``: a partition that is refused is a gap.
    """
    is_whole = limits.is_whole(listed)
    limits.record(len(listed.studies))
    if is_whole:
        return list(listed.studies), ()
    search = _PartitionedQuery(keys, limits, query, sample)
    search.take(listed)
    search.complete(listed, days)
    if search.is_spent() and keys.keys() != {"StudyDate"}:
        limits.query_budget = max(_LEAST_QUERIES, limits.query_budget // 2)
    return list(search.studies), tuple(dict.fromkeys(search.gaps))


class _PartitionedQuery:
    """One query whose list is completed by partitions."""

    def __init__(
        self,
        keys: Mapping[str, str],
        limits: ListLimits,
        query: StudyQuery,
        sample: SampleQuery,
    ) -> None:
        self._keys = {name: value for name, value in keys.items() if name != "StudyDate"}
        self._has_days = "StudyDate" in keys
        self._limits = limits
        self._query_node = query
        self._sample = sample
        self._left = limits.query_budget if self._keys else _MOST_OF_A_DATE_WINDOW
        self._refused = 0
        self._wanted = DateRange(None, None)
        self._bounds = _ALL_DAYS
        self.studies: dict[Study, date | None] = {}
        """Every answer once, with the day that a range of days matches it by."""
        self._known: set[object] = set()
        self.gaps: list[str] = []

    def take(self, listed: ListedStudies) -> None:
        """Keep the answers."""
        for study in listed.studies:
            if study not in self.studies:
                # Orthanc compares dates as texts: the older form is in no range of days.
                is_da = unpadded(study.study_date).isdigit()
                self.studies[study] = study_day(study.study_date) if is_da else None
                self._known.add(_identity(study))

    def complete(self, listed: ListedStudies, days: DateRange | None) -> None:
        """Find what the list lacks, or name where it may be."""
        count, announced, known = len(listed.studies), listed.capped, len(self._known)
        self._wanted = days or DateRange(None, None)
        self._bounds = _ALL_DAYS if days is None else Days(*widened(days))
        bounds = self._bounds
        stuck: list[Partition] | None = None
        if "StudyDate" not in self._limits.useless:
            try:
                stuck = self._partition_days(bounds, listed)
            except _DoesNotPartition:
                self._limits.useless.add("StudyDate")
        undated = days is None
        cut = announced or count in self._limits.caps
        if not cut and len(self._known) > known:
            cut = True
            self._limits.caps.add(count)
        if not cut and (undated or stuck or stuck is None):
            if self._probe_for_more(count):
                return
            cut = count in self._limits.caps
        if stuck is None:
            self._divide([Partition()], ANY_DATE if undated else self._format_days(bounds))
            return
        self._divide(stuck)
        if undated and (cut or self._find_by_modalities() or count % _ROUND_NUMBER == 0):
            self._divide([Partition()], WITHOUT_A_DATE)

    # --- queries

    def is_spent(self) -> bool:
        """Whether no more queries are sent."""
        return self._left <= 0 or self._refused >= _MOST_REFUSED

    def _query(self, partition: Partition) -> ListedStudies:
        """Query a partition; when no more is queried, as if it were cut at once."""
        if self.is_spent():
            return ListedStudies((), capped=True)
        self._left -= 1
        keys = dict(self._keys)
        if partition.days is not None and "StudyDate" not in self._limits.useless:
            keys["StudyDate"] = f"{partition.days.first:%Y%m%d}-{partition.days.last:%Y%m%d}"
        if partition.modality is not None:
            keys["ModalitiesInStudy"] = partition.modality
        keys.update(partition.exactly)
        wildcard = partition.wildcard
        wildcards = {} if wildcard is None else {wildcard.keyword: wildcard.value}
        try:
            listed = self._query_node(keys, wildcards)
        except PacsError as error:
            if error.code != "request-refused":
                raise
            raise _DoesNotPartition from error
        self._refused = self._refused + 1 if listed.capped and not listed.studies else 0
        return listed

    def _take_partition(self, partition: Partition, listed: ListedStudies) -> bool:
        """Take the answers to a partition. Returns whether they are all.

        Raises
        ------
        _DoesNotPartition
            They are not the partition's.
        """
        inside, outside = set(), set()
        for study, day in self.studies.items():
            if partition.surely_has(study, day):
                inside.add(_identity(study))
            elif partition.surely_lacks(study, day):
                outside.add(_identity(study))
        answered = {_identity(study) for study in listed.studies}
        self.take(listed)
        is_whole = self._limits.is_whole(listed)
        self._limits.record(len(listed.studies))
        strays = sum(partition.surely_lacks(study, self.studies[study]) for study in listed.studies)
        if 2 * strays > len(listed.studies) or (outside and outside <= answered):
            raise _DoesNotPartition
        if is_whole and inside and not inside & answered:
            raise _DoesNotPartition
        if is_whole and partition.wildcard is not None and not inside <= answered:
            raise _DoesNotPartition
        return is_whole

    def _probe_for_more(self, count: int) -> bool:
        """Try whether the node lists more than so many answers, and so does not stop there.

        Returns
        -------
        bool
            False where that is not seen; where it is seen to stop there, the limit is recorded.
        """
        if self._limits.longest > count:
            return True
        days = sorted(day for day in self.studies.values() if day)
        near = days[len(days) // 2] if days else date.today()
        some: list[Study] = []
        for first, last in ((near - _NEAR, near + _NEAR), (FIRST_DAY, LAST_DAY)):
            try:
                some = self._sample(first, last, count + 1)
            except PacsError as error:
                if not error.reason.refuses_query:
                    raise
                return False
            if len(some) > count:
                self._limits.record(len(some))
                return True
        if len(some) == count and not self._known.issuperset(map(_identity, some)):
            # Two different queries, and as many answers to each.
            self._limits.caps.add(count)
        return False

    # --- by days

    def _partition_days(self, bounds: Days, listed: ListedStudies) -> list[Partition]:
        """Query the row's days, and halves of them; returns the days that stay cut."""
        if not self._has_days and bounds != _ALL_DAYS:
            partition = Partition(bounds)
            answers = self._query(partition)
            if self._take_partition(partition, answers):
                if not answers.studies:
                    # Nothing is no sign that the node matches by days. The halves of all days are.
                    self._bounds = _ALL_DAYS
                    for half in self._halves(_ALL_DAYS, listed):
                        self._query_half(Partition(half), half)
                return []
            listed = answers
        return self._by_days(Partition(bounds), bounds, listed)

    def _by_days(self, partition: Partition, days: Days, listed: ListedStudies) -> list[Partition]:
        """Query halves of a partition's days; returns the days that stay cut."""
        if days.first == days.last or self.is_spent():
            return [replace(partition, days=days)]
        stuck = []
        for half in self._halves(days, listed):
            is_whole, answers = self._query_half(partition, half)
            if not is_whole:
                stuck += self._by_days(partition, half, answers)
        return stuck

    def _halves(self, days: Days, listed: ListedStudies) -> Iterator[Days]:
        """Halve days; the first half ends with the median of those that were answered."""
        known = sorted(
            day for study in listed.studies if (day := self.studies[study]) and day in days
        )
        if known:
            middle = known[len(known) // 2]
        else:
            first, last = max(days.first, _OFTEN_FROM), min(days.last, date.today())
            if first >= last:
                first, last = days.first, days.last
            middle = first + (last - first) // 2
        middle = min(middle, days.last - _DAY)
        yield Days(days.first, middle)
        yield Days(middle + _DAY, days.last)

    def _query_half(self, partition: Partition, half: Days) -> tuple[bool, ListedStudies]:
        """Query days, with one more at an end where ranges were not seen to include it."""
        limits = self._limits
        at_the_end = {_identity(s) for s, day in self.studies.items() if day == half.last}
        asked = half
        if not limits.first_day_matches:
            asked = replace(asked, first=max(self._bounds.first, half.first - _DAY))
        if not limits.last_day_matches and (limits.last_day_matches is False or not at_the_end):
            asked = replace(asked, last=min(self._bounds.last, half.last + _DAY))
        widened = replace(partition, days=asked)
        answers = self._query(widened)
        is_whole = self._take_partition(widened, answers)
        limits.first_day_matches |= any(self.studies[s] == asked.first for s in answers.studies)
        if limits.last_day_matches is None and asked.last == half.last and at_the_end:
            if not at_the_end.isdisjoint(map(_identity, answers.studies)):
                limits.last_day_matches = True
            elif is_whole:
                limits.last_day_matches = False
                return self._query_half(partition, half)
        return is_whole, answers

    # --- by modality, and by identifiers

    def _divide(self, partitions: list[Partition], name: str = "") -> None:
        """Query partitions that stay cut by other keys; what stays so then is a gap."""
        if len(partitions) == 1:
            # Of one partition there are more modalities than last characters.
            partitions = self._by_identifiers(partitions[0])
        if not partitions:
            return
        try:
            partitions = self._by_modality(partitions)
        except _DoesNotPartition:
            self._limits.useless.add("ModalitiesInStudy")
        gaps = [gap for partition in partitions for gap in self._by_identifiers(partition)]
        self.gaps += [name] if name and gaps else self._format_gaps(gaps)

    def _by_modality(self, partitions: list[Partition]) -> list[Partition]:
        """Query all partitions together by each modality; returns those that stay cut.

        A series has a modality, one of the standard's (PS3.3 C.7.3.1.1.1) or one that was seen.
        """
        if "ModalitiesInStudy" in self._limits.useless or self.is_spent():
            return partitions
        known = [s for s, day in self.studies.items() if any(p.has(s, day) for p in partitions)]
        seen = dict.fromkeys(term for study in known for term in study.modalities)
        if not seen:
            return partitions
        span = _span(partitions)
        stuck = []
        for term in filter(is_safe_key, dict.fromkeys((*seen, *MODALITIES))):
            if self.is_spent():
                return partitions
            partition = Partition(span, modality=term)
            answers = self._query(partition)
            if not self._take_partition(partition, answers):
                stuck += self._days_that_stay_cut(partition, answers)
        without_modality = [
            partition
            for partition in partitions
            if any(partition.has(s, day) and not s.modalities for s, day in self.studies.items())
        ]
        return [*stuck, *without_modality]

    def _days_that_stay_cut(self, partition: Partition, listed: ListedStudies) -> list[Partition]:
        """The days of a partition that stay cut; all of it where it has none, or none divide."""
        if partition.days is None or "StudyDate" in self._limits.useless:
            return [partition]
        try:
            return self._by_days(partition, partition.days, listed)
        except _DoesNotPartition:
            return [partition]

    def _find_by_modalities(self) -> bool:
        """Query by the modalities that were seen. Returns whether another study is found."""
        before = len(self._known)
        if "ModalitiesInStudy" not in self._limits.useless:
            for term in dict.fromkeys(t for study in list(self.studies) for t in study.modalities):
                partition = Partition(modality=term)
                try:
                    self._take_partition(partition, self._query(partition))
                except _DoesNotPartition:
                    self._limits.useless.add("ModalitiesInStudy")
                    break
        return len(self._known) > before

    def _by_identifiers(self, partition: Partition) -> list[Partition]:
        """Query a partition by characters of identifiers; returns it if it stays cut.

        A patient has a PatientID, the unique key of its level (PS3.4 C.6.1.1.2). Accession
        numbers may be empty.
        """
        given = {*self._keys, *dict(partition.exactly)}
        for keyword, last in itertools.product(_WITH_WILDCARDS, (True, False)):
            wildcard = WildcardKey(keyword, "", last)
            if keyword in given or wildcard.name in self._limits.useless or self.is_spent():
                continue
            values = self._values(partition, keyword)
            if not values or "" in values:
                continue
            try:
                return [partition] if self._by_characters(partition, wildcard) else []
            except _DoesNotPartition:
                self._limits.useless.add(wildcard.name)
        return [partition]

    def _by_characters(self, partition: Partition, wildcard: WildcardKey) -> bool:
        """Query with one character more. Returns whether something stays cut."""
        values = self._values(partition, wildcard.keyword)
        seen = {wildcard.next_of(value) for value in values} - {""}
        stuck = not seen.issubset(_CHARACTERS)
        for character in sorted(
            _CHARACTERS, key=lambda c: (c not in _SQL_WILDCARDS, c not in seen)
        ):
            longer = wildcard.longer(character)
            if not is_safe_key(longer.text) or len(longer.text) > _LONGEST_IDENTIFIER:
                continue
            smaller = replace(partition, wildcard=longer)
            listed = self._query(smaller)
            if self.is_spent():
                self.take(listed)
                return True
            if character in _SQL_WILDCARDS and not _is_literal(longer, listed):
                raise _DoesNotPartition
            if not self._take_partition(smaller, listed):
                stuck |= self._by_characters(partition, longer)
            if self.is_spent():
                return True
        if wildcard.text:
            exactly = (*partition.exactly, (wildcard.keyword, wildcard.text))
            alone = replace(partition, exactly=exactly)
            if not self._take_partition(alone, self._query(alone)):
                stuck |= bool(self._by_identifiers(alone))
        return stuck

    def _values(self, partition: Partition, keyword: str) -> set[str]:
        return {
            identifier(study, keyword)
            for study, day in self.studies.items()
            if partition.has(study, day)
        }

    # --- gaps

    def _format_gaps(self, gaps: Iterable[Partition]) -> list[str]:
        """Days and modalities, neighbouring days together."""
        joined: list[tuple[str, Days]] = []
        for modality, days in sorted(
            ((gap.modality or "", gap.days or _ALL_DAYS) for gap in gaps),
            key=lambda gap: (gap[0], gap[1].first),
        ):
            before = joined[-1] if joined else None
            if before and before[0] == modality and days.first <= before[1].last + _DAY:
                joined[-1] = (modality, replace(before[1], last=max(before[1].last, days.last)))
            else:
                joined.append((modality, days))
        return [f"{self._format_days(days)} {modality}".strip() for modality, days in joined]

    def _format_days(self, days: Days) -> str:
        """Days, without the one at each end that nobody wants."""
        first, last = (
            min(max(day, self._wanted.first or day), self._wanted.last or day)
            for day in (days.first, days.last)
        )
        return f"{first:%Y%m%d}" if first == last else f"{first:%Y%m%d}-{last:%Y%m%d}"


def _span(partitions: Iterable[Partition]) -> Days | None:
    """The days from the first to the last of all partitions; None where they have none."""
    days = [partition.days for partition in partitions if partition.days is not None]
    if not days:
        return None
    return Days(min(each.first for each in days), max(each.last for each in days))


def _is_literal(wildcard: WildcardKey, listed: ListedStudies) -> bool:
    """Whether the node has matched the character itself, and not any text."""
    if listed.capped and not listed.studies:
        return False
    return all(wildcard.matches(identifier(s, wildcard.keyword)) for s in listed.studies)


def _identity(study: Study) -> object:
    uid = normal_uid(study.study_instance_uid)
    return (uid, unpadded(study.patient_id)) if uid else study
