"""Evidence that a target has a study: its own list, its counts, its bytes."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from prefect_dicom.archive import Archive
from prefect_dicom.core.background import Background
from prefect_dicom.core.errors import Interrupted, PacsError
from prefect_dicom.core.model import InstanceKey, ManifestInstance, StoreRequest
from prefect_dicom.core.uids import is_safe_key
from prefect_dicom.delivery.context import DeliveryContext
from prefect_dicom.delivery.source import data_set_sha256
from prefect_dicom.delivery.study import StudyDelivery
from prefect_dicom.network.find.list_instances import list_instances
from prefect_dicom.network.find.list_series import list_series
from prefect_dicom.network.get import c_get
from prefect_dicom.network.node_client import NodeClient
from prefect_dicom.network.query_keys import retrieve_identifier
from prefect_dicom.network.retrieve_result import RetrieveResult
from prefect_dicom.network.status import StorageStatus
from prefect_dicom.network.store import pack_contexts
from prefect_dicom.network.upper_layer.negotiation import STORAGE_CONTEXTS


def listed_keys(
    context: DeliveryContext, requestor: NodeClient, delivery: StudyDelivery
) -> set[InstanceKey]:
    """The instances of a study that the target lists."""
    study = delivery.study
    if not is_safe_key(study.study_instance_uid):
        raise PacsError("request-refused", "a StudyInstanceUID that no query may name")
    with context.access.pool.request(requestor):
        listed = list_instances(requestor, study.study_instance_uid, study.patient_id)
    return {instance.key for instance in listed.instances}


def series_that_lack(
    context: DeliveryContext, requestor: NodeClient, delivery: StudyDelivery
) -> set[str]:
    """The series of which the target does not count as many instances as there are to be."""
    study = delivery.study
    with context.access.pool.request(requestor):
        listed = list_series(requestor, study.study_instance_uid, study.patient_id)
    counted = {each.series_instance_uid: each.number_of_instances for each in listed.series}
    wanted = Counter(key.series_instance_uid for key in delivery.instances)
    return {series for series, count in wanted.items() if counted.get(series) != count}


# --- read back


@dataclass(slots=True)
class _HashedInstance:
    """An instance that is received and not kept: only its hash."""

    request: StoreRequest
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def write(self, fragments: list[memoryview]) -> None:
        for fragment in fragments:
            self.digest.update(fragment)

    def give_back(self, *, all_of_it: bool) -> bool:
        return True


class HashingSink:
    """Takes instances of a C-GET and keeps the SHA-256 of their data sets alone."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        """By SOP Instance UID."""

    def begin(self, request: StoreRequest, background: Background | None) -> _HashedInstance:
        """Begin an instance; it is hashed at once."""
        return _HashedInstance(request)

    def complete(self, instance: _HashedInstance) -> int:
        """Keep the hash of an instance whose data set is whole."""
        self.digests[instance.request.sop_instance_uid] = instance.digest.hexdigest()
        return StorageStatus.SUCCESS

    def abandon(self, instance: _HashedInstance) -> None:
        """Forget an instance that was not whole."""


@dataclass(frozen=True, slots=True)
class ReadBack:
    """What came back of a study: by key, whether the bytes are those that were sent."""

    same: frozenset[InstanceKey]
    different: frozenset[InstanceKey]
    absent: frozenset[InstanceKey]


def read_back(
    context: DeliveryContext, archive: Archive, requestor: NodeClient, delivery: StudyDelivery
) -> ReadBack:
    """Read instances of a study back with C-GET and compare the hashes of their data sets.

    Each is requested in the transfer syntax in which it was sent alone, so that a target which
    holds it in another one has to fail or to re-encode it; both show.
    """
    keys = sorted(delivery.instances)
    if 0 < context.destination.sample < len(keys):
        keys = sorted(random.sample(keys, context.destination.sample))
    sink = HashingSink()
    most = context.node.limits.uids_per_request
    by_series: dict[str, list[InstanceKey]] = {}
    for key in keys:
        by_series.setdefault(key.series_instance_uid, []).append(key)
    for series in by_series.values():
        for start in range(0, len(series), most):
            _get(context, requestor, delivery, series[start : start + most], sink)
    same, different, absent = set(), set(), set()
    for key in keys:
        found = sink.digests.get(key.sop_instance_uid)
        if found is None:
            absent.add(key)
        elif found == data_set_sha256(archive, delivery.instances[key]):
            same.add(key)
        else:
            different.add(key)
    return ReadBack(frozenset(same), frozenset(different), frozenset(absent))


def _get(
    context: DeliveryContext,
    requestor: NodeClient,
    delivery: StudyDelivery,
    keys: Sequence[InstanceKey],
    sink: HashingSink,
) -> None:
    """Request instances of one series, in as many associations as their contexts need."""
    wanted: Collection[ManifestInstance] = [delivery.instances[key] for key in keys]
    pairs = [(each.sop_class_uid, each.transfer_syntax_uid) for each in wanted]
    for group in pack_contexts(pairs):
        for start in range(0, len(group), STORAGE_CONTEXTS):
            contexts = group[start : start + STORAGE_CONTEXTS]
            uids = [
                each.sop_instance_uid
                for each, pair in zip(wanted, pairs, strict=True)
                if pair in contexts
            ]
            identifier = retrieve_identifier(
                context.node.information_model,
                "IMAGE",
                delivery.study.patient_id,
                [delivery.study.study_instance_uid],
                [keys[0].series_instance_uid],
                uids,
                requestor.characters,
            )
            with context.access.pool.request(
                requestor, retrieve=True, instances=len(uids)
            ) as usage:
                # It goes over an association of its own, and the request is admitted for one.
                requestor.close()
                before = len(sink.digests)
                result: RetrieveResult = c_get(
                    context.node,
                    identifier,
                    contexts=contexts,
                    store_handler=sink,
                    should_stop=context.should_stop,
                )
                usage.instances = len(sink.digests) - before
            if result.lost == "interrupted":
                raise Interrupted()
            if result.lost is not None:
                raise PacsError(result.lost, "while instances were read back")
