"""Who is meant by a row: judged by the answers to it alone, whatever was asked before."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
from pydicom.dataset import FileMetaDataset

from prefect_dicom.core.model import CohortRow
from prefect_dicom.discovery.row_query import StudyQueryCapabilities, discover
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.report import write_reports
from prefect_dicom.testing import Behaviour
from prefect_dicom.testing.instances import decoded
from tests.report.test_candidates import lines
from tests.support import peers
from tests.support.sites import Place, site_around, study

PAIR = [
    *study(1, PatientID="000123", AccessionNumber="4711"),
    *study(2, PatientID="000124", AccessionNumber="4712"),
]
MERGED = [
    *study(11, PatientID="NEW123", AccessionNumber="N1", PatientName="Alpha^Anna"),
    *study(12, PatientID="NEW123", AccessionNumber="N2", PatientName="Alpha^Anna"),
    *study(13, PatientID="P2", AccessionNumber="N3"),
    *study(14, PatientID="P3", AccessionNumber="N4"),
]
TWINS = [
    *study(
        21,
        PatientID="12345",
        AccessionNumber="A1",
        PatientName="Alpha^Anna",
        PatientBirthDate="19500101",
        IssuerOfPatientID="NORTH",
    ),
    *study(
        22,
        PatientID="12345",
        AccessionNumber="A1",
        PatientName="Beta^Bert",
        PatientBirthDate="19800202",
        IssuerOfPatientID="SOUTH",
    ),
]
ALIAS = Behaviour("find.alias", asked="OLD123", held=["NEW123"])


@pytest.fixture
def around(tmp_path):
    return partial(site_around, tmp_path, retrieve="c-get")


def outcome(place: Place) -> list[tuple[str, str]]:
    return [(str(v.verdict), v.reason) for v in place.verdicts()]


def candidates(place: Place) -> list[tuple[str, str, str]]:
    with place.ledger() as ledger:
        folder = write_reports(ledger, ledger.cohorts.get("1"), place.folder / "reports")
    table = folder / "candidates.csv"
    return [(r["CandidateOf"], r["PatientID"], r["Why"]) for r in lines(table)]


def patients(*names: str) -> list[dict[str, str]]:
    return [{"PatientID": name} for name in names]


RIGHT = {"PatientID": "000124", "AccessionNumber": "4712"}
WRONG = {"PatientID": "000123", "AccessionNumber": "9999"}


@pytest.mark.parametrize(
    "rows", [[WRONG], [RIGHT, WRONG], [WRONG, RIGHT], [WRONG, WRONG | {"AccessionNumber": "8"}]]
)
def test_a_mistyped_accession_number_is_no_match_in_any_order(around, rows):
    with around(PAIR) as place:
        place.pull(place.cohort(rows))
        expected = {"4712": ("archived", "all-archived")}
        missing = ("not-found", "no-match")
        assert outcome(place) == [expected.get(r["AccessionNumber"], missing) for r in rows]
        wrong = [str(line) for line, row in enumerate(rows, 2) if row is not RIGHT]
        found = [(line, "'000123", "AccessionNumber is another") for line in wrong]
        assert candidates(place) == found


def test_a_mistyped_accession_number_is_no_match_where_the_pacs_ignores_accession_numbers(around):
    script = [Behaviour("find.ignore_keys", keys=["AccessionNumber"])]
    with around(PAIR, script=script) as place:
        place.pull(place.cohort([WRONG]))
        # All studies of the patient are there, each with its number.
        assert outcome(place) == [("not-found", "no-match")]


def test_accession_numbers_that_are_not_told_prove_no_absence(around):
    script = [Behaviour("find.omit_keys", keys=["AccessionNumber"])]
    with around(PAIR, script=script) as place:
        place.pull(place.cohort([WRONG]))
        assert outcome(place) == [("failed", "identifier-missing")]


@pytest.mark.parametrize("order", list(itertools.permutations(("OLD123", "P2", "P3")))[:4])
def test_a_merged_patient_is_known_by_another_number_in_any_order(around, order):
    with around(MERGED, script=[ALIAS]) as place:
        place.pull(place.cohort(patients(*order)))
        by_patient = dict(zip(order, outcome(place), strict=True))
        assert by_patient == {
            "OLD123": ("ambiguous", "known-otherwise"),
            "P2": ("archived", "all-archived"),
            "P3": ("archived", "all-archived"),
        }
        line = str(2 + order.index("OLD123"))
        assert candidates(place) == [(line, "'NEW123", "PatientID is another")] * 2


@pytest.mark.parametrize("rows", [patients("NOBODY", "P2"), patients("P2", "NOBODY")])
def test_a_pacs_that_answers_everything_to_any_number_ignores_the_key(around, rows):
    script = [Behaviour("find.ignore_keys", keys=["PatientID"])]
    with around(MERGED, script=script) as place:
        place.pull(place.cohort(rows))
        assert sorted(outcome(place)) == [("archived", "all-archived"), ("failed", "key-ignored")]
        # Tried once: a number that nobody has is answered too.
        asked = [request.keys.get("PatientID", "") for request in place.pacs.requests("C-FIND")]
        tried = [number for number in asked if number.startswith("NONE")]
        assert len(tried) == 1


def test_a_patient_that_is_merged_in_part_has_its_own_studies_and_candidates(around):
    own = study(15, PatientID="OLD123", AccessionNumber="N5")
    with around([*MERGED, *own], script=[ALIAS]) as place:
        place.pull(place.cohort(patients("OLD123")))
        assert outcome(place) == [("partial", "known-otherwise")]
        assert [why for _, _, why in candidates(place)] == ["PatientID is another"] * 2
        (archived,) = {key.split("/")[1] for key in place.archived()}
        assert archived == own[0].study_instance_uid


@pytest.mark.parametrize("merged", [True, False])
def test_the_other_number_of_a_row_finds_what_is_filed_under_it(around, merged):
    own = study(15, PatientID="OLD123", AccessionNumber="N5")
    with around([*MERGED, *own], script=[ALIAS] if merged else []) as place:
        place.pull(place.cohort([{"PatientID": "OLD123", "OtherPatientID": "NEW123"}]))
        assert outcome(place) == [("archived", "all-archived")]
        assert len(place.studies()) == 3


@pytest.mark.parametrize(
    ("listed", "padding", "why"),
    [
        ("14673792", {"before": "JMS"}, "PatientID has text before it"),
        ("P1", {"after": "^^^NORTH"}, "PatientID has text behind it"),
        ("0017", {"before": "00"}, "PatientID differs in leading zeros"),
    ],
)
def test_text_around_a_number_is_told_of(around, listed, padding, why):
    script = [Behaviour("find.pad_ids", **padding)]
    with around(study(31, PatientID=listed), script=script) as place:
        place.pull(place.cohort(patients(listed)))
        assert outcome(place) == [("not-found", "no-match")]
        assert [each[2] for each in candidates(place)] == [why]


def test_of_a_pacs_that_matches_substrings_only_the_number_itself_is_taken(around):
    held = [o for n, name in enumerate(("5", "15", "51")) for o in study(40 + n, PatientID=name)]
    with around(held, script=[Behaviour("find.substring")]) as place:
        place.pull(place.cohort(patients("5")))
        assert outcome(place) == [("archived", "all-archived")]
        assert [s.study.patient_id for s in place.studies().values()] == ["5"]
        with place.ledger() as ledger:
            assert ledger.rows.near_misses(1, 2) == ()


@pytest.mark.parametrize("omitted", [(), ("IssuerOfPatientID",)])
@pytest.mark.parametrize("row", [{"PatientID": "12345"}, {"AccessionNumber": "A1"}])
def test_two_people_under_one_number_are_asked_about_and_nothing_is_pulled(around, row, omitted):
    script = [Behaviour("find.omit_keys", keys=omitted)]
    with around(TWINS, script=script) as place:
        place.pull(place.cohort([row]))
        assert outcome(place) == [("ambiguous", "several-patients")]
        assert len(candidates(place)) == 2
        assert place.asked_for("C-GET") == 0 and place.archived() == {}


@pytest.mark.parametrize(
    "more",
    [
        {"IssuerOfPatientID": "NORTH"},
        {"Issuer": "north"},
        {"Assigning Authority": "NORTH"},
        {"PatientBirthDate": "1950-01-01"},
        {"PatientName": "ALPHA^ANNA"},
    ],
)
def test_a_column_says_which_of_two_people_is_meant(around, more):
    with around(TWINS) as place:
        place.pull(place.cohort([{"PatientID": "12345", **more}]))
        assert outcome(place) == [("archived", "all-archived")]
        assert [s.study.study_instance_uid for s in place.studies().values()] == [
            TWINS[0].study_instance_uid
        ]


@pytest.mark.parametrize(
    ("first", "second"),
    [("Müller^Jörg", "MUELLER^JOERG"), ("Alpha^Anna", "Gamma^Anna"), ("Alpha^Anna", "Beta^Bert")],
)
def test_one_birth_date_is_one_person(around, first, second):
    held = [
        *study(51, PatientID="7", PatientName=first, PatientBirthDate="19500101"),
        *study(52, PatientID="7", PatientName=second, PatientBirthDate="19500101"),
    ]
    for stored in held:
        assert stored.attributes["PatientBirthDate"]
    with around(held) as place:
        place.pull(place.cohort(patients("7")))
        assert outcome(place) == [("archived", "all-archived")]
        assert len(place.studies()) == 2


@pytest.mark.parametrize(
    ("filter_", "expected"),
    [
        ({"StudyDate": "20240101"}, ("archived", "all-archived")),
        ({"StudyDescription": "*"}, ("ambiguous", "several-patients")),
        ({"StudyDate": "20240101-20240301", "Modality": "CT"}, ("ambiguous", "several-patients")),
        ({"Modality": "CT"}, ("ambiguous", "several-patients")),
        ({"StudyDate": "20240101", "PatientName": "Alpha^Anna"}, ("archived", "all-archived")),
        ({"Modality": "CT", "IssuerOfPatientID": "NORTH"}, ("archived", "all-archived")),
        ({"Modality": "MR", "IssuerOfPatientID": "NORTH"}, ("excluded", "excluded-by-filter")),
        # By an accession number the studies are named already.
        ({"AccessionNumber": "A1", "Modality": "CT"}, ("archived", "all-archived")),
    ],
)
def test_a_modality_that_one_of_two_persons_has_does_not_tell_who_is_meant(
    around, filter_, expected
):
    persons = [
        ({"PatientName": "Alpha^Anna", "PatientBirthDate": "19500101"}, "NORTH", "CT", "20240101"),
        ({"PatientName": "Beta^Bert", "PatientBirthDate": "19800202"}, "SOUTH", "MR", "20240202"),
    ]
    held = [
        stored
        for seed, (person, issuer, modality, day) in enumerate(persons, 41)
        for stored in study(
            seed,
            PatientID="12345",
            AccessionNumber="A1",
            IssuerOfPatientID=issuer,
            Modality=modality,
            StudyDate=day,
            **person,
        )
    ]
    with around(held) as place:
        place.pull(place.cohort([{"PatientID": "12345", **filter_}]))
        assert outcome(place) == [expected]
        if expected[0] == "ambiguous":
            assert len(candidates(place)) == 2


@pytest.mark.parametrize("kind", [peers.Orthanc, peers.Dcmqrscp])
def test_real_archives_tell_two_people_under_one_number_apart(new_archive, tmp_path, kind):
    paths = []
    for number, stored in enumerate(TWINS):
        dataset = decoded(stored.encoded(), stored.transfer_syntax_uid)
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = stored.transfer_syntax_uid
        dataset.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
        paths.append(tmp_path / f"{number}.dcm")
    archive = new_archive(kind)
    archive.load(paths)
    rows = {
        CohortRow(2, "12345"): "several-patients",
        CohortRow(2, accession_number="A1"): "several-patients",
        CohortRow(2, "12345", modality="OT"): "several-patients",
        CohortRow(2, "12345", issuer_of_patient_id="SOUTH"): None,
        CohortRow(2, "12345", patient_name="Beta^Bert"): None,
    }
    with Requestor(archive.node()) as requestor:
        for row, reason in rows.items():
            found = discover(requestor, row, StudyQueryCapabilities())
            assert found.reason == reason
            assert {s.patient_name for s in found.studies} <= {"Beta^Bert"}
