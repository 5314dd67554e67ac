"""How long a PACS of a given speed stands idle while a cohort is pulled from it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.corpus import Study
from benchmarks.jobs import ROOT, Bench
from benchmarks.paced import Wire
from benchmarks.receivers import StoreScp
from benchmarks.sender import Orthanc
from benchmarks.table import Line
from prefect_dicom.config.site import load_site
from prefect_dicom.network.storage_scp import running_receiver

MB_PER_SECOND = 15.0
_LONG_SECONDS = 0.1
"""A gap this long is no sender that waits for an answer, or reads its next file."""
_SHOWN = 6


class Case(NamedTuple):
    """How a cohort is pulled."""

    retrieve: str
    associations: int
    chunk_studies: int

    def __str__(self) -> str:
        what = self.retrieve.upper()
        return f"{what}, {self.associations} associations, chunks of {self.chunk_studies}"


def cases(associations: Sequence[int], methods: Sequence[str], chunks: Sequence[int]) -> list[Case]:
    """Every combination."""
    return [Case(m, n, size) for m in methods for n in associations for size in chunks]


def idle_shares(
    bench: Bench,
    orthanc: Orthanc,
    studies: list[Study],
    archive: Mapping[str, str],
    wanted: Sequence[Case],
) -> Iterator[Line]:
    """A line for each case: how long the wire was idle between first and last byte."""
    cohort = bench.cohort([s.study_instance_uid for s in studies], "paced")
    for case in wanted:
        wire = Wire(MB_PER_SECOND * 1e6)
        with placed(bench, orthanc, archive, wire, case) as site:
            done = bench.run("flow", site, cohort)
        if done["state"] != "Completed":
            raise RuntimeError(f"the flow ended {done['state']}")
        yield _line(wire, str(case), 2.0 if case.associations == 2 else None)


def idle_with_storescp(
    orthanc: Orthanc, studies: list[Study], receiver: StoreScp, associations: int
) -> Line:
    """What PACS and wire do by themselves: a request for each association, to storescp."""
    wire = Wire(MB_PER_SECOND * 1e6)
    with wire.to(receiver.port, answers=False) as port, ThreadPoolExecutor(associations) as pool:
        orthanc.know(receiver.ae_title, port)
        shares = [studies[first::associations] for first in range(associations)]
        list(pool.map(lambda share: orthanc.move_all(share, receiver.ae_title), shares))
    return _line(wire, f"movescu to storescp, a request for each of {associations}", None)


def _line(wire: Wire, what: str, target: float | None) -> Line:
    took, gaps = wire.gaps()
    idle = sum(seconds for _, seconds in gaps)
    long = sorted((gap for gap in gaps if gap[1] >= _LONG_SECONDS), key=lambda g: -g[1])
    detail = f"{took:.1f} s from first to last byte; {100 * sum(s for _, s in long) / took:.1f}"
    detail += f" % in {len(long)} gaps of {_LONG_SECONDS:g} s and more"
    if long:
        detail += ": " + ", ".join(f"{s:.2f} s at {at:.1f}" for at, s in long[:_SHOWN])
    answer, following = wire.waits()
    detail += f"; answers after {1000 * answer:.1f} ms, the next instance {1000 * following:.1f} ms"
    detail += " after that"
    work = f"idle PACS at {MB_PER_SECOND:g} MB/s, {what}"
    return Line(work, 100 * idle / took, target, False, " %", detail)


def whole_job(
    bench: Bench, orthanc: Orthanc, studies: list[Study], archive: Mapping[str, str], rounds: int
) -> Line:
    """Seconds from command to end, with the embedded default, in a home that was used before."""
    environment = {**bench.environment, "PREFECT_HOME": str(bench.folder / "embedded")}
    environment.pop("PREFECT_API_URL")
    cohort = bench.cohort([s.study_instance_uid for s in studies], "whole")
    size = sum(study.size_bytes for study in studies)
    seconds = []
    for _ in range(rounds + 1):
        wire = Wire(MB_PER_SECOND * 1e6)
        with placed(bench, orthanc, archive, wire, Case("c-move", 2, 20)) as site:
            began = time.perf_counter()
            done = subprocess.run(
                [str(Path(sys.executable).with_name("prefect-dicom")), "pull", str(cohort)]
                + ["--site", str(site)],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=600,
            )
            seconds.append(time.perf_counter() - began)
        if done.returncode:
            raise RuntimeError(f"pull failed: {done.stderr[-2000:]}")
    # The first one makes Prefect's database.
    seconds = sorted(seconds[1:])
    middle = seconds[len(seconds) // 2]
    detail = f"{size / 1e6:.0f} MB, {size / MB_PER_SECOND / 1e6:.1f} s of data; "
    detail += f"{seconds[0]:.1f} to {seconds[-1]:.1f} s"
    work = f"command to end, {len(studies)} studies, PACS at {MB_PER_SECOND:g} MB/s"
    return Line(work, middle, size / MB_PER_SECOND / 1e6 + 5, False, " s", detail)


@contextlib.contextmanager
def placed(
    bench: Bench, orthanc: Orthanc, archive: Mapping[str, str], wire: Wire, case: Case
) -> Iterator[Path]:
    """A new site at an Orthanc whose instances come over a wire."""
    with contextlib.ExitStack() as stack:
        port = orthanc.port
        if case.retrieve == "c-get":
            port = stack.enter_context(wire.to(port, answers=True))
        own = dict(archive)
        if "bucket" in own:
            own["prefix"] = f"paced-{bench._number + 1}"
        limits = {"associations": case.associations, "chunk_studies": case.chunk_studies}
        node = {"port": port, "called_ae_title": orthanc.ae_title, "limits": limits}
        site = bench.site({**node, "retrieve": case.retrieve}, own)
        receiver = load_site(site).receiver
        if case.retrieve == "c-move":
            port = stack.enter_context(wire.to(receiver.port, answers=False))
            orthanc.know(receiver.ae_title, port)
        try:
            yield site
        finally:
            lease = running_receiver(load_site(site))
            if lease is not None:
                lease.stop()
                lease.close()
            shutil.rmtree(site.parent / "spool", ignore_errors=True)
