"""What lies in the spool of a study: judged, and recorded as received, left out or kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from prefect_dicom.archive.spool import Spool
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import Instance, InstanceKey, InstanceState, ReceivedInstance
from prefect_dicom.core.reasons import Consequence
from prefect_dicom.dicom.part10 import survey
from prefect_dicom.dicom.validation import Validation, listed_key, validate
from prefect_dicom.ledger import Ledger
from prefect_dicom.retrieval.study_task import StudyTask


class _Judged(NamedTuple):
    """What is new in the spool for a study; ``rejected`` are the hashes of the rejections.

    ``added`` are those of them that nobody had listed. ``confirmed`` had come from another node,
    in the same bytes; ``superseded`` in others.
    """

    added: list[Instance]
    arrivals: list[ReceivedInstance]
    rejections: list[tuple[InstanceKey, str]]
    rejected: list[str]
    confirmed: list[InstanceKey]
    superseded: list[InstanceKey]


class Ingest:
    """Takes in what arrives for studies. Not thread-safe.

    Parameters
    ----------
    leave_out_faulty : bool
        The site's policy for instances that are faulty at their source.
    """

    def __init__(self, ledger: Ledger, spool: Spool, *, leave_out_faulty: bool) -> None:
        self._ledger = ledger
        self._spool = spool
        self._leave_out_faulty = leave_out_faulty

    def scan(self, tasks: Sequence[StudyTask]) -> int:
        """Look at the files that are new in the spool; returns how many instances they are."""
        judged = [self._judge(task) for task in tasks]
        arrivals = [arrival for one in judged for arrival in one.arrivals]
        grown = [(w.claim, one.added) for w, one in zip(tasks, judged, strict=True) if one.added]
        if grown:
            self._ledger.instances.extend_lists(grown)
            failpoint("list-extended")
        for task, one in zip(tasks, judged, strict=True):
            if one.superseded:
                self._ledger.instances.record_lost(task.claim, one.superseded)
            if one.confirmed:
                self._ledger.instances.record_confirmed(task.claim, one.confirmed)
        if arrivals:
            self._ledger.instances.record_received(
                {task.reference: task.claim for task in tasks}, arrivals
            )
            failpoint("received-recorded")
        for task, one in zip(tasks, judged, strict=True):
            if one.rejections:
                self._ledger.instances.record_rejected(task.claim, one.rejections)
                failpoint("rejection-recorded")
                # Only now: nothing that arrived goes without a record of why.
                for sha256 in one.rejected:
                    self._spool.remove(task.reference, sha256)
        return len(arrivals) + sum(len(one.rejections) + len(one.confirmed) for one in judged)

    def _judge(self, task: StudyTask) -> _Judged:
        added: list[Instance] = []
        arrivals: list[ReceivedInstance] = []
        rejections: list[tuple[InstanceKey, str]] = []
        rejected: list[str] = []
        warnings: dict[InstanceKey, tuple[str, ...]] = {}
        confirmed: list[InstanceKey] = []
        superseded: list[InstanceKey] = []
        suspects: set[str] | None = None
        for path in self._spool.files(task.reference):
            sha256 = path.stem
            if sha256 in task.seen:
                key = task.see_again(path)
                if key in task.elsewhere:
                    task.elsewhere.discard(key)
                    confirmed.append(key)
                continue
            scan = survey(path)
            identity = scan.identity
            key = task.key_of(listed_key(identity, task.listed))
            held = task.received.get(key)
            known = held.sha256 if held else task.stored_hashes.get(key)
            if known == sha256:
                task.came.add(key)
                if key in task.elsewhere:
                    task.elsewhere.discard(key)
                    confirmed.append(key)
                self._spool.remove(task.reference, sha256)
                continue
            verdict = None
            wanted = key in task.listed or task.admits(key)
            # Another node's version that is not archived yet gives way to this node's.
            supersedes = held is not None and key in task.elsewhere
            if wanted and (known is None or supersedes):
                verdict = validate(scan, task.expects(key))
            if _is_strange(verdict) and self._spool.is_damaged(task.reference, sha256):
                # Nobody is to be blamed for what our own disk has made of it.
                self._spool.remove(task.reference, sha256)
                continue
            if not wanted:
                task.seen.add(sha256)
                task.unlisted[sha256] = key
                continue
            if verdict is None:
                self._spool.quarantine_file(task.reference, sha256, "conflicting-content")
                task.failure = "conflicting-content"
                continue
            if verdict.consequence is Consequence.QUARANTINE:
                self._spool.quarantine_file(task.reference, sha256, verdict.findings[0])
                task.failure = verdict.findings[0]
                continue
            if verdict.consequence is Consequence.ASK_AGAIN:
                if suspects is None:
                    suspects = self._spool.suspects(task.reference)
                if sha256 not in suspects:
                    # It may have been damaged on its way: ask once more before judging it.
                    self._spool.set_aside(task.reference, sha256)
                    failpoint("set-aside")
                    task.set_aside += 1
                    continue
                if self._leave_out_faulty:
                    if supersedes:
                        self._supersede(task, key)
                    added += task.put_on_list(key, identity.sop_class_uid)
                    rejected.append(sha256)
                    rejections.append((key, verdict.findings[0]))
                    task.states[key] = InstanceState.REJECTED
                    task.came.add(key)
                    continue
            if supersedes:
                self._supersede(task, key)
                superseded.append(key)
            added += task.put_on_list(key, identity.sop_class_uid)
            task.see(path, key)
            task.came.add(key)
            state = task.states[key]
            arrival = ReceivedInstance(
                task.reference,
                key,
                identity.sop_class_uid or task.listed[key].sop_class_uid,
                identity.transfer_syntax_uid,
                sha256,
                path.stat().st_size,
                path.name,
            )
            arrivals.append(arrival)
            failpoint("validated")
            task.received[key] = arrival
            warnings[key] = verdict.findings
            if state is InstanceState.EXPECTED:
                task.states[key] = InstanceState.RECEIVED
        task.warnings.update(warnings)
        return _Judged(added, arrivals, rejections, rejected, confirmed, superseded)

    def _supersede(self, task: StudyTask, key: InstanceKey) -> None:
        """Keep apart what another node had sent, of which this one has other bytes."""
        held = task.received.pop(key)
        self._spool.quarantine_file(task.reference, held.sha256, "conflicting-content")
        task.places.pop(held.sha256, None)
        task.elsewhere.discard(key)
        task.states[key] = InstanceState.EXPECTED


def _is_strange(verdict: Validation | None) -> bool:
    """Whether an object would be kept apart or asked for again; None: unlisted, or a second one."""
    return verdict is None or verdict.consequence not in (None, Consequence.WARN)
