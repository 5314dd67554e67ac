"""A whole site around a PACS to test against: short waits, and ports and AE titles of its own.

As a program it is a run that can be killed: ``python sites.py SITE COHORT``.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from prefect_dicom.archive import open_archive
from prefect_dicom.archive.manifest import decode_manifest
from prefect_dicom.cohort.list_options import NO_CHOICES, ListOptions
from prefect_dicom.config.site import Site, ledger_url, load_site
from prefect_dicom.config.tls import Tls
from prefect_dicom.core.clock import Clock
from prefect_dicom.core.model import RowVerdict, StudyManifest, StudyState, Verdict
from prefect_dicom.core.uids import manifest_key, object_key
from prefect_dicom.ledger import Ledger, StudyRecord, Totals
from prefect_dicom.network.storage_scp import ReceiverLease, running_receiver
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import Run, open_run
from prefect_dicom.testing import Behaviour, PacsPolicy, ScriptedPacs, tiny_instances
from prefect_dicom.testing.instances import StoredInstance, decoded, encoded, instance_of_bytes
from prefect_dicom.testing.sending import StoreAssociation, context_key
from tests.support import program
from tests.support.peers import free_port
from tests.support.s3_server import S3Server

LOOPBACK = "127.0.0.1"
PATIENCE_SECONDS = 30


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Return as soon as the condition holds; fail the test when it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain until {what}"
        time.sleep(0.01)


def until_it_listens(port: int) -> None:
    """Return as soon as somebody accepts connections at a port of this machine."""

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), 5):
            return True
        return False

    until(listens, f"port {port} is listened on")


def study(seed: int, instances: int = 2, **elements: str) -> list[StoredInstance]:
    """A study whose objects say this of themselves."""
    made = []
    for stored in tiny_instances(1, instances=instances, seed=seed):
        dataset = decoded(stored.encoded(), stored.transfer_syntax_uid)
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        data = encoded(dataset, stored.transfer_syntax_uid)
        made.append(instance_of_bytes(data, stored.transfer_syntax_uid))
    return made


@dataclass(frozen=True)
class Standing:
    """A receiver that stands ready for one site after the other: starting one takes a second."""

    title: str
    port: int
    spool: Path

    def settings(self) -> dict:
        return {"ae_title": self.title, "port": self.port, "idle_seconds": 1}


@contextlib.contextmanager
def standing_receiver(folder: Path) -> Iterator[Standing]:
    """A receiver for the sites of several tests, which take turns with its spool."""
    port = free_port()
    standing = Standing(f"TEST{port}", port, folder / "spool")
    node = {"host": LOOPBACK, "port": port, "called_ae_title": "ANY"}
    site = Site(
        nodes={"pacs": node},
        receiver=standing.settings(),
        archive={"directory": folder / "archive"},
        spool={"path": standing.spool, "reserve_bytes": 0},
    )
    with ReceiverLease(site) as lease:
        yield standing
        lease.stop()


@functools.lru_cache(maxsize=32)
def _site_of(read: tuple[tuple[Path, bytes], ...], environ: frozenset[tuple[str, str]]) -> Site:
    """The site of the first file, read once for the same bytes: tests ask for it all the time."""
    return load_site(read[0][0], dict(environ))


@dataclass
class Place:
    """A site in a folder, the PACS it asks, and what a test wants to know of both."""

    folder: Path
    file: Path
    pacs: ScriptedPacs

    @property
    def site(self) -> Site:
        beside = sorted((self.file.parent / "capabilities").glob("*"))
        read = tuple((path, path.read_bytes()) for path in (self.file, *beside))
        return _site_of(read, frozenset(os.environ.items()))

    def change(self, **parts: Mapping) -> None:
        """Change keys of parts of the site file (``node`` is the only node)."""
        document = yaml.safe_load(self.file.read_text())
        for name, values in parts.items():
            part = document["nodes"]["pacs"] if name == "node" else document.setdefault(name, {})
            for key, value in values.items():
                part[key] = {**part[key], **value} if isinstance(part.get(key), dict) else value
        self.file.write_text(yaml.safe_dump(document))

    # --- running

    def cohort(self, rows: Iterable[Mapping[str, str]] | None = None) -> Path:
        """A cohort file; without rows it names every study of the PACS by its UID."""
        if rows is None:
            uids = self.pacs.holdings.study_instance_uids()
            rows = [{"StudyInstanceUID": uid} for uid in uids]
        rows = list(rows)
        path = self.folder / "cohort.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
            writer.writeheader()
            writer.writerows(rows)
        return path

    def pull(self, cohort: Path | None = None, options: ListOptions = NO_CHOICES) -> Totals:
        """Bring a cohort as far as it goes, in this process."""
        with self.opened(cohort, options=options) as pull:
            work_through(pull)
            return pull.ledger.progress.totals(pull.cohort.number)

    @contextlib.contextmanager
    def opened(
        self,
        cohort: Path | None = None,
        *,
        clock: Clock | None = None,
        options: ListOptions = NO_CHOICES,
    ) -> Iterator[Run]:
        site = self.site
        registered = register_cohort(site, cohort or self.cohort(), None, options=options)
        with open_run(site, registered.number, clock=clock) as pull:
            yield pull

    def rerun(self) -> Totals:
        """Try again what failed, as ``rerun`` does."""
        with open_run(self.site, 1, "rerun") as pull:
            pull.ledger.cohorts.reopen(1)
            work_through(pull)
            return pull.ledger.progress.totals(1)

    @contextlib.contextmanager
    def victim(self, cohort: Path) -> Iterator[subprocess.Popen]:
        """A run in a process of its own, which is dead when the block ends."""
        with (self.folder / "victim.log").open("wb") as log:
            process = subprocess.Popen(
                [*program("sites"), str(self.file), str(cohort)], stdout=log, stderr=log
            )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, "the run had ended before it was killed"

    def store(self, stored: StoredInstance, ae_title: str = "STRANGER", **more: object) -> int:
        """Store an object at the site's receiver, as somebody else; the status it answers."""
        receiver = self.site.receiver
        association = StoreAssociation(
            ae_title, receiver.ae_title, (LOOPBACK, receiver.port), [context_key(stored)]
        )
        try:
            return association.store(
                association.context_id(stored),
                message_id=1,
                sop_class_uid=stored.sop_class_uid,
                sop_instance_uid=stored.sop_instance_uid,
                data=stored.encoded(),
                **more,
            )
        finally:
            association.release()

    def lose_ledger(self) -> None:
        """Delete the ledger of SQLite, and all that lies beside it."""
        for path in self.folder.glob("ledger.sqlite*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    # --- what became of it

    @contextlib.contextmanager
    def ledger(self) -> Iterator[Ledger]:
        with Ledger.open(ledger_url(self.site)) as ledger:
            yield ledger

    def totals(self) -> Totals:
        with self.ledger() as ledger:
            return ledger.progress.totals(1)

    def verdicts(self) -> list[RowVerdict]:
        with self.ledger() as ledger:
            return list(ledger.rows.verdicts(1))

    def studies(self) -> dict[str, StudyRecord]:
        """The ledger's studies of the first cohort, by UID."""
        with self.ledger() as ledger:
            return {s.study.study_instance_uid: s for s in ledger.studies.of_cohort(1)}

    def reasons(self) -> list[tuple[str, str | None]]:
        """State and reason of every study, in the order of their references."""
        return [(str(s.state), s.reason) for s in self.studies().values()]

    def archived(self) -> dict[str, bytes]:
        """Everything in the archive, by key."""
        with contextlib.closing(open_archive(self.site.archive)) as archive:
            return {key: b"".join(archive.read(key)) for key, _ in archive.keys("")}

    def manifest(self, study_instance_uid: str) -> StudyManifest:
        return decode_manifest(self.archived()[manifest_key(study_instance_uid)])

    def quarantined(self) -> list[Path]:
        """The notes of quarantined objects."""
        return sorted((self.site.spool.path / "quarantine").glob("*.json"))

    def spooled(self) -> list[Path]:
        """Object files that lie in the spool, quarantine apart."""
        spool = self.site.spool.path
        return [
            path
            for name in ("incoming", "ready", "suspect")
            for path in (spool / name).rglob("*")
            if path.is_file()
        ]

    def is_whole(self) -> None:
        """Check that everything is archived as the PACS holds it, and nothing lies around."""
        assert dict(self.totals().rows) == {Verdict.ARCHIVED: len(self.studies())}
        self.audit()
        archived = self.archived()
        for stored in self.pacs.holdings:
            uids = stored.study_instance_uid, stored.series_instance_uid, stored.sop_instance_uid
            assert archived[object_key(*uids)].endswith(stored.encoded())
        assert self.spooled() == []

    def goes_on(self) -> None:
        """Pull again, failed ones too, and check that the cohort comes to its end."""
        with self.ledger() as ledger:
            ledger.cohorts.reopen(1)
        self.pull()
        self.is_whole()

    def audit(self) -> None:
        """Check what holds at all times, whatever has happened: see ``docs/promise.md``."""
        archived = self.archived()
        named: Counter[str] = Counter()
        for uid, study in self.studies().items():
            if study.state is not StudyState.ARCHIVED:
                continue
            manifest = decode_manifest(archived[manifest_key(uid)])
            held = {
                (o.series_instance_uid, o.sop_instance_uid)
                for members in self.pacs.holdings.studies({"StudyInstanceUID": uid})
                for o in members
            }
            said = [(i.series_instance_uid, i.sop_instance_uid) for i in manifest.instances]
            absent = (*manifest.withheld, *manifest.missing)
            left_out = [(i.series_instance_uid, i.sop_instance_uid) for i in absent]
            wanted = [key for key in held if key[0] not in manifest.unwanted_series]
            assert sorted(said + left_out) == sorted(wanted)
            for instance in manifest.instances:
                named[instance.key] += 1
                data = archived[instance.key]
                assert len(data) == instance.size_bytes
                assert hashlib.sha256(data).hexdigest() == instance.sha256
                assert instance.key == object_key(
                    uid, instance.series_instance_uid, instance.sop_instance_uid
                )
            assert not self.site.spool.path.joinpath("ready", str(study.reference)).exists()
        assert set(named.values()) <= {1}
        with self.ledger() as ledger:
            known = {
                instance.object_key
                for study in ledger.studies.of_cohort(1)
                for instance in ledger.instances.of_study(study.reference)
            }
            assert not ledger.claims.live()
        strangers = {key for key in archived if not key.endswith("manifest.json")} - set(named)
        assert strangers <= known
        totals = self.totals()
        assert sum(totals.rows.values()) == len(self.verdicts())

    def asked_for(self, *services: str) -> int:
        """How many such requests the PACS has seen; without names, all of them."""
        return sum(
            len(self.pacs.requests(service))
            for service in services or ("C-FIND", "C-MOVE", "C-GET")
        )


@contextlib.contextmanager
def site_around(
    folder: Path,
    objects: Iterable[StoredInstance],
    *,
    script: Sequence[Behaviour] = (),
    retrieve: str = "c-move",
    bucket: S3Server | None = None,
    standing: Standing | None = None,
    receives: bool | None = None,
    tls: Tls | None = None,
    **parts: Mapping,
) -> Iterator[Place]:
    """A site for a PACS that holds the objects; the keywords change parts of the site file.

    It has a receiver where it needs one, or ``standing`` is given, or ``receives`` says so. With
    ``tls`` PACS and site show that certificate, and plain DICOM is spoken nowhere.
    The credentials of a bucket are expected in the environment.
    """
    if standing is None:
        port = free_port()
        own = Standing(f"TEST{port}", port, folder / "spool")
    else:
        own = standing
    (folder / "archive").mkdir()
    archive = {"directory": "archive"}
    if bucket is not None:
        archive = {"bucket": bucket.bucket, "endpoint": bucket.endpoint, "region": "us-east-1"}
    with ScriptedPacs(
        instances=objects,
        script=script,
        destinations={own.title: (LOOPBACK, own.port)},
        policy=PacsPolicy(tls=tls),
    ) as pacs:
        document = {
            "nodes": {
                "pacs": {
                    "host": LOOPBACK,
                    "port": pacs.port,
                    "called_ae_title": pacs.ae_title,
                    "retrieve": retrieve,
                    "timeouts": {"settle_seconds": 0.4, "stall_seconds": 20},
                }
            },
            "receiver": own.settings(),
            "archive": archive,
            "ledger": {"path": "ledger.sqlite"},
            "spool": {"path": str(own.spool), "reserve_bytes": 0},
        }
        if not (retrieve == "c-move" or standing is not None if receives is None else receives):
            del document["receiver"]
        if tls is not None:
            document["tls"] = tls.model_dump(mode="json")
            document["nodes"]["pacs"]["tls"] = document["receiver"]["tls"] = True
        place = Place(folder, folder / "site.yaml", pacs)
        place.file.write_text(yaml.safe_dump(document))
        place.change(**parts)
        try:
            yield place
        finally:
            if standing is not None:
                for path in standing.spool.glob("*/*"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif (lease := running_receiver(place.site)) is not None:
                lease.stop()
                lease.close()


def credentials(bucket: S3Server, environment) -> None:
    """Let this process, and those it starts, into the bucket."""
    environment.setenv("AWS_ACCESS_KEY_ID", bucket.access_key)
    environment.setenv("AWS_SECRET_ACCESS_KEY", bucket.secret_key)


def main(site_file: str, cohort: str) -> None:
    site = load_site(site_file)
    registered = register_cohort(site, Path(cohort), None)
    with open_run(site, registered.number) as pull:
        work_through(pull)


if __name__ == "__main__":
    os.umask(0o077)
    main(*sys.argv[1:])
