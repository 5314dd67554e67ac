"""Which of a row's studies, and which of a study's series, a cohort's definition wants.

What the answer to the row's query tells is judged first; only then, and only of studies that are
not out already, is asked for what the filters need besides: at STUDY level by the study's UID,
so that no optional key can spoil the row's query, and at SERIES level.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from prefect_dicom.cohort.filters import (
    ChosenSeries,
    choose_series,
    judge_series,
    judge_study,
    not_told,
    series_keywords,
)
from prefect_dicom.cohort.row_matching import MOST_NEAR_MISSES, Discovery, is_window
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import CohortRow, Instance, Selection, Study, Verdict
from prefect_dicom.core.reasons import FILTER_UNDECIDED, reason_for
from prefect_dicom.network.find.list_instances import list_study
from prefect_dicom.network.find.query_capabilities import QueryCapabilities
from prefect_dicom.network.find.study_attributes import (
    query_series_attributes,
    query_study_attributes,
)
from prefect_dicom.network.requestor import Requestor

_COUNT = "NumberOfSeriesRelatedInstances"


def filter_studies(
    requestor: Requestor,
    row: CohortRow,
    found: Discovery,
    selection: Selection,
    capabilities: QueryCapabilities,
) -> Discovery:
    """What a row found, without the studies that its cohort does not want.

    Those of which the peer does not tell enough are near misses, with what it told; where there
    are any the reason is ``filter-undecided``, though others are wanted. A window of a cohort
    without a list that holds nothing has the reason ``window-empty``.

    Raises
    ------
    PacsError
        See :func:`~prefect_dicom.network.find.query.find`.
    """
    if is_window(row) and _found_nothing(found):
        # Its days are all that it filters by.
        return replace(found, reason="window-empty")
    wanted, undecided = [], []
    for study in found.studies:
        judgement, told = _judge(requestor, study, selection, capabilities)
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


def filter_series(
    requestor: Requestor,
    study: Study,
    selection: Selection,
    capabilities: QueryCapabilities,
    listed: Iterable[Instance],
) -> ChosenSeries:
    """A study's series, sorted by whether they are to be retrieved.

    Parameters
    ----------
    listed : iterable of Instance
        The peer's own list of the study, from which series are counted that it does not count.

    Raises
    ------
    PacsError
        See :func:`~prefect_dicom.network.find.query.find`.
    """
    answers = query_series_attributes(requestor, study, series_keywords(selection), capabilities)
    return choose_series(selection.series, _counted(answers, listed))


def _found_nothing(found: Discovery) -> bool:
    if found.reason is None:
        return False
    return reason_for(found.reason).row_verdict in (Verdict.NOT_FOUND, Verdict.EXCLUDED)


def _judge(
    requestor: Requestor, study: Study, selection: Selection, capabilities: QueryCapabilities
) -> tuple[bool | None, Study]:
    """Whether a study is wanted, and the study with what was told to find that out."""
    judgement = judge_study(selection, study)
    if judgement is None and (keywords := not_told(selection, study)):
        study = query_study_attributes(requestor, study, keywords, capabilities)
        judgement = judge_study(selection, study)
    if judgement and series_keywords(selection):
        try:
            answers = query_series_attributes(
                requestor, study, series_keywords(selection), capabilities
            )
            judgement = judge_series(selection, answers)
            if judgement is None and not all(_COUNT in told for told in answers.values()):
                listed = list_study(requestor, study, capabilities).instances
                judgement = judge_series(selection, _counted(answers, listed))
        except PacsError as error:
            if error.code != "request-refused":
                raise
            return None, study
    return judgement, study


def _counted(
    answers: Mapping[str, Mapping[str, str]], listed: Iterable[Instance]
) -> dict[str, Mapping[str, str]]:
    """The answers, with the number of a series' instances where only their list tells it."""
    counts = Counter(instance.key.series_instance_uid for instance in listed)
    return {
        uid: {_COUNT: str(counts[uid]), **told} if counts[uid] else told
        for uid, told in answers.items()
    }
