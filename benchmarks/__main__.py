"""Measure everything against its neighbours in one run and print one table: ``make bench``."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from benchmarks.cohorts import (
    cohort_of_tiny_studies,
    discovery,
    large_object_peaks,
    many_associations_peak,
    register_and_report,
)
from benchmarks.corpus import Study, ct_studies, small_studies
from benchmarks.dead_time import cases, idle_shares, idle_with_storescp, whole_job
from benchmarks.distance import at_a_distance
from benchmarks.jobs import Bench, flow_and_stages, flow_seconds, three_steps
from benchmarks.pipelining import Manner, sending_rates
from benchmarks.receivers import OurReceiver, PlainPynetdicom, StoreScp
from benchmarks.receiving import getting_rates, receiving_rates
from benchmarks.sender import Orthanc
from benchmarks.start_up import start_up
from benchmarks.table import HEAD, Line, ratio
from benchmarks.web import web_and_get
from tests.support.certificates import Authority
from tests.support.radosgw import missing_programs, radosgw
from tests.support.web import dicomweb_plugin

PARTS = (
    "receive",
    "tls",
    "nagle",
    "get",
    "web",
    "pipelining",
    "jobs",
    "dead-time",
    "cohort",
    "discover",
    "memory",
    "start-up",
)
_CONTEXTS = {
    "CT": (str(CTImageStorage), str(ExplicitVRLittleEndian)),
    "10 KB": (str(SecondaryCaptureImageStorage), str(ExplicitVRLittleEndian)),
}
_PEAK_MB = 300
_STARTS = 3
# By milliseconds of a round trip and kind of object.
_PIPELINING = {
    (0, "CT"): 1.0,
    (0, "10 KB"): 1.3,
    (5, "CT"): 5.0,
    (5, "10 KB"): 20.0,
    (20, "CT"): 12.0,
    (20, "10 KB"): 60.0,
}
_FAR_SECONDS = 0.1


def main() -> int:
    """Print each line of the table as soon as it is measured."""
    options = _options()
    began = time.monotonic()
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for line in measured(Path(folder), options):
            print(line, flush=True)
    print(f"\n{time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.1f} at the end")
    return 0


def measured(folder: Path, options: argparse.Namespace) -> Iterator[Line]:
    """The lines of the table."""
    parts = options.only or PARTS
    if {"receive", "nagle", "get", "web"} & set(parts):
        yield from _transfers(folder / "transfers", options, parts)
    if "pipelining" in parts:
        yield from _pipelining(folder / "pipelining", options)
    if "tls" in parts:
        yield from _over_tls(folder / "tls", options)
    if "start-up" in parts:
        yield from start_up(folder / "start-up", min(options.rounds, _STARTS))
    if {"jobs", "dead-time", "cohort", "discover", "memory"} & set(parts):
        with Bench.opened(folder / "jobs") as bench:
            if "jobs" in parts:
                yield from _jobs(folder / "whole", bench, options)
            if "dead-time" in parts:
                yield from _dead_time(folder / "paced", bench, options)
            if "cohort" in parts:
                yield from _cohort(bench, options)
            if "discover" in parts:
                yield from _discovery(bench, options)
            if "memory" in parts:
                yield from _memory(folder / "memory", bench, options)


def _transfers(folder: Path, options: argparse.Namespace, parts: tuple[str, ...]) -> Iterator[Line]:
    (ct,) = ct_studies(folder, 1, options.ct)
    (small,) = small_studies(folder, 1, options.small)
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(OurReceiver(folder / "ours"))
        counting = stack.enter_context(OurReceiver(folder / "counting", metrics=True))
        best = stack.enter_context(StoreScp(folder / "best", best=True))
        installed = stack.enter_context(StoreScp(folder / "installed", best=False))
        plain = stack.enter_context(PlainPynetdicom(folder / "pynetdicom"))
        known = {r.ae_title: r.port for r in (ours, counting, best, installed, plain)}
        with Orthanc(
            folder / "orthanc", no_delay=True, destinations=known, web="web" in parts
        ) as orthanc:
            orthanc.hold([ct, small])
            for name, study in (("CT", ct), ("10 KB", small)):
                if "receive" in parts:
                    work = [(receiver, study) for receiver in (ours, counting, best, plain)]
                    rates = receiving_rates(orthanc, work, options.rounds)
                    what = f"receive + SHA-256, {name}, over"
                    one = rates[ours.name]
                    yield ratio(f"{what} storescp at its best", one, rates[best.name], 1.0, "/s")
                    yield ratio(f"{what} plain pynetdicom", one, rates[plain.name], None, "/s")
                    yield ratio(
                        f"receive with metrics, {name}, over without",
                        rates[counting.name],
                        one,
                        0.95,
                        "/s",
                    )
                if "get" in parts:
                    rates = getting_rates(orthanc, study, folder, _CONTEXTS[name], options.rounds)
                    what = f"C-GET + SHA-256, {name}, over getscu at its best"
                    yield ratio(what, *rates.values(), 0.9, "/s")
                if "web" in parts and dicomweb_plugin() is not None:
                    web, get = web_and_get(orthanc, study, folder, _CONTEXTS[name], options.rounds)
                    what = f"WADO-RS + SHA-256, {name}, over C-GET"
                    yield ratio(what, web.rates, get.rates, None, "/s")
                    what = f"WADO-RS, {name}, CPU seconds for a GB, over C-GET"
                    yield ratio(what, web.cpu_per_gb, get.cpu_per_gb, None, "s")
        if "nagle" not in parts:
            return
        few = {
            "CT": (*ct_studies(folder / "few", 1, max(options.ct // 10, 1)), 30),
            "10 KB": (*small_studies(folder / "few", 1, max(options.small // 50, 1)), 80),
        }
        with Orthanc(folder / "nagle", no_delay=False, destinations=known) as orthanc:
            for name, many in (("CT", ct), ("10 KB", small)):
                study, target = few[name]
                # First the few, for the receiver that takes a tenth of a second for each.
                orthanc.hold([study])
                theirs = receiving_rates(orthanc, [(installed, study)], 1)[installed.name]
                orthanc.hold([many])
                one = receiving_rates(orthanc, [(ours, many)], 1)[ours.name]
                what = f"receive + SHA-256, {name}, peer as installed, over storescp as installed"
                yield ratio(what, one, theirs, target, "/s")


def _pipelining(folder: Path, options: argparse.Namespace) -> Iterator[Line]:
    """One sender to both receivers: whether it waits for responses is up to what it is granted."""
    few = max(options.ct // 10, 1), max(options.small // 20, 1)
    kinds = {
        "CT": (*ct_studies(folder, 1, options.ct), *ct_studies(folder / "few", 1, few[0])),
        "10 KB": (
            *small_studies(folder, 1, options.small),
            *small_studies(folder / "few", 1, few[1]),
        ),
    }
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(OurReceiver(folder / "ours"))
        best = stack.enter_context(StoreScp(folder / "best", best=True))
        for milliseconds, associations, pipelines, name in itertools.product(
            (0, 5, 20), (1, 4), (True, False), kinds
        ):
            manner = Manner(milliseconds / 1000, associations, pipelines)
            many, few_study = kinds[name]
            # Who waits for each response takes as long for a few as the other for many.
            alike = not milliseconds
            work = [
                (ours, many if pipelines or alike else few_study),
                (best, many if alike else few_study),
            ]
            rates = sending_rates(work, manner, min(options.rounds, 5))
            sender = "pipelining sender" if pipelines else "sender that waits"
            wide = "one association" if associations == 1 else f"{associations} associations"
            what = f"{name} from a {sender}, {milliseconds} ms, {wide}, over storescp at its best"
            goal = (
                _PIPELINING.get((milliseconds, name)) if pipelines and associations == 1 else None
            )
            yield ratio(what, rates[ours.name], rates[best.name], goal, "/s")


def _over_tls(folder: Path, options: argparse.Namespace) -> Iterator[Line]:
    """Receiving over mutual TLS 1.3, beside plain DICOM and beside DCMTK."""
    (ct,) = ct_studies(folder, 1, options.ct)
    (small,) = small_studies(folder, 1, options.small)
    authority = Authority(folder / "authority")
    tls = authority.tls(authority.issue("benchmark"))
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(OurReceiver(folder / "plain"))
        ours = stack.enter_context(OurReceiver(folder / "ours", tls=tls))
        best = stack.enter_context(StoreScp(folder / "best", best=True, tls=tls))
        secured = {ours.ae_title: ours.port, best.ae_title: best.port}
        known = {plain.ae_title: plain.port}
        with Orthanc(
            folder / "orthanc", no_delay=True, destinations=known, tls=tls, over_tls=secured
        ) as orthanc:
            orthanc.hold([ct, small])
            for name, study in (("CT", ct), ("10 KB", small)):
                work = [(receiver, study) for receiver in (ours, plain, best)]
                rates = receiving_rates(orthanc, work, options.rounds)
                what = f"receive + SHA-256 over TLS, {name}, over"
                one = rates[ours.name]
                yield ratio(f"{what} storescp with TLS at its best", one, rates[best.name], 1, "/s")
                yield ratio(f"{what} plain DICOM", one, rates[plain.name], None, "/s")


def _jobs(folder: Path, bench: Bench, options: argparse.Namespace) -> Iterator[Line]:
    studies = ct_studies(folder, options.job_studies, 8)
    size = sum(study.size_bytes for study in studies) // 10**6
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(_archive(folder, bench, options))
        where = "radosgw" if "bucket" in archive else "a directory"
        about = f"{size} MB of CT into {where}"
        nobody = bench.site({"port": 1, "called_ae_title": "NOBODY"}, {"directory": "archive"})
        bench.run("idle", nobody, bench.cohort(["1.2.3"], "one"))
        idle = bench.run("idle", nobody, bench.cohort(["1.2.3"], "one"))["seconds"]
        with Orthanc(folder / "orthanc", no_delay=True) as orthanc:
            orthanc.hold(studies)
            whole, slowest, both = flow_and_stages(
                bench, orthanc, studies, archive, options.job_rounds
            )
            net = [seconds - idle for seconds in whole]
            line = ratio("whole job over its slowest stage alone", net, slowest, None, "s")
            together = median(net) / median(both)
            detail = f"{about}; {line.detail}; {together:.2f} of both stages together; "
            detail += f"less {idle:.1f} s for the start of any flow"
            yield Line(line.work, line.value, 1.15, False, detail=detail)
            if "bucket" in archive:
                yield _far_away(bench, orthanc, studies, archive, idle, options.job_rounds)
            steps = three_steps(orthanc, studies, folder / "best", archive, best=True)
            yield _over_steps("three steps at their best", median(whole), steps)
        with Orthanc(folder / "nagle", no_delay=False) as orthanc:
            orthanc.hold(studies)
            seconds = flow_seconds(bench, orthanc, studies, archive)
            steps = three_steps(orthanc, studies, folder / "installed", archive, best=False)
            yield _over_steps("three steps, peer and getscu as installed", seconds, steps)


@contextlib.contextmanager
def _archive(folder: Path, bench: Bench, options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Keys of a site's archive: a bucket of a radosgw of its own, where there can be one."""
    if options.directory_archive or missing_programs():
        yield {"directory": "archive"}
        return
    with radosgw(folder / "radosgw") as gateway:
        keys = {"AWS_ACCESS_KEY_ID": gateway.access_key}
        keys["AWS_SECRET_ACCESS_KEY"] = gateway.secret_key
        os.environ.update(keys)
        bench.environment.update(keys)
        yield {"bucket": gateway.bucket, "endpoint": gateway.endpoint, "region": "us-east-1"}


def _dead_time(folder: Path, bench: Bench, options: argparse.Namespace) -> Iterator[Line]:
    studies = ct_studies(folder, options.paced_studies, 12)
    wanted = cases(options.paced_associations, options.paced_methods, options.paced_chunks)
    with (
        _archive(folder, bench, options) as archive,
        Orthanc(folder / "orthanc", no_delay=True) as orthanc,
    ):
        orthanc.hold(studies)
        if "c-move" in options.paced_methods:
            for n in options.paced_associations:
                with StoreScp(folder / f"storescp-{n}", best=True) as receiver:
                    yield idle_with_storescp(orthanc, studies, receiver, n)
        yield from idle_shares(bench, orthanc, studies, archive, wanted)
        if options.paced_rounds:
            yield whole_job(bench, orthanc, studies, archive, options.paced_rounds)


def _far_away(
    bench: Bench,
    orthanc: Orthanc,
    studies: list[Study],
    archive: dict[str, str],
    idle: float,
    rounds: int,
) -> Line:
    near = urlsplit(archive["endpoint"])
    with at_a_distance(near.port, _FAR_SECONDS) as port:
        far = {**archive, "endpoint": f"http://{near.hostname}:{port}"}
        whole, slowest, both = flow_and_stages(bench, orthanc, studies, far, rounds)
    net = [seconds - idle for seconds in whole]
    line = ratio("", net, slowest, None, "s")
    together = median(net) / median(both)
    what = f"whole job over its slowest stage, the store {1000 * _FAR_SECONDS:.0f} ms away"
    detail = f"{line.detail}; {together:.2f} of both stages together; less {idle:.1f} s likewise"
    return Line(what, line.value, 1.15, False, detail=detail)


def _over_steps(name: str, whole: float, steps: dict[str, float]) -> Line:
    detail = f"{whole:.1f} s to " + " + ".join(f"{k} {v:.1f} s" for k, v in steps.items())
    return Line(f"whole job over the {name}", whole / sum(steps.values()), 0.4, False, "", detail)


def _cohort(bench: Bench, options: argparse.Namespace) -> Iterator[Line]:
    n = options.studies
    found = cohort_of_tiny_studies(bench, n)
    detail = f"{n:,} studies; {1000 * found['ledger'] / n:.1f} ms of CPU in the ledger, "
    detail += f"{1000 * found['prefect'] / n:.1f} ms for a flow whose steps do nothing; "
    detail += f"with the PACS's and all else {1000 * found['first'] / n:.0f} ms"
    cost = 1000 * (found["ledger"] + found["prefect"]) / n
    yield Line("ledger + Prefect per study", cost, 10, False, " ms", detail)
    detail = f"{n:,} studies; {found['retrieves']} retrieves, {found['queries']} queries, "
    detail += f"{found['puts']} puts"
    yield Line("rerun of a finished cohort", found["again"], 30, False, " s", detail)
    yield _peak(f"a cohort of {n:,} studies", found["peak_bytes"], "")


def _discovery(bench: Bench, options: argparse.Namespace) -> Iterator[Line]:
    n = options.discovered
    for keyword, associations, how in (
        ("AccessionNumber", 1, "a query a row, one association"),
        ("AccessionNumber", 4, "a query a row, 4 associations"),
        ("StudyInstanceUID", 4, "lists of UIDs, 4 associations"),
    ):
        found = discovery(bench, n, keyword, associations)
        early, late = found["early_bytes"] / 1e6, found["late_bytes"] / 1e6
        detail = f"{n:,} rows, {found['queries']:,} queries; "
        detail += f"{1000 * found['cpu_seconds'] / n:.2g} ms of CPU a row; "
        detail += f"{early:.0f} MB after a tenth of the rows, {late:.0f} MB at the end"
        yield Line(f"discovery, {how}", found["rows_per_second"], unit=" rows/s", detail=detail)


def _memory(folder: Path, bench: Bench, options: argparse.Namespace) -> Iterator[Line]:
    folder.mkdir()
    large = large_object_peaks(bench, folder, options.large)
    detail = f"receiver {large['receiver_peak_bytes'] / 1e6:.0f} MB; {large['seconds']:.1f} s"
    yield _peak(f"one object of {options.large:,} MB", large["peak_bytes"], detail)
    studies: list[Study] = ct_studies(folder, 8, max(options.ct // 20, 1))
    peak = many_associations_peak(folder / "many", studies)
    yield _peak("8 associations at a time (the receiver)", peak, "")
    rows = register_and_report(bench, options.rows)
    detail = f"registered and reported in {rows['seconds']:.1f} s"
    yield _peak(f"a cohort file of {options.rows:,} rows", rows["peak_bytes"], detail)


def _peak(work: str, size_bytes: float, detail: str) -> Line:
    return Line(f"peak memory, {work}", size_bytes / 1e6, _PEAK_MB, False, " MB", detail)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    parser.add_argument("--folder", default=shm, help="where all files go; tmpfs if there is one")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts alone")
    parser.add_argument("--rounds", type=int, default=7, help="of receiving and C-GET")
    parser.add_argument("--ct", type=int, default=400, help="CT images in one transfer")
    parser.add_argument("--small", type=int, default=2000, help="10 KB objects in one transfer")
    parser.add_argument("--job-studies", type=int, default=60, help="studies of 8 CT in a job")
    parser.add_argument("--job-rounds", type=int, default=3)
    parser.add_argument("--paced-studies", type=int, default=60, help="studies of 12 CT at 15 MB/s")
    parser.add_argument("--paced-associations", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--paced-chunks", type=int, nargs="+", default=[5, 20])
    methods = ["c-move", "c-get"]
    parser.add_argument("--paced-methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--paced-rounds", type=int, default=3, help="of the whole command")
    parser.add_argument("--directory-archive", action="store_true", help="no radosgw")
    parser.add_argument("--studies", type=int, default=2000, help="of one tiny object in a cohort")
    parser.add_argument("--discovered", type=int, default=10_000, help="rows of a dry run")
    parser.add_argument("--large", type=int, default=2000, help="MB of the large object")
    parser.add_argument("--rows", type=int, default=100_000, help="of the cohort only registered")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
