"""Row matching: the keys of the query for a row, and our own check of its answers.

A PACS may ignore a matching key, fold case, match substrings or trim zeros, and answer with
success. So a row is queried by identifiers alone, and every answer is compared again here: exactly,
but for the padding DICOM itself calls insignificant (PS3.5 6.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from typing import NamedTuple

from prefect_dicom.cohort.modalities import stated_terms
from prefect_dicom.cohort.persons import (
    issuers_agree,
    patient_key,
    several_patients,
    studies_of_issuer,
)
from prefect_dicom.core.model import CohortRow, DateRange, Study
from prefect_dicom.core.uids import is_safe_key, normal_uid
from prefect_dicom.dicom.value_matching import (
    blurred,
    like,
    names_agree,
    overlooked,
    study_day,
    text_around,
    unpadded,
    written_otherwise,
)

MOST_NEAR_MISSES = 20
FIRST_DAY, LAST_DAY = date(1900, 1, 1), date(2999, 12, 31)
"""Of a range that is open at an end; open ranges bring undated studies on some PACS only."""


@dataclass(frozen=True, slots=True)
class Discovery:
    """Result of the answers of a PACS for one cohort row.

    ``reason`` is None where ``studies`` is what the row asked for, else a code of
    :mod:`prefect_dicom.core.reasons` and ``studies`` is empty; with ``list-unproved`` they are what
    was found, and ``gaps`` names where there may be more: days, modalities, no identifiers.
    ``near_misses`` are at most ``MOST_NEAR_MISSES`` answers for a person to read: never
    retrieved. Study Instance UIDs of ``studies`` are without padding.
    """

    studies: tuple[Study, ...] = ()
    reason: str | None = None
    near_misses: tuple[Study, ...] = ()
    gaps: tuple[str, ...] = ()


def study_query(row: CohortRow) -> dict[str, str]:
    """The matching keys of the STUDY level C-FIND for a row, PS3.4 C.6.2.1.2.

    Identifiers, where the row has one. A date, modality or description is then not sent: PACS
    miss undated studies in a range, shift days between time zones, or answer nothing or
    everything to a key they do not support. They are applied to the answers instead. A row
    without identifiers is a window of days, asked for with one day more at each end.

    Returns
    -------
    dict of str to str
        Keyword to value: StudyInstanceUID alone where the row has it, else PatientID and
        AccessionNumber as far as given, else StudyDate.

    Raises
    ------
    ValueError
        If there is no such key or one that would select more than one value.
    """
    keys: dict[str, str | None]
    if row.study_instance_uid is not None:
        keys = {"StudyInstanceUID": row.study_instance_uid}
    else:
        keys = {"PatientID": row.patient_id, "AccessionNumber": row.accession_number}
    given = {keyword: value for keyword, value in keys.items() if value is not None}
    if is_date_window(row) and row.study_date is not None:
        first, last = widened(row.study_date)
        return {"StudyDate": f"{first:%Y%m%d}-{last:%Y%m%d}"}
    if not given or not all(is_safe_key(value) for value in given.values()):
        raise ValueError(f"line {row.line} has no key that is safe to query by")
    return given


def is_date_window(row: CohortRow) -> bool:
    """Whether the row has no identifiers and stands for every study of its days."""
    given = (row.study_instance_uid, row.patient_id, row.accession_number)
    return row.study_date is not None and given == (None, None, None)


def widened(days: DateRange) -> tuple[date, date]:
    """The first and last day to ask for: one more at each end, for PACS that shift dates.

    Examples
    --------
    >>> widened(DateRange(date(2024, 1, 1), None))
    (datetime.date(2023, 12, 31), datetime.date(2999, 12, 31))
    """
    first = FIRST_DAY if days.first is None else max(FIRST_DAY, days.first - timedelta(days=1))
    last = LAST_DAY if days.last is None else min(LAST_DAY, days.last + timedelta(days=1))
    return first, last


def identifies(row: CohortRow, study: Study) -> bool:
    """Whether every identifier the row gives is the study's, to the character.

    Trailing blanks and NULs, and leading blanks, are padding (PS3.5 6.2). Case and leading
    zeros are significant. A row without identifiers identifies nothing, unless it stands for
    every study of its days.
    """
    pairs = _identifiers(row, study)
    return (bool(pairs) or is_date_window(row)) and all(given == found for given, found in pairs)


def has_same_uid(row: CohortRow, study: Study) -> bool:
    """Whether the row gives a StudyInstanceUID, and it is the study's."""
    given = row.study_instance_uid
    return given is not None and normal_uid(given) == normal_uid(study.study_instance_uid)


def has_values(study: Study, keywords: Iterable[str]) -> bool:
    """Whether the answer has a value for each of these keys of :func:`study_query`."""
    values = _identifiers_of(study)
    return all(unpadded(values[keyword]) for keyword in keywords)


def matches(keys: Mapping[str, str], study: Study) -> bool:
    """Whether the answer has the values of these keys of :func:`study_query`; days are not read."""
    values = _identifiers_of(study)
    return all(
        unpadded(values[keyword]) == unpadded(value)
        for keyword, value in keys.items()
        if keyword in values
    )


def _identifiers_of(study: Study) -> dict[str, str]:
    return {
        "PatientID": study.patient_id,
        "AccessionNumber": study.accession_number,
        "StudyInstanceUID": normal_uid(study.study_instance_uid),
    }


def is_patients(row: CohortRow, study: Study) -> bool:
    """Whether the study has the row's PatientID, or the other one that the row gives."""
    return matches({"PatientID": row.patient_id or ""}, study) or _is_its_other_number(row, study)


def may_match(row: CohortRow, study: Study) -> bool:
    """Whether a PACS that matches substrings in any case may return the study for the row."""
    return all(blurred(given) in blurred(found) for given, found in _identifiers(row, study))


def passes_filters(row: CohortRow, study: Study) -> bool:
    """Whether the study is within the row's date range, modality and description.

    A study without a readable date is in no range. A study whose modalities the PACS does
    not state may have any. In a description ``*`` stands for any text and ``?`` for one character;
    case is of no account.
    """
    return next(unmet_filters(row, study), None) is None


def unmet_filters(row: CohortRow, study: Study) -> Iterator[str]:
    """The filters of a row that a study does not meet, by the names of the row's fields."""
    if row.study_date is not None:
        day = study_day(study.study_date)
        if day is None or day not in row.study_date:
            yield "study_date"
    if row.modality is not None:
        stated = stated_terms(study.modalities)
        if stated is not None and unpadded(row.modality).upper() not in stated:
            yield "modality"
    if row.study_description is not None and not like(
        row.study_description, study.study_description
    ):
        yield "study_description"


def is_same_patient(row: CohortRow, study: Study) -> bool | None:
    """Whether name and birth date of the answer are those the row gives, if it gives any.

    They identify nobody. They show that an identifier was mistyped, and is a stranger's.

    Returns
    -------
    bool or None
        None where the answer lacks what the row gives.
    """
    judged: list[bool | None] = []
    if row.patient_name is not None:
        judged.append(names_agree(row.patient_name, study.patient_name))
    if row.patient_birth_date is not None:
        day = study_day(study.patient_birth_date)
        judged.append(None if day is None else day == row.patient_birth_date)
    return False if False in judged else None if None in judged else True


def explain_near_miss(row: CohortRow, study: Study) -> tuple[str, ...]:
    """Explain how a near miss differs from its row.

    Returns
    -------
    tuple of str
        In words that hold no patient data; empty where the study is what was asked for, and was
        not taken for the sake of others.
    """
    words = []
    for keyword, given, found in _named_identifiers(row, study):
        if given == found:
            continue
        if differing := overlooked(given, found):
            words.append(f"{keyword} differs in {' and '.join(differing)}")
        elif around := text_around(given, found):
            words.append(f"{keyword} {around}")
        else:
            words.append(f"{keyword} {'is another' if found else 'is missing'}")
    if row.issuer_of_patient_id is not None:
        agrees = issuers_agree(row.issuer_of_patient_id, study.issuer_of_patient_id)
        if not agrees:
            words.append(f"IssuerOfPatientID is {'missing' if agrees is None else 'another'}")
    if row.patient_name is not None:
        agrees = names_agree(row.patient_name, study.patient_name)
        if agrees is None:
            there = unpadded(study.patient_name)
            words.append(
                "PatientName is in other letters, not compared"
                if there
                else "PatientName is missing"
            )
        elif not agrees:
            otherwise = written_otherwise(row.patient_name, study.patient_name)
            words.append(f"PatientName {'is written otherwise' if otherwise else 'is another'}")
    if row.patient_birth_date is not None:
        day = study_day(study.patient_birth_date)
        if day != row.patient_birth_date:
            words.append(f"PatientBirthDate {'is missing' if day is None else 'is another'}")
    if _is_a_day_off(row, study):
        words.append("StudyDate is one day off")
    if not is_safe_key(normal_uid(study.study_instance_uid)):
        words.append("StudyInstanceUID cannot be asked for")
    return tuple(words)


def assess(row: CohortRow, answers: Iterable[Study]) -> Discovery:
    """Match the answers to the query of a row with the row.

    Parameters
    ----------
    answers : iterable of Study
        In any order; those that are not of the row are dropped at once.

    Returns
    -------
    Discovery
        With reason None and studies, or one of ``no-match``, ``excluded-by-filter``,
        ``several-patients``, ``name-disagrees``, ``identifier-missing`` and ``unsafe-uid``. The
        candidates of these, studies whose UID cannot be asked for, answers that have the row's UID
        and differ in another identifier, or whose identifiers differ only in case, padding or
        leading zeros, and studies one day out of the row's range are the near misses, in this
        order; without a match also answers with text before or behind the row's identifiers.
    """
    sorted_ = _sort(row, answers)
    identified, raw = sorted_.identified, sorted_.raw
    nearly = dict(sorted_.nearly)
    nearly |= {key: study for key, study in identified.items() if _is_a_day_off(row, study)}

    def discovery(
        reason: str | None, studies: Iterable[Study] = (), aside: Iterable[Study] = ()
    ) -> Discovery:
        return Discovery(
            studies=tuple(studies),
            reason=reason,
            near_misses=(*aside, *nearly.values())[:MOST_NEAR_MISSES],
        )

    if not identified:
        nearly |= sorted_.affixed
        return discovery("no-match")
    candidates = list(identified.values())
    if (issuer := row.issuer_of_patient_id) is not None:
        its, untold = studies_of_issuer(issuer, candidates)
        if untold:
            reason = "several-patients" if its else "identifier-missing"
            return discovery(reason, aside=[*its, *untold])
        if not its:
            return discovery("no-match", aside=candidates)
        candidates = its
        raw = [s for s in raw if issuers_agree(issuer, s.issuer_of_patient_id) is not False]
    remaining = [study for study in candidates if passes_filters(row, study)]
    if not remaining:
        return discovery("excluded-by-filter")
    judged = remaining
    if row.patient_id is not None and row.accession_number is None:
        # A day may tell who is meant by the number. That somebody has studies of a kind does not.
        of_days = replace(row, modality=None, study_description=None)
        judged = [study for study in candidates if passes_filters(of_days, study)]
    shared = _of_several_patients(row, judged, raw)
    if is_date_window(row):
        # Many patients are meant, each study of one of them.
        uids = {normal_uid(study.study_instance_uid) for study in shared}
        remaining = [s for s in remaining if normal_uid(s.study_instance_uid) not in uids]
    elif shared:
        remaining = _of_the_named_person(row, remaining, raw)
        shared = [] if remaining else shared
    if not remaining:
        return discovery("several-patients", aside=shared)
    if not all(is_same_patient(row, study) for study in remaining):
        return discovery("name-disagrees", aside=remaining)
    safe, unsafe = [], []
    for study in remaining:
        uid = normal_uid(study.study_instance_uid)
        if is_safe_key(uid):
            safe.append(replace(study, study_instance_uid=uid))
        else:
            unsafe.append(study)
    return discovery(None if safe else "unsafe-uid", studies=safe, aside=(*shared, *unsafe))


@dataclass(slots=True)
class _Sorted:
    """Answers to the query of a row, by how near they are to it."""

    identified: dict[_Identity, Study] = field(default_factory=dict)
    """One study for all answers of it."""
    raw: list[Study] = field(default_factory=list)
    """Every answer that the row identifies: two of one study may name two persons."""
    nearly: dict[_Identity, Study] = field(default_factory=dict)
    affixed: dict[_Identity, Study] = field(default_factory=dict)


def _sort(row: CohortRow, answers: Iterable[Study]) -> _Sorted:
    found = _Sorted()
    for answer in answers:
        key = _identity(answer)
        if identifies(row, answer):
            known = found.identified.get(key)
            found.identified[key] = answer if known is None else _merged(known, answer)
            found.raw.append(answer)
        elif len(found.nearly) < MOST_NEAR_MISSES and _nearly_identifies(row, answer):
            found.nearly.setdefault(key, answer)
        elif len(found.affixed) < MOST_NEAR_MISSES and _identifies_but_for_affixes(row, answer):
            found.affixed.setdefault(key, answer)
    return found


def _of_several_patients(
    row: CohortRow, remaining: Sequence[Study], raw: Sequence[Study]
) -> list[Study]:
    """The answers that leave open which patient is meant; none where all are one patient's.

    A request names a study by its UID alone and so brings the instances of all patients it is
    filed under, also of those the filters have left out.
    """
    by_uid: dict[str, list[Study]] = {normal_uid(s.study_instance_uid): [] for s in remaining}
    for answer in raw:
        if (its := by_uid.get(normal_uid(answer.study_instance_uid))) is not None:
            its.append(answer)
    groups = list(by_uid.values())
    if not is_date_window(row):
        groups = [[answer for group in groups for answer in group]]
    shared = [group for group in groups if several_patients(group, numbers_of(row))]
    described: dict[tuple[object, ...], Study] = {}
    for answer in (answer for group in shared for answer in group):
        name, born, issuer = (
            answer.patient_name,
            answer.patient_birth_date,
            answer.issuer_of_patient_id,
        )
        described.setdefault((_identity(answer), name, born, issuer), answer)
    return list(described.values())


def _of_the_named_person(
    row: CohortRow, remaining: Sequence[Study], raw: Sequence[Study]
) -> list[Study]:
    """Of the studies of several persons under the row's PatientID, those of the one it names."""
    if row.patient_id is None:
        return []
    its = [study for study in remaining if is_same_patient(row, study)]
    names_nobody = row.patient_name is None and row.patient_birth_date is None
    return [] if names_nobody or _of_several_patients(row, its, raw) else its


def numbers_of(row: CohortRow) -> tuple[str, ...]:
    """The PatientIDs that the row says are one patient's."""
    if row.patient_id is None or row.other_patient_id is None:
        return ()
    return row.patient_id, row.other_patient_id


class _Identity(NamedTuple):
    """What makes two answers one study's."""

    study_instance_uid: str
    patient_id: str
    patient_id_bytes: str
    """Where its characters are a guess, so that bytes that differ stay different."""


def _identity(study: Study) -> _Identity:
    return _Identity(normal_uid(study.study_instance_uid), *patient_key(study))


def _named_identifiers(row: CohortRow, study: Study) -> list[tuple[str, str, str]]:
    """Of each identifier of the row: keyword, the row's value, the study's, without padding."""
    named = [
        ("PatientID", row.patient_id, study.patient_id),
        ("AccessionNumber", row.accession_number, study.accession_number),
        ("StudyInstanceUID", row.study_instance_uid, normal_uid(study.study_instance_uid)),
    ]
    if row.other_patient_id is not None and _is_its_other_number(row, study):
        # As good as the first one: the row says that both are one patient's.
        named[0] = ("PatientID", row.other_patient_id, study.patient_id)
    return [
        (keyword, unpadded(given), unpadded(found))
        for keyword, given, found in named
        if given is not None
    ]


def _is_its_other_number(row: CohortRow, study: Study) -> bool:
    other = row.other_patient_id
    given = row.patient_id is not None and other is not None
    return given and unpadded(other or "") == unpadded(study.patient_id)


def _identifiers(row: CohortRow, study: Study) -> list[tuple[str, str]]:
    return [(given, found) for _, given, found in _named_identifiers(row, study)]


def _nearly_identifies(row: CohortRow, study: Study) -> bool:
    """Whether a person may have meant the study: by its UID, or by identifiers nearly the same."""
    pairs = _identifiers(row, study)
    return has_same_uid(row, study) or (
        bool(pairs) and all(given == found or overlooked(given, found) for given, found in pairs)
    )


def _identifies_but_for_affixes(row: CohortRow, study: Study) -> bool:
    """Whether the study's identifiers are the row's but for text before or behind one of them."""
    pairs = _identifiers(row, study)
    return bool(pairs) and all(
        given == found or overlooked(given, found) or text_around(given, found)
        for given, found in pairs
    )


def _is_a_day_off(row: CohortRow, study: Study) -> bool:
    """Whether the study is the row's but for one day, as by another time zone."""
    day = study_day(study.study_date)
    if row.study_date is None or day is None or day in row.study_date or is_date_window(row):
        # Of a window's neighbours another window has the studies.
        return False
    ends = [end for end in (row.study_date.first, row.study_date.last) if end is not None]
    near = any(abs(day - end) == timedelta(days=1) for end in ends)
    return near and passes_filters(replace(row, study_date=None), study)


def _merged(first: Study, second: Study) -> Study:
    """One study of two answers for it: some PACS answer once for each modality."""
    return replace(
        first,
        accession_number=first.accession_number or second.accession_number,
        study_date=first.study_date or second.study_date,
        modalities=tuple(dict.fromkeys((*first.modalities, *second.modalities))),
        study_description=first.study_description or second.study_description,
        number_of_series=_larger(first.number_of_series, second.number_of_series),
        number_of_instances=_larger(first.number_of_instances, second.number_of_instances),
        patient_name=first.patient_name or second.patient_name,
        patient_birth_date=first.patient_birth_date or second.patient_birth_date,
        issuer_of_patient_id=first.issuer_of_patient_id or second.issuer_of_patient_id,
    )


def _larger(first: int | None, second: int | None) -> int | None:
    return max((count for count in (first, second) if count is not None), default=None)
