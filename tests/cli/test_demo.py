"""The first minute with this software: a demo in an empty home, with nothing set up before."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prefect_dicom.archive.manifest import decode_manifest
from prefect_dicom.config.site import load_site
from tests.support.proxies import refusing_proxy

AT_MOST_SECONDS = 120


@pytest.mark.timeout(AT_MOST_SECONDS + 30)
def test_it_needs_no_home_and_asks_no_proxy(tmp_path):
    (tmp_path / "home").write_text("not a folder")
    program = Path(sys.executable).with_name("prefect-dicom")
    with refusing_proxy() as proxy:
        ended = subprocess.run(
            [program, "demo", "--studies", "2"],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), **proxy.environment},
            capture_output=True,
            text=True,
            timeout=AT_MOST_SECONDS,
        )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert proxy.requests == []
    (complaint,) = [line for line in ended.stderr.splitlines() if "studies archived" not in line]
    assert f"it is {tmp_path}/demo/prefect-home instead" in complaint


@pytest.mark.timeout(AT_MOST_SECONDS + 30)
def test_the_demo_archives_every_instance_and_the_second_pull_asks_for_nothing(tmp_path):
    home, folder = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    folder.mkdir()
    program = Path(sys.executable).with_name("prefect-dicom")
    ended = subprocess.run(
        [program, "demo"],
        cwd=folder,
        # Nothing but where programs are found and where the user lives.
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=AT_MOST_SECONDS,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr

    reported = re.search(r"in the first pull: (\d+); in the second: (\d+)\.", ended.stdout)
    first, second = map(int, reported.groups())
    assert first > 0 and second == 0

    demo = folder / "demo"
    sources = list((demo / "pacs").rglob("*.dcm"))
    objects = list((demo / "archive").rglob("*.dcm"))
    manifests = [decode_manifest(p.read_bytes()) for p in demo.glob("archive/**/manifest.json")]
    assert f"A PACS with {len(sources)} instances" in ended.stdout
    assert len(objects) == len(sources) == sum(len(m.instances) for m in manifests)
    assert len(manifests) == len(list((demo / "pacs").iterdir())) == 12
    assert ended.stdout.count("12 rows: 12 archived;") == 2

    # What it leaves is a set-up to begin one's own with: every word it names is there.
    assert load_site(demo / "site.yaml").archive.directory == demo / "archive"
    for name in ("site.yaml", "cohort.csv", "archive", "reports", "ledger.sqlite"):
        assert (demo / name).exists()
