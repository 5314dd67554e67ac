"""The series of a study: C-FIND at SERIES level."""

from __future__ import annotations

from dataclasses import dataclass

from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import Study
from prefect_dicom.core.uids import is_safe_key
from prefect_dicom.network.find.answers import belongs_to, count_of, is_offline, text_of, uid_of
from prefect_dicom.network.find.list_completeness import check_whole
from prefect_dicom.network.find.query_capabilities import (
    QueryCapabilities,
    answers_at_level,
    keys_above,
)
from prefect_dicom.network.node_client import NodeClient

UNIQUE_SERIES_KEYS = ("StudyInstanceUID", "SeriesInstanceUID")
SERIES_KEYS = (
    *UNIQUE_SERIES_KEYS,
    "Modality",
    "NumberOfSeriesRelatedInstances",
    "InstanceAvailability",
)


@dataclass(frozen=True, slots=True)
class Series:
    """One answer of a SERIES level C-FIND, PS3.4 C.6.1.1.4."""

    series_instance_uid: str
    modality: str = ""
    number_of_instances: int | None = None


@dataclass(frozen=True, slots=True)
class ListedSeries:
    """The series that the PACS lists for a study; ``unlistable`` answers have no usable UID.

    ``offline`` is the number of series that the PACS cannot deliver by itself.
    """

    series: tuple[Series, ...]
    unlistable: int = 0
    offline: int = 0


def list_series(
    requestor: NodeClient,
    study_instance_uid: str,
    patient_id: str = "",
    capabilities: QueryCapabilities | None = None,
) -> ListedSeries:
    """The series of a study, with their numbers of instances where the PACS counts them.

    Parameters and errors are those of
    :func:`~prefect_dicom.network.find.list_instances.list_instances`.
    """
    above = keys_above(requestor, study_instance_uid, patient_id)
    series: dict[str, Series] = {}
    unlistable = offline = 0
    forms = (SERIES_KEYS, UNIQUE_SERIES_KEYS)
    for answer in answers_at_level(requestor, above, forms, "SERIES", patient_id, capabilities):
        if not belongs_to(answer, "StudyInstanceUID", study_instance_uid):
            continue
        uid = uid_of(answer, "SeriesInstanceUID")
        if not is_safe_key(uid):
            unlistable += 1
            continue
        one = Series(
            uid,
            text_of(answer, "Modality"),
            count_of(answer, "NumberOfSeriesRelatedInstances"),
        )
        series.setdefault(uid, one)
        offline += is_offline(answer)
    return ListedSeries(tuple(series.values()), unlistable, offline)


def whole_list_of_series(
    requestor: NodeClient, study: Study, capabilities: QueryCapabilities
) -> ListedSeries:
    """The series of a study; ``answers-capped`` where some seem to be left out."""
    if capabilities.answers.get("SERIES") is False:
        raise PacsError("request-refused", "no SERIES level")
    uid = study.study_instance_uid
    listed = list_series(requestor, uid, study.patient_id, capabilities)
    above = keys_above(requestor, uid, study.patient_id, capabilities)
    check_whole(requestor, "SERIES", above, len(listed.series), study.number_of_series)
    return listed
