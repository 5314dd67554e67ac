"""Further attributes of a study and of its series, for filters: C-FIND at both levels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset

from prefect_dicom.core.model import Study
from prefect_dicom.core.uids import normal_uid
from prefect_dicom.network.find.answers import belongs_to, text_of, uid_of
from prefect_dicom.network.find.list_series import UNIQUE_SERIES_KEYS
from prefect_dicom.network.find.query_capabilities import (
    QueryCapabilities,
    answers_at_level,
    answers_if_any,
    keys_above,
)
from prefect_dicom.network.node_client import NodeClient


def query_study_attributes(
    requestor: NodeClient, study: Study, keywords: Sequence[str], capabilities: QueryCapabilities
) -> Study:
    """Query further attributes of a study; returns the study with them.

    The study is queried by its UID, for one attribute at a time where all together bring no
    answer. Attributes that the PACS does not return are absent.

    Raises
    ------
    PacsError
        See :func:`~prefect_dicom.network.find.query.find`.
    """
    above = keys_above(requestor, study.study_instance_uid, study.patient_id, capabilities)
    returned: dict[str, str] = {}
    for some in (keywords, *([keyword] for keyword in keywords if len(keywords) > 1)):
        answers = answers_if_any(requestor, above, some, "STUDY", study.patient_id)
        for answer in answers:
            if uid_of(answer, "StudyInstanceUID") == normal_uid(study.study_instance_uid):
                returned |= dict(_attributes_of(answer, some))
        if answers and some is keywords:
            break
    return replace(study, attributes=(*study.attributes, *returned.items()))


def query_series_attributes(
    requestor: NodeClient, study: Study, keywords: Sequence[str], capabilities: QueryCapabilities
) -> dict[str, dict[str, str]]:
    """Query attributes of a study's series, by SeriesInstanceUID.

    Attributes that the PACS does not return are absent.

    Raises
    ------
    PacsError
        See :func:`~prefect_dicom.network.find.query.find`.
    """
    uid, patient_id = study.study_instance_uid, study.patient_id
    above = keys_above(requestor, uid, patient_id, capabilities)
    series: dict[str, dict[str, str]] = defaultdict(dict)

    def note(answers: Sequence[Dataset], asked: Sequence[str]) -> None:
        for answer in answers:
            if belongs_to(answer, "StudyInstanceUID", uid):
                series[uid_of(answer, "SeriesInstanceUID")] |= dict(_attributes_of(answer, asked))

    note(
        answers_if_any(requestor, above, (*UNIQUE_SERIES_KEYS, *keywords), "SERIES", patient_id),
        keywords,
    )
    if not series:
        # A key that the peer does not know may have spoilt the query; which one, if any?
        note(
            answers_at_level(
                requestor, above, [UNIQUE_SERIES_KEYS], "SERIES", patient_id, capabilities
            ),
            (),
        )
        for keyword in keywords if series else ():
            form = (*UNIQUE_SERIES_KEYS, keyword)
            note(answers_if_any(requestor, above, form, "SERIES", patient_id), [keyword])
    return dict(series)


def _attributes_of(answer: Dataset, keywords: Sequence[str]) -> Iterator[tuple[str, str]]:
    for keyword in keywords:
        tag = tag_for_keyword(keyword)
        if tag is not None and tag in answer:
            yield keyword, text_of(answer, keyword)
