"""Our own check of what a C-FIND answered, and the keys to ask with.

An archive may ignore a matching key, fold case, match substrings or trim zeros, and answer with
success. So a row asks by identifiers alone, and every answer is compared again here: exactly,
but for the padding DICOM itself calls insignificant (PS3.5 6.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache

from prefect_dicom.identifiers import is_safe_key, normal_uid
from prefect_dicom.model import CohortRow, Study

MOST_NEAR_MISSES = 20

# PS3.5 6.2, VR DA; with dots it is the form of ACR-NEMA, which readers are to accept.
_DAY = re.compile(r"([0-9]{4})([0-9]{2})([0-9]{2})|([0-9]{4})\.([0-9]{2})\.([0-9]{2})")
_LEADING_ZEROS = re.compile(r"(?<![0-9])0+(?=[0-9])")
_PADDING = re.compile(r"[\s\0]+")


@dataclass(frozen=True, slots=True)
class Discovery:
    """What the answers of a PACS mean for one cohort row.

    ``reason`` is None where ``studies`` is what the row asked for, else a code of
    :mod:`prefect_dicom.reasons` and ``studies`` is empty; with ``list-unproved`` they are what
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

    Identifiers only. A date, modality or description is never sent: archives miss undated
    studies in a range, shift days between time zones, or answer nothing or everything to a key
    they do not support. They are applied to the answers instead.

    Returns
    -------
    dict of str to str
        Keyword to value: StudyInstanceUID alone where the row has it, else PatientID and
        AccessionNumber as far as given.

    Raises
    ------
    ValueError
        If there is no such key or one that would select more than one value.
    """
    if row.study_instance_uid is not None:
        keys = {"StudyInstanceUID": row.study_instance_uid}
    else:
        keys = {"PatientID": row.patient_id, "AccessionNumber": row.accession_number}
    given = {keyword: value for keyword, value in keys.items() if value is not None}
    if not given or not all(is_safe_key(value) for value in given.values()):
        raise ValueError(f"line {row.line} has no key that is safe to query by")
    return given


def identifies(row: CohortRow, study: Study) -> bool:
    """Whether every identifier the row gives is the study's, to the character.

    Trailing blanks and NULs, and leading blanks, are padding (PS3.5 6.2). Case and leading
    zeros are significant. A row without identifiers identifies nothing.
    """
    pairs = _identifiers(row, study)
    return bool(pairs) and all(given == found for given, found in pairs)


def tells(study: Study, keywords: Iterable[str]) -> bool:
    """Whether the answer has a value for each of these keys of :func:`study_query`."""
    told = {
        "PatientID": study.patient_id,
        "AccessionNumber": study.accession_number,
        "StudyInstanceUID": study.study_instance_uid,
    }
    return all(_unpadded(told[keyword]) for keyword in keywords)


def might_mean(row: CohortRow, study: Study) -> bool:
    """Whether an archive that matches substrings in any case may take the study for the row's."""
    return all(_alike(given) in _alike(found) for given, found in _identifiers(row, study))


def passes_filters(row: CohortRow, study: Study) -> bool:
    """Whether the study is within the row's date range, modality and description.

    A study without a readable date is in no range. A study whose modalities the PACS did not
    name may have any. In a description ``*`` stands for any text and ``?`` for one character;
    case is of no account.
    """
    if row.study_date is not None:
        day = study_day(study.study_date)
        if day is None or day not in row.study_date:
            return False
    if row.modality is not None:
        modalities = {_unpadded(name).casefold() for name in study.modalities} - {""}
        if modalities and _unpadded(row.modality).casefold() not in modalities:
            return False
    return row.study_description is None or like(row.study_description, study.study_description)


def assess(row: CohortRow, answers: Iterable[Study]) -> Discovery:
    """Decide what a row found from the answers to its query.

    Parameters
    ----------
    answers : iterable of Study
        As they come; those that are not the row's are dropped at once.

    Returns
    -------
    Discovery
        With reason None and studies, or one of ``no-match``, ``excluded-by-filter``,
        ``several-patients`` and ``unsafe-uid``. The candidates of ``several-patients``, studies
        whose UID cannot be asked for, and answers whose identifiers differ only in case,
        padding or leading zeros are the near misses, in this order.
    """
    identified: dict[tuple[str, str], Study] = {}
    nearly: dict[tuple[str, str], Study] = {}
    for answer in answers:
        key = _identity(answer)
        if identifies(row, answer):
            known = identified.get(key)
            identified[key] = answer if known is None else _merged(known, answer)
        elif len(nearly) < MOST_NEAR_MISSES and _nearly_identifies(row, answer):
            nearly.setdefault(key, answer)

    def discovery(
        reason: str | None, studies: Iterable[Study] = (), aside: Iterable[Study] = ()
    ) -> Discovery:
        return Discovery(
            studies=tuple(studies),
            reason=reason,
            near_misses=(*aside, *nearly.values())[:MOST_NEAR_MISSES],
        )

    if not identified:
        return discovery("no-match")
    remaining = [study for study in identified.values() if passes_filters(row, study)]
    if not remaining:
        return discovery("excluded-by-filter")
    if row.patient_id is None:
        # A request names a study by its UID alone and so brings the objects of all patients
        # it is filed under, also of those the filters have left out.
        uids = {normal_uid(study.study_instance_uid) for study in remaining}
        patients = {patient for uid, patient in identified if uid in uids}
        if len(patients) > 1:
            candidates = [study for (uid, _), study in identified.items() if uid in uids]
            return discovery("several-patients", aside=candidates)
    safe, unsafe = [], []
    for study in remaining:
        uid = normal_uid(study.study_instance_uid)
        if is_safe_key(uid):
            safe.append(replace(study, study_instance_uid=uid))
        else:
            unsafe.append(study)
    return discovery(None if safe else "unsafe-uid", studies=safe, aside=unsafe)


def like(pattern: str, text: str) -> bool:
    """Whether a text is what a pattern with ``*`` and ``?`` says, in whatever case."""
    return _glob(_unpadded(pattern)).fullmatch(_unpadded(text)) is not None


def blurred(identifier: str) -> str:
    """The same text for identifiers that a person might take for each other."""
    return _alike(identifier)


def unpadded(text: str) -> str:
    """The text without what DICOM calls insignificant at its ends, PS3.5 6.2."""
    return _unpadded(text)


def _unpadded(text: str) -> str:
    return text.rstrip(" \0").lstrip(" ")


def _identity(study: Study) -> tuple[str, str]:
    return normal_uid(study.study_instance_uid), _unpadded(study.patient_id)


def _identifiers(row: CohortRow, study: Study) -> list[tuple[str, str]]:
    """The row's identifiers beside the study's, both without padding."""
    pairs = []
    if row.patient_id is not None:
        pairs.append((_unpadded(row.patient_id), _unpadded(study.patient_id)))
    if row.accession_number is not None:
        pairs.append((_unpadded(row.accession_number), _unpadded(study.accession_number)))
    if row.study_instance_uid is not None:
        pairs.append((normal_uid(row.study_instance_uid), normal_uid(study.study_instance_uid)))
    return pairs


def _nearly_identifies(row: CohortRow, study: Study) -> bool:
    pairs = _identifiers(row, study)
    return bool(pairs) and all(_alike(given) == _alike(found) for given, found in pairs)


def _alike(identifier: str) -> str:
    """The same text for identifiers that a person might take for each other."""
    return _LEADING_ZEROS.sub("", _PADDING.sub("", identifier).casefold())


def _merged(first: Study, second: Study) -> Study:
    """One study of two answers for it: some archives answer once for each modality."""
    return replace(
        first,
        accession_number=first.accession_number or second.accession_number,
        study_date=first.study_date or second.study_date,
        modalities=tuple(dict.fromkeys((*first.modalities, *second.modalities))),
        study_description=first.study_description or second.study_description,
        number_of_series=_larger(first.number_of_series, second.number_of_series),
        number_of_instances=_larger(first.number_of_instances, second.number_of_instances),
    )


def _larger(first: int | None, second: int | None) -> int | None:
    return max((count for count in (first, second) if count is not None), default=None)


def study_day(study_date: str) -> date | None:
    """The day of a StudyDate as it was answered, PS3.5 6.2; None where it is not readable."""
    match = _DAY.fullmatch(_unpadded(study_date))
    if match is None:
        return None
    try:
        return date(*(int(part) for part in match.groups() if part is not None))
    except ValueError:
        return None


@lru_cache(maxsize=256)
def _glob(pattern: str) -> re.Pattern[str]:
    """A description pattern as a regular expression that cannot take long.

    Each piece between two stars is found at its first place for good (an atomic group): any
    later place leaves less text for the pieces after it.
    """
    first, *pieces = pattern.split("*")
    text = _literal(first)
    if pieces:
        *middle, last = pieces
        text += "".join(f"(?>.*?{_literal(piece)})" for piece in middle if piece)
        text += f".*{_literal(last)}"
    return re.compile(text, re.IGNORECASE | re.DOTALL)


def _literal(piece: str) -> str:
    return ".".join(re.escape(part) for part in piece.split("?"))
