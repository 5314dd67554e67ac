"""Filter queries: which studies of a row, and which series of a study, a cohort's filters want.

The answer to the row's query is judged first. Only studies that are not excluded by it are queried
for what the filters need besides: at STUDY level by the study's UID, so that no optional key can
spoil the row's query, and at SERIES level.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from prefect_dicom.cohort.filters import (
    SortedSeries,
    judge_series,
    judge_study,
    missing_keywords,
    series_keywords,
    sort_series,
)
from prefect_dicom.cohort.row_matching import MOST_NEAR_MISSES, Discovery, is_date_window
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import CohortFilters, CohortRow, Instance, Study
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.network.find.list_instances import list_study
from prefect_dicom.network.find.query_capabilities import QueryCapabilities
from prefect_dicom.network.find.study_attributes import (
    query_series_attributes,
    query_study_attributes,
)
from prefect_dicom.network.node_client import NodeClient

_COUNT = "NumberOfSeriesRelatedInstances"


def filter_studies(
    requestor: NodeClient,
    row: CohortRow,
    found: Discovery,
    filters: CohortFilters,
    capabilities: QueryCapabilities,
) -> Discovery:
    """Remove the studies that the cohort does not want from what a row found.

    Those of which the peer does not return enough are near misses, with what it returned; where
    there are any the reason is ``filter-undecided``, though others are wanted. A date window of a
    cohort without a list that holds nothing has the reason ``window-empty``.

    Raises
    ------
    PacsError
        See :func:`~prefect_dicom.network.find.query.find`.
    """
    if is_date_window(row) and _found_nothing(found):
        # Its days are all that it filters by.
        return replace(found, reason="window-empty")
    wanted: list[Study] = []
    undecided: list[Study] = []
    for study in found.studies:
        judgement, completed = _judge(requestor, study, filters, capabilities)
        if judgement:
            wanted.append(study)
        elif judgement is None:
            undecided.append(completed)
    reason = found.reason
    if reason is None and undecided:
        reason = "filter-undecided"
    elif reason is None and found.studies and not wanted:
        reason = "excluded-by-filter"
    return replace(
        found,
        studies=tuple(wanted),
        reason=reason,
        near_misses=(*undecided, *found.near_misses)[:MOST_NEAR_MISSES],
    )


def filter_series(
    requestor: NodeClient,
    study: Study,
    filters: CohortFilters,
    capabilities: QueryCapabilities,
    listed: Iterable[Instance],
) -> SortedSeries:
    """Query a study's series and sort them by whether they are to be retrieved.

    Parameters
    ----------
    listed : iterable of Instance
        The peer's own instance list of the study, by which series are counted that the peer does
        not count.

    Raises
    ------
    PacsError
        See :func:`~prefect_dicom.network.find.query.find`.
    """
    answers = query_series_attributes(requestor, study, series_keywords(filters), capabilities)
    return sort_series(filters.series, _counted(answers, listed))


def _found_nothing(found: Discovery) -> bool:
    if found.reason is None:
        return False
    return reason_for(found.reason).row_verdict.is_without_studies


def _judge(
    requestor: NodeClient, study: Study, filters: CohortFilters, capabilities: QueryCapabilities
) -> tuple[bool | None, Study]:
    """Whether a study is wanted (None: undecided), and the study with the attributes queried."""
    judgement = judge_study(filters, study)
    if judgement is None and (keywords := missing_keywords(filters, study)):
        study = query_study_attributes(requestor, study, keywords, capabilities)
        judgement = judge_study(filters, study)
    if judgement and series_keywords(filters):
        try:
            answers = query_series_attributes(
                requestor, study, series_keywords(filters), capabilities
            )
            judgement = judge_series(filters, answers)
            if judgement is None and not all(_COUNT in answer for answer in answers.values()):
                listed = list_study(requestor, study, capabilities).instances
                judgement = judge_series(filters, _counted(answers, listed))
        except PacsError as error:
            if error.code != "request-refused":
                raise
            return None, study
    return judgement, study


def _counted(
    answers: Mapping[str, Mapping[str, str]], listed: Iterable[Instance]
) -> dict[str, Mapping[str, str]]:
    """Add the number of a series' instances from the instance list where the answer lacks it."""
    counts = Counter(instance.key.series_instance_uid for instance in listed)
    return {
        uid: {_COUNT: str(counts[uid]), **answer} if counts[uid] else answer
        for uid, answer in answers.items()
    }
