"""Auditor of a set-up: does the ledger agree with PACS, archive and spool?

It shares nothing with what it audits but the site file's settings: the ledger's tables are read
with plain SQL, manifests as JSON, objects and spool files by pydicom and hashlib, a bucket by
boto3. Audit when nothing runs, as after a crash, and again when a run has ended::

    auditor = Auditor(load_site("site.yaml"), pacs)
    ...                                        # a run that is killed
    assert auditor.audit() == []
    ...                                        # a run that ends by itself
    assert auditor.audit(finished=True) == []

It remembers its snapshots: what was archived once must stay in the archive unchanged.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefect_dicom.config.site import Site
from prefect_dicom.testing.audit_snapshot import (
    SPOOL_FOLDERS,
    Identity,
    Row,
    SetupReader,
    Snapshot,
    files_below,
    inventory_of,
    key_of,
    manifests_in,
    unescaped,
)
from prefect_dicom.testing.pacs import ScriptedPacs

INVARIANTS = {
    "I1": "an archived study has its manifest, and the archive holds all it names, hash and size",
    "I2": "a manifest names what its PACS holds of the study, or of the series it says were "
    "wanted, byte for byte",
    "I3": "every object in the archive is one the ledger or a manifest knows",
    "I4": "an instance has one object, which stays as it was",
    "I5": "no file leaves the spool before the archive has its bytes, or a record says why",
    "I6": "what was answered with success is in the spool, archived or on record; but for large "
    "instances whose hash a killed receiver had not taken yet, which are requested again",
    "I7": "nothing is written elsewhere, and of an archived study nothing stays in the spool",
    "I8": "a claim belongs to an unfinished study and a run that has not ended; attempts grow",
    "I9": "every row and study is there and ends archived, failed with a reason, or pending",
    "I10": "running again what is finished retrieves, writes and deletes nothing",
}
"""What has to hold, by the name of the invariant."""

_STUDY_STATES = {"pending", "listed", "archived", "failed"}
_OWN_SPOOL_FILES = ("receiver.",)


_HASHED_LATER_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Violation:
    """A violated invariant.

    Attributes
    ----------
    invariant : str
        Name in :data:`INVARIANTS`.
    what : str
        Description, without UIDs and paths.
    where : str
        Place for debugging; may hold UIDs and paths.
    """

    invariant: str
    what: str
    where: str = field(default="", compare=False)


class Auditor:
    """Auditor of one site, which compares with its previous snapshot; make it before the first run.

    Parameters
    ----------
    site : Site
        Site with ledger, archive, spool and reports. Credentials of a bucket are found as boto3
        finds them.
    pacs : ScriptedPacs or mapping of node to ScriptedPacs, optional
        The PACS of the site, by node if there are several. I2 and I6 need it.
    watch : Path, optional
        Directory in which only ledger, archive, spool and reports may appear.
    """

    def __init__(
        self,
        site: Site,
        pacs: ScriptedPacs | Mapping[str, ScriptedPacs] | None = None,
        watch: Path | None = None,
    ) -> None:
        self._site = site
        if pacs is not None and not isinstance(pacs, Mapping):
            pacs = dict.fromkeys(site.nodes, pacs)
        self._pacs = dict(pacs or {})
        # Each PACS once, whatever nodes it stands for.
        peers = list({id(one): one for one in self._pacs.values()}.values())
        self._reader = SetupReader(site, peers)
        self._watch = watch
        self._files_before = set(files_below(watch)) if watch else set()
        self._before: Snapshot | None = None

    def audit(self, *, finished: bool = False) -> list[Violation]:
        """Return all violations, sorted by invariant.

        Parameters
        ----------
        finished : bool
            Whether the last run ended by itself: nothing may be claimed, pending or left behind.
        """
        now = self._reader.look()
        checks = [
            *self._archived(now),
            *self._inventory(now),
            *self._strangers(now, finished),
            *self._one_object(now),
            *self._spool_is_kept(now),
            *self._answered(now, finished),
            *self._places(now, finished),
            *self._claims(now, finished),
            *self._rows(now, finished),
        ]
        self._before = now
        return sorted(checks, key=lambda each: (int(each.invariant[1:]), each.what, each.where))

    def audit_rerun(self, rerun: Callable[[], object]) -> list[Violation]:
        """Check I10: call ``rerun``, a run on a finished cohort, and return its violations."""
        objects, retrieves = self._reader.archive_objects(), self._reader.count_retrieves()
        traces = self._reader.archive_traces()
        rerun()
        found = []
        if self._reader.count_retrieves() != retrieves:
            found.append(Violation("I10", "the PACS was asked to send"))
        if self._reader.archive_objects() != objects or self._reader.archive_traces() != traces:
            found.append(Violation("I10", "the archive was written to"))
        return found

    def _archived(self, now: Snapshot) -> Iterator[Violation]:
        manifests = manifests_in(now)
        bodies = {row["study"]: row["body"] for row in now.tables["manifests"]}
        for study in now.tables["studies"]:
            uid, reference = unescaped(study["study_instance_uid"]), study["reference"]
            if study["state"] != "archived":
                continue
            if uid not in manifests:
                yield Violation("I1", "an archived study has no manifest", uid)
                continue
            key, manifest = manifests[uid]
            body = bodies.get(reference)
            if body is None or zlib.decompress(bytes(body)) != now.objects[key].text:
                yield Violation("I1", "the ledger's manifest is not the archive's", uid)
            figures = (
                len(manifest["instances"]),
                len(manifest["withheld"]),
                len(manifest.get("missing", ())),
                sum(each["size_bytes"] for each in manifest["instances"]),
            )
            columns = (
                "archived_instances",
                "withheld_instances",
                "missing_instances",
                "archived_bytes",
            )
            if figures != tuple(study[column] for column in columns):
                yield Violation("I1", "the ledger's figures are not the manifest's", uid)
            if unescaped(study["selection"] or "") != manifest.get("selection", ""):
                yield Violation("I1", "the ledger's selection is not the manifest's", uid)
        # Also of a study that is not archived yet: the manifest is the last thing written.
        for _, manifest in manifests.values():
            for each in manifest["instances"]:
                held = now.objects.get(each["key"])
                if held is None:
                    yield Violation("I1", "a manifest names an object that is missing", each["key"])
                elif (held.sha256, held.size_bytes) != (each["sha256"], each["size_bytes"]):
                    yield Violation("I1", "an object is not what its manifest says", each["key"])
                elif held.identity != (
                    manifest["study_instance_uid"],
                    each["series_instance_uid"],
                    each["sop_instance_uid"],
                ):
                    yield Violation("I1", "an object is another instance than its manifest says")

    def _inventory(self, now: Snapshot) -> Iterator[Violation]:
        if not self._pacs:
            return
        held_by = {id(pacs): inventory_of(pacs) for pacs in self._pacs.values()}
        for uid, (_, manifest) in manifests_in(now).items():
            if manifest["node"] not in self._pacs:
                yield Violation("I2", "a manifest is of a node that there is not", uid)
                continue
            # Of one node, all of it: what others hold of the study is no part of it.
            truth = held_by[id(self._pacs[manifest["node"]])]
            named = [key_of(each) for each in manifest["instances"]]
            left_out = [key_of(each) for each in manifest["withheld"]]
            left_out += [key_of(each) for each in manifest.get("missing", ())]
            unwanted = set(manifest.get("unwanted_series", ()))
            if unwanted and not manifest.get("selection"):
                yield Violation("I2", "a manifest leaves series out and does not say which", uid)
            wanted = [key for key in truth[uid] if key[0] not in unwanted]
            if sorted(named + left_out) != sorted(wanted):
                yield Violation("I2", "a manifest is not the PACS's inventory", uid)
            if not unwanted <= {series for series, _ in truth[uid]}:
                yield Violation("I2", "a manifest leaves out a series that is not there", uid)
            for each in manifest["instances"]:
                held = now.objects.get(each["key"])
                sent = truth[uid].get(key_of(each))
                if held and sent and not each["warnings"] and held.data_set_sha256 != sent:
                    yield Violation("I2", "an object is not what the PACS holds", each["key"])

    def _strangers(self, now: Snapshot, finished: bool) -> Iterator[Violation]:
        studies = now.by_reference()
        manifests = manifests_in(now)
        named = {each["key"] for _, m in manifests.values() for each in m["instances"]}
        named |= {row["object_key"] for row in now.tables["instances"] if row["object_key"]}
        listed = {
            (
                unescaped(studies[row["study"]]["study_instance_uid"]),
                unescaped(row["series_instance_uid"]),
                unescaped(row["sop_instance_uid"]),
            )
            for row in now.tables["instances"]
        }
        known = {unescaped(study["study_instance_uid"]) for study in studies.values()}
        keys_of_manifests = {key for key, _ in manifests.values()}
        for key, held in now.objects.items():
            if key in named or key.startswith("probes/"):
                continue
            if key in keys_of_manifests:
                if json.loads(held.text)["study_instance_uid"] not in known:
                    yield Violation("I3", "a manifest of a study that the ledger lacks", key)
            elif held.identity not in listed:
                yield Violation("I3", "an object that neither ledger nor manifest knows", key)
            elif finished and self._ended(studies, held.identity):
                yield Violation("I3", "an object of a finished study that nothing names", key)

    @staticmethod
    def _ended(studies: dict[int, Row], identity: Identity | None) -> bool:
        return any(
            study["state"] == "archived" and identity and study["study_instance_uid"] == identity[0]
            for study in studies.values()
        )

    def _one_object(self, now: Snapshot) -> Iterator[Violation]:
        keys = Counter(held.identity for held in now.objects.values() if held.identity)
        for identity, count in keys.items():
            if count > 1:
                yield Violation("I4", "an instance has several objects", "/".join(identity))
        for key, held in self._before.objects.items() if self._before else ():
            if key not in now.objects:
                yield Violation("I4", "an object is gone", key)
            elif now.objects[key].sha256 != held.sha256:
                yield Violation("I4", "an object was replaced", key)

    def _spool_is_kept(self, now: Snapshot) -> Iterator[Violation]:
        archived = Counter(held.sha256 for held in now.objects.values())
        here = {sha256 for sha256, _ in now.spool.values()}
        gone = set()
        rejected = set()
        for row in now.tables["instances"]:
            sha256, where = row["sha256"], unescaped(row["sop_instance_uid"])
            if row["state"] == "received" and not (sha256 in here or archived[sha256]):
                yield Violation("I5", "a received object is neither in spool nor archive", where)
            elif row["state"] == "stored":
                held = now.objects.get(row["object_key"])
                if held is None or (held.sha256, held.size_bytes) != (sha256, row["size_bytes"]):
                    yield Violation("I5", "a stored object is not in the archive", where)
            elif row["state"] == "rejected":
                rejected.add(where)
        for manifest in manifests_in(now).values():
            rejected |= {each["sop_instance_uid"] for each in manifest[1]["withheld"]}
        for sha256, uid in self._before.spool.values() if self._before else ():
            if not (sha256 in here or archived[sha256] or uid in rejected or sha256 in gone):
                gone.add(sha256)
                yield Violation("I5", "an object left the spool and is nowhere", uid)

    def _answered(self, now: Snapshot, finished: bool) -> Iterator[Violation]:
        somewhere = {uid for _, uid in now.spool.values()}
        somewhere |= {held.identity[2] for held in now.objects.values() if held.identity}
        for row in now.tables["instances"]:
            if row["state"] == "rejected":
                somewhere.add(unescaped(row["sop_instance_uid"]))
        for _, manifest in manifests_in(now).values():
            somewhere |= {each["sop_instance_uid"] for each in manifest["withheld"]}
        missing = now.answered - somewhere
        if missing and not finished:
            missing -= self._requested_again(now)
        for uid in sorted(missing):
            yield Violation("I6", "an object was answered with success and is nowhere", uid)

    def _requested_again(self, now: Snapshot) -> set[str]:
        """Large instances of which nothing is recorded: their hash may be on its way."""
        recorded = {
            unescaped(row["sop_instance_uid"])
            for row in now.tables["instances"]
            if row["state"] != "expected"
        }
        return {
            stored.sop_instance_uid
            for pacs in {id(one): one for one in self._pacs.values()}.values()
            for stored in pacs.holdings
            if stored.sop_instance_uid not in recorded
            and len(stored.encoded()) >= _HASHED_LATER_BYTES
        }

    def _places(self, now: Snapshot, finished: bool) -> Iterator[Violation]:
        spool = self._site.spool.path
        for path in files_below(spool):
            top, _, rest = str(path.relative_to(spool)).partition("/")
            if not (
                top in (*SPOOL_FOLDERS, "incoming") and rest or top.startswith(_OWN_SPOOL_FILES)
            ):
                yield Violation("I7", "a file that does not belong into the spool", str(path))
        if self._watch is not None:
            for path in sorted(set(files_below(self._watch)) - self._files_before):
                if not any(path.is_relative_to(place) for place in self._own_places()):
                    yield Violation(
                        "I7", "a file outside spool, ledger, archive, reports", str(path)
                    )
        if not finished:
            return
        for path in files_below(spool / "incoming"):
            yield Violation("I7", "an incoming file without a writer", str(path))
        if self._reader.archive_directory is not None:
            for path in files_below(self._reader.archive_directory / ".incoming"):
                yield Violation("I7", "an incoming file in the archive without a writer", str(path))
        for study in now.tables["studies"]:
            if study["state"] == "archived":
                for folder in ("ready", "suspect"):
                    if (spool / folder / str(study["reference"])).exists():
                        yield Violation("I7", f"an archived study stays in {folder}")

    def _own_places(self) -> Iterator[Path]:
        site = self._site
        yield site.spool.path
        yield site.reports
        if self._reader.archive_directory is not None:
            yield self._reader.archive_directory
        if site.ledger.path is not None:
            for ending in ("", "-wal", "-shm", "-journal", ".runs"):
                yield site.ledger.path.with_name(site.ledger.path.name + ending)

    def _claims(self, now: Snapshot, finished: bool) -> Iterator[Violation]:
        runs = {row["number"]: row for row in now.tables["runs"]}
        before = self._before.by_reference() if self._before else {}
        for study in now.tables["studies"]:
            where = f"study {study['reference']}"
            if study["run"] is not None:
                run = runs.get(study["run"])
                if study["state"] not in ("pending", "listed"):
                    yield Violation("I8", "a study that is finished is claimed", where)
                if run is None or run["ended_at"] is not None:
                    yield Violation("I8", "a study is claimed by a run that has ended", where)
                elif finished:
                    yield Violation("I8", "a study is still claimed", where)
            earlier = before.get(study["reference"])
            if earlier is not None and study["attempt"] < earlier["attempt"]:
                yield Violation("I8", "a study's attempt went back", where)

    def _rows(self, now: Snapshot, finished: bool) -> Iterator[Violation]:
        studies = now.by_reference()
        links: dict[tuple[int, int], list[int]] = defaultdict(list)
        left_out = set()
        for link in now.tables["row_studies"]:
            links[link["cohort"], link["line"]].append(link["study"])
            if link["reason"] is not None:
                left_out.add((f"cohort {link['cohort']}, line {link['line']}", link["study"]))
        count = Counter(row["cohort"] for row in now.tables["cohort_rows"])
        for cohort in now.tables["cohorts"]:
            if count[cohort["number"]] != cohort["rows"]:
                yield Violation("I9", "a cohort has not all its rows", f"cohort {cohort['number']}")
        for study in studies.values():
            failed = study["state"] == "failed"
            if study["state"] not in _STUDY_STATES or failed != (study["reason"] is not None):
                yield Violation("I9", "a study has no state, or one without its reason")
        for row in now.tables["cohort_rows"]:
            where = f"cohort {row['cohort']}, line {row['line']}"
            linked = links[row["cohort"], row["line"]]
            if any(reference not in studies for reference in linked):
                yield Violation("I9", "a row points to a study that is not there", where)
                continue
            if row["discovered"] and row["reason"] is None and not linked:
                yield Violation("I9", "a row found studies and has none", where)
            pending = not row["discovered"] and row["reason"] is None
            wanted = [each for each in linked if (where, each) not in left_out]
            pending |= any(studies[each]["state"] in ("pending", "listed") for each in wanted)
            if finished and pending:
                yield Violation("I9", "a row did not come to its end", where)
        yield from self._nothing_lost(now)

    def _nothing_lost(self, now: Snapshot) -> Iterator[Violation]:
        if self._before is None:
            return
        for table, key in (("cohort_rows", ("cohort", "line")), ("studies", ("reference",))):
            there = {tuple(row[name] for name in key) for row in now.tables[table]}
            for row in self._before.tables[table]:
                if tuple(row[name] for name in key) not in there:
                    yield Violation("I9", f"a row of {table} is gone")
        studies = now.by_reference()
        for reference, study in self._before.by_reference().items():
            later = studies.get(reference, study)
            if study["state"] == "archived" != later["state"]:
                yield Violation("I9", "a study is archived no more", f"study {reference}")
