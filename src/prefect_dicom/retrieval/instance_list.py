"""Instance lists of studies, as the PACS returns them: the expected sets.

Where the PACS lists no instances, its list of series or its counts take the place of the list, and
the list grows by what is received.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from prefect_dicom.admission.association_pool import AssociationPool
from prefect_dicom.archive.spool import Spool
from prefect_dicom.cohort.filters import series_text
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import (
    CohortFilters,
    Evidence,
    Instance,
    InstanceKey,
    InstanceState,
    ReceivedInstance,
    StudyReference,
)
from prefect_dicom.dicom.part10 import survey
from prefect_dicom.dicom.validation import validate
from prefect_dicom.discovery.filter_queries import filter_series
from prefect_dicom.ledger import InstanceRecord, Ledger, ListChange
from prefect_dicom.network.find.list_instances import ListedStudy, list_study
from prefect_dicom.network.find.list_together import list_together
from prefect_dicom.network.find.query_capabilities import QueryCapabilities
from prefect_dicom.network.node_client import NodeClient
from prefect_dicom.retrieval.study_task import StudyContent, StudyTask


class Listing:
    """Reads lists of studies from one node into the ledger. Not thread-safe.

    Parameters
    ----------
    requestor : NodeClient
        The association over which the node is queried.
    ledger : Ledger
        Keeps the lists as the expected sets.
    spool : Spool
        Holds what was received before.
    weakest : Evidence
        The weakest proof of completeness that the site accepts.
    pool : AssociationPool
        The pool that the requestor is borrowed from; admits each request.
    capabilities : QueryCapabilities
        The node's support of queries for a study's content.
    filters : CohortFilters
        Says which series are wanted.
    """

    def __init__(
        self,
        requestor: NodeClient,
        ledger: Ledger,
        spool: Spool,
        *,
        weakest: Evidence,
        pool: AssociationPool,
        capabilities: QueryCapabilities,
        filters: CohortFilters,
    ) -> None:
        self._requestor = requestor
        self._ledger = ledger
        self._spool = spool
        self._weakest = weakest
        self._pool = pool
        self._capabilities = capabilities
        self._filters = filters
        self._series_wanted = series_text(filters)

    def lists(self, tasks: Sequence[StudyTask]) -> dict[StudyReference, ListedStudy]:
        """Query the instance lists of many studies together, without recording them.

        Returns
        -------
        dict of study reference to ListedStudy
            The lists of those studies that could be listed together.
        """
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
                lists[task.reference] = self._filtered(task, answer)
        return lists

    def _filtered(self, task: StudyTask, answer: ListedStudy) -> ListedStudy:
        """Remove the series that are not wanted from a list, and record them with the task.

        Raises
        ------
        PacsError
            ``filter-undecided`` where the peer does not return what the filters need,
            ``study-changed`` where no series is wanted any more, ``evidence-too-weak`` where the
            peer counts instances at most in the study as a whole.
        """
        listed = {instance.key.series_instance_uid for instance in answer.instances}
        if answer.evidence is not Evidence.INSTANCE_LIST and self._filters.series:
            if answer.series is None:
                raise PacsError("filter-undecided", "no series are listed")
            listed = {*answer.series}
        if not self._filters.series or not listed:
            return answer
        with self._pool.request(self._requestor):
            chosen = filter_series(
                self._requestor,
                task.claim.study,
                self._filters,
                self._capabilities,
                answer.instances,
            )
        if chosen.undecided:
            raise PacsError("filter-undecided", f"{len(chosen.undecided)} series")
        if not listed <= {*chosen.wanted, *chosen.unwanted} or listed.isdisjoint(chosen.wanted):
            raise PacsError("study-changed", "other series than a moment before")
        task.record_selection(chosen.unwanted)
        wanted = set(chosen.wanted)
        if answer.series is not None:
            if chosen.unwanted and answer.evidence is Evidence.SUBOPERATION_COUNTS:
                raise PacsError("evidence-too-weak")
            counts = {uid: count for uid, count in answer.series.items() if uid in wanted}
            return replace(answer, series=counts)
        return replace(
            answer,
            instances=tuple(i for i in answer.instances if i.key.series_instance_uid in wanted),
            bare_series=tuple(uid for uid in answer.bare_series if uid in wanted),
        )

    def list(self, task: StudyTask, *, fresh: bool) -> bool:
        """Query the PACS's instance list and record it in the ledger as the expected set.

        Where the PACS lists none, the list is what is here already; what is compared then is
        what the PACS returns in its place.

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
            Also ``evidence-too-weak``, where the site does not accept the evidence.
        """
        answer = self._query(task, fresh=fresh)
        is_listed = answer.evidence is Evidence.INSTANCE_LIST
        if not fresh and is_listed and not answer.instances:
            # What was received of it is no study that the PACS has now; the list stays.
            task.record_gone()
            return True
        changed = _differs(task, answer)
        if not (fresh or changed) and (task.is_listed or not is_listed):
            return False
        if not is_listed:
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

    def _query(self, task: StudyTask, *, fresh: bool) -> ListedStudy:
        """Query the list of a study, without unwanted series, and check that it can be used."""
        self._requestor.about = task.reference
        with self._pool.request(self._requestor):
            answer = list_study(self._requestor, task.claim.study, self._capabilities)
        if fresh and answer.offline:
            raise PacsError("study-offline", f"{answer.offline} series")
        if not answer.evidence.satisfies(self._weakest):
            raise PacsError("evidence-too-weak")
        if fresh and _instance_count(answer) < task.claim.counted_elsewhere:
            raise PacsError("copy-incomplete")
        answer = self._filtered(task, answer)
        if fresh and task.claim.listed_by not in (None, task.claim.node):
            self._compare_lists(task, answer)
        if not fresh and task.is_listed and answer.evidence is not Evidence.INSTANCE_LIST:
            raise PacsError("request-refused", "the instances are not listed any more")
        return answer

    def _compare_lists(self, task: StudyTask, answer: ListedStudy) -> None:
        """Check that every instance that another node has listed is listed here too.

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
            raise PacsError("copy-incomplete")

    def _here(self, task: StudyTask, answer: ListedStudy, *, fresh: bool) -> tuple[Instance, ...]:
        """The instances that are here, as the list of a study of which the PACS returns none.

        The evidence of an earlier run's requests cannot be added to: where no series are
        counted, everything is requested once more.
        """
        known = list(task.instances.listed.values())
        if fresh:
            known = [
                Instance(record.key, record.sop_class_uid)
                for record in self._ledger.instances.of_study(task.reference)
                if record.is_here and answer.evidence is Evidence.SERIES_COUNTS
            ]
        return tuple(
            instance
            for instance in known
            if answer.series is None or instance.key.series_instance_uid in answer.series
        )

    def list_afresh(self, tasks: Sequence[StudyTask]) -> set[StudyReference]:
        """Record the first lists of this run, of those studies that can be listed together.

        Returns
        -------
        set of study reference
            The studies that are listed now.
        """
        lists = {r: answer for r, answer in self.lists(tasks).items() if not answer.offline}
        listed = [
            task
            for task in tasks
            if task.reference in lists
            # What is compared with another node's list is listed by itself.
            and task.claim.listed_by in (None, task.claim.node)
            and task.claim.counted_elsewhere <= len(lists[task.reference].instances)
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
        content = StudyContent(answer.evidence, answer.series, answer.number_of_instances, _now())
        task.record_listed(content, answer.instances)
        if answer.bare_series:
            task.fail("series-without-instances")
        elif task.failure == "series-without-instances":
            task.clear_failure()
        if answer.unlistable:
            task.fail("unsafe-uid")
        if change.added == change.total:
            # Nothing to be read where nothing was known.
            task.instances.expect_all()
        else:
            self._restore(task)
        # What was received unlisted may be on the list now.
        task.files.examine_unlisted_again()

    def _restore(self, task: StudyTask) -> None:
        """Reconcile the ledger's instances with the spool's files."""
        here = {path.stem for path in self._spool.files(task.reference)}
        lost = []
        task.instances.forget_other_nodes()
        for record in self._ledger.instances.of_study(task.reference):
            if record.state is InstanceState.RECEIVED and record.sha256 not in here:
                lost.append(record.key)
                task.instances.restore(record.key, InstanceState.EXPECTED)
                continue
            task.instances.restore(
                record.key,
                record.state,
                received=_received(task, record),
                stored_hash=record.sha256 if record.state is InstanceState.STORED else None,
                from_elsewhere=_is_from_elsewhere(task, record),
            )
            if record.state is InstanceState.RECEIVED:
                self._restore_file(task, record.key)
                findings = task.instances.findings_of(record.key)
            else:
                findings = record.warnings
            if record.is_here and _names_listed_patient(findings):
                task.held.record_own()
        if lost:
            self._ledger.instances.record_lost(task.claim, lost)

    def _restore_file(self, task: StudyTask, key: InstanceKey) -> None:
        """Validate again what a run that died has received: its findings were lost with it."""
        path = self._spool.file(task.reference, task.instances.received[key].sha256)
        if not task.instances.has_findings(key):
            validation = validate(survey(path), task.expected(key))
            task.instances.record_findings(key, validation.findings)
        watch = not task.is_listed or task.instances.is_from_elsewhere(key)
        task.files.record_examined(path, key, watch=watch)

    def list_without_counts(self, task: StudyTask) -> None:
        """Make what is here of a study its list, and judge it without the counts of its series.

        Where the site does not accept the evidence that is left, the study fails.
        """
        task.distrust_counts()
        evidence = task.content.evidence
        if task.unwanted_series or not evidence.satisfies(self._weakest):
            task.fail("evidence-too-weak")
            return
        self._ledger.instances.record_list(
            task.claim,
            [*task.instances.listed.values()],
            evidence,
            selection=self._series_wanted,
        )
        failpoint("list-recorded")


def _received(task: StudyTask, record: InstanceRecord) -> ReceivedInstance | None:
    """A received instance as the ledger recorded it; None for one in another state."""
    if record.state is not InstanceState.RECEIVED:
        return None
    assert record.sha256 is not None and record.size_bytes is not None
    return ReceivedInstance(
        task.reference,
        record.key,
        record.sop_class_uid,
        record.transfer_syntax_uid or "",
        record.sha256,
        record.size_bytes,
        f"{record.sha256}.dcm",
    )


def _names_listed_patient(findings: Collection[str]) -> bool:
    """Whether an instance with these findings names the PatientID that the PACS lists."""
    is_read = "patient-id-missing" not in findings and "not-inspected" not in findings
    return is_read and "patient-id-accepted" not in findings


def _is_from_elsewhere(task: StudyTask, record: InstanceRecord) -> bool:
    """Whether an instance that is here was sent by another node than the claim's."""
    return record.is_here and record.node not in (None, task.claim.node)


def _differs(task: StudyTask, answer: ListedStudy) -> bool:
    """Whether the list, or what the peer returns in its place, differs from the task's."""
    if answer.evidence is Evidence.INSTANCE_LIST:
        return {instance.key for instance in answer.instances} != task.instances.listed.keys()
    known = task.content
    return (answer.series, answer.number_of_instances) != (known.series, known.number_of_instances)


def _instance_count(answer: ListedStudy) -> int:
    """How many instances the peer lists or counts in a study; 0 where it does neither."""
    if answer.evidence is Evidence.INSTANCE_LIST:
        return len(answer.instances)
    return _counted(answer) or 0


def _counted(answer: ListedStudy) -> int | None:
    """How many instances the peer counts in a study of which it lists none."""
    if answer.evidence is Evidence.SERIES_COUNTS:
        return sum(count or 0 for count in (answer.series or {}).values())
    return answer.number_of_instances


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
