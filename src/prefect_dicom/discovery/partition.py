"""A list of studies that was cut short, asked for again in parts that are not.

An archive that stops at a number of answers, whether it says so (FE00, A700, B001) or not, stops
there with every list. So a list shorter than the longest one seen from the node is whole, and a
longer one is doubted: two halves of its days, parted at the median of what was answered, have
room for what it may lack. Where they show more, or the node had said so, the days are halved
until every part is short; a single day that is not is asked for by modality, and by the last or
first characters of an identifier (numbers that are counted up differ most at their ends).
Studies without a date are in no range of days (PS3.4 C.2.2.2.5): behind a cut list they are
looked for by these too.

Nothing is taken for divided that is not seen to be: the answers to a part have to leave out what
was known outside of it, and to bring what was known inside. What stays cut is a gap, in words
without any text of a peer but modalities and days.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, timedelta

from prefect_dicom.cohort.row_matching import FIRST_DAY, LAST_DAY, study_day, unpadded, wider
from prefect_dicom.config.capabilities import Match, NodeProfile
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import DateRange, Study
from prefect_dicom.core.uids import is_safe_key, normal_uid
from prefect_dicom.network.find.list_studies import ListedStudies

WORTH_A_DOUBT = 10
"""Answers from which on a list is doubted; no archive is known to stop below."""
WITHOUT_A_DATE = "studies without a date"
ANY_DATE = "studies of any date"

_MOST_QUESTIONS = 1_000
"""For a row that names a patient or an accession number; fewer after each that needed them all."""
_LEAST_QUESTIONS = 30
_MOST_OF_A_WINDOW = 20_000
"""For a row that wants every study of its days."""
_MOST_REFUSED = 24
"""Parts in a row that the node ends without a single answer: more than there are halves."""
_ROUND = 50

_OFTEN_FROM = date(1990, 1, 1)
_DAY = timedelta(days=1)
_NEAR = timedelta(days=15)

_WITH_WILDCARDS = ("PatientID", "AccessionNumber")
_LONGEST_IDENTIFIER = 64
"""Characters of a LO, PS3.5 6.2."""
_CHARACTERS = "".join(chr(code) for code in range(32, 127) if chr(code) not in "*?\\")
_OF_SQL = "%_"
"""Wildcards of its LIKE. Orthanc hands them on, so that what ends with them cannot be asked for."""
# PS3.3 C.7.3.1.1.1: the defined terms of Modality, those of today first, then the retired ones.
_TERMS = """
CT MR CR DX US MG XA RF NM PT OT SC SR PR KO SEG DOC RTSTRUCT RTPLAN RTDOSE RTIMAGE RTRECORD
REG RWV FID PX IO XC ES GM SM OP OPT OPM OPV OPTENF OPTBSV OAM OCT AR KER LEN SRF VA IOL OSS
IVUS IVOCT BI BMD BDUS EPS ECG EEG EMG EOG HD RESP AU TG LS BTO CFM CTPROTOCOL DMS PLAN POS
PTPROTOCOL RTINTENT RTRAD RTSEGANN SMR STAIN TEXTUREMAP M3D ASMT ANN XAPROTOCOL AS CD CF CP
CS DD DF DG DM DS EC FA FS HC LP MA MS OPR ST VF
"""
_MODALITIES = tuple(_TERMS.split())


@dataclass
class ListLimits:
    """What a run has learned of the lists that its node answers at STUDY level."""

    longest: int = 0
    """Answers of the longest list so far: a shorter one was not cut."""
    caps: set[int] = field(default_factory=set)
    """Numbers of answers at which a list ended before its end and nothing was said."""
    useless: set[str] = field(default_factory=set)
    """Keys that do not divide a list: the node ignores them, or answers nothing to them."""
    query_budget: int = _MOST_QUESTIONS
    """How many the next row may take."""
    first_day_matches: bool = False
    """The first day of a range was seen to be in it."""
    last_day_matches: bool | None = None
    """Whether the last day is; None: not seen yet."""

    def start_from(self, profile: NodeProfile) -> None:
        """Begin with what was learnt of the node before the run.

        What makes lists doubtful, that is. How long they were then proves nothing of today's: a
        limit may have been set, or lowered, meanwhile.
        """
        cap, untold = profile.answer_cap, profile.answer_cap_status in (None, "0000")
        self.caps = {cap} if cap is not None and untold else set()
        for keyword, learnt in (profile.keys or {}).items():
            if learnt.match in (Match.IGNORED, Match.EMPTIES):
                self.useless.add(keyword)
            if learnt.wildcards is False:
                self.useless |= {_Affix(keyword, "", last).name for last in (True, False)}

    def is_whole(self, listed: ListedStudies) -> bool:
        """Whether a list was certainly not cut; its length is remembered."""
        count = len(listed.studies)
        short = count < max(WORTH_A_DOUBT, self.longest)
        self.longest = max(self.longest, count)
        return short and not listed.capped and count not in self.caps


@dataclass(frozen=True)
class _Affix:
    """The last or first characters of an identifier."""

    keyword: str
    text: str
    last: bool

    @property
    def key(self) -> str:
        return f"*{self.text}" if self.last else f"{self.text}*"

    @property
    def name(self) -> str:
        """What the wildcard looks like, without the text."""
        return replace(self, text="").key + self.keyword

    def fits(self, value: str) -> bool:
        return value.endswith(self.text) if self.last else value.startswith(self.text)

    def longer(self, character: str) -> _Affix:
        text = character + self.text if self.last else self.text + character
        return replace(self, text=text)

    def next_of(self, value: str) -> str:
        """The character of a value that comes next; none where it has no more, or does not fit."""
        if not self.fits(value) or value == self.text:
            return ""
        return value[-len(self.text) - 1] if self.last else value[len(self.text)]


@dataclass(frozen=True)
class _Part:
    """A part of a question; what is None is not asked by."""

    first: date | None = None
    last: date | None = None
    modality: str | None = None
    exactly: tuple[tuple[str, str], ...] = ()
    """Keywords and values of identifiers."""
    affix: _Affix | None = None

    def has(self, study: Study, day: date | None) -> bool:
        if self.first is not None and not (day and self.first <= day <= self.last):
            return False
        if self.modality is not None and self.modality not in study.modalities:
            return False
        if any(_identifier(study, keyword) != value for keyword, value in self.exactly):
            return False
        return self.affix is None or self.affix.fits(_identifier(study, self.affix.keyword))


class _NoUse(Exception):
    """The key does not divide the list."""


Ask = Callable[[Mapping[str, str], Mapping[str, str]], ListedStudies]
"""Asks by keys, and by others with a wildcard."""
Some = Callable[[date, date, int], list[Study]]
"""Asks for up to so many studies of a range of days, whoever's they are."""


def complete_list(
    listed: ListedStudies,
    keys: Mapping[str, str],
    days: DateRange | None,
    limits: ListLimits,
    ask: Ask,
    some: Some,
) -> tuple[list[Study], tuple[str, ...]]:
    """Every study that the keys find, from a list that may have been cut, and where it has gaps.

    Parameters
    ----------
    listed : ListedStudies
        What was answered to ``keys``.
    keys : mapping of str to str
        Those of the row; a StudyDate among them is of ``days`` and one day wider at each end.
    days : DateRange or None
        Studies of other days are not wanted, nor those without a date. None: all are.
    limits : Limits
        Of the node; grows.

    Returns
    -------
    tuple of list of Study and tuple of str
        All answers, those to the parts behind the others, and the gaps.

    Raises
    ------
    PacsError
        As ``ask`` does, but for ``request-refused``: a part that is refused is a gap.
    """
    if limits.is_whole(listed):
        return list(listed.studies), ()
    search = _Search(keys, limits, ask, some)
    search.take(listed)
    search.complete(listed, days)
    if search.is_spent and keys.keys() != {"StudyDate"}:
        limits.query_budget = max(_LEAST_QUESTIONS, limits.query_budget // 2)
    return list(search.studies), tuple(dict.fromkeys(search.gaps))


class _Search:
    """One list in the making."""

    def __init__(self, keys: Mapping[str, str], limits: ListLimits, ask: Ask, some: Some) -> None:
        self._keys = {name: value for name, value in keys.items() if name != "StudyDate"}
        self._by_days_already = "StudyDate" in keys
        self._limits = limits
        self._ask_node = ask
        self._some = some
        self._left = limits.query_budget if self._keys else _MOST_OF_A_WINDOW
        self._refused = 0
        self.studies: dict[Study, date | None] = {}
        """Every answer once, with the day that a range of days finds it by."""
        self._known: set[object] = set()
        self.gaps: list[str] = []

    def take(self, listed: ListedStudies) -> list[Study]:
        """Keep the answers; those that are studies not known before."""
        new = []
        for study in listed.studies:
            if study in self.studies:
                continue
            # Orthanc compares dates as texts: what has the older form is in no range of days.
            is_da = unpadded(study.study_date).isdigit()
            self.studies[study] = study_day(study.study_date) if is_da else None
            identity = _identity(study)
            if identity not in self._known:
                self._known.add(identity)
                new.append(study)
        return new

    def complete(self, listed: ListedStudies, days: DateRange | None) -> None:
        """Find what the list lacks, or name where it may be."""
        count, told, known = len(listed.studies), listed.capped, len(self._known)
        self._wanted = days or DateRange(None, None)
        self._first, self._last = (FIRST_DAY, LAST_DAY) if days is None else wider(days)
        top = _Part(self._first, self._last)
        stuck: list[_Part] | None = None
        if "StudyDate" not in self._limits.useless:
            try:
                stuck = self._days_that_stay_cut(top, listed)
            except _NoUse:
                self._limits.useless.add("StudyDate")
        undated = days is None
        cut = told or count in self._limits.caps
        if not cut and len(self._known) > known:
            cut = True
            self._limits.caps.add(count)
        if not cut and (undated or stuck or stuck is None):
            if self._answers_more_than(count):
                return
            cut = count in self._limits.caps
        if stuck is None:
            self._divide([_Part()], ANY_DATE if undated else self._days_in_words(top))
            return
        self._divide(stuck)
        if undated and (cut or self._more_by_seen_modalities() or count % _ROUND == 0):
            self._divide([_Part()], WITHOUT_A_DATE)

    # --- asking

    @property
    def is_spent(self) -> bool:
        """Whether no more is asked."""
        return self._left <= 0 or self._refused >= _MOST_REFUSED

    def _ask(self, part: _Part) -> ListedStudies:
        """The answers to a part; where there are none to be had, it is as one cut at once."""
        if self.is_spent:
            return ListedStudies((), capped=True)
        self._left -= 1
        keys = dict(self._keys)
        if part.first is not None and "StudyDate" not in self._limits.useless:
            keys["StudyDate"] = f"{part.first:%Y%m%d}-{part.last:%Y%m%d}"
        if part.modality is not None:
            keys["ModalitiesInStudy"] = part.modality
        keys.update(part.exactly)
        wildcards = {} if part.affix is None else {part.affix.keyword: part.affix.key}
        try:
            listed = self._ask_node(keys, wildcards)
        except PacsError as error:
            if error.code != "request-refused":
                raise
            raise _NoUse from error
        self._refused = self._refused + 1 if listed.capped and not listed.studies else 0
        return listed

    def _is_whole(self, part: _Part, listed: ListedStudies) -> bool:
        """Take the answers to a part; whether they are all.

        Raises
        ------
        _NoUse
            They are not the part's.
        """
        inside, outside = set(), set()
        for study, day in self.studies.items():
            if _surely(part, study, day):
                inside.add(_identity(study))
            elif _surely_not(part, study, day):
                outside.add(_identity(study))
        told = {_identity(study) for study in listed.studies}
        self.take(listed)
        whole = self._limits.is_whole(listed)
        strays = sum(_surely_not(part, study, self.studies[study]) for study in listed.studies)
        if 2 * strays > len(listed.studies) or (outside and outside <= told):
            raise _NoUse
        if whole and inside and not inside & told:
            raise _NoUse
        if whole and part.affix is not None and not inside <= told:
            raise _NoUse
        return whole

    def _answers_more_than(self, count: int) -> bool:
        """Whether the node answers more to another question: it does not stop at this number."""
        if self._limits.longest > count:
            return True
        days = sorted(day for day in self.studies.values() if day)
        near = days[len(days) // 2] if days else date.today()
        for first, last in ((near - _NEAR, near + _NEAR), (FIRST_DAY, LAST_DAY)):
            try:
                some = self._some(first, last, count + 1)
            except PacsError as error:
                if not error.reason.refuses_query:
                    raise
                return False
            if len(some) > count:
                self._limits.longest = max(self._limits.longest, len(some))
                return True
        if len(some) == count and not self._known.issuperset(map(_identity, some)):
            # Two different questions, and as many answers to each.
            self._limits.caps.add(count)
        return False

    # --- by days

    def _days_that_stay_cut(self, top: _Part, listed: ListedStudies) -> list[_Part]:
        """Ask for the row's days, and for halves of them; the days that stay cut."""
        whole = _Part(FIRST_DAY, LAST_DAY)
        if not self._by_days_already and top != whole:
            answers = self._ask(top)
            if self._is_whole(top, answers):
                if not answers.studies:
                    # Nothing is no sign that the node matches by days. The halves of all days are.
                    self._first, self._last = whole.first, whole.last
                    for half in self._halves(whole, listed):
                        self._ask_half(half)
                return []
            listed = answers
        return self._by_days(top, listed)

    def _by_days(self, part: _Part, listed: ListedStudies) -> list[_Part]:
        """Ask by halves of the days; the days that stay cut."""
        if part.first == part.last or self.is_spent:
            return [part]
        stuck = []
        for half in self._halves(part, listed):
            whole, answers = self._ask_half(half)
            if not whole:
                stuck += self._by_days(half, answers)
        return stuck

    def _halves(self, part: _Part, listed: ListedStudies) -> Iterator[_Part]:
        """Two parts of the days, the first ending with the median of those that were answered."""
        days = sorted(
            day
            for study in listed.studies
            if (day := self.studies[study]) and part.first <= day <= part.last
        )
        if days:
            middle = days[len(days) // 2]
        else:
            first, last = max(part.first, _OFTEN_FROM), min(part.last, date.today())
            if first >= last:
                first, last = part.first, part.last
            middle = first + (last - first) // 2
        middle = min(middle, part.last - _DAY)
        yield replace(part, last=middle)
        yield replace(part, first=middle + _DAY)

    def _ask_half(self, half: _Part) -> tuple[bool, ListedStudies]:
        """Ask for days, with one more at an end where ranges were not seen to have it in them."""
        limits = self._limits
        at_the_end = {_identity(s) for s, day in self.studies.items() if day == half.last}
        asked = half
        if not limits.first_day_matches:
            asked = replace(asked, first=max(self._first, half.first - _DAY))
        if not limits.last_day_matches and (limits.last_day_matches is False or not at_the_end):
            asked = replace(asked, last=min(self._last, half.last + _DAY))
        answers = self._ask(asked)
        whole = self._is_whole(asked, answers)
        limits.first_day_matches |= any(self.studies[s] == asked.first for s in answers.studies)
        if limits.last_day_matches is None and asked.last == half.last and at_the_end:
            if not at_the_end.isdisjoint(map(_identity, answers.studies)):
                limits.last_day_matches = True
            elif whole:
                limits.last_day_matches = False
                return self._ask_half(half)
        return whole, answers

    # --- by modality, and by identifiers

    def _divide(self, parts: list[_Part], name: str = "") -> None:
        """Ask for parts that stay cut by other keys; what stays so then is a gap."""
        if len(parts) == 1:
            # Of one part there are more modalities than last characters.
            parts = self._by_identifiers(parts[0])
        if not parts:
            return
        try:
            parts = self._by_modality(parts)
        except _NoUse:
            self._limits.useless.add("ModalitiesInStudy")
        gaps = [gap for part in parts for gap in self._by_identifiers(part)]
        self.gaps += [name] if name and gaps else self._in_words(gaps)

    def _by_modality(self, parts: list[_Part]) -> list[_Part]:
        """Ask for all parts together by each modality; those that stay cut.

        A series has a modality, one of the standard's (PS3.3 C.7.3.1.1.1) or one that was seen.
        """
        if "ModalitiesInStudy" in self._limits.useless or self.is_spent:
            return parts
        known = [s for s, day in self.studies.items() if any(p.has(s, day) for p in parts)]
        seen = dict.fromkeys(term for study in known for term in study.modalities)
        if not seen:
            return parts
        days = [day for part in parts for day in (part.first, part.last) if day]
        span = _Part(min(days), max(days)) if days else _Part()
        stuck = []
        for term in filter(is_safe_key, dict.fromkeys((*seen, *_MODALITIES))):
            if self.is_spent:
                return parts
            part = replace(span, modality=term)
            answers = self._ask(part)
            if not self._is_whole(part, answers):
                stuck += self._days_of(part, answers)
        told_nothing = [
            part
            for part in parts
            if any(part.has(s, day) and not s.modalities for s, day in self.studies.items())
        ]
        return [*stuck, *told_nothing]

    def _days_of(self, part: _Part, listed: ListedStudies) -> list[_Part]:
        """Those days of a part that stay cut, or all of it where it has none, or none divide."""
        if part.first is None or "StudyDate" in self._limits.useless:
            return [part]
        try:
            return self._by_days(part, listed)
        except _NoUse:
            return [part]

    def _more_by_seen_modalities(self) -> bool:
        """Whether asking by the modalities that were seen shows a study more."""
        before = len(self._known)
        if "ModalitiesInStudy" not in self._limits.useless:
            for term in dict.fromkeys(t for study in list(self.studies) for t in study.modalities):
                part = _Part(modality=term)
                try:
                    self._is_whole(part, self._ask(part))
                except _NoUse:
                    self._limits.useless.add("ModalitiesInStudy")
                    break
        return len(self._known) > before

    def _by_identifiers(self, part: _Part) -> list[_Part]:
        """Ask for a part by characters of PatientID or AccessionNumber; the part if it stays cut.

        A patient has a PatientID, the unique key of its level (PS3.4 C.6.1.1.2). Accession
        numbers may be empty.
        """
        given = {*self._keys, *dict(part.exactly)}
        for keyword, last in itertools.product(_WITH_WILDCARDS, (True, False)):
            affix = _Affix(keyword, "", last)
            if keyword in given or affix.name in self._limits.useless or self.is_spent:
                continue
            values = self._values(part, keyword)
            if not values or "" in values:
                continue
            try:
                return [part] if self._by_characters(part, affix) else []
            except _NoUse:
                self._limits.useless.add(affix.name)
        return [part]

    def _by_characters(self, part: _Part, affix: _Affix) -> bool:
        """Whether something stays cut of what has one character more than the affix."""
        seen = {affix.next_of(value) for value in self._values(part, affix.keyword)} - {""}
        stuck = not seen.issubset(_CHARACTERS)
        for character in sorted(_CHARACTERS, key=lambda c: (c not in _OF_SQL, c not in seen)):
            longer = affix.longer(character)
            if not is_safe_key(longer.text) or len(longer.text) > _LONGEST_IDENTIFIER:
                continue
            smaller = replace(part, affix=longer)
            listed = self._ask(smaller)
            if self.is_spent:
                self.take(listed)
                return True
            if character in _OF_SQL and not self._is_literal(longer, listed):
                raise _NoUse
            if not self._is_whole(smaller, listed):
                stuck |= self._by_characters(part, longer)
            if self.is_spent:
                return True
        if affix.text:
            alone = replace(part, exactly=(*part.exactly, (affix.keyword, affix.text)))
            if not self._is_whole(alone, self._ask(alone)):
                stuck |= bool(self._by_identifiers(alone))
        return stuck

    @staticmethod
    def _is_literal(affix: _Affix, listed: ListedStudies) -> bool:
        """Whether the node has looked for the character itself, and not for any text."""
        if listed.capped and not listed.studies:
            return False
        return all(affix.fits(_identifier(study, affix.keyword)) for study in listed.studies)

    def _values(self, part: _Part, keyword: str) -> set[str]:
        return {_identifier(s, keyword) for s, day in self.studies.items() if part.has(s, day)}

    def _in_words(self, gaps: Iterable[_Part]) -> list[str]:
        """Days and modalities, neighbouring days together."""
        joined: list[_Part] = []
        for gap in sorted(gaps, key=lambda one: (one.modality or "", one.first)):
            before = joined[-1] if joined else None
            if before and before.modality == gap.modality and gap.first <= before.last + _DAY:
                joined[-1] = replace(before, last=max(before.last, gap.last))
            else:
                joined.append(_Part(gap.first, gap.last, gap.modality))
        return [f"{self._days_in_words(gap)} {gap.modality or ''}".strip() for gap in joined]

    def _days_in_words(self, part: _Part) -> str:
        """The days of a part, without the one at each end that nobody wants."""
        first, last = (
            min(max(day, self._wanted.first or day), self._wanted.last or day)
            for day in (part.first, part.last)
        )
        return f"{first:%Y%m%d}" if first == last else f"{first:%Y%m%d}-{last:%Y%m%d}"


def _surely(part: _Part, study: Study, day: date | None) -> bool:
    """Whether a known study is in a part, whatever way the node has with its ends."""
    inner = part
    if part.first is not None:
        inner = replace(part, first=part.first + _DAY, last=part.last - _DAY)
    return inner.has(study, day)


def _surely_not(part: _Part, study: Study, day: date | None) -> bool:
    """Whether a known study is not in a part."""
    if part.first is not None and day and not part.first - _DAY <= day <= part.last + _DAY:
        return True
    if part.modality is not None and study.modalities and part.modality not in study.modalities:
        return True
    if part.affix is None:
        return False
    value = _identifier(study, part.affix.keyword).casefold()
    return bool(value) and not replace(part.affix, text=part.affix.text.casefold()).fits(value)


def _identity(study: Study) -> object:
    uid = normal_uid(study.study_instance_uid)
    return (uid, unpadded(study.patient_id)) if uid else study


def _identifier(study: Study, keyword: str) -> str:
    return unpadded(study.patient_id if keyword == "PatientID" else study.accession_number)
