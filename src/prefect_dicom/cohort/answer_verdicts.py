"""Why an answer of a PACS is a row's study or not, in words for people at the site."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from prefect_dicom.cohort.filters import explain_undecided, judge_study
from prefect_dicom.cohort.row_matching import explain_near_miss, identifies, unmet_filters
from prefect_dicom.core.model import CohortFilters, CohortRow, Study
from prefect_dicom.core.uids import normal_uid

TAKEN, DROPPED = "taken", "dropped"

_ROW_FILTERS = {
    "study_date": "StudyDate is not in the row's range",
    "modality": "Modality is another",
    "study_description": "StudyDescription does not match",
}


class AnswerVerdict(NamedTuple):
    """What became of one answer, and why it was dropped."""

    verdict: str
    why: tuple[str, ...] = ()


def judge_answer(
    row: CohortRow,
    study: Study,
    filters: CohortFilters,
    taken: Collection[str],
    reason: str | None = None,
) -> AnswerVerdict:
    """Explain what became of an answer to a query of a row.

    Parameters
    ----------
    taken : collection of str
        The StudyInstanceUIDs of the studies that the row has.
    reason : str, optional
        The row's reason, for answers with nothing against them but the others.

    Returns
    -------
    AnswerVerdict
        Its words hold no patient data.
    """
    if normal_uid(study.study_instance_uid) in taken:
        return AnswerVerdict(TAKEN)
    why = list(explain_near_miss(row, study))
    if identifies(row, study):
        why += [_ROW_FILTERS[name] for name in unmet_filters(row, study)]
        judgement = judge_study(filters, study)
        if judgement is False:
            why.append("the cohort's filters leave it out")
        elif judgement is None and reason == "filter-undecided":
            why += explain_undecided(filters, study)
    if not why:
        why.append(f"it matches by itself; the row ended as {reason or 'pending'}")
    return AnswerVerdict(DROPPED, tuple(why))
