"""What lies in quarantine is listed, inspected, released to its study, or deleted.

Nothing leaves it for the archive by another way than everything takes: what is given back lies
where arriving objects lie, and the next run judges, hashes and stores it. Listing opens no
object; what names a patient is shown on demand only.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from prefect_dicom.archive.spool import Quarantined, Spool
from prefect_dicom.cli import Exit
from prefect_dicom.core.errors import ConfigurationError
from prefect_dicom.core.model import InstanceState, StoreRequest, StudyState
from prefect_dicom.ledger import Acceptance, Ledger
from prefect_dicom.operations.quarantine import (
    Released,
    described,
    drop,
    in_quarantine,
    name_of,
    named,
    release,
)
from prefect_dicom.testing import Behaviour, StoredInstance, tiny_instances
from prefect_dicom.testing.instances import changed
from tests.support.commands import CommandLine
from tests.support.postgres import ledger_url as new_ledger_url
from tests.support.sites import Place, site_around

OBJECTS = list(tiny_instances(2, instances=3))
FIRST_STUDY = OBJECTS[:3]
LATE = OBJECTS[2]
STRANGER = next(iter(tiny_instances(1, seed=9)))


def quarantined(
    place: Place, stored: StoredInstance, reason: str = "not-requested", ae_title: str = "PACS"
) -> Quarantined:
    """Receive an object and put it into quarantine, as the receiver does."""
    request = StoreRequest(
        message_id=1,
        sop_class_uid=stored.sop_class_uid,
        sop_instance_uid=stored.sop_instance_uid,
        transfer_syntax_uid=stored.transfer_syntax_uid,
        calling_ae_title=ae_title,
        peer_address="10.0.0.9",
    )
    spool = Spool(place.site.spool.path)
    part = spool.begin(request)
    part.write([stored.encoded()])
    sha256 = part.sha256
    spool.quarantine(part, reason)
    (entry,) = named(in_quarantine(place.site), [sha256])
    return entry


def given(place: Place, *entries: Quarantined) -> list[Released]:
    return list(release(place.site, entries))


def stays(place: Place, entry: Quarantined) -> tuple[str, str]:
    """Why it is not given back; nothing of it may have moved."""
    (answer,) = given(place, entry)
    assert answer.trouble is not None and answer.study is None
    assert entry in in_quarantine(place.site)
    assert place.spooled() == []
    return answer.trouble.code, answer.trouble.detail


def two_studies(folder: Path) -> AbstractContextManager[Place]:
    """Two studies of three instances; the PACS keeps the last one of the first to itself."""
    keep = Behaviour("move.drop_instances", instances=[LATE.sop_instance_uid])
    return site_around(folder, OBJECTS, script=[keep], retrieve="c-get")


@pytest.fixture
def place(tmp_path):
    with two_studies(tmp_path) as place:
        yield place


@pytest.fixture(scope="module")
def what_a_pull_leaves(tmp_path_factory):
    """The folder of such a site when its run has ended, to be copied: waiting takes seconds."""
    folder = tmp_path_factory.mktemp("pulled")
    with two_studies(folder) as place:
        place.pull()
    # Each of those that take it has one of its own.
    place.file.unlink()
    return folder


@pytest.fixture
def pulled(place, what_a_pull_leaves):
    """As far as it goes: one study is archived, the other failed for what is missing."""
    shutil.copytree(what_a_pull_leaves, place.folder, dirs_exist_ok=True)
    assert sorted(place.reasons()) == [("archived", None), ("failed", "instances-missing")]
    return place


# --- giving back


def test_what_its_study_waits_for_is_given_back_and_archived_by_the_next_run(pulled):
    entry = quarantined(pulled, LATE)
    (answer,) = given(pulled, entry)
    assert (answer.trouble, answer.reopened_by) == (None, None)
    # Nothing but the spool has changed: no object of it is in the archive or the ledger.
    assert in_quarantine(pulled.site) == []
    assert pulled.quarantined() == []
    assert [path.stem for path in pulled.spooled()] == [entry.sha256]
    assert len(pulled.archived()) == 5 + 1
    with pulled.ledger() as ledger:
        states = {record.state for record in ledger.instances.of_study(answer.study)}
    assert InstanceState.EXPECTED in states

    retrieves = pulled.asked_for("C-GET")
    totals = pulled.rerun()
    assert totals.studies == {StudyState.ARCHIVED: 2}
    assert pulled.asked_for("C-GET") == retrieves
    pulled.audit()
    held = {i.sha256 for i in pulled.manifest(LATE.study_instance_uid).instances}
    assert entry.sha256 in held


def test_what_was_given_back_and_has_rotted_meanwhile_is_not_archived(pulled):
    entry = quarantined(pulled, LATE)
    given(pulled, entry)
    (path,) = pulled.spooled()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    pulled.rerun()
    assert ("failed", "instances-missing") in pulled.reasons()
    assert len(pulled.archived()) == 5 + 1
    pulled.audit()


def test_an_instance_that_was_attributed_once_is_found_by_its_note_too(pulled):
    spool = Spool(pulled.site.spool.path)
    entry = quarantined(pulled, LATE)
    (answer,) = given(pulled, entry)
    spool.quarantine_file(answer.study, entry.sha256, "wrong-patient")
    (again,) = in_quarantine(pulled.site)
    assert (again.study, again.reason, again.sender) == (answer.study, "wrong-patient", "")
    assert given(pulled, again)[0].study == answer.study


def test_a_study_that_failed_for_good_names_the_reason_for_its_rerun(pulled):
    with pulled.ledger() as ledger:
        ledger.cohorts.reopen(1)
        (record,) = ledger.studies.to_pull(1)
        with ledger.runs.begin("pull") as run:
            (claim,) = ledger.claims.acquire(run, [record.reference])
            ledger.studies.record_failed(claim, "request-refused")
    (answer,) = given(pulled, quarantined(pulled, LATE))
    assert answer.reopened_by == "request-refused"


# --- what stays, and why


def test_an_instance_of_a_study_that_nobody_knows_stays(pulled):
    code, why = stays(pulled, quarantined(pulled, STRANGER))
    assert (code, why) == ("not-requested", "the ledger has no study of its StudyInstanceUID")


def test_an_instance_that_the_pacs_does_not_list_stays(pulled):
    other = changed(LATE, SOPInstanceUID="1.2.3.4")
    assert "does not list it" in stays(pulled, quarantined(pulled, other))[1]


def test_an_instance_of_a_study_that_is_not_listed_yet_stays(place):
    with place.opened() as pull:
        for lines in pull.discovery.pages():
            pull.discovery.discover(*lines)
    assert "has not listed its study yet" in stays(place, quarantined(place, LATE))[1]


def test_an_instance_of_an_archived_study_stays(pulled):
    whole = OBJECTS[3]
    same = quarantined(pulled, whole)
    assert "archived already" in stays(pulled, same)[1]
    other = quarantined(pulled, changed(whole, StudyDescription="Other"))
    assert stays(pulled, other) == (
        "conflicting-content",
        "another instance is archived in its place",
    )
    more = quarantined(pulled, changed(whole, SOPInstanceUID="1.2.3.4"))
    assert "whole without it" in stays(pulled, more)[1]


def test_an_instance_whose_place_is_taken_stays(pulled):
    stored = FIRST_STUDY[0]
    assert "in the archive already" in stays(pulled, quarantined(pulled, stored))[1]
    other = quarantined(pulled, changed(stored, StudyDescription="Other"))
    assert stays(pulled, other)[0] == "conflicting-content"


def test_an_instance_of_another_patient_stays(pulled):
    other = quarantined(pulled, changed(LATE, PatientID="SOMEBODY"), "wrong-patient")
    assert stays(pulled, other) == ("wrong-patient", "it would come back here")


def test_an_instance_under_a_patient_id_that_was_accepted_is_given_back_and_archived(pulled):
    (study,) = [s for s in pulled.studies().values() if s.state is StudyState.FAILED]
    entry = quarantined(pulled, changed(LATE, PatientID="BEFORE"), "wrong-patient")
    with pulled.ledger() as ledger:
        ledger.acceptances.add(
            1, [Acceptance(study.reference, "patient-id-differs", "BEFORE", accepted_by="J. Doe")]
        )
    (answer,) = given(pulled, entry)
    assert answer.trouble is None
    pulled.rerun()
    assert sorted(pulled.reasons()) == [("archived", None)] * 2
    pulled.audit()


def test_an_instance_that_is_no_longer_listed_stays(pulled):
    pulled.pacs.holdings.remove(LATE.sop_instance_uid)
    pulled.rerun()
    assert "archived, whole without it" in stays(pulled, quarantined(pulled, LATE))[1]


def test_an_instance_that_has_rotted_stays(pulled):
    entry = quarantined(pulled, LATE)
    path = Spool(pulled.site.spool.path).quarantine_path(entry.sha256)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert stays(pulled, entry) == ("spool-damaged", "its bytes are not those that arrived")
    path.unlink()
    (answer,) = given(pulled, entry)
    assert answer.trouble.code == "spool-damaged"


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_an_instance_stays_while_a_run_works_on_its_study(place, tmp_path, kind):
    if kind == "postgresql":
        place.change(ledger={"path": None, "url": new_ledger_url(kind, tmp_path)})
    place.pull()
    entry = quarantined(place, LATE)
    with place.ledger() as ledger:
        ledger.cohorts.reopen(1)
        (record,) = ledger.studies.to_pull(1)
        with ledger.runs.begin("pull") as run:
            assert ledger.claims.acquire(run, [record.reference])
            assert stays(place, entry) == ("claim-lost", "a run works on the study")
        # Its end, however it ended, lets go of it.
        assert given(place, entry)[0].trouble is None


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_no_run_takes_a_study_while_something_is_given_back_to_it(place, tmp_path, kind):
    if kind == "postgresql":
        place.change(ledger={"path": None, "url": new_ledger_url(kind, tmp_path)})
    place.pull()
    with place.ledger() as ledger, ledger.runs.begin("pull") as run:
        ledger.cohorts.reopen(1)
        (record,) = ledger.studies.to_pull(1)
        happened: list[str] = []
        begun = threading.Event()

        def take() -> None:
            begun.set()
            assert ledger.claims.acquire(run, [record.reference])
            happened.append("claimed")

        taker = threading.Thread(target=take)

        def give() -> None:
            taker.start()
            assert begun.wait(30)
            # The claim waits for the end of this; with nothing to wait for it would be done.
            taker.join(0.5)
            happened.append("given back")

        ledger.claims.while_unclaimed(record.reference, give)
        taker.join(30)
        assert happened == ["given back", "claimed"]


# --- names and selections


def test_names_stay_the_same_and_any_beginning_of_them_will_do(pulled):
    entries = [quarantined(pulled, each) for each in (LATE, STRANGER)]
    names = [name_of(entry) for entry in entries]
    assert names == [name_of(quarantined(pulled, each)) for each in (LATE, STRANGER)]
    for entry, name in zip(entries, names, strict=True):
        for spelled in (name, name[:8], name.upper(), entry.sha256):
            assert [e.sha256 for e in named(entries, [spelled])] == [entry.sha256]
    assert len(named(entries, [names[0], names[0][:8]])) == 1


def test_a_name_that_fits_none_or_several_is_refused_with_all_its_faults(pulled):
    entries = [quarantined(pulled, LATE)]
    twins = [
        Quarantined(digit * 6 + end * 58, "unexpected", entries[0].since, 1)
        for digit, end in (("a", "0"), ("a", "1"))
    ]
    with pytest.raises(ConfigurationError) as caught:
        named([*entries, *twins], ["aaaaaa", "123456789", "12", ""])
    several, nothing, short, empty = caught.value.faults
    assert "2 instances fit" in several and "no instance fits" in nothing
    assert "at least" in short and "at least" in empty


def test_several_are_given_back_or_deleted_at_once_and_by_reason(pulled, tmp_path):
    command = CommandLine(pulled.folder, tmp_path / "home")
    late = name_of(quarantined(pulled, LATE))
    wrong = name_of(quarantined(pulled, changed(LATE, PatientID="SOMEBODY"), "wrong-patient"))
    quarantined(pulled, STRANGER)

    listed = command("quarantine", "list", "--reason", "wrong-patient", "--json").result
    assert [line["name"] for line in listed] == [wrong]
    ended = command("quarantine", "release", "--all", "--json")
    assert ended.code == Exit.NOT_ALL
    answers = {line["name"]: line for line in ended.result}
    assert [name for name, line in answers.items() if line["released"]] == [late]
    assert answers[wrong]["reason"] == "wrong-patient"

    assert command("quarantine", "drop", "--reason", "wrong-patient", "--yes").code == 0
    assert command("quarantine", "drop", "--all", "--yes").output == "1 instance deleted.\n"
    assert command("quarantine", "list", "--json").result == []
    # Released instances are not in quarantine any more.
    assert len(pulled.spooled()) == 1
    assert pulled.rerun().studies == {StudyState.ARCHIVED: 2}


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["release"], "choose instances"),
        (["drop", "--all", "--reason", "wrong-patient"], "choose instances"),
        (["drop", "abcdef012345", "--all", "--yes"], "choose instances"),
        (["release", "abcdef012345"], "no instance fits this name"),
        (["drop", "--reason", "wrong-patint"], "did you mean wrong-patient?"),
    ],
)
def test_a_selection_that_is_none_touches_nothing(pulled, tmp_path, arguments, hint):
    quarantined(pulled, LATE)
    command = CommandLine(pulled.folder, tmp_path / "home")
    ended = command("quarantine", *arguments)
    assert ended.code == Exit.CONFIGURATION
    assert hint in ended.stderr and "Traceback" not in ended.stderr
    assert len(in_quarantine(pulled.site)) == 1


# --- deleting


def test_nothing_is_deleted_unasked(pulled, tmp_path):
    name = name_of(quarantined(pulled, LATE))
    command = CommandLine(pulled.folder, tmp_path / "home")
    ended = command("quarantine", "drop", name)
    assert ended.code == Exit.CONFIGURATION
    assert "--yes" in ended.stderr
    assert len(in_quarantine(pulled.site)) == 1
    assert command("quarantine", "drop", name, "--yes").code == 0
    assert in_quarantine(pulled.site) == []
    assert list((pulled.site.spool.path / "quarantine").iterdir()) == []


@pytest.mark.parametrize("answer, left", [("y\n", 0), ("\n", 1)])
def test_on_a_terminal_it_asks(pulled, tmp_path, answer, left):
    name = name_of(quarantined(pulled, LATE))
    command = CommandLine(pulled.folder, tmp_path / "home")
    command.home.mkdir()
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect_dicom.cli", "quarantine", "drop", name],
        cwd=pulled.folder,
        env=command.environment({}),
        stdin=its,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    os.close(its)
    os.write(ours, answer.encode())
    output, _ = process.communicate(timeout=60)
    os.close(ours)
    assert b"Delete 1 instance for good?" in output
    assert len(in_quarantine(pulled.site)) == left
    assert process.returncode == (Exit.NOT_ALL if left else Exit.ALL_WELL)


def test_an_empty_selection_by_reason_deletes_nothing_and_is_no_fault(pulled, tmp_path):
    command = CommandLine(pulled.folder, tmp_path / "home")
    ended = command("quarantine", "drop", "--reason", "wrong-patient")
    assert (ended.code, ended.output) == (0, "0 instances deleted.\n")


# --- looking


def identifiers(stored: StoredInstance) -> list[str]:
    return [
        stored.patient_id,
        stored.study_instance_uid,
        stored.series_instance_uid,
        stored.sop_instance_uid,
        stored.attributes["PatientName"],
        stored.attributes["AccessionNumber"],
        stored.attributes["StudyDate"],
    ]


def test_the_list_tells_study_reason_size_time_and_sender_and_nothing_of_the_patient(
    pulled, tmp_path
):
    entry = quarantined(pulled, LATE, ae_title="STORE\x1b[2JSCU")
    command = CommandLine(pulled.folder, tmp_path / "home")
    ended = command("quarantine", "list")
    assert ended.code == 0
    head, line = ended.output.splitlines()
    assert line.split() == [
        name_of(entry),
        "-",
        "not-requested",
        str(entry.size_bytes),
        entry.since.isoformat(timespec="seconds"),
        r"STORE\x1b[2JSCU",
        "at",
        "10.0.0.9",
    ]
    assert head.split()[0] == "name"
    assert "An instance arrived that no request was made for" in ended.stderr
    reported = ended.output + ended.stderr + command("quarantine", "list", "--json").output
    assert [word for word in identifiers(LATE) if word in reported] == []
    assert "\x1b" not in reported
    assert not ended.modules & {"prefect", "pandas", "boto3", "numpy", "pynetdicom"}


def test_an_empty_quarantine_is_said_to_be_empty(pulled, tmp_path):
    ended = CommandLine(pulled.folder, tmp_path / "home")("quarantine", "list")
    assert (ended.code, ended.output) == (0, "")
    assert "The quarantine is empty." in ended.stderr


def test_one_instance_is_shown_by_its_headers_and_its_patient_on_demand_only(pulled, tmp_path):
    entry = quarantined(pulled, LATE)
    command = CommandLine(pulled.folder, tmp_path / "home")
    shown = command("quarantine", "show", name_of(entry))
    assert shown.code == 0
    assert "SOPClass: Secondary Capture Image Storage" in shown.output
    assert "TransferSyntax: Explicit VR Little Endian" in shown.output
    assert "study_state: failed" in shown.output
    assert entry.sha256 in shown.output
    assert [word for word in identifiers(LATE) if word in shown.output] == []

    facts = command("quarantine", "show", name_of(entry), "--json").result
    with pulled.ledger() as ledger:
        assert facts["study"] == ledger.studies.find(LATE.study_instance_uid).reference
    assert not any("UID" in key or "Patient" in key for key in facts)

    known = command("quarantine", "show", name_of(entry), "--with-identifiers", "--json").result
    assert known["PatientID"] == LATE.patient_id
    assert known["StudyInstanceUID"] == LATE.study_instance_uid
    assert known["SeriesInstanceUID"] == LATE.series_instance_uid
    assert known["SOPInstanceUID"] == LATE.sop_instance_uid


def test_what_a_peer_wrote_cannot_move_the_cursor(pulled, tmp_path):
    hostile = changed(STRANGER, PatientID="\x9b2J\rA", Modality="O\x07T", SOPClassUID="1.2.999")
    entry = quarantined(pulled, hostile)
    ended = CommandLine(pulled.folder, tmp_path / "home")(
        "quarantine", "show", name_of(entry), "--with-identifiers"
    )
    assert ended.code == 0
    assert all(c == "\n" or " " <= c <= "~" for c in ended.output)


def test_an_instance_that_is_no_dicom_at_all_is_shown_and_stays(pulled):
    entry = quarantined(pulled, LATE)
    spool = Spool(pulled.site.spool.path)
    garbage = spool.quarantine_path(entry.sha256)
    garbage.write_bytes(b"\xff" * 5000)
    facts = described(pulled.site, entry, with_identifiers=True)
    assert facts["fault"] == "instance-unreadable"
    assert facts["StudyInstanceUID"] is None


@pytest.mark.parametrize("note", [None, b"", b"{", b"[]", b'{"reason": 7, "since": {}}', b"\xff"])
def test_an_instance_whose_note_is_lost_or_cut_is_there_all_the_same(pulled, note):
    entry = quarantined(pulled, LATE)
    path = pulled.site.spool.path / "quarantine" / f"{entry.sha256}.json"
    path.unlink()
    if note is not None:
        path.write_bytes(note)
    (found,) = in_quarantine(pulled.site)
    assert (found.sha256, found.reason, found.study) == (entry.sha256, "unexpected", None)
    assert found.since.tzinfo is not None
    assert given(pulled, found)[0].trouble is None


def test_a_note_without_its_instance_and_other_files_are_not_listed(pulled):
    folder = pulled.site.spool.path / "quarantine"
    (folder / ("a" * 64 + ".json")).write_text("{}")
    (folder / "README.dcm").write_text("")
    assert in_quarantine(pulled.site) == []
    drop(pulled.site, [])
    assert len(list(folder.iterdir())) == 2


@pytest.mark.campaign("rebuild")
def test_thousands_are_listed_at_once_however_large_they_are(pulled, tmp_path, scale):
    folder = pulled.site.spool.path / "quarantine"
    number = scale(1000, 50_000)
    for count in range(number):
        _sparse(folder, f"{count:064x}")
    command = CommandLine(pulled.folder, tmp_path / "home")
    idle = command("status")
    ended = command("quarantine", "list")
    assert len(ended.output.splitlines()) == number + 1
    # A fifth of a millisecond for each, on a machine that does other things as well.
    assert ended.cpu_seconds < idle.cpu_seconds + 1 + number / 1000


def _sparse(folder: Path, sha256: str) -> None:
    with (folder / f"{sha256}.dcm").open("wb") as file:
        file.truncate(2**32)
    note = {"reason": "not-requested", "since": "2026-01-01T00:00:00+00:00"}
    (folder / f"{sha256}.json").write_text(json.dumps(note))


def test_the_ledger_is_only_read(pulled):
    """Its tables are the same before and after: what a release does, it does to the spool."""
    entry = quarantined(pulled, LATE)
    with Ledger.open(f"sqlite:///{pulled.site.ledger.path}") as ledger:
        before = (
            list(ledger.studies.of_cohort(1)),
            ledger.instances.of_study(1),
            ledger.instances.of_study(2),
        )
        assert given(pulled, entry)[0].trouble is None
        described(pulled.site, quarantined(pulled, STRANGER))
        assert (
            list(ledger.studies.of_cohort(1)),
            ledger.instances.of_study(1),
            ledger.instances.of_study(2),
        ) == before
