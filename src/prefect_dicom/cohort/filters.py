"""Filters of a cohort definition, applied on our side to studies and series.

A PACS cannot be trusted with most of them: it may ignore a key it does not support, match
by other rules, or not know the attribute at its level. So every filter is applied to what the
PACS answered. Where an answer lacks what a filter needs, nothing is guessed: the judgement is
None, and a person decides.

An attribute that a PACS does not support is absent from its answers (PS3.4 C.2.2.1.3). One
that is there and empty has no value: a free text is then an empty text, which no pattern but
``*`` is like; of anything else (a sex, a date, a number) it means that it is not known.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import lru_cache
from typing import Any

from prefect_dicom.cohort.bounded_regex import LONGEST_TEXT, bounded_regex
from prefect_dicom.cohort.modalities import stated_terms
from prefect_dicom.core.model import (
    CohortFilters,
    DateRange,
    Excluded,
    Filter,
    Pattern,
    PerPatient,
    Study,
    StudyReference,
)
from prefect_dicom.core.uids import normal_uid
from prefect_dicom.dicom.value_matching import blurred, like, study_day, unpadded, whole_number

_FREE_TEXTS = frozenset(
    {
        "StudyDescription",
        "SeriesDescription",
        "ProtocolName",
        "InstitutionName",
        "BodyPartExamined",
    }
)
_MODALITIES = ("Modality", "ModalitiesInStudy")
_DAYS = {"D": 1, "W": 7, "M": 30.436875, "Y": 365.2425}
_AGE = re.compile(r"([0-9]{3})([DWMY])")

# What a STUDY level query returns anyway has a field of its own in Study.
_FIELDS = {
    "StudyDate": "study_date",
    "ModalitiesInStudy": "modalities",
    "StudyDescription": "study_description",
    "NumberOfStudyRelatedSeries": "number_of_series",
    "NumberOfStudyRelatedInstances": "number_of_instances",
}


@dataclass(frozen=True, slots=True)
class SortedSeries:
    """The series of a study, by UID, sorted by whether the filters want them."""

    wanted: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    undecided: tuple[str, ...] = ()


def missing_keywords(filters: CohortFilters, study: Study) -> tuple[str, ...]:
    """Keywords at STUDY level that the filters need and the answer for a study lacks."""
    given = {keyword for keyword, _ in study.attributes}
    keywords: dict[str, None] = {}
    for each in filters.studies:
        if _values_of(each.keyword, study) is not None:
            continue
        asked = (
            ("PatientBirthDate", "PatientAge") if each.keyword == "PatientAge" else (each.keyword,)
        )
        keywords.update((keyword, None) for keyword in asked if keyword not in given)
    return tuple(keywords)


def series_keywords(filters: CohortFilters) -> tuple[str, ...]:
    """Keywords at SERIES level that the filters need; empty where no such query is needed."""
    wanted = (*filters.with_series, *filters.series)
    return tuple(dict.fromkeys(each.keyword for each in wanted))


def judge_study(filters: CohortFilters, study: Study) -> bool | None:
    """Whether a study passes by its answer at STUDY level; None where the answer does not decide.

    One that is excluded is never wanted; one whose identifiers differ from an excluded one in
    case, padding or leading zeros alone is undecided, because it may be the same.
    """
    judgements = [_not_excluded(filters.excluded, study)]
    judgements += [_judge(each, _values_of(each.keyword, study)) for each in filters.studies]
    return _all(judgements)


def explain_undecided(filters: CohortFilters, study: Study) -> tuple[str, ...]:
    """Explain why a study is undecided, in words that hold no patient data."""
    words = [
        f"{each.keyword} is missing, or cannot be compared"
        for each in filters.studies
        if _judge(each, _values_of(each.keyword, study)) is None
    ]
    if _not_excluded(filters.excluded, study) is None:
        words.append("it is nearly what is excluded")
    return tuple(words) or ("its series lack what the filters need",)


def sort_series(wanted: Sequence[Filter], answers: Mapping[str, Mapping[str, str]]) -> SortedSeries:
    """Sort series by whether they pass all filters.

    Parameters
    ----------
    answers : mapping of SeriesInstanceUID to mapping
        Keyword to value, of the attributes that were answered.
    """
    sorted_out: dict[bool | None, list[str]] = defaultdict(list)
    for uid, given in answers.items():
        judgement = _all(_judge(each, _values(each.keyword, given)) for each in wanted)
        sorted_out[judgement].append(uid)
    return SortedSeries(*(tuple(sorted(sorted_out[each])) for each in (True, False, None)))


def judge_series(filters: CohortFilters, answers: Mapping[str, Mapping[str, str]]) -> bool | None:
    """Whether a study passes by its answers at SERIES level; None where they do not decide.

    One series has to be what ``with_series`` says, and at least one is to be retrieved. If one
    series is undecided, what would be retrieved of the study is undecided.
    """
    one = sort_series(filters.with_series, answers)
    kept = sort_series(filters.series, answers)
    some = None if one.undecided and not one.wanted else bool(one.wanted)
    rest = None if kept.undecided else bool(kept.wanted)
    return _all((some, rest))


def over_maximum(
    per_patient: PerPatient, studies: Iterable[tuple[StudyReference, Study]]
) -> set[StudyReference]:
    """Studies of a cohort beyond the maximum per patient.

    By StudyDate, then by UID; studies without a readable date are the last to be taken. A study
    without a PatientID counts for itself.
    """
    of_patient: dict[str, list[tuple[StudyReference, Study]]] = defaultdict(list)
    for reference, study in studies:
        if patient := unpadded(study.patient_id):
            of_patient[patient].append((reference, study))
    return {
        reference
        for its_studies in of_patient.values()
        for reference, _ in sorted(its_studies, key=lambda each: _order(per_patient, each[1]))[
            per_patient.studies :
        ]
    }


def _order(per_patient: PerPatient, study: Study) -> tuple[int, str]:
    day = study_day(study.study_date)
    if day is None:
        position = date.max.toordinal() + 1
    else:
        position = -day.toordinal() if per_patient.latest else day.toordinal()
    return position, normal_uid(study.study_instance_uid)


# --- one filter and one value


def _all(judgements: Iterable[bool | None]) -> bool | None:
    found = set(judgements)
    return False if False in found else None if None in found else True


def _not_excluded(excluded: frozenset[Excluded], study: Study) -> bool | None:
    if not excluded:
        return True
    patient, accession = unpadded(study.patient_id), unpadded(study.accession_number)
    uid = normal_uid(study.study_instance_uid)
    exact, nearly = _lookups(excluded)
    forms = [
        Excluded(*given)
        for given in (
            (patient, None, None),
            (None, accession, None),
            (patient, accession, None),
            (None, None, uid),
            (patient, None, uid),
            (None, accession, uid),
            (patient, accession, uid),
        )
    ]
    if not exact.isdisjoint(forms):
        return False
    return True if nearly.isdisjoint(map(_blurred, forms)) else None


@lru_cache(maxsize=4)
def _lookups(excluded: frozenset[Excluded]) -> tuple[frozenset[Excluded], frozenset[Excluded]]:
    exact = frozenset(
        Excluded(
            each.patient_id and unpadded(each.patient_id),
            each.accession_number and unpadded(each.accession_number),
            each.study_instance_uid and normal_uid(each.study_instance_uid),
        )
        for each in excluded
    )
    return exact, frozenset(map(_blurred, exact))


def _blurred(each: Excluded) -> Excluded:
    return Excluded(
        each.patient_id and blurred(each.patient_id),
        each.accession_number and blurred(each.accession_number),
        each.study_instance_uid,
    )


def _values_of(keyword: str, study: Study) -> tuple[str, ...] | None:
    given = dict(study.attributes)
    if keyword == "PatientAge":
        born = study.patient_birth_date or given.get("PatientBirthDate", "")
        years = age_in_years(born, study.study_date, given.get("PatientAge", ""))
        return None if years is None else (str(years),)
    if keyword == "ModalitiesInStudy" and study.modalities:
        return _with_stated_terms(study.modalities)
    # Empty there may be not answered: that shows when it is asked for by itself.
    if keyword in _FIELDS and (value := getattr(study, _FIELDS[keyword])):
        return (unpadded(str(value)),)
    return _values(keyword, given)


def _values(keyword: str, given: Mapping[str, str]) -> tuple[str, ...] | None:
    """The values of an attribute; None where it is not known."""
    value = given.get(keyword)
    if value is None:
        return None
    values = tuple(unpadded(part) for part in value.split("\\"))
    if keyword not in _FREE_TEXTS:
        values = tuple(part for part in values if part)
    if keyword in _MODALITIES:
        return _with_stated_terms(values)
    return values or None


def _with_stated_terms(modalities: tuple[str, ...]) -> tuple[str, ...] | None:
    """Modalities as they were answered, and as DICOM's terms; None where they state nothing."""
    stated = stated_terms(modalities)
    return None if stated is None else (*modalities, *sorted(stated.difference(modalities)))


def _judge(wanted: Filter, values: tuple[str, ...] | None) -> bool | None:
    """Whether the values pass; of several one has to be wanted, and none unwanted."""
    if values is None:
        return None
    judgements: list[bool | None] = []
    if wanted.any_of:
        judgements.append(_any(_matches(each, value) for each in wanted.any_of for value in values))
    if wanted.none_of:
        found = _any(_matches(each, value) for each in wanted.none_of for value in values)
        judgements.append(None if found is None else not found)
    if wanted.dates is not None:
        day = study_day(values[0])
        judgements.append(None if day is None else day in wanted.dates)
    if wanted.at_least is not None or wanted.at_most is not None:
        judgements.append(_within(wanted, values[0]))
    return _all(judgements)


def _any(judgements: Iterable[bool | None]) -> bool | None:
    found = set(judgements)
    return True if True in found else None if None in found else False


def _within(wanted: Filter, value: str) -> bool | None:
    number = whole_number(value)
    if number is None:
        return None
    low, high = wanted.at_least, wanted.at_most
    return (low is None or low <= number) and (high is None or number <= high)


def _matches(pattern: Pattern, value: str) -> bool | None:
    if not pattern.regex:
        return like(pattern.text, value)
    if len(value) > LONGEST_TEXT:
        # Longer than the standard has it, and than the expression was found to be harmless for.
        return None
    return bounded_regex(pattern.text).search(value) is not None


def age_in_years(birth_date: str, study_date: str, age: str) -> int | None:
    """A patient's age at a study: from both dates, else as the PACS gives it (AS, PS3.5 6.2)."""
    born, day = study_day(birth_date), study_day(study_date)
    if born is not None and day is not None and born <= day:
        return day.year - born.year - ((day.month, day.day) < (born.month, born.day))
    match = _AGE.fullmatch(unpadded(age))
    return None if match is None else int(int(match[1]) * _DAYS[match[2]] / _DAYS["Y"] + 1e-6)


# --- as text and as JSON


def series_text(filters: CohortFilters) -> str:
    """The filters of the series to be retrieved, in words; empty for whole studies.

    The same filters are the same text, and others are another: a study is archived under one.
    """
    return "; ".join(sorted(_words(each) for each in filters.series))


def _words(wanted: Filter) -> str:
    parts = []
    if wanted.any_of:
        parts.append("is " + " or ".join(sorted(map(_quoted, wanted.any_of))))
    if wanted.none_of:
        parts.append("is not " + " nor ".join(sorted(map(_quoted, wanted.none_of))))
    if wanted.dates is not None:
        parts.append(f"within {'-'.join(_day(d) for d in (wanted.dates.first, wanted.dates.last))}")
    if wanted.at_least is not None:
        parts.append(f"at least {wanted.at_least}")
    if wanted.at_most is not None:
        parts.append(f"at most {wanted.at_most}")
    return f"{wanted.keyword} {' and '.join(parts)}"


def _quoted(pattern: Pattern) -> str:
    text = json.dumps(pattern.text, ensure_ascii=False)
    return f"regex {text}" if pattern.regex else text


def _day(day: date | None) -> str:
    return "" if day is None else f"{day:%Y%m%d}"


def encode_filters(filters: CohortFilters) -> dict[str, Any]:
    """Filters as what JSON holds; :func:`decode_filters` reads it."""

    def encoded(some: Sequence[Filter]) -> list[dict[str, Any]]:
        return [
            asdict(each) | {"dates": each.dates and [_day(each.dates.first), _day(each.dates.last)]}
            for each in some
        ]

    return {
        "studies": encoded(filters.studies),
        "with_series": encoded(filters.with_series),
        "series": encoded(filters.series),
        "excluded": [
            [each.patient_id, each.accession_number, each.study_instance_uid]
            for each in filters.excluded
        ],
        "per_patient": filters.per_patient and asdict(filters.per_patient),
    }


def decode_filters(body: Mapping[str, Any]) -> CohortFilters:
    """The filters that :func:`encode_filters` made this of."""

    def patterns(some: Sequence[Mapping[str, Any]]) -> tuple[Pattern, ...]:
        return tuple(Pattern(**each) for each in some)

    def decoded(some: Sequence[Mapping[str, Any]]) -> tuple[Filter, ...]:
        return tuple(
            Filter(
                each["keyword"],
                patterns(each["any_of"]),
                patterns(each["none_of"]),
                each["dates"] and DateRange(*(study_day(day) for day in each["dates"])),
                each["at_least"],
                each["at_most"],
            )
            for each in some
        )

    return CohortFilters(
        decoded(body["studies"]),
        decoded(body["with_series"]),
        decoded(body["series"]),
        frozenset(Excluded(*each) for each in body["excluded"]),
        body["per_patient"] and PerPatient(**body["per_patient"]),
    )
