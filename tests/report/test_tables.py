"""Every row of a cohort ends in exactly one verdict, and the reports agree with the ledger."""

from __future__ import annotations

import csv
from collections import Counter

import pyarrow.parquet
import pytest

from prefect_dicom.core.model import Verdict
from prefect_dicom.core.reasons import REASONS
from prefect_dicom.core.uids import is_safe_key
from prefect_dicom.report import INSTANCES, RESULTS, write_reports
from prefect_dicom.testing import Behaviour
from tests.support.sites import Place, site_around, study

METHODS = ("c-move", "c-get")


BY_UID = study(1, PatientID="0042", AccessionNumber="UID-1")
BY_PATIENT = study(2, PatientID="PAT-2", AccessionNumber="X2", StudyDate="20240305")
SAME_PATIENT = study(3, PatientID="PAT-2", AccessionNumber="X3", StudyDate="20230101")
BY_ACCESSION = study(4, PatientID="PAT-4", AccessionNumber="ACC-4")
OF_ONE_PATIENT = study(5, PatientID="PAT-5", AccessionNumber="SHARED")
OF_ANOTHER = study(6, PatientID="PAT-6", AccessionNumber="SHARED")
FILTERED = study(7, PatientID="PAT-7", AccessionNumber="ACC-7", Modality="OT")
WITHOUT_UID = study(8, PatientID="PAT-8", AccessionNumber="ACC-8", StudyInstanceUID="")
SHORT = study(9, instances=3, PatientID="PAT-9", AccessionNumber="ACC-9")
SILENT = study(10, PatientID="PAT-10", AccessionNumber="ACC-10")
FAULTY = study(11, instances=3, PatientID="PAT-11", AccessionNumber="ACC-11")
STARS = study(12, PatientID="PAT-12", AccessionNumber="ACC-12", StudyInstanceUID="1.2.*")

HELD = [
    *(*BY_UID, *BY_PATIENT, *SAME_PATIENT, *BY_ACCESSION, *OF_ONE_PATIENT, *OF_ANOTHER),
    *(*FILTERED, *WITHOUT_UID, *SHORT, *SILENT, *FAULTY, *STARS),
]

# Row, verdict, reason, studies.
COHORT = [
    ({"StudyInstanceUID": BY_UID[0].study_instance_uid}, "archived", "all-archived", 1),
    ({"PatientID": "PAT-2", "StudyDate": "2024-03-05"}, "archived", "all-archived", 1),
    ({"AccessionNumber": "ACC-4"}, "archived", "all-archived", 1),
    # The same study by other keys, and the same row again.
    ({"PatientID": "PAT-4", "AccessionNumber": "ACC-4"}, "archived", "all-archived", 1),
    ({"AccessionNumber": "ACC-4"}, "archived", "all-archived", 1),
    ({"PatientID": "PAT-2"}, "archived", "all-archived", 2),
    ({"AccessionNumber": "SHARED"}, "ambiguous", "several-patients", 0),
    ({"PatientID": "PAT-5", "AccessionNumber": "SHARED"}, "archived", "all-archived", 1),
    ({"AccessionNumber": "ACC-7", "Modality": "MR"}, "excluded", "excluded-by-filter", 0),
    ({"PatientID": "42"}, "not-found", "no-match", 0),
    ({"PatientID": "pat-2"}, "not-found", "no-match", 0),
    ({"AccessionNumber": "ACC-8"}, "failed", "unsafe-uid", 0),
    ({"AccessionNumber": "ACC-12"}, "failed", "unsafe-uid", 0),
    ({"AccessionNumber": "ACC-9"}, "partial", "instances-missing", 1),
    ({"AccessionNumber": "ACC-10"}, "failed", "nothing-arrived", 1),
    ({"AccessionNumber": "ACC-11"}, "partial", "instances-rejected", 1),
]
SCRIPT = [
    Behaviour("move.drop_instances", instances=1, study=SHORT[0].study_instance_uid),
    Behaviour("move.drop_instances", instances=len(SILENT), study=SILENT[0].study_instance_uid),
    Behaviour("store.truncate", instances=1, keep=0.9, study=FAULTY[0].study_instance_uid),
]


@pytest.fixture(params=METHODS, scope="module")
def place(request, tmp_path_factory) -> Place:
    """A site that has pulled the whole cohort once."""
    with site_around(
        tmp_path_factory.mktemp("site"),
        HELD,
        script=SCRIPT,
        retrieve=request.param,
        validation={"faulty": "leave-out"},
    ) as place:
        place.pull(place.cohort([row for row, *_ in COHORT]))
        yield place


def results(place: Place) -> list[dict[str, str]]:
    with place.ledger() as ledger:
        folder = write_reports(ledger, ledger.cohorts.get("1"), place.folder / "reports")
    with (folder / RESULTS).open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_row_has_the_verdict_and_the_reason_it_should_have(place):
    found = [(str(v.verdict), v.reason, len(v.studies)) for v in place.verdicts()]
    assert found == [(verdict, reason, studies) for _, verdict, reason, studies in COHORT]
    place.audit()


def test_the_verdicts_add_up_to_the_rows(place):
    totals = place.totals()
    assert sum(totals.rows.values()) == len(COHORT)
    assert totals.rows == Counter(Verdict(verdict) for _, verdict, *_ in COHORT)
    assert totals.rows[Verdict.PENDING] == 0
    assert sum(totals.studies.values()) == len(place.studies())
    assert totals.expected == totals.stored + totals.rejected + 1 + len(SILENT)


def test_the_result_table_says_what_the_ledger_says(place):
    rows = results(place)
    assert [
        (int(r["line"]), r["verdict"], r["reason"], int(r["archived_instances"])) for r in rows
    ] == [(v.line, str(v.verdict), v.reason, v.archived_instances) for v in place.verdicts()]
    for row in rows:
        assert row["meaning"] == REASONS[row["reason"]].meaning
        assert row["what_to_do"]


def test_the_instance_tables_name_every_archived_instance_once(place):
    results(place)
    [folder] = (place.folder / "reports").iterdir()
    table = pyarrow.parquet.read_table(folder / f"{INSTANCES}.parquet").to_pylist()
    with (folder / f"{INSTANCES}.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [r["SOPInstanceUID"] for r in table] == [r["SOPInstanceUID"] for r in lines]
    archived = place.archived()
    named = {row["key"]: row for row in table}
    assert len(named) == len(table)
    # What is stored of studies that failed has no manifest, and so is in no table.
    prefixes = {key.removesuffix("manifest.json") for key in archived if "manifest" in key}
    whole = {
        key for key in archived if key.endswith(".dcm") and key.rsplit("/", 2)[0] + "/" in prefixes
    }
    assert set(named) == whole
    for key, row in named.items():
        assert len(archived[key]) == row["size_bytes"]


def test_the_result_table_holds_nothing_of_the_patients(place):
    text = "\n".join(",".join(row.values()) for row in results(place))
    for stored in HELD:
        for keyword in ("PatientID", "PatientName", "AccessionNumber", "StudyInstanceUID"):
            value = stored.attributes.get(keyword, "")
            assert not value or value not in text, keyword


def test_no_request_could_have_meant_more_than_it_should(place):
    unique = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    requests = [request for request in place.pacs.log if request.service != "C-ECHO"]
    for request in requests:
        keys = {keyword: request.keys.get(keyword, "") for keyword in unique}
        if request.service == "C-FIND" and request.level == "STUDY":
            given = [keys["PatientID"], keys["StudyInstanceUID"], request.keys["AccessionNumber"]]
            assert any(given)
            assert all(is_safe_key(value) for value in given if value)
        else:
            # A query names all levels above its own, a retrieve its own level too.
            levels = ("PATIENT", "STUDY", "SERIES", "IMAGE").index(request.level)
            for keyword in unique[1 : levels + (request.service != "C-FIND")]:
                assert keys[keyword], keyword
                assert all(is_safe_key(uid) for uid in keys[keyword].split("\\")), keyword
    assert len(requests) == place.asked_for() > 20


def test_running_it_again_asks_for_nothing_and_changes_no_verdict(place):
    before, verdicts = place.asked_for(), place.verdicts()
    place.pull(place.folder / "cohort.csv")
    assert place.verdicts() == verdicts
    assert place.asked_for() == before


def test_a_rerun_tries_again_only_what_can_be_helped(place):
    place.pacs.script.clear()
    place.rerun()
    verdicts = {v.line: v for v in place.verdicts()}
    healed = {"instances-missing", "nothing-arrived"}
    for line, (_, verdict, reason, _) in enumerate(COHORT, 2):
        expected = "archived" if reason in healed else verdict
        assert str(verdicts[line].verdict) == expected
    place.audit()


@pytest.mark.parametrize(
    "status, reason, requests",
    [
        pytest.param(0x0110, "pacs-failure", (1,), id="its row"),
        # Being short of resources passes: such a row is asked for again at once.
        pytest.param(0xA700, "answers-capped", (1, 2), id="its row, for lack of resources"),
        pytest.param(0x0110, "pacs-failure", (4, 5), id="its instance list"),
        pytest.param(0xA700, "answers-capped", (4, 5), id="its instance list, likewise"),
    ],
)
def test_a_query_that_fails_for_one_study_says_nothing_of_the_others(
    tmp_path, status, reason, requests
):
    """Three queries for the three rows, one for all three lists, one for that of the first."""
    objects = [*study(91), *study(92), *study(93)]
    script = [Behaviour("find.refuse", on_request=n, status=status) for n in requests]
    with site_around(tmp_path, objects, script=script, retrieve="c-get") as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 2, Verdict.FAILED: 1}
        assert reason in {row["reason"] for row in results(place)}
        assert place.rerun().rows == {Verdict.ARCHIVED: 3}


@pytest.mark.parametrize(
    "requests", [(2, 3, 4), (4, 5, 6, 7, 8)], ids=["its row", "its instance list"]
)
def test_a_query_under_which_every_association_is_lost_ends_only_what_asked_it(tmp_path, requests):
    objects = [*study(91), *study(92), *study(93)]
    script = [Behaviour("net.drop_after", on_request=n, answers=0) for n in requests]
    with site_around(tmp_path, objects, script=script, retrieve="c-get") as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 2, Verdict.FAILED: 1}
        assert "association-lost" in {row["reason"] for row in results(place)}
