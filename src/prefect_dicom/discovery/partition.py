"""Query partitioning: the keys that divide a query, and what is known of a node's list limits.

A :class:`Partition` is the part of a query that has some days, a modality or an identifier with
certain characters. :mod:`prefect_dicom.discovery.complete_list` queries by them what one query
could not list.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import date, timedelta

from prefect_dicom.config.capabilities import Match, NodeCapabilities
from prefect_dicom.core.model import Study
from prefect_dicom.dicom.value_matching import unpadded
from prefect_dicom.network.find.list_studies import ListedStudies

DOUBTED_FROM = 10
"""Answers from which on a list is doubted; no archive is known to stop below."""
MOST_QUERIES = 1_000
"""For a row that names a patient or an accession number; fewer after each that needed them all."""

_DAY = timedelta(days=1)

# PS3.3 C.7.3.1.1.1: the defined terms of Modality, those of today first, then the retired ones.
_TERMS = """
CT MR CR DX US MG XA RF NM PT OT SC SR PR KO SEG DOC RTSTRUCT RTPLAN RTDOSE RTIMAGE RTRECORD
REG RWV FID PX IO XC ES GM SM OP OPT OPM OPV OPTENF OPTBSV OAM OCT AR KER LEN SRF VA IOL OSS
IVUS IVOCT BI BMD BDUS EPS ECG EEG EMG EOG HD RESP AU TG LS BTO CFM CTPROTOCOL DMS PLAN POS
PTPROTOCOL RTINTENT RTRAD RTSEGANN SMR STAIN TEXTUREMAP M3D ASMT ANN XAPROTOCOL AS CD CF CP
CS DD DF DG DM DS EC FA FS HC LP MA MS OPR ST VF
"""
MODALITIES = tuple(_TERMS.split())
"""Every defined term of Modality, the most frequent first."""


@dataclass
class ListLimits:
    """What a run has learnt of the limits of its node's lists at STUDY level."""

    longest: int = 0
    """Answers of the longest list so far: a shorter one was not cut."""
    caps: set[int] = field(default_factory=set)
    """Numbers of answers at which a list was cut without a word."""
    useless: set[str] = field(default_factory=set)
    """Keys that do not partition a query: the node ignores them, or answers nothing to them."""
    query_budget: int = MOST_QUERIES
    """The most queries for the next row."""
    first_day_matches: bool = False
    """The first day of a range was seen to be in it."""
    last_day_matches: bool | None = None
    """Whether the last day is; None: not seen yet."""

    def start_from(self, known: NodeCapabilities) -> None:
        """Begin with what was learnt of the node before the run.

        That is what makes lists doubtful. How long they were then proves nothing of today's: a
        limit may have been set, or lowered, meanwhile.
        """
        cap, unannounced = known.answer_cap, known.answer_cap_status in (None, "0000")
        self.caps = {cap} if cap is not None and unannounced else set()
        for keyword, key in (known.keys or {}).items():
            if key.match in (Match.IGNORED, Match.EMPTIES):
                self.useless.add(keyword)
            if key.wildcards is False:
                self.useless |= {WildcardKey(keyword, "", last).name for last in (True, False)}

    def is_whole(self, listed: ListedStudies) -> bool:
        """Whether a list was certainly not cut."""
        count = len(listed.studies)
        is_short = count < max(DOUBTED_FROM, self.longest)
        return is_short and not listed.capped and count not in self.caps

    def record(self, count: int) -> None:
        """The node has listed so many answers at once."""
        self.longest = max(self.longest, count)


@dataclass(frozen=True)
class WildcardKey:
    """The last or first characters of an identifier, as a key with a wildcard."""

    keyword: str
    text: str
    last: bool

    @property
    def value(self) -> str:
        """The value of the key, PS3.4 C.2.2.2.4."""
        return f"*{self.text}" if self.last else f"{self.text}*"

    @property
    def name(self) -> str:
        """The kind of key: the wildcard without the characters."""
        return replace(self, text="").value + self.keyword

    def matches(self, value: str) -> bool:
        """Whether an identifier has these characters."""
        return value.endswith(self.text) if self.last else value.startswith(self.text)

    def longer(self, character: str) -> WildcardKey:
        """The key with one more character."""
        text = character + self.text if self.last else self.text + character
        return replace(self, text=text)

    def next_of(self, value: str) -> str:
        """The next character of an identifier; empty where it has none, or does not match."""
        if not self.matches(value) or value == self.text:
            return ""
        return value[-len(self.text) - 1] if self.last else value[len(self.text)]


@dataclass(frozen=True)
class Days:
    """A closed range of days."""

    first: date
    last: date

    def __contains__(self, day: date | None) -> bool:
        return day is not None and self.first <= day <= self.last

    def widened(self) -> Days:
        """The range with one day more at each end."""
        return Days(self.first - _DAY, self.last + _DAY)

    def narrowed(self) -> Days:
        """The range without the day at each end."""
        return Days(self.first + _DAY, self.last - _DAY)


@dataclass(frozen=True)
class Partition:
    """A part of a query; what is None is not queried by."""

    days: Days | None = None
    modality: str | None = None
    exactly: tuple[tuple[str, str], ...] = ()
    """Keywords and values of identifiers."""
    wildcard: WildcardKey | None = None

    def has(self, study: Study, day: date | None) -> bool:
        """Whether a study is in the partition; ``day`` is that of its StudyDate."""
        if self.days is not None and day not in self.days:
            return False
        if self.modality is not None and self.modality not in study.modalities:
            return False
        if any(identifier(study, keyword) != value for keyword, value in self.exactly):
            return False
        return self.wildcard is None or self.wildcard.matches(
            identifier(study, self.wildcard.keyword)
        )

    def surely_has(self, study: Study, day: date | None) -> bool:
        """Whether a known study is in it, whether or not ranges include their ends."""
        inner = self
        if self.days is not None:
            inner = replace(self, days=self.days.narrowed())
        return inner.has(study, day)

    def surely_lacks(self, study: Study, day: date | None) -> bool:
        """Whether a known study is not in it, however ranges and texts are matched."""
        if self.days is not None and day and day not in self.days.widened():
            return True
        if self.modality and study.modalities and self.modality not in study.modalities:
            return True
        if self.wildcard is None:
            return False
        value = identifier(study, self.wildcard.keyword).casefold()
        folded = replace(self.wildcard, text=self.wildcard.text.casefold())
        return bool(value) and not folded.matches(value)


def identifier(study: Study, keyword: str) -> str:
    """The PatientID or AccessionNumber of a study, without padding."""
    return unpadded(study.patient_id if keyword == "PatientID" else study.accession_number)
