"""The instances of a study, or the best evidence there is instead: C-FIND at IMAGE level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import Evidence, Instance, InstanceKey, Study
from prefect_dicom.core.uids import is_safe_key
from prefect_dicom.network.find.answers import belongs_to, uid_of
from prefect_dicom.network.find.list_completeness import check_whole, may_be_short
from prefect_dicom.network.find.list_series import ListedSeries, whole_list_of_series
from prefect_dicom.network.find.list_studies import find_studies
from prefect_dicom.network.find.query_capabilities import (
    QueryCapabilities,
    answers_at_level,
    keys_above,
)
from prefect_dicom.network.node_client import NodeClient

IMAGE_KEYS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")


@dataclass(frozen=True, slots=True)
class ListedStudy:
    """A study's content as the PACS lists it: what its retrieval is verified against.

    At best that is the list of its ``instances``, the expected set. Where the peer does not list
    these, ``evidence`` says what there is in their place: ``series`` with their counts, by UID,
    or (None: not even series are listed) ``number_of_instances`` of the study, if it is counted.

    ``unlistable`` counts answers that name nothing that could be asked for: series or
    instances without a UID, or with one that is a wildcard. They are in no retrieve by list.
    ``offline`` is the number of series that the PACS cannot deliver by itself. ``bare_series`` are
    the UIDs of those that are listed without instances, and not counted as empty.
    """

    instances: tuple[Instance, ...] = ()
    unlistable: int = 0
    offline: int = 0
    evidence: Evidence = Evidence.INSTANCE_LIST
    series: Mapping[str, int | None] | None = None
    number_of_instances: int | None = None
    bare_series: tuple[str, ...] = ()


def list_study(requestor: NodeClient, study: Study, capabilities: QueryCapabilities) -> ListedStudy:
    """List a study's instances, or the best evidence that the PACS gives instead.

    Parameters
    ----------
    study : Study
        As answered to a STUDY level query.
    capabilities : QueryCapabilities
        What is known of the node; updated by its answers.

    Raises
    ------
    PacsError
        As :func:`list_instances`, but that refusals at IMAGE level are no errors, nor at SERIES
        level of a peer that has never answered there.
    """
    uid, patient_id = study.study_instance_uid, study.patient_id
    try:
        listed = whole_list_of_series(requestor, study, capabilities)
    except PacsError as error:
        if error.code != "request-refused" or capabilities.answers.get("SERIES"):
            raise
        capabilities.refused("SERIES")
        return _study_without_series(requestor, study, capabilities, refused=True)
    if not (listed.series or listed.unlistable or capabilities.answers.get("SERIES")):
        return _study_without_series(requestor, study, capabilities, refused=False)
    if not listed.series:
        return ListedStudy(unlistable=listed.unlistable, offline=listed.offline)
    if capabilities.answers.get("IMAGE") is False:
        return _by_counts(listed)
    failpoint("list-half-read")
    try:
        # One that answers for others may only have failed to: it is asked twice.
        for last in (not capabilities.answers.get("IMAGE"), True):
            try:
                found = _instances_of(requestor, listed, uid, patient_id, capabilities)
                break
            except PacsError as error:
                if error.code != "request-refused" or last:
                    raise
    except PacsError as error:
        if error.code != "request-refused":
            raise
        capabilities.refused("IMAGE")
        return _by_counts(listed)
    nothing = not (found.instances or found.unlistable or capabilities.answers.get("IMAGE"))
    return _by_counts(listed) if nothing else found


def _by_counts(listed: ListedSeries) -> ListedStudy:
    """The series in place of their instances, with counts where the PACS counts all of them.

    A series that is listed has instances: a count of zero counts nothing.
    """
    series = {one.series_instance_uid: one.number_of_instances or None for one in listed.series}
    counted = None not in series.values()
    evidence = Evidence.SERIES_COUNTS if counted else Evidence.SUBOPERATION_COUNTS
    return ListedStudy((), listed.unlistable, listed.offline, evidence, series)


def _study_without_series(
    requestor: NodeClient, study: Study, capabilities: QueryCapabilities, *, refused: bool
) -> ListedStudy:
    """A study whose series the peer does not list: all there is to ask is whether it is there."""
    uid = study.study_instance_uid
    keys = keys_above(requestor, uid, study.patient_id, capabilities)
    there = [one for one in find_studies(requestor, keys) if one.study_instance_uid == uid]
    counts = [one.number_of_instances for one in there]
    if not there or (0 in counts and not refused):
        return ListedStudy()
    return ListedStudy(
        evidence=Evidence.SUBOPERATION_COUNTS,
        number_of_instances=max((count for count in counts if count), default=None),
    )


def list_instances(
    requestor: NodeClient,
    study_instance_uid: str,
    patient_id: str = "",
    number_of_series: int | None = None,
) -> ListedStudy:
    """The peer's own list of a study: one query for its series, one for the images of each.

    Every answer is compared with what was asked for; those of other studies or series are
    dropped, and one that repeats series and instance UID counts once. Where the peer counts more
    than it lists, or the list is as long as a limit might be, it is asked for numbers that are
    not on the list: counts are wrong at times, but what such a query finds is there.

    Parameters
    ----------
    study_instance_uid : str
        The study.
    patient_id : str
        Its PatientID as the PACS answers it, a unique key in the Patient Root; in the Study Root
        sent to a peer that does not answer without.
    number_of_series : int, optional
        How many series the peer counts.

    Raises
    ------
    ValueError
        Where the study UID is empty or holds a wildcard.
    PacsError
        See :func:`~prefect_dicom.network.find.query.find`. ``request-refused`` (A900, Cxxx) after
        answers at SERIES level means that the peer has no IMAGE level; ``unsafe-patient-id`` that
        the Patient Root cannot name this study; ``answers-capped`` that a list is not whole,
        whether the peer reports it or not.
    """
    study = Study(study_instance_uid, patient_id, number_of_series=number_of_series)
    capabilities = QueryCapabilities()
    listed = whole_list_of_series(requestor, study, capabilities)
    failpoint("list-half-read")
    found = _instances_of(requestor, listed, study_instance_uid, patient_id, capabilities)
    if not (found.instances or found.unlistable) and any(
        series.number_of_instances != 0 for series in listed.series
    ):
        raise PacsError("answers-capped", "series are listed, and none of their instances")
    return found


def _instances_of(
    requestor: NodeClient,
    listed: ListedSeries,
    study_instance_uid: str,
    patient_id: str,
    capabilities: QueryCapabilities,
) -> ListedStudy:
    """The instances of the listed series; of all, or of none."""
    instances: dict[InstanceKey, Instance] = {}
    unlistable = 0
    lengths: list[tuple[int, str, int | None]] = []
    bare: list[str] = []
    for series in listed.series:
        series_uid = series.series_instance_uid
        above = keys_above(requestor, study_instance_uid, patient_id, capabilities)
        above["SeriesInstanceUID"] = series_uid
        length = 0
        for answer in answers_at_level(
            requestor, above, [IMAGE_KEYS], "IMAGE", patient_id, capabilities
        ):
            if not belongs_to(answer, "StudyInstanceUID", study_instance_uid):
                continue
            if not belongs_to(answer, "SeriesInstanceUID", series_uid):
                continue
            length += 1
            sop_uid = uid_of(answer, "SOPInstanceUID")
            if not is_safe_key(sop_uid):
                unlistable += 1
                continue
            key = InstanceKey(series_uid, sop_uid)
            instances.setdefault(key, Instance(key, uid_of(answer, "SOPClassUID")))
        if not length and series.number_of_instances != 0:
            bare.append(series_uid)
        if may_be_short(length, series.number_of_instances):
            lengths.append((length, series_uid, series.number_of_instances))
    if lengths:
        # A limit meets the longest list first.
        length, series_uid, counted = max(lengths, key=lambda one: one[0])
        above = keys_above(requestor, study_instance_uid, patient_id, capabilities)
        above["SeriesInstanceUID"] = series_uid
        check_whole(requestor, "IMAGE", above, length, counted)
    return ListedStudy(
        tuple(instances.values()),
        listed.unlistable + unlistable,
        listed.offline,
        bare_series=tuple(bare),
    )
