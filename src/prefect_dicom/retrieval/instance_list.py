"""The PACS's own instance list of a study, or what it tells in its place: the expected set."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from prefect_dicom.admission.association_pool import AssociationPool
from prefect_dicom.archive.spool import Spool
from prefect_dicom.cohort.filters import series_text
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import (
    Evidence,
    Instance,
    InstanceState,
    ReceivedInstance,
    Selection,
    StudyReference,
)
from prefect_dicom.core.reasons import COPY_INCOMPLETE
from prefect_dicom.dicom.part10 import survey
from prefect_dicom.dicom.validation import validate
from prefect_dicom.discovery.filter_queries import filter_series
from prefect_dicom.ledger import Ledger, ListChange
from prefect_dicom.network.find.list_instances import ListedStudy, list_study
from prefect_dicom.network.find.list_together import list_together
from prefect_dicom.network.find.query_capabilities import QueryCapabilities
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.retrieval.study_task import StudyTask


class Listing:
    """Reads lists of studies from one node into the ledger. Not thread-safe.

    Parameters
    ----------
    weakest : Evidence
        The weakest proof of completeness that the site accepts.
    pool : AssociationPool
        Has the turn of each request; the requestor is borrowed from it.
    capabilities : QueryCapabilities
        What the node makes of the queries for a study's content.
    selection : Selection
        Says which series are wanted.
    """

    def __init__(
        self,
        requestor: Requestor,
        ledger: Ledger,
        spool: Spool,
        *,
        weakest: Evidence,
        pool: AssociationPool,
        capabilities: QueryCapabilities,
        selection: Selection,
    ) -> None:
        self._requestor = requestor
        self._ledger = ledger
        self._spool = spool
        self._weakest = weakest
        self._pool = pool
        self._capabilities = capabilities
        self._selection = selection
        self._series_wanted = series_text(selection)

    def lists(self, tasks: Sequence[StudyTask]) -> dict[StudyReference, ListedStudy]:
        """The PACS's instance lists of many studies by few queries; of some, or of none."""
        self._requestor.about = None
        with self._pool.request(self._requestor):
            together = list_together(
                self._requestor, [task.claim.study for task in tasks], self._capabilities
            )
        lists = {}
        for task in tasks:
            if (answer := together.get(task.claim.study_instance_uid)) is None:
                continue
            # What goes wrong with one goes wrong again when it is listed by itself.
            with contextlib.suppress(PacsError):
                lists[task.reference] = self._of_selection(task, answer)
        return lists

    def _of_selection(self, task: StudyTask, answer: ListedStudy) -> ListedStudy:
        """The list without the series that are not wanted; which these are is kept in ``task``.

        Raises
        ------
        PacsError
            ``filter-undecided`` where the peer does not tell it, ``study-changed`` where nothing
            that is there is wanted any more, ``evidence-too-weak`` where it counts instances in
            the study as a whole at most.
        """
        listed = {instance.key.series_instance_uid for instance in answer.instances}
        if answer.evidence is not Evidence.INSTANCE_LIST and self._selection.series:
            if answer.series is None:
                raise PacsError("filter-undecided", "no series are listed")
            listed = {*answer.series}
        if not self._selection.series or not listed:
            return answer
        with self._pool.request(self._requestor):
            chosen = filter_series(
                self._requestor,
                task.claim.study,
                self._selection,
                self._capabilities,
                answer.instances,
            )
        if chosen.undecided:
            raise PacsError("filter-undecided", f"{len(chosen.undecided)} series")
        if not listed <= {*chosen.wanted, *chosen.unwanted} or listed.isdisjoint(chosen.wanted):
            raise PacsError("study-changed", "other series than a moment before")
        task.unwanted = chosen.unwanted
        wanted = set(chosen.wanted)
        if answer.series is not None:
            if chosen.unwanted and answer.evidence is Evidence.SUBOPERATION_COUNTS:
                raise PacsError("evidence-too-weak")
            counts = {uid: count for uid, count in answer.series.items() if uid in wanted}
            return replace(answer, series=counts)
        return replace(
            answer,
            instances=tuple(i for i in answer.instances if i.key.series_instance_uid in wanted),
        )

    def list(self, task: StudyTask, *, fresh: bool) -> bool:
        """Read the PACS's instance list into the ledger as the expected set.

        Where there is none, what is here already is the list, and grows by what arrives; what is
        read then is what the PACS tells in its place.

        Parameters
        ----------
        fresh : bool
            The first list of this run: what an earlier run left out is expected again.

        Returns
        -------
        bool
            Whether the list, or what stands in its place, differs from the one known before.

        Raises
        ------
        PacsError
            Also ``evidence-too-weak``, where the site does not accept what the PACS can tell.
        """
        self._requestor.about = task.reference
        with self._pool.request(self._requestor):
            answer = list_study(self._requestor, task.claim.study, self._capabilities)
        if fresh and answer.offline:
            raise PacsError("study-offline", f"{answer.offline} series")
        if not answer.evidence.satisfies(self._weakest):
            raise PacsError("evidence-too-weak")
        if fresh and _told(answer) < task.claim.told_elsewhere:
            raise PacsError(COPY_INCOMPLETE)
        answer = self._of_selection(task, answer)
        if fresh and task.claim.listed_by not in (None, task.claim.node):
            self._compare_lists(task, answer)
        is_listed = answer.evidence is Evidence.INSTANCE_LIST
        if not fresh and task.is_listed and not is_listed:
            raise PacsError("request-refused", "the instances are not listed any more")
        if not fresh and is_listed and not answer.instances:
            # What came of it is no study that anybody has now; the list stays as it was.
            task.gone = True
            task.failure = "study-gone"
            return True
        if is_listed:
            changed = {instance.key for instance in answer.instances} != task.listed.keys()
            if not (fresh or changed) and task.is_listed:
                return False
        else:
            told = (answer.series, answer.number_of_instances)
            changed = told != (task.series, task.number_of_instances)
            if not (fresh or changed):
                return False
            answer = replace(answer, instances=self._here(task, answer, fresh=fresh))
        change = self._ledger.instances.record_list(
            task.claim,
            answer.instances,
            answer.evidence,
            fresh=fresh,
            selection=self._series_wanted,
            counted=_counted(answer),
        )
        failpoint("list-recorded")
        self._expect(task, answer, change)
        return changed

    def _compare_lists(self, task: StudyTask, answer: ListedStudy) -> None:
        """Make sure that all that another node has listed is listed here too.

        Raises
        ------
        PacsError
            ``copy-incomplete``
        """
        listed = {
            record.key
            for record in self._ledger.instances.of_study(task.reference)
            if record.reason != "no-longer-listed"
        }
        if answer.evidence is Evidence.INSTANCE_LIST:
            lacks = bool(listed - {instance.key for instance in answer.instances})
        else:
            series = Counter(key.series_instance_uid for key in listed)
            counts = answer.series or {}
            lacks = any(count > (counts.get(uid) or 0) for uid, count in series.items())
        if lacks:
            raise PacsError(COPY_INCOMPLETE)

    def _here(self, task: StudyTask, answer: ListedStudy, *, fresh: bool) -> tuple[Instance, ...]:
        """What stands for the list of a study of which none is told: what is here of its series.

        To an earlier run's word on what it had asked for nothing can be added: where no series
        are counted, all is asked for once more.
        """
        known = list(task.listed.values())
        if fresh:
            known = [
                Instance(record.key, record.sop_class_uid)
                for record in self._ledger.instances.of_study(task.reference)
                if record.state in (InstanceState.RECEIVED, InstanceState.STORED)
                and answer.evidence is Evidence.SERIES_COUNTS
            ]
        return tuple(
            instance
            for instance in known
            if answer.series is None or instance.key.series_instance_uid in answer.series
        )

    def list_afresh(self, tasks: Sequence[StudyTask]) -> set[StudyReference]:
        """The first lists of this run, of as many studies as :meth:`lists` can read together."""
        lists = {r: answer for r, answer in self.lists(tasks).items() if not answer.offline}
        listed = [
            task
            for task in tasks
            if task.reference in lists
            # What is compared with another node's list is listed by itself.
            and task.claim.listed_by in (None, task.claim.node)
            and task.claim.told_elsewhere <= len(lists[task.reference].instances)
        ]
        changes = self._ledger.instances.record_lists(
            [
                (task.claim, lists[task.reference].instances, Evidence.INSTANCE_LIST)
                for task in listed
            ],
            fresh=True,
            selection=self._series_wanted,
        )
        failpoint("list-recorded")
        for task, change in zip(listed, changes, strict=True):
            self._expect(task, lists[task.reference], change)
        return {task.reference for task in listed}

    def _expect(self, task: StudyTask, answer: ListedStudy, change: ListChange) -> None:
        task.listed = {instance.key: instance for instance in answer.instances}
        task.listed_at = _now()
        task.evidence = answer.evidence
        task.series, task.number_of_instances = answer.series, answer.number_of_instances
        task.confirmed = False
        task.remarks.clear()
        if answer.unlistable:
            task.failure = "unsafe-uid"
        if change.added == change.total:
            # Nothing to be read where nothing was known.
            task.states.update(dict.fromkeys(task.listed, InstanceState.EXPECTED))
        else:
            self._read_states(task)
        # What arrived unlisted may be on the list now.
        task.seen.difference_update(task.unlisted)
        task.unlisted.clear()

    def _read_states(self, task: StudyTask) -> None:
        """Bring the ledger's instances and the spool's files together."""
        here = {path.stem for path in self._spool.files(task.reference)}
        lost = []
        task.elsewhere.clear()
        for record in self._ledger.instances.of_study(task.reference):
            key, state = record.key, record.state
            if state is InstanceState.RECEIVED and record.sha256 not in here:
                lost.append(key)
                state = InstanceState.EXPECTED
            task.states[key] = state
            is_here = state in (InstanceState.RECEIVED, InstanceState.STORED)
            if is_here and record.node not in (None, task.claim.node):
                task.elsewhere.add(key)
            if state is InstanceState.RECEIVED:
                task.received[key] = ReceivedInstance(
                    task.reference,
                    key,
                    record.sop_class_uid,
                    record.transfer_syntax_uid,
                    record.sha256,
                    record.size_bytes,
                    f"{record.sha256}.dcm",
                )
                if key not in task.warnings:
                    # Received by a run that died; what it found it took with it.
                    path = self._spool.file(task.reference, record.sha256)
                    task.warnings[key] = validate(survey(path), task.expects(key)).findings
                task.see(self._spool.file(task.reference, record.sha256), key)
            elif state is InstanceState.STORED:
                task.stored_hashes[key] = record.sha256
        if lost:
            self._ledger.instances.record_lost(task.claim, lost)

    def do_without_counts(self, task: StudyTask) -> None:
        """Make what is here of a study its list, and judge it without the counts of its series.

        Where the site does not accept what is left to judge by, that is the study's failure.
        """
        task.remarks.add("series-count-wrong")
        task.evidence = Evidence.SUBOPERATION_COUNTS
        if task.unwanted or not task.evidence.satisfies(self._weakest):
            task.failure = "evidence-too-weak"
            return
        self._ledger.instances.record_list(
            task.claim,
            [*task.listed.values()],
            task.evidence,
            selection=self._series_wanted,
        )
        failpoint("list-recorded")


def _told(answer: ListedStudy) -> int:
    """How many instances the peer lists or counts in a study; 0 where it does neither."""
    if answer.evidence is Evidence.INSTANCE_LIST:
        return len(answer.instances)
    return _counted(answer) or 0


def _counted(answer: ListedStudy) -> int | None:
    """How many instances the peer counts in a study of which it lists none."""
    if answer.evidence is Evidence.SERIES_COUNTS:
        return sum(answer.series.values())
    return answer.number_of_instances


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
