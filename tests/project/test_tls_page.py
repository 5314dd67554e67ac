"""The page on TLS is true: its settings load, its commands run, its reasons are all there are."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import yaml

from prefect_dicom.config.node import PacsNode
from prefect_dicom.config.receiver import Receiver
from prefect_dicom.config.site import load_site
from prefect_dicom.config.tls import Tls
from prefect_dicom.core.reasons import REASONS
from tests.support.wire import tool

PAGE = (Path(__file__).resolve().parents[2] / "docs/tls.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_site_that_is_shown_loads(tmp_path):
    whole, receiver = blocks("yaml")
    site_file = tmp_path / "site.yaml"
    site_file.write_text(whole)
    assert load_site(site_file, {}).nodes["main"].tls == load_site(site_file, {}).receiver.tls
    document = {**yaml.safe_load(whole), **yaml.safe_load(receiver)}
    site_file.write_text(yaml.safe_dump(document))
    assert len(load_site(site_file, {}).receiver.allowed_certificates) == 4


def test_the_commands_make_a_key_and_a_request(tmp_path):
    (commands,) = blocks("sh")
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        subprocess.run([tool(program), *arguments], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "this-host.key").stat().st_mode & 0o777 == 0o600
    assert b"CERTIFICATE REQUEST" in (tmp_path / "this-host.csr").read_bytes()


def test_every_key_is_explained():
    for model, prefix in ((Tls, ""), (PacsNode, "nodes.NAME."), (Receiver, "receiver.")):
        for name in model.model_fields:
            if model is Tls or "tls" in name or "certificate" in name:
                assert f"`{prefix}{name}`" in PAGE, name


def test_every_reason_of_tls_is_in_the_table():
    named = set(re.findall(r"`((?:tls|sender|receiver)-[a-z-]+)`", PAGE))
    about_tls = {code for code in REASONS if re.search("^tls-|-certificate-|^sender-.*tls", code)}
    assert named == about_tls
