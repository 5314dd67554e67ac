"""A ledger that was lost, or is an older copy, is brought up to date from the archive alone.

A manifest is believed only where it is one of ours for its place and what it names is there; what
the ledger knows better stays. Afterwards the same cohort file moves nothing.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import threading
import tracemalloc
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

from prefect_dicom.archive.manifest import decode_manifest, encode_manifest
from prefect_dicom.archive.verification import verify_cohort
from prefect_dicom.cli import Exit
from prefect_dicom.config.site import Site
from prefect_dicom.core.errors import ClaimLost, PrefectDicomError
from prefect_dicom.core.model import (
    Evidence,
    Instance,
    InstanceKey,
    Level,
    ManifestInstance,
    StudyManifest,
    StudyState,
)
from prefect_dicom.core.uids import manifest_key, object_key
from prefect_dicom.ledger import Ledger, RebuildOutcome
from prefect_dicom.operations.rebuild import RebuiltStudy, rebuild_ledger
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.progress import counting_shown
from prefect_dicom.run.run import open_run
from prefect_dicom.testing.generate import uid
from prefect_dicom.testing.tiny import tiny_instances
from tests.support.campaign import subset
from tests.support.commands import CommandLine
from tests.support.postgres import ledger_url as new_ledger_url
from tests.support.s3_server import S3Server
from tests.support.sites import Place, credentials, site_around

MISSING, CHANGED, UNREADABLE = "archive-object-missing", "archive-checksum", "manifest-unreadable"


def lose_the_ledger(place: Place) -> None:
    """It is gone, with all that lay beside it; on PostgreSQL the database is a new one."""
    if place.site.ledger.url is not None:
        place.change(ledger={"url": new_ledger_url("postgresql", place.folder)})
        return
    place.lose_ledger()


def rebuilt(place: Place, level: Level = Level.SIZE) -> list[RebuiltStudy]:
    return list(rebuild_ledger(place.site, level))


def faults(studies: list[RebuiltStudy]) -> Counter[str]:
    return sum((study.faults for study in studies), Counter())


def records(place: Place) -> dict[str, tuple[str, str | None, int]]:
    """State, reason and archived instances of every study of the ledger, by UID."""
    with place.ledger() as ledger:
        found = {}
        for number in range(1, 100):
            if (record := ledger.studies.get(number)) is not None:
                facts = (str(record.state), record.reason, record.stored)
                found[record.study.study_instance_uid] = facts
        return found


def uids(place: Place) -> list[str]:
    return place.pacs.holdings.study_instance_uids()


@pytest.fixture
def folder_site(tmp_path):
    """Three studies of two instances, archived in a directory."""
    with site_around(tmp_path, tiny_instances(3, instances=2), retrieve="c-get") as place:
        place.pull()
        yield place


@pytest.fixture(params=[("directory", "sqlite"), ("bucket", "sqlite"), ("directory", "postgresql")])
def place(request, tmp_path, monkeypatch):
    """The same on each kind of archive and ledger; ``place.puts()`` counts what was put."""
    archive, ledger = request.param
    objects = tiny_instances(3, instances=2)
    with S3Server() as server:
        credentials(server, monkeypatch)
        bucket = server if archive == "bucket" else None
        with site_around(tmp_path, objects, retrieve="c-get", bucket=bucket) as place:
            if ledger == "postgresql":
                url = new_ledger_url("postgresql", tmp_path)
                place.change(ledger={"path": None, "url": url})
            place.pull()
            yield place


def test_a_lost_ledger_knows_every_archived_study_again_and_a_pull_moves_nothing(place):
    before = records(place)
    held = place.archived()
    lose_the_ledger(place)
    asked = place.asked_for()

    studies = rebuilt(place)
    assert [study.outcome for study in studies] == [RebuildOutcome.ADDED] * 3
    assert [study.instances for study in studies] == [2, 2, 2]
    assert faults(studies) == Counter()
    assert records(place) == before
    assert place.asked_for() == asked
    for level in Level:
        assert [s.faults for s in verify_cohort(place.site, None, level)] == [Counter()] * 3

    retrieves = place.asked_for("C-MOVE", "C-GET")
    totals = place.pull()
    assert totals.studies == {StudyState.ARCHIVED: 3}
    assert place.asked_for("C-MOVE", "C-GET") == retrieves
    assert place.archived() == held
    assert [s.faults for s in verify_cohort(place.site, "1", Level.READ)] == [Counter()] * 3
    place.audit()


def test_after_a_rebuild_the_bucket_sees_no_put(tmp_path, monkeypatch):
    with S3Server() as server:
        credentials(server, monkeypatch)
        objects = tiny_instances(2, instances=2)
        with site_around(tmp_path, objects, retrieve="c-get", bucket=server) as place:
            place.pull()
            lose_the_ledger(place)
            before = server.requests.copy()
            rebuilt(place)
            place.pull()
            written = ("PutObject", "CreateMultipartUpload", "DeleteObject")
            assert [server.requests[name] - before[name] for name in written] == [0, 0, 0]
            # A rebuild lists and reads the manifests; no object is asked for.
            assert server.requests["GetObject"] - before["GetObject"] == 2


@pytest.mark.parametrize(
    ("listing", "code"),
    [
        ({"listing_tokens": False}, Exit.ALL_WELL),
        ({"listing_tokens": False, "ignore_start_after": True}, Exit.ALL_WELL),
        ({"listing_tokens": False, "listing_flags": False}, Exit.ALL_WELL),
        (None, Exit.CONFIGURATION),
    ],
    ids=str,
)
def test_a_bucket_that_is_listed_in_pieces_is_seen_whole_or_the_fault_has_a_name(
    tmp_path, monkeypatch, listing, code
):
    with S3Server(**(listing or {"listing_tokens": False, "ignore_start_after": True})) as server:
        credentials(server, monkeypatch)
        objects = tiny_instances(3, instances=1)
        with site_around(tmp_path, objects, retrieve="c-get", bucket=server) as place:
            place.pull()
            lose_the_ledger(place)
            # Before those of the study that is listed last, more than a page of others.
            first = min(server.archived)
            prefix = first.rpartition("/")[0]
            one = server.objects[first]
            server.objects.update({f"{prefix}/{n:04}.dcm": one for n in range(1200)})
            if listing is None:
                server.refuse("host", "ListObjects", status=501, code="NotImplemented")
            command = CommandLine(tmp_path, tmp_path / "home")
            ended = command("rebuild-ledger")
            assert ended.code == code, ended.stderr
            assert "Traceback" not in ended.stderr
            if code == Exit.ALL_WELL:
                assert "3 added to the ledger as archived" in " ".join(ended.output.split())
            else:
                assert "archive-" in ended.stderr


def test_the_same_again_changes_nothing(place):
    lose_the_ledger(place)
    rebuilt(place)
    with place.ledger() as ledger:
        before = [ledger.studies.get(number) for number in (1, 2, 3)]
    assert [study.outcome for study in rebuilt(place)] == [RebuildOutcome.KNOWN] * 3
    with place.ledger() as ledger:
        assert [ledger.studies.get(number) for number in (1, 2, 3)] == before


def test_an_older_copy_of_the_ledger_is_completed_and_what_it_has_stays(folder_site):
    place = folder_site
    first, second, third = uids(place)
    lose_the_ledger(place)
    # The copy is from the time when one study was archived, one was found, and one unknown.
    cohort = place.cohort([{"StudyInstanceUID": first}])
    place.pull(cohort)
    cohort = place.cohort([{"StudyInstanceUID": u} for u in (first, second)])
    with place.opened(cohort) as pull:
        for lines in pull.discovery.pages():
            pull.discovery.discover(*lines)
    with place.ledger() as ledger:
        archived = ledger.studies.find(first)
    assert records(place)[second][0] == StudyState.PENDING

    outcomes = {study.reference: study.outcome for study in rebuilt(place)}
    with place.ledger() as ledger:
        assert ledger.studies.find(first) == archived
        references = {u: ledger.studies.find(u).reference for u in (first, second, third)}
    assert outcomes == {
        references[first]: RebuildOutcome.KNOWN,
        references[second]: RebuildOutcome.COMPLETED,
        references[third]: RebuildOutcome.ADDED,
    }
    assert {state for state, _, _ in records(place).values()} == {StudyState.ARCHIVED}


# --- what the ledger knows better


@pytest.fixture(params=["sqlite", "postgresql"])
def known(request, folder_site):
    """The ledger is a new one, which has found the first study again."""
    place = folder_site
    if request.param == "postgresql":
        place.change(ledger={"path": None, "url": new_ledger_url("postgresql", place.folder)})
    else:
        lose_the_ledger(place)
    cohort = place.cohort([{"StudyInstanceUID": uids(place)[0]}])
    with place.opened(cohort) as pull:
        for lines in pull.discovery.pages():
            pull.discovery.discover(*lines)
    return place


def named_in(place: Place) -> list[Instance]:
    manifest = place.manifest(uids(place)[0])
    return [
        Instance(InstanceKey(i.series_instance_uid, i.sop_instance_uid), i.sop_class_uid)
        for i in manifest.instances
    ]


def outcome(place: Place) -> RebuildOutcome | None:
    """What became of the first study."""
    return {study.reference: study.outcome for study in rebuilt(place)}[1]


def test_a_study_that_a_living_run_works_on_is_left_to_it(known):
    with known.ledger() as ledger, ledger.runs.begin("pull") as run:
        (claim,) = ledger.claims.acquire(run, [1])
        assert outcome(known) is RebuildOutcome.CLAIMED
        assert ledger.claims.still_held([claim]) == [claim]
    assert outcome(known) is RebuildOutcome.COMPLETED


def test_who_claimed_a_study_and_was_taken_for_dead_cannot_write_of_it_any_more(known):
    with known.ledger() as ledger, suppress(ClaimLost):
        with ledger.runs.begin("pull") as run:
            (claim,) = ledger.claims.acquire(run, [1])
        assert outcome(known) is RebuildOutcome.COMPLETED
        with pytest.raises(ClaimLost):
            ledger.studies.record_failed(claim, "pacs-refused")
    assert records(known)[uids(known)[0]] == ("archived", None, 2)


@pytest.mark.parametrize("ended", ["listed", "failed"])
def test_an_unfinished_study_whose_list_the_manifest_names_is_archived(known, ended):
    with known.ledger() as ledger, ledger.runs.begin("pull") as run:
        (claim,) = ledger.claims.acquire(run, [1])
        ledger.instances.record_list(claim, named_in(known), Evidence.INSTANCE_LIST)
        if ended == "failed":
            ledger.studies.record_failed(claim, "instances-missing")
    assert outcome(known) is RebuildOutcome.COMPLETED
    assert records(known)[uids(known)[0]] == ("archived", None, 2)
    with known.ledger() as ledger:
        assert ledger.instances.of_study(1) == []


@pytest.mark.parametrize("ended", ["listed", "failed"])
def test_a_study_that_the_pacs_lists_otherwise_by_now_is_left_as_it_is(known, ended):
    with known.ledger() as ledger, ledger.runs.begin("pull") as run:
        (claim,) = ledger.claims.acquire(run, [1])
        ledger.instances.record_list(claim, named_in(known)[:1], Evidence.INSTANCE_LIST)
        if ended == "failed":
            ledger.studies.record_failed(claim, "study-changed")
        before = ledger.studies.get(1)
    assert outcome(known) is RebuildOutcome.LISTED_OTHERWISE
    with known.ledger() as ledger:
        after = ledger.studies.get(1)
        assert (after.state, after.reason) == (ended, before.reason)
        assert len(ledger.instances.of_study(1)) == 1


def test_an_archived_study_keeps_its_manifest_and_another_one_in_the_archive_is_a_fault(
    folder_site,
):
    place = folder_site
    key = manifest_key(uids(place)[0])
    with place.ledger() as ledger:
        before = dict(ledger.manifests.of_cohort(None))
    rewrite(place, key, lambda m: dataclasses.replace(m, warnings=("forged",)))
    assert faults(rebuilt(place)) == Counter({CHANGED: 1})
    with place.ledger() as ledger:
        assert dict(ledger.manifests.of_cohort(None)) == before


def test_two_rebuilds_at_once_add_every_study_once(place):
    lose_the_ledger(place)
    site = place.site
    both: list[list[RebuiltStudy]] = []
    begin = threading.Barrier(2)

    def work() -> None:
        begin.wait(30)
        both.append(list(rebuild_ledger(site)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    outcomes = Counter(study.outcome for studies in both for study in studies)
    assert outcomes == {RebuildOutcome.ADDED: 3, RebuildOutcome.KNOWN: 3}
    assert len(records(place)) == 3


# --- what is not believed


def rewrite(place: Place, key: str, change) -> None:
    """Change the manifest in a directory archive behind our back."""
    path = place.folder / "archive" / key
    path.chmod(0o600)
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        path.write_bytes(encode_manifest(change(decode_manifest(path.read_bytes()))))


def with_instances(manifest: StudyManifest, *instances: ManifestInstance) -> StudyManifest:
    return dataclasses.replace(manifest, instances=instances)


FORGERIES = {
    "not JSON": b"no manifest at all",
    "of another version": b'{"format": "prefect-dicom/study-manifest", "version": 99}',
    "without fields": b'{"format": "prefect-dicom/study-manifest", "version": 1}',
    "of another study": lambda m: dataclasses.replace(m, study_instance_uid="1.2.3"),
    "names nothing": lambda m: with_instances(m),
    "names something twice": lambda m: with_instances(m, m.instances[0], m.instances[0]),
    "names another study's object": lambda m: with_instances(
        m, dataclasses.replace(m.instances[0], key=object_key("1.2", "3", "4"))
    ),
    "names a path": lambda m: with_instances(
        m, dataclasses.replace(m.instances[0], key="../../etc/passwd")
    ),
    "of a node with a strange name": lambda m: dataclasses.replace(m, node="a\x1b[2Jb"),
    "listed at no time": lambda m: dataclasses.replace(m, listed_at="yesterday"),
    "listed at an unknown hour": lambda m: dataclasses.replace(m, listed_at="2026-01-01T00:00:00"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_manifest_that_is_none_of_ours_for_its_place_is_not_believed(folder_site, forgery):
    place = folder_site
    first = uids(place)[0]
    lose_the_ledger(place)
    rewrite(place, manifest_key(first), FORGERIES[forgery])
    studies = rebuilt(place)
    assert faults(studies) == Counter({UNREADABLE: 1})
    state, reason, _ = records(place)[first]
    assert (state, reason) == (StudyState.FAILED, UNREADABLE)
    assert len(records(place)) == 3
    # The reference it is told by is the ledger's.
    (faulty,) = [study for study in studies if study.faults]
    with place.ledger() as ledger:
        assert ledger.studies.get(faulty.reference).study.study_instance_uid == first


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    path.unlink()
    if how == "truncated":
        path.write_bytes(data[:-10])
    elif how == "other bytes":
        data[-1] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize(
    "how, level, code",
    [
        ("deleted", Level.EXISTS, MISSING),
        ("deleted", Level.SIZE, MISSING),
        # A listing tells the size too: no level is content without it.
        ("truncated", Level.EXISTS, CHANGED),
        ("truncated", Level.SIZE, CHANGED),
        ("other bytes", Level.CHECKSUM, CHANGED),
        ("other bytes", Level.READ, CHANGED),
    ],
)
def test_a_study_whose_objects_are_not_as_named_is_not_taken_for_archived(
    folder_site, how, level, code
):
    place = folder_site
    first = uids(place)[0]
    lose_the_ledger(place)
    damage(sorted((place.folder / "archive" / "studies" / first).rglob("*.dcm"))[0], how)
    assert faults(rebuilt(place, level)) == Counter({code: 1})
    assert records(place)[first] == ("failed", code, 0)


def test_an_object_that_is_gone_comes_back_by_a_rerun_and_nothing_else_moves(folder_site):
    place = folder_site
    held = place.archived()
    lose_the_ledger(place)
    victim = sorted((place.folder / "archive").rglob("*.dcm"))[0]
    damage(victim, "deleted")
    rebuilt(place)
    # The row says so, and waits for a person.
    place.pull()
    assert Counter(verdict.reason for verdict in place.verdicts()) == {
        "all-archived": 2,
        MISSING: 1,
    }
    assert not victim.exists()
    totals = place.rerun()
    assert totals.studies == {StudyState.ARCHIVED: 3}
    assert place.archived() == held
    place.audit()


def test_a_pull_with_an_empty_ledger_takes_no_manifest_for_objects_that_are_gone(folder_site):
    place = folder_site
    held = place.archived()
    lose_the_ledger(place)
    damage(sorted((place.folder / "archive").rglob("*.dcm"))[0], "deleted")
    totals = place.pull()
    assert totals.studies == {StudyState.ARCHIVED: 3}
    assert place.archived() == held
    place.audit()


def test_a_manifest_that_cannot_be_read_ends_its_study_and_no_other(folder_site):
    place = folder_site
    lose_the_ledger(place)
    rewrite(place, manifest_key(uids(place)[0]), b"{")
    place.pull()
    assert Counter(place.reasons()) == {("archived", None): 2, ("failed", UNREADABLE): 1}


def test_a_study_without_a_manifest_is_pulled_like_any_other(folder_site):
    place = folder_site
    held = place.archived()
    lose_the_ledger(place)
    (place.folder / "archive" / manifest_key(uids(place)[0])).unlink()
    note = place.folder / "archive" / "studies" / "NOTES.txt"
    note.write_text("not ours")
    studies = rebuilt(place)
    note.unlink()
    assert Counter(study.outcome for study in studies) == {RebuildOutcome.ADDED: 2, None: 1}
    assert faults(studies) == Counter()
    place.pull()
    assert {m.instances for m in map(decode_manifest, manifests_of(place.archived()))} == {
        m.instances for m in map(decode_manifest, manifests_of(held))
    }
    place.audit()


def manifests_of(archived: dict[str, bytes]) -> list[bytes]:
    return [data for key, data in archived.items() if key.endswith("manifest.json")]


def test_an_archive_that_cannot_be_asked_is_an_error(folder_site):
    lose_the_ledger(folder_site)
    (folder_site.folder / "archive").rename(folder_site.folder / "elsewhere")
    with pytest.raises(PrefectDicomError) as caught:
        rebuilt(folder_site)
    assert caught.value.code == "archive-missing"


# --- of any size


def fill(archive: Path, studies: int) -> None:
    """An archive of small studies with one object each."""
    for number in range(studies):
        study, series, instance = (uid("large", number, part) for part in ("a", "b", "c"))
        key = object_key(study, series, instance)
        (archive / key).parent.mkdir(parents=True)
        (archive / key).write_bytes(b"DICM")
        named = ManifestInstance(series, instance, "1.2", "1.2.840", key, 4, "ab" * 32)
        listed_at = "2026-01-01T00:00:00+00:00"
        manifest = StudyManifest(study, "pacs", Evidence.INSTANCE_LIST, listed_at, (named,))
        (archive / manifest_key(study)).write_bytes(encode_manifest(manifest))


def empty_site(folder: Path, url: str | None = None) -> Site:
    folder.mkdir()
    (folder / "archive").mkdir()
    return Site(
        nodes={"pacs": {"host": "127.0.0.1", "port": 104, "called_ae_title": "PACS"}},
        receiver={"ae_title": "TEST"},
        archive={"directory": folder / "archive"},
        spool={"path": folder / "spool"},
        ledger={"url": url} if url else {"path": folder / "ledger.sqlite"},
    )


@pytest.mark.campaign("rebuild")
@pytest.mark.parametrize("kind", subset(["sqlite", "postgresql"], ["sqlite"]))
@pytest.mark.needs("time")
def test_memory_does_not_grow_with_the_archive(tmp_path, kind, scale):
    numbers = itertools.count()

    def most(studies: int) -> float:
        url = new_ledger_url(kind, tmp_path) if kind == "postgresql" else None
        folder = tmp_path / f"{next(numbers)}"
        site = empty_site(folder, url)
        fill(folder / "archive", studies)
        tracemalloc.start()
        done = sum(study.outcome is RebuildOutcome.ADDED for study in rebuild_ledger(site))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert done == studies
        return peak / 1024**2

    # The first brings in what is loaded once.
    most(30)
    few = most(60)
    # Twice: a table of the process itself that grows by a step does so once.
    many = min(most(scale(180, 3_000)) for _ in range(2))
    # The names of the directory that is being listed are all that may add up.
    assert many < few + 3


def test_a_rebuild_that_was_stopped_goes_on(tmp_path):
    site = empty_site(tmp_path / "here")
    fill(tmp_path / "here" / "archive", 120)
    begun = rebuild_ledger(site)
    next(begun)
    begun.close()
    outcomes = Counter(study.outcome for study in rebuild_ledger(site))
    assert outcomes[RebuildOutcome.KNOWN] > 0 and outcomes[RebuildOutcome.ADDED] > 0
    assert outcomes.total() == 120
    with Ledger.open(f"sqlite:///{tmp_path}/here/ledger.sqlite") as ledger:
        assert sum(1 for _ in ledger.manifests.of_cohort(None)) == 120


# --- the command


def test_the_command_tells_what_it_found_without_uids_and_loads_no_engine(folder_site, tmp_path):
    place = folder_site
    command = CommandLine(place.folder, tmp_path / "home")
    lose_the_ledger(place)
    first, _, _ = uids(place)
    damage(sorted((place.folder / "archive" / "studies" / first).rglob("*.dcm"))[0], "deleted")
    ended = command("rebuild-ledger")
    assert ended.code == Exit.NOT_ALL
    with place.ledger() as ledger:
        reference = ledger.studies.find(first).reference
    assert f"study {reference}: 1 {MISSING}" in ended.output
    assert "2 added to the ledger as archived" in ended.output
    assert "Somebody removed it" in ended.output
    assert not any(each in ended.output + ended.stderr for each in uids(place))
    assert not ended.modules & {"prefect", "pynetdicom", "pandas", "boto3"}

    again = command("rebuild-ledger", "--level", "read", "--json")
    assert again.code == Exit.NOT_ALL
    assert again.result == {
        "level": "read",
        "instances": 6,
        "studies": {"known": 2},
        "faulty": [{"study": reference, "faults": {MISSING: 1}}],
    }


def test_the_command_is_content_with_a_whole_archive(folder_site, tmp_path):
    place = folder_site
    command = CommandLine(place.folder, tmp_path / "home")
    lose_the_ledger(place)
    ended = command("rebuild-ledger", "--json")
    assert ended.code == Exit.ALL_WELL, ended.stderr
    assert ended.result["studies"] == {"added": 3}
    assert json.loads(command("verify", "--json").output)["studies"] == 3
    assert command("status").code == 0


def test_on_a_terminal_the_count_stays_in_view():
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    with counting_shown(terminal) as say:
        say("1 study")
        say("[2] studies")
    assert "[2] studies" in terminal.file.getvalue()
    elsewhere = Console(file=io.StringIO(), force_terminal=False)
    with counting_shown(elsewhere) as say:
        say("1 study")
    assert elsewhere.file.getvalue() == ""


def test_a_rebuilt_study_comes_into_another_cohort_as_archived(folder_site):
    place = folder_site
    lose_the_ledger(place)
    rebuilt(place)
    place.pull(place.cohort([{"StudyInstanceUID": uids(place)[1]}]))
    with open_run(place.site, 1, "rerun") as pull:
        work_through(pull)
        assert pull.ledger.progress.totals(1).stored == 2
