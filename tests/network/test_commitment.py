"""Storage commitment on an association of ours: reports before the response, or after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import StorageCommitmentPushModel, StorageCommitmentPushModelInstance

from prefect_dicom.config.node import PacsNode
from prefect_dicom.core.errors import PacsError
from prefect_dicom.network.commitment import CommitmentAssociation
from prefect_dicom.network.commitment_report import Report

REFERENCES = [("1.2.840.10008.5.1.4.1.1.2", f"1.2.3.{n}") for n in range(3)]


def information(request: Dataset, failed: int = 0) -> Dataset:
    """The event information for a request of which the first are committed."""
    report = Dataset()
    report.TransactionUID = request.TransactionUID
    items = list(request.ReferencedSOPSequence)
    report.ReferencedSOPSequence = items[failed:]
    if failed:
        report.FailedSOPSequence = items[:failed]
        for item in report.FailedSOPSequence:
            item.FailureReason = 0x0112
    return report


@contextlib.contextmanager
def target(when: str = "after", status: int = 0x0000, failed: int = 0) -> Iterator[PacsNode]:
    """A node that reports on the association of the request."""
    entity = AE("TARGET")
    entity.add_supported_context(StorageCommitmentPushModel, scu_role=True, scp_role=True)
    pending: list[Dataset] = []

    def act(event: evt.Event) -> tuple[int, None]:
        found = information(event.action_information, failed)
        if when == "before":
            report(event.assoc, found)
        elif when == "after":
            pending.append(found)
        return status, None

    def sent(event: evt.Event) -> None:
        # The response to the N-ACTION has gone.
        while pending and type(event.message).__name__ == "N_ACTION_RSP":
            report(event.assoc, pending.pop())

    server = entity.start_server(
        ("127.0.0.1", 0),
        block=False,
        evt_handlers=[(evt.EVT_N_ACTION, act), (evt.EVT_DIMSE_SENT, sent)],
    )
    try:
        yield PacsNode(
            host="127.0.0.1",
            port=server.server_address[1],
            called_ae_title="TARGET",
            timeouts={"acse_seconds": 5},
        )
    finally:
        server.shutdown()


def report(association, found: Dataset) -> None:
    from io import BytesIO

    from pynetdicom.dimse_primitives import N_EVENT_REPORT
    from pynetdicom.dsutils import encode

    (context,) = association.accepted_contexts
    request = N_EVENT_REPORT()
    request.MessageID = 7
    request.AffectedSOPClassUID = StorageCommitmentPushModel
    request.AffectedSOPInstanceUID = StorageCommitmentPushModelInstance
    request.EventTypeID = 1
    syntax = context.transfer_syntax[0]
    request.EventInformation = BytesIO(
        encode(found, syntax.is_implicit_VR, syntax.is_little_endian)
    )
    association.dimse.send_msg(request, context.context_id)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_report_on_the_same_association_is_taken_before_or_after_the_response(when):
    reports: list[Report | None] = []
    with (
        target(when, failed=1) as node,
        CommitmentAssociation(node, lambda got: reports.append(got) or 0) as association,
    ):
        association.request("2.25.7", REFERENCES)
        association.attend(10, lambda: bool(reports))
    assert reports == [Report("2.25.7", {"1.2.3.0": 0x0112, "1.2.3.1": 0, "1.2.3.2": 0})]


def test_a_target_that_never_reports_is_waited_for_no_longer_than_said():
    with target("never") as node, CommitmentAssociation(node, lambda got: 0) as association:
        association.request("2.25.7", REFERENCES)
        association.attend(0.3, lambda: False)


@pytest.mark.parametrize(
    ("status", "code"), [(0x0122, "commitment-not-offered"), (0x0110, "request-refused")]
)
def test_a_refused_request_has_a_reason(status, code):
    with (
        target("never", status) as node,
        CommitmentAssociation(node, lambda got: 0) as association,
        pytest.raises(PacsError) as error,
    ):
        association.request("2.25.7", REFERENCES)
    assert error.value.code == code


def test_nothing_is_never_asked_about():
    with target("never") as node, CommitmentAssociation(node, lambda got: 0) as association:
        for references in ([], REFERENCES * 200):
            with pytest.raises(ValueError, match="1 to 500"):
                association.request("2.25.7", references)
