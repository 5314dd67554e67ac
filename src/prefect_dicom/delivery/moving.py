"""C-MOVE to a third node, PS3.4 C.4.2: the source sends to the target, and we see no bytes.

What the source says of its sub-operations is no evidence: its list is read before, and the target's
afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from prefect_dicom.core.deliveries import DeliveredInstance, DeliveredState
from prefect_dicom.core.errors import Interrupted, PacsError
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import InstanceKey, ManifestInstance, Study
from prefect_dicom.core.uids import is_safe_key
from prefect_dicom.delivery.context import DeliveryContext
from prefect_dicom.delivery.manifest import NOT_SEEN
from prefect_dicom.delivery.study import StudyDelivery
from prefect_dicom.network.find.list_instances import list_instances
from prefect_dicom.network.move import move
from prefect_dicom.network.node_client import NodeClient
from prefect_dicom.network.query_keys import retrieve_identifier
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.network.status import reason_for_status

_MESSAGE_IDS = range(1, 0x10000)


def instances_at_source(
    context: DeliveryContext, source: NodeClient, study: Study
) -> dict[InstanceKey, ManifestInstance]:
    """What the source lists of a study: what the target has to list afterwards.

    Raises
    ------
    PacsError
        ``study-gone`` where it lists nothing; else why it cannot list.
    """
    if not is_safe_key(study.study_instance_uid):
        raise PacsError("request-refused", "a StudyInstanceUID that no query may name")
    with context.access.pool.request(source):
        listed = list_instances(source, study.study_instance_uid, study.patient_id)
    if not listed.instances:
        raise PacsError("study-gone", "the source lists no instance")
    return {
        each.key: ManifestInstance(
            series_instance_uid=each.key.series_instance_uid,
            sop_instance_uid=each.key.sop_instance_uid,
            sop_class_uid=each.sop_class_uid,
            transfer_syntax_uid=NOT_SEEN,
            key="",
            size_bytes=0,
            sha256=NOT_SEEN,
        )
        for each in listed.instances
    }


def move_study(
    context: DeliveryContext,
    source: NodeClient,
    delivery: StudyDelivery,
    keys: Sequence[InstanceKey] = (),
) -> None:
    """Have the source send a study to the target, or only these instances of it.

    That the source reports success is recorded as acceptance, and no more.

    Raises
    ------
    PacsError
        The source cannot be used, does not know the target, or does not end the request.
    """
    if not isinstance(source, Requestor):
        raise PacsError("service-not-offered", "C-MOVE is a service of DIMSE")
    by_series: dict[str, list[str]] = {}
    for key in keys:
        by_series.setdefault(key.series_instance_uid, []).append(key.sop_instance_uid)
    study = delivery.study
    levels: list[tuple[str, list[str], list[str]]] = [
        ("IMAGE", [series], uids) for series, uids in by_series.items()
    ] or [("STUDY", [], [])]
    for level, series, uids in levels:
        identifier = retrieve_identifier(
            source.node.query_model,
            level,
            study.patient_id,
            [study.study_instance_uid],
            series,
            uids,
            source.characters,
        )
        with context.access.pool.request(
            source, retrieve=True, instances=len(uids) or len(delivery.instances)
        ) as usage:
            result = move(
                source,
                identifier,
                context.node.called_ae_title,
                random.choice(_MESSAGE_IDS),
                should_stop=lambda: "interrupted" if context.should_stop() else None,
            )
            usage.instances = result.completed or 0
        _check(result.lost, result.status)
    failpoint("instance-accepted")
    due = [key for key, _ in delivery.due()]
    outcomes = [DeliveredInstance(key, DeliveredState.ACCEPTED) for key in due]
    context.ledger.deliveries.record_instances(delivery.claim, outcomes)
    delivery.note(outcomes)
    failpoint("acceptance-recorded")


def _check(lost: str | None, status: int | None) -> None:
    # Sub-operations that failed are a warning: the target's list says which instances it lacks.
    code = lost if status is None else reason_for_status("C-MOVE", status)
    if code == "interrupted":
        raise Interrupted()
    if code is not None:
        raise PacsError(code, "" if status is None else f"C-MOVE status {status:04X}")
