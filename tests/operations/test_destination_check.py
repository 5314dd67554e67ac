"""The doctor proves a destination, and leaves nothing behind unless it may."""

from __future__ import annotations

import pytest

from prefect_dicom.config.destination import Destination
from prefect_dicom.config.node import PacsNode
from prefect_dicom.operations.destination_check import TEST_PATIENT_ID, check_destination
from prefect_dicom.testing import Behaviour, ScriptedPacs


def findings(pacs: ScriptedPacs, **destination: object):
    node = PacsNode(host="127.0.0.1", port=pacs.port, called_ae_title=pacs.ae_title)
    settings = Destination.model_validate(destination)
    return list(check_destination("research", node, settings))


def test_nothing_is_stored_where_the_site_does_not_allow_it():
    with ScriptedPacs() as target:
        assert [each.ok for each in findings(target)] == [True, True]
        assert not target.requests("C-STORE")


def test_a_synthetic_instance_is_stored_listed_and_can_be_found_again():
    with ScriptedPacs() as target:
        found = findings(target, test_instance=True)
        assert [each.ok for each in found] == [True, True, True]
        (held,) = target.holdings
        assert held.study_instance_uid in found[1].words and TEST_PATIENT_ID in found[1].words


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        (Behaviour("keep.drop"), "delivery-lacking"),
        (Behaviour("keep.status", status=0xA900), "delivery-refused"),
        (Behaviour("assoc.contexts", services=["C-STORE"], result=3), "context-refused"),
    ],
)
def test_what_is_wrong_with_a_target_is_said_by_its_reason(behaviour, code):
    with ScriptedPacs(script=[behaviour]) as target:
        (failed,) = [each for each in findings(target, test_instance=True) if not each.ok]
        assert code in failed.words


def test_a_target_without_storage_commitment_is_found_before_anything_is_delivered():
    with ScriptedPacs() as target:
        *_, last = findings(target, evidence="committed")
        assert not last.ok and "commitment-not-offered" in last.words
