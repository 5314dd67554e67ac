"""Chunks of studies, and the requests for their instances, PS3.4 C.4.2.1.4; pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from prefect_dicom.core.model import Chunk, InstanceKey, StudyReference
from prefect_dicom.retrieval.study_task import StudyTask

Missing = dict[StudyReference, list[InstanceKey]]
"""Missing instances by study."""


def plan_chunks(
    studies: Iterable[tuple[StudyReference, str, int | None]],
    *,
    chunk_studies: int,
    chunk_instances: int,
) -> Iterator[Chunk]:
    """Cut studies, in the order given, into chunks of one node.

    A chunk ends at ``chunk_studies`` studies, or before the study that would lift its known
    instances over ``chunk_instances``; a study is never cut (its requests are, see
    :func:`plan_requests`).

    Parameters
    ----------
    studies : iterable of (study reference, node, instances or None)
        Unknown counts (None) are taken as 0.
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
    """The most chunks that lie in the spool at a time.

    As many chunks are retrieved as there are associations. A new one begins while fewer than
    that, and :data:`CHUNKS_WAITING_FOR_UPLOAD`, are on their way into the archive.
    """
    return 2 * associations + CHUNKS_WAITING_FOR_UPLOAD - 1


@dataclass(frozen=True, slots=True)
class RetrieveRequest:
    """One retrieve request: a level and the UIDs it names, PS3.4 C.4.2.1.4.1.

    Parameters
    ----------
    level : str
        STUDY, SERIES or IMAGE.
    studies : tuple of study reference
        One study, or several at STUDY level.
    series : tuple of str
        SeriesInstanceUIDs; empty at STUDY level.
    instances : tuple of str
        SOPInstanceUIDs; empty but at IMAGE level.
    expected : int or None
        How many instances the request should bring; None where that is unknown.
    """

    level: str
    studies: tuple[StudyReference, ...]
    series: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()
    expected: int | None = 0


def plan_requests(
    missing: Mapping[StudyReference, Sequence[InstanceKey]],
    listed: Mapping[StudyReference, Sequence[InstanceKey]],
    *,
    request_instances: int,
    uids_per_request: int,
    study_instances: int | None = None,
) -> list[RetrieveRequest]:
    """Plan requests for exactly the missing instances, as few and as coarse as possible.

    Studies of which nothing is here yet go together by UID list, until ``request_instances``;
    a larger one goes by series; of a series that is partly here, or too large for one request,
    the missing instances are named in lists. With ``study_instances``, a study of more goes by
    series too.
    """
    most_of_study = request_instances if study_instances is None else study_instances
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
        if len(keys) == len(listed[study]) and len(keys) <= min(request_instances, most_of_study):
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
            uids = tuple(instances[start : start + step])
            yield RetrieveRequest("IMAGE", (study,), (series,), uids, expected=len(uids))


def plan_whole_requests(missing: Missing, level: str) -> Iterator[RetrieveRequest]:
    """Plan requests for whole series or studies, though some of their instances are here."""
    for study, keys in missing.items():
        if level == "STUDY":
            yield RetrieveRequest("STUDY", (study,), expected=len(keys))
            continue
        for series, count in Counter(key.series_instance_uid for key in keys).items():
            yield RetrieveRequest("SERIES", (study,), (series,), expected=count)


def from_both_ends(keys: Sequence[InstanceKey]) -> list[InstanceKey]:
    """Order instances: the last, the first, the last but one, and so on.

    Archives that stop at the first failure leave out what stands behind it, in whatever order
    they send: what is left to be had is likelier at an end than in the middle.
    """
    middle = len(keys) // 2
    pairs = zip_longest(reversed(keys[middle:]), keys[:middle])
    return [key for pair in pairs for key in pair if key is not None]


def selected_by(request: RetrieveRequest, tasks: Sequence[StudyTask]) -> int:
    """How many instances a request selects at the node, by its list: those here among them."""
    if request.level == "STUDY":
        return sum(len(task.instances.listed) for task in tasks)
    if request.level == "SERIES":
        listed = (key for task in tasks for key in task.instances.listed)
        return sum(key.series_instance_uid in request.series for key in listed)
    return len(request.instances)


def for_studies(request: RetrieveRequest, tasks: Sequence[StudyTask]) -> RetrieveRequest:
    """A request for these of its studies alone."""
    expected = None if request.expected is None else sum(len(t.to_request()) for t in tasks)
    return replace(request, studies=tuple(t.reference for t in tasks), expected=expected)


def targets_of(request: RetrieveRequest, tasks: Sequence[StudyTask]) -> list[set[InstanceKey]]:
    """The missing instances that each UID of a request's list should bring."""
    if request.level == "STUDY":
        return [set(task.to_request()) for task in tasks]
    missing = [key for task in tasks for key in task.to_request()]
    if request.level == "SERIES":
        return [{k for k in missing if k.series_instance_uid == uid} for uid in request.series]
    return [{k for k in missing if k.sop_instance_uid == uid} for uid in request.instances]
