"""Everything a real archive holds is archived byte for byte, or named with a reason.

The small corpus by default; the whole one is counted by ``python -m tests.support.corpus_pull``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import yaml

from prefect_dicom.config.archive import DirectoryArchive
from prefect_dicom.config.site import load_site
from prefect_dicom.core.model import RetrieveMethod
from prefect_dicom.core.uids import is_uid
from tests.support import corpus_pull, peers, postgres
from tests.support.campaign import only_in, subset
from tests.support.web import WebOrthanc

TITLE = corpus_pull.TITLE


@pytest.fixture
def port() -> int:
    return peers.free_port()


@pytest.fixture
def held_by_orthanc(orthanc, port):
    orthanc.know(TITLE, port)
    return {one: lambda one=one: [orthanc.file(one.id)] for one in orthanc.instances()}


def test_orthanc_by_c_move_into_a_bucket(
    tmp_path,
    orthanc,
    held_by_orthanc,
    corpus_small,
    port,
    rados_gateway,
):
    archive = corpus_pull.bucket_of(rados_gateway).model_copy(update={"prefix": "whole"})
    _arrives(tmp_path, orthanc, RetrieveMethod.C_MOVE, port, held_by_orthanc, corpus_small, archive)


def test_orthanc_by_c_get_into_a_directory_with_the_ledger_in_postgresql(
    tmp_path, orthanc, held_by_orthanc, corpus_small, port
):
    url = postgres.ledger_url("postgresql", tmp_path)
    _arrives(tmp_path, orthanc, RetrieveMethod.C_GET, port, held_by_orthanc, corpus_small, url=url)


@pytest.mark.skipif(WebOrthanc.absent() is not None, reason=str(WebOrthanc.absent()))
@only_in("real archives")
def test_orthanc_by_wado_rs_into_a_bucket(tmp_path, corpus_small, rados_gateway):
    bucket = corpus_pull.bucket_of(rados_gateway).model_copy(update={"prefix": "web"})
    with WebOrthanc(tmp_path / "orthanc") as orthanc:
        orthanc.load(corpus_small)
        held = {one: lambda one=one: [orthanc.file(one.id)] for one in orthanc.instances()}
        patients = corpus_pull.patients_of(corpus_small)
        result = corpus_pull.one_web_pull(tmp_path / "pull", orthanc, held, patients, bucket)
    assert result.unexplained == []
    assert result.identical > 0


@pytest.mark.parametrize("retrieve", subset([RetrieveMethod.C_MOVE, RetrieveMethod.C_GET], []))
def test_dcmqrscp_that_takes_compressed_objects(
    tmp_path, new_archive, corpus_small, port, retrieve
):
    options = corpus_pull.compressed_options(tmp_path, corpus_small)
    dcmqrscp = new_archive(peers.Dcmqrscp, {TITLE: port}, arguments=options)
    dcmqrscp.load(corpus_small)
    stored = corpus_pull.instances_in(dcmqrscp.directory / "storage")
    # It writes anew what it sends: what DCMTK's own receiver gets is the witness.
    studies = sorted({one.study for one in stored if is_uid(one.study)})
    sent = corpus_pull.sent_by(dcmqrscp, tmp_path / "witness", port, studies)
    held = {one: partial(corpus_pull.read_all, path, sent.get(one)) for one, path in stored.items()}
    result = _arrives(tmp_path, dcmqrscp, retrieve, port, held, corpus_small)
    if retrieve is RetrieveMethod.C_GET:
        # Its C-MOVE cannot send most compressed objects to anybody.
        assert result.named["pacs-failure"] == 0


def _arrives(folder, peer, retrieve, port, held, files, archive=None, url=None):
    if archive is None:
        (folder / "archive").mkdir()
        archive = DirectoryArchive(directory=folder / "archive")
    patients = corpus_pull.patients_of(files)
    result = corpus_pull.one_pull(
        folder / "pull", peer.program, peer, retrieve, port, held, patients, archive, url
    )
    assert result.held == len(held) > 100
    assert not result.unexplained
    assert result.named["other-bytes"] == 0
    assert result.identical + sum(result.named.values()) == result.held
    return result


@only_in("real archives")
def test_a_pull_killed_in_the_middle_is_completed_by_rerun_with_only_what_is_missing(
    tmp_path, new_archive, corpus_small, port
):
    orthanc = new_archive(peers.Orthanc, {TITLE: port})
    orthanc.load(corpus_small)
    held = {one: lambda one=one: [orthanc.file(one.id)] for one in orthanc.instances()}
    folder = tmp_path / "site"
    site_file = _site_file(folder, orthanc, port)
    corpus_pull.write_cohort(folder / "cohort.csv", held, corpus_pull.patients_of(corpus_small))
    command = [sys.executable, "-m", "prefect_dicom.cli"]
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}
    pull = subprocess.Popen(
        [*command, "pull", str(folder / "cohort.csv"), "--site", str(site_file)],
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    _wait_for(lambda: len(list((folder / "archive").rglob("*.dcm"))) >= len(held) // 4, pull)
    os.killpg(pull.pid, signal.SIGKILL)
    pull.communicate()
    archived_before = {path.stem for path in (folder / "archive").rglob("*.dcm")}
    assert len(archived_before) < len(held)
    sent_before = len(orthanc.sent())

    rerun = subprocess.run(
        [*command, "rerun", "1", "--site", str(site_file)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert rerun.returncode in (0, 2), rerun.stderr
    result = corpus_pull.compare(load_site(site_file), 1, list(held), lambda one: held[one]())
    assert not result.unexplained
    again = Counter(orthanc.sent()[sent_before:])
    # What is in the archive is never sent a second time.
    assert not archived_before & again.keys()


def _site_file(folder: Path, peer: peers.Peer, port: int) -> Path:
    (folder / "archive").mkdir(parents=True)
    settings = {
        "nodes": {
            "peer": {
                "host": "127.0.0.1",
                "port": peer.port,
                "called_ae_title": peer.ae_title,
                "calling_ae_title": peers.US,
                "timeouts": {"settle_seconds": 1},
                # Small requests, so that there is a middle to be killed in.
                "limits": {"associations": 1, "chunk_studies": 5},
            }
        },
        "receiver": {"ae_title": TITLE, "port": port, "idle_seconds": 3},
        "archive": {"directory": "archive"},
        "spool": {"path": "spool", "reserve_bytes": 0},
        "retry_after_seconds": [],
    }
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
