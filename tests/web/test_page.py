"""What docs/dicomweb.md shows: its site files load, and its table of statuses is the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from prefect_dicom.config.site import load_site
from prefect_dicom.config.web_node import WebNode
from prefect_dicom.web.status import WebService, reason_for_http

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "dicomweb.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_it_has_a_site_file_for_each_product():
    assert [language for language, _ in BLOCKS] == 5 * ["yaml"]


@pytest.mark.parametrize("text", [text for _, text in BLOCKS], ids=lambda text: text.split()[1])
def test_each_of_its_nodes_makes_a_site(text, tmp_path):
    document = yaml.safe_load(text)
    document |= {"archive": {"directory": "archive"}, "spool": {"path": "spool"}}
    file = tmp_path / "site.yaml"
    file.write_text(yaml.safe_dump(document))
    (node,) = load_site(file, {}).nodes.values()
    assert isinstance(node, WebNode) and node.authentication is not None


def test_the_example_has_every_key_of_such_a_node():
    node = yaml.safe_load((ROOT / "configs" / "dicomweb.yaml").read_text())["nodes"]["vna"]
    shared = {"limits", "timeouts", "access_schedule"}
    assert WebNode.model_fields.keys() - shared <= node.keys()


def test_its_table_of_statuses_is_the_one_of_the_code():
    rows = re.findall(r"^\| ([^|]*\d{3}[^|]*) \| `([\w-]+)` \|", PAGE, re.MULTILINE)
    assert rows
    for statuses, reason in rows:
        services = [WebService.SEARCH] if "of a search" in statuses else [WebService.RETRIEVE]
        for status in map(int, re.findall(r"\b\d{3}\b", statuses)):
            if status in (405, 501):
                services = list(WebService)
            assert {reason_for_http(service, status) for service in services} == {reason}
