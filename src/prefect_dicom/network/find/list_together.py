"""The instance lists of several studies by a few queries with lists of UIDs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import InformationModel, Instance, InstanceKey, Study
from prefect_dicom.core.uids import is_safe_key, normal_uid
from prefect_dicom.network.find.answers import belongs_to, count_of, is_offline, uid_of
from prefect_dicom.network.find.list_completeness import is_whole
from prefect_dicom.network.find.list_instances import IMAGE_KEYS, ListedStudy
from prefect_dicom.network.find.list_series import SERIES_KEYS
from prefect_dicom.network.find.query import find
from prefect_dicom.network.find.query_capabilities import QueryCapabilities
from prefect_dicom.network.node_client import NodeClient
from prefect_dicom.network.query_keys import list_identifier

_MOST_TOGETHER = 1000


def list_together(
    requestor: NodeClient, studies: Sequence[Study], capabilities: QueryCapabilities | None = None
) -> dict[str, ListedStudy]:
    """The instance lists of several studies by a few queries with lists of UIDs, PS3.4 C.2.2.2.2.

    Above its own level a query may name one entity only (PS3.4 C.4.1.2.1), yet many PACS
    answer lists there too. Others ignore them, take the first UID, or stop at a number of
    answers. Returned are therefore only studies whose answers show that they are whole: there
    are as many series and instances as the PACS counts, or it counts none and the answers
    are too few to have been cut. All others are to be asked for one by one.

    Parameters
    ----------
    studies : sequence of Study
        As answered to a STUDY level query.
    capabilities : QueryCapabilities, optional
        What is known of the node; updated by its answers.

    Returns
    -------
    dict of str to ListedStudy
        By StudyInstanceUID; what :func:`list_instances` would return. Empty in the Patient
        Root, and for good once the peer has shown that it does not answer lists.

    Raises
    ------
    PacsError
        Where the node failed, not the query.
    """
    wanted = [study for study in studies if is_safe_key(study.study_instance_uid)]
    by_patient = requestor.node.query_model is InformationModel.PATIENT_ROOT
    capabilities = capabilities or QueryCapabilities()
    if by_patient or not wanted or not requestor.answers_lists or capabilities.wants_patient_id:
        return {}
    if False in capabilities.answers.values():
        return {}
    most = requestor.node.limits.uids_per_request
    try:
        series: list[_CountedSeries] = []
        for first in range(0, len(wanted), most):
            series += _list_series_of(requestor, wanted[first : first + most])
        together = _list_instances_of(requestor, series, most)
    except PacsError as error:
        if not error.reason.fails_uid_list:
            raise
        together = {}
    requestor.answers_lists = bool(together)
    if together:
        capabilities.answers.update(SERIES=True, IMAGE=True)
    return {
        study.study_instance_uid: together[uid]
        for study in wanted
        if (uid := normal_uid(study.study_instance_uid)) in together
    }


@dataclass(frozen=True, slots=True)
class _CountedSeries:
    study: str
    series: str
    count: int | None


def _list_series_of(requestor: NodeClient, studies: Sequence[Study]) -> list[_CountedSeries]:
    """The series of those studies that the answer holds whole."""
    found: dict[str, dict[str, _CountedSeries]] = defaultdict(dict)
    uids = [study.study_instance_uid for study in studies]
    answers = 0
    odd: set[str] = set()
    identifier = list_identifier({"StudyInstanceUID": uids}, SERIES_KEYS)
    for answer in find(requestor, identifier, "SERIES"):
        answers += 1
        study_uid, uid = uid_of(answer, "StudyInstanceUID"), uid_of(answer, "SeriesInstanceUID")
        if not study_uid and len(uids) == 1:
            study_uid = normal_uid(uids[0])
        if not is_safe_key(uid) or is_offline(answer):
            odd.add(study_uid)
            continue
        count = count_of(answer, "NumberOfSeriesRelatedInstances")
        found[study_uid].setdefault(uid, _CountedSeries(study_uid, uid, count))
    whole: list[_CountedSeries] = []
    for study in studies:
        uid = normal_uid(study.study_instance_uid)
        series = found.get(uid, {})
        count = study.number_of_series
        if uid not in odd and is_whole(len(series), count, answers):
            whole += series.values()
    return whole


def _list_instances_of(
    requestor: NodeClient, series: Sequence[_CountedSeries], most: int
) -> dict[str, ListedStudy]:
    """The instances of those studies of which all series were answered whole."""
    found: dict[str, dict[InstanceKey, Instance]] = defaultdict(dict)
    odd: set[str] = set()
    for some in _portions(series, most):
        failpoint("list-half-read")
        asked = {one.series: one for one in some}
        keys = {
            "StudyInstanceUID": list(dict.fromkeys(one.study for one in some)),
            "SeriesInstanceUID": list(asked),
        }
        answers = 0
        for answer in find(requestor, list_identifier(keys, IMAGE_KEYS), "IMAGE"):
            answers += 1
            one = asked.get(uid_of(answer, "SeriesInstanceUID"))
            if one is None or not belongs_to(answer, "StudyInstanceUID", one.study):
                continue
            uid = uid_of(answer, "SOPInstanceUID")
            if not is_safe_key(uid):
                odd.add(one.study)
                continue
            key = InstanceKey(one.series, uid)
            found[one.study].setdefault(key, Instance(key, uid_of(answer, "SOPClassUID")))
        listed = Counter(
            (study, key.series_instance_uid)
            for study in dict.fromkeys(one.study for one in some)
            for key in found[study]
        )
        for one in some:
            if not is_whole(listed[one.study, one.series], one.count, answers):
                odd.add(one.study)
    return {
        study: ListedStudy(tuple(instances.values()))
        for study, instances in found.items()
        if study not in odd
    }


def _portions(series: Sequence[_CountedSeries], most: int) -> Iterator[list[_CountedSeries]]:
    """As many series as go into one query, of some thousand instances at most."""
    some: list[_CountedSeries] = []
    weight = 0
    for one in series:
        heavier = one.count or 1
        if some and (len(some) >= most or weight + heavier > _MOST_TOGETHER):
            yield some
            some, weight = [], 0
        some.append(one)
        weight += heavier
    if some:
        yield some
