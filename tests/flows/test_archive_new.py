"""All of the last days is archived, day after day: what comes late too, and nothing twice."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import pytest
import yaml

from prefect_dicom.cohort.definition import read_cohort_file
from prefect_dicom.core.errors import CohortError
from prefect_dicom.core.model import StudyState, Verdict
from prefect_dicom.ledger import Cohort
from prefect_dicom.report.page import write_page
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.pipeline import end_of
from prefect_dicom.run.registration import cohorts_to_rerun, register_cohort, register_new
from prefect_dicom.run.run import open_run, reopen_transient
from prefect_dicom.testing import Behaviour
from tests.support.commands import CommandLine
from tests.support.sites import Place, site_around, study

TODAY = date(2026, 3, 4)


def made(seed: int, days_ago: int) -> list:
    return study(seed, StudyDate=f"{TODAY - timedelta(days_ago):%Y%m%d}")


@pytest.fixture
def place(tmp_path) -> Iterator[Place]:
    """A PACS with a study of yesterday, one of six days ago, one of ten, and one of today."""
    objects = [*made(1, 1), *made(2, 6), *made(3, 10), *made(4, 0)]
    with site_around(tmp_path, objects, retrieve="c-get") as place:
        document = yaml.safe_load(place.file.read_text())
        document["retry_after_seconds"] = []
        place.file.write_text(yaml.safe_dump(document))
        yield place


def archive_new(place: Place, today: date = TODAY, days: int = 7) -> Cohort:
    cohort = register_new(place.site, None, today, days)
    with open_run(place.site, cohort.number) as pull:
        work_through(pull)
    return cohort


def archived(place: Place) -> int:
    """How many studies are archived, whichever cohorts they are in."""
    with place.ledger() as ledger:
        known = [
            study
            for cohort in ledger.cohorts.all()
            for study in ledger.studies.of_cohort(cohort.number)
        ]
    return len({s.reference for s in known if s.state is StudyState.ARCHIVED})


def comes_in(place: Place, objects: list) -> None:
    for stored in objects:
        place.pacs.holdings.add(stored)


def test_the_studies_of_the_last_days_are_archived_and_no_others(place):
    cohort = archive_new(place)
    assert archived(place) == 2
    assert cohort.name == "new-20260225-20260303"
    place.audit()


def test_one_day_is_yesterday(place):
    assert archive_new(place, days=1).name == "new-20260303-20260303"
    assert archived(place) == 1


def test_the_same_day_again_is_the_same_cohort_and_asks_for_nothing(place):
    first = archive_new(place)
    asked = place.asked_for()
    assert archive_new(place) == first
    assert place.asked_for() == asked


def test_the_next_day_brings_what_is_new_and_what_came_late(place):
    archive_new(place)
    comes_in(place, made(5, 5))
    moved = place.asked_for("C-GET")
    archive_new(place, TODAY + timedelta(1))
    # The one of today, which is yesterday now, and the late one; none that was archived.
    assert archived(place) == 4
    assert place.asked_for("C-GET") - moved <= 2
    with place.ledger() as ledger:
        assert [ledger.progress.totals(n).rows[Verdict.ARCHIVED] for n in (1, 2)] == [2, 2]


def test_what_comes_later_than_one_looks_back_is_not_found(place):
    comes_in(place, made(5, 8))
    archive_new(place)
    assert archived(place) == 2


def test_days_without_a_study_are_no_failure(tmp_path):
    with site_around(tmp_path, made(1, 30), retrieve="c-get") as place:
        cohort = archive_new(place)
        with place.ledger() as ledger:
            rows = ledger.progress.totals(cohort.number).rows
    # Of two months, each a row.
    assert dict(rows) == {Verdict.EXCLUDED: 2}


def test_what_failed_one_night_is_tried_again_the_next(place):
    place.pacs.script.append(Behaviour("move.drop_instances", instances=1))
    archive_new(place)
    assert archived(place) == 0
    place.pacs.script.clear()
    cohort = register_new(place.site, None, TODAY + timedelta(1), 7)
    with open_run(place.site, cohort.number) as pull:
        work_through(pull)
        # What the flow does before its next pass.
        assert reopen_transient(pull)
        work_through(pull)
    assert archived(place) == 3


def test_its_definition_lies_beside_its_reports_and_can_be_pulled_by_hand(place):
    cohort = register_new(place.site, None, TODAY, 7)
    path = Path(place.site.reports) / cohort.name / "cohort.yaml"
    days = [(row.study_date.first, row.study_date.last) for row in read_cohort_file(path).rows]
    assert days == [
        (date(2026, 2, 25), date(2026, 2, 28)),
        (date(2026, 3, 1), date(2026, 3, 3)),
    ]


@pytest.mark.parametrize("days", [0, -1, 367])
def test_a_number_of_days_that_cannot_be_is_refused(place, days):
    with pytest.raises(CohortError, match="days: expected 1 to 366"):
        register_new(place.site, None, TODAY, days)


def test_of_several_nodes_one_has_to_be_named_and_is_in_the_cohorts_name(place):
    document = yaml.safe_load(place.file.read_text())
    document["nodes"]["old"] = document["nodes"]["pacs"]
    place.file.write_text(yaml.safe_dump(document))
    with pytest.raises(CohortError, match="--node"):
        register_new(place.site, None, TODAY, 7)
    assert register_new(place.site, "old", TODAY, 7).name == "new-20260225-20260303-old"


# --- and what is left of all cohorts


CHOSEN = {"reasons": (), "nodes": (), "lines": ()}


def test_a_rerun_of_all_goes_on_where_something_is_left_and_nowhere_else(place):
    finished = archive_new(place, days=1)
    begun = register_new(place.site, None, TODAY, 7)
    assert cohorts_to_rerun(place.site, CHOSEN) == [begun.name]
    later = register_new(place.site, None, TODAY, 8)
    with place.ledger() as ledger:
        ledger.run_control.prioritise(later.number, 1)
        assert cohorts_to_rerun(place.site, CHOSEN) == [later.name, begun.name]
        ledger.run_control.pause(begun.number)
        assert cohorts_to_rerun(place.site, CHOSEN) == [later.name]
    assert finished.name not in cohorts_to_rerun(place.site, CHOSEN)


def test_a_cohort_of_days_without_a_study_stays_well_however_it_is_looked_at(tmp_path):
    with site_around(tmp_path, made(1, 30), retrieve="c-get") as place:
        cohort = archive_new(place)
        assert cohort.may_be_empty
        with open_run(place.site, cohort.number, "rerun") as run:
            work_through(run)
            assert end_of(run, run.reporting.totals()).name == "Completed"
        with place.ledger() as ledger:
            html = write_page(ledger, cohort, tmp_path / "reports").read_text()
        assert "nothing to archive" not in html
        assert CommandLine(tmp_path, tmp_path / "home")("status", cohort.name).code == 0
        # The same days in a definition of somebody's own are what that person asked for.
        by_hand = tmp_path / "days.yaml"
        by_hand.write_text("# mine\nstudies:\n  StudyDate: 20260225-20260303\n")
        own = register_cohort(place.site, by_hand, None)
        with open_run(place.site, own.number) as run:
            work_through(run)
            assert end_of(run, run.reporting.totals()).name == "Partial"
