"""Diagnosis of requests that brought nothing: is it the study, the way to here, or the node?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.reasons import Scope, reason_for
from prefect_dicom.network.find.list_series import list_series
from prefect_dicom.network.presentation_contexts import Breadth
from prefect_dicom.retrieval.requests import RetrieveRequest
from prefect_dicom.retrieval.send import NodeSession, Reception, RequestSender
from prefect_dicom.retrieval.strategy import (
    RequestStrategy,
    missing_by_proposal,
    plan_round,
)
from prefect_dicom.retrieval.study_task import StudyTask


class Diagnosis:
    """Tells apart the causes of requests that brought nothing. Not thread-safe."""

    def __init__(self, session: NodeSession, reception: Reception, sender: RequestSender) -> None:
        self._session = session
        self._admission = session.admission
        self._spool = reception.spool
        self._ingest = reception.ingest
        self._sender = sender

    def run(self, tasks: Sequence[StudyTask], *, delivers: bool) -> int:
        """Tell apart the causes of a round without instances; returns how many come now.

        Orthanc answers with one status to a study it does not have any more, a destination that
        it does not know and one that it cannot reach; others report success for all three. So:
        does the node answer at all, does it still list the study, and does one instance come?

        Parameters
        ----------
        delivers : bool
            Whether others were received just now, so that the way is open and these are missing.

        Raises
        ------
        PacsError
            The node does not answer, or sends nothing of several studies that it has.
        """
        doubtful = [
            task
            for task in tasks
            if task.is_untouched and task.failure and reason_for(task.failure).needs_diagnosis
        ]
        if doubtful:
            self._session.echo()
        received = 0
        for task in [task for task in doubtful if self._may_exist(task)]:
            if delivers:
                if task.failure and reason_for(task.failure).may_stop_midway:
                    # Once some of it is here, the rest is requested in ever smaller pieces.
                    received += self._request_one_instance(task, alone=True) or 0
                continue
            if (brought := self._request_one_instance(task, alone=len(tasks) == 1)) is None:
                continue
            if brought:
                self._admission.record_delivery()
                return brought
            self._admission.record_nothing_sent(
                task.reference, task.failure or "nothing-arrived", self._session.method
            )
            if self._admission.disabled_for:
                raise PacsError(self._admission.disabled_for)
        return received

    def _may_exist(self, task: StudyTask) -> bool:
        """Query whether the PACS still has a study; one that is gone is recorded as such."""
        requestor = self._session.requestor
        try:
            with self._session.pool.request(requestor):
                listed = list_series(
                    requestor, task.claim.study_instance_uid, task.claim.patient_id
                )
        except PacsError as error:
            if error.scope is not Scope.REQUEST:
                raise
            return True
        if not listed.series and not listed.unlistable:
            task.record_gone()
            return False
        if task.failure == "study-gone":
            task.fail("pacs-failure")
        return True

    def _request_one_instance(self, task: StudyTask, *, alone: bool) -> int | None:
        """Request one instance, and the study where it was in a list.

        Returns
        -------
        int or None
            How many instances were received; None where receiving none says nothing about the
            PACS.
        """
        session = self._session
        single = RequestStrategy(1, Breadth.ALL)
        offered = session.capabilities.contexts
        first = next(missing_by_proposal([task], single, session.method, offered), None)
        if first is None:
            # By C-GET, instances whose classes are not told, or were refused.
            return None
        missing, contexts = first
        # Not the first: it may be the one at which the PACS stops.
        key = missing[task.reference][-1]
        instance = RetrieveRequest(
            "IMAGE",
            (task.reference,),
            (key.series_instance_uid,),
            (key.sop_instance_uid,),
            expected=1,
        )
        requests = [(instance, contexts)]
        if not alone:
            # Some PACS take no request at IMAGE level, and none with a list.
            planned = plan_round([task], single, session.node, session.method, offered)
            requests += islice(planned, 1)
        for request, contexts in requests:
            outcome = self._sender.send(request, [task], contexts)
            if received := self._ingest.scan([task]):
                return received
            self._spool.check_reserve()
            if outcome is None:
                return None
        return 0
