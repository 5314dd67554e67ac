"""Hosts on a network of their own share a cohort, and one of them vanishes in the middle of it.

Each host is a network namespace with a Prefect worker, a receiver under an AE title of its own,
and a spool that no other host sees; they share a PostgreSQL server, which holds the ledger and
Prefect's own database, a Prefect server, a site file, and an archive. The PACS is in a namespace
too. A host that vanishes has its cable pulled and all its processes killed: nobody is told.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from prefect_dicom.core.model import CohortRow, Study, StudyState, Verdict
from prefect_dicom.ledger import Ledger
from prefect_dicom.testing import ScriptedPacs, tiny_instances
from tests.support import hosts, program
from tests.support.hosts import Network
from tests.support.postgres import Cluster, new_cluster
from tests.support.prefect_server import ROOT, PrefectServer
from tests.support.sites import Place, until

pytestmark = [
    pytest.mark.campaign("operations"),
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(hosts.lacking()), reason=hosts.lacking()),
]

STUDIES, INSTANCES = 200, 2
ASSOCIATIONS = 4
PORT = 11112
NOTICED_SECONDS = 60
"""After which the studies of a host that has vanished are another's, at the latest."""


@dataclass
class Site:
    """Two hosts, and what they share."""

    network: Network
    place: Place
    cluster: Cluster
    server: PrefectServer | None = None

    def environment(self, name: str) -> dict[str, str]:
        """What is of this host alone."""
        title = name.upper()
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        home = self.place.folder / f"home-{name}"
        home.mkdir(exist_ok=True)
        own = {
            "PREFECT_HOME": str(home),
            "PREFECT_DICOM_RECEIVER_AE_TITLE": title,
            "PREFECT_DICOM_RECEIVER_BIND": self.network.address(name),
            "PREFECT_DICOM_CALLING_AE_TITLE": title,
        }
        if self.server is not None:
            # Seen from the host, loopback is the host itself.
            own |= {k: v for k, v in self.server.environment.items() if k.startswith("PREFECT_")}
            own["PREFECT_HOME"] = str(home)
            del own["PREFECT_API_DATABASE_CONNECTION_URL"]
        return kept | own

    def start(self, name: str, *words: str | Path):
        """Start ``python words`` on a host, which sees its own disk as the spool."""
        spool = self.place.folder / "spool"
        disk = self.place.folder / f"disk-{name}"
        disk.mkdir(mode=0o700, exist_ok=True)
        return self.network.start(
            name,
            sys.executable,
            *words,
            environment=self.environment(name),
            log=self.log_file(name),
            disks={spool: disk},
            cwd=self.place.folder,
        )

    def log_file(self, name: str) -> Path:
        return self.place.folder / f"{name}.log"

    def spooled(self, name: str) -> list[Path]:
        disk = self.place.folder / f"disk-{name}"
        return [
            path
            for folder in ("incoming", "ready", "suspect", "quarantine")
            for path in (disk / folder).rglob("*")
            if path.is_file()
        ]


@contextlib.contextmanager
def site_of_two_hosts(folder: Path) -> Iterator[Site]:
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network("pacs", "one", "two"))
        cluster = new_cluster(network.here, network.range)
        stack.callback(cluster.stop)
        titles = {name.upper(): (network.address(name), PORT) for name in ("one", "two")}
        objects = tiny_instances(STUDIES, instances=INSTANCES)
        with network.on("pacs"):
            pacs = ScriptedPacs(
                instances=objects, host=network.address("pacs"), port=104, destinations=titles
            ).start()
        stack.callback(pacs.close)
        for name in ("archive", "spool"):
            (folder / name).mkdir(mode=0o700)
        url = f"postgresql+psycopg://postgres@{network.here}/{cluster.new_name()}"
        node = {
            "host": network.address("pacs"),
            "port": 104,
            "called_ae_title": pacs.ae_title,
            "limits": {"associations": ASSOCIATIONS, "chunk_studies": 5},
            "timeouts": {"settle_seconds": 0.4, "stall_seconds": 20},
        }
        document = {
            "nodes": {"pacs": node},
            "receiver": {"ae_title": "NOBODY", "port": PORT, "idle_seconds": 1},
            "archive": {"directory": "archive"},
            "ledger": {"url": url},
            "spool": {"path": str(folder / "spool"), "reserve_bytes": 0},
            "retry_after_seconds": [1, 2, 4, 8],
        }
        place = Place(folder, folder / "site.yaml", pacs)
        place.file.write_text(yaml.safe_dump(document))
        yield Site(network, place, cluster)


def archived(ledger: Ledger) -> int:
    return sum(study.state is StudyState.ARCHIVED for study in ledger.studies.of_cohort(1))


def is_done(site: Site, vanished_at: float, known: dict[str, bool]) -> None:
    """All is archived; nothing was sent again that was finished when the host vanished."""
    place, pacs = site.place, site.place.pacs
    assert place.totals().rows == {Verdict.ARCHIVED: STUDIES}
    place.audit()
    sent = Counter(s.sop_instance_uid for request in pacs.log for s in request.sent)
    assert len(sent) == STUDIES * INSTANCES
    of_study: dict[str, set[int]] = {}
    for request in pacs.log:
        for one in request.sent:
            times = of_study.setdefault(one.study_instance_uid, set())
            times.add(sent[one.sop_instance_uid])
    finished = {uid for uid, was_archived in known.items() if was_archived}
    assert all(of_study[uid] == {1} for uid in finished)
    again = [uid for uid, times in of_study.items() if times != {1}]
    # No more than the vanished host had under way: of its associations, a chunk each, and as
    # many that waited for their upload.
    assert len(again) <= 3 * ASSOCIATIONS * 5
    moves = pacs.requests("C-MOVE")
    assert {move.destination for move in moves} == {"ONE", "TWO"}
    assert all(move.destination == move.calling_ae_title for move in moves)
    print(
        f"{len(finished)} studies were archived when the host vanished; {len(again)} were sent"
        f" again; at most {pacs.most_associations({'ONE': vanished_at})} associations"
    )
    assert pacs.most_associations({"ONE": vanished_at}) <= ASSOCIATIONS


@pytest.mark.whole_campaign
@pytest.mark.parametrize("lot", range(5))
def test_two_prefect_workers_share_a_cohort_and_one_vanishes(tmp_path, seed, lot):
    after = random.Random(seed + lot).randint(10, STUDIES - 60)
    with site_of_two_hosts(tmp_path) as site, contextlib.ExitStack() as stack:
        network, place = site.network, site.place
        (tmp_path / "prefect").mkdir()
        database = f"postgresql+asyncpg://postgres@{network.here}/{site.cluster.new_name()}"
        server = PrefectServer(tmp_path / "prefect", network.here, database)
        site.server = stack.enter_context(server)
        server.run("work-pool", "create", "dicom", "--type", "process")
        entry = "prefect_dicom.flows.pull_cohort.pull_cohort"
        server.run("--no-prompt", "deploy", entry, "--name", "shared", "--pool", "dicom", cwd=ROOT)
        cohort = place.cohort()
        for name in ("one", "two"):
            worker = ("-m", "prefect", "worker", "start", "--pool", "dicom", "--limit", "1")
            site.start(name, *worker)
        parameters = {"cohort": str(cohort), "site": str(place.file)}
        runs = [server.begin("pull-cohort/shared", **parameters) for _ in range(2)]
        with Ledger.open(place.site.ledger.url.get_secret_value()) as ledger:
            until(lambda: ledger.cohorts.all(), "a run has begun", 400)
            until(lambda: _at_work(site) == {"ONE", "TWO"}, "both hosts receive", 400)
            until(lambda: archived(ledger) >= after, "some are archived", 400)
            network.cut("one")
            assert network.kill("one") > 1
            vanished_at, began = time.monotonic(), time.monotonic()
            known = {
                s.study.study_instance_uid: s.state is StudyState.ARCHIVED
                for s in ledger.studies.of_cohort(1)
            }
            states = {server.flow_run(run)["state_type"] for run in runs}
            assert states == {"RUNNING"}
            until(lambda: len(ledger.runs.under_way(1)) == 1, "it is noticed", NOTICED_SECONDS)
            print(f"noticed after {time.monotonic() - began:.1f} s")

        def ends() -> list[str]:
            return [server.flow_run(run)["state_type"] for run in runs]

        until(lambda: "COMPLETED" in ends(), "the other run has ended", 400)
        print(f"all archived {time.monotonic() - began:.1f} s after the host vanished")
        is_done(site, vanished_at, known)
        comes_back(site)


def _at_work(site: Site) -> set[str]:
    return {move.destination for move in site.place.pacs.requests("C-MOVE")}


def comes_back(site: Site) -> None:
    """The host runs again: nothing of what it had is missed or used, and nothing is asked for."""
    place = site.place
    asked = place.asked_for()
    site.network.mend("one")
    run = site.start("one", *program("sites")[1:], place.file, place.cohort())
    assert run.wait(120) == 0, site.log_file("one").read_text()[-3000:]
    assert place.asked_for() == asked
    assert site.spooled("one") == site.spooled("two") == []


_IN_THE_MIDDLE_OF_A_WRITE = """
import sys, time
from prefect_dicom.ledger import Ledger
from prefect_dicom.ledger.schema import studies
with Ledger.open(sys.argv[1]) as ledger, ledger.runs.begin("pull", 1) as run:
    assert ledger.claims.acquire(run, [1, 2])
    with ledger._database.write() as connection:
        ledger._database.lock_studies(connection, studies.c.reference == 1)
        print("locked", flush=True)
        time.sleep(600)
"""


@pytest.mark.whole_campaign
def test_what_a_vanished_host_had_locked_in_the_middle_of_a_write_is_free_again(tmp_path):
    with Network("one") as network, contextlib.ExitStack() as stack:
        cluster = new_cluster(network.here, network.range)
        stack.callback(cluster.stop)
        url = f"postgresql+psycopg://postgres@{network.here}/{cluster.new_name()}"
        log = tmp_path / "one.log"
        with Ledger.open(url) as ledger:
            ledger.cohorts.add("d" * 64, "main", [CohortRow(2)])
            ledger.rows.record_discoveries(1, [(2, [Study("1.2.1"), Study("1.2.2")])])
            words = (sys.executable, "-c", _IN_THE_MIDDLE_OF_A_WRITE, url)
            network.start("one", *words, environment=os.environ, log=log)
            until(lambda: "locked" in log.read_text(), "the study is locked", 120)
            network.cut("one")
            network.kill("one")
            began = time.monotonic()
            with ledger.runs.begin("pull", 1) as run:
                # It waits for the lock, and then finds the run dead.
                until(
                    lambda: len(ledger.claims.acquire(run, [1, 2])) == 2,
                    "it is free",
                    NOTICED_SECONDS,
                )
            print(f"free after {time.monotonic() - began:.1f} s")
