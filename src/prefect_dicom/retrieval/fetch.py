"""Retrieval of one chunk: rounds of requests until nothing is missing or nothing more comes.

No status, counter or silence of the peer is evidence of completeness. The expected set is the
PACS's own instance list in the ledger; received is what lies in the spool and passes validation.
The peer's statuses only choose what to do next: go on, request smaller pieces
(:mod:`prefect_dicom.retrieval.strategy`), or stop because a person has to change something first.

Some PACS list no instances. Of their studies, what is received becomes the list, and whether
that is all is judged by the PACS's counts of series; where it returns none, by the number of
instances it says to have sent, if the site accepts that as evidence
(:class:`~prefect_dicom.core.model.Evidence`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prefect_dicom.admission.health import RequestKind
from prefect_dicom.core.errors import PacsError, ReceiverError, SpoolFull
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import Disposition, Evidence, InstanceKey, RetrieveMethod
from prefect_dicom.core.reasons import Scope, reason_for
from prefect_dicom.network.retrieve_result import RetrieveResult
from prefect_dicom.retrieval.bounds import SPARE_ROUNDS, UNLISTED_ROUNDS
from prefect_dicom.retrieval.diagnosis import Diagnosis
from prefect_dicom.retrieval.instance_list import Listing
from prefect_dicom.retrieval.late_arrivals import LATE_NOTE
from prefect_dicom.retrieval.requests import (
    RetrieveRequest,
    for_studies,
    selected_by,
    targets_of,
)
from prefect_dicom.retrieval.rounds import Round, Rounds
from prefect_dicom.retrieval.send import NodeSession, Reception, RequestSender
from prefect_dicom.retrieval.settling import Settling
from prefect_dicom.retrieval.strategy import (
    RequestStrategy,
    code_of_end,
    code_of_strain,
    ignores_list,
    is_final,
    is_refused_for_form,
    is_specific,
    is_worth_repeating,
    plan_round,
    plan_unlisted_round,
    refuses_c_get,
    strategies,
    strategies_after_refusal,
)
from prefect_dicom.retrieval.study_task import StudyTask
from prefect_dicom.retrieval.whole_studies import HandingOver, HandOver

_ROUNDS = {
    RetrieveMethod.C_MOVE: UNLISTED_ROUNDS.most,
    RetrieveMethod.C_GET: UNLISTED_ROUNDS.most + 1,
    RetrieveMethod.WADO_RS: UNLISTED_ROUNDS.most,
}
"""How often a study without a list is requested with nothing new to show for it."""


class Retrieval:
    """Fetches studies of one node over one association. Not thread-safe.

    Parameters
    ----------
    session : NodeSession
        The node, the association to it, and what is known of it.
    reception : Reception
        Where the instances are received.
    listing : Listing
        Reads the node's lists over the same association.
    """

    def __init__(self, session: NodeSession, reception: Reception, listing: Listing) -> None:
        self._session = session
        self._admission = session.admission
        self._reception = reception
        self._spool = reception.spool
        self._ingest = reception.ingest
        self._sender = RequestSender(session, reception)
        self._settling = Settling(session)
        self._diagnosis = Diagnosis(session, reception, self._sender)
        self._handing = HandingOver()
        self.listing = listing

    def fetch(self, tasks: Sequence[StudyTask], hand_over: HandOver | None = None) -> int:
        """Request instances until none is missing or requests bring nothing more.

        Switches to C-MOVE for the rest of the run where the node does not offer C-GET and the
        site has a receiver.

        Parameters
        ----------
        hand_over : callable, optional
            Takes listed studies as soon as all of their instances are here, in any thread. They
            are its from then on: nothing is done about them here any more.

        Returns
        -------
        int
            How many instances were received.

        Raises
        ------
        PacsError
            The node cannot be used now: a person must act, or it is out of reach.
        SpoolFull
            There is no room for more; what was received is recorded.
        Interrupted
            The run is to stop.
        """
        self._handing = HandingOver(hand_over)
        while True:
            method = self._session.method
            try:
                return self._fetch(self._handing.left(tasks))
            except PacsError as error:
                if method is not RetrieveMethod.C_GET or not self._switch_to_c_move(error.code):
                    raise
            except SpoolFull:
                # What there was room for is recorded: it makes room when it is archived.
                self._ingest.scan(self._handing.left(tasks))
                raise

    def _fetch(self, tasks: Sequence[StudyTask]) -> int:
        received = self._scan_late(tasks) + self._ingest.scan(tasks)
        if listed := [task for task in tasks if task.is_listed]:
            received = self._fetch_listed(listed, received)
        for task in tasks:
            if not task.is_listed:
                received = self._fetch_unlisted(task, received)
        return received

    # --- studies whose instances are listed

    def _fetch_listed(self, tasks: Sequence[StudyTask], received: int) -> int:
        """Request listed instances; returns ``received`` plus how many were received now."""
        session = self._session
        rounds = Rounds.starting(
            strategies(session.capabilities, session.method, session.node.limits.uids_per_request)
        )
        tasks = self._handing.hand_over(tasks)
        while any(task.to_request() for task in tasks):
            faulty = {task.reference: task.attempts.faulty_count for task in tasks}
            this = self._request_round(tasks, rounds, received)
            received += this.received
            tasks = self._handing.left(tasks)
            if this.received:
                self._admission.record_delivery()
            if not tasks:
                break
            if this.received and not self._settling.is_to_widen(tasks, rounds.strategy):
                continue
            more_faulty = any(t.attempts.faulty_count > faulty[t.reference] for t in tasks)
            if rounds.spare and (this.undetermined or more_faulty):
                rounds.spare -= 1
                continue
            self._settling.end_round(tasks, rounds.strategy, brought=this.received)
            if not (this.received or rounds.diagnosed):
                rounds.diagnosed = True
                received += self._diagnosis.run(tasks, delivers=received > 0)
            wider = self._settling.next_strategies(tasks, rounds.strategy)
            if not rounds.advance(this.alternatives or wider):
                break
        received += self._ingest.settle(tasks)
        self._list_incomplete_again(tasks)
        for task in tasks:
            if task.missing():
                task.fail(self._settling.failure_of(task))
            elif not is_final(task.failure):
                task.clear_failure()
            self._record_nothing_sent(task, received)
        return received

    def _scan_late(self, tasks: Sequence[StudyTask]) -> int:
        """Scan studies of which something may still come of a request that is over; how many did.

        What came is not requested again.
        """
        late, now = self._session.capabilities.late, self._admission.now()
        received = 0
        for task in tasks:
            if late.is_awaited(task.reference) and (came := self._ingest.scan([task])):
                received += came
                late.record_arrival(task.reference, now)
                task.remark("objects-late")
                self._session.note(LATE_NOTE)
        return received

    def _request_round(
        self, tasks: Sequence[StudyTask], rounds: Rounds, received_before: int
    ) -> Round:
        """Send the requests of one round."""
        this = Round()
        by_reference = {task.reference: task for task in tasks}
        session = self._session
        planned = plan_round(
            tasks, rounds.strategy, session.node, session.method, session.capabilities.contexts
        )
        for request, contexts in planned:
            session.check_running()
            self._spool.check_reserve()
            members = self._handing.left([by_reference[r] for r in request.studies])
            if len(members) < len(request.studies):
                # The others became whole meanwhile.
                if not members:
                    continue
                request = for_studies(request, members)
            if late := self._scan_late(members):
                # Of an earlier request: the next one is planned without it.
                this.received += late
                break
            targets = targets_of(request, members)
            asked, selected = set().union(*targets), selected_by(request, members)
            with self._handing.ingesting(self._ingest, members) as received_beside:
                outcome = self._sender.send(request, members, contexts)
            failpoint("request-ended")
            members = self._handing.left(members)
            received = received_beside() + self._ingest.scan(members)
            members = self._handing.hand_over(members)
            self._record_strain(request, outcome, received)
            if outcome is not None:
                self._settling.record_end(members, asked, selected, outcome, rounds.strategy)
            this.received += received
            this.undetermined = this.undetermined or outcome is None
            if received:
                rounds.fruitless_requests = 0
                session.capabilities.record_answer(rounds.strategy, request)
                if self._proves_single_uids(rounds.strategy, targets, outcome, members):
                    rounds.strategy = replace(rounds.strategy, uids=1)
                    break
            elif outcome is not None:
                # Where there is no room that is why, whatever the peer makes of it.
                self._spool.check_reserve()
                first = not received_before and not this.received
                self._record_fruitless(outcome, members, first=first)
                rounds.fruitless_requests += rounds.strategy.uids == 1
                if is_refused_for_form(outcome, session.method):
                    this.alternatives = strategies_after_refusal(
                        rounds.strategy, request, session.capabilities
                    )
            if this.alternatives or rounds.is_given_up:
                break
        return this

    def _proves_single_uids(
        self,
        strategy: RequestStrategy,
        targets: Sequence[set[InstanceKey]],
        outcome: RetrieveResult | None,
        tasks: Sequence[StudyTask],
    ) -> bool:
        """Record whether the list was taken as one. Returns whether to go on by single UIDs."""
        if outcome is None or not outcome.reports_success or outcome.failed:
            # What is missing could not be sent; that is no answer to the list.
            return False
        if ignores_list(targets, {key for task in tasks for key in task.missing()}):
            self._session.capabilities.record_ignored_list()
        return self._session.capabilities.one_uid_only and strategy.uids > 1

    def _list_incomplete_again(self, tasks: Sequence[StudyTask]) -> None:
        """Read the lists of partly received studies again: the rest may be gone from the PACS."""
        for task in tasks:
            if task.missing() and not task.is_untouched and not is_specific(task.failure):
                try:
                    self.listing.list(task, fresh=False)
                except PacsError as error:
                    if error.scope is not Scope.REQUEST:
                        raise

    # --- studies whose instances are not listed

    def _fetch_unlisted(self, task: StudyTask, received: int) -> int:
        """Request a study of which no instances are listed, until its counts are reached.

        As a whole first, and then by the series that are short of their counts; where there are
        no counts, as a whole until the PACS has sent what it says it has.
        """
        fruitless, spare_rounds = 0, SPARE_ROUNDS.most
        while task.is_incomplete and not is_final(task.failure):
            if task.is_listed:
                return self._fetch_listed([task], received)
            if task.contradicts_counts:
                self._count_again(task)
                continue
            if fruitless == _ROUNDS[self._session.method]:
                break
            if fruitless:
                # What an association has got wrong, the next one may not.
                self._session.requestor.close()
            faulty = task.attempts.faulty_count
            this = self._request_unlisted_round(task, fruitless, received)
            received += this.received
            if this.received:
                self._admission.record_delivery()
            if this.received and task.content.evidence is Evidence.SERIES_COUNTS:
                fruitless = 0
            elif spare_rounds and (this.undetermined or task.attempts.faulty_count > faulty):
                spare_rounds -= 1
            else:
                fruitless += 1
        return self._end_unlisted(task, received)

    def _request_unlisted_round(
        self, task: StudyTask, fruitless: int, received_before: int
    ) -> Round:
        """Send the requests of one round for a study without a list."""
        this = Round()
        session = self._session
        planned = plan_unlisted_round(
            task, session.node, session.method, fruitless, session.capabilities.contexts
        )
        for request, contexts in planned:
            session.check_running()
            self._spool.check_reserve()
            task.begin_request()
            outcome = self._sender.send(request, [task], contexts)
            failpoint("request-ended")
            received = self._ingest.scan([task])
            self._record_strain(request, outcome, received)
            this.received += received
            this.undetermined = this.undetermined or is_worth_repeating(outcome)
            if outcome is None:
                continue
            task.record_end(request.level, outcome)
            if not received and task.is_incomplete:
                self._spool.check_reserve()
                first = not (received_before or this.received)
                self._record_fruitless(outcome, [task], first=first)
            if outcome.reports_success and not outcome.failed:
                # It has sent what it has: other SOP classes need not be proposed.
                break
        return this

    def _end_unlisted(self, task: StudyTask, received: int) -> int:
        """Set why a study is not complete; returns ``received`` plus what was received still.

        What the PACS returns of the study is read again: it may be gone, or be counted otherwise.
        """
        received += self._ingest.settle([task])
        if task.is_incomplete and not (is_final(task.failure) or is_specific(task.failure)):
            try:
                if task.is_untouched:
                    self._session.echo()
                if self.listing.list(task, fresh=False) and task.is_listed:
                    return self._fetch_listed([task], received)
            except PacsError as error:
                if error.scope is not Scope.REQUEST:
                    raise
        if task.is_incomplete:
            uncounted = task.content.evidence is Evidence.SUBOPERATION_COUNTS
            code = task.failure or "instances-missing"
            if uncounted and code == "instances-missing":
                code = "completeness-unknown"
            task.fail(code)
        elif not is_final(task.failure):
            task.clear_failure()
        self._record_nothing_sent(task, received)
        return received

    def _count_again(self, task: StudyTask) -> None:
        """Read the counts of a study again of which more is here than the PACS counts.

        It may have grown. A count that stays wrong proves nothing: the study is judged without it.
        """
        try:
            self.listing.list(task, fresh=False)
        except PacsError as error:
            if error.scope is not Scope.REQUEST:
                raise
        if task.contradicts_counts:
            self.listing.list_without_counts(task)

    # --- how requests end

    def _record_strain(
        self, request: RetrieveRequest, outcome: RetrieveResult | None, received: int
    ) -> None:
        """Record in the admission where a request ended as if the node had too much to do.

        Not of a node that has never sent anything: there, it is the way to here that is closed.
        """
        if outcome is None or not self._admission.has_delivered:
            return
        if (code := code_of_strain(outcome, received)) is not None:
            self._admission.record_strain(RequestKind.RETRIEVE, code, request.studies[0])

    def _record_nothing_sent(self, task: StudyTask, received: int) -> None:
        """Record in the admission where nothing of a listed study was sent."""
        if received or not task.is_untouched or is_specific(task.failure):
            return
        if task.attempts.is_explained:
            return
        self._admission.record_nothing_sent(
            task.reference, task.failure or "nothing-arrived", self._session.method
        )

    def _record_fruitless(
        self, outcome: RetrieveResult, tasks: Sequence[StudyTask], *, first: bool
    ) -> None:
        """Set the failure of studies after a request that brought nothing.

        Parameters
        ----------
        first : bool
            Whether nothing else was received before.

        Raises
        ------
        PacsError
            The node cannot be used until a person acts.
        Interrupted
            The run is to stop.
        """
        code = code_of_end(outcome, self._session.method, delivers=self._admission.has_delivered)
        if code == "interrupted" or self._session.stopping():
            raise self._session.pool.interruption(self._session.requestor)
        if code == "not-permitted" and self._admission.has_delivered:
            code = "association-lost"
        if code == "pacs-busy":
            self._admission.record_failure(code, self._sender.sent_at, outcome.retry_after_seconds)
        elif code == "sop-classes-refused" and self._session.capabilities.accepts_c_get:
            # What an earlier request ended by says more.
            tasks = [task for task in tasks if task.failure is None]
        elif (
            code == "sop-classes-refused"
            and not self._admission.has_delivered
            and self._switch_to_c_move(code)
        ):
            # It offers C-GET and does not take us for a storage SCP: nothing comes that way.
            raise PacsError(code)
        elif (
            first
            and not reason_for(code).needs_diagnosis
            and reason_for(code).disposition is Disposition.OPERATOR
        ):
            raise PacsError(code)
        for task in tasks:
            if task.is_incomplete and not (is_final(task.failure) or is_specific(task.failure)):
                partly = reason_for(code).needs_diagnosis and not task.is_untouched
                task.fail("instances-missing" if partly else code)

    def _switch_to_c_move(self, code: str) -> bool:
        """Switch to C-MOVE for the rest of the run where C-GET ended so; notes it once.

        Returns
        -------
        bool
            False where C-GET is still worth a try, or C-MOVE is not possible.
        """
        if not refuses_c_get(code):
            return False
        if code == "not-permitted" and self._admission.has_delivered:
            # What it has permitted before, it does not refuse.
            return False
        try:
            if self._reception.receiver() is None:
                return False
        except ReceiverError:
            # What is known of the node says more than what the way around it lacks.
            return False
        if self._session.capabilities.method is None:
            self._session.capabilities.method = RetrieveMethod.C_MOVE
            self._session.note(
                f"C-GET is not available ({code}); C-MOVE is used for the rest of the run. Set "
                "`retrieve: c-move`, or run `prefect-dicom doctor --probe`, to save each run the "
                "attempt"
            )
        return True
