"""``prefect-dicom deidentify``: copies of files, and what was done to each element."""

from __future__ import annotations

import os
from pathlib import Path

import pydicom
import pytest

from prefect_dicom.cli import app
from prefect_dicom.cli.app import Exit
from prefect_dicom.config.projects import key_variable
from tests.deidentify.test_engine import file_of
from tests.support.part10_objects import ct

KEY = "0f" * 32
ORIGINAL = {"ImageType": ["ORIGINAL", "PRIMARY"]}


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(key_variable("lung-ai"), KEY)
    file = tmp_path / "site.yaml"
    file.write_text(
        f"""
nodes: {{main: {{host: 127.0.0.1, port: 104, called_ae_title: PACS}}}}
archive: {{directory: {tmp_path}/archive}}
spool: {{path: {tmp_path}/spool}}
projects:
  lung-ai: {{archive: {{directory: {tmp_path}/lung-ai}}, dates: modified}}
"""
    )
    return file


def run(*words: object) -> int | None:
    return app([str(word) for word in words], exit_on_error=False, result_action="return_value")


def test_a_copy_is_written_under_its_new_uid(site, tmp_path, capsys):
    source = tmp_path / "ct.dcm"
    source.write_bytes(file_of(ct(**ORIGINAL)))

    code = run(
        "deidentify", source, "--project", "lung-ai", "--output", tmp_path / "out", "-s", site
    )

    (made,) = (tmp_path / "out").iterdir()
    copy = pydicom.dcmread(made)
    assert code == 0
    assert made.name == f"{copy.SOPInstanceUID}.dcm"
    assert copy.LongitudinalTemporalInformationModified == "MODIFIED"
    assert "1 of 1 files have a de-identified copy." in capsys.readouterr().err


@pytest.mark.parametrize("uid", ["../../victim", "/tmp/victim", "1.2.x"])
def test_no_uid_of_a_file_that_is_none_becomes_a_path(site, tmp_path, capsys, uid):
    site.write_text(site.read_text().replace("dates: modified", "retain: [uids]"))
    source = tmp_path / "ct.dcm"
    source.write_bytes(file_of(ct(**ORIGINAL, SOPInstanceUID=uid)))
    before = set(tmp_path.rglob("*"))

    code = run(
        "deidentify", source, "--project", "lung-ai", "--output", tmp_path / "out", "-s", site
    )

    assert code == Exit.NOT_ALL
    assert set(tmp_path.rglob("*")) == before | {tmp_path / "out"}
    assert "deidentify-unreadable" in capsys.readouterr().err


def test_explain_prints_attributes_and_rows_and_no_values(site, tmp_path, capsys):
    source = tmp_path / "ct.dcm"
    source.write_bytes(file_of(ct(**ORIGINAL)))

    assert run("deidentify", source, "--project", "lung-ai", "--explain", "-s", site) == 0

    printed = capsys.readouterr().out
    assert "(0010,0010) PatientName PN: pseudonym ((0010,0010) Patient's Name: basic" in printed
    assert "StudyDate DA: dates-shifted ((0008,0020) Study Date: modified dates)" in printed
    assert "Secret" not in printed


def test_what_is_withheld_is_named_with_its_reason(site, tmp_path, capsys):
    source = tmp_path / "us.dcm"
    source.write_bytes(file_of(ct(SOPClassUID="1.2.840.10008.5.1.4.1.1.6.1", Modality="US")))

    code = run(
        "deidentify", source, "--project", "lung-ai", "--output", tmp_path / "out", "-s", site
    )

    assert code == 2
    assert list((tmp_path / "out").iterdir()) == []
    assert "pixels-may-identify" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda site: os.environ.pop(key_variable("lung-ai")), "PREFECT_DICOM_PROJECT_KEY_LUNG_AI"),
        (lambda site: os.environ.update({key_variable("lung-ai"): "short"}), "64 hexadecimal"),
    ],
    ids=["no key", "short key"],
)
def test_without_a_usable_key_nothing_is_made(site, tmp_path, change, words):
    source = tmp_path / "ct.dcm"
    source.write_bytes(file_of(ct(**ORIGINAL)))
    change(site)

    with pytest.raises(Exception, match=words):
        run("deidentify", source, "--project", "lung-ai", "--explain", "-s", site)


def test_a_key_file_that_others_can_read_is_refused(site, tmp_path, monkeypatch):
    monkeypatch.delenv(key_variable("lung-ai"))
    key = tmp_path / "lung.key"
    key.write_text(KEY)
    key.chmod(0o644)
    site.write_text(site.read_text().replace("dates: modified", f"key_file: {key}"))
    source = tmp_path / "ct.dcm"
    source.write_bytes(file_of(ct(**ORIGINAL)))

    with pytest.raises(Exception, match="chmod 600"):
        run("deidentify", source, "--project", "lung-ai", "--explain", "-s", site)
    key.chmod(0o600)
    assert run("deidentify", source, "--project", "lung-ai", "--explain", "-s", site) == 0


def test_an_archive_of_copies_within_the_identified_one_is_refused(site, tmp_path):
    site.write_text(site.read_text().replace(f"{tmp_path}/lung-ai", f"{tmp_path}/archive/copies"))
    with pytest.raises(Exception, match="archive of its own"):
        run("deidentify", site, "--project", "lung-ai", "--explain", "-s", site)
