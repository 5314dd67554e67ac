"""A cohort may be asked of several nodes: what one lacks or cannot deliver comes from the next.

A study is archived from one node, against that node's own list, and never from one that has less
of it than another. Two scripted PACS stand for an archive and the VNA behind it.
"""

from __future__ import annotations

import contextlib
import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import pydicom
import pytest
import yaml

from prefect_dicom.cohort.row_matching import Discovery
from prefect_dicom.config.site import load_site
from prefect_dicom.core.errors import CohortError, PacsError, WindowClosed
from prefect_dicom.core.failover import choose_node
from prefect_dicom.core.failpoints import POINTS
from prefect_dicom.core.model import CohortRow, DateRange, Study, Verdict
from prefect_dicom.core.uids import is_uid
from prefect_dicom.discovery.failover import combine_answers, settles
from prefect_dicom.ledger import Ledger
from prefect_dicom.report import RESULTS, format_totals, write_reports
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import open_run
from prefect_dicom.testing import Behaviour, ScriptedPacs, StoredInstance
from prefect_dicom.testing.instances import changed
from tests.support import crashes, peers
from tests.support.campaign import subset
from tests.support.sites import LOOPBACK, study
from tests.support.two_nodes import two_nodes

pytestmark = pytest.mark.campaign("operations")
whole_campaign = pytest.mark.whole_campaign

A, B, C = (
    study(seed, instances=3, PatientID=f"P-{seed}", AccessionNumber=f"ACC-{seed}")
    for seed in (1, 2, 3)
)


def uid(objects: Sequence[StoredInstance]) -> str:
    return objects[0].study_instance_uid


ROWS = [{"StudyInstanceUID": uid(each)} for each in (A, B, C)]
ARCHIVED = ("archived", "all-archived")
OUT_OF_REACH = [Behaviour("assoc.reject", result=1, source=1, reason=7)]
SENDS_NOTHING = [Behaviour("move.refuse", status=0xC000)]


# ---------------------------------------------------------------------- who is asked


def test_a_row_that_one_node_lacks_is_found_on_the_next(tmp_path):
    with two_nodes(tmp_path, [*A, *B], [*B, *C]) as two:
        two.pull(
            {"AccessionNumber": "ACC-1"},
            {"AccessionNumber": "ACC-2"},
            {"AccessionNumber": "ACC-3"},
            {"AccessionNumber": "ACC-4"},
        )
        assert two.words() == [
            (*ARCHIVED, ("main",)),
            (*ARCHIVED, ("main",)),
            (*ARCHIVED, ("vna",)),
            ("not-found", "no-match", ()),
        ]
        assert two.place.manifest(uid(C)).node == "vna"
        # What the first has is not looked for on the second.
        assert len(two.vna.requests("C-FIND")) < len(two.main.requests("C-FIND"))
        assert two.sent(two.vna, B) == 0


@whole_campaign
def test_a_row_whose_study_the_filter_leaves_out_here_may_pass_on_the_next(tmp_path):
    old = [changed(stored, PatientID="P-1", StudyDate="20150304") for stored in B]
    with two_nodes(tmp_path, A, old) as two:
        two.pull({"PatientID": "P-1", "StudyDate": "20150101-20151231"})
        assert two.words() == [(*ARCHIVED, ("vna",))]


def test_one_identifier_of_two_patients_on_two_nodes_is_for_a_person(tmp_path):
    other = [changed(stored, AccessionNumber="ACC-1") for stored in B]
    with two_nodes(tmp_path, A, other) as two:
        (row,) = two.pull({"AccessionNumber": "ACC-1"}, every_node=True)
        assert (row.verdict, row.reason) == (Verdict.AMBIGUOUS, "several-patients")
        with two.place.ledger() as ledger:
            assert len(ledger.rows.near_misses(two.number, row.line)) == 2


@whole_campaign
def test_one_study_under_two_patients_on_two_nodes_is_for_a_person(tmp_path):
    other = [changed(stored, PatientID="P-9") for stored in A]
    with two_nodes(tmp_path, A, other) as two:
        (row,) = two.pull({"StudyInstanceUID": uid(A)}, every_node=True)
        assert (row.verdict, row.reason) == (Verdict.AMBIGUOUS, "several-patients")
        assert two.place.archived() == {}


def test_a_row_is_not_told_to_be_nowhere_while_a_node_was_not_asked(tmp_path):
    with two_nodes(tmp_path, A, [*B, *C], faulty_vna=OUT_OF_REACH) as two:
        two.pull(*ROWS)
        assert [words[:2] for words in two.words()] == [
            ARCHIVED,
            ("pending", "interrupted"),
            ("pending", "interrupted"),
        ]
        two.vna.script.clear()
        two.pull(*ROWS)
        assert [words[2] for words in two.words()] == [("main",), ("vna",), ("vna",)]


@whole_campaign
def test_what_is_found_of_a_patient_while_a_node_was_not_asked_may_not_be_all(tmp_path):
    with two_nodes(tmp_path, A, A, faulty_main=OUT_OF_REACH) as two:
        rows = {"PatientID": "P-1"}, {"PatientID": "P-1", "AccessionNumber": "ACC-1"}
        patient, accession = two.pull(*rows)
        assert (patient.verdict, patient.reason) == (Verdict.PARTIAL, "list-unproved")
        assert patient.gaps == ("node main",)
        assert (accession.verdict, accession.reason) == (Verdict.ARCHIVED, "all-archived")
        two.main.script.clear()
        assert [row.verdict for row in two.pull(*rows)] == [Verdict.ARCHIVED] * 2


# ---------------------------------------------------------------------- from where


def test_a_study_that_is_on_both_comes_once_from_the_one_with_more_of_it(tmp_path):
    with two_nodes(tmp_path, [*A[:2], *B], [*A, *B]) as two:
        rows = [{"StudyInstanceUID": uid(each)} for each in (A, B)]
        two.pull(*rows, every_node=True)
        assert two.words() == [(*ARCHIVED, ("vna",)), (*ARCHIVED, ("main",))]
        assert len(two.place.manifest(uid(A)).instances) == len(A)
        assert (two.sent(two.main, A), two.sent(two.vna, A)) == (0, len(A))
        assert (two.sent(two.main, B), two.sent(two.vna, B)) == (len(B), 0)
        assert two.auditor.audit(finished=True) == []
        assert two.auditor.audit_rerun(lambda: two.pull(*rows, every_node=True)) == []


@pytest.mark.parametrize("retrieve", subset(["c-get", "c-move"], []))
def test_a_study_that_one_node_cannot_send_comes_from_the_next(tmp_path, retrieve):
    faulty = [Behaviour("pacs.corrupt", study=uid(A), instances=3)]
    with two_nodes(tmp_path, [*A, *B], A, faulty_main=faulty, retrieve=retrieve) as two:
        two.pull({"StudyInstanceUID": uid(A)}, {"StudyInstanceUID": uid(B)})
        first, second = two.words()
        assert first[:2] == second[:2] == ARCHIVED
        assert first[2][0].startswith("main: ")
        assert first[2][1] == "vna"
        assert second[2] == ("main",)
        assert two.place.manifest(uid(A)).node == "vna"
        assert two.auditor.audit(finished=True) == []


def test_a_study_of_which_a_part_came_is_asked_for_as_a_whole(tmp_path):
    faulty = [Behaviour("pacs.corrupt", instances=1)]
    with two_nodes(tmp_path, A, A, faulty_main=faulty) as two:
        two.pull({"StudyInstanceUID": uid(A)})
        assert two.words() == [(*ARCHIVED, ("main: instances-missing", "vna"))]
        # All of it was sent by the node that the manifest names.
        assert two.sent(two.vna, A) == len(A)
        assert two.place.manifest(uid(A)).node == "vna"
        assert two.place.quarantined() == []


def test_versions_of_two_nodes_are_never_mixed(tmp_path):
    faulty = [Behaviour("pacs.corrupt", instances=1)]
    coerced = [changed(stored, InstitutionName="VNA") for stored in A]
    with two_nodes(tmp_path, A, coerced, faulty_main=faulty) as two:
        two.pull({"StudyInstanceUID": uid(A)})
        assert two.words() == [(*ARCHIVED, ("main: instances-missing", "vna"))]
        # Every object is the second node's; what the first had sent is kept apart.
        archived = two.place.archived()
        for instance, stored in zip(
            sorted(two.place.manifest(uid(A)).instances, key=lambda i: i.sop_instance_uid),
            sorted(coerced, key=lambda o: o.sop_instance_uid),
            strict=True,
        ):
            assert archived[instance.key].endswith(stored.encoded())
        assert len(two.place.quarantined()) == 2


@whole_campaign
def test_versions_of_two_nodes_are_a_conflict_where_one_was_archived(tmp_path):
    faulty = [Behaviour("pacs.corrupt", instances=1)]
    coerced = [changed(stored, InstitutionName="VNA") for stored in A]
    with two_nodes(tmp_path, A, coerced, faulty_main=faulty) as two:
        # A part of the study is archived by a cohort that has the first node only.
        two.nodes = ("main",)
        two.pull({"StudyInstanceUID": uid(A)})
        two.nodes = ("main", "vna")
        site = two.place.site
        with Ledger.open(f"sqlite:///{site.ledger.path}") as ledger:
            ledger.cohorts.reopen(1)
        two.pull({"StudyInstanceUID": uid(A)})
        ((verdict, reason, nodes),) = two.words()
        assert verdict == "partial"
        assert nodes == ("main: instances-missing", "vna: conflicting-content")
        assert reason == "instances-missing"


def test_less_than_another_node_lists_is_not_archived_as_the_study(tmp_path):
    faulty = [Behaviour("pacs.corrupt", instances=1)]
    with two_nodes(tmp_path, A, A[:2], faulty_main=faulty) as two:
        two.pull({"StudyInstanceUID": uid(A)})
        ((verdict, reason, nodes),) = two.words()
        assert (verdict, reason) == ("failed", "instances-missing")
        assert nodes == ("main: instances-missing", "vna: copy-incomplete")
        two.main.script.clear()
        two.rerun()
        assert two.words() == [(*ARCHIVED, ("main",))]
        assert two.place.manifest(uid(A)).node == "main"


@whole_campaign
def test_less_than_another_node_counts_is_not_archived_either(tmp_path):
    offline = [Behaviour("find.availability", value="OFFLINE")]
    with two_nodes(tmp_path, A, A[:2], faulty_main=offline) as two:
        two.pull({"StudyInstanceUID": uid(A)})
        assert two.words() == [
            ("failed", "study-offline", ("main: study-offline", "vna: copy-incomplete"))
        ]


def test_what_a_node_has_deleted_is_taken_from_the_next_as_that_has_it(tmp_path):
    def delete(pacs: ScriptedPacs) -> None:
        for stored in A:
            pacs.holdings.remove(stored.sop_instance_uid)

    gone = [
        Behaviour("pacs.mutate", change=delete, level="IMAGE", times=1),
        Behaviour("move.success_nothing"),
    ]
    with two_nodes(tmp_path, A, A[:2], faulty_main=gone) as two:
        two.pull({"StudyInstanceUID": uid(A)})
        assert two.words() == [(*ARCHIVED, ("main: study-gone", "vna"))]


@whole_campaign
def test_a_copy_of_another_patients_is_not_taken(tmp_path):
    other = [changed(stored, PatientID="P-9") for stored in A]
    with two_nodes(tmp_path, A, other, faulty_main=SENDS_NOTHING) as two:
        with contextlib.suppress(PacsError):
            two.pull({"StudyInstanceUID": uid(A)})
        ((verdict, _, nodes),) = two.words()
        assert verdict == "failed"
        assert nodes[1] == "vna: several-patients"
        assert two.place.archived() == {}


def test_a_node_that_is_left_alone_does_not_end_the_run(tmp_path):
    with two_nodes(tmp_path, [*A, *B], [*A, *B, *C], faulty_main=OUT_OF_REACH) as two:
        two.pull(*ROWS)
        assert two.words() == [(*ARCHIVED, ("vna",))] * 3
        with two.place.ledger() as ledger:
            ((node, words),) = ledger.cohorts.notes(two.number)
        assert node == "main"
        assert "called-ae-title-unknown" in words


@whole_campaign
def test_a_run_ends_when_all_nodes_are_left_alone(tmp_path):
    with two_nodes(tmp_path, A, A, faulty_main=OUT_OF_REACH, faulty_vna=OUT_OF_REACH) as two:
        with pytest.raises(PacsError, match="called-ae-title-unknown"):
            two.pull(*ROWS)
        assert {words[:2] for words in two.words()} == {("pending", "interrupted")}


@whole_campaign
def test_a_rerun_asks_the_preferred_node_first_again(tmp_path):
    faulty = [Behaviour("move.refuse", status=0xC000)]
    with two_nodes(tmp_path, A, (), faulty_main=faulty) as two:
        with contextlib.suppress(PacsError):
            two.pull({"StudyInstanceUID": uid(A)})
        assert two.words() == [("failed", "pacs-failure", ("main: pacs-failure", "vna: no-match"))]
        two.main.script.clear()
        two.rerun()
        assert two.words() == [(*ARCHIVED, ("vna: no-match", "main"))]


@whole_campaign
def test_who_may_be_asked_now_is_asked_while_anothers_window_is_closed(tmp_path):
    with two_nodes(tmp_path, [*A, *B], A) as two:
        document = yaml.safe_load(two.place.file.read_text())
        never = {"time_zone": "UTC", "windows": [{"days": ["holidays"]}]}
        document["nodes"]["main"]["access_schedule"] = never
        two.place.file.write_text(yaml.safe_dump(document))
        rows = [{"AccessionNumber": f"ACC-{number}"} for number in (2, 1)]
        with pytest.raises(WindowClosed):
            two.pull(*rows)
        assert [(words[0], words[2]) for words in two.words()] == [
            ("pending", ()),
            ("pending", ("vna",)),
        ]
        del document["nodes"]["main"]["access_schedule"]
        two.place.file.write_text(yaml.safe_dump(document))
        two.pull(*rows)
        assert two.words() == [(*ARCHIVED, ("main",)), (*ARCHIVED, ("vna",))]


# ---------------------------------------------------------------------- what is kept


def test_a_cohort_is_its_file_and_its_order_of_nodes(tmp_path):
    with two_nodes(tmp_path, A, A) as two:
        site, path = two.place.site, two.cohort({"StudyInstanceUID": uid(A)})
        orders = [["main"], ["main", "vna"], ["vna", "main"]]
        numbers = [register_cohort(site, path, order).number for order in orders]
        every = register_cohort(site, path, ["main", "vna"], every_node=True)
        assert len({*numbers, every.number}) == 4
        assert [register_cohort(site, path, order).number for order in orders] == numbers
        # Every node of one is the one.
        assert register_cohort(site, path, "main", every_node=True).number == numbers[0]
        with two.place.ledger() as ledger:
            assert ledger.cohorts.get(str(numbers[1])).nodes == ("main", "vna")
            assert {each.number for each in ledger.cohorts.all()} == {*numbers, every.number}


def test_an_order_of_nodes_names_nodes_of_the_site_each_once(tmp_path):
    with two_nodes(tmp_path, A, A) as two:
        path = two.cohort(*ROWS)
        for nodes in (None, [], ["main", "main"], ["main", "elsewhere"]):
            with pytest.raises(CohortError, match="or several in order: main, vna"):
                register_cohort(two.place.site, path, nodes)


def test_a_definition_may_name_its_nodes(tmp_path):
    with two_nodes(tmp_path, A, A) as two:
        two.cohort({"StudyInstanceUID": uid(A)})
        definition = tmp_path / "cohort.yaml"
        definition.write_text("nodes: [vna, main]\nevery_node: true\nlist: cohort.csv\n")
        known = register_cohort(two.place.site, definition, None)
        assert known.order.text == "vna+main"
        assert register_cohort(two.place.site, definition, ["main"]).nodes == ("main",)


@whole_campaign
def test_results_and_the_summary_name_the_nodes(tmp_path):
    with two_nodes(tmp_path, A, [*A, *B]) as two:
        two.pull({"StudyInstanceUID": uid(A)}, {"StudyInstanceUID": uid(B)})
        with two.place.ledger() as ledger:
            folder = write_reports(ledger, ledger.cohorts.get("1"), two.place.site.reports)
            words = format_totals(ledger.progress.totals(1))
        with (folder / RESULTS).open(newline="") as file:
            assert [row["nodes"] for row in csv.DictReader(file)] == ["main", "vna"]
        assert "1 from main, 1 from vna" in words


@whole_campaign
def test_two_orthancs_hold_a_corpus_between_them(tmp_path, new_archive, corpus_small):
    by_study: dict[str, list[Path]] = {}
    for path in corpus_small:
        read = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        by_study.setdefault(str(read.get("StudyInstanceUID", "")), []).append(path)
    # Of the first third all, of the second all but one, of the last nothing.
    main = [
        path
        for number, paths in enumerate(by_study.values())
        if number % 3 < 2
        for path in paths[number % 3 :]
    ]
    nodes = {}
    for name, held in (("main", main), ("vna", corpus_small)):
        archive = new_archive(peers.Orthanc, {})
        archive.load(held)
        nodes[name] = archive
    counts = {n: Counter(held.study for held in nodes[n].instances()) for n in nodes}
    uids = sorted(filter(is_uid, counts["vna"]))
    site = tmp_path / "site.yaml"
    (tmp_path / "archive").mkdir()
    document = {
        "nodes": {
            name: {
                "host": LOOPBACK,
                "port": archive.port,
                "called_ae_title": archive.ae_title,
                "calling_ae_title": peers.US,
                "retrieve": "c-get",
            }
            for name, archive in nodes.items()
        },
        "archive": {"directory": "archive"},
        "spool": {"path": "spool", "reserve_bytes": 0},
        "retry_after_seconds": [],
    }
    site.write_text(yaml.safe_dump(document))
    path = tmp_path / "cohort.csv"
    path.write_text("".join(f"{each}\n" for each in ("StudyInstanceUID", *uids)))
    settings = load_site(site)
    known = register_cohort(settings, path, ["main", "vna"], every_node=True)
    with open_run(settings, known.number) as pull:
        work_through(pull)
        verdicts = list(pull.ledger.rows.verdicts(known.number))
    for each, verdict in zip(uids, verdicts, strict=True):
        main, vna = (counts[name][each] for name in ("main", "vna"))
        if verdict.verdict is Verdict.ARCHIVED:
            assert verdict.archived_instances == verdict.expected_instances == vna
            assert verdict.nodes[-1] == ("main" if main == vna else "vna")
    ends = Counter((v.verdict, v.reason, v.nodes) for v in verdicts)
    # What Orthanc cannot send is for its own tests.
    assert ends[Verdict.ARCHIVED, "all-archived", ("main",)] > 5, ends
    assert ends[Verdict.ARCHIVED, "all-archived", ("vna",)] > 5, ends


# ---------------------------------------------------------------------- however it dies

_POINTS = [point for point in POINTS if "s3" not in point]


@pytest.mark.parametrize("point", subset(_POINTS, ["received-recorded"]))
def test_a_run_that_dies_between_two_nodes_is_gone_on_with(tmp_path, point):
    faulty = [Behaviour("pacs.corrupt", study=uid(A), instances=1)]
    with two_nodes(tmp_path, [*A, *B], [*A, *C], faulty_main=faulty) as two:
        two.cohort(*ROWS)
        definition = tmp_path / "cohort.yaml"
        definition.write_text("nodes: [main, vna]\nlist: cohort.csv\n")
        log = tmp_path / "victim.log"
        for time in (1, 2, 3):
            process = crashes.start(two.place.file, definition, log, f"{point}:kill:{time}")
            crashes.ended([process])
            assert two.auditor.audit() == []
        process = crashes.start(two.place.file, definition, log)
        assert crashes.ended([process]) == [0], log.read_text()
        assert two.auditor.audit(finished=True) == []
        assert [words[0] for words in two.words()] == ["archived"] * 3
        assert two.words()[0][2][-1] == "vna"


# ---------------------------------------------------------------------- what answers mean

FOUND = Discovery((Study("1.2", "P", "A"),))
NOTHING = Discovery(reason="no-match")
JANUARY = CohortRow(1, study_date=DateRange(date(2024, 1, 1), date(2024, 1, 31)))
PATIENT, ACCESSION = CohortRow(2, patient_id="P"), CohortRow(3, accession_number="A")
STUDY = CohortRow(4, study_instance_uid="1.2")


@pytest.mark.parametrize(
    ("row", "answers", "every", "reason", "gaps", "nodes"),
    [
        (ACCESSION, [FOUND], False, None, (), ("main",)),
        (ACCESSION, [NOTHING, FOUND], False, None, (), ("vna",)),
        (ACCESSION, [FOUND, FOUND], True, None, (), ("main", "vna")),
        (ACCESSION, [NOTHING, NOTHING], False, "no-match", (), ()),
        # What is known of no answer is said; nothing is made of one that was not asked for.
        (ACCESSION, ["pacs-failure", NOTHING], False, "pacs-failure", (), ()),
        (ACCESSION, [None, FOUND], False, None, (), ("vna",)),
        (ACCESSION, [None, FOUND], True, "list-unproved", ("node main",), ("vna",)),
        (STUDY, [None, FOUND], True, None, (), ("vna",)),
        (PATIENT, [None, FOUND], False, "list-unproved", ("node main",), ("vna",)),
        (PATIENT, ["pacs-failure", FOUND], False, "list-unproved", ("node main",), ("vna",)),
        (
            PATIENT,
            [Discovery(reason="key-ignored"), FOUND],
            False,
            "list-unproved",
            ("node main",),
            ("vna",),
        ),
        (ACCESSION, [NOTHING, Discovery(reason="key-ignored")], False, "key-ignored", (), ()),
        (
            PATIENT,
            [Discovery(reason="excluded-by-filter"), NOTHING],
            False,
            "excluded-by-filter",
            (),
            (),
        ),
        (
            PATIENT,
            [replace(FOUND, reason="list-unproved", gaps=("20240101",)), NOTHING],
            False,
            "list-unproved",
            ("20240101",),
            ("main",),
        ),
        (
            ACCESSION,
            [FOUND, Discovery((Study("1.3", "Q", "A"),))],
            True,
            "several-patients",
            (),
            (),
        ),
        (JANUARY, [FOUND, Discovery((Study("1.3", "Q"),))], False, None, (), ("main", "vna")),
        (
            JANUARY,
            [
                replace(FOUND, studies=(*FOUND.studies, Study("1.3"))),
                Discovery((Study("1.2", "Q"),)),
            ],
            False,
            "list-unproved",
            ("studies without a UID of their own",),
            ("main",),
        ),
    ],
)
def test_answers_of_several_nodes_are_one_rows_end(row, answers, every, reason, gaps, nodes):
    found = combine_answers(row, list(zip(("main", "vna"), answers, strict=False)), every=every)
    assert (found.reason, tuple(found.gaps), tuple(found.nodes)) == (reason, gaps, nodes)
    assert len(found.studies) == len(nodes)


def test_a_row_stays_open_while_a_node_that_was_not_asked_may_have_it():
    assert combine_answers(ACCESSION, [("main", NOTHING), ("vna", None)]) is None


@pytest.mark.parametrize(
    ("row", "answer", "every", "settled"),
    [
        (ACCESSION, FOUND, False, True),
        (ACCESSION, FOUND, True, False),
        (JANUARY, FOUND, False, False),
        (ACCESSION, NOTHING, False, False),
        (ACCESSION, "pacs-failure", False, False),
        (ACCESSION, None, False, False),
        (ACCESSION, replace(FOUND, reason="list-unproved"), False, False),
        (ACCESSION, Discovery(reason="several-patients"), True, True),
    ],
)
def test_a_row_is_settled_by_the_first_answer_that_is_one(row, answer, every, settled):
    assert settles(row, answer, every=every) is settled


# ---------------------------------------------------------------------- which node


@dataclass
class Known:
    is_found: bool = True
    number_of_instances: int | None = 10
    reason: str | None = None


@pytest.mark.parametrize(
    ("locations", "disabled", "asked"),
    [
        ({}, (), "main"),
        ({"main": Known(), "vna": Known()}, (), "main"),
        ({"main": Known(), "vna": Known(number_of_instances=11)}, (), "vna"),
        # Where one does not count, the order decides.
        ({"main": Known(number_of_instances=None), "vna": Known()}, (), "main"),
        ({"vna": Known()}, (), "vna"),
        ({"vna": Known(reason="pacs-failure")}, (), "main"),
        ({"main": Known(reason="pacs-failure")}, (), "vna"),
        ({"main": Known()}, ("main",), "vna"),
        ({"main": Known(reason="study-gone"), "vna": Known(reason="no-match")}, (), None),
        ({}, ("main", "vna"), None),
    ],
)
def test_the_fullest_location_comes_first_then_the_order_then_who_may_have_it(
    locations, disabled, asked
):
    assert choose_node(["main", "vna"], locations, disabled) == asked
