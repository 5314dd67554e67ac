"""Whatever number a peer answers with, it becomes a reason with a disposition and an advice."""

from __future__ import annotations

import pytest
from pynetdicom import status as tables
from pynetdicom.status import code_to_category

from prefect_dicom.dimse.status import reason_for_status
from prefect_dicom.model import Disposition
from prefect_dicom.reasons import REASONS

SERVICES = {
    "C-ECHO": tables.VERIFICATION_SERVICE_CLASS_STATUS,
    "C-FIND": tables.QR_FIND_SERVICE_CLASS_STATUS,
    "C-MOVE": tables.QR_MOVE_SERVICE_CLASS_STATUS,
    "C-GET": tables.QR_GET_SERVICE_CLASS_STATUS,
}


@pytest.mark.parametrize("service", SERVICES)
def test_every_status_of_the_standard_is_mapped(service):
    for status, (category, _) in SERVICES[service].items():
        code = reason_for_status(service, status)
        if category in ("Success", "Pending"):
            assert code is None, f"{status:04X}"
        if category == "Failure":
            assert code in REASONS, f"{status:04X}"


@pytest.mark.parametrize("service", SERVICES)
def test_the_set_of_reasons_is_closed_for_any_number_a_peer_may_invent(service):
    for status in range(0x10000):
        code = reason_for_status(service, status)
        assert code is None or code in REASONS, f"{status:04X}"
        if code is None:
            known = code_to_category(status) in ("Success", "Pending", "Warning")
            assert known or status >> 12 == 0xB, f"{status:04X} is taken for a success"


@pytest.mark.parametrize(
    ("service", "status", "code"),
    [
        ("C-FIND", 0xFE00, "answers-capped"),
        ("C-FIND", 0xB001, "answers-capped"),
        ("C-FIND", 0xA700, "answers-capped"),
        ("C-FIND", 0xA900, "request-refused"),
        ("C-FIND", 0xC000, "request-refused"),
        ("C-FIND", 0x0124, "not-permitted"),
        ("C-FIND", 0x0122, "service-not-offered"),
        ("C-MOVE", 0xA801, "move-destination-unknown"),
        ("C-MOVE", 0xA702, "move-destination-failed"),
        ("C-GET", 0xA702, "pacs-failure"),
        ("C-MOVE", 0xA701, "pacs-busy"),
        ("C-MOVE", 0xC000, "pacs-failure"),
        ("C-MOVE", 0xCFFF, "pacs-failure"),
        ("C-GET", 0x0213, "pacs-busy"),
        ("C-MOVE", 0xB000, None),
        ("C-GET", 0x0001, None),
        ("C-ECHO", 0x0000, None),
        ("C-MOVE", 0x4242, "pacs-failure"),
    ],
)
def test_a_status_says_whether_asking_again_can_help(service, status, code):
    assert reason_for_status(service, status) == code


def test_an_unnamed_failure_may_pass_and_is_tried_again():
    code = reason_for_status("C-FIND", 0x7777)
    assert REASONS[code].disposition is Disposition.TRANSIENT
