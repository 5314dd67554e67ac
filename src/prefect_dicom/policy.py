"""Pure decisions: state transitions, verdicts, chunking, completeness. No I/O, no clocks.

Sources: ``docs/promise.md`` for the states, PS3.4 C.4.2.1.4 for what a request may name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prefect_dicom.model import (
    Chunk,
    InstanceKey,
    InstanceState,
    StudyReference,
    StudyState,
    Verdict,
)

STUDY_TRANSITIONS: dict[StudyState, frozenset[StudyState]] = {
    StudyState.PENDING: frozenset({StudyState.LISTED, StudyState.FAILED}),
    # A changed list is listed again.
    StudyState.LISTED: frozenset({StudyState.LISTED, StudyState.ARCHIVED, StudyState.FAILED}),
    StudyState.ARCHIVED: frozenset(),
    # A rerun begins with a new list; what was stored stays stored.
    StudyState.FAILED: frozenset({StudyState.PENDING}),
}

INSTANCE_TRANSITIONS: dict[InstanceState, frozenset[InstanceState]] = {
    InstanceState.EXPECTED: frozenset({InstanceState.RECEIVED, InstanceState.REJECTED}),
    # Back to expected: the spool file was damaged, or an object did not pass validation once.
    InstanceState.RECEIVED: frozenset(
        {InstanceState.STORED, InstanceState.REJECTED, InstanceState.EXPECTED}
    ),
    # Taken off the PACS's list after it was stored; its object stays.
    InstanceState.STORED: frozenset({InstanceState.REJECTED}),
    # A rerun asks again for what was left out.
    InstanceState.REJECTED: frozenset({InstanceState.EXPECTED}),
}


@dataclass(frozen=True, slots=True)
class StudyOutcome:
    """What a verdict needs to know of one study of a row."""

    reference: StudyReference
    state: StudyState
    reason: str | None = None
    expected_instances: int = 0
    stored_instances: int = 0
    withheld_instances: int = 0
    size_bytes: int = 0


_ROW_VERDICTS = {
    "no-match": Verdict.NOT_FOUND,
    "several-patients": Verdict.AMBIGUOUS,
    "excluded-by-filter": Verdict.EXCLUDED,
}


def row_verdict(reason: str | None, studies: Sequence[StudyOutcome]) -> tuple[Verdict, str]:
    """The verdict of a cohort row and its reason code.

    Parameters
    ----------
    reason : str or None
        What discovery recorded about the row itself; None where it found studies or has not
        been made yet.
    studies : sequence of StudyOutcome
        The studies the row found.

    Returns
    -------
    tuple of Verdict and str
        ``(Verdict.PENDING, "interrupted")`` while any of it is unfinished.
    """
    if reason is not None:
        return _ROW_VERDICTS.get(reason, Verdict.FAILED), reason
    if not studies or any(s.state in (StudyState.PENDING, StudyState.LISTED) for s in studies):
        return Verdict.PENDING, "interrupted"
    failed = [s for s in studies if s.state is StudyState.FAILED]
    withheld = any(s.withheld_instances for s in studies)
    if not failed and not withheld:
        return Verdict.ARCHIVED, "all-archived"
    if not failed:
        return Verdict.PARTIAL, "instances-rejected"
    code = failed[0].reason or "unexpected"
    if len(failed) < len(studies) or any(s.stored_instances for s in failed):
        return Verdict.PARTIAL, code if len(studies) == 1 else "some-archived"
    return Verdict.FAILED, code


def plan_chunks(
    studies: Iterable[tuple[StudyReference, str, int | None]],
    *,
    chunk_studies: int,
    chunk_instances: int,
    first_number: int = 1,
) -> Iterator[Chunk]:
    """Studies in the order given, cut into chunks of one node.

    A chunk ends at ``chunk_studies`` studies, or before the study that would lift its known
    instances over ``chunk_instances``; a study is never cut (its requests are, see
    :func:`plan_requests`).

    Parameters
    ----------
    studies : iterable of (study reference, node, instances or None)
        Unknown counts weigh nothing.
    """
    number = first_number
    members: list[StudyReference] = []
    node, weight = "", 0
    for reference, its_node, instances in studies:
        load = instances or 0
        if members and (
            its_node != node or len(members) >= chunk_studies or weight + load > chunk_instances
        ):
            yield Chunk(number, node, tuple(members))
            number, members, weight = number + 1, [], 0
        node = its_node
        members.append(reference)
        weight += load
    if members:
        yield Chunk(number, node, tuple(members))


@dataclass(frozen=True, slots=True)
class RetrieveRequest:
    """One C-MOVE or C-GET to send: a level and the UIDs it names, PS3.4 C.4.2.1.4.1.

    ``studies`` names one study, or several at STUDY level; ``series`` is empty at STUDY level,
    ``instances`` everywhere but at IMAGE level. ``expected`` is what it should bring.
    """

    level: str
    studies: tuple[StudyReference, ...]
    series: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()
    expected: int = 0


def plan_requests(
    missing: dict[StudyReference, Sequence[InstanceKey]],
    listed: dict[StudyReference, Sequence[InstanceKey]],
    *,
    request_instances: int,
    uids_per_request: int,
) -> list[RetrieveRequest]:
    """The requests that ask for exactly what is missing, as few and as coarse as possible.

    Studies of which nothing is here yet go together by UID list, until ``request_instances``;
    a larger one goes by series; of a series that is partly here, or too large for one request,
    the missing instances are named in lists.
    """
    whole: list[StudyReference] = []
    requests: list[RetrieveRequest] = []
    weight = 0

    def flush() -> None:
        nonlocal weight
        if whole:
            requests.append(RetrieveRequest("STUDY", tuple(whole), expected=weight))
            whole.clear()
            weight = 0

    for study, keys in missing.items():
        if not keys:
            continue
        if len(keys) == len(listed[study]) and len(keys) <= request_instances:
            if weight + len(keys) > request_instances or len(whole) >= uids_per_request:
                flush()
            whole.append(study)
            weight += len(keys)
            continue
        requests.extend(
            _requests_of_one_study(study, keys, listed[study], request_instances, uids_per_request)
        )
    flush()
    return requests


def _requests_of_one_study(
    study: StudyReference,
    missing: Sequence[InstanceKey],
    listed: Sequence[InstanceKey],
    request_instances: int,
    uids_per_request: int,
) -> Iterator[RetrieveRequest]:
    sizes: dict[str, int] = {}
    for key in listed:
        sizes[key.series_instance_uid] = sizes.get(key.series_instance_uid, 0) + 1
    by_series: dict[str, list[str]] = {}
    for key in missing:
        by_series.setdefault(key.series_instance_uid, []).append(key.sop_instance_uid)
    for series, instances in by_series.items():
        count = len(instances)
        if count == sizes[series] and count <= request_instances:
            yield RetrieveRequest("SERIES", (study,), (series,), expected=count)
            continue
        step = min(uids_per_request, request_instances)
        for start in range(0, count, step):
            part = tuple(instances[start : start + step])
            yield RetrieveRequest("IMAGE", (study,), (series,), part, expected=len(part))
