"""Which of a row's studies, and which of a study's series, a cohort's definition wants.

What the answer to the row's query tells is judged first; only then, and only of studies that are
not out already, is asked for what the filters need besides: at STUDY level by the study's UID,
so that no optional key can spoil the row's query, and at SERIES level.
"""

from __future__ import annotations

from dataclasses import replace

from prefect_dicom.dimse.association import Requestor
from prefect_dicom.dimse.find import QueryHabits, tell_series, tell_study
from prefect_dicom.errors import PacsError
from prefect_dicom.matching import MOST_NEAR_MISSES, Discovery
from prefect_dicom.model import CohortRow, Selection, Study
from prefect_dicom.policy import FILTER_UNDECIDED
from prefect_dicom.selection import (
    ChosenSeries,
    choose_series,
    judge_series,
    judge_study,
    not_told,
    series_keywords,
)


def choose_studies(
    requestor: Requestor,
    row: CohortRow,
    found: Discovery,
    selection: Selection,
    habits: QueryHabits,
) -> Discovery:
    """What a row found, without the studies that its cohort does not want.

    Those of which the peer does not tell enough are near misses, with what it told; where there
    are any the reason is ``filter-undecided``, though others are wanted. A window of a cohort
    without a list that holds nothing has the reason ``window-empty``.

    Raises
    ------
    PacsError
        See :func:`~prefect_dicom.dimse.find.find`.
    """
    if found.reason == "no-match" and _is_window(row):
        return replace(found, reason="window-empty")
    wanted, undecided = [], []
    for study in found.studies:
        judgement, told = _judge(requestor, study, selection, habits)
        if judgement:
            wanted.append(study)
        elif judgement is None:
            undecided.append(told)
    reason = found.reason
    if reason is None and undecided:
        reason = FILTER_UNDECIDED
    elif reason is None and found.studies and not wanted:
        reason = "excluded-by-filter"
    return replace(
        found,
        studies=tuple(wanted),
        reason=reason,
        near_misses=(*undecided, *found.near_misses)[:MOST_NEAR_MISSES],
    )


def choose_series_of(
    requestor: Requestor, study: Study, selection: Selection, habits: QueryHabits
) -> ChosenSeries:
    """A study's series, sorted by whether they are to be retrieved.

    Raises
    ------
    PacsError
        See :func:`~prefect_dicom.dimse.find.find`.
    """
    keywords = series_keywords(selection)
    return choose_series(selection.series, tell_series(requestor, study, keywords, habits))


def _is_window(row: CohortRow) -> bool:
    return row.patient_id is row.accession_number is row.study_instance_uid is None


def _judge(
    requestor: Requestor, study: Study, selection: Selection, habits: QueryHabits
) -> tuple[bool | None, Study]:
    """Whether a study is wanted, and the study with what was told to find that out."""
    judgement = judge_study(selection, study)
    if judgement is None and (keywords := not_told(selection, study)):
        study = tell_study(requestor, study, keywords, habits)
        judgement = judge_study(selection, study)
    if judgement and series_keywords(selection):
        try:
            answers = tell_series(requestor, study, series_keywords(selection), habits)
        except PacsError as error:
            if error.code != "request-refused":
                raise
            return None, study
        judgement = judge_series(selection, answers)
    return judgement, study
