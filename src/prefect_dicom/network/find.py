"""C-FIND, PS3.4 C.4.1: studies by their keys, and a study's own list of instances.

Queries are hierarchical, with one value for every unique key: the form that every archive
answers. Lists of UIDs, which many answer and which save most of the queries, are tried first
where the answer itself shows whether it is whole. Texts are decoded here and never raise, see
:mod:`prefect_dicom.dicom.character_sets`.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date

from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pynetdicom.dimse_primitives import C_FIND
from pynetdicom.dsutils import decode

from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.failpoints import reached
from prefect_dicom.core.model import Evidence, InformationModel, Instance, InstanceKey, Study
from prefect_dicom.core.uids import is_safe_key, normal_uid
from prefect_dicom.dicom.character_sets import Text, character_sets_for, decoded
from prefect_dicom.network.association import Exchange, Requestor
from prefect_dicom.network.query_keys import list_identifier, query_identifier
from prefect_dicom.network.status import PENDING, reason_for_status

_PENDING_WITH_ALL_KEYS = 0xFF00
_CANCEL_SECONDS = 5.0
_SOME = 20
_MOST_UNCOUNTED = 99
"""Answers that are taken as all there are without a count beside them. Archives that leave out
answers and do not say so stop at a round number, of which 100 is the smallest known."""
_MOST_TOGETHER = 1000
_NUMBERS_TO_TRY = 8
_REFUSALS = 3
"""Studies of which a level is not answered, after which it is no longer asked at."""
_SAYS_NO_TO_LISTS = {"answer-unusable", "answers-capped", "pacs-failure", "request-refused"}

_REQUIRED_STUDY_KEYS = (
    "PatientID",
    "PatientName",
    "AccessionNumber",
    "StudyInstanceUID",
    "StudyDate",
)
OPTIONAL_STUDY_KEYS = (
    "PatientBirthDate",
    "ModalitiesInStudy",
    "StudyDescription",
    "NumberOfStudyRelatedSeries",
    "NumberOfStudyRelatedInstances",
)
_STUDY_TEXTS = ("PatientID", "AccessionNumber", "PatientName", "StudyDescription")
_STUDY_KEYS = _REQUIRED_STUDY_KEYS + OPTIONAL_STUDY_KEYS
_UNIQUE_SERIES_KEYS = ("StudyInstanceUID", "SeriesInstanceUID")
_SERIES_KEYS = (
    *_UNIQUE_SERIES_KEYS,
    "Modality",
    "NumberOfSeriesRelatedInstances",
    "InstanceAvailability",
)
_IMAGE_KEYS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")


@dataclass(frozen=True, slots=True)
class Series:
    """One answer of a SERIES level C-FIND, PS3.4 C.6.1.1.4."""

    series_instance_uid: str
    modality: str = ""
    number_of_instances: int | None = None


@dataclass(slots=True)
class QueryHabits:
    """What a node was seen to make of queries below the STUDY level; shared by all who ask it."""

    answers: dict[str, bool] = field(default_factory=dict)
    """By level, whether it answers queries there; a level that is not in it is not known."""
    wants_patient_id: bool = False
    """In the Study Root too it wants the PatientID beside the study's UID."""
    refusals: Counter[str] = field(default_factory=Counter)
    """By level, how many studies' lists it has refused."""

    @classmethod
    def doubting(cls, levels: Collection[str] | None) -> QueryHabits:
        """What is expected of a node that was seen to answer at these levels; None: not known.

        A run asks at the others too, but not often.
        """
        others = {"SERIES", "IMAGE"}.difference({"SERIES", "IMAGE"} if levels is None else levels)
        return cls(refusals=Counter(dict.fromkeys(others, _REFUSALS - 1)))

    def refused(self, level: str) -> None:
        """All there is to ask for a study at the level was refused."""
        self.refusals[level] += 1
        if self.refusals[level] >= _REFUSALS:
            self.answers.setdefault(level, False)


@dataclass(frozen=True, slots=True)
class ListedStudies:
    """The studies a peer told of, one for each answer; ``capped`` where it says there are more."""

    studies: tuple[Study, ...]
    capped: bool = False


@dataclass(frozen=True, slots=True)
class ListedSeries:
    """The series a peer lists for a study; ``unlistable`` answers cannot be asked about.

    ``offline`` is how many the peer says it cannot deliver by itself.
    """

    series: tuple[Series, ...]
    unlistable: int = 0
    offline: int = 0


@dataclass(frozen=True, slots=True)
class ListedStudy:
    """What a peer tells of a study's content, and so what its retrieval can be judged by.

    At best that is the list of its ``instances``, the expected set. Where the peer does not list
    these, ``evidence`` says what there is in their place: ``series`` with their counts, by UID,
    or (None: not even series are listed) ``number_of_instances`` of the study, if that is told.

    ``unlistable`` counts answers that name nothing that could be asked for: series or
    instances without a UID, or with one that is a wildcard. They are in no retrieve by list.
    ``offline`` is how many series the peer says it cannot deliver by itself.
    """

    instances: tuple[Instance, ...] = ()
    unlistable: int = 0
    offline: int = 0
    evidence: Evidence = Evidence.INSTANCE_LIST
    series: Mapping[str, int | None] | None = None
    number_of_instances: int | None = None


def find(requestor: Requestor, identifier: Dataset, level: str) -> Iterator[Dataset]:
    """Send a C-FIND and yield its answers as they come.

    An association that turns out to be gone before the first answer is opened anew, once. When
    the caller stops reading, the query is cancelled.

    Parameters
    ----------
    requestor : Requestor
        The association to use.
    identifier : Dataset
        Keys to match and to return; made by
        :func:`~prefect_dicom.network.query_keys.query_identifier`.
    level : str
        ``STUDY``, ``SERIES`` or ``IMAGE``; set as QueryRetrieveLevel.

    Raises
    ------
    PacsError
        With what the final status stands for; ``answers-capped`` where the peer says there are
        more; ``answer-unusable`` at the end, where an answer had no data set that decodes: the
        list is then not whole.
    """
    identifier.QueryRetrieveLevel = level

    seconds = requestor.node.timeouts.find_seconds
    exchange = requestor.send("C-FIND", identifier)
    unreadable = False
    try:
        while True:
            try:
                response = exchange.next(seconds)
            except PacsError:
                if exchange.answered or exchange.fresh:
                    raise
                exchange = requestor.send("C-FIND", identifier)
                continue
            if response is None:
                code = "association-stalled" if exchange.answered else "pacs-silent"
                raise PacsError(code, f"no answer to a C-FIND within {seconds:g} s")
            if response.Status in PENDING:
                requestor.ignores_keys |= response.Status != _PENDING_WITH_ALL_KEYS
                answer = _decoded(response, exchange)
                if answer is None:
                    unreadable = True
                else:
                    yield answer
                continue
            code = reason_for_status("C-FIND", response.Status)
            if code is not None:
                raise PacsError(code, f"C-FIND status {response.Status:04X} at {level} level")
            if unreadable:
                raise PacsError("answer-unusable", f"an answer at {level} level does not decode")
            return
    except GeneratorExit:
        _cancel(exchange)
        raise
    finally:
        if not exchange.ended:
            exchange.abort()


def _decoded(response: C_FIND, exchange: Exchange) -> Dataset | None:
    syntax = exchange.transfer_syntax
    try:
        answer = decode(response.Identifier, syntax.is_implicit_VR, syntax.is_little_endian)
        last = answer.get_item(max(answer.keys()))
        # pydicom takes what there is of a value that is cut off.
        whole = isinstance(last, DataElement) or len(last.value or b"") == last.length
    except Exception:
        # Whatever a data set does that is none, or empty.
        return None
    return answer if whole else None


def _cancel(exchange: Exchange) -> None:
    """Ask for no more answers and take those under way, so that the association can be used."""
    if exchange.ended:
        return
    deadline = time.monotonic() + _CANCEL_SECONDS
    with contextlib.suppress(PacsError):
        exchange.cancel()
        while not exchange.ended and time.monotonic() < deadline:
            exchange.next(1.0)


def find_studies(
    requestor: Requestor,
    keys: Mapping[str, str],
    optional: Sequence[str] = OPTIONAL_STUDY_KEYS,
) -> list[Study]:
    """Studies that match the keys, as the peer tells.

    Peers ignore keys they do not support and answer with everything: whoever asks has to
    compare the answers with the keys. In the Patient Root a PatientID should be among the keys
    (PS3.4 C.6.1.2); many archives answer without. Values beyond ASCII are asked for in one usual
    character set after the other, until one brings answers; the requestor begins with it from then
    on.

    Parameters
    ----------
    keys : mapping of str to str
        DICOM keywords and values to match, at least one; sent exactly as they are.
    optional : sequence of str
        Of :data:`OPTIONAL_STUDY_KEYS`, those to be returned; without them is what every archive
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
        See :func:`find`.
    """
    if not keys:
        raise ValueError("a query without a key would list the whole archive")
    listed = list_studies(requestor, keys, optional)
    if listed.capped:
        raise PacsError("answers-capped", "the list of studies ends before its end")
    return list(listed.studies)


def list_studies(
    requestor: Requestor,
    keys: Mapping[str, str],
    optional: Sequence[str] = OPTIONAL_STUDY_KEYS,
    wildcards: Mapping[str, str] | None = None,
) -> ListedStudies:
    """What :func:`find_studies` finds, and as much of it as comes where the peer ends it early.

    Parameters
    ----------
    wildcards : mapping of str to str, optional
        See :func:`~prefect_dicom.network.query_keys.query_identifier`.
    """
    if not keys and not wildcards:
        raise ValueError("a query without a key would list the whole archive")
    return_keys = (*_REQUIRED_STUDY_KEYS, *optional)
    refusal: PacsError | None = None
    answered = False
    texts = [*keys.values(), *(wildcards or {}).values()]
    for characters in character_sets_for(texts, requestor.characters):
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


def _listed_studies(requestor: Requestor, identifier: Dataset) -> ListedStudies:
    studies: list[Study] = []
    try:
        studies.extend(map(_study, find(requestor, identifier, "STUDY")))
    except PacsError as error:
        if error.code != "answers-capped":
            raise
        return ListedStudies(tuple(studies), capped=True)
    return ListedStudies(tuple(studies))


def find_studies_by_uids(requestor: Requestor, uids: Sequence[str]) -> list[Study] | None:
    """Studies with these StudyInstanceUIDs by one query with a list of them, PS3.4 C.2.2.2.2.

    Archives that do not know lists answer nothing, the first, or everything, and some stop at a
    number of answers: whoever asks has to look at which UIDs were answered.

    Returns
    -------
    list of Study
        One for each answer, as :func:`find_studies` returns them. None where one of them was not
        asked for; the query is cancelled then.

    Raises
    ------
    PacsError
        See :func:`find`.
    """
    asked = {normal_uid(uid) for uid in uids}
    studies: list[Study] = []
    answers = find(requestor, list_identifier({"StudyInstanceUID": uids}, _STUDY_KEYS), "STUDY")
    with contextlib.closing(answers):
        for answer in answers:
            study = _study(answer)
            if study.study_instance_uid not in asked:
                return None
            studies.append(study)
    return studies


def find_some_studies(
    requestor: Requestor, first: date, last: date, most: int = _SOME
) -> list[Study]:
    """Up to twenty studies of a range of days, or ``most``; the query is cancelled after them.

    For trying an archive out. Archives that cannot match a range answer with any studies.

    Raises
    ------
    PacsError
        See :func:`find`; a capped list of answers is as good as a whole one here.
    """
    days = f"{first:%Y%m%d}-{last:%Y%m%d}"
    answers = find(requestor, query_identifier({"StudyDate": days}, _STUDY_KEYS), "STUDY")
    studies: list[Study] = []
    try:
        with contextlib.closing(answers):
            studies.extend(_study(answer) for answer in itertools.islice(answers, most))
    except PacsError as error:
        if not studies or error.code != "answers-capped":
            raise
    return studies


def list_series(
    requestor: Requestor,
    study_instance_uid: str,
    patient_id: str = "",
    habits: QueryHabits | None = None,
) -> ListedSeries:
    """The series of a study, with the number of instances where the peer tells it.

    Parameters and errors are those of :func:`list_instances`.
    """
    above = _keys_above(requestor, study_instance_uid, patient_id)
    series: dict[str, Series] = {}
    unlistable = offline = 0
    forms = (_SERIES_KEYS, _UNIQUE_SERIES_KEYS)
    for answer in _answers(requestor, above, forms, "SERIES", patient_id, habits):
        if not _belongs(answer, "StudyInstanceUID", study_instance_uid):
            continue
        uid = _uid(answer, "SeriesInstanceUID")
        if not is_safe_key(uid):
            unlistable += 1
            continue
        one = Series(
            uid,
            _text(answer, "Modality"),
            _count(answer, "NumberOfSeriesRelatedInstances"),
        )
        series.setdefault(uid, one)
        offline += _is_offline(answer)
    return ListedSeries(tuple(series.values()), unlistable, offline)


def _answers(
    requestor: Requestor,
    above: Mapping[str, str],
    forms: Sequence[Sequence[str]],
    level: str,
    patient_id: str,
    habits: QueryHabits | None = None,
) -> list[Dataset]:
    """The answers at a level, by the first form of the query that the peer answers.

    Optional keys spoil a query for some, and some want the PatientID in the Study Root too. That
    is tried where nothing has been answered at the level yet, and learnt.

    Parameters
    ----------
    forms : sequence of sequence of str
        The keys to return, from all to as few as can be.

    Raises
    ------
    PacsError
        What the last form was answered with.
    """
    habits = habits or QueryHabits()
    with_patient = {**above, "PatientID": patient_id}
    ways = [(above, form) for form in forms]
    if "PatientID" not in above and is_safe_key(patient_id):
        if habits.wants_patient_id:
            ways = [(with_patient, form) for form in forms]
        elif not habits.answers.get(level):
            ways += [(with_patient, form) for form in forms]
    last: PacsError | None = None
    for keys, form in ways:
        last = None
        try:
            identifier = query_identifier(keys, form, requestor.characters)
            if answers := list(find(requestor, identifier, level)):
                habits.answers[level] = True
                habits.wants_patient_id |= keys is with_patient
                return answers
        except PacsError as error:
            if error.code != "request-refused":
                raise
            last = error
    if last is not None:
        raise last
    return []


def tell_study(
    requestor: Requestor, study: Study, keywords: Sequence[str], habits: QueryHabits
) -> Study:
    """The study, with further attributes as the peer tells them at STUDY level.

    Asked for by its UID; one by one where together they bring no answer. What the peer does not
    answer lacks in ``told``.

    Raises
    ------
    PacsError
        See :func:`find`.
    """
    above = _keys_above(requestor, study.study_instance_uid, study.patient_id, habits)
    told: dict[str, str] = {}
    for some in (keywords, *([keyword] for keyword in keywords if len(keywords) > 1)):
        answers = _tried(requestor, above, some, "STUDY", study.patient_id)
        for answer in answers:
            if _uid(answer, "StudyInstanceUID") == normal_uid(study.study_instance_uid):
                told |= dict(_told(answer, some))
        if answers and some is keywords:
            break
    return replace(study, told=(*study.told, *told.items()))


def tell_series(
    requestor: Requestor, study: Study, keywords: Sequence[str], habits: QueryHabits
) -> dict[str, dict[str, str]]:
    """Attributes of a study's series by their UIDs; what the peer does not answer lacks.

    Raises
    ------
    PacsError
        See :func:`find`.
    """
    uid, patient_id = study.study_instance_uid, study.patient_id
    above = _keys_above(requestor, uid, patient_id, habits)
    series: dict[str, dict[str, str]] = defaultdict(dict)

    def note(answers: Sequence[Dataset], asked: Sequence[str]) -> None:
        for answer in answers:
            if _belongs(answer, "StudyInstanceUID", uid):
                series[_uid(answer, "SeriesInstanceUID")] |= dict(_told(answer, asked))

    note(
        _tried(requestor, above, (*_UNIQUE_SERIES_KEYS, *keywords), "SERIES", patient_id), keywords
    )
    if not series:
        # A key that the peer does not know may have spoilt the query; which one, if any?
        note(_answers(requestor, above, [_UNIQUE_SERIES_KEYS], "SERIES", patient_id, habits), ())
        for keyword in keywords if series else ():
            form = (*_UNIQUE_SERIES_KEYS, keyword)
            note(_tried(requestor, above, form, "SERIES", patient_id), [keyword])
    return dict(series)


def _tried(
    requestor: Requestor,
    above: Mapping[str, str],
    keywords: Sequence[str],
    level: str,
    patient_id: str,
) -> list[Dataset]:
    """The answers to a query that a key may spoil; none where it is refused."""
    try:
        return _answers(requestor, above, [keywords], level, patient_id)
    except PacsError as error:
        if error.code != "request-refused":
            raise
        return []


def _told(answer: Dataset, keywords: Sequence[str]) -> Iterator[tuple[str, str]]:
    for keyword in keywords:
        if tag_for_keyword(keyword) in answer:
            yield keyword, _text(answer, keyword)


def _is_offline(answer: Dataset) -> bool:
    # PS3.3 C.4.23.1.1: no request brings it; a person has to fetch the medium.
    return _text(answer, "InstanceAvailability") in ("OFFLINE", "UNAVAILABLE")


def list_study(requestor: Requestor, study: Study, habits: QueryHabits) -> ListedStudy:
    """What the peer tells of a study's content: its instances, or the best there is instead.

    Parameters
    ----------
    study : Study
        As a STUDY level query told it.
    habits : QueryHabits
        What is known of the peer, and is learnt of it.

    Raises
    ------
    PacsError
        As :func:`list_instances`, but that refusals at IMAGE level are no errors, nor at SERIES
        level of a peer that has never answered there.
    """
    uid, patient_id = study.study_instance_uid, study.patient_id
    try:
        listed = _whole_list_of_series(requestor, study, habits)
    except PacsError as error:
        if error.code != "request-refused" or habits.answers.get("SERIES"):
            raise
        habits.refused("SERIES")
        return _study_without_series(requestor, study, habits, refused=True)
    if not (listed.series or listed.unlistable or habits.answers.get("SERIES")):
        return _study_without_series(requestor, study, habits, refused=False)
    if not listed.series:
        return ListedStudy(unlistable=listed.unlistable, offline=listed.offline)
    if habits.answers.get("IMAGE") is False:
        return _by_counts(listed)
    reached("list-half-read")
    try:
        # One that answers for others may only have failed to: it is asked twice.
        for last in (not habits.answers.get("IMAGE"), True):
            try:
                found = _instances_of(requestor, listed, uid, patient_id, habits)
                break
            except PacsError as error:
                if error.code != "request-refused" or last:
                    raise
    except PacsError as error:
        if error.code != "request-refused":
            raise
        habits.refused("IMAGE")
        return _by_counts(listed)
    nothing = not (found.instances or found.unlistable or habits.answers.get("IMAGE"))
    return _by_counts(listed) if nothing else found


def _whole_list_of_series(requestor: Requestor, study: Study, habits: QueryHabits) -> ListedSeries:
    """The series of a study; ``answers-capped`` where some seem to be left out."""
    if habits.answers.get("SERIES") is False:
        raise PacsError("request-refused", "no SERIES level")
    uid = study.study_instance_uid
    listed = list_series(requestor, uid, study.patient_id, habits)
    above = _keys_above(requestor, uid, study.patient_id, habits)
    _check_whole(requestor, "SERIES", above, len(listed.series), study.number_of_series)
    return listed


def _by_counts(listed: ListedSeries) -> ListedStudy:
    """The series in place of their instances, with counts where the peer tells them of all.

    A series that is listed has instances: a count of zero counts nothing.
    """
    series = {one.series_instance_uid: one.number_of_instances or None for one in listed.series}
    counted = None not in series.values()
    evidence = Evidence.SERIES_COUNTS if counted else Evidence.SUBOPERATION_COUNTS
    return ListedStudy((), listed.unlistable, listed.offline, evidence, series)


def _study_without_series(
    requestor: Requestor, study: Study, habits: QueryHabits, *, refused: bool
) -> ListedStudy:
    """A study whose series the peer does not list: all there is to ask is whether it is there."""
    uid = study.study_instance_uid
    keys = _keys_above(requestor, uid, study.patient_id, habits)
    there = [one for one in find_studies(requestor, keys) if one.study_instance_uid == uid]
    counts = [one.number_of_instances for one in there]
    if not there or (0 in counts and not refused):
        return ListedStudy()
    return ListedStudy(
        evidence=Evidence.SUBOPERATION_COUNTS,
        number_of_instances=max((count for count in counts if count), default=None),
    )


def list_instances(
    requestor: Requestor,
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
        Its PatientID as the peer tells it, a unique key in the Patient Root; in the Study Root
        sent to a peer that does not answer without.
    number_of_series : int, optional
        How many series the peer counts.

    Raises
    ------
    ValueError
        Where the study UID is empty or holds a wildcard.
    PacsError
        See :func:`find`. ``request-refused`` (A900, Cxxx) after :func:`list_series` has
        answered means that the peer has no IMAGE level; ``unsafe-patient-id`` that the Patient
        Root cannot name this study; ``answers-capped`` that a list is not whole, whether the
        peer says so or not.
    """
    study = Study(study_instance_uid, patient_id, number_of_series=number_of_series)
    habits = QueryHabits()
    listed = _whole_list_of_series(requestor, study, habits)
    reached("list-half-read")
    found = _instances_of(requestor, listed, study_instance_uid, patient_id, habits)
    if not (found.instances or found.unlistable) and any(
        series.number_of_instances != 0 for series in listed.series
    ):
        raise PacsError("answers-capped", "series are listed, and none of their instances")
    return found


def _instances_of(
    requestor: Requestor,
    listed: ListedSeries,
    study_instance_uid: str,
    patient_id: str,
    habits: QueryHabits,
) -> ListedStudy:
    """The instances of the listed series; of all, or of none."""
    instances: dict[InstanceKey, Instance] = {}
    unlistable = 0
    lengths: list[tuple[int, str, int | None]] = []
    bare = False
    for series in listed.series:
        series_uid = series.series_instance_uid
        above = _keys_above(requestor, study_instance_uid, patient_id, habits)
        above["SeriesInstanceUID"] = series_uid
        length = 0
        for answer in _answers(requestor, above, [_IMAGE_KEYS], "IMAGE", patient_id, habits):
            if not _belongs(answer, "StudyInstanceUID", study_instance_uid):
                continue
            if not _belongs(answer, "SeriesInstanceUID", series_uid):
                continue
            length += 1
            sop_uid = _uid(answer, "SOPInstanceUID")
            if not is_safe_key(sop_uid):
                unlistable += 1
                continue
            key = InstanceKey(series_uid, sop_uid)
            instances.setdefault(key, Instance(key, _uid(answer, "SOPClassUID")))
        bare = bare or (not length and series.number_of_instances != 0)
        if _may_be_short(length, series.number_of_instances):
            lengths.append((length, series_uid, series.number_of_instances))
    if bare and (instances or unlistable or habits.answers.get("IMAGE")):
        raise PacsError("answers-capped", "a series is listed, and none of its instances")
    if lengths:
        # A limit meets the longest list first.
        length, series_uid, counted = max(lengths, key=lambda one: one[0])
        above = _keys_above(requestor, study_instance_uid, patient_id, habits)
        above["SeriesInstanceUID"] = series_uid
        _check_whole(requestor, "IMAGE", above, length, counted)
    return ListedStudy(tuple(instances.values()), listed.unlistable + unlistable, listed.offline)


def _may_be_short(listed: int, counted: int | None) -> bool:
    if counted is None:
        return listed > _MOST_UNCOUNTED and listed % 50 == 0
    return listed < counted


_NUMBERED = {
    "SERIES": ("SeriesNumber", "SeriesInstanceUID"),
    "IMAGE": ("InstanceNumber", "SOPInstanceUID"),
}
"""By level: the number that is matched by everywhere (PS3.4 C.6.1.1), and the unique key."""


def _check_whole(
    requestor: Requestor, level: str, above: Mapping[str, str], listed: int, counted: int | None
) -> None:
    """Try to find something that a list lacks; nothing is sent where nothing speaks for it.

    Raises
    ------
    PacsError
        ``answers-capped`` where there is.
    """
    if not listed or not _may_be_short(listed, counted):
        return
    keyword, unique = _NUMBERED[level]

    def answers(**key: str) -> list[tuple[str, int | None]]:
        identifier = query_identifier(
            {**above, **key}, (*above, unique, keyword), requestor.characters
        )
        return [
            (_uid(answer, unique), _count(answer, keyword))
            for answer in find(requestor, identifier, level)
            if all(_belongs(answer, upper, uid) for upper, uid in above.items())
        ]

    try:
        whole = answers()
        known = {uid for uid, _ in whole}
        numbers = {number for _, number in whole if number is not None}
        if not numbers:
            return
        beyond = max(numbers) + 2 * max(1, (counted or 0) - listed)
        others = [n for n in range(min(numbers), beyond + 1) if n not in numbers]
        for number in others[:: max(1, -(-len(others) // _NUMBERS_TO_TRY))]:
            if any(uid and uid not in known for uid, _ in answers(**{keyword: str(number)})):
                raise PacsError("answers-capped", f"a list at {level} level ends before its end")
    except PacsError as error:
        if error.code != "request-refused":
            raise


def list_together(
    requestor: Requestor, studies: Sequence[Study], habits: QueryHabits | None = None
) -> dict[str, ListedStudy]:
    """The instance lists of several studies by a few queries with lists of UIDs, PS3.4 C.2.2.2.2.

    Above its own level a query may name one entity only (PS3.4 C.4.1.2.1), yet many archives
    answer lists there too. Others ignore them, take the first UID, or stop at a number of
    answers. Returned are therefore only studies whose answers show that they are whole: there
    are as many series and instances as the archive counts, or it counts none and the answers
    are too few to have been cut. All others are to be asked for one by one.

    Parameters
    ----------
    studies : sequence of Study
        As a STUDY level query told them.
    habits : QueryHabits, optional
        What is known of the peer, and is learnt of it.

    Returns
    -------
    dict of str to ListedStudy
        By StudyInstanceUID; what :func:`list_instances` would return. Empty in the Patient
        Root, and for good once the peer has shown that it does not answer lists.

    Raises
    ------
    PacsError
        What concerns the node, not the question.
    """
    wanted = [study for study in studies if is_safe_key(study.study_instance_uid)]
    by_patient = requestor.node.information_model is InformationModel.PATIENT_ROOT
    habits = habits or QueryHabits()
    if by_patient or not wanted or not requestor.answers_lists or habits.wants_patient_id:
        return {}
    if False in habits.answers.values():
        return {}
    most = requestor.node.limits.uids_per_request
    try:
        series: list[_CountedSeries] = []
        for first in range(0, len(wanted), most):
            series += _list_series_of(requestor, wanted[first : first + most])
        together = _list_instances_of(requestor, series, most)
    except PacsError as error:
        if error.code not in _SAYS_NO_TO_LISTS:
            raise
        together = {}
    requestor.answers_lists = bool(together)
    if together:
        habits.answers.update(SERIES=True, IMAGE=True)
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


def _list_series_of(requestor: Requestor, studies: Sequence[Study]) -> list[_CountedSeries]:
    """The series of those studies that the answer holds whole."""
    found: dict[str, dict[str, _CountedSeries]] = defaultdict(dict)
    uids = [study.study_instance_uid for study in studies]
    answers, odd = 0, set()
    identifier = list_identifier({"StudyInstanceUID": uids}, _SERIES_KEYS)
    for answer in find(requestor, identifier, "SERIES"):
        answers += 1
        study, uid = _uid(answer, "StudyInstanceUID"), _uid(answer, "SeriesInstanceUID")
        if not study and len(uids) == 1:
            study = normal_uid(uids[0])
        if not is_safe_key(uid) or _is_offline(answer):
            odd.add(study)
            continue
        count = _count(answer, "NumberOfSeriesRelatedInstances")
        found[study].setdefault(uid, _CountedSeries(study, uid, count))
    whole = []
    for study in studies:
        uid = normal_uid(study.study_instance_uid)
        series = found.get(uid, {})
        count = study.number_of_series
        if uid not in odd and _is_whole(len(series), count, answers):
            whole += series.values()
    return whole


def _list_instances_of(
    requestor: Requestor, series: Sequence[_CountedSeries], most: int
) -> dict[str, ListedStudy]:
    """The instances of those studies of which all series were answered whole."""
    found: dict[str, dict[InstanceKey, Instance]] = defaultdict(dict)
    odd: set[str] = set()
    for some in _portions(series, most):
        reached("list-half-read")
        asked = {one.series: one for one in some}
        keys = {
            "StudyInstanceUID": list(dict.fromkeys(one.study for one in some)),
            "SeriesInstanceUID": list(asked),
        }
        answers = 0
        for answer in find(requestor, list_identifier(keys, _IMAGE_KEYS), "IMAGE"):
            answers += 1
            one = asked.get(_uid(answer, "SeriesInstanceUID"))
            if one is None or not _belongs(answer, "StudyInstanceUID", one.study):
                continue
            uid = _uid(answer, "SOPInstanceUID")
            if not is_safe_key(uid):
                odd.add(one.study)
                continue
            key = InstanceKey(one.series, uid)
            found[one.study].setdefault(key, Instance(key, _uid(answer, "SOPClassUID")))
        listed = Counter(
            (study, key.series_instance_uid)
            for study in dict.fromkeys(one.study for one in some)
            for key in found[study]
        )
        for one in some:
            if not _is_whole(listed[one.study, one.series], one.count, answers):
                odd.add(one.study)
    return {
        study: ListedStudy(tuple(instances.values()))
        for study, instances in found.items()
        if study not in odd
    }


def _is_whole(listed: int, count: int | None, answers: int) -> bool:
    if count is None:
        return listed > 0 and answers <= _MOST_UNCOUNTED
    return 0 < listed == count


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


def _keys_above(
    requestor: Requestor,
    study_instance_uid: str,
    patient_id: str,
    habits: QueryHabits | None = None,
) -> dict[str, str]:
    keys = {"StudyInstanceUID": study_instance_uid}
    if habits is not None and habits.wants_patient_id and is_safe_key(patient_id):
        keys["PatientID"] = patient_id
    if requestor.node.information_model is InformationModel.PATIENT_ROOT:
        if not is_safe_key(patient_id):
            # From the archive, not from our code: data, and no reason to stop a run.
            raise PacsError("unsafe-patient-id", "PatientID is a unique key in the Patient Root")
        keys["PatientID"] = patient_id
    return keys


def _belongs(answer: Dataset, keyword: str, asked: str) -> bool:
    # Some archives leave the keys above the level out of their answers.
    uid = _uid(answer, keyword)
    return not uid or uid == normal_uid(asked)


def _study(answer: Dataset) -> Study:
    modalities = _text(answer, "ModalitiesInStudy").split("\\")
    texts = {keyword: _decoded_text(answer, keyword) for keyword in _STUDY_TEXTS}
    original = {keyword: _raw(answer, keyword) for keyword in _STUDY_TEXTS}
    return Study(
        study_instance_uid=_uid(answer, "StudyInstanceUID"),
        patient_id=texts["PatientID"].text,
        accession_number=texts["AccessionNumber"].text,
        study_date=_text(answer, "StudyDate"),
        modalities=tuple(m.strip() for m in modalities if m.strip()),
        study_description=texts["StudyDescription"].text,
        patient_name=texts["PatientName"].text,
        patient_birth_date=_text(answer, "PatientBirthDate"),
        original=tuple(
            (keyword, raw.hex())
            for keyword, raw in original.items()
            if not raw.isascii() or b"\x1b" in raw
        ),
        guessed=tuple(keyword for keyword, text in texts.items() if text.guessed),
        number_of_series=_count(answer, "NumberOfStudyRelatedSeries"),
        number_of_instances=_count(answer, "NumberOfStudyRelatedInstances"),
    )


def _uid(answer: Dataset, keyword: str) -> str:
    return normal_uid(_raw(answer, keyword).decode("latin-1"))


def _count(answer: Dataset, keyword: str) -> int | None:
    digits = _raw(answer, keyword).strip(b" \0")
    return int(digits) if digits.isdigit() and len(digits) <= 12 else None


def _text(answer: Dataset, keyword: str) -> str:
    return _decoded_text(answer, keyword).text


def _decoded_text(answer: Dataset, keyword: str) -> Text:
    """A text without its padding: leading and trailing blanks mean nothing, PS3.5 6.2."""
    declared = _raw(answer, "SpecificCharacterSet").decode("latin-1")
    text, guessed = decoded(_raw(answer, keyword), declared)
    return Text(text.strip(" \0"), guessed)


def _raw(answer: Dataset, keyword: str) -> bytes:
    """The value as it came, several joined by backslashes; pydicom converts next to nothing."""
    tag = tag_for_keyword(keyword)
    if tag is None or tag not in answer:
        return b""
    try:
        value = answer.get_item(tag).value
    except Exception:
        # An element with a length and no value is converted after all, and need not be one.
        return b""
    if isinstance(value, bytes):
        return value
    if value is None:
        return b""
    if isinstance(value, str):
        return value.encode("latin-1", "replace")
    return "\\".join(str(one) for one in value).encode("latin-1", "replace")
