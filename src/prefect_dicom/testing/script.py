"""The script of a :class:`~prefect_dicom.testing.pacs.ScriptedPacs`: misbehaviour as data.

Before a request is carried out it is a *plan*: the answer to an association request, the answers
of a C-FIND, or the sub-operations and final status of a C-MOVE or C-GET. A behaviour edits the
plan, and the PACS then does what the plan says. :data:`KNOBS` is the table of all behaviours; a
further one is a further row.

Examples
--------
>>> Behaviour("find.cap", answers=5, times=1)
Behaviour('find.cap', answers=5, times=1)
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pydicom.dataset import Dataset

from prefect_dicom.testing.answering import ANSWERS
from prefect_dicom.testing.associating import ASSOCIATIONS, AssociationPlan, End
from prefect_dicom.testing.content import CONTENT, alter, transcoded
from prefect_dicom.testing.instances import StoredInstance, with_elements
from prefect_dicom.testing.matching import UNIQUE_KEYS, matches, select

if TYPE_CHECKING:
    from prefect_dicom.testing.pacs import ScriptedPacs

SUCCESS = 0x0000
CANCEL = 0xFE00
PENDING = 0xFF00
UNABLE_TO_PROCESS = 0xC000
DESTINATION_UNKNOWN = 0xA801
IDENTIFIER_DOES_NOT_MATCH = 0xA900
NOT_AUTHORISED = 0x0124


class Stage(StrEnum):
    """When a behaviour edits the plan."""

    CONNECT = "connect"
    """A connection has come, nothing has been read from it."""
    ASSOCIATE = "associate"
    """The association request is known, nothing has been answered."""
    FIND_QUERY = "find-query"
    """The keys are known, nothing has been matched."""
    FIND_ANSWER = "find-answer"
    """The answers are known, none has been sent."""
    FIND_DONE = "find-done"
    """The final response is about to be sent; the answers have been."""
    RETRIEVE = "retrieve"
    """The sub-operations are known, none has been made."""


@dataclass(eq=False)
class SubOperation:
    """One C-STORE to be sent.

    ``counted`` is False for what the peer did not ask for and is not told of; ``originator``
    is False where the Move Originator fields (PS3.7 9.1.1.1) are left out; ``readable`` is False
    where the PACS cannot read its own copy: it fails without being sent.
    """

    stored: StoredInstance
    sop_instance_uid: str
    data: Callable[[], bytes]
    counted: bool = True
    originator: bool = True
    readable: bool = True

    @classmethod
    def of(cls, stored: StoredInstance, **changes: Any) -> SubOperation:
        """The honest sub-operation for an object."""
        values = {"sop_instance_uid": stored.sop_instance_uid, "data": stored.encoded} | changes
        return cls(stored, **values)


@dataclass
class Connection:
    """What may happen to the request's own association, by the number of answers before it."""

    hold_before: dict[int, threading.Event] = field(default_factory=dict)
    pause_seconds: float = 0
    """Waited for before each answer."""
    drop_after: int | None = None
    drop_by: End = field(default_factory=End)
    mute_after: int | None = None
    """From here on nothing is sent, and nothing that comes is heeded: no abort either."""
    restart_after: int | None = None
    """The whole PACS goes down here, and comes back when ``back`` is set (None: at once)."""
    back: threading.Event | None = None


@dataclass
class FindPlan:
    """A C-FIND about to be answered."""

    pacs: ScriptedPacs
    level: str
    keys: dict[str, str]
    """The matching keys, by keyword."""
    declared: str = ""
    """The query's Specific Character Set."""
    matches: Callable[[str, str, str], bool] = matches
    """Whether an attribute (its keyword) matches a key (its text) by a value."""
    answers: list[Dataset] = field(default_factory=list)
    matched: bool = False
    """Whether the answers are known."""
    refuse: int | None = None
    """A final status to answer at once."""
    pending: int = PENDING
    """The status of each answer."""
    rewritten: dict[int, Callable[[bytes], bytes | None]] = field(default_factory=dict)
    """By the number of the answer: its bytes as they are sent; None: without a data set."""
    astray: set[int] = field(default_factory=set)
    """Numbers of the answers that respond to the message before."""
    status: int = SUCCESS
    connection: Connection = field(default_factory=Connection)

    def concerns(self, study: str) -> bool:
        """Whether a query asks for, or an answer is of, this study."""
        if self.matched:
            return any(a.get("StudyInstanceUID") == study for a in self.answers)
        found = select(self.pacs.holdings, self.level, self.keys)
        return any(known["StudyInstanceUID"] == study for known, _ in found)


@dataclass
class RetrievePlan:
    """A C-MOVE or C-GET about to be carried out."""

    pacs: ScriptedPacs
    level: str
    operations: list[SubOperation]
    service: str = "C-MOVE"
    keys: dict[str, str] = field(default_factory=dict)
    """The unique keys, by keyword."""
    refuse: int | None = None
    """A final status to answer at once; nothing is sent."""
    status: int | None = None
    """The final status; None: what the sub-operations' results make it."""
    count: bool = True
    """False: all counters of the responses are zero."""
    counts: tuple[int | None, ...] | None = None
    """Remaining, completed, failed and warning, in place of the true ones, in every response."""
    disown: bool = False
    """Every sub-operation is counted as failed, whatever became of it."""
    pendings: bool = True
    failed_list: Callable[[list[str]], list[str]] | None = None
    """Makes another Failed SOP Instance UID List of the true one."""
    final_before: int | None = None
    """The final response goes out before this many sub-operations have been made."""
    stop_at_failure: bool = False
    stop_at_class: bool = False
    """Stop at the first object for which the association has no presentation context."""
    keep_sending: bool = False
    """Go on with the sub-operations when the request's association has been lost."""
    on_cancel: str = "stop"
    """What a C-CANCEL does: stop, ignore, answer (FE00, and go on sending) or abort."""
    late: list[SubOperation] = field(default_factory=list)
    """Sent after the final response, when ``late_hold`` is set."""
    late_hold: threading.Event | None = None
    turn: threading.Semaphore | None = None
    """To be had before anything is sent."""
    each_association: int | None = None
    """How many objects go over one association to the destination; None: as many as it takes."""
    empty_associations: int = 0
    """Opened to the destination first, with nothing sent over them."""
    empty_stay_open: bool = False
    window: int = 1
    """C-STORE requests that are sent before the response to the first is read."""
    nagle: bool = False
    """Command and data set go out in segments of their own, and the second waits for the ACK."""
    connection: Connection = field(default_factory=Connection)

    def concerns(self, study: str) -> bool:
        """Whether an object of this study is to be sent."""
        return any(o.stored.study_instance_uid == study for o in self.operations)


Plan = AssociationPlan | FindPlan | RetrievePlan


class Behaviour:
    """One line of the script.

    Parameters
    ----------
    knob : str
        A name in :data:`KNOBS`.
    service : str, optional
        Only requests of this service ("A-ASSOCIATE", "C-FIND", "C-MOVE", "C-GET").
    on_request : int, optional
        Only the request with this number, counted for each service from 1; every connection
        that comes is a request of A-ASSOCIATE.
    study : str, optional
        Only requests that concern this StudyInstanceUID, and of those only its objects.
    times : int, optional
        Only so many times; requests at which the knob found nothing to do do not count.
    probability : float, optional
        Only by lot, drawn for each request that all of the above lets through.
    seed : int
        Of these lots: the same seed draws the same ones.
    **arguments
        Those of the knob.

    Raises
    ------
    ValueError
        If there is no such knob.
    TypeError
        If the knob does not have such arguments.
    """

    def __init__(
        self,
        knob: str,
        *,
        service: str | None = None,
        on_request: int | None = None,
        study: str | None = None,
        times: int | None = None,
        probability: float | None = None,
        seed: int = 0,
        **arguments: Any,
    ) -> None:
        if knob not in KNOBS:
            raise ValueError(f"no knob {knob!r}; there are {', '.join(sorted(KNOBS))}")
        self.knob = knob
        self.service = service
        self.on_request = on_request
        self.study = study
        self.times = times
        self.probability = probability
        self.seed = seed
        self.arguments = arguments
        self.chosen: dict[str, frozenset[str]] = {}
        """Per study: the SOP Instance UIDs picked by number, so that it stays with them."""
        self._lock = threading.Lock()
        self._lots = random.Random(seed)
        self._used = 0
        self._row = KNOBS[knob]
        inspect.signature(self._row.apply).bind(None, self, **arguments)

    def __repr__(self) -> str:
        limits = {
            "service": self.service,
            "on_request": self.on_request,
            "study": self.study,
            "times": self.times,
            "probability": self.probability,
            "seed": self.seed or None,
        }
        words = self.arguments | {k: v for k, v in limits.items() if v is not None}
        return f"Behaviour({self.knob!r}{''.join(f', {k}={v!r}' for k, v in words.items())})"

    @property
    def used(self) -> int:
        """How many requests it has changed."""
        return self._used

    def apply(self, stage: Stage, service: str, number: int, plan: Plan) -> None:
        """Edit the plan of the service's request with this number, if it is its turn."""
        if stage not in self._row.stages:
            return
        if self.service not in (None, service):
            return
        if self.on_request not in (None, number):
            return
        if self.study is not None and not plan.concerns(self.study):
            return
        with self._lock:
            if self.times is not None and self._used >= self.times:
                return
            if self.probability is not None and self._lots.random() >= self.probability:
                return
            if self._row.apply(plan, self, **self.arguments) is not False:
                self._used += 1

    def pick(
        self, operations: Iterable[SubOperation], instances: int | Sequence[str]
    ) -> list[SubOperation]:
        """The sub-operations meant by ``instances``.

        A number means so many of each study, the last ones of the first request that sends
        it; the same ones in later requests. UIDs mean themselves.
        """
        operations = [o for o in operations if self.study in (None, o.stored.study_instance_uid)]
        if not isinstance(instances, int):
            return [o for o in operations if o.stored.sop_instance_uid in instances]
        by_study: dict[str, list[str]] = {}
        for operation in operations:
            by_study.setdefault(operation.stored.study_instance_uid, []).append(
                operation.stored.sop_instance_uid
            )
        for study, uids in by_study.items():
            self.chosen.setdefault(study, frozenset(uids[max(0, len(uids) - instances) :]))
        return [
            o
            for o in operations
            if o.stored.sop_instance_uid in self.chosen[o.stored.study_instance_uid]
        ]


@dataclass(frozen=True)
class Knob:
    """One row of the table: what a real PACS was seen to do, and how the plan comes to it.

    ``apply`` may return False to say that it found nothing to do.
    """

    name: str
    stages: tuple[Stage, ...]
    meaning: str
    apply: Callable[..., bool | None]

    @property
    def arguments(self) -> dict[str, Any]:
        """The knob's own arguments with their defaults; ``inspect.Parameter.empty``: none."""
        parameters = list(inspect.signature(self.apply).parameters.values())[2:]
        return {parameter.name: parameter.default for parameter in parameters}


# --- C-FIND


def _cap(
    plan: FindPlan,
    by: Behaviour,
    *,
    answers: int,
    status: int = CANCEL,
    order: str = "",
    level: str = "",
) -> bool:
    if len(plan.answers) <= answers or level not in ("", plan.level):
        return False
    if order:
        plan.answers.sort(key=lambda answer: str(answer.get(order, "")))
    del plan.answers[answers:]
    plan.status = status
    return True


def _ignore_keys(plan: FindPlan, by: Behaviour, *, keys: Sequence[str]) -> bool:
    ignored = [key for key in keys if plan.keys.get(key)]
    for key in ignored:
        plan.keys[key] = ""
    return bool(ignored)


def _no_image_level(plan: FindPlan, by: Behaviour, *, status: int = UNABLE_TO_PROCESS) -> bool:
    if plan.level != "IMAGE":
        return False
    plan.refuse = status
    return True


def _refuse_find(plan: FindPlan, by: Behaviour, *, status: int) -> None:
    plan.refuse = status


# --- C-MOVE and C-GET


def _success_nothing(plan: RetrievePlan, by: Behaviour) -> None:
    plan.operations.clear()
    plan.status = SUCCESS


def _early_success(
    plan: RetrievePlan, by: Behaviour, *, after: int = 0, hold: threading.Event | None = None
) -> None:
    plan.status = SUCCESS
    plan.final_before = after
    plan.keep_sending = True
    if hold is not None:
        plan.connection.hold_before[after] = hold


def _drop_instances(plan: RetrievePlan, by: Behaviour, *, instances: int | Sequence[str]) -> bool:
    dropped = by.pick(plan.operations, instances)
    plan.operations[:] = [o for o in plan.operations if o not in dropped]
    return bool(dropped)


def _zero_counts(plan: RetrievePlan, by: Behaviour, *, status: int | None = None) -> None:
    plan.count = False
    plan.status = status


def _final_status(plan: RetrievePlan, by: Behaviour, *, status: int) -> None:
    plan.status = status


def _refuse_retrieve(plan: RetrievePlan, by: Behaviour, *, status: int) -> None:
    plan.refuse = status


def _unknown_destination(
    plan: RetrievePlan, by: Behaviour, *, status: int = DESTINATION_UNKNOWN
) -> None:
    plan.refuse = status


def _stop_at_failure(plan: RetrievePlan, by: Behaviour) -> None:
    plan.stop_at_failure = True


def _fail_but_all(plan: RetrievePlan, by: Behaviour, *, status: int = UNABLE_TO_PROCESS) -> None:
    plan.status = status
    plan.disown = True


def _bad_counts(
    plan: RetrievePlan, by: Behaviour, *, counts: tuple[int | None, ...] = (70_000, -1, 0, 3)
) -> None:
    plan.counts = counts


def _no_pending(plan: RetrievePlan, by: Behaviour) -> None:
    plan.pendings = False


def _no_originator(plan: RetrievePlan, by: Behaviour) -> bool:
    for operation in plan.operations:
        operation.originator = False
    return plan.service == "C-MOVE" and bool(plan.operations)


def _failed_list(plan: RetrievePlan, by: Behaviour, *, uids: Sequence[str] = ()) -> None:
    plan.failed_list = lambda _: list(uids)


def _no_list(plan: RetrievePlan, by: Behaviour, *, status: int | None = None) -> bool:
    key = plan.keys.get(UNIQUE_KEYS[plan.level], "")
    if "\\" not in key:
        return False
    plan.refuse = status
    first = key.split("\\")[0]
    plan.operations[:] = [
        o for o in plan.operations if o.stored.attributes.get(UNIQUE_KEYS[plan.level]) == first
    ]
    return True


def _no_retrieve_at_image_level(
    plan: RetrievePlan, by: Behaviour, *, status: int | None = IDENTIFIER_DOES_NOT_MATCH
) -> bool:
    if plan.level != "IMAGE":
        return False
    plan.refuse = status
    study = {"StudyInstanceUID": plan.keys.get("StudyInstanceUID", "")}
    plan.operations[:] = [
        SubOperation.of(stored)
        for members in plan.pacs.holdings.studies(study)
        for stored in members
    ]
    return True


def _disabled(plan: RetrievePlan, by: Behaviour, *, status: int | None = NOT_AUTHORISED) -> bool:
    if plan.service != "C-GET":
        return False
    plan.refuse = status
    if status is None:
        plan.connection.drop_after = 0
    return True


def _stop_on_class(plan: RetrievePlan, by: Behaviour) -> None:
    plan.stop_at_class = True


def _keep_sending(plan: RetrievePlan, by: Behaviour) -> None:
    plan.keep_sending = True


def _late(
    plan: RetrievePlan,
    by: Behaviour,
    *,
    hold: threading.Event,
    instances: int | Sequence[str] = 1,
) -> bool:
    plan.late = by.pick(plan.operations, instances)
    plan.late_hold = hold
    plan.operations[:] = [o for o in plan.operations if o not in plan.late]
    plan.status = SUCCESS
    return bool(plan.late)


def _ignore_cancel(plan: RetrievePlan, by: Behaviour, *, how: str = "ignore") -> None:
    plan.on_cancel = how


def _many_assocs(plan: RetrievePlan, by: Behaviour, *, each: int = 1) -> bool:
    plan.each_association = each
    return len(plan.operations) > each


def _empty_assoc(
    plan: RetrievePlan, by: Behaviour, *, associations: int = 1, stay_open: bool = False
) -> None:
    plan.empty_associations = associations
    plan.empty_stay_open = stay_open


def _queue(plan: RetrievePlan, by: Behaviour, *, turn: threading.Semaphore) -> None:
    plan.turn = turn


def _corrupt(plan: RetrievePlan, by: Behaviour, *, instances: int | Sequence[str] = 1) -> bool:
    picked = by.pick(plan.operations, instances)
    for operation in picked:
        operation.readable = False
    return bool(picked)


# --- what arrives


def _async_flood(plan: RetrievePlan, by: Behaviour, *, window: int = 1000) -> bool:
    plan.window = window
    return len(plan.operations) > 1


def _nagle(plan: RetrievePlan, by: Behaviour) -> None:
    plan.nagle = True


def _truncate(
    plan: RetrievePlan,
    by: Behaviour,
    *,
    instances: int | Sequence[str] = 1,
    keep: float = 0.5,
    less_bytes: int = 0,
    behind: bytes = b"",
) -> bool:
    def cut(data: bytes, stored: StoredInstance) -> bytes:
        length = int(len(data) * keep) // 2 * 2  # a PDV of odd length is another fault
        return data[: length - less_bytes] + behind

    return alter(plan, by, instances, cut)


def _other_patient(
    plan: RetrievePlan,
    by: Behaviour,
    *,
    instances: int | Sequence[str] = 1,
    patient_id: str = "OTHER-000001",
) -> bool:
    other = {"PatientID": patient_id, "PatientName": "Other^Patient"}
    return alter(
        plan,
        by,
        instances,
        lambda data, stored: with_elements(data, stored.transfer_syntax_uid, other),
    )


def _duplicate(plan: RetrievePlan, by: Behaviour, *, instances: int | Sequence[str] = 1) -> bool:
    return _insert_behind(plan, by, instances, lambda stored: stored)


def _conflict(
    plan: RetrievePlan,
    by: Behaviour,
    *,
    instances: int | Sequence[str] = 1,
    transfer_syntax_uid: str | None = None,
) -> bool:
    def second(stored: StoredInstance) -> StoredInstance:
        own = stored.transfer_syntax_uid
        other, comment = transfer_syntax_uid or own, {"ImageComments": "Second version."}

        def data() -> bytes:
            if transfer_syntax_uid is None:
                return with_elements(stored.encoded(), own, comment)
            return transcoded(stored.encoded(), own, other)

        return replace(stored, transfer_syntax_uid=other, encoded=data)

    return _insert_behind(plan, by, instances, second)


def _insert_behind(
    plan: RetrievePlan,
    by: Behaviour,
    instances: int | Sequence[str],
    again: Callable[[StoredInstance], StoredInstance],
) -> bool:
    picked = by.pick(plan.operations, instances)
    for operation in picked:
        copy = SubOperation.of(again(operation.stored), counted=False)
        plan.operations.insert(plan.operations.index(operation) + 1, copy)
    return bool(picked)


def _unsolicited(
    plan: RetrievePlan,
    by: Behaviour,
    *,
    objects: Sequence[StoredInstance],
    originator: bool = False,
) -> bool:
    plan.operations[:0] = [
        SubOperation.of(stored, counted=False, originator=originator) for stored in objects
    ]
    return bool(objects)


# --- the archive and the connection


def _mutate(
    plan: FindPlan, by: Behaviour, *, change: Callable[[ScriptedPacs], None], level: str = "IMAGE"
) -> bool:
    if plan.level != level:
        return False
    change(plan.pacs)
    return True


def _drop_after(
    plan: FindPlan | RetrievePlan,
    by: Behaviour,
    *,
    answers: int,
    how: str = "abort",
    source: int = 0,
    reason: int = 0,
    keep_sending: bool = False,
) -> bool:
    length = len(plan.operations if isinstance(plan, RetrievePlan) else plan.answers)
    if length < answers:
        return False
    plan.connection.drop_after = answers
    plan.connection.drop_by = End(how, source, reason)
    if isinstance(plan, RetrievePlan):
        plan.keep_sending = keep_sending
    return True


def _first_byte(plan: FindPlan | RetrievePlan, by: Behaviour, *, hold: threading.Event) -> None:
    plan.connection.hold_before[0] = hold


def _stall_after(
    plan: FindPlan | RetrievePlan, by: Behaviour, *, answers: int, hold: threading.Event
) -> bool:
    length = len(plan.operations if isinstance(plan, RetrievePlan) else plan.answers)
    plan.connection.hold_before[answers] = hold
    return answers < length


def _slow(plan: FindPlan | RetrievePlan, by: Behaviour, *, seconds: float) -> None:
    plan.connection.pause_seconds = seconds


def _blackhole(plan: FindPlan | RetrievePlan, by: Behaviour, *, answers: int = 0) -> bool:
    length = len(plan.operations if isinstance(plan, RetrievePlan) else plan.answers)
    plan.connection.mute_after = answers
    return answers <= length


def _restart(
    plan: FindPlan | RetrievePlan,
    by: Behaviour,
    *,
    answers: int = 0,
    back: threading.Event | None = None,
) -> bool:
    length = len(plan.operations if isinstance(plan, RetrievePlan) else plan.answers)
    plan.connection.restart_after = answers
    plan.connection.back = back
    return answers <= length


_ANY = (Stage.FIND_ANSWER, Stage.RETRIEVE)

_TABLE = (
    *(Knob(name, (Stage(stage),), meaning, apply) for name, stage, meaning, apply in ASSOCIATIONS),
    Knob(
        "find.cap",
        (Stage.FIND_ANSWER,),
        "Ends after `answers` matches with `status` (FE00, A700, B001, or plain success 0000): "
        "the first ones in the `order` of an attribute, or as they were stored; at one `level` or "
        "at all.",
        _cap,
    ),
    Knob("find.ignore_keys", (Stage.FIND_QUERY,), "Does not match by these `keys`.", _ignore_keys),
    Knob(
        "find.no_image_level",
        (Stage.FIND_QUERY,),
        "Answers queries at IMAGE level with `status`; 0000 makes it an empty list.",
        _no_image_level,
    ),
    *(
        Knob(name, tuple(map(Stage, stages)), meaning, apply)
        for name, stages, meaning, apply in ANSWERS
    ),
    Knob(
        "find.refuse", (Stage.FIND_QUERY,), "Answers with `status` and nothing else.", _refuse_find
    ),
    Knob(
        "move.success_nothing",
        (Stage.RETRIEVE,),
        "Reports success and sends nothing.",
        _success_nothing,
    ),
    Knob(
        "move.early_success",
        (Stage.RETRIEVE,),
        "Reports success when `after` instances are sent; the others follow when `hold` is set.",
        _early_success,
    ),
    Knob(
        "move.drop_instances",
        (Stage.RETRIEVE,),
        "Never sends these `instances` (UIDs, or so many of each study), and reports success.",
        _drop_instances,
    ),
    Knob(
        "move.zero_counts",
        (Stage.RETRIEVE,),
        "All counters are zero; `status` replaces the final status.",
        _zero_counts,
    ),
    Knob(
        "move.final_status",
        (Stage.RETRIEVE,),
        "Sends everything and ends with `status`.",
        _final_status,
    ),
    Knob(
        "move.refuse",
        (Stage.RETRIEVE,),
        "Answers with `status` and nothing else.",
        _refuse_retrieve,
    ),
    Knob(
        "move.fail_but_all",
        (Stage.RETRIEVE,),
        "Sends everything, counts and names all of it as failed, and ends with `status`.",
        _fail_but_all,
    ),
    Knob(
        "move.bad_counts",
        (Stage.RETRIEVE,),
        "Every response has these `counts` (remaining, completed, failed, warning; None leaves "
        "one out; beyond 65535 it takes four bytes).",
        _bad_counts,
    ),
    Knob("move.no_pending", (Stage.RETRIEVE,), "Sends no pending response.", _no_pending),
    Knob(
        "move.no_originator",
        (Stage.RETRIEVE,),
        "Leaves the Move Originator fields out of what it sends.",
        _no_originator,
    ),
    Knob(
        "move.failed_list",
        (Stage.RETRIEVE,),
        "The Failed SOP Instance UID List holds these `uids`, whatever failed; none: it is absent.",
        _failed_list,
    ),
    Knob(
        "move.no_list",
        (Stage.RETRIEVE,),
        "Of a list of UIDs it sends what the first one names, or refuses it with `status`.",
        _no_list,
    ),
    Knob(
        "move.no_image_level",
        (Stage.RETRIEVE,),
        "Refuses requests at IMAGE level with `status`; None: it sends the whole study.",
        _no_retrieve_at_image_level,
    ),
    Knob(
        "move.keep_sending",
        (Stage.RETRIEVE,),
        "Goes on sending when the request's association has been lost.",
        _keep_sending,
    ),
    Knob(
        "move.late",
        (Stage.RETRIEVE,),
        "Reports success, and sends these `instances` when `hold` is set, however late.",
        _late,
    ),
    Knob(
        "move.ignore_cancel",
        (Stage.RETRIEVE,),
        "A C-CANCEL stops nothing; `how`: ignore, answer (FE00 at once), abort.",
        _ignore_cancel,
    ),
    Knob(
        "move.many_assocs",
        (Stage.RETRIEVE,),
        "Opens another association to the destination after `each` objects.",
        _many_assocs,
    ),
    Knob(
        "move.empty_assoc",
        (Stage.RETRIEVE,),
        "First opens `associations` to the destination and sends nothing over them; with "
        "`stay_open` they are released only at the end.",
        _empty_assoc,
    ),
    Knob(
        "get.disabled",
        (Stage.RETRIEVE,),
        "Offers C-GET and answers each with `status`; None: with an A-ABORT.",
        _disabled,
    ),
    Knob(
        "get.stop_on_class",
        (Stage.RETRIEVE,),
        "Stops with C000 at the first object for which there is no presentation context.",
        _stop_on_class,
    ),
    Knob(
        "assoc.queue",
        (Stage.RETRIEVE,),
        "Does not begin before it has acquired `turn`, a semaphore, which it then holds.",
        _queue,
    ),
    Knob(
        "archive.corrupt",
        (Stage.RETRIEVE,),
        "Cannot read these `instances`: listed, and counted as failed whenever they are due.",
        _corrupt,
    ),
    Knob(
        "move.unknown_destination",
        (Stage.RETRIEVE,),
        "Does not know the move destination (A801; C000 on some).",
        _unknown_destination,
    ),
    Knob(
        "move.stop_at_failure",
        (Stage.RETRIEVE,),
        "Stops at the first failed sub-operation with C000 and counters of zero.",
        _stop_at_failure,
    ),
    Knob(
        "store.truncate",
        (Stage.RETRIEVE,),
        "Sends the first part (`keep`, a share, and `less_bytes`) of the data set of these "
        "`instances`, with these bytes `behind` it.",
        _truncate,
    ),
    Knob(
        "store.other_patient",
        (Stage.RETRIEVE,),
        "Sends these `instances` with another PatientID.",
        _other_patient,
    ),
    Knob(
        "store.async_flood",
        (Stage.RETRIEVE,),
        "Sends up to `window` C-STORE requests without waiting for a response.",
        _async_flood,
    ),
    *(Knob(name, (Stage.RETRIEVE,), meaning, apply) for name, meaning, apply in CONTENT),
    Knob("store.duplicate", (Stage.RETRIEVE,), "Sends these `instances` twice.", _duplicate),
    Knob(
        "store.conflict",
        (Stage.RETRIEVE,),
        "Sends these `instances` twice, the second time with another content, or the same in "
        "another native `transfer_syntax_uid`.",
        _conflict,
    ),
    Knob(
        "store.unsolicited",
        (Stage.RETRIEVE,),
        "Sends these `objects` first, which nobody asked for.",
        _unsolicited,
    ),
    Knob(
        "archive.mutate",
        (Stage.FIND_DONE,),
        "After a query at `level` has been answered, calls `change` with the PACS.",
        _mutate,
    ),
    Knob(
        "net.drop_after",
        _ANY,
        "Loses the request's association after so many `answers`; `how`: abort (with `source` and "
        "`reason`), close, reset.",
        _drop_after,
    ),
    Knob(
        "net.blackhole",
        _ANY,
        "After so many `answers` neither sends nor heeds anything, as behind a firewall that has "
        "forgotten the connection.",
        _blackhole,
    ),
    Knob(
        "net.nagle",
        (Stage.RETRIEVE,),
        "Sends in small segments with Nagle's algorithm, as DCMTK does.",
        _nagle,
    ),
    Knob(
        "peer.restart",
        _ANY,
        "Goes down after so many `answers`, forgets all requests, and is back when `back` is set.",
        _restart,
    ),
    Knob("net.slow", _ANY, "Waits so many `seconds` before each answer.", _slow),
    Knob("net.first_byte", _ANY, "Does not answer at all before `hold` is set.", _first_byte),
    Knob(
        "net.stall_after",
        _ANY,
        "Falls silent after so many `answers` until `hold` is set.",
        _stall_after,
    ),
)

KNOBS: dict[str, Knob] = {knob.name: knob for knob in _TABLE}


def knob_table() -> str:
    """All knobs as a table in Markdown, in the order of their names."""
    lines = ["| knob | arguments | what the PACS does |", "|---|---|---|"]
    for _, knob in sorted(KNOBS.items()):
        words = ", ".join(_argument(name, default) for name, default in knob.arguments.items())
        lines.append(f"| `{knob.name}` | {words} | {knob.meaning} |")
    return "\n".join(lines) + "\n"


def _argument(name: str, default: Any) -> str:
    if default is inspect.Parameter.empty:
        return f"`{name}`"
    is_status = name == "status" and isinstance(default, int)
    return f"`{name}={f'0x{default:04X}' if is_status else repr(default)}`"
