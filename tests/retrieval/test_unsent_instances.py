"""A PACS that says what it cannot send is believed for that, and asked no more often than helps.

The bounds are those of :mod:`prefect_dicom.retrieval.bounds`; it is the PACS that counts.
"""

from __future__ import annotations

import time

import pytest

from prefect_dicom.core.model import Verdict
from prefect_dicom.network.presentation_contexts import COMMON_CLASSES, STORAGE_CLASSES
from prefect_dicom.network.retrieve_result import RetrieveResult
from prefect_dicom.network.status import is_out_of_resources
from prefect_dicom.retrieval.bounds import CLASS_NOT_TOLD, SYNTAX_SEARCH, UNSENT
from prefect_dicom.retrieval.strategy import code_of_strain
from prefect_dicom.run.loop import work_through
from prefect_dicom.testing import Behaviour, StoredInstance, tiny_instances
from prefect_dicom.testing.instances import changed
from tests.support.campaign import only_in
from tests.support.sites import Place

METHODS = ("c-move", "c-get")
LONG_SETTLE = {"timeouts": {"settle_seconds": 5}}
VENDORS_CLASS = "1.3.12.2.1107.5.9.1"


def retrieves(place: Place) -> list:
    return place.pacs.requests("C-MOVE") + place.pacs.requests("C-GET")


def notes(place: Place) -> list[str]:
    with place.ledger() as ledger:
        return [words for _, words in ledger.cohorts.notes(1)]


# --- an answer that accounts for everything


@pytest.mark.parametrize("retrieve", METHODS)
@pytest.mark.parametrize("status", [0xB000, None])
def test_what_the_pacs_says_it_cannot_send_is_missing_and_asked_for_twice(around, retrieve, status):
    """It names the one in four that it cannot read; nothing is waited for."""
    objects = list(tiny_instances(4, instances=4))
    corrupt = [o.sop_instance_uid for o in objects[3::4]]
    script = [Behaviour("pacs.corrupt", instances=corrupt, status=status)]
    with around(objects, retrieve=retrieve, script=script, node=LONG_SETTLE) as place:
        began = time.monotonic()
        assert place.pull().rows == {Verdict.PARTIAL: 4}
        assert time.monotonic() - began < 4 * LONG_SETTLE["timeouts"]["settle_seconds"]
        assert place.reasons() == [("failed", "instances-missing")] * 4
        asked = [uid for r in retrieves(place)[1:] for uid in r.keys["SOPInstanceUID"].split("\\")]
        # Once in the list of the studies, and once by name.
        assert sorted(asked) == sorted(corrupt)
        assert len(retrieves(place)) == 1 + 4 * (UNSENT.most - 1)
        place.audit()
        place.pacs.script.clear()
        assert place.rerun().rows == {Verdict.ARCHIVED: 4}
        assert len(place.pacs.sent_instances()) == len(objects)


@pytest.mark.parametrize("status", [0xB000, 0x0000])
def test_a_study_of_which_nothing_can_be_sent_says_so_and_not_that_the_way_is_closed(
    around, status
):
    script = [Behaviour("pacs.corrupt", instances=3, status=status)]
    node = {**LONG_SETTLE, "limits": {"chunk_studies": 1}}
    with around(tiny_instances(4, instances=3), script=script, node=node) as place:
        began = time.monotonic()
        assert place.pull().rows == {Verdict.FAILED: 4}
        assert time.monotonic() - began < 2 * LONG_SETTLE["timeouts"]["settle_seconds"]
        assert place.reasons() == [("failed", "instances-missing")] * 4
        assert place.asked_for("C-MOVE") == 4 * UNSENT.most
        [words] = notes(place)
        assert f"{status:04X}" in words and "cannot send" in words


@pytest.mark.parametrize("status", [0xB000, 0xA702])
def test_by_c_get_too_and_with_every_status(around, status):
    """Nothing comes of a whole study: other syntaxes are tried, once for each class."""
    script = [Behaviour("pacs.corrupt", instances=3, status=status)]
    objects = tiny_instances(4, instances=3)
    limits = {"limits": {"chunk_studies": 1}}
    with around(objects, script=script, retrieve="c-get", node=limits) as place:
        assert place.pull().rows == {Verdict.FAILED: 4}
        assert place.reasons() == [("failed", "instances-missing")] * 4
        assert place.asked_for("C-GET") <= 4 * UNSENT.most + SYNTAX_SEARCH.most


def test_a_destination_that_cannot_be_reached_is_still_found_out(around):
    """A702 with everything failed: dcmqrscp says so of a receiver that refuses the connection."""
    script = [Behaviour("pacs.corrupt", instances=2, status=0xA702)]
    with around(tiny_instances(1, instances=2), script=script) as place:
        place.pull()
        assert place.reasons() == [("failed", "move-destination-failed")]
        assert place.asked_for("C-MOVE") <= UNSENT.most + 1


@pytest.mark.parametrize(
    ("counts", "named", "accounts"),
    [
        ((None, 3, 1, 0), True, True),
        ((None, 2, 1, 1), True, True),
        ((None, 0, 4, 0), False, True),
        ((None, 3, 1, 0), False, False),
        ((None, 2, 1, 0), True, False),
        ((None, 4, 0, 0), False, False),
        ((None, None, None, None), True, False),
    ],
)
def test_an_answer_accounts_for_everything_or_for_nothing(counts, named, accounts):
    _, completed, failed, warning = counts
    uids = ("1.2.3",) if named else ()
    result = RetrieveResult(0xB000, None, completed, failed, warning, uids)
    assert result.accounts_for(4) == accounts


@pytest.mark.parametrize("retrieve", METHODS)
def test_what_is_said_to_be_there_is_never_believed(around, retrieve):
    """It counts all as completed but the one that it names, and two do not come."""
    objects = list(tiny_instances(1, instances=5))
    uids = [o.sop_instance_uid for o in objects]
    script = [
        Behaviour("pacs.corrupt", instances=uids[:1]),
        Behaviour("move.drop_instances", instances=uids[1:2], times=1),
        Behaviour("move.bad_counts", counts=(None, 4, 1, 0), times=1),
    ]
    with around(objects, script=script, retrieve=retrieve) as place:
        place.pull()
        assert place.reasons() == [("failed", "instances-missing")]
        assert uids[1] in place.pacs.sent_instances()


# --- which statuses are want of resources


@pytest.mark.parametrize(
    ("status", "busy"), [(0xA700, True), (0xA701, True), (0xA702, False), (0xB000, False)]
)
def test_an_unreadable_file_is_no_want_of_resources(status, busy):
    assert is_out_of_resources(status) == busy
    assert (code_of_strain(RetrieveResult(status), 0) == "pacs-busy") == busy


def test_studies_that_lack_an_instance_narrow_no_run(around):
    """Neither busy nor slow: the time to the first instance is taken when it came."""
    objects = list(tiny_instances(12, instances=3))
    corrupt = [o.sop_instance_uid for o in objects[2::3][9:]]
    script = [Behaviour("pacs.corrupt", instances=corrupt, status=0xA702)]
    node = {"limits": {"chunk_studies": 1, "associations": 2}, **LONG_SETTLE}
    with around(objects, script=script, node=node) as place, place.opened() as run:
        work_through(run)
        admission = run.access.admission("pacs")
        assert (admission.ceiling, admission.strained_for) == (2, None)


@only_in("PACS: retrieval")
def test_the_first_instance_is_timed_when_it_comes(around):
    """A C-MOVE that ends at once and lacks an instance waits out its settle time behind it."""
    objects = list(tiny_instances(12, instances=3))
    lacking = [o.sop_instance_uid for o in objects[2::3][9:]]
    script = [Behaviour("move.drop_instances", instances=lacking)]
    node = {
        "limits": {"chunk_studies": 1, "associations": 2},
        "timeouts": {"settle_seconds": 3.2},
    }
    with around(objects, script=script, node=node) as place:
        # One pass is enough to time requests.
        place.file.write_text(f"{place.file.read_text()}retry_after_seconds: []\n")
        with place.opened() as run:
            work_through(run)
            assert run.access.admission("pacs").strained_for != "pacs-slow"


# --- classes


def of_class(sop_class: str, number: int = 2, seed: int = 0) -> list[StoredInstance]:
    return [
        changed(o, SOPClassUID=sop_class) for o in tiny_instances(1, instances=number, seed=seed)
    ]


def test_classes_that_are_not_told_cost_some_tens_of_requests(tmp_path, around):
    """And the reason says what would bring the instances."""
    untold = [Behaviour("find.omit_keys", keys=["SOPClassUID"])]
    objects = of_class(VENDORS_CLASS)
    with around(objects, script=untold, retrieve="c-get", receives=False) as place:
        place.pull()
        assert place.reasons() == [("failed", "class-not-told")]
        assert place.asked_for("C-GET") <= CLASS_NOT_TOLD.most
        assert len(STORAGE_CLASSES) > 100 > len(COMMON_CLASSES)


def test_instances_of_ordinary_classes_come_beside_those_that_cannot_be_named(around):
    untold = [Behaviour("find.omit_keys", keys=["SOPClassUID"])]
    ordinary, private = of_class("1.2.840.10008.5.1.4.1.1.2"), of_class(VENDORS_CLASS, 4)[2:]
    with around([*ordinary, *private], script=untold, retrieve="c-get", receives=False) as place:
        assert place.pull().rows == {Verdict.PARTIAL: 1}
        assert place.reasons() == [("failed", "class-not-told")]
        assert len(place.archived()) == 2
        assert place.asked_for("C-GET") <= CLASS_NOT_TOLD.most


def test_a_class_that_every_association_has_refused_is_not_proposed_again(around):
    """The PACS takes the vendor's class over no association, and holds three such studies."""
    objects = [o for seed in range(3) for o in of_class(VENDORS_CLASS, 2, seed)]
    objects += of_class("1.2.840.10008.5.1.4.1.1.2", seed=9)
    limits = {"limits": {"chunk_studies": 1}}
    refused = [Behaviour("assoc.contexts", result=3, services=[VENDORS_CLASS])]
    with around(objects, script=refused, retrieve="c-get", receives=False, node=limits) as place:
        place.pull()
        reasons = place.reasons()
        assert reasons.count(("archived", None)) == 1
        assert reasons.count(("failed", "sop-classes-refused")) == 3
        assert place.asked_for("C-GET") <= 1 + 2 * 3


US, US_RETIRED = "1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.6"
CT, SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.7"


@pytest.mark.parametrize("retrieve", METHODS)
@pytest.mark.parametrize(
    ("listed", "held", "requests"),
    [
        pytest.param(US_RETIRED, [US] * 3, 1, id="the retired class of it"),
        pytest.param(CT, [CT, CT, SECONDARY_CAPTURE], 2, id="one class for a series of two"),
        pytest.param(US, [US_RETIRED] * 3, 2, id="today's class of retired ones"),
        pytest.param(CT, ["1.2.840.10008.5.1.4.1.1.104.1"] * 3, 2, id="an image that is none"),
    ],
)
def test_another_class_than_listed_is_archived_with_a_warning(
    around, retrieve, listed, held, requests
):
    objects = [
        changed(o, SOPClassUID=uid)
        for o, uid in zip(tiny_instances(1, instances=3), held, strict=True)
    ]
    script = [Behaviour("find.answer", values={"SOPClassUID": listed}, level="IMAGE")]
    with around(objects, script=script, retrieve=retrieve) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        manifest = place.manifest(objects[0].study_instance_uid)
        warned = {i.sop_instance_uid for i in manifest.instances if i.warnings}
        assert {w for i in manifest.instances for w in i.warnings} == {"sop-class-differs"}
        differing = {
            o.sop_instance_uid for o, uid in zip(objects, held, strict=True) if uid != listed
        }
        assert warned == differing
        assert len(retrieves(place)) == (requests if retrieve == "c-get" else 1)
        assert len(place.pacs.sent_instances()) == 3
        place.audit()
