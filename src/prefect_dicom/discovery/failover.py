"""Failover of a row to the next node: when it is queried, and what all answers together mean.

Pure, as :mod:`prefect_dicom.cohort.row_matching` is for one node's answers. A node that gave no
answer has neither found the row nor shown that there is nothing: what it may have is recorded as a
gap, or the row stays open.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from prefect_dicom.cohort.persons import several_patients
from prefect_dicom.cohort.row_matching import (
    MOST_NEAR_MISSES,
    Discovery,
    is_date_window,
    numbers_of,
)
from prefect_dicom.core.model import CohortRow, Study
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.discovery.row_query import WITHOUT_OWN_UID
from prefect_dicom.ledger.records import RowFindings

Answer = Discovery | str | None
"""What a node found for a row, or the reason code of a failed query; None where it was not
queried, because it is disabled."""


def settles(row: CohortRow, answer: Answer, *, every: bool = False) -> bool:
    """Whether the next node need not be queried for the row.

    A date window stands for all studies of its days, so that each node is queried for it.
    """
    if not isinstance(answer, Discovery):
        return False
    if answer.reason is not None:
        return reason_for(answer.reason).settles_row
    return not every and not is_date_window(row)


def combine_answers(
    row: CohortRow, answers: Sequence[tuple[str, Answer]], *, every: bool = False
) -> RowFindings | None:
    """Combine the answers of a cohort's nodes to one row.

    Parameters
    ----------
    answers : sequence of (node, answer)
        In the cohort's order, as far as nodes were queried.
    every : bool
        Whether the row is meant to have what any of the nodes has.

    Returns
    -------
    RowFindings or None
        None where the row stays as it is: a disabled node may have it.
    """
    answered = [(node, each) for node, each in answers if isinstance(each, Discovery)]
    silent = [
        node
        for node, each in answers
        if not isinstance(each, Discovery)
        or (each.reason is not None and reason_for(each.reason).inconclusive)
    ]
    near = [study for _, each in answered for study in each.near_misses]
    codes = [each.reason for _, each in answered if each.reason is not None]
    if settling := [code for code in codes if reason_for(code).settles_row]:
        return _findings(row, _most_specific(settling), near)
    found = [(node, study) for node, each in answered for study in each.studies]
    gaps = list(dict.fromkeys(gap for _, each in answered for gap in each.gaps))
    shared = _of_several_patients(row, found)
    if shared:
        near = [*(study for _, study in found if study.study_instance_uid in shared), *near]
        found = [(n, study) for n, study in found if study.study_instance_uid not in shared]
        if not is_date_window(row) or not found:
            return _findings(row, "several-patients", near)
        gaps.append(WITHOUT_OWN_UID)
    if not found:
        return _nothing(row, [each for _, each in answers], near, gaps)
    if silent and _may_have_more(row, every):
        gaps += [f"node {node}" for node in silent]
    beside = [code for code in codes if reason_for(code).beside_studies]
    reason = "list-unproved" if gaps else _most_specific(beside) if beside else None
    return _findings(row, reason, near, gaps, found)


def _findings(
    row: CohortRow,
    reason: str | None,
    near: Sequence[Study],
    gaps: Sequence[str] = (),
    found: Sequence[tuple[str, Study]] = (),
) -> RowFindings:
    return RowFindings(
        line=row.line,
        studies=[study for _, study in found],
        reason=reason,
        near_misses=near[:MOST_NEAR_MISSES],
        gaps=gaps,
        nodes=[node for node, _ in found],
    )


def _may_have_more(row: CohortRow, every: bool) -> bool:
    """Whether a node without an answer may have studies of the row besides those found.

    A StudyInstanceUID names one study, wherever it is found; an accession number is taken for as
    much where the row is not meant to have what any node has.
    """
    if row.study_instance_uid is not None:
        return False
    return every or is_date_window(row) or row.accession_number is None


def _nothing(
    row: CohortRow, answers: Sequence[Answer], near: Sequence[Study], gaps: Sequence[str]
) -> RowFindings | None:
    if None in answers:
        return None
    codes = [answer for answer in answers if isinstance(answer, str)]
    if codes:
        return _findings(row, codes[0], near)
    reasons = [each.reason for each in answers if isinstance(each, Discovery) and each.reason]
    return _findings(row, "list-unproved" if gaps else _most_specific(reasons), near, gaps)


def _most_specific(codes: Iterable[str]) -> str:
    """The reason that says most about a row without studies."""
    compared = [code for code in codes if reason_for(code).specificity]
    return max(compared, key=lambda code: reason_for(code).specificity, default="no-match")


def _of_several_patients(row: CohortRow, found: Sequence[tuple[str, Study]]) -> set[str]:
    """The UIDs of studies that the nodes file under more than one patient.

    Of a row with identifiers all its studies are one patient's, or none of them is taken.
    """
    groups: dict[str, list[Study]] = defaultdict(list)
    for _, study in found:
        groups[study.study_instance_uid if is_date_window(row) else ""].append(study)
    shared = {uid for uid, its in groups.items() if several_patients(its, numbers_of(row))}
    return {study.study_instance_uid for _, study in found} if "" in shared else shared
