"""One chunk's retrieval: ask, look at what lies in the spool, ask for what is missing.

No status, counter or silence of the peer is evidence of completeness. The expected set is the
PACS's own instance list in the ledger; what counts as arrived is what lies in the spool and
passes validation. The peer's words only choose what to do next: go on, try in smaller pieces,
or stop because a person has to change something first.

Some archives list no instances. Of their studies, what arrives becomes the list, and whether that
is all is judged by the archive's counts of series; where it tells none, by what it says to have
sent, if the site takes that for evidence (:class:`~prefect_dicom.core.model.Evidence`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest

from pydicom.dataset import Dataset

from prefect_dicom.admission.association_pool import AssociationPool, Spent
from prefect_dicom.admission.circuit_breaker import NodeAdmission, RequestKind
from prefect_dicom.archive.spool import Spool
from prefect_dicom.config.capabilities import NodeProfile, Service
from prefect_dicom.config.site import PacsNode
from prefect_dicom.core.errors import PacsError, PrefectDicomError, ReceiverError, SpoolFull
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import (
    Disposition,
    Evidence,
    InformationModel,
    InstanceKey,
    RetrieveMethod,
    StudyReference,
)
from prefect_dicom.core.reasons import Scope, reason_for
from prefect_dicom.core.uids import is_uid, normal_uid
from prefect_dicom.network.echo import echo
from prefect_dicom.network.find.list_series import list_series
from prefect_dicom.network.find.query_capabilities import QueryCapabilities
from prefect_dicom.network.get import c_get
from prefect_dicom.network.move import move
from prefect_dicom.network.presentation_contexts import STORAGE_CLASSES, Breadth, proposals
from prefect_dicom.network.query_keys import retrieve_identifier
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.network.retrieve_result import RetrieveOutcome
from prefect_dicom.network.status import reason_for_status
from prefect_dicom.network.storage_scp import Expectation, Intake, ReceiverLease, Request
from prefect_dicom.retrieval.ingest import Ingest
from prefect_dicom.retrieval.instance_list import Listing
from prefect_dicom.retrieval.requests import RetrieveRequest, plan_requests
from prefect_dicom.retrieval.study_task import StudyTask

_POLL_SECONDS = 0.1
_SHRINK = 7
"""After a round that brought nothing, the UID lists of a C-MOVE get this much shorter."""
_FRUITLESS_REQUESTS = 20
"""Single-instance requests in a row that bring nothing, after which the rest is given up."""
_SOME = 2
"""Of a longer list that brought what its first UID names, it was the list that was not taken."""
_ROUNDS = {RetrieveMethod.C_MOVE: 2, RetrieveMethod.C_GET: 3}
"""How often a study without a list is asked for with nothing new to show for it."""
_SPARE_ROUNDS = 3
"""Rounds that brought nothing for reasons of our own, or only faulty objects, and are repeated."""


@dataclass(slots=True)
class PeerCapabilities:
    """What a node was seen to make of requests; shared by all who ask it in a run."""

    one_uid: bool = False
    """Of a list of UIDs it sends what one of them names, or nothing."""
    no_image_level: bool = False
    """It refuses requests for instances, and answers those for whole series."""
    image_level: bool = False
    """It has answered a request for instances with some."""
    method: RetrieveMethod | None = None
    """How it is asked, where that is not as configured: C-MOVE for a C-GET it does not offer."""
    takes_c_get: bool = False
    """It has taken a C-GET: classes that it refuses later are not for want of the service."""
    queries: QueryCapabilities = field(default_factory=QueryCapabilities)
    """What it makes of the queries for a study's content."""

    @classmethod
    def of(cls, profile: NodeProfile, node: PacsNode, receives: bool) -> PeerCapabilities:
        """What is known before the first request.

        Parameters
        ----------
        receives : bool
            Whether the node could be asked by C-MOVE.
        """
        no_get = profile.c_get in (Service.REFUSED, Service.NOT_OFFERED)
        by_move = node.retrieve is RetrieveMethod.C_GET and no_get and receives
        return cls(
            one_uid=profile.uid_lists_in_retrieves is False,
            no_image_level=profile.image_level_retrieve is False,
            method=RetrieveMethod.C_MOVE if by_move else None,
            queries=QueryCapabilities.doubting(set(profile.levels) if profile.levels else None),
        )


@dataclass(frozen=True, slots=True)
class _Manner:
    """How to ask: UIDs in a list, what a C-GET proposes, and what is not asked for in parts."""

    uids: int
    breadth: Breadth
    whole: str | None = None
    """SERIES or STUDY."""
    instead: bool = False
    """In place of lists, which were refused."""


class Retrieval:
    """Fetches studies of one node with one requestor. Not thread-safe.

    Parameters
    ----------
    node : PacsNode
        The PACS.
    requestor : Requestor
        An association of its own.
    listing : Listing
        Reads the node's lists over the same requestor.
    arrivals : Ingest
        Takes in what lies in the spool.
    receiver : callable
        The lease on the managed receiver, which may have to be started for it; None where the
        site has none, and a node can be asked by C-GET only.
    stopping : callable
        Whether the run has been told to stop.
    admission : NodeAdmission
        The node's, to be told what comes of requests.
    leave : callable
        Waits until the node may be asked, and returns the monotonic time.
    pool : AssociationPool
        Has the turn of each request; the requestor is borrowed from it.
    note : callable
        Told what a person should know of the node, in words without identifiers.
    capabilities : PeerCapabilities
        What is known of the node, and is learnt of it.
    """

    def __init__(
        self,
        node: PacsNode,
        requestor: Requestor,
        spool: Spool,
        *,
        listing: Listing,
        ingest: Ingest,
        destination: str,
        receiver: Callable[[], ReceiverLease | None],
        stopping: Callable[[], bool],
        admission: NodeAdmission,
        leave: Callable[[], float],
        pool: AssociationPool,
        note: Callable[[str], None],
        capabilities: PeerCapabilities,
    ) -> None:
        self._admission = admission
        self._leave = leave
        self._pool = pool
        self._note = note
        self._capabilities = capabilities
        self._asked_at = admission.now()
        self._node = node
        self._requestor = requestor
        self._spool = spool
        self._destination = destination
        self._receiver = receiver
        self._stopping = stopping
        self.listing = listing
        self.ingest = ingest

    @property
    def _method(self) -> RetrieveMethod:
        return self._capabilities.method or self._node.retrieve

    @property
    def _service(self) -> str:
        return "C-MOVE" if self._method is RetrieveMethod.C_MOVE else "C-GET"

    # --- fetching

    def fetch(self, tasks: Sequence[StudyTask]) -> int:
        """Ask until nothing is missing or asking brings nothing more.

        By C-MOVE for the rest of the run, where the node is to be asked by C-GET and does not let
        us, and there is a receiver.

        Returns
        -------
        int
            How many objects have arrived.

        Raises
        ------
        PacsError
            The node cannot be used now: a person must act, or it is out of reach.
        SpoolFull
            There is no room for more; what has arrived is recorded.
        Interrupted
            The run was told to stop.
        """
        while True:
            method = self._method
            try:
                return self._fetch(tasks)
            except PacsError as error:
                if method is not RetrieveMethod.C_GET or not self._switches(error.code):
                    raise

    def _fetch(self, tasks: Sequence[StudyTask]) -> int:
        arrived = self.ingest.scan(tasks)
        if listed := [task for task in tasks if task.is_listed]:
            arrived = self._fetch_listed(listed, arrived)
        for task in tasks:
            if not task.is_listed:
                arrived = self._fetch_unlisted(task, arrived)
        return arrived

    def _fetch_listed(self, tasks: Sequence[StudyTask], arrived: int) -> int:
        """Ask for the instances that the PACS lists; ``arrived`` and how many came now."""
        fruitless = 0
        spare_rounds = _SPARE_ROUNDS
        found_out = False
        by_reference = {task.reference: task for task in tasks}
        manners = self._manners()
        manner = next(manners)
        while any(task.missing() for task in tasks):
            progress, waited = 0, False
            set_aside = sum(task.set_aside for task in tasks)
            refused = None
            for request, contexts in self._plan(tasks, manner):
                if self._stopping():
                    raise self._pool.interruption(self._requestor)
                self._spool.check_reserve()
                members = [by_reference[r] for r in request.studies]
                parts = _parts(request, members)
                outcome = self._ask(request, members, contexts)
                failpoint("request-ended")
                brought = self.ingest.scan(members)
                self._heed(request, outcome, brought)
                progress += brought
                waited = waited or outcome is None
                if brought:
                    fruitless = 0
                    if self._learn(manner, request, parts, outcome, members):
                        manner = replace(manner, uids=1)
                        break
                elif outcome is not None:
                    # Where there is no room that is why, whatever the peer makes of it.
                    self._spool.check_reserve()
                    self._consider(outcome, members, first=not arrived and not progress)
                    fruitless += manner.uids == 1
                    refused = self._refused(manner, request, outcome)
                if refused or fruitless >= _FRUITLESS_REQUESTS:
                    break
            arrived += progress
            if progress:
                self._admission.record_delivery()
                continue
            faulty = sum(task.set_aside for task in tasks) > set_aside
            if spare_rounds and (waited or faulty):
                spare_rounds -= 1
                continue
            if not found_out:
                found_out = True
                arrived += self._find_out(tasks, delivers=arrived > 0)
            if refused:
                manners = iter(refused)
            manner = next(manners, None)
            if manner is None or fruitless >= _FRUITLESS_REQUESTS:
                break
        self._list_what_is_missing(tasks)
        for task in tasks:
            if task.missing():
                task.failure = task.failure or "instances-missing"
            elif not task.failure_stands:
                task.failure = None
            if not arrived and task.untouched and not task.failure_is_explained:
                self._admission.record_nothing_sent(task.reference, task.failure)
        return arrived

    def _switches(self, code: str) -> bool:
        """Whether C-MOVE takes the place of a C-GET that ended so; says it once."""
        if not (reason_for(code).refuses_service or code == "sop-classes-refused"):
            return False
        if code == "not-permitted" and self._admission.has_delivered:
            # What it has let us do before, it does not refuse us.
            return False
        try:
            if self._receiver() is None:
                return False
        except ReceiverError:
            # What is known of the node says more than what the way around it lacks.
            return False
        if self._capabilities.method is None:
            self._capabilities.method = RetrieveMethod.C_MOVE
            self._note(
                f"C-GET is not to be had ({code}); asked by C-MOVE for the rest of the run. Set "
                "`retrieve: c-move`, or let `prefect-dicom doctor --probe` note it, to spare each "
                "run the attempt"
            )
        return True

    def _fetch_unlisted(self, task: StudyTask, arrived: int) -> int:
        """Ask for a study of which no instances are listed, until its counts say that it is here.

        As a whole first, and then by the series that are short of their counts; where there are
        no counts, as a whole until the PACS has sent what it says it has.
        """
        fruitless, spare_rounds = 0, _SPARE_ROUNDS
        while task.incomplete and not task.failure_stands:
            if task.is_listed:
                return self._fetch_listed([task], arrived)
            if task.contradicts_counts:
                self._count_again(task)
                continue
            if fruitless == _ROUNDS[self._method]:
                break
            if fruitless:
                # What an association has got wrong, the next one may not.
                self._requestor.close()
            set_aside, brought, lost = task.set_aside, 0, False
            for request, contexts in self._requests_unlisted(task, fruitless):
                if self._stopping():
                    raise self._pool.interruption(self._requestor)
                self._spool.check_reserve()
                task.came.clear()
                outcome = self._ask(request, [task], contexts)
                failpoint("request-ended")
                came = self.ingest.scan([task])
                self._heed(request, outcome, came)
                brought += came
                lost = lost or outcome is None or _is_cut(outcome)
                if outcome is None:
                    continue
                task.confirmed = request.level == "STUDY" and _is_confirmed(task, outcome)
                if not came and task.incomplete:
                    self._spool.check_reserve()
                    self._consider(outcome, [task], first=not (arrived or brought))
                if outcome.status == 0 and not outcome.failed:
                    # It has sent what it has: other SOP classes need not be proposed.
                    break
            arrived += brought
            if brought:
                self._admission.record_delivery()
            if brought and task.evidence is Evidence.SERIES_COUNTS:
                fruitless = 0
            elif spare_rounds and (lost or task.set_aside > set_aside):
                spare_rounds -= 1
            else:
                fruitless += 1
        return self._end_unlisted(task, arrived)

    def _end_unlisted(self, task: StudyTask, arrived: int) -> int:
        """Say why a study is not complete, when asking has ended; ``arrived``, and what still came.

        What the PACS tells of the study is read again: it may be gone, or be counted otherwise.
        """
        if task.incomplete and not (task.failure_stands or task.failure_is_explained):
            try:
                if task.untouched:
                    with self._pool.request(self._requestor):
                        echo(self._requestor)
                if self.listing.list(task, fresh=False) and task.is_listed:
                    return self._fetch_listed([task], arrived)
            except PacsError as error:
                if error.scope is not Scope.REQUEST:
                    raise
        if task.incomplete:
            task.failure = task.failure or "instances-missing"
            uncounted = task.evidence is Evidence.SUBOPERATION_COUNTS
            if uncounted and task.failure == "instances-missing":
                task.failure = "completeness-unknown"
        elif not task.failure_stands:
            task.failure = None
        if not arrived and task.untouched and not task.failure_is_explained:
            self._admission.record_nothing_sent(task.reference, task.failure)
        return arrived

    def _requests_unlisted(
        self, task: StudyTask, fruitless: int
    ) -> Iterator[tuple[RetrieveRequest, tuple[tuple[str, str], ...]]]:
        """The requests of one round, while there is something to be asked for."""
        most = self._node.limits.request_instances
        whole = task.evidence is not Evidence.SERIES_COUNTS
        if task.unwanted:
            whole = False
        elif not whole:
            # A retrieve at SERIES level is not to be had everywhere: in turn with the other.
            whole = (task.untouched and sum(task.series.values()) <= most) != (fruitless % 2 == 1)
        for contexts in self._contexts_unlisted(task, fruitless):
            if whole:
                yield RetrieveRequest("STUDY", (task.reference,), expected=None), contexts
                continue
            lost = {k.series_instance_uid for k in task.missing()}
            for uid in dict.fromkeys([*task.short(), *lost]):
                request = RetrieveRequest("SERIES", (task.reference,), (uid,), expected=None)
                yield request, contexts

    def _contexts_unlisted(
        self, task: StudyTask, fruitless: int
    ) -> Iterator[tuple[tuple[str, str], ...]]:
        """What a C-GET proposes in turn: the classes that have come, and then all others."""
        if self._method is RetrieveMethod.C_MOVE:
            yield ()
            return
        known = Counter(instance.sop_class_uid for instance in task.listed.values())
        classes = [uid for uid, _ in known.most_common() if is_uid(uid)]
        breadth = Breadth.ALL if fruitless > 1 else Breadth.COMMON
        for _, contexts in proposals([*classes, *STORAGE_CLASSES], breadth):
            if not task.incomplete:
                return
            yield contexts

    def _count_again(self, task: StudyTask) -> None:
        """More is here of a series than the PACS counts: has it grown, or can it not count?

        A count that is wrong proves nothing: the study is judged without it.
        """
        try:
            self.listing.list(task, fresh=False)
        except PacsError as error:
            if error.scope is not Scope.REQUEST:
                raise
        if not task.contradicts_counts:
            return
        self.listing.do_without_counts(task)

    def _find_out(self, tasks: Sequence[StudyTask], *, delivers: bool) -> int:
        """Tell apart what it may mean that nothing arrived; returns how much does arrive now.

        Orthanc answers with one status to a study it does not have any more, a destination that
        it does not know and one that it cannot reach; others say success to all three. So:
        does the node answer at all, does it still list the study, and does one instance come?

        Parameters
        ----------
        delivers : bool
            Whether others have just come, so that the way is open and these are missing.

        Raises
        ------
        PacsError
            The node does not answer, or sends nothing of several studies that it has.
        """
        doubtful = [w for w in tasks if w.untouched and w.failure_needs_diagnosis]
        if doubtful:
            with self._pool.request(self._requestor):
                echo(self._requestor)
        for task in doubtful:
            try:
                with self._pool.request(self._requestor):
                    listed = list_series(
                        self._requestor, task.claim.study_instance_uid, task.claim.patient_id
                    )
            except PacsError as error:
                if error.scope is not Scope.REQUEST:
                    raise
                continue
            task.gone = not listed.series and not listed.unlistable
            if task.gone:
                task.failure = "study-gone"
            elif task.failure == "study-gone":
                task.failure = "pacs-failure"
        came = 0
        for task in doubtful:
            if task.gone:
                continue
            if delivers:
                if task.failure is not None and reason_for(task.failure).may_stop_midway:
                    # Once a part of it is here, the rest is asked for in ever smaller parts.
                    came += self._one_instance(task, alone=True) or 0
                continue
            if (brought := self._one_instance(task, alone=len(tasks) == 1)) is None:
                continue
            if brought:
                self._admission.record_delivery()
                return brought
            self._admission.record_nothing_sent(task.reference, task.failure)
            if self._admission.disabled_for:
                raise PacsError(self._admission.disabled_for)
        return came

    def _one_instance(self, task: StudyTask, *, alone: bool) -> int | None:
        """Ask for one instance, and for the study where it was in a list.

        Returns how much came; None where that nothing came says nothing about the PACS.
        """
        wanted, contexts = next(iter(self._groups([task], Breadth.ALL)))
        # Not the first: it may be the one at which the archive stops.
        key = wanted[task.reference][-1]
        if contexts and not task.class_to_propose(key):
            # A C-GET that proposes some classes of many: there are more to try.
            return None
        instance = RetrieveRequest(
            "IMAGE",
            (task.reference,),
            (key.series_instance_uid,),
            (key.sop_instance_uid,),
            expected=1,
        )
        requests = [(instance, contexts)]
        if not alone:
            # Some archives take no request at IMAGE level, and none with a list.
            requests += islice(self._plan([task], _Manner(1, Breadth.ALL)), 1)
        for request, contexts in requests:
            outcome = self._ask(request, [task], contexts)
            if brought := self.ingest.scan([task]):
                return brought
            self._spool.check_reserve()
            if outcome is None:
                return None
        return 0

    def _list_what_is_missing(self, tasks: Sequence[StudyTask]) -> None:
        """Read the lists again of what came in part: the rest may be gone from the PACS."""
        for task in tasks:
            if task.missing() and not task.untouched and not task.failure_is_explained:
                try:
                    self.listing.list(task, fresh=False)
                except PacsError as error:
                    if error.scope is not Scope.REQUEST:
                        raise

    def _manners(self) -> Iterator[_Manner]:
        """How to ask, from the quickest; the next one after a round that brought nothing."""
        whole = "SERIES" if self._capabilities.no_image_level else None
        most = 1 if self._capabilities.one_uid else self._node.limits.uids_per_request
        few = most // _SHRINK
        yield _Manner(most, Breadth.COMMON, whole)
        if self._method is RetrieveMethod.C_GET:
            yield _Manner(most, Breadth.ALL, whole)
            if few > 1:
                yield _Manner(few, Breadth.ALL, whole)
            yield _Manner(most, Breadth.SINGLE, whole)
        elif few > 1:
            yield _Manner(few, Breadth.COMMON, whole)
        if most > 1:
            yield _Manner(1, Breadth.ALL, whole)
        if whole:
            yield _Manner(1, Breadth.ALL, "STUDY")

    def _refused(
        self, manner: _Manner, request: RetrieveRequest, outcome: RetrieveOutcome
    ) -> list[_Manner] | None:
        """Other manners to go on with, where a request was refused for how it asks."""
        if outcome.status is None or outcome.lost is not None:
            return None
        if reason_for_status(self._service, outcome.status) != "request-refused":
            return None
        if manner.uids > 1:
            return [
                _Manner(1, breadth, manner.whole, instead=True)
                for breadth in (Breadth.COMMON, Breadth.ALL)
            ]
        if request.level == "IMAGE" and not self._capabilities.image_level:
            return [_Manner(1, Breadth.ALL, level) for level in ("SERIES", "STUDY")]
        return None

    def _learn(
        self,
        manner: _Manner,
        request: RetrieveRequest,
        parts: Sequence[set[InstanceKey]],
        outcome: RetrieveOutcome | None,
        tasks: Sequence[StudyTask],
    ) -> bool:
        """Remember what a request that brought something tells; True: ask by single UIDs now."""
        capabilities = self._capabilities
        capabilities.one_uid = capabilities.one_uid or manner.instead
        if request.level == "IMAGE":
            capabilities.image_level = True
        elif manner.whole:
            capabilities.no_image_level = True
        if outcome is None or outcome.status != 0 or outcome.failed:
            # What did not come could not be sent; that is no answer to the list.
            return False
        missing = {key for task in tasks for key in task.missing()}
        came = [not part <= missing for part in parts]
        if len(parts) > _SOME and came[0] and not any(came[1:]):
            capabilities.one_uid = True
        return capabilities.one_uid and manner.uids > 1

    def _plan(
        self, tasks: Sequence[StudyTask], manner: _Manner
    ) -> Iterator[tuple[RetrieveRequest, tuple[tuple[str, str], ...]]]:
        """The requests of one round, with the presentation contexts a C-GET needs for them.

        Planned as they are asked for: what an earlier one has brought is not in a later one.
        """
        if manner.whole:
            # The whole of a study is not asked for where series of it are not wanted.
            some = [task for task in tasks if manner.whole == "SERIES" or not task.unwanted]
            for wanted, contexts in self._groups(some, manner.breadth):
                for request in _whole_requests(wanted, manner.whole):
                    yield request, contexts
            return
        # A series that is not wanted is there, so that the study is not asked for as a whole.
        listed = {
            task.reference: [*task.listed, *(InstanceKey(series, "") for series in task.unwanted)]
            for task in tasks
        }
        patient_root = self._node.information_model is InformationModel.PATIENT_ROOT
        most = self._node.limits.request_instances
        for wanted, contexts in self._groups(tasks, manner.breadth):
            if manner.uids == 1:
                wanted = {study: _from_both_ends(keys) for study, keys in wanted.items()}
            # In the Patient Root a request names one patient, and so one study at a time.
            parts = [{r: keys} for r, keys in wanted.items()] if patient_root else [wanted]
            for part in parts:
                for request in plan_requests(
                    part, listed, request_instances=most, uids_per_request=manner.uids
                ):
                    yield request, contexts

    def _groups(
        self, tasks: Sequence[StudyTask], breadth: Breadth
    ) -> Iterator[tuple[_Missing, tuple[tuple[str, str], ...]]]:
        """What is missing, for a C-GET in groups whose SOP classes fit into one proposal."""
        if self._method is RetrieveMethod.C_MOVE:
            yield {task.reference: task.missing() for task in tasks}, ()
            return
        classes = Counter(
            sop_class
            for task in tasks
            for key in task.missing()
            if (sop_class := task.class_to_propose(key))
        )
        ordered = [sop_class for sop_class, _ in classes.most_common()]
        for group, contexts in proposals(ordered, breadth):
            if wanted := _missing_of(tasks, group):
                yield wanted, contexts
        # Some archives do not tell the classes of their instances: all are tried in turn.
        for _, contexts in proposals(STORAGE_CLASSES, breadth):
            wanted = _missing_of(tasks, {""})
            if not wanted:
                return
            yield wanted, contexts

    def _ask(
        self,
        request: RetrieveRequest,
        tasks: Sequence[StudyTask],
        contexts: Sequence[tuple[str, str]],
    ) -> RetrieveOutcome | None:
        """Send one request; None where its end says nothing about the PACS.

        It was not sent, because more is still arriving, or our receiver ended under it.
        """
        self._asked_at = self._leave()
        studies = {normal_uid(w.claim.study_instance_uid): w.reference for w in tasks}
        identifier = retrieve_identifier(
            self._node.information_model,
            request.level,
            tasks[0].claim.patient_id,
            [task.claim.study_instance_uid for task in tasks],
            list(request.series),
            list(request.instances),
            self._requestor.characters,
        )
        is_get = self._method is RetrieveMethod.C_GET
        turn = self._pool.request(self._requestor, retrieve=True, objects=request.expected or 0)
        with turn as spent:
            # The turn may have been waited for.
            self._asked_at = self._admission.now()
            first = _First(self._admission.now)
            try:
                if is_get:
                    return self._get(identifier, contexts, studies, tasks, first, spent)
                return self._move(identifier, studies, tasks, request.expected, first, spent)
            finally:
                if first.seconds is not None:
                    self._admission.record_latency(
                        RequestKind.RETRIEVE, first.seconds, request.studies[0]
                    )

    def _move(
        self,
        identifier: Dataset,
        studies: Mapping[str, StudyReference],
        tasks: Sequence[StudyTask],
        wanted: int | None,
        first: _First,
        spent: Spent,
    ) -> RetrieveOutcome | None:
        quiet = self._node.timeouts.settle_seconds
        with self._receiver().expecting(studies, self._node.calling_ae_title) as expected:
            if expected.quiet_seconds is not None:
                wait_until_arrived(expected, None, quiet, self._stopping)
                return None
            outcome = move(
                self._requestor,
                identifier,
                self._destination,
                expected.message_id,
                progress=lambda: first.look(_signs_of_life(expected)),
                should_stop=lambda: "interrupted" if self._stopping() else None,
            )
            if (
                outcome.lost is not None
                or outcome.status is None
                or _is_success(outcome.status)
                or outcome.completed
                or expected.arrived().objects
            ):
                if wanted is None:
                    wanted = (outcome.completed or 0) + (outcome.warning or 0) or None
                wait_until_arrived(expected, wanted, quiet, self._stopping)
            so_far = expected.arrived()
            first.look(so_far.objects)
            spent.objects, spent.size_bytes = so_far.objects, so_far.size_bytes
            self._check_room(so_far.refused, tasks)
            return None if expected.renewed else outcome

    def _get(
        self,
        identifier: Dataset,
        contexts: Sequence[tuple[str, str]],
        studies: Mapping[str, StudyReference],
        tasks: Sequence[StudyTask],
        first: _First,
        spent: Spent,
    ) -> RetrieveOutcome:
        own = Expectation(studies)
        intake = Intake(self._spool, own)

        def stopping() -> bool:
            # Asked before each message.
            first.look(own.objects)
            return self._stopping()

        # It goes over an association of its own, and the turn is for one.
        self._requestor.close()
        try:
            outcome = c_get(
                self._node,
                identifier,
                contexts=contexts,
                intake=intake,
                should_stop=stopping,
            )
        except PacsError as error:
            if error.code != "sop-classes-refused":
                raise
            # These classes cannot come from this node; others may.
            return RetrieveOutcome(None, lost=error.code)
        finally:
            spent.objects, spent.size_bytes = own.objects, own.size_bytes
        self._capabilities.takes_c_get = True
        self._check_room(intake.refused_since(own), tasks)
        return outcome

    def _heed(
        self, request: RetrieveRequest, outcome: RetrieveOutcome | None, brought: int
    ) -> None:
        """Record in the admission where a request ended as if the node had too much to do.

        Not of a node that has never sent anything: there, it is the way to here that is closed.
        """
        if outcome is None or not self._admission.has_delivered:
            return
        if outcome.status is not None and outcome.status >> 8 == 0xA7:
            code = "pacs-busy"
        elif brought or (outcome.lost or "association-stalled") != "association-stalled":
            return
        elif outcome.lost is not None:
            code = outcome.lost
        elif outcome.status == 0:
            code = "nothing-arrived"
        else:
            return
        self._admission.record_strain(RequestKind.RETRIEVE, code, request.studies[0])

    def _check_room(self, refused: str, tasks: Sequence[StudyTask]) -> None:
        """Stop asking where the spool could not take an object, whatever the peer makes of it."""
        if not refused:
            return
        # What there was room for is recorded: it makes room when it is archived.
        self.ingest.scan(tasks)
        raise SpoolFull() if refused == "spool-full" else PrefectDicomError(refused)

    def _consider(
        self, outcome: RetrieveOutcome, tasks: Sequence[StudyTask], *, first: bool
    ) -> None:
        """A request brought nothing: remember why, or stop asking this node."""
        if outcome.lost is not None:
            code = outcome.lost
        elif outcome.status is not None:
            code = reason_for_status(self._service, outcome.status) or "nothing-arrived"
        else:
            code = "association-lost"
        if code == "interrupted" or self._stopping():
            raise self._pool.interruption(self._requestor)
        if code == "not-permitted" and self._admission.has_delivered:
            code = "association-lost"
        if code == "pacs-busy":
            self._admission.record_failure(code, self._asked_at)
        elif code == "sop-classes-refused" and self._capabilities.takes_c_get:
            # What an earlier request ended by says more.
            tasks = [task for task in tasks if task.failure is None]
        elif (
            code == "sop-classes-refused"
            and not self._admission.has_delivered
            and self._switches(code)
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
            if task.incomplete and not (task.failure_stands or task.failure_is_explained):
                partly = reason_for(code).needs_diagnosis and not task.untouched
                task.failure = "instances-missing" if partly else code


def _is_cut(outcome: RetrieveOutcome) -> bool:
    """Whether the transfer broke off under way."""
    return outcome.lost is not None and reason_for(outcome.lost).cuts_transfer


class _First:
    """After how long the first object of a request was here, as far as it was looked for."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.seconds: float | None = None
        self._now = now
        self._asked_at = now()

    def look(self, arrived: int) -> int:
        """Take note of how much has arrived, in whatever unit; returns it."""
        if arrived and self.seconds is None:
            self.seconds = self._now() - self._asked_at
        return arrived


def _is_confirmed(task: StudyTask, outcome: RetrieveOutcome) -> bool:
    """Whether a request for a whole study brought what the peer says it sent, and all there is."""
    sent_all = outcome.status == 0 and outcome.lost is None
    others = (outcome.failed, outcome.warning, outcome.remaining or 0)
    counted = task.number_of_instances or task.claim.number_of_instances or 0
    return (
        sent_all
        and others == (0, 0, 0)
        and outcome.completed == len(task.came) > 0
        and task.came == task.listed.keys()
        and counted <= len(task.came)
    )


def wait_until_arrived(
    expected: Request,
    wanted: int | None,
    quiet_seconds: float,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Wait until ``wanted`` objects have come, or none has for ``quiet_seconds``.

    Archives report the end of a C-MOVE before their last objects arrive, and go on sending
    after an association was lost.
    """
    began = time.monotonic()
    open_bytes = -1
    while not stopping():
        so_far = expected.arrived()
        if wanted is not None and so_far.objects >= wanted:
            return
        if so_far.open_bytes != open_bytes:
            open_bytes, began = so_far.open_bytes, time.monotonic()
        if min(so_far.quiet_seconds, time.monotonic() - began) >= quiet_seconds:
            return
        time.sleep(_POLL_SECONDS)


def _signs_of_life(expected: Request) -> int:
    """A number that changes while anything arrives, be it one very large object."""
    so_far = expected.arrived()
    return so_far.size_bytes + so_far.open_bytes


_Missing = dict[StudyReference, list[InstanceKey]]


def _from_both_ends(keys: Sequence[InstanceKey]) -> list[InstanceKey]:
    """The last, the first, the last but one, and so on.

    Archives that stop at the first failure leave out what stands behind it, in whatever order
    they send: what is left to be had is likelier at an end than in the middle.
    """
    middle = len(keys) // 2
    pairs = zip_longest(reversed(keys[middle:]), keys[:middle])
    return [key for pair in pairs for key in pair if key is not None]


def _parts(request: RetrieveRequest, tasks: Sequence[StudyTask]) -> list[set[InstanceKey]]:
    """What each UID of a request's list is to bring."""
    if request.level == "STUDY":
        return [set(task.missing()) for task in tasks]
    missing = [key for task in tasks for key in task.missing()]
    if request.level == "SERIES":
        return [{k for k in missing if k.series_instance_uid == uid} for uid in request.series]
    return [{k for k in missing if k.sop_instance_uid == uid} for uid in request.instances]


def _whole_requests(wanted: _Missing, level: str) -> Iterator[RetrieveRequest]:
    """Requests for whole series or studies, though parts of them have come."""
    for study, keys in wanted.items():
        if level == "STUDY":
            yield RetrieveRequest("STUDY", (study,), expected=len(keys))
            continue
        for series, count in Counter(key.series_instance_uid for key in keys).items():
            yield RetrieveRequest("SERIES", (study,), (series,), expected=count)


def _missing_of(tasks: Sequence[StudyTask], sop_classes: Collection[str]) -> _Missing:
    missing = {}
    for task in tasks:
        keys = [key for key in task.missing() if task.class_to_propose(key) in sop_classes]
        if keys:
            missing[task.reference] = keys
    return missing


def _is_success(status: int) -> bool:
    return status == 0 or status >> 12 == 0xB
