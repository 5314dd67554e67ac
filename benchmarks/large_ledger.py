"""A ledger of a million studies in PostgreSQL, and what its verbs take there.

``python -m benchmarks.large_ledger --studies 1000000``: starts a server of its own, writes the
rows directly (half of the studies archived, one in a hundred failed, a few claimed), and prints
the time of each verb that runs, reports and people use, with the bytes of each table.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sqlalchemy import create_engine, text

from prefect_dicom.archive.manifest import encode_manifest
from prefect_dicom.core.model import (
    ArchivedInstance,
    CohortRow,
    Evidence,
    Instance,
    InstanceKey,
    ManifestInstance,
    ReceivedInstance,
    Study,
    StudyManifest,
)
from prefect_dicom.core.uids import object_key
from prefect_dicom.ledger import Ledger, Run
from tests.support.postgres import Cluster, new_cluster

_FAILED_OF = 100
_CLAIMED = 40

# Each study has two rows of the cohort in one case of ten, as where a list names accession
# numbers and patients.
_FILL = """
INSERT INTO cohort_rows (cohort, line, accession_number, discovered)
  SELECT 1, n + 1, 'A' || n, TRUE FROM generate_series(1, :n) n;
INSERT INTO studies (reference, study_instance_uid, node, patient_id, accession_number, study_date,
    modalities, study_description, number_of_series, number_of_instances, state, reason, attempt,
    evidence, listed_at, archived_at, archived_instances, withheld_instances, missing_instances,
    archived_bytes, selection)
  SELECT n, '2.25.' || (10^30)::numeric(38) + n, 'main', lpad((n / 3)::text, 8, '0'), 'A' || n,
    '20240101', '["CT"]', 'CT of the chest', 4, 400,
    CASE WHEN n % :failed = 0 THEN 'failed' WHEN n <= :n / 2 THEN 'archived' ELSE 'pending' END,
    CASE WHEN n % :failed = 0 THEN 'instances-missing' END, 1,
    CASE WHEN n % :failed <> 0 AND n <= :n / 2 THEN 'instance-list' END,
    CASE WHEN n % :failed <> 0 AND n <= :n / 2 THEN now() END,
    CASE WHEN n % :failed <> 0 AND n <= :n / 2 THEN now() END,
    CASE WHEN n % :failed <> 0 AND n <= :n / 2 THEN 400 END,
    CASE WHEN n % :failed <> 0 AND n <= :n / 2 THEN 0 END,
    CASE WHEN n % :failed <> 0 AND n <= :n / 2 THEN 0 END,
    CASE WHEN n % :failed <> 0 AND n <= :n / 2 THEN 200000000 END,
    CASE WHEN n % :failed <> 0 AND n <= :n / 2 THEN '' END
  FROM generate_series(1, :n) n;
SELECT setval(pg_get_serial_sequence('studies', 'reference'), :n);
INSERT INTO row_studies (cohort, line, study) SELECT 1, n + 1, n FROM generate_series(1, :n) n;
INSERT INTO row_studies (cohort, line, study)
  SELECT 1, n + 1, n - 1 FROM generate_series(10, :n, 10) n;
UPDATE cohorts SET rows = :n;
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large_ledger", description=__doc__)
    parser.add_argument("--studies", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cluster = new_cluster()
    url = cluster.new_database()
    with Ledger.open(url) as ledger:
        ledger.cohorts.add("d" * 64, "main", [CohortRow(1)], "large")
        fill(url, options.studies)
        measure(ledger, options.studies, options.rounds, partial(server_seconds, cluster))
    for instances in (10, 100, 1000):
        body = manifest_of(instances)
        print(
            f"| manifest of {instances} instances | {len(body):,} bytes in the archive,"
            f" {len(zlib.compress(body)):,} in the ledger |"
        )
    for table, size in sizes(url):
        print(f"| table {table} | {size / options.studies:,.0f} bytes a study |")
    return 0


def manifest_of(instances: int) -> bytes:
    """A manifest with UIDs and hashes as they are: random, and all alike at their beginnings."""
    lot = random.Random(1)
    series = [f"1.2.840.113619.2.{lot.randrange(10**20)}" for _ in range(4)]
    named = []
    for number in range(instances):
        key = InstanceKey(series[number % 4], f"1.2.840.113619.2.{lot.randrange(10**24)}")
        named.append(
            ManifestInstance(
                *key,
                "1.2.840.10008.5.1.4.1.1.2",
                "1.2.840.10008.1.2.1",
                object_key("1.2.840.113619.2.1", *key),
                lot.randrange(500_000, 530_000),
                lot.randbytes(32).hex(),
                None,
                (),
            )
        )
    manifest = StudyManifest(
        "1.2.840.113619.2.1",
        "main",
        Evidence.INSTANCE_LIST,
        "2026-01-01T00:00:00+00:00",
        tuple(sorted(named, key=lambda one: (one.series_instance_uid, one.sop_instance_uid))),
        (),
        (),
    )
    return encode_manifest(manifest)


def fill(url: str, studies: int) -> None:
    """Write the rows."""
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in filter(str.strip, _FILL.split(";")):
            connection.execute(text(statement), {"n": studies, "failed": _FAILED_OF})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    engine.dispose()


def sizes(url: str) -> list[tuple[str, int]]:
    """The bytes of each table, with its indexes."""
    engine = create_engine(url)
    with engine.connect() as connection:
        found = connection.execute(
            text(
                "SELECT relname, pg_total_relation_size(oid) FROM pg_class"
                " WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
                " AND reltuples > 1000 ORDER BY 2 DESC"
            )
        ).all()
    engine.dispose()
    return [(name, size) for name, size in found]


def _live(ledger: Ledger, run: Run, number: int, instances: int) -> None:
    """All that the ledger is told of a study that is pulled by itself."""
    first = 1 + 100_000_000 + 1000 * instances + number
    study = Study(f"2.25.{first}", number_of_instances=instances)
    ledger.rows.record_discoveries(1, [(1, [study])])
    reference = ledger.studies.find(study.study_instance_uid).reference
    (claim,) = ledger.claims.acquire(run, [reference])
    keys = [InstanceKey("1.2.3", f"1.2.3.{n}") for n in range(instances)]
    ct, explicit, digest = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1", "ab" * 32
    ledger.instances.record_list(claim, [Instance(key, ct) for key in keys], Evidence.INSTANCE_LIST)
    arrivals = [ReceivedInstance(reference, key, ct, explicit, digest, 1, digest) for key in keys]
    ledger.instances.record_received({reference: claim}, arrivals)
    for part in range(0, instances, 200):
        stored = [(key, ArchivedInstance("k", digest, 1), ()) for key in keys[part : part + 200]]
        ledger.instances.record_stored(claim, stored)
    ledger.instances.of_study(reference)
    body = manifest_of(instances)
    ledger.studies.record_archived(
        claim, body, instances=instances, withheld=0, size_bytes=instances
    )


def server_seconds(cluster: Cluster) -> float:
    """The processor time that the server's processes have used."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == cluster.process.pid:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(ledger: Ledger, studies: int, rounds: int, of_server: Callable[[], float]) -> None:
    """Time the verbs: means of some rounds, each somewhere else in the cohort."""
    middle = studies // 2
    print("| verb | ms | ms of processor here | in the server |\n|---|---|---|---|")

    def timed(name: str, verb: Callable[[int], Any], times: int = rounds) -> None:
        began, here, there = time.perf_counter(), time.process_time(), of_server()
        for number in range(times):
            verb(number)
        used = (
            time.perf_counter() - began,
            time.process_time() - here,
            of_server() - there,
        )
        print(
            f"| {name} | " + " | ".join(f"{1000 * one / times:,.1f}" for one in used) + " |",
            flush=True,
        )

    with ledger.runs.begin("pull", 1) as run, ledger.runs.begin("other", 1) as other:
        held = ledger.claims.acquire(other, range(middle + 1, middle + 1 + _CLAIMED))
        first = middle + 1000

        def chunk(number: int) -> range:
            return range(first + 25 * number, first + 25 * number + 20)

        timed("studies_to_pull, the first page", lambda _: ledger.studies.to_pull(1, 0, 500))
        timed("studies_to_pull, a page behind", lambda n: ledger.studies.to_pull(1, first, 500))
        timed("unfinished, a chunk of 20", lambda n: ledger.studies.unfinished(chunk(n), ""))
        claims = {}
        timed(
            "claim, a chunk of 20",
            lambda n: claims.update({n: ledger.claims.acquire(run, chunk(n), "")}),
        )
        keys = [InstanceKey("1.2.3", f"1.2.3.{n}") for n in range(400)]
        lists = [Instance(key, "1.2.840.10008.5.1.4.1.1.2") for key in keys]
        timed(
            "record_lists, 20 studies of 400",
            lambda n: ledger.instances.record_lists(
                [(claim, lists, Evidence.INSTANCE_LIST) for claim in claims[n]], selection=""
            ),
        )
        for size in (1, 100, 400):
            name = f"a study of {size}, from its row to archived"
            timed(name, lambda n, size=size: _live(ledger, run, n, size), 4 * rounds)
        timed("live_claims", lambda _: ledger.claims.live())
        timed("runs_under_way", lambda _: ledger.runs.under_way(1))
        timed("requested state", lambda _: ledger.run_control.requested_state(run))
        timed("release, a chunk of 20", lambda n: ledger.claims.release(claims[n]))
        timed("rows_to_discover, none left", lambda _: ledger.rows.to_discover(1))
        timed("sample", lambda _: ledger.progress.record_sample(1, run))
        timed("totals (status, progress)", lambda _: ledger.progress.totals(1), 1)
        timed(
            "all rows with verdicts (results.csv)",
            lambda _: deque(ledger.rows.with_verdicts(1), 0),
            1,
        )
        timed("all studies", lambda _: deque(ledger.studies.of_cohort(1), 0), 1)
        timed("reopen what failed", lambda _: ledger.cohorts.reopen(1), 1)
        ledger.claims.release(held)


if __name__ == "__main__":
    sys.exit(main())
