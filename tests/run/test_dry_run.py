"""A dry run finds the studies of a cohort, says what pulling them would take, and takes nothing."""

from __future__ import annotations

import csv
import itertools
import json
import random
import time
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet
import pydicom
import pytest

from prefect_dicom.core.model import StudyState, Verdict
from prefect_dicom.ledger import Totals
from prefect_dicom.network.storage_scp import running_receiver
from prefect_dicom.report.estimate import (
    ASSUMED_BYTES_PER_SECOND,
    Estimate,
    estimate_pull,
    write_estimate,
)
from prefect_dicom.report.formatting import format_estimate, format_modalities
from prefect_dicom.run.progress import Pace, format_progress
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import Run, open_dry_run
from prefect_dicom.testing import Behaviour, tiny_instances
from prefect_dicom.testing.generate import generate_cohort
from prefect_dicom.testing.instances import instance_of_file
from tests.support.sites import Place, site_around

INSTANCE_BYTES = 524_288


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    return generate_cohort(tmp_path_factory.mktemp("pacs"), studies=12, instances_per_series=3)


def truth(files) -> dict[str, tuple[int, int, int]]:
    """Studies, series and instances by modality, from the files themselves."""
    studies: dict[str, list] = defaultdict(list)
    for file in files:
        header = pydicom.dcmread(file, stop_before_pixels=True)
        studies[header.StudyInstanceUID].append((header.Modality, header.SeriesInstanceUID))
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for members in studies.values():
        [modality] = {modality for modality, _ in members} - {"SR", "DOC"}
        found[modality][0] += 1
        found[modality][1] += len({series for _, series in members})
        found[modality][2] += len(members)
    return {modality: tuple(figures) for modality, figures in found.items()}


def dry_run(place: Place, cohort: Path | None = None) -> Estimate:
    site = place.site
    registered = register_cohort(site, cohort or place.cohort(), None)
    with open_dry_run(site, registered.number) as plan:
        for page in plan.discovery.pages():
            plan.discovery.discover(*page)
        estimate = estimate_pull(plan.ledger, plan.cohort, site)
        write_estimate(estimate, site.reports / plan.cohort.name)
    return estimate


def test_it_says_what_is_there_takes_nothing_and_the_pull_after_it_asks_nothing_again(
    tmp_path, files
):
    objects = [instance_of_file(file) for file in files]
    with site_around(tmp_path, objects) as place:
        numbers = sorted({stored.attributes["AccessionNumber"] for stored in objects})
        cohort = place.cohort({"AccessionNumber": one} for one in [*numbers, "nobody's"])
        estimate = dry_run(place, cohort)
        found = {s.modality: (s.studies, s.series, s.instances) for s in estimate.shares}
        assert found == truth(files)
        assert estimate.total.instances == len(files)
        assert estimate.total.size_bytes == len(files) * INSTANCE_BYTES
        assert estimate.rows == {("found", ""): 12, (Verdict.NOT_FOUND, "no-match"): 1}
        assert estimate.unfound_rows == 1
        assert {request.service for request in place.pacs.log} == {"C-FIND"}
        assert {request.level for request in place.pacs.log} == {"STUDY"}
        assert list((tmp_path / "archive").iterdir()) == []
        assert not place.site.spool.path.exists()
        assert running_receiver(place.site) is None
        assert place.pull(cohort).rows == {Verdict.ARCHIVED: 12, Verdict.NOT_FOUND: 1}
        queries = [r for r in place.pacs.requests("C-FIND") if r.level == "STUDY"]
        assert len(queries) == 13
        place.audit()


def test_it_needs_neither_archive_nor_receiver(tmp_path):
    with site_around(tmp_path, tiny_instances(2)) as place:
        (tmp_path / "archive").rmdir()
        assert dry_run(place).total.studies == 2
        with open_dry_run(place.site, 1) as run:
            assert not isinstance(run, Run)


def test_sizes_and_rate_are_learned_from_what_was_archived(around, files):
    objects = [instance_of_file(file) for file in files]
    with around(objects, retrieve="c-get") as place:
        uids = place.pacs.holdings.study_instance_uids()
        first = dry_run(place)
        assert not any(share.learned for share in first.shares)
        assert (first.bytes_per_second, first.rate_learned) == (ASSUMED_BYTES_PER_SECOND, False)
        # CT, MR and DX; of the others nothing is known after it.
        began = time.monotonic()
        place.pull(place.cohort([{"StudyInstanceUID": uid} for uid in uids[:3]]))
        archived = {uid: place.manifest(uid).instances for uid in uids[:3]}
        rest = place.cohort([{"StudyInstanceUID": uid} for uid in uids[3:]])
        estimate = dry_run(place, rest)
        shares = {share.modality: share for share in estimate.shares}
        for uid, modality in zip(uids, ("CT", "MR", "DX"), strict=False):
            sizes = [instance.size_bytes for instance in archived[uid]]
            assert shares[modality].learned
            assert shares[modality].instance_bytes == round(sum(sizes) / len(sizes))
            expected = shares[modality].instances * sum(sizes) / len(sizes)
            assert shares[modality].size_bytes == round(expected)
        assert (shares["US"].learned, shares["US"].instance_bytes) == (False, INSTANCE_BYTES)
        assert estimate.rate_learned
        total = sum(i.size_bytes for instances in archived.values() for i in instances)
        assert 0 < total / estimate.bytes_per_second < time.monotonic() - began
        # What is archived already is not to be pulled again.
        with place.ledger() as ledger:
            done = estimate_pull(ledger, ledger.cohorts.get("2"), place.site)
        assert (done.total.studies, done.archived_studies, done.seconds) == (0, 3, 0)
        assert done.unfound_rows == 0


def test_the_spool_is_to_hold_the_largest_chunks_that_can_be_under_way(around):
    with around(tiny_instances(12, instances=2), retrieve="c-get") as place:
        limits = {"associations": 1, "chunk_studies": 2, "instance_bytes": 1000}
        place.change(node={"limits": limits})
        # Six chunks of two studies of two instances: one arrives, two wait or are uploaded.
        assert dry_run(place).spool_bytes == 3 * 2 * 2 * 1000


def test_a_pacs_that_counts_nothing_is_said_to(around):
    counts = Behaviour("find.counts", how="none")
    with around(tiny_instances(3, instances=4), script=[counts], retrieve="c-get") as place:
        [share] = dry_run(place).shares
        assert (share.studies, share.uncounted_studies, share.instances) == (3, 3, 0)
        place.pull()
        others = list(tiny_instances(2, instances=4, seed=1))
        for stored in others:
            place.pacs.holdings.add(stored)
        uids = {stored.study_instance_uid for stored in others}
        [share] = dry_run(place, place.cohort([{"StudyInstanceUID": u} for u in uids])).shares
        # As many as those that were archived had.
        assert (share.uncounted_studies, share.instances) == (2, 8)


def test_the_files_say_the_same_as_the_table_and_hold_no_patient(around, files):
    objects = [instance_of_file(file) for file in files]
    with around(objects, retrieve="c-get") as place:
        estimate = dry_run(place)
        [folder] = place.site.reports.iterdir()
        table = pyarrow.parquet.read_table(folder / "estimate.parquet").to_pylist()
        with (folder / "estimate.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert [row["modality"] for row in table] == [line["modality"] for line in lines]
        assert [str(row["size_bytes"]) for row in table] == [line["size_bytes"] for line in lines]
        assert table[-1]["modality"] == "all"
        assert table[-1]["instances"] == sum(row["instances"] for row in table[:-1]) == len(files)
        assert table[-1]["seconds"] == estimate.seconds
        text = (folder / "estimate.csv").read_text() + json.dumps(estimate.as_result())
        text += format_estimate(estimate)
        for stored in objects:
            for keyword in ("PatientID", "PatientName", "AccessionNumber", "StudyInstanceUID"):
                assert stored.attributes[keyword] not in text


@pytest.mark.parametrize(
    ("modalities", "counted_as"),
    [
        (("CT",), "CT"),
        (("SR", "CT", "PR"), "CT"),
        (("PT", "CT"), "CT+PT"),
        (("SR",), "SR"),
        ((" mr ",), "MR"),
        ((), "unknown"),
    ],
)
def test_a_study_counts_as_what_its_images_are(modalities, counted_as):
    assert format_modalities(modalities) == counted_as


# --- the time left


def finding(asked: int, rows: int) -> Totals:
    """A cohort whose rows are being asked for, each with a study."""
    pending = Counter({Verdict.PENDING: rows}), Counter({StudyState.PENDING: asked})
    return Totals(*pending, 0, 0, 0, 0, 0, unasked=rows - asked)


def pulling(archived: int, studies: int) -> Totals:
    """A cohort whose studies are being archived."""
    states = {StudyState.PENDING: studies - archived, StudyState.ARCHIVED: archived}
    rows = {Verdict.PENDING: studies - archived, Verdict.ARCHIVED: archived}
    return Totals(Counter(rows), Counter(states), archived, 0, archived, 0, archived)


def test_finding_and_pulling_have_a_time_left_of_their_own():
    pace = Pace()
    for second in range(0, 101, 10):
        pace.note(second, finding(asked=second, rows=1000))
    assert pace.seconds_left() == pytest.approx(900)
    assert (pace.format_phase(), pace.format_left()) == (
        "finding studies",
        "about 15 min 0 s left",
    )
    assert format_progress(finding(100, 1000), pace) == (
        "finding studies: 100 of 1000 rows queried, 1/s; 100 studies found"
    )
    pace.note(110, pulling(0, 1000))
    assert (pace.format_phase(), pace.seconds_left()) == ("", None)
    pace.note(120, pulling(1, 1000))
    assert pace.seconds_left() == pytest.approx(9990)


def test_the_time_left_follows_the_rate_and_never_jumps():
    """A PACS that is quick and slow by turns, stops for two minutes, and goes on more slowly."""
    lot, pace = random.Random(1), Pace()
    asked, said = 0.0, []
    for second in range(3600):
        rate = 10 if second < 1200 else 0 if second < 1320 else 5
        asked += rate * lot.choice((0, 0, 0, 4))
        pace.note(float(second), finding(int(asked), 50_000))
        if pace.seconds_left() is not None:
            said.append(pace.seconds_left())
    assert len(said) > 3500
    jumps = [abs(after - before) / before for before, after in itertools.pairwise(said[60:])]
    assert max(jumps) < 0.03
    # And it is right in the end.
    assert said[-1] == pytest.approx((50_000 - asked) / 5, rel=0.1)
