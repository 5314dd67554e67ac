"""The benchmarks run from end to end with tiny sizes; how fast anything is, is not asked here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.jobs import Bench
from benchmarks.table import Line
from prefect_dicom.config.site import load_site
from prefect_dicom.testing import ScriptedPacs, tiny_instances
from tests.support import peers
from tests.support.campaign import only_in
from tests.support.web import dicomweb_plugin

ROOT = Path(__file__).parents[2]


def test_every_transfer_is_compared_in_one_table(tmp_path):
    if missing := peers.Orthanc.absent():
        pytest.skip(missing)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--folder", str(tmp_path)]
        + ["--only", "receive", "tls", "nagle", "get", "web"]
        + ["--rounds", "1", "--ct", "2", "--small", "3"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 14 + (0 if dicomweb_plugin() is None else 4)
    assert {line.count("|") for line in lines} == {6}


@only_in("operations")
@pytest.mark.needs("time")
def test_a_job_of_the_benchmarks_archives_its_cohort(tmp_path):
    (tmp_path / "jobs").mkdir()
    bench = Bench(tmp_path / "jobs")
    with ScriptedPacs(instances=tiny_instances(2)) as pacs:
        site = bench.site(
            {"port": pacs.port, "called_ae_title": pacs.ae_title}, {"directory": "archive"}
        )
        receiver = load_site(site).receiver
        pacs.destinations[receiver.ae_title] = ("127.0.0.1", receiver.port)
        cohort = bench.cohort(pacs.holdings.study_instance_uids(), "two")
        result = bench.run("stages", site, cohort)
    assert result["archived"] == 2
    assert result["peak_bytes"] > 0


@pytest.mark.parametrize(
    ("value", "at_least", "verdict"),
    [(1.2, True, "met"), (0.9, True, "not met"), (0.9, False, "met")],
)
def test_a_line_says_whether_its_target_is_met(value, at_least, verdict):
    assert Line("work", value, 1.0, at_least).verdict == verdict
