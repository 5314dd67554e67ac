"""The end of a study: committed with its manifest, or failed with a reason.

The manifest of a study is written when everything it names is in the archive, and the ledger says
*archived* after that (``docs/promise.md``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from datetime import UTC

from prefect_dicom.archive import Archive
from prefect_dicom.archive.manifest import decode_manifest, put_manifest
from prefect_dicom.archive.spool import Spool
from prefect_dicom.core.events import Event
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import (
    InstanceState,
    ManifestInstance,
    StudyManifest,
    StudyReference,
    WithheldInstance,
)
from prefect_dicom.ledger import Acceptance, Ledger
from prefect_dicom.ledger.records import InstanceRecord
from prefect_dicom.retrieval.study_task import StudyTask
from prefect_dicom.run.context import RunContext


class StudyCommit:
    """Ends studies in the archive, the ledger and the spool. Thread-safe."""

    def __init__(self, context: RunContext, spool: Spool, archive: Archive) -> None:
        self._context = context
        self._spool = spool
        self._archive = archive

    def finish(self, task: StudyTask) -> bool:
        """Put the manifest of a study whose instances are all there, and commit it."""
        assert not task.held, "what names another patient was decided on when all had come"
        manifest = _manifest_of(task, self._context.ledger, self._context.cohort.selection)
        failpoint("listed-again")
        data = put_manifest(self._archive, manifest)
        failpoint("manifest-put")
        self.commit(task, manifest, data)
        return True

    def commit(
        self, task: StudyTask, manifest: StudyManifest, data: bytes, *, rebuilt: bool = False
    ) -> None:
        """Record a study as archived, and clear the spool of it.

        Parameters
        ----------
        data : bytes
            The manifest, as the archive holds it.
        rebuilt : bool
            The archive had it before this run.
        """
        figures = {
            "instances": len(manifest.instances),
            "withheld": len(manifest.withheld),
            "missing": len(manifest.missing),
            "size_bytes": sum(i.size_bytes for i in manifest.instances),
        }
        self._context.ledger.studies.record_archived(
            task.claim, data, **figures, rebuilt=rebuilt, evidence=manifest.evidence
        )
        failpoint("archived-recorded")
        _clear(self._spool, task.reference, manifest)
        self._publish("study.archived", task, figures=figures)

    def end_failed(self, task: StudyTask, code: str) -> bool:
        """The study ends without a manifest; what was stored stays, for a rerun to build on."""
        self._quarantine_strangers(task)
        self.fail(task, code)
        return False

    def fail(self, task: StudyTask, code: str) -> None:
        """Record that a study has failed at its node; where there is another node, ask that."""
        context = self._context
        if task.attempts.are_hopeless(task.missing()):
            context.hopeless.add(task.reference)
        if not context.ledger.studies.record_failed(
            task.claim,
            code,
            task.held.detail,
            context.cohort.nodes,
            task.held.patient_id,
        ):
            context.failover.request_next_node()
            return
        self._publish("study.failed", task, reason=code)

    def clear_late(self, studies: Iterable[StudyReference]) -> None:
        """Clear the spool of archived studies whose request has brought more since."""
        for study in studies:
            if self._spool.files(study):
                manifest = self._context.ledger.manifests.get(study)
                if manifest is not None:
                    _clear(self._spool, study, decode_manifest(manifest))

    def _publish(
        self,
        name: str,
        task: StudyTask,
        *,
        reason: str | None = None,
        figures: dict[str, int] | None = None,
    ) -> None:
        self._context.events.publish(
            Event(
                name=name,
                at=self._context.clock.now(),
                node=task.claim.node,
                reference=task.reference,
                reason=reason,
                figures=figures or {},
            )
        )

    def _quarantine_strangers(self, task: StudyTask) -> None:
        for sha256 in task.files.unlisted:
            with contextlib.suppress(FileNotFoundError):
                self._spool.quarantine_file(task.reference, sha256, "not-requested")
        task.files.forget_unlisted()


def clear_finished(spool: Spool, ledger: Ledger) -> None:
    """Clear the spool of archived studies: their run died after its commit, or something came late.

    What their manifest lacks is quarantined.
    """
    for study in spool.studies():
        manifest = ledger.manifests.get(study)
        if manifest is not None:
            _clear(spool, study, decode_manifest(manifest))


def _clear(spool: Spool, study: StudyReference, manifest: StudyManifest) -> None:
    """Delete what lies in the spool of an archived study; what its manifest lacks is kept apart."""
    archived = {instance.sha256 for instance in manifest.instances}
    for path in spool.files(study):
        if path.stem not in archived:
            with contextlib.suppress(FileNotFoundError):
                spool.quarantine_file(study, path.stem, "not-requested")
    spool.drop(study)


def _manifest_of(task: StudyTask, ledger: Ledger, selection: str) -> StudyManifest:
    instances, withheld, missing = [], [], []
    accepted = task.accepted.missing
    for record in sorted(ledger.instances.of_study(task.reference), key=lambda r: r.key):
        if record.state is InstanceState.STORED:
            instances.append(_stored_instance(record))
        elif record.reason == "missing-accepted" and accepted is not None:
            missing.append(WithheldInstance(*record.key, accepted.reason))
        elif record.key in task.instances.listed:
            assert record.reason is not None, "an instance that is withheld has a reason"
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
        missing=tuple(missing),
        **_accepted_by(accepted if missing else None),
    )


def _accepted_by(accepted: Acceptance | None) -> dict[str, str]:
    if accepted is None or accepted.accepted_at is None:
        return {}
    at = accepted.accepted_at.astimezone(UTC).isoformat(timespec="seconds")
    return {"accepted_by": accepted.accepted_by, "accepted_at": at}


def _stored_instance(record: InstanceRecord) -> ManifestInstance:
    assert record.transfer_syntax_uid is not None, "validation has read it"
    assert record.object_key is not None, "recorded when it was stored"
    assert record.size_bytes is not None, "recorded when it was received"
    assert record.sha256 is not None, "recorded when it was received"
    return ManifestInstance(
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
