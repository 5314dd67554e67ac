"""Storage commitment: what Orthanc reports to the receiver decides, and nothing else does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import yaml

from prefect_dicom.core.deliveries import CommitmentReference, ReportOutcome
from prefect_dicom.testing import ScriptedPacs
from tests.support.destinations import Archived, Delivering, add_target
from tests.support.peers import Orthanc, free_port
from tests.support.sites import Place, study

A, B = study(1, instances=3), study(2, instances=2)
TITLE = "COMMITTED"


@pytest.fixture(scope="module")
def archived(tmp_path_factory) -> Archived:
    return Archived(tmp_path_factory.mktemp("archived"))


@pytest.fixture(scope="module")
def orthanc_target(tmp_path_factory):
    if reason := Orthanc.absent():
        pytest.skip(reason)
    with Orthanc(tmp_path_factory.mktemp("target")) as peer:
        yield peer


@pytest.fixture
def to_orthanc(archived, tmp_path, orthanc_target):
    """A site whose receiver Orthanc knows under our AE title."""
    port = free_port()
    folder = tmp_path / "site"
    file = archived.copy(folder, [A, B])
    place = Place(folder, file, ScriptedPacs())
    destination = {"evidence": "committed", "commit_wait_seconds": 10}
    node = {"destination": destination, "calling_ae_title": TITLE}
    add_target(place, orthanc_target.port, orthanc_target.ae_title, node)
    document = yaml.safe_load(file.read_text())
    document["receiver"] = {"ae_title": TITLE, "port": port, "idle_seconds": 0}
    file.write_text(yaml.safe_dump(document))
    orthanc_target.know(TITLE, port)
    return Delivering(place)


def test_orthanc_commits_over_an_association_of_its_own_and_the_studies_are_verified(
    to_orthanc, orthanc_target
):
    totals = to_orthanc.deliver()
    assert totals.is_verified and totals.evidence == {"committed": 2}
    assert {each["evidence"] for each in to_orthanc.manifest()["instances"]} == {"committed"}


def test_what_is_not_reported_stays_sent_and_is_asked_about_again(to_orthanc, orthanc_target):
    document = yaml.safe_load(to_orthanc.place.file.read_text())
    document["nodes"]["research"]["destination"] |= {
        "commit_wait_seconds": 0.5,
        "commit_within_seconds": 0.1,
    }
    to_orthanc.place.file.write_text(yaml.safe_dump(document))
    # Orthanc tries once, and there nobody listens.
    orthanc_target.know(TITLE, free_port())
    assert not to_orthanc.deliver().is_verified
    assert to_orthanc.outcome() == [("sent", None)] * 2
    orthanc_target.know(TITLE, document["receiver"]["port"])
    document["nodes"]["research"]["destination"] |= {
        "commit_wait_seconds": 10,
        "commit_within_seconds": 60,
    }
    to_orthanc.place.file.write_text(yaml.safe_dump(document))
    assert to_orthanc.deliver().is_verified


# --- the record


@pytest.fixture
def commitments(archived, tmp_path):
    place = Place(tmp_path / "site", archived.copy(tmp_path / "site", [A, B]), ScriptedPacs())
    with place.ledger() as ledger:
        references = [CommitmentReference(1, "1.2", f"1.2.{n}") for n in range(3)]
        ledger.commitments.begin("2.25.1", "research", references, datetime.now(UTC) + timedelta(1))
        yield ledger.commitments


def results(commitments):
    (found,) = commitments.of_study(1, "research")
    return found.results


def test_half_of_a_report_leaves_the_other_half_open_until_it_comes(commitments):
    assert commitments.record_report("2.25.1", {"1.2.0": 0}) is ReportOutcome.RECORDED
    assert results(commitments) == {"1.2.0": 0, "1.2.1": None, "1.2.2": None}
    commitments.record_report("2.25.1", {"1.2.1": 0, "1.2.2": 0x0112})
    assert results(commitments) == {"1.2.0": 0, "1.2.1": 0, "1.2.2": 0x0112}


def test_a_report_that_comes_twice_does_not_change_what_is_on_record(commitments):
    commitments.record_report("2.25.1", {f"1.2.{n}": 0 for n in range(3)})
    later = {f"1.2.{n}": 0x0112 for n in range(3)}
    assert commitments.record_report("2.25.1", later) is ReportOutcome.RECORDED
    assert set(results(commitments).values()) == {0}


def test_a_report_about_others_is_recorded_only_for_ours(commitments):
    assert commitments.record_report("2.25.1", {"9.9": 0, "1.2.0": 0}) is ReportOutcome.FOREIGN
    assert results(commitments) == {"1.2.0": 0, "1.2.1": None, "1.2.2": None}


def test_a_report_for_a_transaction_that_nobody_began_is_refused(commitments):
    assert commitments.record_report("2.25.2", {"1.2.0": 0}) is ReportOutcome.UNKNOWN
    assert set(results(commitments).values()) == {None}
