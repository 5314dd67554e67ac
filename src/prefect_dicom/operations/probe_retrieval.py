"""Probe of C-MOVE and C-GET: a few instances of one study, retrieved and dropped."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

from pydicom.dataset import Dataset

from prefect_dicom.archive.spool import Spool
from prefect_dicom.config.capabilities import Service
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import RetrieveMethod
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.core.uids import is_uid, normal_uid
from prefect_dicom.network.get import c_get
from prefect_dicom.network.information_models import QUERY_RETRIEVE_CLASSES
from prefect_dicom.network.move import move
from prefect_dicom.network.presentation_contexts import (
    COMMON_SYNTAXES,
    RARE_SYNTAXES,
    STORAGE_CLASSES,
    Breadth,
    context_groups,
)
from prefect_dicom.network.probe import negotiate
from prefect_dicom.network.query_keys import retrieve_identifier
from prefect_dicom.network.retrieve_result import RetrieveResult
from prefect_dicom.network.status import reason_for_status
from prefect_dicom.network.storage_scp import Expectation, StoreHandler
from prefect_dicom.operations.probe_queries import shortest_first
from prefect_dicom.operations.probe_session import (
    MOST_INSTANCES,
    ProbedSeries,
    ProbeSession,
    ascii_value,
)
from prefect_dicom.retrieval.send import wait_until_received

_PROBE = 0
"""Study reference of what is retrieved; the ledger begins at 1."""
_SHORT_SERIES = 10
"""Most instances of a series that is retrieved whole, where single ones cannot be had."""
_GETS = 6
"""Most proposals of transfer syntaxes until an instance arrives."""
_GUESSES = 9
"""SOP classes proposed in all common syntaxes where the node does not answer the class."""


def probe_retrieval(
    session: ProbeSession, study: Mapping[str, bytes], series: Sequence[ProbedSeries]
) -> None:
    """Probe C-MOVE and C-GET with instances of a study.

    Parameters
    ----------
    session : ProbeSession
        Session whose facts are filled in.
    study : mapping of str to bytes
        The study as the node answered it.
    series : sequence of ProbedSeries
        Series of the study, some with their instances.
    """
    listed = next((one for one in sorted(series, key=shortest_first) if one.images), None)
    if listed is None:
        session.notes.append(
            "no retrieval was tried: the node lists no instance of the study tried"
        )
        return
    _RetrieveProbe(session, study, listed).run()


class _RetrieveProbe:
    """Probe of the node's retrieve services with one series of one study."""

    def __init__(
        self, session: ProbeSession, study: Mapping[str, bytes], series: ProbedSeries
    ) -> None:
        self._session = session
        self._study = study
        self._series = series
        self._sop_class = series.images[0][1]
        spool = session.site.spool
        self._spool = Spool(spool.path, spool.reserve_bytes)

    def run(self) -> None:
        """Probe both services, the configured one first."""
        facts = self._session.facts
        images = [sop for sop, its_class in self._series.images if its_class == self._sop_class]
        many = images[:MOST_INSTANCES]
        self._spool.drop(_PROBE)
        try:
            for service in self._services():
                key = "c_get" if service == "C-GET" else "c_move"
                facts[key] = self._try(service, images[:1])
                if (
                    facts[key] is Service.WORKS
                    and facts.get("image_level_retrieve")
                    and "uid_lists_in_retrieves" not in facts
                    and len(many) > 1
                ):
                    self._try_list(service, many)
        finally:
            self._spool.drop(_PROBE)

    def _services(self) -> Iterator[str]:
        """Yield the services worth a retrieve, the configured one first."""
        own = "C-GET" if self._session.node.retrieve is RetrieveMethod.C_GET else "C-MOVE"
        for service in sorted(("C-MOVE", "C-GET"), key=lambda one: one != own):
            if service == "C-GET":
                if self._get_offer():
                    yield service
            elif self._session.lease is not None and "c_move" not in self._session.facts:
                yield service

    def _get_offer(self) -> bool:
        """Find what the node grants to a C-GET; returns whether to send one."""
        node, facts = self._session.node, self._session.facts
        model = node.information_model
        if model not in facts.get("get_models", (model,)):
            facts["c_get"] = Service.NOT_OFFERED
            return False
        classes: tuple[str, ...]
        if is_uid(self._sop_class):
            classes, syntaxes = (self._sop_class,), COMMON_SYNTAXES + RARE_SYNTAXES
        else:
            # The node does not answer the SOP classes of its instances.
            classes, syntaxes = STORAGE_CLASSES[:_GUESSES], COMMON_SYNTAXES
        proposed = [(QUERY_RETRIEVE_CLASSES["C-GET"][model], COMMON_SYNTAXES[1])]
        proposed += [(one, syntax) for one in classes for syntax in syntaxes]
        self._session.spend_alone()
        try:
            offer = negotiate(node, proposed, roles=classes)
        except PacsError as error:
            if not error.reason.refuses_service:
                raise
            facts["c_get"] = Service.REFUSED
            return False
        facts["get_roles"] = not offer.scp_roles.isdisjoint(classes)
        accepted = {syntax for abstract, syntax in offer.accepted if abstract in classes}
        facts["get_transfer_syntaxes"] = [s for s in syntaxes if s in accepted]
        if not facts["get_roles"] or not accepted:
            facts["c_get"] = Service.REFUSED
            return False
        return True

    def _try(self, service: str, images: Sequence[str]) -> Service | None:
        """Retrieve one instance, or a whole short series where single ones cannot be had."""
        facts = self._session.facts
        outcome = self._retrieve(service, images)
        received = self._take()
        if received:
            # More than requested: the node ignores the level.
            facts["image_level_retrieve"] = received == 1
            return Service.WORKS
        code = outcome.lost or _reason(service, outcome)
        if _refuses_service(code) or code == "sop-classes-refused":
            return Service.REFUSED
        if facts.get("image_level_retrieve"):
            return Service.NOTHING_ARRIVED
        if len(self._series.images) > _SHORT_SERIES:
            if code != "request-refused":
                return Service.NOTHING_ARRIVED
            facts["image_level_retrieve"] = False
            self._session.notes.append(
                "the node sends no single instances, and no series is short enough"
            )
            return None
        self._retrieve(service, ())
        if self._take():
            facts["image_level_retrieve"] = False
            return Service.WORKS
        return Service.NOTHING_ARRIVED

    def _try_list(self, service: str, images: Sequence[str]) -> None:
        outcome = self._retrieve(service, images)
        received = self._take()
        if received == len(images):
            self._session.facts["uid_lists_in_retrieves"] = True
        elif outcome.reports_success or _reason(service, outcome) == "request-refused":
            self._session.facts["uid_lists_in_retrieves"] = False

    def _retrieve(self, service: str, images: Sequence[str]) -> RetrieveResult:
        uid = ascii_value(self._study, "StudyInstanceUID")
        identifier = retrieve_identifier(
            self._session.node.information_model,
            "IMAGE" if images else "SERIES",
            ascii_value(self._study, "PatientID"),
            [uid],
            [self._series.uid],
            images,
        )
        studies = {normal_uid(uid): _PROBE}
        outcome = RetrieveResult(None)
        if service == "C-MOVE":
            return self._move(identifier, studies, len(images) or len(self._series.images))
        classes = [self._sop_class] if is_uid(self._sop_class) else STORAGE_CLASSES
        tried = 0
        # dcmqrscp uses the first context of a class, whatever the instance is encoded in.
        for breadth in (Breadth.COMMON, Breadth.ALL, Breadth.SINGLE):
            for _, contexts in context_groups(classes, breadth):
                self._session.spend_alone()
                try:
                    store_handler = StoreHandler(self._spool, Expectation(studies))
                    outcome = c_get(
                        self._session.node,
                        identifier,
                        contexts=contexts,
                        store_handler=store_handler,
                    )
                except PacsError as error:
                    outcome = RetrieveResult(None, lost=error.code)
                tried += 1
                code = outcome.lost or _reason(service, outcome)
                if self._count_received() or _refuses_service(code) or tried == _GETS:
                    return outcome
        return outcome

    def _move(self, identifier: Dataset, studies: Mapping[str, int], wanted: int) -> RetrieveResult:
        node, facts = self._session.node, self._session.facts
        lease, receiver = self._session.lease, self._session.site.receiver
        assert lease is not None and receiver is not None, "C-MOVE is probed with a receiver only"
        self._session.spend()
        quiet = node.timeouts.settle_seconds
        with lease.expecting(studies, node.calling_ae_title) as expected:
            title = receiver.ae_title
            outcome = move(self._session.requestor, identifier, title, expected.message_id)
            ended = time.monotonic()
            received = expected.received()
            if outcome.reports_success and received.instances < wanted:
                wait_until_received(expected, wanted, quiet)
                received = expected.received()
                if received.instances:
                    late = time.monotonic() - ended - received.quiet_seconds
                    self._settled(max(late, 0.0))
            elif received.instances:
                self._settled(0.0)
            if received.instances:
                facts["originator"] = received.by_originator == received.instances
        return outcome

    def _settled(self, seconds: float) -> None:
        # Rounded up to a tenth of a second, so that runs wait long enough.
        seconds = math.ceil(seconds * 10) / 10
        self._session.facts["settle_seconds"] = max(
            seconds, self._session.facts.get("settle_seconds", 0.0)
        )

    def _count_received(self) -> int:
        return len(list(self._spool.files(_PROBE)))

    def _take(self) -> int:
        """Count the instances that were received, and drop them."""
        received = self._count_received()
        self._session.instances += received
        self._spool.drop(_PROBE)
        return received


def _refuses_service(code: str | None) -> bool:
    return code is not None and reason_for(code).refuses_service


def _reason(service: str, outcome: RetrieveResult) -> str | None:
    return None if outcome.status is None else reason_for_status(service, outcome.status)
