"""The use cases, composed from the modules below; no Prefect.

A :class:`Pull` is everything one run holds open. Its three steps meet in the ledger: ``discover``
(``planning.py``) turns cohort rows into studies, ``retrieve`` brings a chunk of studies into the
spool, ``archive`` puts it into the archive and commits it. The order of writes is the design
(``docs/promise.md``): the manifest of a study is written when everything it names is there, and
the ledger says *archived* after that.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from prefect_dicom.admission.retry import retry_once
from prefect_dicom.archive import Archive, open_archive
from prefect_dicom.archive.manifest import decode_manifest, held_manifest, manifest_at, put_manifest
from prefect_dicom.archive.spool import Spool
from prefect_dicom.archive.verification import check_manifest
from prefect_dicom.config.node import PacsNode
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.core.clock import Clock
from prefect_dicom.core.errors import (
    ArchiveConflict,
    ArchiveError,
    ClaimLost,
    Interrupted,
    PacsError,
    PrefectDicomError,
    SpoolFull,
)
from prefect_dicom.core.events import Event
from prefect_dicom.core.failover import choose_node
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.metrics import upload_ended, upload_waits, uploaded
from prefect_dicom.core.model import (
    ArchivedInstance,
    Chunk,
    CohortRow,
    Evidence,
    Instance,
    InstanceKey,
    InstanceState,
    Level,
    ManifestInstance,
    ReceivedInstance,
    RetrieveMethod,
    StudyManifest,
    StudyReference,
    WithheldInstance,
)
from prefect_dicom.core.reasons import Scope, reason_for
from prefect_dicom.core.uids import manifest_key, object_key, study_prefix
from prefect_dicom.dicom.value_matching import unpadded
from prefect_dicom.discovery.row_query import discover
from prefect_dicom.ledger import Claim, Ledger, StudyLocation
from prefect_dicom.network.find.list_instances import ListedStudy
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.network.storage_scp import ReceiverLease
from prefect_dicom.retrieval.fetch import Retrieval
from prefect_dicom.retrieval.ingest import Ingest
from prefect_dicom.retrieval.instance_list import Listing
from prefect_dicom.retrieval.requests import plan_chunks
from prefect_dicom.retrieval.send import NodeAccess, Reception
from prefect_dicom.retrieval.strategy import PeerCapabilities
from prefect_dicom.retrieval.study_task import StudyTask
from prefect_dicom.run.planning import Plan, at_work, current_plan

log = logging.getLogger(__name__)

_STUDIES_PER_PAGE = 500
_STORED_PER_WRITE = 200
_LISTS_BEFORE_GIVING_UP = 4
_STUDIES_AT_A_TIME = 8
_DISKS_SECONDS = 30.0


def current_pull() -> Pull:
    """The run this thread works for, where that is one that retrieves."""
    plan = current_plan()
    if not isinstance(plan, Pull):
        raise TypeError("this run only plans")
    return plan


@dataclass(kw_only=True)
class Pull(Plan):
    """Everything one run holds open. Use :func:`open_pull`."""

    spool: Spool
    archive: Archive
    open: contextlib.ExitStack
    """Closes with the run what is opened while it goes on."""
    uploads: ThreadPoolExecutor
    aside: ThreadPoolExecutor
    """For what is asked of the archive about studies; it never waits behind their objects."""
    _tasks: dict[StudyReference, StudyTask] = field(default_factory=dict)
    _peer_capabilities: dict[str, PeerCapabilities] = field(default_factory=dict)
    _left_to_others: set[StudyReference] = field(default_factory=set)
    _lease: ReceiverLease | None = None
    _next_chunk: int = 1
    _disks_low: set[str] = field(default_factory=set)
    _look_at_disks_at: float = float("-inf")

    # --- retrieval

    def chunks(self, node: str | None = None) -> Iterator[Chunk]:
        """The studies that are still to be pulled, in chunks. Finished ones appear in none.

        Neither do those that other runs are working on: see :meth:`left_to_others`.

        Parameters
        ----------
        node : str, optional
            Of a cohort with several nodes, only those that this one is to be asked for now.
        """
        self.limit_per_patient()
        limits = self.site.nodes[node or self.cohort.node].limits
        planned = plan_chunks(
            self._studies_to_pull() if node is None else self._studies_to_ask_of(node),
            chunk_studies=limits.chunk_studies,
            chunk_instances=limits.chunk_instances,
        )
        for chunk in planned:
            if free := self._not_held_by_others(chunk.studies):
                # Several nodes have their chunks in turn.
                yield replace(chunk, number=self._next_chunk, studies=free)
                self._next_chunk += 1

    def _not_held_by_others(self, studies: Sequence[StudyReference]) -> tuple[StudyReference, ...]:
        held = self.ledger.studies.unfinished(studies, self.cohort.selection)
        with self._lock:
            self._left_to_others.update(study for study in studies if held.get(study))
        return tuple(study for study in studies if held.get(study) is False)

    def left_to_others(self) -> tuple[int, bool]:
        """What this run has met in the hands of other runs, as far as it is not finished yet.

        Returns
        -------
        tuple of int and bool
            How many studies they still hold, and whether one has fallen free: its run gave it
            up, or is dead. Of that it is told once.
        """
        with self._lock:
            left = tuple(self._left_to_others)
        held = self.ledger.studies.unfinished(left, self.cohort.selection)
        with self._lock:
            self._left_to_others.intersection_update(study for study in held if held[study])
        return sum(held.values()), not all(held.values())

    def _studies_to_pull(self) -> Iterator[tuple[StudyReference, str, int | None]]:
        """Unfinished studies; those that were tried before and brought nothing come last.

        A few that never come would otherwise stop every run at its beginning, as a node that
        sends nothing. What an earlier run left in the spool comes early: it may fill the disk.
        What it left in the spool of another host is better finished there, and comes last too.
        """
        here = self.spool.studies()
        tried: list[tuple[StudyReference, str, int | None]] = []
        after = 0
        while page := self.ledger.studies.to_pull(self.cohort.number, after, _STUDIES_PER_PAGE):
            for record in page:
                if record.node in self.site.nodes:
                    study = record.reference, record.node, record.study.number_of_instances
                    if record.attempt and record.reference not in here:
                        tried.append(study)
                    else:
                        yield study
            after = page[-1].reference
        yield from tried

    @property
    def retrieved(self) -> int:
        """How many studies have been retrieved and wait to be archived."""
        return len(self._tasks)

    def chunks_by_node(self) -> dict[str, Iterator[Chunk]]:
        """The chunks by the node that is asked for them; the order is the cohort's."""
        if len(self.cohort.nodes) == 1:
            return {self.cohort.node: self.chunks()}
        return {node: self.chunks(node) for node in self.cohort.nodes}

    def _studies_to_ask_of(self, node: str) -> Iterator[tuple[StudyReference, str, int | None]]:
        """The unfinished studies of which this node of several is to be asked now."""
        nodes = self.cohort.nodes
        after = 0
        while page := self.ledger.studies.to_pull(self.cohort.number, after, _STUDIES_PER_PAGE):
            known = self.ledger.study_locations.of_studies(record.reference for record in page)
            disabled = [each for each in nodes if self.admission(each).disabled_for]
            for record in page:
                locations = known.get(record.reference, {})
                if all(each in locations and locations[each].reason is not None for each in nodes):
                    # Another cohort has tried them all for it; this one has not.
                    locations = {}
                if choose_node(nodes, locations, disabled) == node:
                    location = locations.get(node)
                    yield record.reference, node, location and location.number_of_instances
            after = page[-1].reference

    def retrieve(self, chunk: Chunk) -> int:
        """Bring the studies of a chunk into the spool; returns how many it could claim.

        A study that cannot be completed is left to :meth:`archive`, which keeps what arrived.

        Raises
        ------
        PacsError
            The node cannot be used. Claims are given back, nothing is lost.
        SpoolFull
            There is no room for the chunk, though what had arrived of it is in the archive.
        """
        self.wait_for(chunk.node, turn=False)
        node = chunk.node if len(self.cohort.nodes) > 1 else None
        claims = self.ledger.claims.acquire(self.run, chunk.studies, self.cohort.selection, node)
        with self._lock:
            # Some may have been taken by others since the chunk was made.
            self._left_to_others.update({*chunk.studies} - {claim.reference for claim in claims})
        tasks: list[StudyTask] = []
        try:
            failpoint("claimed")
            if not claims:
                return 0
            with self._asking(chunk.node) as requestor:
                retrieval = self._retrieval(chunk.node, requestor)
                claims = [*filter(None, (self._find_at_node(requestor, claim) for claim in claims))]
                claimed = [StudyTask(claim) for claim in claims]
                listed = self._list_together(retrieval, claimed)
                manifests = self._held_manifests(claimed)
                for task in claimed:
                    self._check_stop()
                    known = task.reference in listed
                    if self._list(retrieval, task, known, manifests[task.reference]):
                        tasks.append(task)
                self._fetch(retrieval, tasks)
                self._doubt_capabilities(chunk.node, requestor)
        except BaseException:
            self.ledger.claims.release(claims)
            raise
        with self._lock:
            self._tasks.update((task.reference, task) for task in tasks)
        return len(claims)

    def _find_at_node(self, requestor: Requestor, claim: Claim) -> Claim | None:
        """The claim, where its node has the study: it may be asked because another has failed."""
        if claim.is_found:
            return claim
        row = CohortRow(0, study_instance_uid=claim.study_instance_uid)
        try:
            with self.pool.request(requestor):
                found = retry_once(lambda: discover(requestor, row, self.study_queries(claim.node)))
        except PacsError as error:
            if error.scope is not Scope.REQUEST:
                raise
            self._count_failed_query(claim.node, error.code)
            self._fail(StudyTask(claim), error.code)
            return None
        if not found.studies:
            self._fail(StudyTask(claim), found.reason or "no-match")
            return None
        patients = {unpadded(claim.patient_id), unpadded(found.studies[0].patient_id)} - {""}
        if len(patients) > 1:
            self._fail(StudyTask(claim), "several-patients")
            return None
        return self.ledger.studies.record_found(claim, found.studies[0])

    def _fetch(self, retrieval: Retrieval, tasks: list[StudyTask]) -> None:
        """Fetch; where the spool is full, make room by uploading what has arrived, and go on."""
        while True:
            try:
                retrieval.fetch(tasks)
                return
            except SpoolFull:
                waiting = [task for task in tasks if task.instances.received]
                if not waiting:
                    raise
                self._upload(waiting)

    def _list_together(self, retrieval: Retrieval, tasks: list[StudyTask]) -> set[StudyReference]:
        """List as many studies as can be by few queries; which they are."""
        try:
            return retry_once(lambda: retrieval.listing.list_afresh(tasks))
        except ClaimLost:
            # One of them: found out one by one.
            return set()
        except PacsError as error:
            # A PACS whose association breaks over a list of UIDs may well answer single ones.
            if error.scope is not Scope.REQUEST:
                raise
            return set()

    def _held_manifests(self, tasks: list[StudyTask]) -> dict[StudyReference, Future[bytes | None]]:
        """What the archive says of each study, asked many at once."""
        return {
            task.reference: self.aside.submit(
                held_manifest, self.archive, task.claim.study_instance_uid
            )
            for task in tasks
        }

    def _list(
        self, retrieval: Retrieval, task: StudyTask, listed: bool, held: Future[bytes | None]
    ) -> bool:
        """List a study, if it is not listed yet; False where that ended it."""
        try:
            if not listed:
                retry_once(lambda: retrieval.listing.list(task, fresh=True))
        except PacsError as error:
            if error.scope is not Scope.REQUEST:
                raise
            self._count_failed_query(task.claim.node, error.code)
            self._fail(task, error.code)
            return False
        except ClaimLost:
            return False
        self.admission(task.claim.node).record_answer()
        if task.is_listed and not task.instances.listed:
            self._fail(task, task.failure or "instance-list-empty")
            return False
        self._expect_lost(task)
        try:
            return not self._archived_before(task, held)
        except ArchiveError as error:
            if error.scope is not Scope.STUDY:
                raise
            self._fail(task, error.code)
            return False

    def _expect_lost(self, task: StudyTask) -> None:
        """Expect again what an earlier run has stored and the archive no longer has."""
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
        self.ledger.instances.record_lost(task.claim, lost)
        for key in lost:
            task.instances.expect_lost(key)

    def _archived_before(self, task: StudyTask, held: Future[bytes | None]) -> bool:
        """Whether the archive holds exactly the listed instances and says so.

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
        if manifest.selection != self.cohort.selection:
            raise ArchiveError("selected-otherwise")
        named = {
            InstanceKey(i.series_instance_uid, i.sop_instance_uid)
            for i in (*manifest.instances, *manifest.withheld)
        }
        same = named == task.instances.listed.keys()
        if task.content.evidence is Evidence.SERIES_COUNTS:
            counts = Counter(key.series_instance_uid for key in named)
            same = counts == Counter(task.content.series) and task.instances.listed.keys() <= named
        if not same or check_manifest(self.archive, manifest, Level.SIZE):
            # What is missing is put where the manifest has it; any other difference is a conflict.
            return False
        if not task.is_listed:
            self.ledger.instances.extend_lists([(task.claim, [Instance(key) for key in named])])
            failpoint("list-extended")
        self._commit(task, manifest, data, rebuilt=True)
        return True

    # --- archiving

    def archive_chunk(self, chunk: Chunk) -> int:
        """Upload and commit what was retrieved of a chunk; returns how many studies ended archived.

        Raises
        ------
        ArchiveError
            The archive cannot be used. What was stored is recorded; the same call again, or
            :meth:`give_back`, must follow.
        """
        with self._lock:
            tasks = [self._tasks.pop(r) for r in chunk.studies if r in self._tasks]
        # Of an earlier try some may be finished, or lost to another run.
        standing = {
            c.reference for c in self.ledger.claims.still_held(task.claim for task in tasks)
        }
        tasks = [task for task in tasks if task.reference in standing]
        archived = 0
        finishing = self._finish_together(tasks)
        for position, task in enumerate(tasks):
            try:
                self._check_stop()
                archived += self._archive_study(task, finishing.get(task.reference))
            except ClaimLost:
                continue
            except PrefectDicomError:
                # Kept, claims and all, for the next try.
                with self._lock:
                    self._tasks.update((w.reference, w) for w in tasks[position:])
                raise
        return archived

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
            self._upload([task for task in tasks if not self._may_turn(task)])
        whole = [
            w
            for w in tasks
            if w.is_listed and not (w.instances.received or w.is_incomplete or w.failure)
        ]
        lists: dict[StudyReference, ListedStudy] = {}
        if len(whole) > 1:
            failpoint("study-stored")
            node = whole[0].claim.node
            with contextlib.suppress(PrefectDicomError), self._asking(node) as requestor:
                lists = self._listing(node, requestor).lists(whole)
        settled = [
            task
            for task in whole
            if task.reference in lists
            and {i.key for i in lists[task.reference].instances} == task.instances.listed.keys()
        ]
        finishing = {task.reference: self.aside.submit(self._finish, task) for task in settled}
        wait(finishing.values())
        return finishing

    def give_back(self, chunk: Chunk) -> None:
        """Release the claims of a chunk that will not be tried again in this run."""
        with self._lock:
            tasks = [self._tasks.pop(r) for r in chunk.studies if r in self._tasks]
        self.ledger.claims.release([task.claim for task in tasks])

    def _archive_study(self, task: StudyTask, finishing: Future[bool] | None) -> bool:
        """Bring a study to its end, unless that was done; whether it is archived."""
        try:
            return self._complete(task) if finishing is None else finishing.result()
        except ArchiveConflict as error:
            return self._end_failed(task, error.code)

    def _complete(self, task: StudyTask) -> bool:
        if self._may_turn(task):
            # Not archived: the next node may have other bytes under the same UIDs.
            return self._end_failed(task, task.failure)
        # First of all, and whatever has become of the node.
        self._upload([task])
        with self._asking(task.claim.node) as requestor:
            retrieval = self._retrieval(task.claim.node, requestor)
            for _ in range(_LISTS_BEFORE_GIVING_UP):
                if task.is_incomplete and task.failure is None:
                    # The spool lost files on the way to the archive.
                    self._fetch_and_upload(retrieval, task)
                    continue
                if task.failure is not None:
                    return self._end_failed(task, task.failure)
                failpoint("study-stored")
                try:
                    changed = retry_once(lambda: retrieval.listing.list(task, fresh=False))
                except PacsError as error:
                    if error.scope is not Scope.REQUEST:
                        raise
                    self._count_failed_query(task.claim.node, error.code)
                    return self._end_failed(task, error.code)
                if not changed:
                    break
                self._fetch_and_upload(retrieval, task)
            else:
                return self._end_failed(task, "study-changed")
        return self._finish(task)

    def _may_turn(self, task: StudyTask) -> bool:
        """Whether the study has failed at its node, and there is another to be asked for it."""
        if (
            len(self.cohort.nodes) == 1
            or task.failure is None
            or not reason_for(task.failure).failover
        ):
            return False
        locations = dict(
            self.ledger.study_locations.of_studies([task.reference]).get(task.reference, {})
        )
        locations[task.claim.node] = StudyLocation(task.claim.node, reason=task.failure)
        return choose_node(self.cohort.nodes, locations) is not None

    def _fetch_and_upload(self, retrieval: Retrieval, task: StudyTask) -> None:
        retrieval.fetch([task])
        self._upload([task])

    def _finish(self, task: StudyTask) -> bool:
        """Put the manifest of a study whose instances are all there, and commit it."""
        manifest = _manifest_of(task, self.ledger, self.cohort.selection)
        failpoint("listed-again")
        data = put_manifest(self.archive, manifest)
        failpoint("manifest-put")
        self._commit(task, manifest, data)
        return True

    def _commit(
        self, task: StudyTask, manifest: StudyManifest, data: bytes, *, rebuilt: bool = False
    ) -> None:
        figures = {
            "instances": len(manifest.instances),
            "withheld": len(manifest.withheld),
            "size_bytes": sum(i.size_bytes for i in manifest.instances),
        }
        self.ledger.studies.record_archived(
            task.claim, data, **figures, rebuilt=rebuilt, evidence=manifest.evidence
        )
        failpoint("archived-recorded")
        _clear(self.spool, task.reference, manifest)
        node, reference = task.claim.node, task.reference
        at = self.clock.now()
        self.tell(
            Event(name="study.archived", at=at, node=node, reference=reference, figures=figures)
        )

    def _end_failed(self, task: StudyTask, code: str) -> bool:
        """The study ends without a manifest; what was stored stays, for a rerun to build on."""
        self._quarantine_strangers(task)
        self._fail(task, code)
        return False

    def _fail(self, task: StudyTask, code: str) -> None:
        node, reference = task.claim.node, task.reference
        if not self.ledger.studies.record_failed(task.claim, code, nodes=self.cohort.nodes):
            self._turned.set()
            return
        at = self.clock.now()
        self.tell(Event(name="study.failed", at=at, node=node, reference=reference, reason=code))

    def _quarantine_strangers(self, task: StudyTask) -> None:
        for sha256 in task.files.unlisted:
            with contextlib.suppress(FileNotFoundError):
                self.spool.quarantine_file(task.reference, sha256, "not-requested")
        task.files.forget_unlisted()

    def _upload(self, tasks: Sequence[StudyTask]) -> None:
        """Store all received instances of the studies, many at once, recorded in batches.

        Raises
        ------
        ArchiveError
            One could not be stored. What could is recorded, of all studies.
        """
        received = [
            (task, instance) for task in tasks for instance in task.instances.received.values()
        ]
        trouble: PrefectDicomError | None = None
        for first in range(0, len(received), _STORED_PER_WRITE):
            self._check_stop()
            futures = [
                (task, instance, self._put(task, instance))
                for task, instance in received[first : first + _STORED_PER_WRITE]
            ]
            done: dict[StudyReference, list] = defaultdict(list)
            for task, instance, future in futures:
                if trouble is not None and future.cancel():
                    continue
                try:
                    stored = future.result()
                except (ArchiveError, Interrupted) as error:
                    if error.code == "spool-damaged":
                        self._forget_damaged(task, instance)
                    else:
                        trouble = trouble or error
                    continue
                warnings = task.instances.findings_of(instance.key)
                done[task.reference].append((instance.key, stored, warnings))
                failpoint("put-answered")
            for task in tasks:
                if task.reference in done:
                    self._record_stored(task, done[task.reference])
            if trouble is not None:
                raise trouble

    def _put(self, task: StudyTask, instance: ReceivedInstance) -> Future[ArchivedInstance]:
        key = object_key(task.claim.study_instance_uid, *instance.key)
        path = self.spool.file(task.reference, instance.sha256)
        upload_waits()
        future = self.uploads.submit(self._put_file, key, path, instance)
        future.add_done_callback(upload_ended)
        return future

    def _put_file(self, key: str, path: Path, instance: ReceivedInstance) -> ArchivedInstance:
        began = time.monotonic()
        stored = self.archive.put_file(key, path, instance.sha256, instance.size_bytes)
        uploaded(instance.size_bytes, time.monotonic() - began)
        return stored

    def _record_stored(self, task: StudyTask, done: list) -> None:
        self.ledger.instances.record_stored(task.claim, done)
        failpoint("stored-recorded")
        for key, stored, _ in done:
            task.instances.record_stored(key, stored.sha256)
            self.spool.remove(task.reference, stored.sha256)

    def _forget_damaged(self, task: StudyTask, instance: ReceivedInstance) -> None:
        self.spool.remove(task.reference, instance.sha256)
        self.ledger.instances.record_lost(task.claim, [instance.key])
        task.record_damaged(instance)

    # --- around

    def _retrieval(self, node: str, requestor: Requestor) -> Retrieval:
        access = NodeAccess(
            node=self._asked(node),
            requestor=requestor,
            pool=self.pool,
            admission=self.admission(node),
            capabilities=self.peer_capabilities(node),
            wait=lambda: self.wait_for(node, holding=requestor),
            stopping=partial(self.is_ending, node),
            note=partial(self.note, node),
        )
        ingest = Ingest(
            self.ledger,
            self.spool,
            leave_out_faulty=self.site.validation.faulty == "leave-out",
        )
        reception = Reception(self.spool, ingest, self.receiver, self.site.receiver.ae_title)
        return Retrieval(access, reception, self._listing(node, requestor))

    def _listing(self, node: str, requestor: Requestor) -> Listing:
        return Listing(
            requestor,
            self.ledger,
            self.spool,
            weakest=self.site.validation.evidence,
            pool=self.pool,
            capabilities=self.peer_capabilities(node).queries,
            filters=self.filters,
        )

    def _asked(self, node: str) -> PacsNode:
        """The node, with requests as small as its windows ask for."""
        asked = self.site.effective_node(node)
        most = self.rates.request_instances(node)
        limits = asked.limits.model_copy(update={"chunk_instances": most})
        return asked.model_copy(update={"limits": limits})

    def receiver(self) -> ReceiverLease | None:
        """The lease on the site's receiver, which is started for it; None where it has none.

        Raises
        ------
        ReceiverError
            It cannot run.
        """
        with self._lock:
            if self._lease is None and self.site.receives:
                self._lease = self.open.enter_context(ReceiverLease(self.site))
            return self._lease

    def look_at_disks(self) -> None:
        """Say once when the space for objects comes to its end: before it stops the work.

        That is below twice the spool's reserve, or below the reserve where the archive is a
        directory; twice a minute at most.
        """
        now = self.clock.monotonic()
        if now < self._look_at_disks_at:
            return
        self._look_at_disks_at = now + _DISKS_SECONDS
        reserve = self.spool.reserve_bytes
        left = {"spool-full": (self.spool.free_bytes(), reserve)}
        if (directory := self.site.archive.directory) is not None:
            left["archive-full"] = (shutil.disk_usage(directory).free, reserve)
        for code, (free, least) in left.items():
            if free >= least:
                self._disks_low.discard(code)
            elif code not in self._disks_low:
                self._disks_low.add(code)
                log.warning("%s is near: %d bytes left", code, max(0, free))
                at, figures = self.clock.now(), {"free_bytes": max(0, free)}
                self.tell(Event(name="disk.low", at=at, reason=code, figures=figures))

    def prepare(self) -> None:
        """Start at once what is needed anyway: a fault of it shows before the PACS is asked."""
        for name, node in self.site.nodes.items():
            if self.peer_capabilities(name).method is not None:
                self.note(name, "its capabilities say that it refuses C-GET; C-MOVE is used")
            elif node.retrieve is not RetrieveMethod.C_MOVE:
                continue
            self.receiver()

    def peer_capabilities(self, node: str) -> PeerCapabilities:
        """How a node is asked for studies: from its capabilities, and as this run finds out."""
        with self._lock:
            if node not in self._peer_capabilities:
                site = self.site
                self._peer_capabilities[node] = PeerCapabilities.of(
                    site.capabilities[node], site.nodes[node], site.receives
                )
            return self._peer_capabilities[node]

    def _lacks_a_level(self, node: str) -> bool:
        """Whether the node does not answer at a level at which its capabilities say it does."""
        answers = self.peer_capabilities(node).queries.answers
        return any(
            not answers.get(level, True) for level in self.site.capabilities[node].levels or ()
        )

    def _seen_otherwise(self, node: str, requestor: Requestor) -> dict[str, bool]:
        capabilities = self.peer_capabilities(node)
        return super()._seen_otherwise(node, requestor) | {
            "uid_lists_in_retrieves": capabilities.one_uid_only,
            "image_level_retrieve": capabilities.refuses_image_level,
            "levels": self._lacks_a_level(node),
        }


@contextlib.contextmanager
def open_pull(
    site: Site, cohort: str | int, kind: str = "pull", clock: Clock | None = None
) -> Iterator[Pull]:
    """Open all that a run on a registered cohort needs, and close it again.

    Parameters
    ----------
    cohort : str or int
        Name or number of a cohort in the ledger.
    kind : str
        What the ledger calls the run.
    clock : Clock, optional
        The time that the run goes by.
    """
    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(Ledger.open(ledger_url(site)))
        known = ledger.cohorts.get(str(cohort))
        archive = stack.enter_context(contextlib.closing(open_archive(site.archive)))
        # A bucket that is missing or refuses us shows before the PACS is asked for anything.
        archive.head(manifest_key("0"))
        spool = Spool(site.spool.path, site.spool.reserve_bytes)
        spool.sweep()
        _clear_finished(spool, ledger)
        later = stack.enter_context(contextlib.ExitStack())
        uploads = stack.enter_context(
            ThreadPoolExecutor(site.archive.connections, thread_name_prefix="upload")
        )
        aside = stack.enter_context(
            ThreadPoolExecutor(_STUDIES_AT_A_TIME, thread_name_prefix="study")
        )
        run = stack.enter_context(ledger.runs.begin(kind, known.number))
        pull = Pull(
            site=site,
            cohort=known,
            ledger=ledger,
            run=run,
            filters=ledger.cohorts.filters(known.number),
            clock=clock or Clock(),
            spool=spool,
            archive=archive,
            open=later,
            uploads=uploads,
            aside=aside,
        )
        archive.stopping = pull.is_stopping
        stack.enter_context(at_work(pull))
        pull.prepare()
        yield pull


def _clear(spool: Spool, study: StudyReference, manifest: StudyManifest) -> None:
    """Delete what lies in the spool of an archived study; what its manifest lacks is kept apart."""
    archived = {instance.sha256 for instance in manifest.instances}
    for path in spool.files(study):
        if path.stem not in archived:
            with contextlib.suppress(FileNotFoundError):
                spool.quarantine_file(study, path.stem, "not-requested")
    spool.drop(study)


def _clear_finished(spool: Spool, ledger: Ledger) -> None:
    """The same for studies whose run died after its commit, or for which something came late."""
    for study in spool.studies():
        manifest = ledger.manifests.get(study)
        if manifest is not None:
            _clear(spool, study, decode_manifest(manifest))


def work_through(pull: Pull) -> None:
    """Bring a cohort as far as it goes, one step after the other in this thread.

    For notebooks and tests: no Prefect, no second pass, and errors come out. Of several nodes the
    next one is asked at once for what one has failed at.
    """
    for first_line, last_line in pull.discovery_pages():
        pull.discover(first_line, last_line)
    while True:
        pull.take_turned()
        for node, chunks in pull.chunks_by_node().items():
            _work_through(pull, node, chunks)
        if not pull.take_turned():
            return


def _work_through(pull: Pull, node: str, chunks: Iterator[Chunk]) -> None:
    for chunk in chunks:
        try:
            pull.retrieve(chunk)
            pull.archive_chunk(chunk)
        except PacsError:
            if not pull.others_go_on(node):
                raise
            return
        finally:
            pull.give_back(chunk)


def _manifest_of(task: StudyTask, ledger: Ledger, selection: str) -> StudyManifest:
    instances, withheld = [], []
    for record in sorted(ledger.instances.of_study(task.reference), key=lambda r: r.key):
        if record.state is InstanceState.STORED:
            instances.append(
                ManifestInstance(
                    record.key.series_instance_uid,
                    record.key.sop_instance_uid,
                    record.sop_class_uid,
                    record.transfer_syntax_uid,
                    record.object_key,
                    record.size_bytes,
                    record.sha256,
                    record.version_id,
                    record.warnings,
                )
            )
        elif record.key in task.instances.listed:
            withheld.append(WithheldInstance(*record.key, record.reason))
    return StudyManifest(
        task.claim.study_instance_uid,
        task.claim.node,
        task.content.evidence,
        task.content.listed_at,
        tuple(instances),
        tuple(withheld),
        tuple(task.remarks),
        selection=selection,
        unwanted_series=task.unwanted_series,
    )
