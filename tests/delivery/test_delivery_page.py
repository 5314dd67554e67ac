"""The page on deliveries: its site file is one, its commands exist, its table is the code's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from prefect_dicom.cli import app
from prefect_dicom.config.node import PacsNode
from prefect_dicom.config.receiver import Receiver
from prefect_dicom.core.deliveries import DeliveryEvidence

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "delivery.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line):
    program, *words = shlex.split(line)
    assert program == "prefect-dicom"
    app.parse_args(words, exit_on_error=False, print_error=False)


def test_the_site_file_has_a_destination():
    text, _ = blocks("yaml")
    node = PacsNode.model_validate(yaml.safe_load(text)["nodes"]["research"])
    assert node.destination is not None
    assert node.destination.evidence is DeliveryEvidence.LISTED


def test_the_site_file_has_a_receiver_for_reports():
    _, text = blocks("yaml")
    assert Receiver.model_validate(yaml.safe_load(text)["receiver"]) == Receiver()


def test_the_table_of_evidence_has_every_kind_from_the_weakest_on():
    table = TEXT.split("## Evidence")[1].split("##")[0]
    named = re.findall(r"^\| `([a-z-]+)`", table, re.MULTILINE)
    assert named == [each.value for each in reversed(DeliveryEvidence)]
