"""Learn what a PACS node does, by a bounded number of requests that change nothing on it.

At most ``MOST_REQUESTS`` associations and requests, one after the other but for the last, which
try how many associations are served at a time. Every query names one study, series or range of
days, and is cancelled after ``MOST_ANSWERS`` answers. To try retrieval out, a handful of
instances of one study is asked for by UID, ``MOST_INSTANCES`` at most by one request (or one
short series, where the node sends no single ones), and thrown away. Nothing is sent to the node
to be stored, and nothing is moved elsewhere or deleted.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

from prefect_dicom.archive.spool import Spool
from prefect_dicom.cohort.row_matching import identifies, study_day, study_query
from prefect_dicom.config.capabilities import KeyHabit, Match, NodeProfile, QueryLevel, Service
from prefect_dicom.config.site import PacsNode, Site
from prefect_dicom.core.errors import PacsError, PrefectDicomError
from prefect_dicom.core.model import CohortRow, InformationModel, RetrieveMethod, Study
from prefect_dicom.core.uids import is_safe_key, is_uid, normal_uid
from prefect_dicom.network.association import Requestor
from prefect_dicom.network.echo import echo
from prefect_dicom.network.get import c_get
from prefect_dicom.network.move import move
from prefect_dicom.network.presentation_contexts import (
    COMMON_SYNTAXES,
    RARE_SYNTAXES,
    STORAGE_CLASSES,
    Breadth,
    proposals,
)
from prefect_dicom.network.probe import MODELS, Answers, ask, models_offered, negotiate, text
from prefect_dicom.network.query_keys import retrieve_identifier
from prefect_dicom.network.retrieve_result import RetrieveOutcome
from prefect_dicom.network.status import CANCEL, SUCCESS, reason_for_status
from prefect_dicom.network.storage_scp import Expectation, Intake, ReceiverLease
from prefect_dicom.retrieval.fetch import wait_until_arrived

MOST_REQUESTS = 120
"""Associations, queries and retrieves for one node."""
MOST_ANSWERS = 2000
"""To one query."""
MOST_INSTANCES = 3
"""By one retrieve."""
MOST_ASSOCIATIONS = 8
"""At the same time."""

_PROBE = 0
"""Study reference of what is retrieved; the ledger begins at 1."""
_WINDOWS_DAYS = (7, 90, 365, 3650)
_FIRST_DAY = date(1900, 1, 1)
_CAPPED = {CANCEL, 0xB001, 0xA700}
_FEW = 20
_CANDIDATES = 5
_SHORT_SERIES = 10
"""Instances of a series that is retrieved whole, where single ones cannot be had."""
_GETS = 6
"""Proposals of transfer syntaxes that are tried until an object comes."""
_GUESSES = 9
"""SOP classes that are proposed in all common syntaxes where the node tells none."""
_PATIENCE = {"acse_seconds": 10.0, "find_seconds": 30.0, "first_byte_seconds": 120.0}
_STALL_SECONDS = 30.0
_MOST_IN_A_ROW = 3
"""Queries that end without an answer, after which it is the node and not the question."""
_OF_THE_QUESTION = {"answer-unusable", "association-lost", "association-stalled", "pacs-silent"}
_NOT_FOR_US = {"not-permitted", "service-not-offered"}

_LIST_KEYS = ("StudyInstanceUID", "PatientID", "PatientName", "AccessionNumber", "StudyDate")
_OPTIONAL_KEYS = (
    "ModalitiesInStudy",
    "StudyDescription",
    "NumberOfStudyRelatedSeries",
    "NumberOfStudyRelatedInstances",
)
_OTHER_VALUES = {
    "PatientID": "NO-SUCH-VALUE-Z0",
    "AccessionNumber": "NO-SUCH-VALUE-Z0",
    "StudyDate": "18010101",
    "PatientName": "Nosuchvalue^Zz",
    "PatientBirthDate": "18010101",
    "PatientSex": "M",
    "ModalitiesInStudy": "ZZ",
    "StudyDescription": "NO-SUCH-VALUE-Z0",
}
"""Matching keys that are tried, each with a value that no study has (but for the sex)."""
_WITH_WILDCARDS = ("PatientID", "AccessionNumber")
_WITH_CASE = ("PatientID", "AccessionNumber", "PatientName", "StudyDescription")
_EVERYBODYS_CHARACTER_SETS = ("ISO_IR 192", "ISO_IR 100")


@dataclass(frozen=True, slots=True)
class Learnt:
    """What was learnt of a node, and what it took.

    ``notes`` say in words what could not be tried, and why.
    """

    profile: NodeProfile
    requests: int
    instances: int
    notes: tuple[str, ...] = ()


class _Enough(Exception):
    """The bound on requests is reached."""


@dataclass
class _Series:
    uid: str
    images: list[tuple[str, str]] = field(default_factory=list)
    """SOP Instance and SOP Class UIDs."""
    count: int | None = None


def learn(site: Site, name: str, row: CohortRow | None = None) -> Learnt:
    """Find out what a node does.

    Parameters
    ----------
    name : str
        Of the node in the site.
    row : CohortRow, optional
        Names the study to try with; by default a small recent one is looked for.

    Raises
    ------
    PrefectDicomError
        The node cannot be asked at all, and why; or the spool cannot be used.
    """
    learner = _Learner(site, site.nodes[name])
    with contextlib.ExitStack() as stack:
        stack.enter_context(learner.requestor)
        if site.receives:
            try:
                learner.lease = stack.enter_context(ReceiverLease(site))
            except PrefectDicomError as error:
                learner.notes.append(f"C-MOVE was not tried: the receiver does not run ({error})")
        else:
            learner.notes.append("C-MOVE was not tried: the site has no receiver")
        with contextlib.suppress(_Enough):
            learner.run(row)
    return Learnt(
        NodeProfile.model_validate(learner.facts),
        learner.requests,
        learner.instances,
        tuple(learner.notes),
    )


class _Learner:
    def __init__(self, site: Site, node: PacsNode) -> None:
        patience = {key: min(most, getattr(node.timeouts, key)) for key, most in _PATIENCE.items()}
        patience["stall_seconds"] = min(_STALL_SECONDS, node.timeouts.stall_seconds)
        timeouts = node.timeouts.model_copy(update=patience)
        self.site = site
        self.node = node.model_copy(update={"timeouts": timeouts})
        self.requestor = Requestor(self.node)
        self.lease: ReceiverLease | None = None
        self.facts: dict[str, Any] = {}
        self.notes: list[str] = []
        self.requests = 0
        self.instances = 0
        self._in_a_row = 0

    @property
    def _by_patient(self) -> bool:
        return self.node.information_model is InformationModel.PATIENT_ROOT

    def run(self, row: CohortRow | None) -> None:
        """All there is to learn, from what most depends on to what least does."""
        # Whether the node is there at all, and lets us in: what it raises says more.
        self._spend()
        echo(self.requestor)
        self._offers()
        if self.node.information_model in self.facts.get("find_models", InformationModel):
            self._by_queries(row)
        self._associations()
        self._advise()

    def _by_queries(self, row: CohortRow | None) -> None:
        listed = self._lists()
        studies = self._named(row) if row is not None else self._candidates(listed)
        if not studies:
            self.notes.append(
                "no study was found to try with: name one by --patient, --study or --accession"
            )
        else:
            self._answers_of_one(studies[0])
            self._uid_lists(listed or studies)
            self._keys(studies[0])
            self._character_sets([*studies, *listed])
            self._retrieves(studies[0])

    def _advise(self) -> None:
        """Note what a person should change in the site file."""
        own, other = (
            self.node.information_model,
            next(model for model in InformationModel if model is not self.node.information_model),
        )
        for service, key in (("C-FIND", "find_models"), ("C-MOVE", "move_models")):
            models = self.facts.get(key, (own,))
            if own not in models and other in models:
                self.notes.append(
                    f"{service} is offered in another model: set `information_model: {other}`"
                )
        by_get = self.node.retrieve is RetrieveMethod.C_GET
        mine, others = ("c_get", "c_move") if by_get else ("c_move", "c_get")
        came_to = self.facts.get(mine, Service.WORKS)
        if came_to is Service.WORKS or self.facts.get(others) is not Service.WORKS:
            return
        if by_get:
            words = "runs ask by C-MOVE; set `retrieve: c-move`"
        else:
            words = "try `prefect-dicom doctor` for the way back, or set `retrieve: c-get`"
        self.notes.append(f"{mine.replace('_', '-').upper()} came to {came_to}: {words}")

    # --- asking

    def _spend(self) -> None:
        if self.requests >= MOST_REQUESTS:
            self.notes.append(f"not all was tried: {MOST_REQUESTS} requests are enough")
            raise _Enough
        self.requests += 1

    def _spend_alone(self) -> None:
        """Before an association of another kind: some nodes serve one at a time."""
        self._spend()
        self.requestor.close()

    def _ask(
        self,
        level: str,
        match: Mapping[str, str | Sequence[str]],
        wanted: Iterable[str] = (),
        most: int = _FEW,
        character_set: str | None = None,
    ) -> Answers:
        """One query; without status and answers where the association ended over it."""
        self._spend()
        try:
            answers = ask(
                self.requestor, level, match, wanted, most=most, character_set=character_set
            )
        except PacsError as error:
            self._in_a_row += 1
            if error.code not in _OF_THE_QUESTION or self._in_a_row >= _MOST_IN_A_ROW:
                raise
            return Answers(None, ())
        self._in_a_row = 0
        return answers

    def _is_cut(self, answers: Answers) -> bool:
        """Whether there may be more than was answered, by the node's limit or by ours."""
        return bool(answers.rows) and (
            answers.status is None
            or answers.status in _CAPPED
            or len(answers.rows) == self.facts.get("answer_cap")
        )

    def _of(self, study: Mapping[str, bytes]) -> dict[str, str]:
        """The unique keys of a study."""
        keys = {"StudyInstanceUID": _plain(study, "StudyInstanceUID")}
        if self._by_patient:
            keys["PatientID"] = _plain(study, "PatientID")
        return keys

    # --- what it offers

    def _offers(self) -> None:
        self._spend_alone()
        try:
            models = models_offered(self.node)
        except PacsError as error:
            self.notes.append(f"information models were not tried: {error.code}")
            return
        self.facts["find_models"] = models["C-FIND"]
        self.facts["move_models"] = models["C-MOVE"]
        self.facts["get_models"] = models["C-GET"]
        if self.node.information_model not in models["C-MOVE"]:
            self.facts["c_move"] = Service.NOT_OFFERED
            return
        self._spend_alone()
        # Some dislike a proposal with anything optional in it.
        with contextlib.suppress(PacsError):
            model = MODELS["C-MOVE"][self.node.information_model]
            offer = negotiate(self.node, [(model, COMMON_SYNTAXES[1])], window=True)
            self.facts["asynchronous_operations"] = offer.window

    # --- lists and their ends

    def _lists(self) -> list[dict[str, bytes]]:
        """Ask for ever more days, until a list is long, cut, or all there is."""
        today = datetime.now(UTC).date() + timedelta(days=1)
        whole: tuple[dict[str, bytes], ...] = ()
        for first in [today - timedelta(days=days) for days in _WINDOWS_DAYS] + [_FIRST_DAY]:
            answers = self._between(first, today)
            if answers.status in _CAPPED:
                self.facts["answer_cap_status"] = f"{answers.status:04X}"
                if answers.rows:
                    self.facts["answer_cap"] = len(answers.rows)
                if whole:
                    self.facts["longest_list"] = len(whole)
                return list(answers.rows or whole)
            if answers.status is None and answers.rows:
                # As long as we want to have it.
                self.facts["longest_list"] = len(answers.rows)
                return list(answers.rows)
            if answers.status == SUCCESS:
                whole = answers.rows
        if whole:
            self._halves(whole, today)
        return list(whole)

    def _between(self, first: date, last: date) -> Answers:
        days = f"{first:%Y%m%d}-{last:%Y%m%d}"
        return self._ask("STUDY", {"StudyDate": days}, _LIST_KEYS, MOST_ANSWERS)

    def _halves(self, whole: Sequence[Mapping[str, bytes]], today: date) -> None:
        """Whether a part of a list shows more than the whole: it is cut, and nothing says so."""
        days = sorted(day for row in whole if (day := study_day(_raw(row, "StudyDate"))))
        if not days or days[0] == days[-1]:
            return
        middle = days[len(days) // 2]
        known = {_raw(row, "StudyInstanceUID") for row in whole}
        for first, last in ((_FIRST_DAY, middle), (middle, today)):
            half = self._between(first, last)
            if half.status != SUCCESS:
                return
            if not known.issuperset(_raw(row, "StudyInstanceUID") for row in half.rows):
                self.facts["answer_cap"] = len(whole)
                self.facts["answer_cap_status"] = f"{SUCCESS:04X}"
                return
        self.facts["longest_list"] = len(whole)

    # --- a study to try with

    def _named(self, row: CohortRow) -> list[dict[str, bytes]]:
        answers = self._ask("STUDY", study_query(row), (*_LIST_KEYS, *_OPTIONAL_KEYS))
        rows = answers.rows
        if not rows:
            rows = self._ask("STUDY", study_query(row), _LIST_KEYS).rows
        found = [one for one in rows if identifies(row, _study(one)) and self._can_be_named(one)]
        return self._with_details(found[:1])

    def _candidates(self, listed: Sequence[dict[str, bytes]]) -> list[dict[str, bytes]]:
        """Some studies, the one to try most things with first: small, and with all identifiers."""
        usable = [one for one in listed if self._can_be_named(one)]
        # Those that tell most of themselves, spread over the list.
        usable.sort(key=lambda one: -sum(bool(_raw(one, key)) for key in _LIST_KEYS))
        step = max(1, len(usable) // _CANDIDATES)
        return sorted(self._with_details(usable[::step][:_CANDIDATES]), key=_awkwardness)

    def _can_be_named(self, study: Mapping[str, bytes]) -> bool:
        if not is_safe_key(_plain(study, "StudyInstanceUID")):
            return False
        return not self._by_patient or is_safe_key(_plain(study, "PatientID"))

    def _with_details(self, studies: Iterable[dict[str, bytes]]) -> list[dict[str, bytes]]:
        """The studies with what they tell of the optional keys; learns whether they do."""
        detailed = []
        for study in studies:
            answers = self._ask("STUDY", self._of(study), (*_LIST_KEYS, *_OPTIONAL_KEYS))
            if not answers.found and "optional_return_keys" not in self.facts:
                # It was found before, by fewer keys.
                self.facts["optional_return_keys"] = False
            elif answers.found:
                self.facts.setdefault("optional_return_keys", True)
                study = {**study, **answers.rows[0]}
                self.facts["study_counts"] = all(
                    _count(study, key) is not None for key in _OPTIONAL_KEYS[2:]
                )
            detailed.append(study)
        return detailed

    # --- levels

    def _answers_of_one(self, study: dict[str, bytes]) -> None:
        levels = [QueryLevel.STUDY]
        patient = _plain(study, "PatientID")
        if is_safe_key(patient):
            answers = self._ask("PATIENT", {"PatientID": patient}, ["PatientName"])
            if any(_plain(row, "PatientID") == patient for row in answers.rows):
                levels.insert(0, QueryLevel.PATIENT)
        self._series = self._list_series(study)
        if self._series:
            levels.append(QueryLevel.SERIES)
            self._relational(self._series[0].uid)
            if self._list_images(study):
                levels.append(QueryLevel.IMAGE)
        self.facts["levels"] = levels

    def _list_series(self, study: Mapping[str, bytes]) -> list[_Series]:
        wanted = ("SeriesInstanceUID", "Modality", "NumberOfSeriesRelatedInstances")
        answers = self._ask("SERIES", self._of(study), wanted)
        rows = answers.rows
        if rows:
            counts = [_count(row, "NumberOfSeriesRelatedInstances") for row in rows]
            self.facts["series_counts"] = None not in counts
        else:
            rows = self._ask("SERIES", self._of(study), wanted[:1]).rows
            if rows:
                self.facts["series_counts"] = False
        return [
            _Series(uid, count=_count(row, "NumberOfSeriesRelatedInstances"))
            for row in rows
            if is_safe_key(uid := _plain(row, "SeriesInstanceUID"))
        ]

    def _relational(self, series: str) -> None:
        answers = self._ask("SERIES", {"SeriesInstanceUID": series}, ["StudyInstanceUID"])
        self.facts["relational_queries"] = any(
            _plain(row, "SeriesInstanceUID") == series for row in answers.rows
        )

    def _list_images(self, study: Mapping[str, bytes]) -> bool:
        """List the images of up to three series, until one has enough of them."""
        answered = False
        for series in sorted(self._series, key=_to_retrieve_from)[:3]:
            match = {**self._of(study), "SeriesInstanceUID": series.uid}
            answers = self._ask("IMAGE", match, ("SOPInstanceUID", "SOPClassUID"))
            series.images = [
                (sop, _plain(row, "SOPClassUID"))
                for row in answers.rows
                if is_safe_key(sop := _plain(row, "SOPInstanceUID"))
            ]
            answered = answered or bool(series.images)
            if len(series.images) >= MOST_INSTANCES:
                break
        return answered

    def _uid_lists(self, studies: Sequence[Mapping[str, bytes]]) -> None:
        uids = list(
            dict.fromkeys(uid for one in studies if is_uid(uid := _plain(one, "StudyInstanceUID")))
        )[:3]
        if len(uids) < 2 or self._by_patient:
            return
        match = {"StudyInstanceUID": uids}
        for key, level, wanted in (
            ("uid_lists_in_queries", "STUDY", ()),
            ("uid_lists_above", "SERIES", ("SeriesInstanceUID",)),
        ):
            answers = self._ask(level, match, wanted, most=10 * _FEW)
            found = {_plain(row, "StudyInstanceUID") for row in answers.rows}
            if found.issuperset(uids):
                self.facts[key] = True
            elif not self._is_cut(answers):
                self.facts[key] = False

    # --- keys

    def _keys(self, study: dict[str, bytes]) -> None:
        habits = {}
        rows = self._ask("STUDY", self._of(study), _OTHER_VALUES).rows
        spoil = set() if rows else {k for k in _OTHER_VALUES if not self._returns(study, k)}
        study = {**study, **(rows[0] if rows else {})}
        for key in _OTHER_VALUES:
            if key in spoil:
                habits[key] = KeyHabit(match=Match.EMPTIES)
                continue
            value = _plain(study, key).split("\\")[0]
            habit = self._key(study, key, value if is_safe_key(value) else "")
            if habit.match is not None:
                habits[key] = habit
        self.facts["keys"] = habits

    def _returns(self, study: dict[str, bytes], key: str) -> bool:
        """Whether the study is found when this key alone is to be returned; notes its value."""
        rows = self._ask("STUDY", self._of(study), [key]).rows
        if rows:
            study.update(rows[0])
        return bool(rows)

    def _key(self, study: dict[str, bytes], key: str, value: str) -> KeyHabit:
        """What becomes of a query for the study with one more key."""

        def found(value: str) -> bool:
            return bool(self._ask("STUDY", {**self._of(study), key: value}).rows)

        other = _OTHER_VALUES[key]
        if found("F" if other == value else other):
            return KeyHabit(match=Match.IGNORED)
        if not value:
            return KeyHabit()
        if not found(value):
            return KeyHabit(match=Match.EMPTIES)
        swapped = value.swapcase()
        return KeyHabit(
            match=Match.MATCHED,
            wildcards=found(f"{value[:1]}*") if key in _WITH_WILDCARDS else None,
            case_sensitive=not found(swapped) if key in _WITH_CASE and swapped != value else None,
        )

    def _character_sets(self, studies: Sequence[dict[str, bytes]]) -> None:
        declared = {_raw(study, "SpecificCharacterSet") or "ISO_IR 6" for study in studies}
        self.facts["answer_character_sets"] = sorted(declared)
        habit = self.facts["keys"].get("PatientName")
        if habit is None or habit.match is not Match.MATCHED:
            return
        for study in studies:
            name = text(study, "PatientName")
            if name and not name.isascii() and self._can_be_named(study) and is_safe_key(name):
                break
        else:
            return
        own = _raw(study, "SpecificCharacterSet")
        understood = []
        for one in dict.fromkeys((own, *_EVERYBODYS_CHARACTER_SETS)):
            with contextlib.suppress(ValueError, LookupError):
                match = {**self._of(study), "PatientName": name}
                if one and self._ask("STUDY", match, character_set=one).rows:
                    understood.append(one)
        self.facts["query_character_sets"] = understood

    # --- retrieval

    def _retrieves(self, study: dict[str, bytes]) -> None:
        some = next((s for s in sorted(self._series, key=_to_retrieve_from) if s.images), None)
        if some is None:
            self.notes.append(
                "no retrieval was tried: the node lists no instance of the study tried"
            )
            return
        sop_class = some.images[0][1]
        images = [sop for sop, its_class in some.images if its_class == sop_class]
        self._spool = Spool(self.site.spool.path, self.site.spool.reserve_bytes)
        self._spool.drop(_PROBE)
        try:
            for service in self._services(sop_class):
                key = "c_get" if service == "C-GET" else "c_move"
                self.facts[key] = self._try(service, study, some, images[:1], sop_class)
                many = images[:MOST_INSTANCES]
                if (
                    self.facts[key] is Service.WORKS
                    and self.facts.get("image_level_retrieve")
                    and "uid_lists_in_retrieves" not in self.facts
                    and len(many) > 1
                ):
                    self._try_list(service, study, some, many, sop_class)
        finally:
            self._spool.drop(_PROBE)

    def _services(self, sop_class: str) -> Iterator[str]:
        """What is worth a try, the configured one first."""
        own = "C-GET" if self.node.retrieve is RetrieveMethod.C_GET else "C-MOVE"
        for service in sorted(("C-MOVE", "C-GET"), key=lambda one: one != own):
            if service == "C-GET":
                if self._get_offer(sop_class):
                    yield service
            elif self.lease is not None and "c_move" not in self.facts:
                yield service

    def _get_offer(self, sop_class: str) -> bool:
        """What the node grants to a C-GET; whether there is any sense in one."""
        model = self.node.information_model
        if model not in self.facts.get("get_models", (model,)):
            self.facts["c_get"] = Service.NOT_OFFERED
            return False
        if is_uid(sop_class):
            classes, syntaxes = [sop_class], COMMON_SYNTAXES + RARE_SYNTAXES
        else:
            # It does not tell the classes of its instances.
            classes, syntaxes = STORAGE_CLASSES[:_GUESSES], COMMON_SYNTAXES
        proposed = [(MODELS["C-GET"][model], COMMON_SYNTAXES[1])]
        proposed += [(one, syntax) for one in classes for syntax in syntaxes]
        self._spend_alone()
        try:
            offer = negotiate(self.node, proposed, roles=classes)
        except PacsError as error:
            if error.code not in _NOT_FOR_US:
                raise
            self.facts["c_get"] = Service.REFUSED
            return False
        self.facts["get_roles"] = not offer.scp_roles.isdisjoint(classes)
        accepted = {syntax for abstract, syntax in offer.accepted if abstract in classes}
        self.facts["get_transfer_syntaxes"] = [s for s in syntaxes if s in accepted]
        if not self.facts["get_roles"] or not accepted:
            self.facts["c_get"] = Service.REFUSED
            return False
        return True

    def _try(
        self,
        service: str,
        study: dict[str, bytes],
        series: _Series,
        images: Sequence[str],
        sop_class: str,
    ) -> Service | None:
        """Retrieve one instance, or the whole of a small series where no instance can be had."""
        outcome = self._retrieve(service, study, series, images, sop_class)
        came = self._taken()
        if came:
            # More than was asked for: the level is not heeded.
            self.facts["image_level_retrieve"] = came == 1
            return Service.WORKS
        code = outcome.lost or _reason(service, outcome)
        if code in _NOT_FOR_US or code == "sop-classes-refused":
            return Service.REFUSED
        if self.facts.get("image_level_retrieve"):
            return Service.NOTHING_ARRIVED
        if len(series.images) > _SHORT_SERIES:
            if code != "request-refused":
                return Service.NOTHING_ARRIVED
            self.facts["image_level_retrieve"] = False
            self.notes.append("the node sends no single instances, and no series is short enough")
            return None
        self._retrieve(service, study, series, (), sop_class)
        if self._taken():
            self.facts["image_level_retrieve"] = False
            return Service.WORKS
        return Service.NOTHING_ARRIVED

    def _try_list(
        self,
        service: str,
        study: dict[str, bytes],
        series: _Series,
        images: Sequence[str],
        sop_class: str,
    ) -> None:
        outcome = self._retrieve(service, study, series, images, sop_class)
        came = self._taken()
        if came == len(images):
            self.facts["uid_lists_in_retrieves"] = True
        elif outcome.status == SUCCESS or _reason(service, outcome) == "request-refused":
            self.facts["uid_lists_in_retrieves"] = False

    def _retrieve(
        self,
        service: str,
        study: Mapping[str, bytes],
        series: _Series,
        images: Sequence[str],
        sop_class: str,
    ) -> RetrieveOutcome:
        uid = _plain(study, "StudyInstanceUID")
        identifier = retrieve_identifier(
            self.node.information_model,
            "IMAGE" if images else "SERIES",
            _plain(study, "PatientID"),
            [uid],
            [series.uid],
            images,
        )
        studies = {normal_uid(uid): _PROBE}
        outcome = RetrieveOutcome(None)
        if service == "C-MOVE":
            return self._move(identifier, studies, len(images) or len(series.images))
        classes = [sop_class] if is_uid(sop_class) else STORAGE_CLASSES
        tried = 0
        # dcmqrscp takes the first context of a class, whatever the object is in.
        for breadth in (Breadth.COMMON, Breadth.ALL, Breadth.SINGLE):
            for _, contexts in proposals(classes, breadth):
                self._spend_alone()
                try:
                    intake = Intake(self._spool, Expectation(studies))
                    outcome = c_get(self.node, identifier, contexts=contexts, intake=intake)
                except PacsError as error:
                    outcome = RetrieveOutcome(None, lost=error.code)
                tried += 1
                code = outcome.lost or _reason(service, outcome)
                if self._arrived() or code in _NOT_FOR_US or tried == _GETS:
                    return outcome
        return outcome

    def _move(self, identifier, studies: Mapping[str, int], wanted: int) -> RetrieveOutcome:
        self._spend()
        quiet = self.node.timeouts.settle_seconds
        with self.lease.expecting(studies, self.node.calling_ae_title) as expected:
            title = self.site.receiver.ae_title
            outcome = move(self.requestor, identifier, title, expected.message_id)
            ended = time.monotonic()
            arrived = expected.arrived()
            if outcome.status == SUCCESS and arrived.objects < wanted:
                wait_until_arrived(expected, wanted, quiet)
                arrived = expected.arrived()
                if arrived.objects:
                    late = time.monotonic() - ended - arrived.quiet_seconds
                    self._settled(max(late, 0.0))
            elif arrived.objects:
                self._settled(0.0)
            if arrived.objects:
                self.facts["originator"] = arrived.by_originator == arrived.objects
        return outcome

    def _settled(self, seconds: float) -> None:
        # To the tenth above: what is asked for it is not asked more often.
        seconds = math.ceil(seconds * 10) / 10
        self.facts["settle_seconds"] = max(seconds, self.facts.get("settle_seconds", 0.0))

    def _arrived(self) -> int:
        return len(list(self._spool.files(_PROBE)))

    def _taken(self) -> int:
        """How many objects have come; they are thrown away."""
        came = self._arrived()
        self.instances += came
        self._spool.drop(_PROBE)
        return came

    # --- associations

    def _associations(self) -> None:
        """How many associations are served at the same time; some are accepted and wait."""
        self.requestor.close()
        most = min(MOST_ASSOCIATIONS, self.node.limits.associations + 2)
        served = 0
        with contextlib.ExitStack() as stack:
            for _ in range(most):
                requestor = stack.enter_context(Requestor(self.node))
                self._spend()
                try:
                    echo(requestor)
                except PacsError:
                    break
                served += 1
        if served:
            self.facts["associations"] = served


# --- reading answers


def _raw(row: Mapping[str, bytes], keyword: str) -> str:
    return row.get(keyword, b"").decode("latin-1")


def _plain(row: Mapping[str, bytes], keyword: str) -> str:
    """A value in ASCII; empty where it is none."""
    value = _raw(row, keyword)
    return value if value.isascii() else ""


def _count(row: Mapping[str, bytes], keyword: str) -> int | None:
    digits = _plain(row, keyword)
    return int(digits) if digits.isdigit() and len(digits) < 12 else None


def _study(row: Mapping[str, bytes]) -> Study:
    return Study(
        normal_uid(_raw(row, "StudyInstanceUID")),
        _raw(row, "PatientID"),
        _raw(row, "AccessionNumber"),
    )


def _awkwardness(study: Mapping[str, bytes]) -> tuple[int, int]:
    """Sorts the study first with which most can be tried, for the least to be sent."""
    telling = sum(bool(_plain(study, key)) for key in _OTHER_VALUES)
    letters = _plain(study, "PatientID").upper() != _plain(study, "PatientID").lower()
    count = _count(study, "NumberOfStudyRelatedInstances")
    enough = count is None or count >= MOST_INSTANCES
    return -(telling + letters + 2 * enough), count or 0


def _to_retrieve_from(series: _Series) -> tuple[bool, int]:
    """Sorts the shortest series first that has enough instances for a list."""
    count = len(series.images) or series.count or 0
    return count < MOST_INSTANCES, count


def _reason(service: str, outcome: RetrieveOutcome) -> str | None:
    return None if outcome.status is None else reason_for_status(service, outcome.status)
