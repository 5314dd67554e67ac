"""The retrieval of a chunk of studies into the spool: claim, list, and fetch in turn."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from prefect_dicom.admission.health import RequestKind
from prefect_dicom.admission.retry import retry_once
from prefect_dicom.archive import Archive
from prefect_dicom.archive.manifest import held_manifest, manifest_at
from prefect_dicom.archive.verification import check_manifest
from prefect_dicom.core.errors import ArchiveError, ClaimLost, Interrupted, PacsError, SpoolFull
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import (
    Chunk,
    CohortRow,
    Evidence,
    Instance,
    InstanceKey,
    Level,
    StudyReference,
)
from prefect_dicom.core.reasons import Scope
from prefect_dicom.core.uids import object_key, study_prefix
from prefect_dicom.dicom.value_matching import unpadded
from prefect_dicom.discovery.row_query import discover
from prefect_dicom.discovery.service import DiscoveryService
from prefect_dicom.ledger import Claim
from prefect_dicom.network.node_client import NodeClient
from prefect_dicom.retrieval.fetch import Retrieval
from prefect_dicom.retrieval.instance_list import Listing
from prefect_dicom.retrieval.study_task import StudyTask
from prefect_dicom.retrieval.whole_studies import HandOver
from prefect_dicom.run.chunks import ChunkPlanner
from prefect_dicom.run.commit import StudyCommit
from prefect_dicom.run.context import RunContext
from prefect_dicom.run.in_hand import StudiesInHand
from prefect_dicom.run.node_retrieval import NodeRetrieval
from prefect_dicom.run.retrieval_turns import RetrievalTurns
from prefect_dicom.run.upload import Uploader

log = logging.getLogger(__name__)


_UPLOAD_SECONDS = 30.0
"""How long a retrieve waits, with a full spool, for the archiving of what it has brought."""
_LOOK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class _Claimed:
    """The claimed studies of a chunk that is retrieved."""

    chunk: Chunk
    claims: list[Claim]
    handed: set[StudyReference] = field(default_factory=set)
    """Those that are in hand: their archiving goes on, whatever becomes of the others."""

    def kept(self) -> list[Claim]:
        """The claims of the others."""
        return [claim for claim in self.claims if claim.reference not in self.handed]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ChunkRetrieval:
    """Retrieves chunks of studies. Thread-safe."""

    context: RunContext
    discovery: DiscoveryService
    planner: ChunkPlanner
    nodes: NodeRetrieval
    archive: Archive
    uploader: Uploader
    ending: StudyCommit
    in_hand: StudiesInHand
    turns: RetrievalTurns
    aside: ThreadPoolExecutor
    """Threads for manifests, which never wait behind uploads of instances."""

    def retrieve(self, chunk: Chunk) -> int:
        """Bring the studies of a chunk into the spool; returns how many it could claim.

        They are claimed and listed at once, and requested when it is their turn. A study that
        cannot be completed is left to :meth:`~prefect_dicom.run.archiving.ChunkArchiving.archive`,
        which keeps the instances received.

        Raises
        ------
        PacsError
            The node cannot be used. Claims are released, nothing is lost.
        SpoolFull
            There is no room for the chunk, though all of it that was received is in the archive.
        """
        context = self.context
        context.access.wait_for(chunk.node, acquire=False)
        node = chunk.node if len(context.cohort.nodes) > 1 else None
        claims = context.ledger.claims.acquire(
            context.record, chunk.studies, context.cohort.selection, node
        )
        # Some may have been taken by others since the chunk was made.
        self.planner.leave_to_others({*chunk.studies} - {claim.reference for claim in claims})
        chosen = _Claimed(chunk, claims)
        try:
            failpoint("claimed")
            retrieved = not claims or self._retrieve_claimed(chosen)
        except BaseException:
            context.ledger.claims.release(chosen.kept())
            raise
        if not retrieved:
            context.ledger.claims.release(claims)
            return 0
        return len(claims)

    def _retrieve_claimed(self, chosen: _Claimed) -> bool:
        """List claimed studies, and fetch them in turn; False where their turn will not come."""
        chunk = chosen.chunk
        if self.context.access.chunks_ahead(chunk.node):
            tasks = self._list_claimed(chunk.node, chosen.claims)
            failpoint("listed-ahead")
            if not tasks:
                return True
            with self.turns.turn(chunk) as granted:
                if granted:
                    self._fetch_in_turn(chosen, tasks)
            return granted
        # Asked for less than usual: nothing is listed before what becomes of the others is known.
        with self.turns.turn(chunk) as granted:
            if granted and (tasks := self._list_claimed(chunk.node, chosen.claims)):
                self._fetch_in_turn(chosen, tasks)
        return granted

    def _fetch_in_turn(self, chosen: _Claimed, tasks: list[StudyTask]) -> None:
        """Fetch listed studies. They are in hand as soon as they are whole, the others then."""
        node = chosen.chunk.node

        def hand_over(whole: Sequence[StudyTask]) -> None:
            chosen.handed.update(task.reference for task in whole)
            self.in_hand.add(chosen.chunk, whole)

        with (
            self._withdrawing(node),
            self.context.access.admitted(node, RequestKind.RETRIEVE) as requestor,
        ):
            self._fetch(chosen.chunk, self.nodes.retrieval(node, requestor), tasks, hand_over)
            self._note_contradictions(node, requestor)
        hand_over([task for task in tasks if task.reference not in chosen.handed])

    @contextlib.contextmanager
    def _withdrawing(self, node: str) -> Iterator[None]:
        """Withdraw the next chunks of a node that fails: their requests would fail likewise."""
        try:
            yield
        except PacsError:
            self.turns.withdraw(node)
            raise

    def _list_claimed(self, node: str, claims: list[Claim]) -> list[StudyTask]:
        """List claimed studies; returns those that are to be requested."""
        with self._withdrawing(node), self.context.access.admitted(node) as requestor:
            claims = [*filter(None, (self._find_at_node(requestor, claim) for claim in claims))]
            claimed = [StudyTask(claim) for claim in claims]
            self._read_acceptances(claimed)
            manifests = self._held_manifests(claimed)
            listing = self.nodes.listing(node, requestor)
            together = self._list_together(listing, claimed)
            listed = []
            for task in claimed:
                self.context.control.check()
                if self._list(listing, task, task.reference in together):
                    listed.append(task)
            self._note_contradictions(node, requestor)
        return [task for task in listed if self._is_to_request(task, manifests[task.reference])]

    def _note_contradictions(self, node: str, requestor: NodeClient) -> None:
        seen = self.discovery.contradictions(node, requestor) | self.nodes.contradictions(node)
        self.context.notes.add_contradictions(node, self.context.site.capabilities[node], seen)

    def _read_acceptances(self, tasks: list[StudyTask]) -> None:
        """Read what people have accepted of the studies."""
        ledger, cohort = self.context.ledger, self.context.cohort.number
        references = [task.reference for task in tasks]
        accepted = ledger.acceptances.of_studies(cohort, references)
        numbers = ledger.acceptances.numbers_of_rows(cohort, references)
        for task in tasks:
            task.accepted.record(accepted[task.reference], numbers.get(task.reference, ()))

    def _leave_out_accepted(self, task: StudyTask) -> None:
        """Do not request instances that a person has accepted to be missing."""
        accepted = task.accepted.missing
        if accepted is None or not task.is_listed:
            return
        missing = set(accepted.missing)
        keys = [key for key in task.missing() if key in missing]
        if not keys:
            return
        rejections = [(key, "missing-accepted") for key in keys]
        self.context.ledger.instances.record_rejected(task.claim, rejections)
        failpoint("rejection-recorded")
        for key in keys:
            task.instances.record_rejected(key)

    def _find_at_node(self, requestor: NodeClient, claim: Claim) -> Claim | None:
        """Return the claim if its node has the study: it may stand in for a node that failed."""
        if claim.is_found:
            return claim
        row = CohortRow(0, study_instance_uid=claim.study_instance_uid)
        try:
            with self.context.access.pool.request(requestor):
                found = retry_once(
                    lambda: discover(requestor, row, self.discovery.capabilities(claim.node))
                )
        except PacsError as error:
            if error.scope is not Scope.REQUEST:
                raise
            self.context.access.record_failed_query(claim.node, error.code)
            self.ending.fail(StudyTask(claim), error.code)
            return None
        if not found.studies:
            self.ending.fail(StudyTask(claim), found.reason or "no-match")
            return None
        patients = {unpadded(claim.patient_id), unpadded(found.studies[0].patient_id)} - {""}
        if len(patients) > 1:
            self.ending.fail(StudyTask(claim), "several-patients")
            return None
        return self.context.ledger.studies.record_found(claim, found.studies[0])

    def _fetch(
        self, chunk: Chunk, retrieval: Retrieval, tasks: list[StudyTask], hand_over: HandOver
    ) -> None:
        """Fetch studies; if the spool is full, upload the instances received and go on."""
        handed: list[StudyTask] = []

        def noted(whole: Sequence[StudyTask]) -> None:
            handed.extend(whole)
            hand_over(whole)

        while True:
            left = [task for task in tasks if task not in handed]
            try:
                retrieval.fetch(left, noted)
                return
            except SpoolFull:
                waiting = [t for t in left if t not in handed and t.instances.received]
                uploading = [task for task in handed if task.instances.received]
                if not (waiting or uploading):
                    raise
                if not self.in_hand.is_open(chunk):
                    # They are archived when their retrieval has ended: nobody uploads them now.
                    waiting += uploading
                    uploading = []
                self.uploader.upload(waiting)
                self._wait_for_uploads(uploading)

    def _wait_for_uploads(self, tasks: Sequence[StudyTask]) -> None:
        """Wait until their archiving has taken something of these studies out of the spool.

        Raises
        ------
        SpoolFull
            It does not get on.
        """
        until = self.context.clock.monotonic() + _UPLOAD_SECONDS
        waiting = [len(task.instances.received) for task in tasks]
        while tasks and waiting == [len(task.instances.received) for task in tasks]:
            if self.context.clock.monotonic() >= until:
                raise SpoolFull()
            if not self.context.control.sleep(_LOOK_SECONDS):
                raise Interrupted()

    # --- instance lists

    def _list_together(self, listing: Listing, tasks: list[StudyTask]) -> set[StudyReference]:
        """List as many studies as possible by few queries; returns which were listed."""
        try:
            return retry_once(lambda: listing.list_afresh(tasks))
        except ClaimLost:
            # One of them: found out one by one.
            return set()
        except PacsError as error:
            # A PACS whose association breaks over a list of UIDs may well answer single ones.
            if error.scope is not Scope.REQUEST:
                raise
            return set()

    def _held_manifests(self, tasks: list[StudyTask]) -> dict[StudyReference, Future[bytes | None]]:
        """Read the manifest of each study from the archive, many at a time."""
        return {
            task.reference: self.aside.submit(
                held_manifest, self.archive, task.claim.study_instance_uid
            )
            for task in tasks
        }

    def _list(self, listing: Listing, task: StudyTask, listed: bool) -> bool:
        """List a study, if it is not listed yet; False where that ended it."""
        try:
            if not listed:
                retry_once(lambda: listing.list(task, fresh=True))
        except PacsError as error:
            if error.scope is not Scope.REQUEST:
                raise
            self.context.access.record_failed_query(task.claim.node, error.code)
            self.ending.fail(task, error.code)
            return False
        except ClaimLost:
            return False
        self.context.access.admission(task.claim.node).record_answer()
        return True

    def _is_to_request(self, task: StudyTask, held: Future[bytes | None]) -> bool:
        """Whether a listed study is to be requested; where not, it has come to its end."""
        if task.is_listed and not task.instances.listed:
            self.ending.fail(task, task.failure or "instance-list-empty")
            return False
        self._expect_lost(task)
        self._leave_out_accepted(task)
        try:
            return not self._commit_held(task, held)
        except ArchiveError as error:
            if error.scope is not Scope.STUDY:
                raise
            self.ending.fail(task, error.code)
            return False

    # --- what the archive has already

    def _expect_lost(self, task: StudyTask) -> None:
        """Expect instances again that an earlier run stored and the archive no longer has."""
        stored = task.instances.stored()
        if not stored:
            return
        uid = task.claim.study_instance_uid
        there = dict(self.archive.keys(study_prefix(uid)))
        lost = [key for key in stored if object_key(uid, *key) not in there]
        if not lost:
            return
        log.warning(
            "%d stored objects are gone from the archive; they are asked for again", len(lost)
        )
        self.context.ledger.instances.record_lost(task.claim, lost)
        for key in lost:
            task.instances.expect_lost(key)

    def _commit_held(self, task: StudyTask, held: Future[bytes | None]) -> bool:
        """Commit a study whose listed instances the archive holds already; whether it does.

        The ledger was lost, or an older backup of it was put in its place.

        Raises
        ------
        ArchiveError
            ``selected-otherwise`` where it holds other series of the study than are wanted.
        """
        if not task.is_incomplete:
            return False
        uid = task.claim.study_instance_uid
        data = held.result()
        if data is None:
            return False
        manifest = manifest_at(study_prefix(uid), data)
        if manifest.selection != self.context.cohort.selection:
            raise ArchiveError("selected-otherwise")
        named = manifest.keys
        if not _is_as_listed(task, named) or check_manifest(self.archive, manifest, Level.SIZE):
            # What is missing is put where the manifest has it; any other difference is a conflict.
            return False
        if not task.is_listed:
            self.context.ledger.instances.extend_lists(
                [(task.claim, [Instance(key) for key in named])]
            )
            failpoint("list-extended")
        self.ending.commit(task, manifest, data, rebuilt=True)
        return True


def _is_as_listed(task: StudyTask, named: set[InstanceKey]) -> bool:
    """Whether a manifest names what the node lists, or counts."""
    if task.content.evidence is Evidence.SERIES_COUNTS:
        counts = Counter(key.series_instance_uid for key in named)
        return counts == Counter(task.content.series) and task.instances.listed.keys() <= named
    return named == task.instances.listed.keys()
