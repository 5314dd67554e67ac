"""Sending of one retrieve request, and waiting for its instances."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pydicom.dataset import Dataset

from prefect_dicom.admission.association_pool import AssociationPool
from prefect_dicom.admission.health import RequestKind
from prefect_dicom.admission.node import NodeAdmission
from prefect_dicom.admission.request_rates import RequestUsage
from prefect_dicom.archive.spool import Spool
from prefect_dicom.config.node import NodeSettings
from prefect_dicom.core.errors import PacsError, PrefectDicomError, SpoolFull
from prefect_dicom.core.model import RetrieveMethod, StudyReference
from prefect_dicom.core.uids import normal_uid
from prefect_dicom.network.move import move
from prefect_dicom.network.node_client import NodeClient
from prefect_dicom.network.query_keys import retrieve_identifier
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.network.retrieve_result import RetrieveResult
from prefect_dicom.network.status import is_warning
from prefect_dicom.network.storage_scp import Expectation, ReceiverLease, Request, StoreHandler
from prefect_dicom.network.storage_scp.client import Received
from prefect_dicom.network.storage_scp.turned_away import most_telling
from prefect_dicom.retrieval.ingest import Ingest
from prefect_dicom.retrieval.late_arrivals import LATE_NOTE
from prefect_dicom.retrieval.requests import RetrieveRequest
from prefect_dicom.retrieval.strategy import Contexts, PeerCapabilities
from prefect_dicom.retrieval.study_task import StudyTask

_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class NodeSession:
    """An association to a node, and what admits and records the requests over it.

    Parameters
    ----------
    node : NodeSettings
        Its configuration.
    requestor : NodeClient
        An association to it, borrowed from the pool.
    pool : AssociationPool
        Admits each request.
    admission : NodeAdmission
        Records how requests end.
    capabilities : PeerCapabilities
        What is known of the node, and is learnt of it.
    wait : callable
        Waits until the node may be asked; returns the monotonic time, in seconds.
    stopping : callable
        Whether what is under way at the node is to be cancelled.
    note : callable
        Takes what a person should know of the node, in words without identifiers.
    """

    node: NodeSettings
    requestor: NodeClient
    pool: AssociationPool
    admission: NodeAdmission
    capabilities: PeerCapabilities
    wait: Callable[[], float]
    stopping: Callable[[], bool]
    note: Callable[[str], None]

    @property
    def method(self) -> RetrieveMethod:
        """The retrieve service that is used now."""
        return self.capabilities.method or self.node.retrieve

    def check_running(self) -> None:
        """Raise the interruption if the run is to stop."""
        if self.stopping():
            raise self.pool.interruption(self.requestor)

    def echo(self) -> None:
        """Send a C-ECHO, as one request of its own."""
        with self.pool.request(self.requestor):
            self.requestor.echo()


@dataclass(frozen=True, slots=True)
class Reception:
    """Reception of instances on this host.

    Parameters
    ----------
    spool : Spool
        Where received instances lie.
    ingest : Ingest
        Validates and records them.
    receiver : callable
        Returns the lease on the managed receiver, which may have to be started for it; None where
        the site has none, and C-GET is the only way.
    ae_title : str
        The Move Destination of a C-MOVE.
    """

    spool: Spool
    ingest: Ingest
    receiver: Callable[[], ReceiverLease | None]
    ae_title: str


class RequestSender:
    """Sends retrieve requests over one association. Not thread-safe."""

    def __init__(self, session: NodeSession, reception: Reception) -> None:
        self._session = session
        self._reception = reception
        self._sent_at = session.admission.now()

    @property
    def sent_at(self) -> float:
        """When the last request was sent, by the monotonic time of the admission, in seconds."""
        return self._sent_at

    def send(
        self, request: RetrieveRequest, tasks: Sequence[StudyTask], contexts: Contexts
    ) -> RetrieveResult | None:
        """Send one request and wait for its end.

        Returns
        -------
        RetrieveResult or None
            None where the end says nothing about the PACS: the request was not sent, because
            instances of an earlier one are still being received, or the receiver ended under it.

        Raises
        ------
        PacsError
            The node cannot be used.
        SpoolFull
            There is no room for more; what was received is recorded.
        """
        session = self._session
        self._sent_at = session.wait()
        identifier = retrieve_identifier(
            session.node.query_model,
            request.level,
            tasks[0].claim.patient_id,
            [task.claim.study_instance_uid for task in tasks],
            list(request.series),
            list(request.instances),
            session.requestor.characters,
        )
        admitted = session.pool.request(
            session.requestor, retrieve=True, instances=request.expected or 0
        )
        with admitted as usage:
            # The pool may have let it wait.
            self._sent_at = session.admission.now()
            first = _FirstInstance(session.admission.now)
            try:
                if session.method is RetrieveMethod.C_MOVE:
                    return self._move(identifier, tasks, request.expected, first, usage)
                return self._get(identifier, contexts, tasks, first, usage)
            finally:
                if first.seconds is not None:
                    session.admission.record_latency(
                        RequestKind.RETRIEVE, first.seconds, request.studies[0]
                    )

    def _move(
        self,
        identifier: Dataset,
        tasks: Sequence[StudyTask],
        wanted: int | None,
        first: _FirstInstance,
        usage: RequestUsage,
    ) -> RetrieveResult | None:
        session, requested, requestor = self._session, wanted, self._session.requestor
        assert isinstance(requestor, Requestor), "only nodes that speak DIMSE are sent a C-MOVE"
        settle_seconds = session.node.timeouts.settle_seconds
        lease = self._reception.receiver()
        assert lease is not None, "a site without a receiver retrieves by C-GET only"
        with lease.expecting(_studies_by_uid(tasks), requestor.node.calling_ae_title) as expected:
            if expected.quiet_seconds is not None:
                wait_until_received(expected, None, settle_seconds, session.stopping)
                return None
            outcome = move(
                requestor,
                identifier,
                self._reception.ae_title,
                expected.message_id,
                progress=lambda: first.look(_signs_of_life(expected)),
                should_stop=lambda: "interrupted" if session.stopping() else None,
            )
            if _may_have_sent(outcome) or expected.received().instances:
                wanted = _instances_to_wait_for(outcome, wanted)
                wait_until_received(expected, wanted, settle_seconds, session.stopping)
                self._wait_for_late(expected, wanted, outcome, tasks)
            so_far = expected.received()
            first.came(so_far.first_age_seconds)
            usage.instances, usage.size_bytes = so_far.instances, so_far.size_bytes
            self._check_room(so_far.refused)
            if expected.renewed:
                return None
            if requested is not None and so_far.instances >= requested:
                return outcome
            return self._explained(outcome, so_far)

    def _explained(self, outcome: RetrieveResult, so_far: Received) -> RetrieveResult:
        """The end of a C-MOVE that did not bring all, with who was turned away meanwhile."""
        found = most_telling(so_far.turned_away)
        if found is None:
            return outcome
        self._session.note(f"while instances were due, {found.words}")
        # Some PACS send from several machines, of which one may be allowed.
        return outcome if so_far.instances else replace(outcome, turned_away=found.code)

    def _wait_for_late(
        self,
        expected: Request,
        wanted: int | None,
        outcome: RetrieveResult,
        tasks: Sequence[StudyTask],
    ) -> None:
        """Wait longer than the settle time, where that has been worth it or may be.

        What has not come then may come later all the same: the receiver keeps it for its study.
        """
        session, late = self._session, self._session.capabilities.late
        references = [task.reference for task in tasks]
        so_far = expected.received()
        before = so_far.instances
        if wanted is not None and before >= wanted:
            late.forget(references)
            return
        began, settle_seconds = session.admission.now(), session.node.timeouts.settle_seconds
        promised = outcome.sent > before and not so_far.turned_away
        patience = late.patience_seconds(settle_seconds, promised=promised)
        if outcome.reports_success and patience > settle_seconds:
            wait_for_more(expected, before, patience - settle_seconds, session.stopping)
            came = expected.received().instances > before
            late.record_wait(session.admission.now() - began + settle_seconds, came=came)
            if came:
                session.note(LATE_NOTE)
                for task in tasks:
                    task.remark("objects-late")
                wait_until_received(expected, wanted, settle_seconds, session.stopping)
        if wanted is None or expected.received().instances < wanted:
            expected.awaited = True
            late.expect(references, session.admission.now())

    def _get(
        self,
        identifier: Dataset,
        contexts: Contexts,
        tasks: Sequence[StudyTask],
        first: _FirstInstance,
        usage: RequestUsage,
    ) -> RetrieveResult:
        session = self._session
        own = Expectation(_studies_by_uid(tasks))
        store_handler = StoreHandler(self._reception.spool, own)

        def stopping() -> bool:
            # Asked before each message.
            first.look(own.instances)
            return session.stopping()

        try:
            outcome = session.requestor.get(
                identifier,
                contexts=contexts,
                store_handler=store_handler,
                should_stop=stopping,
                without_roles=session.capabilities.may_send_without_roles,
            )
        except PacsError as error:
            if error.code != "sop-classes-refused":
                raise
            session.capabilities.fruitless_without_roles += 1
            # These classes cannot come from this node; others may.
            session.capabilities.contexts.record(contexts, ())
            return RetrieveResult(None, lost=error.code)
        finally:
            first.came(own.first_age_seconds)
            usage.instances, usage.size_bytes = own.instances, own.size_bytes
        session.capabilities.accepts_c_get = True
        session.capabilities.contexts.record(contexts, outcome.accepted)
        self._check_room(store_handler.refused_since(own))
        return outcome

    @staticmethod
    def _check_room(refused: str) -> None:
        """Stop where the spool could not take an instance, whatever the peer makes of it."""
        if not refused:
            return
        raise SpoolFull() if refused == "spool-full" else PrefectDicomError(refused)


class _FirstInstance:
    """Latency of a request: the time until its first instance came, in seconds.

    A request may be over, and its settle time too, before anybody looks: the receiver knows when
    the instance came. Before the first one is whole, its bytes are seen.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.seconds: float | None = None
        self._now = now
        self._sent_at = now()

    def look(self, received: int) -> int:
        """Note how much has been received, in whatever unit; returns it."""
        if received and self.seconds is None:
            self.seconds = self._now() - self._sent_at
        return received

    def came(self, age_seconds: float | None) -> None:
        """Note how long ago the first instance came; None where none did."""
        if age_seconds is not None:
            seconds = max(0.0, self._now() - age_seconds - self._sent_at)
            self.seconds = seconds if self.seconds is None else min(self.seconds, seconds)


def wait_until_received(
    expected: Request,
    wanted: int | None,
    settle_seconds: float,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Wait until ``wanted`` instances were received, or none was for ``settle_seconds``.

    Archives report the end of a C-MOVE before their last instances are received, and go on
    sending after an association was lost.
    """
    began = time.monotonic()
    open_bytes = -1
    while not stopping():
        so_far = expected.received()
        if wanted is not None and so_far.instances >= wanted:
            return
        if so_far.open_bytes != open_bytes:
            open_bytes, began = so_far.open_bytes, time.monotonic()
        if min(so_far.quiet_seconds, time.monotonic() - began) >= settle_seconds:
            return
        time.sleep(_POLL_SECONDS)


def wait_for_more(
    expected: Request, than: int, seconds: float, stopping: Callable[[], bool] = lambda: False
) -> None:
    """Wait until more instances were received than a number, or ``seconds`` have passed."""
    until = time.monotonic() + seconds
    while not stopping() and time.monotonic() < until:
        if expected.received().instances > than:
            return
        time.sleep(_POLL_SECONDS)


def _studies_by_uid(tasks: Sequence[StudyTask]) -> Mapping[str, StudyReference]:
    return {normal_uid(task.claim.study_instance_uid): task.reference for task in tasks}


def _signs_of_life(expected: Request) -> int:
    """A number that changes while anything is received, be it one very large instance."""
    so_far = expected.received()
    return so_far.size_bytes + so_far.open_bytes


def _instances_to_wait_for(outcome: RetrieveResult, wanted: int | None) -> int | None:
    """How many instances are waited for when a C-MOVE has ended; None: until none comes.

    What the PACS says that it could not send is not waited for.
    """
    asked = outcome.sent + (outcome.failed or 0) if wanted is None else wanted
    if outcome.accounts_for(asked):
        return outcome.sent
    return outcome.sent or None if wanted is None else wanted


def _may_have_sent(outcome: RetrieveResult) -> bool:
    """Whether instances of a C-MOVE may still be on their way."""
    if outcome.lost is not None or outcome.status is None or outcome.completed:
        return True
    return outcome.reports_success or is_warning(outcome.status)
