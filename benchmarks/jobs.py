"""Whole jobs: sites around the sender, the flow in a process of its own, and the three steps."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import pydicom
import yaml

from benchmarks.corpus import Study
from benchmarks.job import peak_bytes
from benchmarks.receivers import ended, started
from benchmarks.sender import Orthanc
from prefect_dicom.config.site import load_site
from prefect_dicom.network.storage_scp import running_receiver
from tests.support.peers import free_port

ROOT = Path(__file__).parents[1]
_JOB_SECONDS = 1800


@dataclass
class Bench:
    """Where jobs run: a folder for their sites, and a Prefect server of their own."""

    folder: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    _number: int = 0

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path) -> Iterator[Bench]:
        """With a Prefect server that ends with the block."""
        folder.mkdir()
        bench = cls(folder)
        port = free_port()
        bench.environment |= {
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_LEVEL": "WARNING",
            "DO_NOT_TRACK": "1",
        }
        command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
        server = started(command, port, bench.environment, seconds=90)
        bench.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
        try:
            yield bench
        finally:
            ended(server)

    def site(self, node: Mapping, archive: Mapping) -> Path:
        """A site file in a folder of its own; the node's destination is a new AE title."""
        self._number += 1
        folder = self.folder / f"site-{self._number}"
        folder.mkdir()
        port = free_port()
        content = {
            "nodes": {"pacs": {"host": "127.0.0.1", "timeouts": {"settle_seconds": 2}, **node}},
            "receiver": {"ae_title": f"JOB{port}", "port": port, "idle_seconds": 20},
            "archive": dict(archive),
            "spool": {"path": "spool", "reserve_bytes": 0},
            "reports": "reports",
        }
        if "directory" in archive:
            (folder / archive["directory"]).mkdir(parents=True)
        file = folder / "site.yaml"
        file.write_text(yaml.safe_dump(content))
        return file

    def cohort(self, keys: Iterable[str], name: str, keyword: str = "StudyInstanceUID") -> Path:
        """A cohort file that names studies by their UIDs, or by another key."""
        path = self.folder / f"{name}.csv"
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow([keyword])
            rows.writerows([key] for key in keys)
        return path

    def run(self, mode: str, site: Path, cohort: Path) -> dict:
        """Run :mod:`benchmarks.job`; its result, and the peak of the site's receiver.

        Raises
        ------
        RuntimeError
            It failed.
        """
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.job", mode, str(site), str(cohort)],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=_JOB_SECONDS,
        )
        if done.returncode:
            raise RuntimeError(f"the {mode} job failed: {done.stderr[-2000:]}")
        result = json.loads(done.stdout.splitlines()[-1])
        lease = running_receiver(load_site(site))
        if lease is not None:
            result["receiver_peak_bytes"] = peak_bytes(lease.status()["pid"])
            lease.stop()
            lease.close()
        return result


def flow_and_stages(
    bench: Bench, orthanc: Orthanc, studies: list[Study], archive: Mapping, rounds: int
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of the flow, of its slowest stage alone, and of its two stages, by round."""
    whole, slowest, both = [], [], []
    cohort = bench.cohort([s.study_instance_uid for s in studies], "jobs")
    for _ in range(rounds):
        flow = bench.run("flow", *_placed(bench, orthanc, archive), cohort)
        if flow["state"] != "Completed":
            raise RuntimeError(f"the flow ended {flow['state']}")
        stages = bench.run("stages", *_placed(bench, orthanc, archive), cohort)
        if stages["archived"] != len(studies):
            raise RuntimeError(f"{stages['archived']} of {len(studies)} studies were archived")
        whole.append(flow["seconds"])
        slowest.append(max(stages["retrieve"], stages["archive"]))
        both.append(stages["retrieve"] + stages["archive"])
    return whole, slowest, both


def flow_seconds(bench: Bench, orthanc: Orthanc, studies: list[Study], archive: Mapping) -> float:
    """Seconds of the flow alone."""
    cohort = bench.cohort([s.study_instance_uid for s in studies], "flow")
    return bench.run("flow", *_placed(bench, orthanc, archive), cohort)["seconds"]


def _placed(bench: Bench, orthanc: Orthanc, archive: Mapping) -> tuple[Path]:
    """A new site at an Orthanc that knows its receiver, with an archive of its own."""
    own = dict(archive)
    if "bucket" in own:
        own["prefix"] = f"job-{bench._number + 1}"
    node = {"port": orthanc.port, "called_ae_title": orthanc.ae_title}
    node["limits"] = {"chunk_studies": 5}
    site = bench.site(node, own)
    receiver = load_site(site).receiver
    orthanc.know(receiver.ae_title, receiver.port)
    return (site,)


def three_steps(
    orthanc: Orthanc, studies: list[Study], folder: Path, archive: Mapping, *, best: bool
) -> dict[str, float]:
    """Seconds of getscu, then a check of every file, then an upload: one after the other.

    A study at a time by getscu, a full read by pydicom, ``upload_file`` of boto3; ``best`` is
    getscu with what makes it fastest, and no Nagle. With a directory the upload is a copy.
    """
    folder.mkdir()
    seconds = {"getscu": sum(orthanc.get(study, folder, best=best) for study in studies)}
    files = list(folder.iterdir())
    if len(files) != sum(len(study.files) for study in studies):
        raise RuntimeError(f"getscu brought {len(files)} files")
    began = time.perf_counter()
    for path in files:
        dataset = pydicom.dcmread(path)
        if len(dataset.PixelData) != dataset.Rows * dataset.Columns * 2:
            raise RuntimeError("a file is not whole")
    seconds["check"] = time.perf_counter() - began
    began = time.perf_counter()
    if "bucket" in archive:
        client = boto3.client("s3", endpoint_url=archive["endpoint"], region_name="us-east-1")
        for path in files:
            client.upload_file(str(path), archive["bucket"], f"steps/{folder.name}/{path.name}")
    else:
        shutil.copytree(folder, folder.with_suffix(".archive"))
    seconds["upload"] = time.perf_counter() - began
    shutil.rmtree(folder)
    return seconds
