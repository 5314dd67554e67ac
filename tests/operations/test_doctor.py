"""The doctor against real archives: whatever is broken, it is named, with what to do about it.

C-ECHO alone proves little, so each node is asked to find, to list and to send one instance.
"""

from __future__ import annotations

import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from prefect_dicom.config.site import Site, load_site
from prefect_dicom.core.model import CohortRow
from prefect_dicom.network.storage_scp import running_receiver
from prefect_dicom.operations import doctor
from prefect_dicom.operations.doctor import entries_for_the_pacs, examine
from prefect_dicom.operations.findings import Finding
from prefect_dicom.testing import Behaviour
from prefect_dicom.testing.generate import generate_cohort
from prefect_dicom.testing.tiny import tiny_instances
from tests.support import peers
from tests.support.commands import CommandLine
from tests.support.s3_server import S3Server
from tests.support.sites import credentials, site_around


@pytest.fixture
def files(tmp_path) -> list[Path]:
    return generate_cohort(tmp_path / "files", studies=1, instances_per_series=2)


@dataclass
class Clinic:
    """A site file for a real archive, with a receiver's port and AE title of its own."""

    folder: Path
    archive: peers.Peer
    port: int

    @property
    def title(self) -> str:
        return f"DOC{self.port}"

    def write(self, **changes) -> Site:
        node = {
            "host": "127.0.0.1",
            "port": self.archive.port,
            "called_ae_title": self.archive.ae_title,
            "timeouts": {"connect_seconds": 5, "settle_seconds": 0.5},
        }
        receiver = {"ae_title": self.title, "port": self.port, "idle_seconds": 1}
        (self.folder / "store").mkdir(exist_ok=True)
        document = {
            "nodes": {"main": {**node, **changes.pop("node", {})}},
            "receiver": {**receiver, **changes.pop("receiver", {})},
            "archive": {"directory": "store"},
            "spool": {"path": "spool", "reserve_bytes": 0},
            **changes,
        }
        (self.folder / "site.yaml").write_text(yaml.safe_dump(document))
        return load_site(self.folder / "site.yaml")


@pytest.fixture
def clinic(tmp_path, new_archive, files):
    """A function that prepares a filled archive of a kind; the receiver is known to it, or not."""
    clinics: list[Clinic] = []

    def prepare(kind: type[peers.Peer], *, known: bool = True) -> Clinic:
        port = peers.free_port()
        archive = new_archive(kind, {f"DOC{port}": port} if known else {})
        assert archive.load(files).stored
        clinics.append(Clinic(tmp_path, archive, port))
        return clinics[-1]

    yield prepare
    for one in clinics:
        if (lease := running_receiver(load_site(one.folder / "site.yaml"))) is not None:
            lease.stop()
            lease.close()


ARCHIVES = pytest.mark.parametrize("kind", [peers.Orthanc, peers.Dcmqrscp])


def faults(findings: list[Finding]) -> dict[str, str]:
    """What failed, by part and check, and the reason code it was given."""
    return {
        f"{f.part}: {f.check}": re.search(r"\(([a-z-]+)", f.words).group(1)
        for f in findings
        if not f.ok
    }


def last(findings: list[Finding], part: str = "main") -> Finding:
    return [finding for finding in findings if finding.part == part][-1]


# --- all well


@ARCHIVES
@pytest.mark.parametrize("retrieve", ["c-move", "c-get"])
def test_a_set_up_that_works_is_proven_to_its_last_step(clinic, kind, retrieve):
    site = clinic(kind).write(node={"retrieve": retrieve})
    findings = list(examine(site))
    assert faults(findings) == {}
    steps = [finding.check for finding in findings if finding.part == "main"]
    assert steps == ["C-ECHO", "C-FIND", "instance list", f"{retrieve.upper()} of one instance"]
    assert "arrives" in findings[-1].words
    assert ("receiver" in {f.part for f in findings}) is (retrieve == "c-move")
    # What was retrieved for the proof is gone again, and nothing of it was archived.
    left = [path for path in (site.spool.path / "ready").rglob("*") if path.is_file()]
    assert left == [] and not list(site.archive.directory.rglob("*.dcm"))


# --- the PACS


def test_a_pacs_that_is_down_is_found_by_the_first_step(clinic):
    one = clinic(peers.Dcmqrscp)
    site = one.write()
    one.archive.stop()
    assert faults(list(examine(site))) == {"main: C-ECHO": "pacs-refused"}


def test_a_wrong_called_ae_title_is_named(clinic):
    site = clinic(peers.Dcmqrscp).write(node={"called_ae_title": "WRONG"})
    findings = list(examine(site))
    assert faults(findings) == {"main: C-ECHO": "called-ae-title-unknown"}
    assert "case matters" in last(findings).advice


def test_a_pacs_that_echoes_to_strangers_and_aborts_their_queries_lacks_a_permission(clinic):
    site = clinic(peers.Orthanc).write(node={"calling_ae_title": "NOBODY"})
    findings = list(examine(site))
    assert [f.ok for f in findings if f.check == "C-ECHO"] == [True]
    assert faults(findings) == {"main: C-FIND": "not-permitted"}
    assert "our AE title" in last(findings).advice


def test_a_study_that_is_named_and_not_there_is_no_success(clinic):
    site = clinic(peers.Dcmqrscp).write()
    row = CohortRow(0, patient_id="NOBODY-AT-ALL")
    findings = list(examine(site, row=row))
    assert not last(findings).ok and "no such study" in last(findings).words
    assert "NOBODY-AT-ALL" not in str(findings)


def test_an_answer_that_is_not_the_named_study_is_not_tried(tmp_path):
    ignoring = Behaviour("find.ignore_keys", keys=["PatientID"])
    with site_around(tmp_path, tiny_instances(2), script=[ignoring], retrieve="c-get") as place:
        findings = list(examine(place.site, row=CohortRow(0, patient_id="SOMEBODY")))
        assert not last(findings, "pacs").ok
        assert place.pacs.requests("C-GET") == []


HANG_UPS = [
    {"how": "close"},
    {"how": "reset"},
    {"how": "abort"},
    {"how": "abort", "source": 2, "reason": 6},
]


@pytest.mark.parametrize("hang_up", HANG_UPS, ids=lambda one: " ".join(map(str, one.values())))
@pytest.mark.parametrize("retrieve", ["c-get", "c-move"])
def test_a_query_by_date_that_fails_is_a_warning_where_another_is_answered(
    tmp_path, retrieve, hang_up
):
    script = [Behaviour("find.hang_up", keys=["StudyDate"], **hang_up)]
    with site_around(tmp_path, tiny_instances(2), script=script, retrieve=retrieve) as place:
        findings = list(examine(place.site))
        assert faults(findings) == {}
        (warning,) = [f for f in findings if f.check == "C-FIND by date"]
        assert "a query by PatientID is answered" in warning.words
        assert "PACS's log" in warning.advice
        # The retrieval is tried.
        assert last(findings, "pacs").words.startswith("arrives")


@pytest.mark.parametrize("status", [0xA700, 0xA900, 0xC000, 0x0110])
def test_a_query_by_date_that_is_refused_is_a_warning_too(tmp_path, status):
    script = [Behaviour("find.unsupported_key", keys=["StudyDate"], status=status)]
    with site_around(tmp_path, tiny_instances(2), script=script, retrieve="c-get") as place:
        findings = list(examine(place.site))
        assert faults(findings) == {}
        assert last(findings, "pacs").words.startswith("arrives")


@pytest.mark.parametrize("row", [None, CohortRow(0, study_instance_uid="1.2.3")], ids=str)
def test_a_connection_that_ends_at_once_is_no_time_out_of_a_firewall(tmp_path, row):
    keys = ["StudyDate", "PatientID", "StudyInstanceUID"]
    script = [Behaviour("find.hang_up", keys=keys)]
    with site_around(tmp_path, tiny_instances(2), script=script, retrieve="c-get") as place:
        (fault,) = [f for f in examine(place.site, row=row) if not f.ok]
        assert fault.check == "C-FIND" and "(association-lost: " in fault.words
        assert re.search(r", [0-4]\.\d s after the request", fault.words)
        assert "at once" in fault.advice and "look for time-outs" not in fault.advice


def test_a_study_over_which_the_query_fails_is_named_and_another_one_tried(tmp_path):
    script = [Behaviour("find.hang_up", keys=["PatientID"])]
    with site_around(tmp_path, tiny_instances(2), script=script, retrieve="c-get") as place:
        findings = list(examine(place.site, row=CohortRow(0, patient_id="SOMEBODY")))
        assert list(faults(findings)) == ["pacs: C-FIND of the study"]
        assert last(findings, "pacs").words.startswith("arrives")
        assert "SOMEBODY" not in str(findings)


# --- the way back


@ARCHIVES
def test_a_receiver_the_pacs_does_not_know_is_named_with_the_very_line_to_add(
    clinic, kind, tmp_path, prefect_api
):
    one = clinic(_with_printed_lines(kind), known=False)
    one.write()
    command = CommandLine(tmp_path, tmp_path / "home")

    reported = command("doctor", "--json", **prefect_api)
    assert reported.code == 2
    failed = [finding for finding in reported.result["findings"] if not finding["ok"]]
    assert [finding["check"] for finding in failed] == ["C-MOVE of one instance"]
    # Orthanc answers C000 and dcmqrscp A801 (PS3.4 C.4.2.1.5).
    expected = {
        "Orthanc": ("move-destination-failed", "C000"),
        "dcmqrscp": ("move-destination-unknown", "A801"),
    }[kind.program]
    assert all(words in failed[0]["words"] for words in expected)
    assert "our AE title in exact case" in failed[0]["advice"]
    assert "The line to add is below." in failed[0]["advice"]

    printed = command("doctor", **prefect_api)
    assert printed.code == 2 and "1 fault" in printed.output
    product = {"Orthanc": "Orthanc, in", "dcmqrscp": "dcmqrscp, in"}[kind.program]
    after = printed.output[printed.output.index(product) :].splitlines()[1:]
    lines = []
    for line in after:
        if not line.startswith("    "):
            break
        lines.append(line.strip())
    assert any(one.title in line for line in lines)
    entries = {entry["line"] for entry in reported.result["entries"]["main"]}
    assert set(lines) <= entries

    one.archive.stop()
    one.archive.printed = lines
    one.archive.start()
    assert command("doctor", **prefect_api).code == 0


def _with_printed_lines(kind: type[peers.Peer]) -> type[peers.Peer]:
    """The archive, its table of known nodes continued by lines as the doctor prints them."""

    class Continued(kind):
        printed: list[str] = []

        def _command(self) -> list[str]:
            command = super()._command()
            if self.printed and kind is peers.Orthanc:
                file = self.directory / "orthanc.json"
                text = '"DicomModalities": {'
                added = "".join(f"{line},\n" for line in self.printed)
                file.write_text(file.read_text().replace(text, text + added))
                json.loads(file.read_text())
            elif self.printed:
                file = self.directory / "dcmqrscp.cfg"
                added = "\n".join(self.printed)
                file.write_text(
                    file.read_text().replace("HostTable END", f"{added}\nHostTable END")
                )
            return command

    return Continued


def test_a_pacs_that_reports_success_and_sends_nothing_is_not_believed(tmp_path):
    mute = Behaviour("move.success_nothing")
    with site_around(tmp_path, tiny_instances(1), script=[mute]) as place:
        findings = list(examine(place.site))
        assert faults(findings) == {"pacs: C-MOVE of one instance": "nothing-arrived"}
        assert "the port open from the PACS to us" in last(findings, "pacs").advice


def test_a_pacs_that_knows_another_port_of_ours_could_not_send(clinic):
    one = clinic(peers.Orthanc)
    # The entry is right, and the receiver has moved.
    site = one.write(receiver={"port": peers.free_port()})
    found = faults(list(examine(site)))
    assert found == {"main: C-MOVE of one instance": "move-destination-failed"}


def test_a_port_that_is_taken_is_the_receivers_fault_and_c_move_is_not_blamed(tmp_path):
    with site_around(tmp_path, tiny_instances(1)) as place, socket.socket() as other:
        other.bind(("127.0.0.1", place.site.receiver.port))
        other.listen()
        findings = list(examine(place.site))
        assert faults(findings) == {
            "receiver: listens": "receiver-taken",
            "pacs: C-MOVE of one instance": "receiver-unreachable",
        }
        assert place.pacs.requests("C-MOVE") == []


def test_a_receiver_with_other_settings_that_nobody_uses_gives_way(tmp_path):
    with site_around(tmp_path, tiny_instances(1), receiver={"idle_seconds": 600}) as place:
        assert faults(list(examine(place.site))) == {}
        # The user corrects the site file and tries again at once.
        port = peers.free_port()
        place.change(receiver={"port": port})
        place.pacs.destinations[place.site.receiver.ae_title] = ("127.0.0.1", port)
        assert faults(list(examine(place.site))) == {}


def test_a_receiver_that_only_this_host_can_reach_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_route_to", lambda node: ("10.1.2.3", "10.9.9.9"))
    with site_around(tmp_path, tiny_instances(1)) as place:
        findings = list(examine(place.site))
        warning = next(finding for finding in findings if finding.check == "the way back")
        assert warning.ok and "receiver.bind: 10.1.2.3" in warning.advice
        place.change(node={"retrieve": "c-get"})
        assert "the way back" not in {f.check for f in examine(place.site)}


@pytest.mark.parametrize(
    "receiver, node, expected",
    [
        ({}, {}, {"DOC1": "127.0.0.1"}),
        ({"bind": "192.0.2.7"}, {}, {"DOC1": "192.0.2.7"}),
        ({}, {"calling_ae_title": "CALLER"}, {"CALLER": "127.0.0.1", "DOC1": "127.0.0.1"}),
        (
            {"bind": "0.0.0.0", "allowed_senders": ["127.0.0.1"]},
            {},
            # As the PACS on this very host sees us.
            {"DOC1": "127.0.0.1"},
        ),
    ],
)
def test_the_entry_names_us_as_the_pacs_has_to_know_us(tmp_path, receiver, node, expected):
    peer = peers.Dcmqrscp(tmp_path)
    site = Clinic(tmp_path, peer, 1).write(
        node={"calling_ae_title": "DOC1", **node}, receiver=receiver
    )
    lines = [
        json.loads("{" + entry.line + "}")
        for entry in entries_for_the_pacs(site, site.nodes["main"])
        if entry.place.startswith("Orthanc")
    ]
    assert {title: address for line in lines for title, address, _ in line.values()} == expected


# --- our side


def test_a_missing_archive_is_named(tmp_path):
    with site_around(tmp_path, tiny_instances(1), retrieve="c-get") as place:
        (tmp_path / "archive").rmdir()
        findings = list(examine(place.site))
        assert [f.part for f in findings if not f.ok] == ["archive"]
        assert [f.check for f in findings if not f.ok] == ["the directory exists"]
        assert "Create it" in next(f.advice for f in findings if not f.ok)


@pytest.mark.campaign("S3")
@pytest.mark.parametrize(
    ("service", "checks", "advice"),
    [
        (
            {"ignore_conditions": True},
            ["nothing is overwritten (If-None-Match)"],
            "keeps to `If-None-Match: *`",
        ),
        (
            {"ignore_payload_hash": True, "ignore_checksums": True},
            [
                "other bytes than signed are refused",
                "other bytes than signed are refused in parts",
            ],
            "Use another service",
        ),
        (
            {"ignore_part_hash": True},
            ["other bytes than signed are refused in parts"],
            "Use another service",
        ),
    ],
    ids=["ignores conditions", "accepts a wrong checksum", "accepts one in parts"],
)
def test_a_bucket_that_overwrites_or_takes_other_bytes_is_refused(
    tmp_path, monkeypatch, service, checks, advice
):
    with S3Server(**service) as bucket:
        credentials(bucket, monkeypatch)
        with site_around(tmp_path, tiny_instances(1), retrieve="c-get", bucket=bucket) as place:
            refused = [finding for finding in examine(place.site) if not finding.ok]
            assert {finding.part for finding in refused} == {"archive"}
            assert [finding.check for finding in refused] == checks
            assert all(advice in finding.advice for finding in refused)
            # Nothing of the probes is left behind.
            assert bucket.objects == {} and bucket.uploads == {}


def test_a_bucket_that_is_missing_is_named(tmp_path, monkeypatch):
    with S3Server() as bucket:
        credentials(bucket, monkeypatch)
        with site_around(tmp_path, tiny_instances(1), retrieve="c-get", bucket=bucket) as place:
            bucket.remove_bucket()
            (missing,) = [finding for finding in examine(place.site) if not finding.ok]
            assert "archive-missing" in missing.advice


def test_a_spool_that_others_can_read_is_named(tmp_path):
    with site_around(tmp_path, tiny_instances(1), retrieve="c-get") as place:
        place.site.spool.path.mkdir()
        place.site.spool.path.chmod(0o755)
        assert faults(list(examine(place.site)))[
            "spool: is private, writable, above its reserve"
        ] == ("spool-unsafe")
        place.site.spool.path.chmod(0o700)


# --- what it prints


def test_it_prints_no_identifier_of_a_patient_or_study(tmp_path, prefect_api):
    with site_around(tmp_path, tiny_instances(1)) as place:
        (stored,) = place.pacs.holdings
        command = CommandLine(tmp_path, tmp_path / "home")
        uid = stored.study_instance_uid
        ended = command("doctor", "--study", uid, "--patient", stored.patient_id, **prefect_api)
        assert ended.code == 0
        assert "no fault" in ended.output
        for secret in (uid, stored.sop_instance_uid, stored.patient_id, "Tiny"):
            assert secret not in ended.output + ended.stderr
