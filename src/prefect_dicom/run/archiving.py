"""The archiving of a retrieved chunk: upload, list again, put the manifest, commit."""

from __future__ import annotations

import contextlib
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from prefect_dicom.admission.retry import retry_once
from prefect_dicom.core.errors import ArchiveConflict, ClaimLost, PacsError, PrefectDicomError
from prefect_dicom.core.failover import choose_node
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import Chunk, StudyReference
from prefect_dicom.core.reasons import Scope, reason_for
from prefect_dicom.ledger import StudyLocation
from prefect_dicom.network.find.list_instances import ListedStudy
from prefect_dicom.retrieval.fetch import Retrieval
from prefect_dicom.retrieval.study_task import StudyTask
from prefect_dicom.run.commit import StudyCommit
from prefect_dicom.run.context import RunContext
from prefect_dicom.run.in_hand import StudiesInHand
from prefect_dicom.run.node_retrieval import NodeRetrieval
from prefect_dicom.run.upload import Uploader

_LISTS_BEFORE_GIVING_UP = 4


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ChunkArchiving:
    """Archives chunks of studies that were retrieved. Thread-safe."""

    context: RunContext
    nodes: NodeRetrieval
    uploader: Uploader
    ending: StudyCommit
    in_hand: StudiesInHand
    aside: ThreadPoolExecutor
    """Threads for manifests, which never wait behind uploads of instances."""

    def archive(self, chunk: Chunk) -> int:
        """Upload and commit what is retrieved of a chunk; returns how many studies ended archived.

        While its retrieval goes on, studies are archived as they come.

        Raises
        ------
        ArchiveError
            The archive cannot be used. What was stored is recorded; the same call again, or
            :meth:`give_back`, must follow.
        """
        archived = 0
        uploaded: list[StudyTask] = []
        early: set[StudyReference] = set()
        """The studies that came while requests for them were under way."""

        def may_list() -> bool:
            return bool(uploaded) and self.context.access.pool.is_free(chunk.node)

        with contextlib.closing(self.in_hand.batches(chunk, may_list)) as batches:
            for tasks in batches:
                uploaded += tasks
                if self.in_hand.is_open(chunk):
                    early.update(task.reference for task in tasks)
                    # What goes wrong here goes wrong again, and is dealt with there.
                    with contextlib.suppress(PrefectDicomError):
                        self.nodes.ingest().scan(tasks)
                        self.uploader.upload(tasks)
                    if not may_list():
                        # Their lists are read when an association is free, at the latest then.
                        continue
                archived += self._archive(chunk, uploaded, early) if uploaded else 0
                self.in_hand.finish(chunk, len(uploaded))
                uploaded = []
        self.ending.clear_late(early)
        return archived

    def _archive(
        self, chunk: Chunk, tasks: list[StudyTask], early: AbstractSet[StudyReference]
    ) -> int:
        # Of an earlier try some may be finished, or lost to another run.
        standing = {
            c.reference for c in self.context.ledger.claims.still_held(task.claim for task in tasks)
        }
        tasks = [task for task in tasks if task.reference in standing]
        try:
            # Another version of an instance may have come since, for which the study fails.
            self.nodes.ingest().scan([task for task in tasks if task.reference in early])
        except PrefectDicomError:
            self.in_hand.add(chunk, tasks)
            raise
        archived = 0
        finishing = self._finish_together(tasks)
        for position, task in enumerate(tasks):
            try:
                self.context.control.check()
                archived += self._archive_study(task, finishing.get(task.reference))
            except ClaimLost:
                continue
            except PrefectDicomError:
                # Kept, claims and all, for the next try.
                self.in_hand.add(chunk, tasks[position:])
                raise
        return archived

    def give_back(self, chunk: Chunk) -> None:
        """Release the claims of a chunk that will not be tried again in this run."""
        self.context.ledger.claims.release([task.claim for task in self.in_hand.take(chunk)])

    def _finish_together(self, tasks: list[StudyTask]) -> dict[StudyReference, Future[bool]]:
        """Upload all studies, read their lists again by few queries, and finish what is whole.

        Many at once: with a store that is far away each manifest is mostly waited for. What goes
        wrong before that goes wrong again, study by study, and is dealt with there; so is what
        has to be asked for again, for the node's limits are kept there.

        Returns
        -------
        dict of study reference to Future
            Done, for each study that was whole, and whose list was the same.
        """
        with contextlib.suppress(PrefectDicomError):
            self.uploader.upload([task for task in tasks if not self._fails_over(task)])
        whole = [
            w
            for w in tasks
            if w.is_listed and not (w.instances.received or w.is_incomplete or w.failure)
        ]
        lists: dict[StudyReference, ListedStudy] = {}
        if len(whole) > 1:
            failpoint("study-stored")
            node = whole[0].claim.node
            with (
                contextlib.suppress(PrefectDicomError),
                self.context.access.admitted(node) as requestor,
            ):
                lists = self.nodes.listing(node, requestor).lists(whole)
        settled = [
            task
            for task in whole
            if task.reference in lists
            and {i.key for i in lists[task.reference].instances} == task.instances.listed.keys()
        ]
        finishing = {
            task.reference: self.aside.submit(self.ending.finish, task) for task in settled
        }
        wait(finishing.values())
        return finishing

    def _archive_study(self, task: StudyTask, finishing: Future[bool] | None) -> bool:
        """Bring a study to its end, unless that was done; whether it is archived."""
        try:
            return self._complete(task) if finishing is None else finishing.result()
        except ArchiveConflict as error:
            return self.ending.end_failed(task, error.code)

    def _complete(self, task: StudyTask) -> bool:
        """Upload a study, fetch what is missing, and commit it when its list stays the same."""
        if task.failure is not None and self._fails_over(task):
            # Not archived: the next node may have other bytes under the same UIDs.
            return self.ending.end_failed(task, task.failure)
        # First of all, and whatever has become of the node.
        self.uploader.upload([task])
        with self.context.access.admitted(task.claim.node) as requestor:
            retrieval = self.nodes.retrieval(task.claim.node, requestor)
            for _ in range(_LISTS_BEFORE_GIVING_UP):
                if task.is_incomplete and task.failure is None:
                    # The spool lost files on the way to the archive.
                    self._fetch_and_upload(retrieval, task)
                    continue
                if task.failure is not None:
                    return self.ending.end_failed(task, task.failure)
                failpoint("study-stored")
                try:
                    changed = retry_once(lambda: retrieval.listing.list(task, fresh=False))
                except PacsError as error:
                    if error.scope is not Scope.REQUEST:
                        raise
                    self.context.access.record_failed_query(task.claim.node, error.code)
                    return self.ending.end_failed(task, error.code)
                if not changed:
                    break
                self._fetch_and_upload(retrieval, task)
            else:
                return self.ending.end_failed(task, "study-changed")
        return self.ending.finish(task)

    def _fails_over(self, task: StudyTask) -> bool:
        """Whether the study has failed at its node, and there is another to be asked for it."""
        nodes = self.context.cohort.nodes
        if len(nodes) == 1 or task.failure is None or not reason_for(task.failure).failover:
            return False
        locations = dict(
            self.context.ledger.study_locations.of_studies([task.reference]).get(task.reference, {})
        )
        locations[task.claim.node] = StudyLocation(task.claim.node, reason=task.failure)
        return choose_node(nodes, locations) is not None

    def _fetch_and_upload(self, retrieval: Retrieval, task: StudyTask) -> None:
        retrieval.fetch([task])
        self.uploader.upload([task])
