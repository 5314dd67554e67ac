"""Query of one cohort row: its identifiers are queried, and the answers compared and doubted.

A PACS may answer nothing to a key it does not support, everything to one it ignores, and
stop at a number of answers without a word. Each shows, or can be made to show: by the same query
with fewer keys, by answers that match no key, by the partitions of a list
(:mod:`prefect_dicom.discovery.complete_list`). What cannot be decided is neither found nor absent,
and the row says why.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from prefect_dicom.cohort.persons import several_patients
from prefect_dicom.cohort.row_matching import (
    MOST_NEAR_MISSES,
    Discovery,
    assess,
    has_same_uid,
    has_values,
    identifies,
    is_date_window,
    is_patients,
    matches,
    may_match,
    numbers_of,
    passes_filters,
    study_query,
)
from prefect_dicom.config.capabilities import NodeCapabilities
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import CohortRow, InformationModel, Study
from prefect_dicom.core.reasons import Scope, reason_for
from prefect_dicom.core.uids import normal_uid
from prefect_dicom.discovery.complete_list import complete_list
from prefect_dicom.discovery.partition import ListLimits
from prefect_dicom.discovery.query_cache import QueryCache
from prefect_dicom.network.find.list_series import list_series
from prefect_dicom.network.find.list_studies import (
    OPTIONAL_STUDY_KEYS,
    ListedStudies,
    answers_anything,
    find_some_studies,
    find_studies_by_uids,
    list_studies,
)
from prefect_dicom.network.node_client import NodeClient

log = logging.getLogger(__name__)

WITHOUT_OWN_UID = "studies without a UID of their own"
"""A gap: a retrieve request names a study by its UID."""

OF_NOBODY = "NONE7F3A9C21D4E8"
"""An identifier that no patient and no study has."""

_WORTH_A_LIST = 10
"""UIDs from which on a list saves more than it costs where the node does not answer it."""


@dataclass
class StudyQueryCapabilities:
    """What a run has learnt of its node's support of STUDY level queries."""

    simple: bool = False
    """Query by few keys, for few keys: with more the node answered nothing, or refused."""
    understood: bool = False
    """Whether a query for all that is to be returned has brought answers."""
    limits: ListLimits = field(default_factory=ListLimits)
    answers_lists: bool = True
    """Whether lists of StudyInstanceUIDs are worth a try: until one was not answered whole."""
    heeded: dict[tuple[str, frozenset[str]], bool] = field(default_factory=dict)
    """By key, and the keys of its query: whether the node matches by it, where it was in doubt."""
    query_cache: QueryCache = field(default_factory=QueryCache)
    """The answers to rows' identifiers, for rows with the same ones."""
    _warned: set[str] = field(default_factory=set)

    def start_from(self, known: NodeCapabilities) -> None:
        """Begin with what was learnt of the node before the run."""
        self.simple = known.optional_return_keys is False
        self.answers_lists = known.uid_lists_in_queries is not False
        self.limits.start_from(known)

    def warn(self, words: str) -> None:
        """Log something about the node once for the run, not for each row."""
        if words not in self._warned:
            self._warned.add(words)
            log.warning("the PACS %s", words)


def discover(
    requestor: NodeClient, row: CohortRow, capabilities: StudyQueryCapabilities
) -> Discovery:
    """Query a PACS for the studies of a row.

    A list that may have been cut short is completed by partitions; where there may still be more,
    the row says so (``list-unproved`` and its gaps) and has what was found. A row with two numbers
    of one patient is queried by both.

    Raises
    ------
    PacsError
        See :func:`~prefect_dicom.network.find.query.find`; ``answers-capped`` where a study that is
        named by its UID is there and is not among the answers.
    """
    found = _discover(requestor, row, capabilities)
    numbers = numbers_of(row)
    if not numbers or row.study_instance_uid is not None:
        return found
    if found.reason is not None and reason_for(found.reason).settles_row:
        return found
    exchanged = replace(row, patient_id=numbers[1], other_patient_id=numbers[0])
    return _united(row, found, _discover(requestor, exchanged, capabilities))


def _discover(
    requestor: NodeClient, row: CohortRow, capabilities: StudyQueryCapabilities
) -> Discovery:
    keys, listed = _answers(requestor, row, study_query(row), capabilities)
    answers = list(listed.studies)
    gaps: tuple[str, ...] = ()
    if "StudyInstanceUID" not in keys:
        answers, gaps = complete_list(
            listed,
            keys,
            row.study_date,
            capabilities.limits,
            lambda keys, wildcards: _query(
                requestor, keys, _returned(row, capabilities.simple), capabilities, wildcards
            ),
            lambda first, last, most: find_some_studies(requestor, first, last, most),
        )
        if gaps:
            capabilities.warn(
                "limits the answers to a query; some lists could not be completed by partitions"
            )
    found = _assessed(requestor, row, keys, answers, capabilities, capped=listed.capped)
    if is_date_window(row) and found.near_misses:
        # A request names a study by its UID: one that several share, or that is none, is left.
        gaps = (*gaps, WITHOUT_OWN_UID)
    if not gaps:
        return found
    reason = found.reason if found.reason == "several-patients" else "list-unproved"
    return replace(found, reason=reason, gaps=gaps)


def _united(row: CohortRow, first: Discovery, second: Discovery) -> Discovery:
    """What a patient's two numbers have found together."""
    codes = [each.reason for each in (first, second) if each.reason is not None]
    asks = [code for code in codes if reason_for(code).settles_row]
    studies = {s.study_instance_uid: s for s in (*second.studies, *first.studies)}
    near = tuple(dict.fromkeys((*first.near_misses, *second.near_misses)))[:MOST_NEAR_MISSES]
    gaps = tuple(dict.fromkeys((*first.gaps, *second.gaps)))
    if not asks and several_patients(studies.values(), numbers_of(row)):
        asks = ["several-patients"]
    if asks:
        return Discovery((), asks[0], (*studies.values(), *near)[:MOST_NEAR_MISSES], gaps)
    beside = [code for code in codes if reason_for(code).beside_studies]
    if studies:
        return Discovery(tuple(studies.values()), beside[0] if beside else None, near, gaps)
    reason = max(codes, key=lambda code: reason_for(code).specificity)
    return Discovery((), reason, near, gaps)


def _assessed(
    requestor: NodeClient,
    row: CohortRow,
    keys: Mapping[str, str],
    answers: Sequence[Study],
    capabilities: StudyQueryCapabilities,
    *,
    capped: bool,
) -> Discovery:
    """What the answers mean for the row, and what follows from those that do not match it."""
    found = assess(row, answers)
    if requestor.ignores_keys:
        capabilities.warn("ignores optional keys (FF01)")
    foreign = [study for study in answers if not identifies(row, study)]
    strangers = [study for study in foreign if not matches(keys, study)]
    if strangers:
        capabilities.warn("returns studies that do not match the keys; they are left out")
    if foreign and not any(has_values(study, keys) for study in foreign):
        # Found by the key and answered without it, not by a PACS that ignores keys.
        return Discovery((), "identifier-missing", tuple(foreign[:MOST_NEAR_MISSES]))
    if row.study_instance_uid is not None:
        return _named_by_uid(requestor, row, found, foreign, capped=capped)
    if found.reason not in (None, "no-match") or not foreign:
        return found
    if found.reason == "no-match":
        if not any(has_values(study, study_query(row)) for study in foreign):
            return Discovery((), "identifier-missing", tuple(foreign[:MOST_NEAR_MISSES]))
        if row.patient_id is not None and all(is_patients(row, study) for study in foreign):
            # All of the patient's studies are there, and none has the row's accession number.
            return _with_candidates(found, foreign)
    strangers = [study for study in strangers if not may_match(row, study)]
    if found.reason is None:
        strangers = [study for study in strangers if passes_filters(row, study)]
    if not strangers:
        # Substrings, another case: the PACS matches by the key, if not to the letter.
        return found
    if not _heeds_keys(requestor, keys, strangers, capabilities):
        if found.reason is None:
            return found
        return Discovery((), "key-ignored", found.near_misses)
    # A merged patient's old number, a number with a prefix: the PACS knows what was meant.
    return replace(_with_candidates(found, strangers), reason="known-otherwise")


def _named_by_uid(
    requestor: NodeClient,
    row: CohortRow,
    found: Discovery,
    foreign: Sequence[Study],
    *,
    capped: bool,
) -> Discovery:
    """What a row has found that names its study, in view of answers that do not match it."""
    if found.reason != "no-match" or not (foreign or capped):
        return found
    if foreign and all(may_match(row, study) for study in foreign):
        return found
    if any(has_same_uid(row, study) for study in foreign):
        # The study itself, under other identifiers than the row's.
        return found
    if list_series(requestor, row.study_instance_uid or "").series:
        raise PacsError("answers-capped", "the study is there, and not among the answers")
    return found


def _with_candidates(found: Discovery, studies: Sequence[Study]) -> Discovery:
    near = tuple(dict.fromkeys((*found.near_misses, *studies)))
    return replace(found, near_misses=near[:MOST_NEAR_MISSES])


def _heeds_keys(
    requestor: NodeClient,
    keys: Mapping[str, str],
    strangers: Sequence[Study],
    capabilities: StudyQueryCapabilities,
) -> bool:
    """Whether the PACS matches by the keys that answers differ in; asked once of each node.

    One that does has no answer to an identifier that nobody has.
    """
    for keyword, value in keys.items():
        if all(matches({keyword: value}, study) for study in strangers):
            continue
        tried = (keyword, frozenset(keys))
        if tried not in capabilities.heeded:
            query = {**keys, keyword: OF_NOBODY}
            capabilities.heeded[tried] = not answers_anything(requestor, query)
        if not capabilities.heeded[tried]:
            return False
    return True


def query_uid_lists(
    requestor: NodeClient, rows: Sequence[CohortRow], capabilities: StudyQueryCapabilities
) -> None:
    """Query rows that name their studies by one list of UIDs, and cache the answers.

    :func:`discover` takes them from the cache. An answer is cached where all of the list shows that
    it is whole: each UID is answered once, but for those that a query of their own does not find
    either. A node that fails over a list, answers with other studies, or leaves out one that it has
    is queried one by one from then on.

    Raises
    ------
    PacsError
        What concerns the node, not the query.
    """
    by_patient = requestor.node.query_model is InformationModel.PATIENT_ROOT
    if by_patient or capabilities.simple or not capabilities.answers_lists:
        return
    cache = capabilities.query_cache
    keys = {uid: study_query(row) for row in rows if (uid := row.study_instance_uid) is not None}
    uids = [uid for uid, key in keys.items() if cache.get(key, OPTIONAL_STUDY_KEYS) is None]
    if len(uids) < _WORTH_A_LIST:
        return
    if len(uids) % 10 == 0:
        # As many answers as a limit might be would not show whether they are all.
        uids = uids[:-1]
    try:
        answers = find_studies_by_uids(requestor, uids)
        if answers is None:
            capabilities.answers_lists = False
            return
        found = {study.study_instance_uid: study for study in answers}
        if len(found) < len(answers):
            # One study under several patients, or an answer for each modality: each by itself.
            return
        for uid in uids:
            if normal_uid(uid) in found:
                continue
            if _query(requestor, keys[uid], OPTIONAL_STUDY_KEYS, capabilities).studies:
                capabilities.answers_lists = False
                return
    except PacsError as error:
        if error.scope is not Scope.REQUEST:
            raise
        capabilities.answers_lists = False
        return
    for uid in uids:
        if normal_uid(uid) in found:
            cache.put(keys[uid], OPTIONAL_STUDY_KEYS, [found[normal_uid(uid)]])


def _answers(
    requestor: NodeClient,
    row: CohortRow,
    keys: Mapping[str, str],
    capabilities: StudyQueryCapabilities,
) -> tuple[Mapping[str, str], ListedStudies]:
    """The matching keys and the answers, queried again with fewer keys where one may spoil it."""
    if not capabilities.simple:
        try:
            listed = _query(requestor, keys, OPTIONAL_STUDY_KEYS, capabilities)
            if listed.capped and not listed.studies:
                # A700 may be of the moment.
                listed = _query(requestor, keys, OPTIONAL_STUDY_KEYS, capabilities)
        except PacsError as error:
            if error.code != "request-refused":
                raise
        else:
            if listed.studies:
                capabilities.understood = True
            # One key alone cannot be left out, and what is to be returned was no trouble before.
            # By a PatientID alone there are its studies, to choose from.
            if listed.studies or listed.capped or (len(keys) == 1 and capabilities.understood):
                return keys, listed
    if "PatientID" in keys:
        keys = {"PatientID": keys["PatientID"]}
    listed = _query(requestor, keys, _returned(row, simply=True), capabilities)
    if not capabilities.simple and any(identifies(row, study) for study in listed.studies):
        capabilities.simple = True
        capabilities.warn("returns studies only for queries with few keys")
    return keys, listed


def _returned(row: CohortRow, simply: bool) -> list[str]:
    """The optional keys to be returned; ``simply``: those that the row needs."""
    needed = {
        "ModalitiesInStudy": row.modality is not None,
        "StudyDescription": row.study_description is not None,
        "PatientBirthDate": row.patient_birth_date is not None,
        "IssuerOfPatientID": row.issuer_of_patient_id is not None,
    }
    return [keyword for keyword in OPTIONAL_STUDY_KEYS if not simply or needed.get(keyword)]


def _query(
    requestor: NodeClient,
    keys: Mapping[str, str],
    optional: Sequence[str],
    capabilities: StudyQueryCapabilities,
    wildcards: Mapping[str, str] | None = None,
) -> ListedStudies:
    """Query the node, unless the answers are in the cache."""
    asked = {**keys, **(wildcards or {})}
    answers = capabilities.query_cache.get(asked, optional)
    if answers is not None:
        if requestor.trace is not None:
            requestor.trace.answered_before(asked, answers)
        return ListedStudies(tuple(answers))
    listed = list_studies(requestor, keys, optional, wildcards)
    if not listed.capped:
        capabilities.query_cache.put(asked, optional, listed.studies)
    return listed
