"""For every kind of query a real archive yields exactly what the corpus's manifest says it holds.

The small corpus by default; ``-m full`` takes the whole one. What a query has to find is computed
by another reading of the same rules, which shares no code with the product: corpus_oracle.py.
"""

from __future__ import annotations

import csv

import pytest
import yaml

from prefect_dicom.cohort.rows import read_cohort
from prefect_dicom.config.site import Site
from prefect_dicom.core.errors import CohortError, PacsError
from prefect_dicom.core.model import CohortRow
from prefect_dicom.core.uids import is_uid, normal_uid
from prefect_dicom.discovery.row_query import StudyQueryCapabilities, discover, query_uid_lists
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import open_dry_run
from tests.support import corpus_oracle, peers
from tests.support.campaign import subset
from tests.support.corpus import full_corpus
from tests.support.peers import prepared

LIMIT = 4
TOOK = {"Orthanc": "store_orthanc_1_10_1", "dcmqrscp": "store_dcmqrscp_3_6_7"}
SHARED_UID = "1.2.826.0.1.3680043.10.9173.1.200"
PRIOR_UID = "1.2.826.0.1.3680043.10.9173.1.233"

IDENTIFIERS = [
    {"PatientID": "000123"},
    {"PatientID": "123"},
    {"PatientID": "00123"},
    {"PatientID": "0000123"},
    {"PatientID": "23"},
    {"PatientID": " 000123 "},
    {"PatientID": "SYN-TWIN"},
    {"PatientID": "syn-twin"},
    {"PatientID": "Syn-Twin"},
    {"PatientID": "SYN-PAD"},
    {"PatientID": "SYN PAD"},
    {"PatientID": "O'Neil/12 3"},
    {"PatientID": "O'Neil/12  3"},
    {"PatientID": "L" * 64},
    {"PatientID": "L" * 63},
    {"PatientID": "SYN-PRIORS"},
    {"PatientID": "SYN-PRIOR"},
    {"PatientID": "98890234"},
    {"PatientID": "dicom2nifti"},
    {"PatientID": "NOBODY-HAS-THIS"},
    {"AccessionNumber": "ACC00175"},
    {"AccessionNumber": "acc00175"},
    {"AccessionNumber": "ACC175"},
    {"AccessionNumber": "2"},
    {"AccessionNumber": "02"},
    {"AccessionNumber": "1"},
    {"AccessionNumber": "-"},
    {"AccessionNumber": "ACC00200"},
    {"AccessionNumber": "2008050417172310"},
    {"AccessionNumber": "S19-1_A_1_1"},
    {"PatientID": "2008-4", "AccessionNumber": "2008050417172310"},
    {"PatientID": "98890234", "AccessionNumber": "2"},
    {"PatientID": "000123", "AccessionNumber": "ACC00176"},
]
UIDS = [
    {"StudyInstanceUID": PRIOR_UID},
    {"StudyInstanceUID": PRIOR_UID[:-1]},
    {"StudyInstanceUID": SHARED_UID},
    {"StudyInstanceUID": SHARED_UID, "PatientID": "SYN-CONF-B"},
    {"StudyInstanceUID": SHARED_UID, "PatientID": "syn-conf-b"},
    {"StudyInstanceUID": PRIOR_UID, "AccessionNumber": "ACC00233"},
    {"StudyInstanceUID": PRIOR_UID, "AccessionNumber": "ACC00234"},
]
NARROWED = [
    {"PatientID": "SYN-PRIORS", "StudyDate": "20140215-20180415"},
    {"PatientID": "SYN-PRIORS", "StudyDate": "20140216-20180414"},
    {"PatientID": "SYN-PRIORS", "StudyDate": "-20140215"},
    {"PatientID": "SYN-PRIORS", "StudyDate": "20160315"},
    {"PatientID": "SYN-PRIORS", "StudyDate": "20200516-"},
    {"PatientID": "SYN-DATE", "StudyDate": "20240115"},
    {"PatientID": "SYN-DATE", "StudyDate": "20240101-"},
    {"PatientID": "SYN-DATE", "StudyDate": "-20991230"},
    {"PatientID": "SYN-DATE"},
    {"PatientID": "SYN0010", "Modality": "PT"},
    {"PatientID": "SYN0010", "Modality": "MR"},
    {"PatientID": "SYN-MOD", "Modality": "CT"},
    {"PatientID": "SYN-PRIORS", "StudyDescription": "follow-up ?"},
    {"PatientID": "SYN-PRIORS", "StudyDescription": "*3"},
    {"PatientID": "SYN-PRIORS", "StudyDescription": "up"},
    {"AccessionNumber": "2", "StudyDate": "1995"},
    {"AccessionNumber": "2", "StudyDate": "19950903"},
    {"PatientID": "***"},
    {"PatientID": "A*B?C"},
    {"AccessionNumber": "ACC00175", "PatientBirthDate": "19700101"},
    {"AccessionNumber": "ACC00175", "PatientBirthDate": "19700102"},
    {"AccessionNumber": "ACC00175", "PatientName": "ZERO^ZOE^^"},
    {"AccessionNumber": "ACC00175", "PatientName": "Zero^Zack"},
    {"AccessionNumber": "ACC00188", "PatientName": "McDonald^Ronald"},
    {"AccessionNumber": "ACC00189", "PatientName": "McDonald^Ronald"},
    {"AccessionNumber": "ACC00187", "PatientName": "Bad^Ben"},
]


@pytest.fixture(scope="module")
def orthanc_with_a_limit(tmp_path_factory, corpus_small):
    """It answers four studies, and says FE00 where there are more."""
    limits = {"LimitFindResults": LIMIT, "LimitFindInstances": LIMIT}
    with prepared(peers.Orthanc, tmp_path_factory, {}, **limits) as archive:
        archive.load(corpus_small)
        yield archive


def test_orthanc_finds_what_the_corpus_holds(orthanc, corpus, corpus_small, tmp_path):
    _compare(orthanc, corpus, corpus_small, tmp_path)


def test_an_orthanc_that_cuts_its_lists_short_finds_the_same_or_says_what_it_may_lack(
    orthanc_with_a_limit, corpus, corpus_small, tmp_path
):
    """Behind a cut list, studies that no range of days has in it may be missing; nothing else."""
    archive = orthanc_with_a_limit
    oracle = _oracle(archive, corpus, corpus_small)
    dated = {s.uid for s in oracle.studies if s.reported["StudyDate"] == {_eight_digits(s)}}
    queries = [*IDENTIFIERS, *UIDS, *NARROWED, *_names(oracle)]
    unproved = 0
    for query, found in zip(queries, _found(archive, queries, tmp_path), strict=True):
        expected = _expected(oracle, query)
        if found[0] == "list-unproved":
            unproved += 1
            assert found[1] <= expected[1], query
            assert not (expected[1] - found[1]) & dated, query
        else:
            assert found == expected, query
    # Patients with more studies than the archive answers.
    assert 0 < unproved <= 10


def test_dcmqrscp_finds_what_the_corpus_holds(dcmqrscp, corpus, corpus_small, tmp_path):
    _compare(dcmqrscp, corpus, corpus_small, tmp_path)


@pytest.mark.full
def test_orthanc_finds_what_the_whole_corpus_holds(orthanc_full, corpus, tmp_path):
    _compare(orthanc_full, corpus, full_corpus(), tmp_path)


@pytest.mark.full
def test_dcmqrscp_finds_what_the_whole_corpus_holds(dcmqrscp_full, corpus, tmp_path):
    _compare(dcmqrscp_full, corpus, full_corpus(), tmp_path)


def _compare(archive, corpus, paths, folder):
    oracle = _oracle(archive, corpus, paths)
    queries = [*IDENTIFIERS, *UIDS, *NARROWED, *_names(oracle)]
    assert len(queries) > 80
    expected = [_expected(oracle, query) for query in queries]
    found = _found(archive, queries, folder)
    wrong = [
        (query, one, other)
        for query, one, other in zip(queries, expected, found, strict=True)
        if one != other
    ]
    assert not wrong, "\n".join(
        f"{query}: expected {one}, found {other}" for query, one, other in wrong
    )
    # Queries of every outcome, so that none is true for want of anything else.
    kinds = {reason for reason, _ in expected}
    assert kinds == {
        *(corpus_oracle.FOUND, "no-match", "excluded-by-filter", "several-patients"),
        *("name-disagrees", "cohort-faulty"),
    }


def _eight_digits(study) -> str:
    [day] = study.reported["StudyDate"]
    return day if len(day) == 8 and day.isdigit() else "none"


def _oracle(archive, corpus, paths) -> corpus_oracle.Oracle:
    studies = corpus_oracle.held_studies(corpus, set(paths), TOOK[archive.program])
    if archive.program == "dcmqrscp":
        return corpus_oracle.Oracle(studies, modalities=False)
    # Its DefaultEncoding, whatever the objects and the query say.
    return corpus_oracle.Oracle(studies, letters="latin-1")


def _names(oracle):
    """Every patient whose name is beyond ASCII, with it and with another's."""
    names = corpus_oracle.names_by_patient(oracle.studies)
    # Its file declares Chinese and does without the escape sequences: every reader reads another.
    del names["SYN-58"]
    foreign = {patient: name for patient, name in names.items() if not name.isascii()}
    for patient, name in foreign.items():
        if name.isprintable():
            yield {"PatientID": patient, "PatientName": name}
            for group in name.split("="):
                if group.strip("^"):
                    yield {"PatientID": patient, "PatientName": group}
        yield {"PatientID": patient, "PatientName": "Another^Body"}


def _expected(oracle, query):
    # One study has "-" for its accession number; in a list that is an empty cell.
    nothing = query.get("AccessionNumber") == "-"
    if nothing or "*" in query.get("PatientID", "") or query.get("StudyDate") == "1995":
        return "cohort-faulty", frozenset()
    return oracle.answer(query)


def _found(archive, queries, folder):
    found = []
    capabilities = StudyQueryCapabilities()
    with Requestor(archive.node()) as requestor:
        for query in queries:
            try:
                [row] = read_cohort(_written(folder / "cohort.csv", query))
                result = discover(requestor, row, capabilities)
            except (CohortError, PacsError) as error:
                found.append((error.code, frozenset()))
                continue
            uids = frozenset(normal_uid(study.study_instance_uid) for study in result.studies)
            found.append((result.reason or corpus_oracle.FOUND, uids))
    return found


def _written(path, query):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(query))
        writer.writeheader()
        writer.writerow(query)
    return path


# --- definitions ------------------------------------------------------------------------------

PATIENTS = (
    *("SYN-PRIORS", "SYN-DATE", "SYN0010", "SYN-MOD", "SYN-8SER", "98890234", "77654033"),
    *("000123", "2008-4", "NOBODY-HAS-THIS"),
)
LISTED = [{"PatientID": patient, "IndexDate": "20160401"} for patient in PATIENTS]


def _of_the_list(oracle):
    return [study for study in oracle.studies if study.patient in PATIENTS]


DEFINITIONS = {
    "a list": ({}, LISTED, lambda oracle: _of_the_list(oracle)),
    "a window around a date": (
        {"window": {"around": "IndexDate", "days_before": 800, "days_after": 800}},
        LISTED,
        lambda oracle: [s for s in _of_the_list(oracle) if "20140122" <= s.day <= "20180610"],
    ),
    "descriptions": (
        {"studies": {"StudyDescription": ["follow-up*", {"regex": "^PET/"}]}},
        LISTED,
        lambda oracle: [
            s
            for s in _of_the_list(oracle)
            if s.one("StudyDescription").lower().startswith(("follow-up", "pet/"))
        ],
    ),
    "dates": (
        {"studies": {"StudyDate": "20010101-20160315"}},
        LISTED,
        lambda oracle: [s for s in _of_the_list(oracle) if "20010101" <= s.day <= "20160315"],
    ),
    "series of a modality": (
        {"series": {"Modality": "CT"}},
        [row for row in LISTED if row["PatientID"] != "SYN-MOD"],
        lambda oracle: [
            s
            for s in _of_the_list(oracle)
            if s.patient != "SYN-MOD" and "CT" in {kind for kind, _ in s.series.values()}
        ],
    ),
    "two studies of each patient": (
        {"most_per_patient": {"studies": 2, "take": "earliest"}},
        [row for row in LISTED if row["PatientID"] == "SYN-PRIORS"],
        lambda oracle: sorted(
            (s for s in oracle.studies if s.patient == "SYN-PRIORS"), key=lambda s: s.day
        )[:2],
    ),
    "months without a list": (
        {"studies": {"StudyDate": "20140201-20140430"}},
        None,
        lambda oracle: [s for s in oracle.studies if "20140201" <= s.day <= "20140430"],
    ),
    "months of a busy day": (
        {"studies": {"StudyDate": "20240101-20240131"}},
        None,
        lambda oracle: _of_one_patient(oracle, "20240101", "20240131"),
    ),
}


def _of_one_patient(oracle, first, last):
    """What a window takes: studies of these days, but for those that two patients share."""
    inside = [study for study in oracle.studies if first <= study.day <= last]
    patients = {uid: {s.patient for s in inside if s.uid == uid} for uid in {s.uid for s in inside}}
    return [study for study in inside if len(patients[study.uid]) == 1]


@pytest.mark.campaign("PACS: discovery")
@pytest.mark.parametrize(
    "name", subset(DEFINITIONS, ["series of a modality", "months of a busy day"])
)
@pytest.mark.parametrize("archive", ["orthanc", "dcmqrscp"])
def test_a_definition_finds_what_the_corpus_holds(
    archive, name, request, corpus, corpus_small, tmp_path
):
    archive = request.getfixturevalue(archive)
    definition, rows, wanted = DEFINITIONS[name]
    expected = {study.uid for study in wanted(_oracle(archive, corpus, corpus_small))}
    assert expected
    assert _planned(archive, definition, rows, tmp_path) == expected


def _planned(archive, definition, rows, folder):
    """The studies that a pull of the definition would ask for."""
    site = Site(
        nodes={"archive": archive.node()},
        archive={"directory": folder / "archive"},
        ledger={"path": folder / "ledger.sqlite"},
        spool={"path": folder / "spool", "reserve_bytes": 0},
    )
    if rows is not None:
        with (folder / "list.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        definition = {"list": str(folder / "list.csv"), **definition}
    path = folder / "cohort.yaml"
    path.write_text(yaml.safe_dump(definition))
    cohort = register_cohort(site, path, None)
    with open_dry_run(site, cohort.number) as plan:
        for first, last in plan.discovery.pages():
            plan.discovery.discover(first, last)
        plan.discovery.limit_per_patient()
        return {
            normal_uid(record.study.study_instance_uid)
            for record in plan.ledger.studies.to_pull(cohort.number)
        }


def test_uids_that_are_asked_for_together_find_the_same(orthanc, dcmqrscp, corpus, corpus_small):
    for archive in (orthanc, dcmqrscp):
        oracle = _oracle(archive, corpus, corpus_small)
        uids = sorted({study.uid for study in oracle.studies if is_uid(study.uid)})
        rows = [CohortRow(line, study_instance_uid=uid) for line, uid in enumerate(uids, 2)]
        capabilities = StudyQueryCapabilities()
        with Requestor(archive.node()) as requestor:
            query_uid_lists(requestor, rows, capabilities)
            for row in rows:
                found = discover(requestor, row, capabilities)
                uids = frozenset(study.study_instance_uid for study in found.studies)
                expected = oracle.answer({"StudyInstanceUID": row.study_instance_uid})
                assert (found.reason or corpus_oracle.FOUND, uids) == expected
