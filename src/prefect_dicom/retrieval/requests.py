"""Chunks of studies and the requests for their instances, PS3.4 C.4.2.1.4. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prefect_dicom.core.model import (
    Chunk,
    InstanceKey,
    StudyReference,
)


def plan_chunks(
    studies: Iterable[tuple[StudyReference, str, int | None]],
    *,
    chunk_studies: int,
    chunk_instances: int,
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
    number = 1
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


CHUNKS_WAITING_FOR_UPLOAD = 2


def most_chunks_under_way(associations: int) -> int:
    """How many chunks lie in the spool at a time, at most.

    As many are retrieved as there are associations. A new one begins while fewer than that, and
    :data:`CHUNKS_WAITING_FOR_UPLOAD`, are on their way into the archive.
    """
    return 2 * associations + CHUNKS_WAITING_FOR_UPLOAD - 1


@dataclass(frozen=True, slots=True)
class RetrieveRequest:
    """One C-MOVE or C-GET to send: a level and the UIDs it names, PS3.4 C.4.2.1.4.1.

    ``studies`` names one study, or several at STUDY level; ``series`` is empty at STUDY level,
    ``instances`` everywhere but at IMAGE level. ``expected`` is what it should bring; None where
    nobody knows, and it has brought what the peer says it has sent.
    """

    level: str
    studies: tuple[StudyReference, ...]
    series: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()
    expected: int | None = 0


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
