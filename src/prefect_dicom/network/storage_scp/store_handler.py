"""Attribution: which study an arriving instance belongs to, or that it was not requested.

The same for what C-MOVE sends to the managed receiver and for what C-GET brings over its own
association. By Move Originator first, then by StudyInstanceUID: the standard makes the
originator fields optional (PS3.7 9.1.1.1), and the study UID alone does not show which of two
requests an instance answers.

An allowed sender gets success for everything that could be written, wanted or not: one other
answer makes some PACS stop the whole transfer. What was not requested goes to quarantine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

from prefect_dicom.archive.spool import IncomingInstance, Spool
from prefect_dicom.core.background import Background, processors
from prefect_dicom.core.errors import SpoolFull
from prefect_dicom.core.metrics import first_object, object_received
from prefect_dicom.core.model import StoreRequest, StudyReference
from prefect_dicom.core.uids import normal_uid
from prefect_dicom.network.status import StorageStatus

_NAMING_SECONDS = 10.0
"""Of waiting for the names of a few instances, which take a millisecond each."""
_MOST_AWAITED = 1000
"""Requests that have ended short of instances, whose studies are still accepted."""


@dataclass(slots=True, eq=False)
class Expectation:
    """Studies that one retrieve request may deliver, by StudyInstanceUID."""

    studies: Mapping[str, StudyReference]
    originator_ae_title: str = ""
    message_id: int = 0
    instances: int = 0
    by_originator: int = 0
    """Of the instances, those that named their request by the Move Originator."""
    size_bytes: int = 0
    refusals_before: int = 0
    began: float = field(default_factory=time.monotonic)
    first_arrival: float | None = None
    last_arrival: float = field(default_factory=time.monotonic)

    @property
    def first_age_seconds(self) -> float | None:
        """Seconds since the first instance arrived; None where none has."""
        return None if self.first_arrival is None else time.monotonic() - self.first_arrival


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an instance belongs: to a study that is expected, else into quarantine."""

    expectation: Expectation | None = None
    study: StudyReference = 0
    by_originator: bool = False
    reason: str = ""


class StoreHandler:
    """Takes instances from the transfer loop into the spool. Thread-safe.

    Parameters
    ----------
    spool : Spool
        Where they go.
    own : Expectation, optional
        What the association itself answers (C-GET): its instances have no Move Originator.

    Attributes
    ----------
    quarantined : int
        Instances that were put into quarantine.
    processors : int
        Those that the process may use.
    """

    def __init__(self, spool: Spool, own: Expectation | None = None) -> None:
        self.spool = spool
        self.quarantined = 0
        self.processors = processors()
        self._lock = threading.Lock()
        self._own = own
        self._expectations: list[Expectation] = []
        self._awaited: dict[int, Expectation] = {}
        self._open: dict[int, IncomingInstance] = {}
        self._unnamed: dict[int, IncomingInstance] = {}
        """Whole, and answered before they have their name in the spool."""
        self._named = threading.Condition(self._lock)
        if own is not None:
            self.expect(own)

    # --- expectations

    def expect(self, expectation: Expectation) -> None:
        """Accept the studies of an expectation from now on."""
        expectation.refusals_before = self.spool.refusals
        with self._lock:
            self._expectations.append(expectation)

    def await_late(self, expectation: Expectation) -> None:
        """Accept what comes late of an expectation, after all that is under way."""
        with self._lock:
            if expectation in self._expectations:
                self._expectations.remove(expectation)
            self._awaited[expectation.message_id] = expectation
            if len(self._awaited) > _MOST_AWAITED:
                del self._awaited[next(iter(self._awaited))]

    def awaits(self, message_id: int) -> bool:
        """Whether something may still come late of the request with this message id."""
        with self._lock:
            return message_id in self._awaited

    def take_over(self, studies: Collection[str]) -> None:
        """What comes late of these studies belongs to another request from now on."""
        with self._lock:
            for expectation in self._awaited.values():
                expectation.studies = {
                    uid: study for uid, study in expectation.studies.items() if uid not in studies
                }
            self._awaited = {n: late for n, late in self._awaited.items() if late.studies}

    def forget(self, expectation: Expectation) -> None:
        """Accept the studies of an expectation no longer."""
        with self._lock:
            if expectation in self._expectations:
                self._expectations.remove(expectation)

    def refused_since(self, expectation: Expectation) -> str:
        """Why an instance could not be written since the expectation began; empty if all could.

        Peers report it as a failure of their own, or not at all.
        """
        return self.spool.refusal if self.spool.refusals > expectation.refusals_before else ""

    @property
    def open_bytes(self) -> int:
        """Bytes of the instances that are being written now: a sign of life of a large one."""
        with self._lock:
            return sum(part.size_bytes for part in self._open.values())

    def await_names(self) -> None:
        """Return when what was answered before has its name in the spool."""
        with self._named:
            unnamed = set(self._unnamed)
            self._named.wait_for(lambda: unnamed.isdisjoint(self._unnamed), _NAMING_SECONDS)

    # --- instance sink

    def begin(
        self,
        request: StoreRequest,
        background: Background | None = None,
        *,
        whole_file: bool = False,
    ) -> IncomingInstance:
        """Begin to receive an instance; SpoolFull is answered with 0xA700.

        It is hashed in the background if each association that receives has two processors:
        with fewer, handing over costs a tenth and brings nothing.
        """
        with self._lock:
            receiving = len(self._open) - len(self._unnamed)
        if 2 * (receiving + 1) > self.processors:
            background = None
        part = self.spool.begin(request, background, whole_file=whole_file)
        with self._lock:
            self._open[id(part)] = part
        return part

    def complete(self, part: IncomingInstance) -> int:
        """Keep or quarantine an instance whose data set is whole; the status to answer.

        One that is still being hashed gets its name when its hash is there, soon after the
        answer.
        """
        try:
            place = self._place(part)
        except BaseException as error:
            return self._failed(part, error)
        if part.finish_hash():
            return self._name(part, place)
        with self._lock:
            self._unnamed[id(part)] = part
        part.when_hashed(partial(self._name, part, place))
        return StorageStatus.SUCCESS

    def abandon(self, part: IncomingInstance) -> None:
        """Discard an instance whose association ended before it was whole."""
        part.discard()
        self._closed(part)

    # --- private

    def _place(self, part: IncomingInstance) -> _Place:
        """Where an instance belongs: to a study that is expected, or into quarantine."""
        study_instance_uid = part.study_instance_uid()
        with self._lock:
            own = self._by_originator(part.request)
            is_late = own is not None and self._awaited.get(own.message_id) is own
            attributed = self._attribute(own, study_instance_uid, is_late=is_late)
        if attributed is None:
            is_stray = own is None or is_late
            return _Place(reason="not-requested" if is_stray else "uid-mismatch")
        expectation, study = attributed
        return _Place(expectation, study, own is expectation and own is not self._own)

    def _name(self, part: IncomingInstance, place: _Place) -> int:
        """Give an instance the name by which it is found; the status to answer."""
        try:
            if place.expectation is None:
                self.spool.quarantine(part, place.reason)
                self.quarantined += 1
            else:
                self.spool.keep(part, place.study)
                self._count(part, place.expectation, place.by_originator)
        except BaseException as error:
            return self._failed(part, error)
        self._closed(part)
        outcome = "quarantined" if place.expectation is None else "kept"
        object_received(outcome, part.size_bytes, time.monotonic() - part.began)
        return StorageStatus.SUCCESS

    def _failed(self, part: IncomingInstance, error: BaseException) -> int:
        """Discard an instance that could not be kept; raises what is nobody's full disk."""
        try:
            part.discard()
        finally:
            self._closed(part)
        if isinstance(error, OSError):
            self.spool.refuse(error)
        elif not isinstance(error, SpoolFull):
            # The caller handles the error, but does not know of the part.
            raise error
        return StorageStatus.OUT_OF_RESOURCES

    def _count(self, part: IncomingInstance, expectation: Expectation, by_originator: bool) -> None:
        with self._lock:
            expectation.instances += 1
            expectation.by_originator += by_originator
            expectation.size_bytes += part.size_bytes
            expectation.last_arrival = time.monotonic()
            is_first = expectation.first_arrival is None
            if is_first:
                expectation.first_arrival = expectation.last_arrival
        if is_first:
            first_object(expectation.last_arrival - expectation.began)

    def _closed(self, part: IncomingInstance) -> None:
        with self._lock:
            self._open.pop(id(part), None)
            if self._unnamed.pop(id(part), None) is not None:
                self._named.notify_all()

    def _by_originator(self, request: StoreRequest) -> Expectation | None:
        if request.move_originator_message_id is None or self._own is not None:
            return self._own
        for expectation in chain(self._expectations, self._awaited.values()):
            if (
                expectation.message_id == request.move_originator_message_id
                and expectation.originator_ae_title == request.move_originator_ae_title
            ):
                return expectation
        return None

    def _attribute(
        self, own: Expectation | None, study_instance_uid: str | None, *, is_late: bool
    ) -> tuple[Expectation, StudyReference] | None:
        if study_instance_uid is None:
            # Unreadable or deflated: only a request for a single study can vouch for it.
            if own is not None and len(own.studies) == 1:
                return own, next(iter(own.studies.values()))
            return None
        uid = normal_uid(study_instance_uid)
        first = () if own is None or is_late else (own,)
        for expectation in chain(first, self._expectations, self._awaited.values()):
            study = expectation.studies.get(uid)
            if study is not None:
                return expectation, study
        return None
