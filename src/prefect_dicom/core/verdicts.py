"""Verdicts of cohort rows, from the states of their studies. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prefect_dicom.core.model import (
    Evidence,
    StudyReference,
    StudyState,
    Verdict,
)
from prefect_dicom.core.reasons import reason_for


@dataclass(frozen=True, slots=True)
class StudyOutcome:
    """A study of a row, as far as the verdict depends on it."""

    reference: StudyReference
    state: StudyState
    reason: str | None = None
    expected_instances: int = 0
    stored_instances: int = 0
    withheld_instances: int = 0
    size_bytes: int = 0
    evidence: Evidence | None = None
    missing_instances: int = 0
    """Those of an archived study that a person has accepted to be missing."""


def row_verdict(
    reason: str | None,
    studies: Sequence[StudyOutcome],
    *,
    unproved: bool = False,
    not_taken: str | None = None,
) -> tuple[Verdict, str]:
    """The verdict of a cohort row and its reason code.

    Parameters
    ----------
    reason : str or None
        Reason that discovery recorded for the row; None where it found studies or has not
        run yet.
    studies : sequence of StudyOutcome
        The studies the row found.
    unproved : bool
        The list of studies has gaps.
    not_taken : str or None
        Why the cohort does not take all studies of the row; ``studies`` are those that it takes.

    Returns
    -------
    tuple of Verdict and str
        ``(Verdict.PENDING, "interrupted")`` while any of it is unfinished.
    """
    if reason is not None and not (studies and reason_for(reason).beside_studies):
        return reason_for(reason).row_verdict, reason
    if not_taken is not None and not studies and not unproved:
        return reason_for(not_taken).row_verdict, not_taken
    if not studies or any(s.state in (StudyState.PENDING, StudyState.LISTED) for s in studies):
        return Verdict.PENDING, "interrupted"
    if unproved or reason is not None:
        some = any(s.state is StudyState.ARCHIVED or s.stored_instances for s in studies)
        code = "list-unproved" if unproved or reason is None else reason
        return Verdict.PARTIAL if some else reason_for(code).row_verdict, code
    failed = [s for s in studies if s.state is StudyState.FAILED]
    withheld = any(s.withheld_instances for s in studies)
    if not failed and not withheld:
        if any(s.missing_instances for s in studies):
            return Verdict.INCOMPLETE, "missing-accepted"
        return Verdict.ARCHIVED, "all-archived"
    if not failed:
        return Verdict.PARTIAL, "instances-rejected"
    code = failed[0].reason or "unexpected"
    if len(failed) < len(studies) or any(s.stored_instances for s in failed):
        return Verdict.PARTIAL, code if len(studies) == 1 else "some-archived"
    return Verdict.FAILED, code


def weakest_evidence(studies: Iterable[StudyOutcome]) -> Evidence | None:
    """The weakest evidence of the archived studies; None if there are none."""
    proofs = {s.evidence for s in studies if s.state is StudyState.ARCHIVED}
    return next((proof for proof in reversed(Evidence) if proof in proofs), None)
