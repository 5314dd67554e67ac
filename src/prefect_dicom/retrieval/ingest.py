"""Ingest of received instances: files in the spool are validated and recorded in the ledger.

Each new file of a study is recorded as received, left out, set aside to be requested once more,
or moved to quarantine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefect_dicom.archive.spool import Spool
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import Instance, InstanceKey, ReceivedInstance
from prefect_dicom.core.reasons import Consequence
from prefect_dicom.dicom.part10 import Scan, survey
from prefect_dicom.dicom.same_content import differ_in_times_only
from prefect_dicom.dicom.validation import Validation, listed_key, named_patient_id, validate
from prefect_dicom.dicom.value_matching import how_patient_ids_differ
from prefect_dicom.ledger import Ledger
from prefect_dicom.retrieval.held_instances import HeldInstance
from prefect_dicom.retrieval.study_task import StudyTask


@dataclass(slots=True)
class _Batch:
    """New instances of one study that are to be recorded in the ledger."""

    added: list[Instance] = field(default_factory=list)
    """Instances that extend the list, because the PACS lists none."""
    received: list[ReceivedInstance] = field(default_factory=list)
    rejections: list[tuple[InstanceKey, str]] = field(default_factory=list)
    """Instances that are left out, with the reason code."""
    rejected_files: list[str] = field(default_factory=list)
    """The hashes of their files."""
    confirmed: list[InstanceKey] = field(default_factory=list)
    """Instances of another node that this node has sent with the same bytes."""
    superseded: list[InstanceKey] = field(default_factory=list)
    """Instances of another node that this node has sent with other bytes."""
    held: int = 0
    """Instances that name another patient, and wait until all of the study are here."""
    suspects: set[str] | None = None
    """The hashes of files that had been set aside before; None until they are needed."""
    proven: set[str] = field(default_factory=set)
    """Faults that were found to be the source's: what was set aside for them is judged now."""

    @property
    def count(self) -> int:
        """How many instances are new."""
        return len(self.received) + len(self.rejections) + len(self.confirmed) + self.held


class Ingest:
    """Validates new files in the spool and records them. Not thread-safe.

    Parameters
    ----------
    ledger : Ledger
        Records what is received before a file that is left out is deleted.
    spool : Spool
        Holds the files, one folder for each study.
    leave_out_faulty : bool
        The site's policy for instances that are faulty at their source.
    """

    def __init__(self, ledger: Ledger, spool: Spool, *, leave_out_faulty: bool) -> None:
        self._ledger = ledger
        self._spool = spool
        self._leave_out_faulty = leave_out_faulty

    def scan(self, tasks: Sequence[StudyTask]) -> int:
        """Validate and record the files that are new in the spool.

        Returns
        -------
        int
            How many instances were received, left out or confirmed.
        """
        return self._record([(task, self._examine(task)) for task in tasks])

    def scan_plain(self, tasks: Sequence[StudyTask], left: set[str]) -> int:
        """Validate and record new files of listed instances about which there is nothing to decide.

        Parameters
        ----------
        left : set of str
            The hashes of files that were left to :meth:`scan`; more are added.

        Returns
        -------
        int
            How many instances were received.
        """
        return self._record([(t, self._examine_plain(t, left)) for t in tasks if t.is_listed])

    def _record(self, batches: Sequence[tuple[StudyTask, _Batch]]) -> int:
        received = [instance for _, batch in batches for instance in batch.received]
        extended = [(task.claim, batch.added) for task, batch in batches if batch.added]
        if extended:
            self._ledger.instances.extend_lists(extended)
            failpoint("list-extended")
        for task, batch in batches:
            if batch.superseded:
                self._ledger.instances.record_lost(task.claim, batch.superseded)
            if batch.confirmed:
                self._ledger.instances.record_confirmed(task.claim, batch.confirmed)
        if received:
            self._ledger.instances.record_received(
                {task.reference: task.claim for task, _ in batches}, received
            )
            failpoint("received-recorded")
        for task, batch in batches:
            self._record_rejections(task, batch)
        return sum(batch.count for _, batch in batches)

    def _record_rejections(self, task: StudyTask, batch: _Batch) -> None:
        if not batch.rejections:
            return
        self._ledger.instances.record_rejected(task.claim, batch.rejections)
        failpoint("rejection-recorded")
        # Only now: nothing that was received goes without a record of why.
        for sha256 in batch.rejected_files:
            self._spool.remove(task.reference, sha256)

    # --- one study

    def _examine(self, task: StudyTask) -> _Batch:
        batch = _Batch()
        self._examine_files(task, batch)
        if batch.proven:
            for code in batch.proven:
                task.attempts.forget_suspects(code)
            self._spool.bring_back(task.reference)
            self._examine_files(task, batch)
        return batch

    def _examine_plain(self, task: StudyTask, left: set[str]) -> _Batch:
        batch = _Batch()
        for path in self._spool.files(task.reference):
            if task.files.is_examined(path.stem) or path.stem in left:
                continue
            scan = survey(path)
            key = task.content.key_of(listed_key(scan.identity, task.instances.listed))
            if key in task.instances.listed and task.instances.known_hash(key) is None:
                validation = validate(scan, task.expected(key))
                if not _is_suspicious(validation):
                    self._accept(task, path, key, scan, validation, batch)
                    continue
            left.add(path.stem)
        return batch

    def _examine_files(self, task: StudyTask, batch: _Batch) -> None:
        for path in self._spool.files(task.reference):
            if task.files.is_examined(path.stem):
                key = task.files.record_repeat(path)
                if key is not None and key in task.held:
                    task.held.record_repeat(key)
                    task.record_sent(key)
                    batch.held += 1
                elif key is not None:
                    self._record_repeat(task, key, batch)
            else:
                self._examine_file(task, path, batch)

    def _examine_file(self, task: StudyTask, path: Path, batch: _Batch) -> None:
        sha256 = path.stem
        scan = survey(path)
        key = task.content.key_of(listed_key(scan.identity, task.instances.listed))
        known = task.instances.known_hash(key)
        if known == sha256:
            self._record_repeat(task, key, batch)
            self._spool.remove(task.reference, sha256)
            return
        validation = None
        wanted = key in task.instances.listed or task.content.admits(key)
        # Another node's version that is not archived yet gives way to this node's.
        supersedes = key in task.instances.received and task.instances.is_from_elsewhere(key)
        if wanted and (known is None or supersedes):
            validation = validate(scan, task.expected(key))
        if _is_suspicious(validation) and self._spool.is_damaged(task.reference, sha256):
            # The local disk has damaged it; the PACS is not at fault.
            self._spool.remove(task.reference, sha256)
        elif not wanted:
            task.files.record_unlisted(sha256, key)
        elif validation is None:
            self._keep_first(task, path, key, batch)
        elif validation.findings[:1] == ("wrong-patient",):
            self._hold(task, path, key, scan, batch)
        elif validation.consequence is Consequence.QUARANTINE:
            self._quarantine(task, sha256, validation.findings[0])
        elif validation.consequence is not Consequence.ASK_AGAIN:
            self._accept(task, path, key, scan, validation, batch)
        elif not self._is_faulty_at_source(task, sha256, key, validation, batch):
            # It may have been damaged on its way: request it once more before judging it.
            self._spool.set_aside(task.reference, sha256)
            failpoint("set-aside")
            task.attempts.record_suspect(key, validation.findings[0])
        elif self._leave_out_faulty:
            self._reject(task, sha256, key, scan, validation, batch)
        else:
            self._accept(task, path, key, scan, validation, batch)

    def _is_faulty_at_source(
        self,
        task: StudyTask,
        sha256: str,
        key: InstanceKey,
        validation: Validation,
        batch: _Batch,
    ) -> bool:
        """Whether an instance has come with the same bytes before, or enough others like it have.

        A study of a hundred instances with one fault is not requested twice for it: a few of them
        are, and if they come as before, the others are judged like them.
        """
        code = validation.findings[0]
        if batch.suspects is None:
            batch.suspects = self._spool.suspects(task.reference)
        if sha256 in batch.suspects:
            task.attempts.record_proven(key, code)
            if task.attempts.is_proven(code):
                batch.proven.add(code)
            return True
        return task.attempts.is_proven(code)

    def _keep_first(self, task: StudyTask, path: Path, key: InstanceKey, batch: _Batch) -> None:
        """Judge a second copy of an instance whose bytes differ from those that are here.

        Some PACS write the moment of sending into what they send: the first copy stays.
        """
        known = task.instances.received.get(key)
        first = None if known is None else self._spool.file(task.reference, known.sha256)
        if first is None or not differ_in_times_only(first, path):
            self._quarantine(task, path.stem, "conflicting-content")
            return
        task.remark("times-vary")
        self._record_repeat(task, key, batch)
        self._spool.remove(task.reference, path.stem)

    # --- what becomes of a file

    @staticmethod
    def _record_repeat(task: StudyTask, key: InstanceKey, batch: _Batch) -> None:
        """The node has sent bytes that are here already."""
        task.record_sent(key)
        if task.instances.is_from_elsewhere(key):
            task.instances.record_own(key)
            batch.confirmed.append(key)

    def _hold(
        self, task: StudyTask, path: Path, key: InstanceKey, scan: Scan, batch: _Batch
    ) -> None:
        """Keep an instance of another patient in the spool until all of the study are here."""
        task.record_sent(key)
        batch.held += 1
        task.files.record_examined(path, key, watch=True)
        held = HeldInstance(path.stem, named_patient_id(scan.identity))
        if self._spool.quarantine_path(path.stem).exists():
            task.held.record_known(key)
        if (before := task.held.hold(key, held)) is not None:
            self._quarantine_held(task, before, "wrong-patient")

    def settle(self, tasks: Sequence[StudyTask]) -> int:
        """Decide on the instances that name another patient, when nothing more comes.

        Returns
        -------
        int
            How many are received after all, because a person has accepted their PatientID.
        """
        accepted: list[StudyTask] = []
        for task in tasks:
            if not task.held:
                continue
            patient_id = task.held.common_patient_id
            accepts = patient_id is not None and task.accepted.allows(patient_id)
            held = task.held.take_all()
            if patient_id is not None and accepts:
                task.accepted.take(patient_id)
                accepted.append(task)
                for each in held.values():
                    task.files.examine_again(each.sha256)
                continue
            code = "wrong-patient" if patient_id is None else "patient-id-differs"
            for each in held.values():
                self._quarantine_held(task, each, code)
            task.fail(code)
            if patient_id is not None:
                words = how_patient_ids_differ(task.claim.patient_id, patient_id)
                detail = f"all {len(held)} name the same other PatientID, which {words}"
                task.held.record_common(patient_id, detail)
        return self.scan(accepted)

    def _quarantine_held(self, task: StudyTask, held: HeldInstance, code: str) -> None:
        # The file may be on a listing of the spool that is being gone through.
        task.files.stop_watching(held.sha256)
        self._spool.quarantine_file(task.reference, held.sha256, code)

    def _quarantine(self, task: StudyTask, sha256: str, code: str) -> None:
        self._spool.quarantine_file(task.reference, sha256, code)
        task.fail(code)

    def _reject(
        self,
        task: StudyTask,
        sha256: str,
        key: InstanceKey,
        scan: Scan,
        validation: Validation,
        batch: _Batch,
    ) -> None:
        """Leave a faulty instance out."""
        self._supersede(task, key)
        batch.added += task.instances.add(key, scan.identity.sop_class_uid)
        batch.rejected_files.append(sha256)
        batch.rejections.append((key, validation.findings[0]))
        task.instances.record_rejected(key)
        task.record_sent(key)

    def _accept(
        self,
        task: StudyTask,
        path: Path,
        key: InstanceKey,
        scan: Scan,
        validation: Validation,
        batch: _Batch,
    ) -> None:
        """Receive a valid instance, or a faulty one that the site wants as it is."""
        if self._supersede(task, key):
            batch.superseded.append(key)
        if (held := task.held.drop(key)) is not None:
            self._quarantine_held(task, held, "wrong-patient")
        if scan.identity.patient_id and "patient-id-accepted" not in validation.findings:
            task.held.record_own()
        identity = scan.identity
        batch.added += task.instances.add(key, identity.sop_class_uid)
        # Where receiving it again would be evidence.
        watch = not task.is_listed or task.instances.is_from_elsewhere(key)
        task.files.record_examined(path, key, watch=watch)
        task.record_sent(key)
        task.attempts.record_whole(key)
        instance = ReceivedInstance(
            task.reference,
            key,
            identity.sop_class_uid or task.instances.sop_class_of(key),
            identity.transfer_syntax_uid,
            path.stem,
            path.stat().st_size,
            path.name,
        )
        batch.received.append(instance)
        failpoint("validated")
        task.instances.record_received(instance, validation.findings)

    def _supersede(self, task: StudyTask, key: InstanceKey) -> bool:
        """Quarantine another node's version of an instance. Returns whether there was one."""
        held = task.instances.received.get(key)
        if held is None or not task.instances.is_from_elsewhere(key):
            return False
        task.supersede(key)
        self._spool.quarantine_file(task.reference, held.sha256, "conflicting-content")
        return True


def _is_suspicious(validation: Validation | None) -> bool:
    """Whether an instance would not be accepted as it is; None: unlisted, or a second version."""
    return validation is None or validation.consequence not in (None, Consequence.WARN)
