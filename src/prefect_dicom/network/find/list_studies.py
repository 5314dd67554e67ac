"""Studies by their keys, by lists of UIDs or by a range of days: C-FIND at STUDY level."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial

from pydicom.dataset import Dataset

from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import Study
from prefect_dicom.core.uids import normal_uid
from prefect_dicom.network.find.answers import study_of
from prefect_dicom.network.find.query import find
from prefect_dicom.network.node_client import NodeClient
from prefect_dicom.network.query_keys import list_identifier, query_identifier

_SOME = 20
_REQUIRED_STUDY_KEYS = (
    "PatientID",
    "PatientName",
    "AccessionNumber",
    "StudyInstanceUID",
    "StudyDate",
)
OPTIONAL_STUDY_KEYS = (
    "PatientBirthDate",
    "IssuerOfPatientID",
    "ModalitiesInStudy",
    "StudyDescription",
    "NumberOfStudyRelatedSeries",
    "NumberOfStudyRelatedInstances",
)
STUDY_KEYS = _REQUIRED_STUDY_KEYS + OPTIONAL_STUDY_KEYS


@dataclass(frozen=True, slots=True)
class ListedStudies:
    """Studies, one for each answer; ``capped`` where the PACS reports that there are more."""

    studies: tuple[Study, ...]
    capped: bool = False


def find_studies(
    requestor: NodeClient,
    keys: Mapping[str, str],
    optional: Sequence[str] = OPTIONAL_STUDY_KEYS,
) -> list[Study]:
    """Query the studies that match the keys.

    Peers ignore keys they do not support and answer with everything: the caller has to
    compare the answers with the keys. In the Patient Root a PatientID should be among the keys
    (PS3.4 C.6.1.2); many PACS answer without. Values beyond ASCII are asked for in one usual
    character set after the other, until one brings answers; the requestor begins with it from then
    on.

    Parameters
    ----------
    keys : mapping of str to str
        DICOM keywords and values to match, at least one; sent exactly as they are.
    optional : sequence of str
        Of :data:`OPTIONAL_STUDY_KEYS`, those to be returned; without them is what every PACS
        answers.

    Returns
    -------
    list of Study
        One for each answer, in the order of the peer. A study UID may be empty or unsafe: such a
        study exists, and cannot be asked for.

    Raises
    ------
    ValueError
        Where no key is given, or one is empty or holds a wildcard or a backslash.
    PacsError
        See :func:`~prefect_dicom.network.find.query.find`.
    """
    if not keys:
        raise ValueError("a query without a key would list the whole PACS")
    listed = list_studies(requestor, keys, optional)
    if listed.capped:
        raise PacsError("answers-capped", "the list of studies ends before its end")
    return list(listed.studies)


def list_studies(
    requestor: NodeClient,
    keys: Mapping[str, str],
    optional: Sequence[str] = OPTIONAL_STUDY_KEYS,
    wildcards: Mapping[str, str] | None = None,
) -> ListedStudies:
    """As :func:`find_studies`, with the answers so far where the PACS ends the list early.

    Parameters
    ----------
    wildcards : mapping of str to str, optional
        See :func:`~prefect_dicom.network.query_keys.query_identifier`.
    """
    if not keys and not wildcards:
        raise ValueError("a query without a key would list the whole PACS")
    return_keys = (*_REQUIRED_STUDY_KEYS, *optional)
    refusal: PacsError | None = None
    answered = False
    texts = [*keys.values(), *(wildcards or {}).values()]
    for characters in requestor.character_sets(texts):
        identifier = query_identifier(keys, return_keys, characters, wildcards)
        try:
            listed = _listed_studies(requestor, identifier)
        except PacsError as error:
            if error.code != "request-refused":
                raise
            refusal = error
            continue
        answered = True
        if listed.studies or listed.capped:
            requestor.characters = characters or requestor.characters
            return listed
    if refusal is not None and not answered:
        raise refusal
    return ListedStudies(())


def answers_anything(requestor: NodeClient, keys: Mapping[str, str]) -> bool:
    """Whether a PACS has any answer to a query; it is cancelled after the first one.

    Raises
    ------
    PacsError
        See :func:`~prefect_dicom.network.find.query.find`, except ``answers-capped``.
    """
    identifier = query_identifier(keys, _REQUIRED_STUDY_KEYS, requestor.characters)
    try:
        with contextlib.closing(find(requestor, identifier, "STUDY")) as answers:
            return next(answers, None) is not None
    except PacsError as error:
        if error.code != "answers-capped":
            raise
        return True


def _listed_studies(requestor: NodeClient, identifier: Dataset) -> ListedStudies:
    studies: list[Study] = []
    try:
        studies.extend(map(partial(_kept, requestor), find(requestor, identifier, "STUDY")))
    except PacsError as error:
        if error.code != "answers-capped":
            raise
        return ListedStudies(tuple(studies), capped=True)
    return ListedStudies(tuple(studies))


def _kept(requestor: NodeClient, answer: Dataset) -> Study:
    study = study_of(answer)
    if requestor.trace is not None:
        requestor.trace.keep(study)
    return study


def find_studies_by_uids(requestor: NodeClient, uids: Sequence[str]) -> list[Study] | None:
    """Studies with these StudyInstanceUIDs by one query with a list of them, PS3.4 C.2.2.2.2.

    PACS that do not know lists answer nothing, the first, or everything, and some stop at a
    number of answers: the caller has to check which UIDs were answered.

    Returns
    -------
    list of Study
        One for each answer, as :func:`find_studies` returns them. None where one of them was not
        asked for; the query is cancelled then.

    Raises
    ------
    PacsError
        See :func:`~prefect_dicom.network.find.query.find`.
    """
    asked = {normal_uid(uid) for uid in uids}
    studies: list[Study] = []
    answers = find(requestor, list_identifier({"StudyInstanceUID": uids}, STUDY_KEYS), "STUDY")
    with contextlib.closing(answers):
        for answer in answers:
            study = study_of(answer)
            if study.study_instance_uid not in asked:
                return None
            studies.append(study)
    return studies


def find_some_studies(
    requestor: NodeClient, first: date, last: date, most: int = _SOME
) -> list[Study]:
    """Up to twenty studies of a range of days, or ``most``; the query is cancelled after them.

    For trying a PACS out. PACS that cannot match a range answer with any studies.

    Raises
    ------
    PacsError
        See :func:`~prefect_dicom.network.find.query.find`, except ``answers-capped`` with answers.
    """
    days = f"{first:%Y%m%d}-{last:%Y%m%d}"
    return _some_studies(requestor, query_identifier({"StudyDate": days}, STUDY_KEYS), most)


def find_some_studies_by_prefix(
    requestor: NodeClient, prefix: str, most: int = _SOME
) -> list[Study]:
    """As :func:`find_some_studies`, of patients whose PatientID begins with a prefix."""
    wildcards = {"PatientID": f"{prefix}*"}
    identifier = query_identifier({}, STUDY_KEYS, wildcards=wildcards)
    return _some_studies(requestor, identifier, most)


def _some_studies(requestor: NodeClient, identifier: Dataset, most: int) -> list[Study]:
    answers = find(requestor, identifier, "STUDY")
    studies: list[Study] = []
    try:
        with contextlib.closing(answers):
            studies.extend(map(partial(_kept, requestor), itertools.islice(answers, most)))
    except PacsError as error:
        if not studies or error.code != "answers-capped":
            raise
    return studies
