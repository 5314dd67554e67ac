"""Settling: which missing instances a run does not request again, and why a study lacks them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from prefect_dicom.core.model import InstanceKey, RetrieveMethod
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.network.presentation_contexts import Breadth
from prefect_dicom.network.retrieve_result import RetrieveResult
from prefect_dicom.network.status import UNABLE_TO_PERFORM_SUBOPERATIONS
from prefect_dicom.retrieval.attempts import unsent_instances
from prefect_dicom.retrieval.send import NodeSession
from prefect_dicom.retrieval.strategy import RequestStrategy
from prefect_dicom.retrieval.study_task import StudyTask


class Settling:
    """Decides what is requested no more, of the studies of one chunk.

    An answer that accounts for everything is believed for what it says is missing. By C-MOVE that
    is the end of it when it is said twice. By C-GET an instance may also be missing because its
    SOP class or transfer syntax was not proposed: other proposals come first.
    """

    def __init__(self, session: NodeSession) -> None:
        self._session = session
        self._contexts = session.capabilities.contexts

    # --- requests and rounds

    def record_end(
        self,
        tasks: Sequence[StudyTask],
        asked: Collection[InstanceKey],
        selected: int,
        outcome: RetrieveResult,
        strategy: RequestStrategy,
    ) -> None:
        """A request has ended; what it has brought is recorded already.

        Parameters
        ----------
        asked : collection of InstanceKey
            The missing instances that it was sent for.
        selected : int
            How many it selects at the node, those that are here among them.
        """
        if outcome.lost is not None or outcome.turned_away is not None:
            # What the node says of its own failure, where it was ours, is not believed.
            return
        for task in tasks:
            task.attempts.record_in_vain([key for key in task.to_request() if key in asked])
        if not outcome.accounts_for(selected):
            return
        left_aside = {key for task in tasks for key in task.attempts.suspects}
        missing = {key for task in tasks for key in task.missing() if key not in left_aside}
        unsent = unsent_instances(outcome, asked, missing)
        if not unsent:
            return
        for task in tasks:
            keys = [key for key in task.missing() if key in unsent]
            # A702 to a C-MOVE is also what is said of a receiver that cannot be reached.
            way_is_open = self._is_c_get or outcome.status != UNABLE_TO_PERFORM_SUBOPERATIONS
            task.attempts.record_unsent(keys, way_is_open=way_is_open)
            here = task.instances.count_by_series()
            task.attempts.settle(key for key in keys if self._is_final(task, key, strategy, here))
        self._session.note(
            "it says of some instances that it lists that it cannot send them "
            f"(status {outcome.status:04X}); its own log names their files"
        )

    def is_to_widen(self, tasks: Sequence[StudyTask], strategy: RequestStrategy) -> bool:
        """Whether all that is left is what a C-GET of this breadth does not bring."""
        if not self._is_c_get or strategy.breadth is Breadth.SINGLE:
            return False
        return all(t.attempts.is_unsent(key) for t in tasks for key in t.to_request())

    def next_strategies(
        self, tasks: Sequence[StudyTask], strategy: RequestStrategy
    ) -> list[RequestStrategy]:
        """The strategies for what a C-GET said that it cannot send; none: as usual."""
        if strategy.breadth is not Breadth.ALL or not self.is_to_widen(tasks, strategy):
            return []
        return [RequestStrategy(strategy.uids, Breadth.SINGLE, strategy.whole)]

    def end_round(
        self, tasks: Sequence[StudyTask], strategy: RequestStrategy, *, brought: int
    ) -> None:
        """A round of requests is over, and another of its form would bring nothing more."""
        if not self._is_c_get or strategy.breadth is not Breadth.SINGLE:
            return
        for task in tasks:
            left = task.to_request()
            untold = [key for key in left if not task.instances.class_to_propose(key)]
            task.attempts.settle(untold)
            task.attempts.settle(key for key in left if task.attempts.is_unsent(key))
            if not brought:
                self._contexts.record_search(map(task.instances.class_to_propose, left))

    # --- why

    def failure_of(self, task: StudyTask) -> str:
        """Why a study lacks what it lacks; a reason code."""
        failure = task.failure or "instances-missing"
        if not self._is_c_get or reason_for(failure).says_more_than_request:
            return failure
        classes = {task.instances.class_to_propose(key) for key in task.missing()}
        if "" in classes and all(map(task.attempts.is_settled, task.missing())):
            return "class-not-told"
        if failure == "instances-missing" and all(map(self._contexts.is_refused, classes)):
            return "sop-classes-refused"
        return failure

    @property
    def _is_c_get(self) -> bool:
        return self._session.method is RetrieveMethod.C_GET

    def _is_final(
        self, task: StudyTask, key: InstanceKey, strategy: RequestStrategy, here: Counter[str]
    ) -> bool:
        """Whether no other form of a request could bring an instance that is said to be unsent.

        Parameters
        ----------
        here : collections.Counter of str
            How many instances have been received, by series.
        """
        if not task.attempts.is_unsent_for_good(key):
            return False
        if not self._is_c_get:
            return True
        sop_class = task.instances.class_to_propose(key)
        if not sop_class or strategy.breadth is Breadth.COMMON:
            return False
        # The instances of a series are kept in one transfer syntax, as good as always.
        has_mates = here[key.series_instance_uid] > 0
        return has_mates or not self._contexts.is_worth_search(sop_class)
