"""The Python API: what a notebook gets is what the files and the ledger have."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas
import pytest
from prefect import Flow, flow
from prefect.client.orchestration import get_client

import prefect_dicom
from prefect_dicom import CohortError, Interrupted, PrefectDicomError
from prefect_dicom.archive.manifest import decode_manifest
from prefect_dicom.core.model import RequestedState
from prefect_dicom.core.uids import manifest_key
from prefect_dicom.discovery.service import DiscoveryService
from prefect_dicom.ledger.run_control import RunControl
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support.lists import workbook
from tests.support.sites import Place, site_around, study
from tests.support.two_nodes import two_nodes

pytestmark = pytest.mark.timeout(300)

served = pytest.mark.usefixtures("prefect_harness")

PATIENT = "Zyxquordt-7"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A PACS with three CT studies and an MR of two instances each, by C-GET into a directory."""
    held = [
        *study(1, PatientID=PATIENT, AccessionNumber="A1", StudyDate="20240110", Modality="CT"),
        *study(2, PatientID=PATIENT, AccessionNumber="A2", StudyDate="20240210", Modality="CT"),
        *study(3, PatientID="0002", AccessionNumber="A3", StudyDate="20240310", Modality="CT"),
        *study(4, PatientID="0003", AccessionNumber="A4", StudyDate="20240310", Modality="MR"),
    ]
    with site_around(tmp_path, held, retrieve="c-get") as place:
        place.file.write_text(f"{place.file.read_text()}\nretry_after_seconds: []\n")
        yield place


ROWS = [
    {"PatientID": PATIENT, "Modality": "CT", "StudyDate": ""},
    {"PatientID": "0002", "Modality": "CT", "StudyDate": "20240301-20240331"},
    {"PatientID": "0003", "Modality": "MR", "StudyDate": ""},
    {"PatientID": "nobody", "Modality": "MR", "StudyDate": ""},
]


def uids(place: Place) -> dict[str, str]:
    """StudyInstanceUID by AccessionNumber."""
    return {
        stored.attributes["AccessionNumber"]: stored.study_instance_uid
        for stored in place.pacs.holdings
    }


# --- the names


def test_every_public_name_is_there_and_importing_the_package_imports_nothing_heavy():
    heavy = ("prefect", "pandas", "sqlalchemy", "pydantic", "pydicom", "pynetdicom", "boto3")
    program = (
        "import sys, prefect_dicom\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
        "prefect_dicom.find\n"
        "print([name for name in ('prefect', 'pydicom', 'boto3') if name in sys.modules])\n"
        "from prefect_dicom import *\n"
        "print(find.__module__, testing.__name__, DicomSite.__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[0] == "[]"
    assert "prefect'" not in done.stdout.splitlines()[1]
    assert done.stdout.splitlines()[2] == "prefect_dicom.api prefect_dicom.testing DicomSite"
    assert all(getattr(prefect_dicom, name) is not None for name in prefect_dicom.__all__)
    assert set(prefect_dicom.__all__) <= set(dir(prefect_dicom))
    with pytest.raises(AttributeError, match="nothing"):
        _ = prefect_dicom.nothing


# --- reading


def test_a_cohort_file_is_read_by_its_lines(tmp_path):
    path = tmp_path / "cohort.csv"
    path.write_text("MRN;Date;Remark\n\n0001;2024-01-31;x\n0002;20240101-20240331;\n")
    cohort = prefect_dicom.read_cohort(str(path))
    assert cohort.PatientID.to_dict() == {3: "0001", 4: "0002"}
    assert list(cohort.StudyDate) == ["20240131", "20240101-20240331"]
    assert cohort.Modality.isna().all()


def test_faults_of_a_cohort_file_come_all_at_once(tmp_path):
    path = tmp_path / "cohort.csv"
    path.write_text("PatientID,Modality\n*,CT\n0001,CT/MR\n")
    with pytest.raises(CohortError) as raised:
        prefect_dicom.read_cohort(path)
    assert [fault.split(":")[0] for fault in raised.value.faults] == [
        'line 2, column "PatientID"',
        'line 3, column "Modality"',
    ]


def test_what_is_not_taken_of_a_cohort_file_is_noted_with_its_frame(tmp_path):
    path = workbook(tmp_path / "cohort.xlsx", [["MRN", "Ward"], ["1", "A"], ["2", "B"]])
    assert prefect_dicom.read_cohort(path).attrs["notes"] == ['columns that are ignored: "Ward"']
    workbook(path, [["MRN"], ["1"], ["2"]], hidden={3: {"hidden": True}})
    with pytest.raises(CohortError, match="1 of 2 rows are hidden"):
        prefect_dicom.read_cohort(path)
    taken = prefect_dicom.read_cohort(path, hidden_rows="take")
    assert list(taken.PatientID) == ["1", "2"]
    left = prefect_dicom.read_cohort(path, hidden_rows="leave-out")
    assert list(left.PatientID) == ["1"]
    assert left.attrs["notes"] == ["1 of 2 rows are hidden and were left out"]
    with pytest.raises(CohortError, match="hidden_rows: expected take or leave-out"):
        prefect_dicom.read_cohort(path, hidden_rows="perhaps")


def test_a_definition_is_not_read_as_a_list(tmp_path):
    path = tmp_path / "chest.yaml"
    path.write_text("studies:\n  StudyDate: 20240101-20240131\n")
    with pytest.raises(CohortError, match="give its path to find or pull"):
        prefect_dicom.read_cohort(path)


# --- finding


def test_found_studies_are_those_of_the_pacs_and_nothing_is_retrieved(place):
    found = prefect_dicom.find(str(place.file), place.cohort(ROWS))
    by_number = uids(place)
    assert list(found.line) == [2, 2, 3, 4, 5]
    assert list(found.StudyInstanceUID[:4]) == [by_number[f"A{n}"] for n in (1, 2, 3, 4)]
    assert list(found.AccessionNumber[:4]) == ["A1", "A2", "A3", "A4"]
    assert list(found.PatientID[:4]) == [PATIENT, PATIENT, "0002", "0003"]
    assert list(found.StudyDate[:4]) == ["20240110", "20240210", "20240310", "20240310"]
    assert list(found.ModalitiesInStudy[:4]) == ["CT", "CT", "CT", "MR"]
    assert list(found.NumberOfStudyRelatedInstances[:4]) == [2] * 4
    assert list(found.node[:4]) == ["pacs"] * 4
    last = found.iloc[4]
    assert (last.verdict, last.reason) == ("not-found", "no-match")
    assert last[["study", "StudyInstanceUID", "PatientID", "node"]].isna().all()
    with place.ledger() as ledger:
        known = {s.reference: s.study.study_instance_uid for s in ledger.studies.of_cohort(1)}
    assert dict(zip(found.study[:4], found.StudyInstanceUID[:4], strict=True)) == known
    assert {request.service for request in place.pacs.log} == {"C-FIND"}
    assert list((place.folder / "archive").iterdir()) == []


def test_faulty_lines_of_a_file_are_set_apart_and_notes_on_a_frame_are_kept(place):
    path = place.cohort([*ROWS[1:2], {"PatientID": "4711.0", "Modality": "", "StudyDate": ""}])
    with pytest.raises(CohortError, match="line 3"):
        prefect_dicom.find(place.file, path)
    found = prefect_dicom.find(place.file, path, faulty_lines="set-apart")
    assert list(found.verdict) == ["pending", "faulty"]
    with pytest.raises(CohortError, match="faulty_lines: expected refuse or set-apart"):
        prefect_dicom.find(place.file, path, faulty_lines="perhaps")
    frame = pandas.DataFrame({"PatientID": ["0003"], "Ward": ["A"]})
    prefect_dicom.find(place.file, frame)
    with place.ledger() as ledger:
        [(_, words)] = ledger.cohorts.notes(2)
    assert words == 'columns that are ignored: "Ward"'


def test_what_was_found_is_not_asked_for_again(place):
    first = prefect_dicom.find(place.file, place.cohort(ROWS))
    asked = place.asked_for()
    pandas.testing.assert_frame_equal(prefect_dicom.find(place.file, place.cohort(ROWS)), first)
    assert place.asked_for() == asked
    place.pull(place.cohort(ROWS))
    queries = [r for r in place.pacs.requests("C-FIND") if r.level == "STUDY"]
    assert len(queries) == asked
    again = prefect_dicom.find(place.file, place.cohort(ROWS))
    assert list(again.verdict) == ["archived"] * 4 + ["not-found"]


def test_a_single_row_may_be_a_mapping_and_a_site_an_object(place):
    row = {"PatientID": PATIENT, "StudyDate": "20240201-20240229"}
    found = prefect_dicom.find(place.site, row)
    assert list(found.AccessionNumber) == ["A2"]
    (written,) = (place.site.reports / "lists").iterdir()
    assert written.stat().st_mode & 0o777 == 0o600
    assert written.read_text() == f"PatientID,StudyDate\n{PATIENT},20240201-20240229\n"
    with place.ledger() as ledger:
        assert ledger.cohorts.get("1").digest.startswith(written.stem)


def test_a_row_that_was_not_asked_for_is_pending(place):
    opens = datetime.now(UTC) + timedelta(hours=3)
    hours = f"{opens:%H:%M}-{opens + timedelta(hours=2):%H:%M}"
    schedule = {"time_zone": "UTC", "on_close": "stop", "windows": [{"hours": hours}]}
    place.change(node={"access_schedule": schedule})
    found = prefect_dicom.find(place.file, {"PatientID": PATIENT})
    assert (list(found.verdict), list(found.study.isna())) == (["pending"], [True])
    assert place.asked_for() == 0


def test_what_stops_a_search_is_raised_and_the_next_one_goes_on(place):
    place.pacs.script.append(Behaviour("find.refuse", status=0x0124))
    with pytest.raises(PrefectDicomError) as raised:
        prefect_dicom.find(place.file, place.cohort(ROWS))
    assert raised.value.code != "unexpected"
    place.pacs.script.clear()
    assert len(prefect_dicom.find(place.file, place.cohort(ROWS))) == 5


def test_a_search_that_is_cancelled_is_interrupted(place, monkeypatch):
    monkeypatch.setattr(RunControl, "requested_state", lambda self, run: RequestedState.CANCELLED)
    with pytest.raises(Interrupted):
        prefect_dicom.find(place.file, {"PatientID": PATIENT})


def test_an_unexpected_error_lets_no_patient_out(place, monkeypatch):
    def fail(self, first, last):
        raise ValueError(PATIENT)

    monkeypatch.setattr(DiscoveryService, "discover", fail)
    with pytest.raises(PrefectDicomError) as raised:
        prefect_dicom.find(place.file, {"PatientID": PATIENT})
    assert str(raised.value) == "unexpected: ValueError"


@pytest.mark.parametrize("call", [prefect_dicom.find, prefect_dicom.pull])
def test_nothing_is_sent_for_a_faulty_frame(place, call):
    frame = pandas.DataFrame({"PatientID": ["1", "***"], "Modality": ["CT", "CT/MR"]})
    with pytest.raises(CohortError) as raised:
        call(place.file, frame)
    assert [fault.split(":")[0] for fault in raised.value.faults] == [
        'line 3, column "PatientID"',
        'line 3, column "Modality"',
    ]
    assert place.asked_for() == 0
    assert not (place.site.reports / "lists").exists()
    with pytest.raises(CohortError, match="does not exist"):
        call(place.file, place.folder / "missing.csv")
    with pytest.raises(CohortError, match="name one of the site's nodes"):
        call(place.file, {"PatientID": "1"}, node="other")
    with pytest.raises(prefect_dicom.ConfigurationError):
        call(place.folder / "other.yaml", {"PatientID": "1"})


# --- pulling


@served
def test_the_frames_of_a_pull_are_those_of_its_files_and_of_the_ledger(place):
    result = prefect_dicom.pull(place.file, place.cohort(ROWS), name="mine")
    assert (result.cohort, result.number, result.is_complete) == ("mine", 1, False)
    assert result.reports == place.site.reports / "mine"
    assert result.summary.startswith("4 rows: 3 archived, 1 not-found; 4 of 4 studies")

    written = pandas.read_csv(result.reports / "results.csv", dtype="string")
    pandas.testing.assert_frame_equal(result.rows.astype("string"), written)
    assert list(result.rows.line) == [2, 3, 4, 5]
    assert list(result.rows.verdict) == ["archived"] * 3 + ["not-found"]

    written = pandas.read_parquet(result.reports / "instances.parquet")
    assert list(result.instances.columns) == list(written.columns)
    assert result.instances.to_dict("list") == written.astype("object").where(
        written.notna(), pandas.NA
    ).to_dict("list")
    assert len(result.instances) == 8

    assert dict(zip(result.studies.StudyInstanceUID, result.studies.study, strict=True)) == {
        uid: record.reference for uid, record in place.studies().items()
    }
    archived = place.archived()
    for one in result.studies.itertuples():
        assert (one.state, one.node, one.evidence) == ("archived", "pacs", "instance-list")
        assert (one.expected_instances, one.archived_instances) == (2, 2)
        assert one.manifest_key == manifest_key(one.StudyInstanceUID)
        instances = decode_manifest(archived[one.manifest_key]).instances
        of_study = result.instances[result.instances.study == one.study]
        assert set(of_study.sha256) == {instance.sha256 for instance in instances}
        assert of_study.size_bytes.sum() == one.size_bytes
    assert PATIENT not in repr(result)
    place.audit()


@served
def test_a_second_pull_asks_for_nothing_and_returns_the_same(place):
    cohort = prefect_dicom.read_cohort(place.cohort(ROWS[:3]))
    first = prefect_dicom.pull(place.site, cohort)
    assert first.is_complete
    asked, files = place.asked_for(), place.archived()
    second = prefect_dicom.pull(place.site, cohort)
    assert (second.number, second.is_complete) == (first.number, True)
    for name in ("rows", "studies", "instances"):
        pandas.testing.assert_frame_equal(getattr(first, name), getattr(second, name))
    assert (place.asked_for(), place.archived()) == (asked, files)


@served
def test_a_frame_that_was_filtered_keeps_its_lines(place):
    cohort = prefect_dicom.read_cohort(place.cohort(ROWS))
    chosen = cohort[cohort.Modality == "MR"]
    result = prefect_dicom.pull(place.file, chosen)
    joined = result.rows.join(chosen, on="line")
    assert list(zip(joined.line, joined.PatientID, joined.verdict, strict=True)) == [
        (4, "0003", "archived"),
        (5, "nobody", "not-found"),
    ]
    assert list(result.studies.StudyInstanceUID) == [uids(place)["A4"]]


@served
def test_what_was_found_may_be_chosen_from_and_pulled(place):
    found = prefect_dicom.find(place.file, {"PatientID": PATIENT})
    chosen = found.loc[found.StudyDate > "20240201", ["StudyInstanceUID"]]
    result = prefect_dicom.pull(place.file, chosen)
    assert result.is_complete
    assert list(result.studies.StudyInstanceUID) == [uids(place)["A2"]]


@served
def test_an_empty_result_has_the_same_columns_and_types(place):
    whole = prefect_dicom.pull(place.file, {"PatientID": PATIENT})
    empty = prefect_dicom.pull(place.file, {"PatientID": "nobody"})
    for name in ("rows", "studies", "instances"):
        assert getattr(empty, name).dtypes.equals(getattr(whole, name).dtypes)
    assert (len(empty.studies), len(empty.instances)) == (0, 0)


@served
def test_it_runs_in_a_notebook_whose_event_loop_runs(place):
    async def cell() -> prefect_dicom.PullResult:
        assert len(prefect_dicom.find(place.file, place.cohort(ROWS))) == 5
        return prefect_dicom.pull(place.file, place.cohort(ROWS))

    assert len(asyncio.run(cell()).instances) == 8


@served
def test_it_is_a_subflow_of_a_flow_of_ones_own_and_its_parameters_name_no_patient(place):
    @flow(persist_result=False)
    def study_of_mine() -> list[str]:
        cohort = prefect_dicom.read_cohort(place.cohort(ROWS))
        result = prefect_dicom.pull(place.file, cohort[cohort.PatientID == PATIENT])
        return list(result.studies.state)

    state = study_of_mine(return_state=True)
    assert state.result() == ["archived"] * 2
    with get_client(sync_client=True) as client:
        parent = client.read_flow_run(state.state_details.flow_run_id)
        (run,) = (
            run
            for run in client.read_flow_runs(limit=200)
            if run.parent_task_run_id is not None
            and client.read_task_run(run.parent_task_run_id).flow_run_id == parent.id
        )
        assert client.read_flow(run.flow_id).name == "pull-cohort"
    (written,) = (place.site.reports / "lists").iterdir()
    assert run.name == f"pull-{written.stem}"
    assert run.parameters["cohort"] == str(written)
    assert run.parameters["site"] == str(place.file)
    assert PATIENT not in run.model_dump_json()


@served
def test_an_asynchronous_flow_may_pull_too(place):
    @flow(persist_result=False)
    async def study_of_mine() -> bool:
        return prefect_dicom.pull(place.file, {"PatientID": PATIENT}).is_complete

    assert asyncio.run(study_of_mine())


@served
def test_what_stops_a_pull_is_raised_and_the_next_one_goes_on(place):
    cohort = place.cohort(ROWS[:3])
    (place.folder / "archive").rmdir()
    with pytest.raises(PrefectDicomError) as raised:
        prefect_dicom.pull(place.file, cohort)
    assert raised.value.code not in ("unexpected", "interrupted")
    (place.folder / "archive").mkdir()
    assert prefect_dicom.pull(place.file, cohort).is_complete


@served
def test_a_pull_that_is_cancelled_is_interrupted(place, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(RunControl, "requested_state", lambda self, run: RequestedState.CANCELLED)
        with pytest.raises(Interrupted):
            prefect_dicom.pull(place.file, place.cohort(ROWS[:3]))
    assert prefect_dicom.pull(place.file, place.cohort(ROWS[:3])).is_complete


def test_an_error_of_prefect_itself_says_what_it_is(place, monkeypatch):
    def unreachable(*args: object, **options: object) -> None:
        raise RuntimeError("Failed to reach API")

    monkeypatch.setattr(Flow, "__call__", unreachable)
    with pytest.raises(RuntimeError, match="Failed to reach API"):
        prefect_dicom.pull(place.file, place.cohort(ROWS))


@served
def test_rows_that_fail_are_left_with_their_reason(place):
    place.pacs.script.append(Behaviour("move.drop_instances", instances=1, study=uids(place)["A3"]))
    result = prefect_dicom.pull(place.file, place.cohort(ROWS[:3]))
    assert not result.is_complete
    (left,) = result.rows[result.rows.verdict != "archived"].itertuples()
    assert (left.line, left.verdict) == (3, "partial")
    (study,) = result.studies[result.studies.state == "failed"].itertuples()
    assert (study.reason, str(study.study)) == (left.reason, left.studies)
    assert pandas.isna(study.manifest_key)


@served
def test_several_nodes_are_asked_in_the_order_given(tmp_path):
    held = list(tiny_instances(2, instances=1))
    uid = held[0].study_instance_uid
    with two_nodes(tmp_path, [held[1]], held) as site:
        found = prefect_dicom.find(site.place.file, {"StudyInstanceUID": uid}, node=["main", "vna"])
        assert list(found.node) == ["vna"]
        result = prefect_dicom.pull(
            site.place.file, {"StudyInstanceUID": uid}, node=["main", "vna"]
        )
        assert (result.is_complete, list(result.studies.node)) == (True, ["vna"])
        assert result.number == 1
