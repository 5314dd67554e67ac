"""A cohort may be a definition in YAML: windows, filters, exclusions and a maximum per patient.

What a PACS cannot be trusted with is decided on our side, by what it answered; what it does not
tell is decided by nobody, and shown.
"""

from __future__ import annotations

import csv
import random
import time
from datetime import date
from pathlib import Path

import pandas
import pytest

from prefect_dicom.cli import Exit
from prefect_dicom.cohort.bounded_regex import bounded_regex
from prefect_dicom.cohort.definition import cohort_file_digest, read_cohort_file
from prefect_dicom.cohort.filters import (
    age_in_years,
    decode_filters,
    encode_filters,
    judge_series,
    judge_study,
    over_maximum,
    series_text,
    sort_series,
)
from prefect_dicom.core.errors import CohortError
from prefect_dicom.core.model import (
    CohortFilters,
    DateRange,
    Excluded,
    Filter,
    Pattern,
    PerPatient,
    Study,
)
from prefect_dicom.report import write_reports
from prefect_dicom.testing import Behaviour
from prefect_dicom.testing.audit import Auditor
from tests.support.commands import CommandLine
from tests.support.series import series, study_uid
from tests.support.sites import Place, site_around

LIST = "PatientID,Index Date\n0001,2024-01-31\n0002,20240215\n"


@pytest.fixture
def define(tmp_path):
    """Writes a definition, with a list ``patients.csv`` and an exclusion list beside it."""

    def write(text: str, **files: str) -> Path:
        files = {"patients": LIST, "withdrawn": "PatientID\n0002\n"} | files
        for name, content in files.items():
            (tmp_path / f"{name}.csv").write_text(content)
        path = tmp_path / "cohort.yaml"
        path.write_text(text)
        return path

    return write


def faults(path: Path) -> list[str]:
    with pytest.raises(CohortError) as caught:
        read_cohort_file(path)
    return list(caught.value.faults)


# --- what a definition says


def test_a_definition_is_read_with_all_its_keys(define):
    path = define(
        """
        list: patients.csv
        date_window: {around: IndexDate, days_before: 30, days_after: 2}
        exclude: withdrawn.csv
        studies:
          StudyDate: 20240101-20240331
          Modality: [CT, PT]
          StudyDescription: ["*thorax*", {regex: "(?i)low.?dose"}]
          PatientAge: 18-80
          PatientSex: F
          BodyPartExamined: CHEST
        series:
          Modality: CT
          NumberOfSeriesRelatedInstances: {more_than: 40}
          SeriesDescription: {not: ["*localizer*", "*scout*"]}
        most_per_patient: {studies: 1, take: earliest}
        """
    )
    file = read_cohort_file(path)
    assert [(row.line, row.patient_id, row.study_date) for row in file.rows] == [
        (2, "0001", DateRange(date(2024, 1, 1), date(2024, 2, 2))),
        (3, "0002", DateRange(date(2024, 1, 16), date(2024, 2, 17))),
    ]
    assert file.filters == CohortFilters(
        studies=(
            Filter("StudyDate", dates=DateRange(date(2024, 1, 1), date(2024, 3, 31))),
            Filter("ModalitiesInStudy", any_of=(Pattern("CT"), Pattern("PT"))),
            Filter(
                "StudyDescription",
                any_of=(Pattern("*thorax*"), Pattern("(?i)low.?dose", regex=True)),
            ),
            Filter("PatientAge", at_least=18, at_most=80),
            Filter("PatientSex", any_of=(Pattern("F"),)),
        ),
        with_series=(Filter("BodyPartExamined", any_of=(Pattern("CHEST"),)),),
        series=(
            Filter("Modality", any_of=(Pattern("CT"),)),
            Filter("SeriesDescription", none_of=(Pattern("*localizer*"), Pattern("*scout*"))),
            Filter("NumberOfSeriesRelatedInstances", at_least=41),
        ),
        excluded=frozenset({Excluded(patient_id="0002")}),
        per_patient=PerPatient(1, latest=False),
    )
    assert decode_filters(encode_filters(file.filters)) == file.filters


def test_a_definition_without_a_list_is_a_row_for_each_calendar_month(define):
    file = read_cohort_file(define("studies: {StudyDate: 20231115-20240203}"))
    assert [(row.line, row.study_date.first, row.study_date.last) for row in file.rows] == [
        (1, date(2023, 11, 15), date(2023, 11, 30)),
        (2, date(2023, 12, 1), date(2023, 12, 31)),
        (3, date(2024, 1, 1), date(2024, 1, 31)),
        (4, date(2024, 2, 1), date(2024, 2, 3)),
    ]
    assert {row.patient_id for row in file.rows} == {None}


@pytest.mark.parametrize("kind", ["csv", "xlsx", "parquet"])
def test_a_window_lies_around_a_date_of_any_kind_of_list(define, tmp_path, kind):
    path = define(f"list: index.{kind}\ndate_window: {{around: index_date, days_before: 1}}")
    frame = pandas.DataFrame({"PatientID": ["0001"], "Index Date": [date(2024, 3, 1)]})
    if kind == "csv":
        frame.to_csv(tmp_path / "index.csv", index=False)
    elif kind == "xlsx":
        frame.to_excel(tmp_path / "index.xlsx", index=False)
    else:
        frame.to_parquet(tmp_path / "index.parquet")
    (row,) = read_cohort_file(path).rows
    assert row.study_date == DateRange(date(2024, 2, 29), date(2024, 3, 1))


def test_numbers_and_texts_may_be_written_in_several_forms(define):
    filters = read_cohort_file(
        define(
            """
            list: patients.csv
            studies:
              NumberOfStudyRelatedSeries: 3-
              NumberOfStudyRelatedInstances: {at_least: 10, less_than: 100}
              InstitutionName: {is: "*Clinic*", not: {regex: "^Old"}}
              ModalitiesInStudy: {not: [SR, PR]}
            series: {SeriesNumber: 2}
            """
        )
    ).filters
    assert {each.keyword: each for each in (*filters.studies, *filters.series)} == {
        "NumberOfStudyRelatedSeries": Filter("NumberOfStudyRelatedSeries", at_least=3),
        "NumberOfStudyRelatedInstances": Filter(
            "NumberOfStudyRelatedInstances", at_least=10, at_most=99
        ),
        "InstitutionName": Filter(
            "InstitutionName", (Pattern("*Clinic*"),), (Pattern("^Old", regex=True),)
        ),
        "ModalitiesInStudy": Filter("ModalitiesInStudy", none_of=(Pattern("SR"), Pattern("PR"))),
        "SeriesNumber": Filter("SeriesNumber", at_least=2, at_most=2),
    }


def test_an_exclusion_list_may_be_empty_and_there_may_be_several(define):
    path = define("list: patients.csv\nexclude: [withdrawn.csv, more.csv]", more="PatientID\n")
    assert read_cohort_file(path).filters.excluded == {Excluded(patient_id="0002")}


def test_files_are_seen_from_the_definition_and_from_home(define, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "home.csv").write_text("PatientID\n0007\n")
    for name in ("lists/home.csv", "~/lists/home.csv", f"{tmp_path}/lists/home.csv"):
        (row,) = read_cohort_file(define(f"list: {name}")).rows
        assert row.patient_id == "0007"
    reported = faults(define("list: ~nobody-of-this-name/list.csv"))
    assert "list" in reported[0]


# --- its faults


def test_all_faults_are_told_at_once_each_with_its_key_and_those_of_the_lists(define):
    reported = faults(
        define(
            """
            list: patients.csv
            date_window: {around: 5, days_bfore: 30}
            exclude: [withdrawn.csv, 7]
            studies:
              StudyDate: 20240199
              Modality: "C-T"
              Modalities: x
              StudyDescription: {regex: "(a+)+"}
              PatientAge: old
              PatientSex: female
              InstitutionName: {nor: x}
            series:
              NumberOfSeriesRelatedInstances: {more_than: 40, at_least: 2}
              SeriesDescription: []
            most_per_patient: {studies: 0, take: middle}
            color: red
            """,
            patients="PatientID,AccessionNumber\n***,\n,\n0001,\n",
        )
    )
    for place, words in (
        ("date_window.around", "a text"),
        ("date_window.days_bfore", "did you mean `days_before`?"),
        ("exclude", "the path of a list"),
        ("studies.StudyDate", "not a day of the calendar"),
        ("studies.Modality", "codes like CT"),
        ("studies.Modalities", "did you mean `Modality`?"),
        ("studies.StudyDescription", "could take too long"),
        ("studies.PatientAge", "a range like 18-80"),
        ("studies.PatientSex", "M, F or O"),
        ("studies.InstitutionName", "`is` and `not`"),
        ("series.NumberOfSeriesRelatedInstances", "more_than"),
        ("series.SeriesDescription", "at least one text"),
        ("most_per_patient.studies", "from 1 to"),
        ("most_per_patient.take", "latest, earliest"),
        ("color", "known keys here: nodes, every_node, list, date_window"),
        ('list: line 2, column "PatientID"', "wildcard"),
        ("list: line 3", "no key"),
    ):
        (fault,) = [each for each in reported if each.startswith(f"{place}:")]
        assert words in fault
    assert len(reported) == 17


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("series: {Modality: CT}", "studies.StudyDate: expected a range with both ends"),
        ("studies: {StudyDate: 20240101-}", "studies.StudyDate: expected a range with both ends"),
        ("studies: {StudyDate: 10000101-20240101}", "studies.StudyDate: expected at most 200"),
        (
            "studies: {StudyDate: 20240101-20240301}\ndate_window: {around: x}",
            "date_window: expected only together with `list`",
        ),
        ("list: nothing.csv", "list: does not exist"),
        ("list: /dev/zero", "list: is no file but a folder or a device"),
        ("list: .", "list: is no file but a folder or a device"),
        ("list: cohort.yaml", "list: expected a list (CSV, XLSX or Parquet), found a definition"),
        (
            "list: patients.csv\ndate_window: {around: Nothing}",
            "list: line 1: no column has the name",
        ),
        (
            "list: dates.csv\ndate_window: {around: Index}",
            "list: line 1: a window is laid around one column, and another limits",
        ),
        ("list: gap.csv\ndate_window: {around: Index}", "list: line 3: no date to lay the window"),
        (
            "list: patients.csv\nstudies: {Modality: CT, ModalitiesInStudy: CT}",
            "studies: Modality and ModalitiesInStudy mean the same",
        ),
        ("list: [", "line 1, column 8: is not YAML"),
        ("- CT", "expected keys at the outermost level: nodes, every_node, list, date_window"),
        ("list: patients.csv\nlist: other.csv", "list: found twice"),
    ],
)
def test_each_fault_says_what_is_expected(define, text, reported):
    more = {"dates": "PatientID,Index,StudyDate\n1,20240101,\n", "gap": LIST.replace("0215", "")}
    more["gap"] = "PatientID,Index\n1,20240101\n2,\n"
    found = faults(define(text, **more))
    assert [fault for fault in found if fault.startswith(reported)], found


def test_no_fault_repeats_a_value(define):
    secret = "Meier^Hans"
    reported = faults(
        define(
            f"""
            list: "{secret}.csv"
            date_window: {{around: ["{secret}"]}}
            exclude: {{{{"{secret}": 1}}: 2}}
            studies:
              StudyDate: "{secret}"
              StudyDescription: {{is: "{secret}", "regex": 1}}
              PatientSex: "{secret}"
              PatientAge: "{secret}"
              PatientID: "{secret}"
            most_per_patient: {{studies: "{secret}", take: "{secret}"}}
            """
        )
    )
    assert len(reported) >= 8
    assert secret not in "\n".join(reported)


def test_a_definition_is_the_same_cohort_while_its_files_have_the_same_bytes(define, tmp_path):
    text = "list: patients.csv\nexclude: withdrawn.csv\n"
    path = define(text)
    first = cohort_file_digest(path)
    assert cohort_file_digest(define(text, other="PatientID\n")) == first
    changed = {
        cohort_file_digest(define(text + "# later\n")),
        cohort_file_digest(define(text, patients=LIST + "0003,20240101\n")),
        cohort_file_digest(define(text, withdrawn="PatientID\n0001\n")),
    }
    assert len(changed | {first}) == 4


# --- regular expressions


@pytest.mark.parametrize(
    "expression",
    [
        "(a+)+$",
        "(a|aa)*b",
        "(a?){64}b",
        "((a{1,9}){1,9}){1,9}b",
        ".*a.*b.*c.*d.*e",
        "(?=a)b",
        r"(a)\1",
        "(?(1)a|b)",
        "(",
        "a" * 500,
    ],
)
def test_an_expression_that_might_not_end_is_refused(expression):
    with pytest.raises(ValueError, match=r"^(could|looks|is)"):
        bounded_regex(expression)


@pytest.mark.parametrize(
    "expression",
    ["low.?dose", "(?i)thorax|chest", "^CT .*(low|ultra).*dose$", "a.*b.*c", "[a-z]+[a-z]+$"],
)
def test_an_expression_that_is_taken_ends_soon_on_any_text(expression):
    pattern = bounded_regex(expression)
    chance = random.Random(expression)
    texts = ["a" * 64, "ab" * 32, "abcd" * 16, "low" * 21, "a" * 63 + "!"]
    texts += ["".join(chance.choices("abclow CT", k=64)) for _ in range(20)]
    began = time.process_time()
    for text in texts:
        pattern.search(text)
    assert time.process_time() - began < 2


# --- judging answers


def study(**fields) -> Study:
    attributes = fields.pop("attributes", {})
    return Study(study_uid(1), patient_id="0001", attributes=tuple(attributes.items()), **fields)


IS_CT = Filter("ModalitiesInStudy", any_of=(Pattern("CT"),))
NOT_SR = Filter("ModalitiesInStudy", none_of=(Pattern("SR"),))
IN_2024 = Filter("StudyDate", dates=DateRange(date(2024, 1, 1), date(2024, 12, 31)))
THORAX = Filter("StudyDescription", any_of=(Pattern("*thorax*"),))
LOW_DOSE = Filter("StudyDescription", any_of=(Pattern("(?i)low.?dose", regex=True),))
NOT_TEST = Filter("InstitutionName", none_of=(Pattern("*test*"),))
FEMALE = Filter("PatientSex", any_of=(Pattern("F"),))
ADULT = Filter("PatientAge", at_least=18)
MANY = Filter("NumberOfStudyRelatedInstances", at_least=10)


@pytest.mark.parametrize(
    ("wanted", "answer", "judgement"),
    [
        (IS_CT, study(modalities=("SR", "CT")), True),
        (IS_CT, study(modalities=("MR",)), False),
        (IS_CT, study(), None),
        (IS_CT, study(attributes={"ModalitiesInStudy": "PR\\CT"}), True),
        (NOT_SR, study(modalities=("CT",)), True),
        (NOT_SR, study(modalities=("CT", "SR")), False),
        (IN_2024, study(study_date="20240229"), True),
        (IN_2024, study(study_date="2024.02.29"), True),
        (IN_2024, study(study_date="20230228"), False),
        (IN_2024, study(study_date="20240230"), None),
        (IN_2024, study(), None),
        (THORAX, study(study_description="CT Thorax nativ"), True),
        (THORAX, study(study_description="Abdomen"), False),
        # There, and without words; or not answered at all.
        (THORAX, study(attributes={"StudyDescription": ""}), False),
        (THORAX, study(), None),
        (LOW_DOSE, study(study_description="Thorax LOW-DOSE"), True),
        (LOW_DOSE, study(study_description="x" * 65), None),
        (NOT_TEST, study(attributes={"InstitutionName": ""}), True),
        (NOT_TEST, study(attributes={"InstitutionName": "Test site"}), False),
        (NOT_TEST, study(), None),
        (FEMALE, study(attributes={"PatientSex": "F "}), True),
        (FEMALE, study(attributes={"PatientSex": "M"}), False),
        (FEMALE, study(attributes={"PatientSex": ""}), None),
        (ADULT, study(study_date="20240101", attributes={"PatientBirthDate": "20060101"}), True),
        (ADULT, study(study_date="20240101", patient_birth_date="20060102"), False),
        (ADULT, study(attributes={"PatientAge": "018Y"}), True),
        (ADULT, study(attributes={"PatientAge": "017Y", "PatientBirthDate": "19000101"}), False),
        (ADULT, study(study_date="20240101"), None),
        (MANY, study(number_of_instances=10), True),
        (MANY, study(number_of_instances=9), False),
        (MANY, study(), None),
        (MANY, study(attributes={"NumberOfStudyRelatedInstances": "many"}), None),
    ],
)
def test_a_filter_says_yes_or_no_or_that_it_cannot_be_told(wanted, answer, judgement):
    assert judge_study(CohortFilters(studies=(wanted,)), answer) is judgement
    # What is out anyway is out, whatever cannot be told.
    out = frozenset({Excluded(study_instance_uid=study_uid(1))})
    assert judge_study(CohortFilters(studies=(wanted,), excluded=out), answer) is False


@pytest.mark.parametrize(
    ("born", "made", "reported", "years"),
    [
        ("19600229", "20240228", "", 63),
        ("19600229", "20240229", "", 64),
        ("", "20240229", "064Y", 64),
        ("20240301", "20240229", "000D", 0),
        ("1960", "20240229", "024M", 2),
        ("", "", "052W", 0),
        ("", "", "365D", 0),
        ("", "", "64", None),
        ("", "", "", None),
    ],
)
def test_an_age_is_counted_in_birthdays_or_taken_from_the_archive(born, made, reported, years):
    assert age_in_years(born, made, reported) == years


@pytest.mark.parametrize(
    ("excluded", "judgement"),
    [
        (Excluded(patient_id="0002"), True),
        (Excluded(patient_id="0001"), False),
        (Excluded(patient_id="0001", accession_number="A7"), False),
        (Excluded(patient_id="0001", accession_number="A8"), True),
        (Excluded(accession_number="A7"), False),
        (Excluded(study_instance_uid=study_uid(1)), False),
        # It may be the same patient: nobody takes a withdrawn one for another.
        (Excluded(patient_id="1"), None),
        (Excluded(accession_number="a7"), None),
    ],
)
def test_what_is_excluded_is_out_and_what_may_be_is_undecided(excluded, judgement):
    filters = CohortFilters(excluded=frozenset({excluded}))
    assert judge_study(filters, study(accession_number="A7")) is judgement


CT = Filter("Modality", any_of=(Pattern("CT"),))
NO_SCOUT = Filter("SeriesDescription", none_of=(Pattern("*scout*"),))
LONG = Filter("NumberOfSeriesRelatedInstances", at_least=41)
CHEST = Filter("BodyPartExamined", any_of=(Pattern("CHEST"),))


def test_series_are_sorted_by_whether_all_filters_take_them():
    answers = {
        "axial": {
            "Modality": "CT",
            "SeriesDescription": "",
            "NumberOfSeriesRelatedInstances": "41",
        },
        "short": {
            "Modality": "CT",
            "SeriesDescription": "x",
            "NumberOfSeriesRelatedInstances": "40",
        },
        "scout": {"Modality": "CT", "SeriesDescription": "Scout"},
        "report": {"Modality": "SR"},
        "uncounted": {"Modality": "CT", "SeriesDescription": "Axial"},
    }
    chosen = sort_series((CT, NO_SCOUT, LONG), answers)
    assert chosen.wanted == ("axial",)
    assert chosen.unwanted == ("report", "scout", "short")
    assert chosen.undecided == ("uncounted",)


@pytest.mark.parametrize(
    ("parts", "judgement"),
    [(["CHEST", "HEAD"], True), (["HEAD"], False), (["HEAD", None], None), ([], False)],
)
def test_one_series_of_the_body_part_makes_the_study_wanted(parts, judgement):
    answers = {
        str(number): {} if part is None else {"BodyPartExamined": part}
        for number, part in enumerate(parts)
    }
    assert judge_series(CohortFilters(with_series=(CHEST,)), answers) is judgement


def test_the_same_filters_are_the_same_selection_in_words_and_others_are_another():
    one = CohortFilters(series=(CT, Filter("ProtocolName", any_of=(Pattern("a"), Pattern("b")))))
    same = CohortFilters(series=(Filter("ProtocolName", any_of=(Pattern("b"), Pattern("a"))), CT))
    assert series_text(one) == series_text(same) == 'Modality is "CT"; ProtocolName is "a" or "b"'
    others = [
        CohortFilters(),
        CohortFilters(series=(CT,)),
        CohortFilters(series=(CT, Filter("ProtocolName", any_of=(Pattern('a" or "b'),)))),
        CohortFilters(series=(CT, Filter("ProtocolName", none_of=(Pattern("a"), Pattern("b"))))),
        CohortFilters(
            series=(CT, Filter("ProtocolName", any_of=(Pattern("a", True), Pattern("b"))))
        ),
    ]
    assert len({series_text(each) for each in (one, *others)}) == 6


@pytest.mark.parametrize(("latest", "left"), [(True, {1, 4}), (False, {2, 4})])
def test_the_most_of_a_patient_is_taken_by_date_and_then_by_uid(latest, left):
    def made(number: int, day: str, patient: str = "0001") -> tuple[int, Study]:
        return number, Study(study_uid(number), patient_id=patient, study_date=day)

    studies = [
        made(1, "20240101"),
        made(2, "20240202"),
        made(3, "20240115"),
        made(4, ""),
        made(5, "20200101", "0002"),
        made(6, "", ""),
        made(7, "", ""),
    ]
    per_patient = PerPatient(2, latest=latest)
    assert over_maximum(per_patient, studies) == left
    assert over_maximum(per_patient, reversed(studies)) == left


# --- in a run


HELD = [
    *series(1, 1, 2, PatientID="P1", Modality="CT", StudyDate="20240110", PatientSex="F"),
    *series(1, 2, 1, PatientID="P1", Modality="SR", StudyDate="20240110", PatientSex="F"),
    *series(2, 1, 1, PatientID="P1", Modality="CT", StudyDate="20240220", PatientSex="F"),
    *series(3, 1, 1, PatientID="P2", Modality="MR", StudyDate="20240111", PatientSex="F"),
    *series(4, 1, 1, PatientID="P3", Modality="CT", StudyDate="20240112", PatientSex="M"),
    *series(5, 1, 1, PatientID="P4", Modality="CT", StudyDate="20240113", PatientSex="F"),
    *series(6, 1, 1, PatientID="P5", Modality="CT", StudyDate="20240114", PatientSex=""),
]
EVERYBODY = "PatientID\nP1\nP2\nP3\nP4\nP5\nP6\n"


@pytest.fixture
def place(tmp_path):
    with site_around(tmp_path, HELD, retrieve="c-get") as place:
        yield place


def pull(place: Place, text: str, **files: str) -> list[tuple[str, str, int]]:
    """Verdict, reason and number of taken studies of each row."""
    for name, content in files.items():
        (place.folder / f"{name}.csv").write_text(content)
    path = place.folder / "cohort.yaml"
    path.write_text(text)
    place.pull(path)
    with place.ledger() as ledger:
        cohort = ledger.cohorts.all()[0].number
        return [(str(v.verdict), v.reason, len(v.studies)) for v in ledger.rows.verdicts(cohort)]


def whole(place: Place) -> None:
    place.audit()
    assert Auditor(place.site, place.pacs).audit(finished=True) == []


def levels(place: Place) -> list[str]:
    return [request.level for request in place.pacs.requests("C-FIND")]


def test_only_studies_that_pass_every_filter_are_pulled_and_each_row_says_why(place):
    verdicts = pull(
        place,
        """
        list: all.csv
        exclude: withdrawn.csv
        studies: {StudyDate: 20240101-20240131, Modality: CT, PatientSex: F}
        """,
        all=EVERYBODY,
        withdrawn="PatientID\nP4\n",
    )
    assert verdicts == [
        ("archived", "all-archived", 1),
        ("excluded", "excluded-by-filter", 0),
        ("excluded", "excluded-by-filter", 0),
        ("excluded", "excluded-by-filter", 0),
        ("ambiguous", "filter-undecided", 0),
        ("not-found", "no-match", 0),
    ]
    assert [uid for uid in place.studies()] == [study_uid(1)]
    with place.ledger() as ledger:
        (near,) = ledger.rows.near_misses(1, 6)
    assert dict(near.attributes) == {"PatientSex": ""}
    with place.ledger() as ledger:
        folder = write_reports(ledger, ledger.cohorts.all()[0], place.site.reports)
    with (folder / "candidates.csv").open(encoding="utf-8-sig") as file:
        (candidate,) = csv.DictReader(file)
    assert candidate["CandidateOf"] == "6"
    assert candidate["Why"] == "PatientSex is missing, or cannot be compared"
    whole(place)


def test_a_row_with_one_study_that_cannot_be_judged_keeps_the_others_and_says_so(tmp_path):
    script = [Behaviour("find.omit_keys", keys=["ModalitiesInStudy"], study=study_uid(2))]
    with site_around(tmp_path, HELD, script=script, retrieve="c-get") as place:
        verdicts = pull(place, "list: p1.csv\nstudies: {Modality: CT}", p1="PatientID\nP1\n")
        assert verdicts == [("partial", "filter-undecided", 1)]
        with place.ledger() as ledger:
            (near,) = ledger.rows.near_misses(1, 2)
        assert near.study_instance_uid == study_uid(2)


def test_series_are_asked_about_only_where_a_filter_needs_them_and_for_studies_not_out_already(
    place,
):
    pull(place, "list: all.csv\nstudies: {Modality: PT, BodyPartExamined: CHEST}", all=EVERYBODY)
    assert "SERIES" not in levels(place)
    verdicts = pull(
        place, "list: all.csv\nstudies: {BodyPartExamined: HEAD}", all="PatientID\nP2\n"
    )
    assert levels(place).count("SERIES") == 1
    assert verdicts == [("excluded", "excluded-by-filter", 0)]


@pytest.mark.parametrize(("take", "taken"), [("latest", 2), ("earliest", 1)])
def test_no_more_studies_of_a_patient_are_pulled_than_are_wanted(place, take, taken):
    verdicts = pull(
        place,
        f"list: two.csv\nmost_per_patient: {{studies: 1, take: {take}}}",
        two="AccessionNumber\nA1\nA2\nA3\n",
    )
    beyond = ("excluded", "beyond-the-maximum", 0)
    archived = ("archived", "all-archived", 1)
    rows = {1: [archived, beyond, archived], 2: [beyond, archived, archived]}
    assert verdicts == rows[taken]
    assert set(place.studies()) == {study_uid(taken), study_uid(3)}
    assert place.asked_for("C-GET") == 1
    totals = place.totals()
    assert sum(totals.studies.values()) == 2
    whole(place)


def test_the_command_line_tells_all_faults_of_a_definition_before_anything_is_sent(place):
    (place.folder / "chest.yaml").write_text("list: nothing.csv\nseries: {Modalty: CT}\n")
    ended = CommandLine(place.folder, place.folder / "home")("pull", "chest.yaml")
    assert ended.code == Exit.CONFIGURATION
    reported = " ".join(ended.stderr.split())
    assert "list: does not exist" in reported
    assert "did you mean `Modality`?" in reported
    assert place.asked_for() == 0


def test_a_rerun_of_a_finished_definition_asks_for_nothing(place):
    text = "list: all.csv\nstudies: {Modality: CT}\nmost_per_patient: {studies: 1}"
    first = pull(place, text, all=EVERYBODY)
    asked = place.asked_for()
    assert pull(place, text, all=EVERYBODY) == first
    assert place.asked_for() == asked


def test_without_a_list_every_study_of_each_month_is_judged_and_an_empty_month_is_no_failure(
    tmp_path,
):
    held = [
        *HELD,
        *series(7, 1, 1, PatientID="P7", Modality="CT", StudyDate="20240131"),
        *series(8, 1, 1, PatientID="P8", Modality="CT", StudyDate="20240401"),
        *series(9, 1, 1, PatientID="P9", Modality="MR", StudyDate="20240515"),
    ]
    with site_around(tmp_path, held, retrieve="c-get") as place:
        verdicts = pull(
            place, "studies: {StudyDate: 20240110-20240630, Modality: CT, PatientSex: [F, O]}"
        )
        assert verdicts == [
            ("partial", "filter-undecided", 3),
            ("archived", "all-archived", 1),
            ("excluded", "window-empty", 0),
            ("archived", "all-archived", 1),
            ("excluded", "excluded-by-filter", 0),
            ("excluded", "window-empty", 0),
        ]
        assert set(place.studies()) == {study_uid(number) for number in (1, 2, 5, 7, 8)}
        whole(place)


def test_filters_and_a_maximum_hold_where_a_month_is_found_in_parts(tmp_path):
    held = [
        stored
        for number in range(40)
        for stored in series(
            number + 1,
            1,
            PatientID=f"P{number % 4}",
            Modality="CT" if number % 2 else "MR",
            StudyDate=f"202401{1 + number % 28:02d}",
        )
    ]
    script = [Behaviour("find.cap", answers=10, status=0x0000)]
    with site_around(tmp_path, held, script=script, retrieve="c-get") as place:
        text = "studies: {StudyDate: 20240101-20240131, Modality: CT}\n"
        text += "most_per_patient: {studies: 3}"
        assert pull(place, text) == [("archived", "all-archived", 6)]
        truth = {}
        for stored in held:
            if stored.attributes["Modality"] == "CT":
                key = (stored.attributes["StudyDate"], stored.study_instance_uid)
                truth.setdefault(stored.patient_id, []).append(key)
        latest = {
            uid
            for keys in truth.values()
            for _, uid in sorted(keys, key=lambda key: (-int(key[0]), key[1]))[:3]
        }
        assert set(place.studies()) == latest
        whole(place)
