"""`doctor --probe` finds out what a PACS does, harmlessly, and runs go by it.

Each variant of the scripted PACS does one thing otherwise than an honest one, and the capabilities
have to say exactly that and nothing else. Orthanc and dcmqrscp are asked as they are installed.
"""

from __future__ import annotations

import json
import re
import socket
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any

import pydicom
import pytest
import yaml

from prefect_dicom.cli.doctor import doctor
from prefect_dicom.cli.status import status
from prefect_dicom.config.capabilities import (
    NodeCapabilities,
    capabilities_path,
    load_capabilities,
    values_of,
    write_capabilities,
)
from prefect_dicom.config.site import load_site
from prefect_dicom.core.errors import ConfigurationError, PacsError
from prefect_dicom.core.model import CohortRow, InformationModel, Verdict
from prefect_dicom.network.probe import ask
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.network.storage_scp import running_receiver
from prefect_dicom.operations import probe_node as probing
from prefect_dicom.operations import probe_session
from prefect_dicom.operations.probe_node import probe_node
from prefect_dicom.operations.probe_session import MOST_INSTANCES, MOST_REQUESTS
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import open_run
from prefect_dicom.testing import Behaviour, StoredInstance, tiny_instances
from prefect_dicom.testing.generate import generate_cohort
from prefect_dicom.testing.instances import changed
from tests.support import peers
from tests.support.campaign import subset
from tests.support.sites import Place, site_around

pytestmark = pytest.mark.campaign("PACS: capabilities")

NAME = "M\xfcller^J\xf6rg"


def holdings(studies: int = 9, instances: int = 4) -> list[StoredInstance]:
    """Studies with letters in their IDs, one under a name that ASCII lacks."""
    return [
        changed(
            stored,
            PatientID=f"Pat-{number:03d}",
            AccessionNumber=f"Acc{number:05d}",
            PatientName=NAME if number == 4 else f"Tiny^Patient{number}",
        )
        for number, stored in (
            (position // instances, stored)
            for position, stored in enumerate(tiny_instances(studies, instances=instances))
        )
    ]


HELD = holdings()
CT_SYNTAX = "1.2.840.10008.1.2.1"
EXACT = {"match": "matched", "wildcards": True, "case_sensitive": True}
HONEST: dict[str, Any] = {
    "find_models": ["study-root", "patient-root"],
    "levels": ["STUDY", "SERIES", "IMAGE"],
    "relational_queries": False,
    "uid_lists_in_queries": True,
    "uid_lists_above": True,
    "longest_list": 9,
    "study_counts": True,
    "series_counts": True,
    "optional_return_keys": True,
    "keys": {
        "PatientID": EXACT,
        "AccessionNumber": EXACT,
        "StudyDate": {"match": "matched"},
        "PatientName": {"match": "matched", "case_sensitive": False},
        "PatientBirthDate": {"match": "matched"},
        "PatientSex": {"match": "matched"},
        "ModalitiesInStudy": {"match": "matched"},
        "StudyDescription": {"match": "matched", "case_sensitive": True},
    },
    "answer_character_sets": ["ISO_IR 100"],
    "query_character_sets": ["ISO_IR 100", "ISO_IR 192"],
    "move_models": ["study-root", "patient-root"],
    "get_models": ["study-root", "patient-root"],
    "c_move": "works",
    "c_get": "works",
    "get_roles": True,
    "image_level_retrieve": True,
    "uid_lists_in_retrieves": True,
    "originator": True,
    "settle_seconds": 0.0,
    "associations": 4,
    "asynchronous_operations": 1,
}
"""What is to be found of a PACS that does as the standard has it; transfer syntaxes apart."""
ABSENT = object()


class Pause(Event):
    """In place of an event that a script waits for: lets this much time go by."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def wait(self, timeout: float | None = None) -> bool:
        time.sleep(self._seconds)
        return True


@dataclass(frozen=True)
class Variant:
    """A PACS that does something otherwise, and what is found of it otherwise."""

    words: str
    script: Sequence[tuple[str, Mapping[str, Any]]] = ()
    found: Mapping[str, Any] = field(default_factory=dict)
    relational: bool = False
    node: Mapping[str, Any] = field(default_factory=dict)
    row: CohortRow | None = None

    def __str__(self) -> str:
        return self.words


def keys(**capabilities: Any) -> dict[str, Any]:
    return {"keys": {**HONEST["keys"], **capabilities}}


IGNORED, EMPTIES = {"match": "ignored"}, {"match": "empties"}
NO_GET = {"get_roles": ABSENT, "get_transfer_syntaxes": ABSENT}
CUT = {"longest_list": ABSENT, "answer_cap": 5}
IN_ANY_CASE = {**EXACT, "case_sensitive": False}
VARIANTS = [
    Variant("is honest"),
    Variant("answers relational queries", relational=True, found={"relational_queries": True}),
    *(
        Variant(
            f"stops at five answers with {status:04X}",
            [("find.cap", {"answers": 5, "status": status})],
            # Of that many it says the end of each list.
            {**CUT, "answer_cap_status": f"{status:04X}"},
        )
        for status in (0x0000, 0xFE00, 0xB001, 0xA700)
    ),
    Variant(
        "ignores two keys",
        [("find.ignore_keys", {"keys": ["ModalitiesInStudy", "PatientName"]})],
        {
            **keys(ModalitiesInStudy=IGNORED, PatientName=IGNORED),
            "query_character_sets": ABSENT,
        },
    ),
    Variant(
        "finds nothing by a key",
        [("find.unsupported_key", {"keys": ["StudyDescription"]})],
        keys(StudyDescription=EMPTIES),
    ),
    Variant(
        "refuses a key",
        [("find.unsupported_key", {"keys": ["PatientSex"], "status": 0xC000})],
        keys(PatientSex=EMPTIES),
    ),
    Variant(
        "finds nothing when optional keys are to be returned",
        [
            (
                "find.unsupported_key",
                {
                    "keys": ["NumberOfStudyRelatedSeries", "ModalitiesInStudy"],
                    "returned": True,
                },
            )
        ],
        {
            "optional_return_keys": False,
            "study_counts": ABSENT,
            **keys(ModalitiesInStudy=EMPTIES),
        },
    ),
    Variant(
        "tells no counts",
        [("find.counts", {"how": "none"})],
        {"study_counts": False, "series_counts": False},
    ),
    Variant(
        "has no IMAGE level",
        [("find.no_image_level", {})],
        {
            "levels": ["STUDY", "SERIES"],
            **dict.fromkeys(("c_move", "c_get", "image_level_retrieve", "originator"), ABSENT),
            **dict.fromkeys(("uid_lists_in_retrieves", "settle_seconds"), ABSENT),
            **NO_GET,
        },
    ),
    Variant(
        "compares identifiers in any case",
        [("find.case", {})],
        keys(
            PatientID={**IN_ANY_CASE, "wildcards": False},
            AccessionNumber={**IN_ANY_CASE, "wildcards": False},
        ),
    ),
    Variant(
        "takes no lists of UIDs",
        [("find.no_list", {"uids": True}), ("move.no_list", {})],
        {
            "uid_lists_in_queries": False,
            "uid_lists_above": False,
            "uid_lists_in_retrieves": False,
        },
    ),
    Variant(
        "sends whole series only",
        [("move.no_image_level", {})],
        {"image_level_retrieve": False, "uid_lists_in_retrieves": ABSENT},
    ),
    Variant(
        "refuses C-GET by its status",
        [("get.disabled", {"status": 0x0124})],
        {"c_get": "refused"},
    ),
    Variant("aborts a C-GET", [("get.disabled", {"status": None})], {"c_get": "refused"}),
    Variant(
        "does not offer C-GET",
        [("assoc.contexts", {"result": 3, "services": ["C-GET"]})],
        {"c_get": "not-offered", "get_models": [], **NO_GET},
    ),
    Variant(
        "ignores role selection",
        [("assoc.no_roles", {})],
        {"c_get": "refused", "get_roles": False},
    ),
    Variant(
        "does not offer C-MOVE",
        [("assoc.contexts", {"result": 3, "services": ["C-MOVE"]})],
        {
            "c_move": "not-offered",
            "move_models": [],
            **dict.fromkeys(("originator", "settle_seconds", "asynchronous_operations"), ABSENT),
        },
    ),
    Variant(
        "does not know the destination",
        [("move.unknown_destination", {})],
        # C-GET is tried after it, and answered with the same.
        {
            "c_move": "nothing-arrived",
            "c_get": "nothing-arrived",
            **dict.fromkeys(("originator", "settle_seconds", "image_level_retrieve"), ABSENT),
            "uid_lists_in_retrieves": ABSENT,
        },
    ),
    Variant(
        "serves two associations",
        [("assoc.max", {"associations": 2})],
        {"associations": 2},
    ),
    Variant(
        "serves one association",
        [("assoc.max", {"associations": 1})],
        {"associations": 1},
    ),
    Variant("names no originator", [("move.no_originator", {})], {"originator": False}),
    Variant(
        "reports success too early",
        [("move.early_success", {"hold": Pause(0.35), "service": "C-MOVE"})],
        {"settle_seconds": pytest.approx(0.4, abs=0.11)},
    ),
    Variant(
        "declares no character set",
        [("find.charset", {"how": "none"})],
        {
            "answer_character_sets": ["ISO_IR 6"],
            "query_character_sets": ["ISO_IR 192", "ISO_IR 100"],
        },
    ),
    Variant(
        "is asked in the Patient Root",
        node={"information_model": "patient-root"},
        found={
            "levels": ["PATIENT", "STUDY", "SERIES", "IMAGE"],
            **dict.fromkeys(("uid_lists_in_queries", "uid_lists_above"), ABSENT),
            # It lists nothing but the studies of a patient, and takes no pattern above its level.
            **dict.fromkeys(("longest_list", "query_character_sets"), ABSENT),
            **keys(PatientID={**EXACT, "wildcards": False}),
        },
        row=CohortRow(0, patient_id="Pat-003"),
    ),
]
BY_DEFAULT = [v for v in VARIANTS if v.words in ("is honest", "aborts a C-GET")]


@pytest.mark.parametrize("variant", subset(VARIANTS, BY_DEFAULT), ids=str)
def test_exactly_what_a_pacs_does_otherwise_is_found(around, variant):
    script = [Behaviour(knob, **arguments) for knob, arguments in variant.script]
    with around(HELD, script=script, node=variant.node) as place:
        place.pacs.policy.relational = variant.relational
        result = probe_node(place.site, "pacs", variant.row)
        known = values_of(result.capabilities)
        syntaxes = known.pop("get_transfer_syntaxes", None)
        expected = {**HONEST, **{k: v for k, v in variant.found.items() if k != "keys"}}
        expected["keys"] = {
            key: capability
            for key, capability in (variant.found.get("keys") or HONEST["keys"]).items()
            if capability is not ABSENT
        }
        left_out = {key for key, value in expected.items() if value is ABSENT}
        assert known == {k: v for k, v in expected.items() if k not in left_out}
        if variant.found.get("get_transfer_syntaxes") is ABSENT:
            assert syntaxes is None
        elif variant.found.get("get_roles") is not False:
            assert CT_SYNTAX in syntaxes
        was_harmless(place, result)


def was_harmless(place: Place, result) -> None:
    """Few requests, none that could select much, nothing stored, nothing kept."""
    pacs = place.pacs
    asked = [r for r in pacs.log if r.service != "C-CANCEL"]
    # An association that is refused is counted as a request too.
    assert len(asked) <= result.requests <= MOST_REQUESTS
    assert not pacs.requests("C-STORE")
    for request in pacs.requests("C-FIND"):
        exact = [v for k, v in request.keys.items() if v and not set(v) & set("*?")]
        assert exact, "a query that names nothing"
        if any(set(value) & set("*?") for value in request.keys.values()):
            assert request.keys["StudyInstanceUID"]
    for request in (*pacs.requests("C-MOVE"), *pacs.requests("C-GET")):
        named = [v for k, v in request.keys.items() if k.endswith("InstanceUID")]
        assert all(named) and not any(set(value) & set("*?") for value in named)
        assert request.level in ("SERIES", "IMAGE")
        assert len(request.keys.get("SOPInstanceUID", "").split("\\")) <= MOST_INSTANCES
    assert place.spooled() == [] and place.archived() == {}


@pytest.mark.parametrize("held", [0, 1])
def test_of_an_empty_pacs_as_much_is_found_as_can_be(around, held):
    with around(holdings(held, 1)) as place:
        result = probe_node(place.site, "pacs")
        assert result.capabilities.find_models and result.capabilities.associations == 4
        assert (result.capabilities.levels is None) == (held == 0)
        assert ("no study was found" in " ".join(result.notes)) == (held == 0)
        assert result.capabilities.uid_lists_in_queries is None


def test_an_answer_that_is_cut_tells_nothing_of_lists_of_uids(around):
    # Two studies of two series each: both of the two series that are answered are of the first.
    held = [
        changed(stored, SeriesInstanceUID=f"{stored.study_instance_uid}.{number}")
        for number, stored in enumerate(holdings(2, 2))
    ]
    with around(held, script=[Behaviour("find.cap", answers=2, status=0xFE00)]) as place:
        known = probe_node(place.site, "pacs").capabilities
        assert (known.uid_lists_in_queries, known.uid_lists_above) == (True, None)


ADVICE = {
    "no C-GET": (
        {"result": 3, "services": ["C-GET"]},
        {"retrieve": "c-get"},
        ("C-GET came to not-offered: runs ask by C-MOVE; set `retrieve: c-move`",),
    ),
    "no C-MOVE": (
        {"result": 3, "services": ["C-MOVE"]},
        {},
        (
            "C-MOVE came to not-offered: try `prefect-dicom doctor` for the way back, or set "
            "`retrieve: c-get`",
        ),
    ),
}


@pytest.mark.parametrize("name", subset(ADVICE, ["no C-GET"]))
def test_what_a_person_should_change_is_said(around, name):
    arguments, site, notes = ADVICE[name]
    with around(HELD, script=[Behaviour("assoc.contexts", **arguments)], **site) as place:
        assert probe_node(place.site, "pacs").notes == notes


def test_where_queries_are_offered_in_another_model_that_is_said(around, monkeypatch):
    offered = {
        "C-FIND": (InformationModel.PATIENT_ROOT,),
        "C-MOVE": (InformationModel.PATIENT_ROOT,),
        "C-GET": (),
    }
    monkeypatch.setattr(probing, "models_offered", lambda node: offered)
    with around(HELD) as place:
        result = probe_node(place.site, "pacs")
        assert place.pacs.requests("C-FIND") == []
        assert [note.split(": ")[1] for note in result.notes] == [
            "set `information_model",
            "set `information_model",
        ]
        assert result.capabilities.associations == 4 and result.capabilities.levels is None


def test_the_study_that_is_named_is_tried(around):
    with around(HELD) as place:
        probe_node(place.site, "pacs", CohortRow(0, accession_number="Acc00003"))
        wanted = {o.study_instance_uid for o in HELD if o.patient_id == "Pat-003"}
        asked = {r.keys["StudyInstanceUID"] for r in place.pacs.requests("C-MOVE")}
        assert asked == wanted


def test_there_is_an_end_to_it_whatever_the_pacs_does(around, monkeypatch):
    monkeypatch.setattr(probe_session, "MOST_REQUESTS", 15)
    with around(HELD) as place:
        result = probe_node(place.site, "pacs")
        assert result.requests == 15
        assert "requests are enough" in " ".join(result.notes)
        # What was found by then is kept.
        assert result.capabilities.find_models and result.capabilities.associations is None


def test_a_pacs_that_aborts_every_query_is_no_pacs_to_probe(around):
    drop = Behaviour("net.drop_after", answers=0, service="C-FIND")
    with around(HELD, script=[drop]) as place, pytest.raises(PacsError):
        probe_node(place.site, "pacs")
    assert len(place.pacs.requests("C-FIND")) <= 3


def test_no_query_leaves_that_names_nothing(around):
    with around(HELD) as place, Requestor(place.site.nodes["pacs"]) as requestor:
        for keys in ({}, {"PatientID": "*"}, {"StudyInstanceUID": ""}, {"Modality": "CT"}):
            with pytest.raises(ValueError):
                ask(requestor, "STUDY", keys, most=1)
        assert place.pacs.requests("C-FIND") == []


# --- real archives


ORTHANC = {
    **HONEST,
    "levels": ["PATIENT", "STUDY", "SERIES", "IMAGE"],
    "relational_queries": True,
    "longest_list": 4,
}
DCMQRSCP = {
    **HONEST,
    "relational_queries": True,
    "longest_list": 4,
    "study_counts": False,
    "series_counts": False,
    "answer_character_sets": ["ISO_IR 100", "ISO_IR 192", "ISO_IR 6"],
}
REAL = {
    "Orthanc": (peers.Orthanc, {}, ORTHANC),
    "Orthanc with a limit": (
        peers.Orthanc,
        {"LimitFindResults": 2},
        {**ORTHANC, "longest_list": None, "answer_cap": 2, "answer_cap_status": "FE00"},
    ),
    "dcmqrscp": (peers.Dcmqrscp, {}, DCMQRSCP),
    "dcmqrscp without C-GET": (
        peers.Dcmqrscp,
        {"arguments": ["--disable-get"]},
        {**DCMQRSCP, "c_get": "not-offered", "get_models": [], "get_roles": None},
    ),
}
CHANGES = ("answer_character_sets", "query_character_sets", "keys", "uid_lists_above")
"""Depend on what an archive holds, or are compared apart."""


def studies_in(files: Iterable[Path]) -> list[str]:
    tags = ["StudyInstanceUID"]
    uids = [pydicom.dcmread(file, specific_tags=tags).StudyInstanceUID for file in files]
    return list(dict.fromkeys(map(str, uids)))


@pytest.fixture
def clinic(tmp_path, new_archive):
    """A function that builds a site around a real archive with four studies."""
    port = peers.free_port()

    def build(
        kind: type[peers.Peer], settings: Mapping[str, Any], retrieve: str
    ) -> tuple[peers.Peer, list[str]]:
        archive = new_archive(kind, {f"LRN{port}": port}, **settings)
        files = generate_cohort(tmp_path / "files", studies=4, instances_per_series=3)
        # As installed, dcmqrscp takes what is not compressed.
        unsent = archive.load(files).unsent
        held = studies_in(file for file in files if file not in unsent)
        (tmp_path / "store").mkdir()
        site = {
            "nodes": {
                "main": {
                    "host": "127.0.0.1",
                    "port": archive.port,
                    "called_ae_title": archive.ae_title,
                    "retrieve": retrieve,
                    "timeouts": {"settle_seconds": 0.5},
                }
            },
            "receiver": {"ae_title": f"LRN{port}", "port": port, "idle_seconds": 1},
            "archive": {"directory": "store"},
            "spool": {"path": "spool", "reserve_bytes": 0},
        }
        (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
        return archive, held

    yield build
    if (lease := running_receiver(load_site(tmp_path / "site.yaml"))) is not None:
        lease.stop()
        lease.close()


@pytest.mark.parametrize("name", subset(REAL, ["dcmqrscp"]))
def test_the_right_capabilities_of_a_real_pacs_are_found(clinic, tmp_path, name):
    kind, settings, expected = REAL[name]
    archive, held = clinic(kind, settings, "c-move")
    if expected["longest_list"] is not None:
        expected = {**expected, "longest_list": len(held)}
    before = archive.moves()
    result = probe_node(load_site(tmp_path / "site.yaml"), "main")
    known = values_of(result.capabilities)
    assert {k: known.get(k) for k in expected if k not in CHANGES} == {
        k: v for k, v in expected.items() if k not in CHANGES
    }
    # Of two series that are answered, both may be of one study.
    unsure = {None} if name == "Orthanc with a limit" else set()
    assert known.get("uid_lists_above") in {True} | unsure
    assert set(known["answer_character_sets"]) <= set(expected["answer_character_sets"])
    matches = {key: capability["match"] for key, capability in known["keys"].items()}
    ignored = {"ModalitiesInStudy"} if kind is peers.Dcmqrscp else set()
    assert {key for key, match in matches.items() if match == "ignored"} == ignored
    assert "empties" not in matches.values()
    assert known["keys"]["PatientName"]["case_sensitive"] is (kind is peers.Dcmqrscp)
    # It has sent what we say, and no more.
    assert archive.moves() - before == result.instances <= 3 * MOST_INSTANCES


def test_a_pull_from_a_pacs_without_c_get_works_by_its_capabilities(clinic, tmp_path, capsys):
    """Though the site says C-GET, and nobody changes a line by hand."""
    _, held = clinic(peers.Dcmqrscp, {"arguments": ["--disable-get"]}, "c-get")
    file = str(tmp_path / "site.yaml")
    assert doctor(site=file, probe=True, json_=True) == 0
    reported = json.loads(capsys.readouterr().out)["main"]
    assert reported["capabilities"]["c_get"] == "not-offered"
    assert reported["requests"] <= MOST_REQUESTS
    assert reported["file"] == str(capabilities_path(tmp_path, "main"))

    cohort = tmp_path / "cohort.csv"
    cohort.write_text("\n".join(["StudyInstanceUID", *held]))
    site = load_site(file)
    registered = register_cohort(site, cohort, None)
    with open_run(site, registered.number) as pull:
        work_through(pull)
        assert pull.ledger.progress.totals(registered.number).rows == {Verdict.ARCHIVED: len(held)}
    assert status(registered.name, site=file) == 0
    words = "its capabilities say that it refuses C-GET; C-MOVE is used"
    assert f"Note (main): {words}." in capsys.readouterr().out


# --- the file


@pytest.fixture
def learnt_place(around):
    with around(HELD) as place:
        yield place


def test_it_is_written_beside_the_site_and_read_with_it_and_names_no_patient(learnt_place, capsys):
    place = learnt_place
    assert place.site.capabilities["pacs"] == NodeCapabilities()
    assert doctor(site=str(place.file), probe=True) == 0
    path = capabilities_path(place.folder, "pacs")
    printed = capsys.readouterr()
    assert str(path) in printed.out and "answer_character_sets" in printed.out
    known = place.site.capabilities["pacs"]
    assert known == load_capabilities(path) and known.levels
    text = path.read_text()
    assert "It may be edited" in text and "Found by `prefect-dicom doctor --probe` at 20" in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(p.name for p in path.parent.iterdir()) == ["pacs.yaml"]
    secrets = {value for o in HELD for value in (o.patient_id, o.study_instance_uid, NAME)}
    secrets |= {o.attributes["AccessionNumber"] for o in HELD}
    for said in (text, printed.out, printed.err):
        assert not any(secret in said for secret in secrets)
    # Edited by hand, it counts.
    path.write_text(text.replace("associations: 4", "associations: 1"))
    assert place.site.effective_node("pacs").limits.associations == 1
    # Written again, it is whole in the place of the other.
    write_capabilities(path, known, datetime.now(UTC))
    assert place.site.capabilities["pacs"] == known
    assert sorted(p.name for p in path.parent.iterdir()) == ["pacs.yaml"]


def test_a_node_that_cannot_be_asked_is_named_with_its_reason_and_nothing_is_written(
    learnt_place, capsys
):
    place = learnt_place
    place.pacs.close()
    with socket.socket() as nobody:
        # Bound, so that no PACS of another test can have the port, and not listening.
        nobody.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        nobody.bind((place.pacs.host, place.pacs.port))
        assert doctor(site=str(place.file), probe=True) == 2
    printed = capsys.readouterr()
    assert "the probe failed" in printed.out and "(pacs-refused)" in printed.err
    assert not capabilities_path(place.folder, "pacs").exists()


def test_faulty_capabilities_are_refused_with_all_its_faults(tmp_path):
    with site_around(tmp_path, ()) as place:
        path = capabilities_path(tmp_path, "pacs")
        path.parent.mkdir()
        path.write_text(
            "levels: [STUDY, SLICE]\n"
            "relational_queries: 1\n"
            "answer_cap: 0\n"
            "answer_cap_status: 0000\n"
            "c_get: yes\n"
            "association: 3\n"
            "keys:\n  PatientID: {match: sometimes}\n"
            "settle_seconds: -1\n"
        )
        with pytest.raises(ConfigurationError) as caught:
            _ = place.site
        path.unlink()
        assert str(path) in str(caught.value)
        faults = caught.value.faults
        assert len(faults) == 8, faults
        for place_of_fault, words in {
            "levels[1]": "a list of PATIENT, STUDY, SERIES, IMAGE",
            "relational_queries": "expected true or false",
            "answer_cap": "a whole number of at least 1",
            "answer_cap_status": "put it in quotes",
            "c_get": "one of works, refused, not-offered, nothing-arrived",
            "association": "did you mean `associations`?",
            "keys.PatientID.match": "one of matched, ignored, empties",
            "settle_seconds": "at least 0",
        }.items():
            assert any(f.startswith(f"{place_of_fault}: ") and words in f for f in faults), faults


def test_a_site_of_blocks_has_no_place_for_capabilities():
    with pytest.raises(ConfigurationError, match="blocks have none"):
        doctor(site="block:clinic", probe=True)


def test_every_key_is_on_the_page_in_the_words_of_the_file():
    page = Path(__file__).resolve().parents[2] / "docs" / "capabilities.md"
    reported = re.findall(r"^\| `(\w+)` \| (.*?) \| .+ \|$", page.read_text(), re.MULTILINE)
    assert reported == [(name, f.description) for name, f in NodeCapabilities.model_fields.items()]
    for most in (MOST_REQUESTS, probe_session.MOST_ANSWERS):
        assert f"{most:,}" in page.read_text()


# --- what runs make of it


def with_capabilities(place: Place, **known: Any) -> None:
    path = capabilities_path(place.folder, "pacs")
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(values_of(NodeCapabilities(**known))))


def notes_of(place: Place) -> list[str]:
    with place.ledger() as ledger:
        return [words for _, words in ledger.cohorts.notes(1)]


def test_what_is_known_is_not_tried_again(around):
    script = [Behaviour("move.no_image_level"), Behaviour("find.no_list", uids=True)]
    drop = Behaviour("move.drop_instances", instances=2, times=1)
    with around(HELD, script=[*script, drop]) as place:
        with_capabilities(place, image_level_retrieve=False, uid_lists_above=False)
        assert place.pull().rows == {Verdict.ARCHIVED: 9}
        assert "IMAGE" not in {r.level for r in place.pacs.requests("C-MOVE")}
        assert not any("\\" in r.keys["StudyInstanceUID"] for r in place.pacs.requests("C-FIND"))
        assert notes_of(place) == []
        place.audit()


def test_no_more_associations_are_used_than_the_node_serves(around):
    with around(HELD) as place:
        with_capabilities(place, associations=1)
        with place.opened() as pull:
            assert pull.access.admission("pacs").associations == 1


def test_a_pacs_that_answers_no_counts_is_pulled_by_its_capabilities(around):
    with around(HELD, script=[Behaviour("find.counts", how="none")]) as place:
        path = capabilities_path(place.folder, "pacs")
        probed = probe_node(place.site, "pacs").capabilities
        with_capabilities(place, **probed.model_dump(exclude_none=True))
        assert load_capabilities(path).study_counts is False
        assert place.pull().rows == {Verdict.ARCHIVED: 9}
        place.audit()


LONGER = [{"longest_list": 2000}, {"answer_cap": 500}]


@pytest.mark.parametrize("stale", subset(LONGER, 1), ids=str)
def test_a_list_is_not_believed_because_longer_ones_were_whole_when_it_was_probed(around, stale):
    """The PACS's limit may be a lower one by now, and nothing is lost by that."""
    objects = [changed(o, PatientID="Pat-000") for o in tiny_instances(26)]
    cap = Behaviour("find.cap", answers=22, status=0x0000)
    with around(objects, script=[cap]) as place:
        with_capabilities(place, **stale)
        place.pull(place.cohort([{"PatientID": "Pat-000"}]))
        assert len(place.studies()) == 26
        place.audit()


STALE = {
    "levels": Behaviour("find.no_image_level"),
    "uid_lists_in_retrieves": Behaviour("move.no_list"),
    "uid_lists_above": Behaviour("find.no_list", uids=True),
    "c_get": Behaviour("get.disabled", status=0x0124),
}


@pytest.mark.parametrize("key", subset(STALE, ["uid_lists_above"]))
def test_what_a_run_sees_counts_more_than_stale_capabilities_and_is_said_once(around, key, caplog):
    method = "c-get" if key == "c_get" else "c-move"
    with around(HELD, script=[STALE[key]], retrieve=method) as place:
        place.change(node={"limits": {"chunk_studies": 5}})
        reported = {"c_get": "works", "levels": ["STUDY", "SERIES", "IMAGE"]}
        with_capabilities(place, **{key: reported.get(key, True)})
        assert place.pull().rows == {Verdict.ARCHIVED: 9}
        [note] = notes_of(place)
        assert "prefect-dicom doctor --probe" in note
        assert [r.getMessage() for r in caplog.records].count(f"node pacs: {note}") == 1
        place.audit()
