"""Large cohorts: what a study costs beside its transfer, what a rerun costs, and memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.corpus import Study, multi_frame
from benchmarks.job import peak_bytes
from benchmarks.jobs import Bench
from benchmarks.receivers import OurReceiver
from benchmarks.sender import timed
from prefect_dicom.config.site import load_site
from prefect_dicom.testing import ScriptedPacs, tiny_instances

_DIRECTORY = {"directory": "archive"}


def cohort_of_tiny_studies(bench: Bench, studies: int) -> dict[str, float]:
    """Pull a cohort of one tiny object a study, then run it again.

    Returns
    -------
    dict
        Seconds: ``first`` and ``again`` of both flows, ``ledger`` of the first one's threads in
        the ledger, ``prefect`` of a flow whose steps do nothing. Counts of the second:
        ``retrieves``, ``queries`` and ``puts``.
    """
    with ScriptedPacs(instances=tiny_instances(studies)) as pacs:
        site = _site(bench, pacs)
        cohort = bench.cohort(pacs.holdings.study_instance_uids(), f"tiny-{studies}")
        first = bench.run("flow", site, cohort)
        if first["state"] != "Completed":
            raise RuntimeError(f"the cohort ended {first['state']}")
        asked = len(pacs.log)
        before = _archived(site)
        again = bench.run("flow", site, cohort)
        later = pacs.log[asked:]
        idle = bench.run("idle", _site(bench, pacs), cohort)
    return {
        "first": first["seconds"],
        "again": again["seconds"],
        "ledger": first["ledger_seconds"],
        "prefect": idle["seconds"],
        "retrieves": sum(request.service != "C-FIND" for request in later),
        "queries": sum(request.service == "C-FIND" for request in later),
        "puts": len(_archived(site) ^ before),
        "peak_bytes": max(first["peak_bytes"], first["receiver_peak_bytes"]),
    }


def large_object_peaks(bench: Bench, folder: Path, megabytes: int) -> dict[str, float]:
    """Pull one object of this size; seconds, and the peaks of job and receiver in bytes."""
    with ScriptedPacs(instances=[multi_frame(folder, megabytes)]) as pacs:
        site = _site(bench, pacs)
        cohort = bench.cohort(pacs.holdings.study_instance_uids(), f"large-{megabytes}")
        result = bench.run("flow", site, cohort)
    if result["state"] != "Completed":
        raise RuntimeError(f"the large object ended {result['state']}")
    return result


def many_associations_peak(folder: Path, studies: list[Study]) -> int:
    """The receiver's peak in bytes while each study comes over an association of its own."""
    with OurReceiver(folder) as receiver, receiver.expecting(*studies):
        command = ["storescu", "-aet", "SENDER", "-aec", receiver.ae_title, "-pdu", "131072"]
        command += ["+sd", "127.0.0.1", str(receiver.port)]
        with ThreadPoolExecutor(len(studies)) as pool:
            list(pool.map(lambda study: timed([*command, str(study.files[0].parent)]), studies))
        peak = peak_bytes(receiver.pid)
        if receiver.emptied(*studies) != sum(len(study.files) for study in studies):
            raise RuntimeError("objects are missing")
    return peak


def register_and_report(bench: Bench, rows: int) -> dict[str, float]:
    """Seconds and peak of registering a cohort of so many rows and reporting on it."""
    site = bench.site({"port": 1, "called_ae_title": "NOBODY"}, _DIRECTORY)
    cohort = bench.cohort((f"2.25.{10**30 + number}" for number in range(rows)), f"rows-{rows}")
    return bench.run("report", site, cohort)


def discovery(bench: Bench, rows: int, keyword: str, associations: int) -> dict[str, float]:
    """Find the studies of a cohort that names them by this key; nothing is retrieved.

    Returns
    -------
    dict
        ``rows_per_second`` and ``queries``; memory after the first tenth of the rows
        (``early_bytes``), at the end (``late_bytes``), and its peak (``peak_bytes``).
    """
    with ScriptedPacs(instances=tiny_instances(rows)) as pacs:
        node = {"port": pacs.port, "called_ae_title": pacs.ae_title}
        site = bench.site(node | {"limits": {"associations": associations}}, _DIRECTORY)
        keys = (stored.attributes[keyword] for stored in pacs.holdings)
        cohort = bench.cohort(keys, f"discover-{keyword}-{rows}-{associations}", keyword)
        found = bench.run("discover", site, cohort)
        queries = len(pacs.requests("C-FIND"))
    if found["studies"] != rows:
        raise RuntimeError(f"{found['studies']} of {rows} studies were found")
    return found | {"queries": queries, "rows_per_second": rows / found["seconds"]}


def _site(bench: Bench, pacs: ScriptedPacs) -> Path:
    site = bench.site({"port": pacs.port, "called_ae_title": pacs.ae_title}, _DIRECTORY)
    receiver = load_site(site).receiver
    pacs.destinations[receiver.ae_title] = ("127.0.0.1", receiver.port)
    return site


def _archived(site: Path) -> set[tuple[str, int]]:
    folder = load_site(site).archive.directory
    return {(str(p), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}
