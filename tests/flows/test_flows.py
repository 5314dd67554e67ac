"""The flows: how they end, what they try again, what they hold of Prefect, what they let out."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit
from uuid import uuid4

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.states import State

from prefect_dicom.core.clock import Clock
from prefect_dicom.core.errors import ArchiveError, PacsError, PrefectDicomError
from prefect_dicom.core.model import Level, Verdict
from prefect_dicom.core.reasons import pointer
from prefect_dicom.discovery.service import DiscoveryService
from prefect_dicom.flows import archive_new, pull_cohort, rerun_failed, verify_archive
from prefect_dicom.ledger import Ledger
from prefect_dicom.run import artifacts, pipeline, run, steps
from prefect_dicom.run.archiving import ChunkArchiving
from prefect_dicom.run.error_translation import without_phi
from prefect_dicom.run.loop import PullLoop
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.retrieving import ChunkRetrieval
from prefect_dicom.tasks import report
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support.campaign import only_in
from tests.support.sites import Place, site_around, study, until
from tests.support.two_nodes import two_nodes

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("prefect_harness", "at_once")]

PATIENT = "Zyxquordt^Immanuela"


@pytest.fixture
def at_once(monkeypatch) -> None:
    """Tasks wait hardly at all before they try again."""
    monkeypatch.setattr(steps, "_RETRY_DELAYS_SECONDS", (0.01, 0.01))


@pytest.fixture
def place(tmp_path) -> Iterator[Place]:
    with site_around(tmp_path, tiny_instances(3, instances=2), retrieve="c-get") as place:
        text = place.file.read_text()
        place.file.write_text(f"{text}\nretry_after_seconds: []\n")
        yield place


class Logged(logging.Handler):
    """What the loggers of flow and task runs are given, as it is printed."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def text(self) -> str:
        return "\n".join(map(self.format, self.records))

    def ended_tasks(self) -> list[str]:
        """The names of the task runs that have come to their end, in this order."""
        return [
            record.task_run_name
            for record in self.records
            if record.name == "prefect.task_runs" and "Finished in state" in record.getMessage()
        ]


@pytest.fixture
def logged() -> Iterator[Logged]:
    handler = Logged()
    loggers = [logging.getLogger(f"prefect.{name}") for name in ("flow_runs", "task_runs")]
    loggers.append(logging.getLogger("prefect_dicom"))
    for logger in loggers:
        logger.addHandler(handler)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)


def run_pull(place: Place, rows=None) -> State:
    return pull_cohort(str(place.cohort(rows)), str(place.file), return_state=True)


def error_of(state: State) -> PrefectDicomError:
    assert state.is_failed()
    return state.result(raise_on_failure=False)


STEPS = {
    "discover": (DiscoveryService, "discover"),
    "retrieve": (ChunkRetrieval, "retrieve"),
    "archive_chunk": (ChunkArchiving, "archive"),
}


STEPS = {
    "discover": (DiscoveryService, "discover"),
    "retrieve": (ChunkRetrieval, "retrieve"),
    "archive_chunk": (ChunkArchiving, "archive"),
}


STEPS = {
    "discover": (DiscoveryService, "discover"),
    "retrieve": (ChunkRetrieval, "retrieve"),
    "archive_chunk": (ChunkArchiving, "archive"),
}


STEPS = {
    "discover": (DiscoveryService, "discover"),
    "retrieve": (ChunkRetrieval, "retrieve"),
    "archive_chunk": (ChunkArchiving, "archive"),
}


def attempts_of(monkeypatch, step: str, before=lambda attempt: None) -> list[int]:
    """Count the calls of a step of a run, and do something ahead of each."""
    attempts: list[int] = []
    part, method = STEPS[step]
    original = getattr(part, method)

    def counted(self, *args):
        attempts.append(len(attempts) + 1)
        before(attempts[-1])
        return original(self, *args)

    monkeypatch.setattr(part, method, counted)
    return attempts


# --------------------------------------------------------------------------------- how they end


def test_a_cohort_that_is_archived_as_a_whole_ends_as_completed(place, logged):
    state = run_pull(place)
    assert (state.type, state.name) == ("COMPLETED", "Completed")
    assert state.message.startswith("3 rows: 3 archived; 3 of 3 studies, 6 of 6 instances")
    assert logged.ended_tasks() == ["discover-lines-2-4", "retrieve-000001", "archive-000001"]
    place.audit()


def test_no_more_is_listed_ahead_than_one_chunk_an_association(tmp_path):
    """In the order in which the PACS was asked: lists of studies less retrieves that had begun."""
    associations, studies = 2, 8
    limits = {"associations": associations, "chunk_studies": 1}
    objects = tiny_instances(studies)
    with site_around(tmp_path, objects, retrieve="c-get", node={"limits": limits}) as place:
        assert run_pull(place).is_completed()
        place.is_whole()
        listed: set[str] = set()
        begun, most = 0, 0
        for request in place.pacs.log:
            begun += request.service == "C-GET"
            if request.service == "C-FIND" and request.level in ("SERIES", "IMAGE"):
                listed.update(request.keys["StudyInstanceUID"].split("\\"))
                most = max(most, len(listed) - begun)
    # Beside those whose turn it is, as many as there are associations.
    assert 0 < most <= 2 * associations


def test_a_finished_cohort_makes_no_task_runs(place, logged):
    run_pull(place)
    asked = place.asked_for()
    logged.records.clear()
    assert run_pull(place).name == "Completed"
    assert logged.ended_tasks() == []
    assert place.asked_for() == asked


def test_rows_that_fail_make_a_run_partial_and_a_rerun_completes_it(place):
    uids = place.pacs.holdings.study_instance_uids()
    place.pacs.script.append(Behaviour("move.drop_instances", instances=1, study=list(uids)[0]))
    state = run_pull(place)
    assert (state.type, state.name) == ("COMPLETED", "Partial")
    assert state.message.startswith("3 rows: 2 archived, 1 partial")
    place.pacs.script.clear()
    state = rerun_failed("1", str(place.file), return_state=True)
    assert state.name == "Completed"
    assert state.message.startswith("3 rows: 3 archived")
    place.audit()


@only_in("operations")
def test_a_rerun_takes_only_the_failures_it_is_told_to(place):
    rows = [{"PatientID": "00000000"}, {"PatientID": "99999999"}]
    assert run_pull(place, rows).name == "Partial"
    asked = place.asked_for()
    state = rerun_failed("1", str(place.file), return_state=True)
    assert (state.name, place.asked_for()) == ("Partial", asked)
    state = rerun_failed("1", str(place.file), reasons=("no-match",), return_state=True)
    # Twice: an archive that never answered by this key may do so when it is asked more simply.
    assert (state.name, place.asked_for()) == ("Partial", asked + 2)


def test_verification_fails_when_an_object_has_gone(place):
    run_pull(place)
    state = verify_archive("1", str(place.file), return_state=True)
    assert state.message == "3 studies checked at level checksum, 0 with faults"
    assert state.is_completed()
    next(path for path in (place.folder / "archive").rglob("*.dcm")).unlink()
    state = verify_archive("1", str(place.file), Level.EXISTS, return_state=True)
    assert state.is_failed()
    assert state.message == "3 studies checked at level exists, 1 with faults"


# ------------------------------------------------------------------- what a schedule runs by itself


def other_cohort(place: Place, *uids: str) -> str:
    """The path of another list, of these studies."""
    path = place.folder / f"other-{len(uids)}.csv"
    path.write_text("StudyInstanceUID\n" + "".join(f"{uid}\n" for uid in uids))
    return str(path)


def test_everything_new_is_a_cohort_like_any_other(place):
    for stored in study(7, StudyDate=f"{date.today() - timedelta(1):%Y%m%d}"):
        place.pacs.holdings.add(stored)
    state = archive_new(str(place.file), return_state=True)
    assert (state.type, state.name) == ("COMPLETED", "Completed")
    assert "1 of 1 studies" in state.message


@only_in("operations")
def test_a_rerun_without_a_cohort_goes_on_with_all_that_have_something_left(place):
    first, second, _ = place.pacs.holdings.study_instance_uids()
    place.pacs.script.append(Behaviour("move.drop_instances", instances=1, study=first))
    assert run_pull(place).name == "Partial"
    pull_cohort(other_cohort(place, second), str(place.file))
    place.pacs.script.clear()
    state = rerun_failed(site=str(place.file), return_state=True)
    assert state.name == "Completed"
    assert state.message == "1 cohorts archived as a whole, 0 with rows left"


@only_in("operations")
def test_what_keeps_one_cohort_from_its_end_keeps_no_other(place, monkeypatch):
    first, second, third = place.pacs.holdings.study_instance_uids()
    for path in (other_cohort(place, first), other_cohort(place, second, third)):
        register_cohort(place.site, Path(path), None)
    original = pipeline.run_pipeline

    def breaks_once(pull, engine):
        if pull.cohort.number == 1:
            raise PacsError("pacs-refused")
        return original(pull, engine)

    monkeypatch.setattr(pipeline, "run_pipeline", breaks_once)
    assert error_of(rerun_failed(site=str(place.file), return_state=True)).code == "pacs-refused"
    with place.ledger() as ledger:
        assert [ledger.progress.totals(n).rows[Verdict.ARCHIVED] for n in (1, 2)] == [0, 2]


@only_in("operations")
def test_verification_without_a_cohort_is_of_all_that_is_archived(place):
    run_pull(place)
    state = verify_archive(site=str(place.file), return_state=True)
    assert state.is_completed()
    assert state.message.startswith("3 studies checked at level checksum")


def test_an_archive_that_is_not_there_is_told_before_the_pacs_is_asked(place):
    place.change(archive={"directory": "nowhere"})
    assert error_of(run_pull(place)).code == "archive-missing"
    assert place.asked_for() == 0


# -------------------------------------------------------------------------- what is tried again


def with_waits(place: Place, *seconds: float) -> None:
    text = place.file.read_text()
    waits = f"retry_after_seconds: {list(seconds)}"
    place.file.write_text(text.replace("retry_after_seconds: []", waits))


def test_a_pacs_that_refuses_connections_is_asked_again_when_its_clock_says_so(place, monkeypatch):
    with_waits(place, 0.01, 0.01)
    place.pacs.close()
    attempts = attempts_of(
        monkeypatch, "discover", lambda attempt: attempt == 3 and place.pacs.start()
    )
    assert run_pull(place).name == "Completed"
    assert attempts == [1, 2, 3]


@only_in("operations")
def test_a_pacs_that_stays_away_fails_the_run_and_loses_nothing(place, monkeypatch, logged):
    with_waits(place, 0.2, 0.2)
    descriptions = []
    monkeypatch.setattr(
        report,
        "create_progress_artifact",
        lambda percent, key, description: descriptions.append(description) or uuid4(),
    )
    place.pacs.close()
    attempts = attempts_of(monkeypatch, "discover")
    error = error_of(run_pull(place))
    assert error.code == "pacs-refused"
    assert error.detail.endswith("node pacs is disabled; 3 rows stay pending, none is lost")
    assert attempts == [1, 2, 3]
    assert "node pacs: waiting until" in logged.text
    (shown,) = descriptions
    until = r"node pacs: waiting until \d\d:\d\d:\d\d \(pacs-refused\)"
    assert re.search(f"3 pending.*; {until}", shown)
    assert f"More: {pointer('pacs-refused')}" in logged.text
    place.pacs.start()
    assert rerun_failed("1", str(place.file), return_state=True).name == "Completed"


@only_in("operations")
def test_a_run_goes_on_with_the_nodes_that_are_left(tmp_path, logged):
    a, b, c = ([stored] for stored in tiny_instances(3, instances=1))
    rejects = [Behaviour("assoc.reject", result=1, source=1, reason=7)]
    corrupt = [Behaviour("pacs.corrupt", study=a[0].study_instance_uid)]
    rows = [{"StudyInstanceUID": each[0].study_instance_uid} for each in (a, b, c)]
    with two_nodes(tmp_path, [*a, *b], [*a, *c], faulty_main=corrupt) as two:
        # One study fails on the first node, one is on the second alone.
        nodes = ["main", "vna"]
        state = pull_cohort(str(two.cohort(*rows)), str(two.place.file), nodes, return_state=True)
        assert state.name == "Completed"
        assert [words[2][-1] for words in two.words()] == ["vna", "main", "vna"]
        chunks = [name for name in logged.ended_tasks() if name.startswith("retrieve")]
        assert len(chunks) == len({*chunks}) >= 3

        # The first is disabled in the run of another cohort, of which the second has two rows.
        two.main.script[:] = rejects
        two.number = 2
        path = two.place.cohort([*rows[::-1], {"AccessionNumber": "NOWHERE"}])
        error = error_of(pull_cohort(str(path), str(two.place.file), nodes, return_state=True))
        assert error.code == "called-ae-title-unknown"
        left = "node main is disabled; 2 rows stay pending, none is lost"
        assert error.detail.endswith(left)
        path = two.place.cohort(rows[::-2])
        assert pull_cohort(str(path), str(two.place.file), nodes, return_state=True).is_completed()


def test_an_archive_that_is_away_is_no_reason_to_disable_the_pacs(place, monkeypatch):
    def away(attempt: int) -> None:
        if attempt < 3:
            raise ArchiveError("archive-unavailable")

    attempts = attempts_of(monkeypatch, "archive_chunk", away)
    assert run_pull(place).name == "Completed"
    assert attempts == [1, 2, 3]


def test_what_a_person_must_change_is_not_tried_again(place, monkeypatch):
    place.change(node={"called_ae_title": "NOBODY"})
    attempts = attempts_of(monkeypatch, "discover")
    error = error_of(run_pull(place))
    assert (type(error), error.code) == (PacsError, "called-ae-title-unknown")
    assert attempts == [1]


@only_in("operations")
def test_chunks_of_all_passes_have_different_numbers(place, logged):
    with_waits(place, 0.01)
    uids = place.pacs.holdings.study_instance_uids()
    place.pacs.script.append(Behaviour("move.drop_instances", instances=1, study=list(uids)[0]))
    assert run_pull(place).name == "Partial"
    assert [name for name in logged.ended_tasks() if name.startswith("archive")] == [
        "archive-000001",
        "archive-000002",
    ]


def test_prefect_shows_where_the_report_of_the_cohort_lies(place, monkeypatch):
    links = []
    monkeypatch.setattr(report, "create_link_artifact", lambda link, **_: links.append(link))
    assert run_pull(place).name == "Completed"
    (link,) = links
    assert link.startswith("file:///")
    page = Path(unquote(urlsplit(link).path)).read_text()
    assert '<span data-figure="percent">100</span>' in page
    assert ">done</span>" in page


# ------------------------------------------------------------------------ what people tell them


@contextlib.contextmanager
def somebody(place: Place, act: Callable[[Ledger], None]) -> Iterator[None]:
    """While the block runs its flow, somebody acts when the first object has come."""

    def wait_and_act() -> None:
        until(place.pacs.sent_instances, "an object comes", 60)
        with place.ledger() as ledger:
            act(ledger)

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    yield
    thread.join()


def slowly(place: Place) -> None:
    place.pacs.script.append(Behaviour("net.slow", service="C-GET", seconds=0.5))


@only_in("operations")
def test_a_run_that_is_told_to_end_is_cancelled_and_a_rerun_goes_on(place, logged):
    slowly(place)
    with somebody(place, lambda ledger: ledger.run_control.cancel(1)):
        state = run_pull(place)
    assert (state.type, state.name) == ("CANCELLED", "Cancelled")
    assert state.message.endswith("archived; a rerun continues from here")
    assert "retrieve-000001" in logged.ended_tasks()
    assert "Finished in state Failed" not in logged.text, "nothing has failed"
    place.audit()
    place.pacs.script.clear()
    assert rerun_failed("1", str(place.file), return_state=True).name == "Completed"
    place.is_whole()


def test_a_paused_run_waits_in_place_and_others_that_begin_end_at_once(place, monkeypatch):
    slowly(place)
    shown = []
    monkeypatch.setattr(
        report,
        "create_progress_artifact",
        lambda percent, key, description: shown.append(description) or uuid4(),
    )

    def pause_for_a_while(ledger: Ledger) -> None:
        ledger.run_control.pause(1)
        until(lambda: all(run.paused_at for run in ledger.runs.under_way(1)), "the run waits")
        place.audit()
        place.pacs.script.clear()
        asked = place.asked_for()
        late = rerun_failed("1", str(place.file), return_state=True)
        assert late.name == "Partial"
        assert late.message.endswith("paused, until `prefect-dicom resume 1`")
        assert any("paused, until `prefect-dicom resume 1`" in words for words in shown)
        assert place.asked_for() == asked
        ledger.run_control.resume(1)

    with somebody(place, pause_for_a_while):
        assert run_pull(place).name == "Completed"
    place.is_whole()


# ----------------------------------------------------------------------- the share of the node


@pytest.fixture
def limit(prefect_harness) -> Iterator[str]:
    name = "pacs-pacs"
    yield name
    with get_client(sync_client=True) as client:
        client.delete_global_concurrency_limit_by_name(name)


def set_limit(name: str, slots: int, active: bool = True) -> None:
    with get_client(sync_client=True) as client:
        client.request(
            "POST", "/v2/concurrency_limits/", json={"name": name, "limit": slots, "active": active}
        )


def active_slots(name: str) -> int:
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name(name).active_slots


def test_a_run_holds_its_associations_of_the_nodes_limit_to_its_end(place, limit, monkeypatch):
    set_limit(limit, 5)
    held = []
    attempts_of(monkeypatch, "archive_chunk", lambda _: held.append(active_slots(limit)))
    assert run_pull(place).name == "Completed"
    assert held == [place.site.nodes["pacs"].limits.associations]
    assert active_slots(limit) == 0


def test_a_run_that_fails_gives_the_nodes_limit_back(place, limit):
    set_limit(limit, 5)
    place.change(node={"called_ae_title": "NOBODY"})
    error_of(run_pull(place))
    assert active_slots(limit) == 0


@only_in("operations")
def test_a_limit_that_is_not_in_force_keeps_nobody(place, limit):
    set_limit(limit, 1, active=False)
    assert run_pull(place).name == "Completed"


def test_a_limit_that_could_never_be_met_is_a_fault_and_not_waited_for(place, limit):
    set_limit(limit, 1)
    error = error_of(run_pull(place))
    assert error.code == "configuration-faulty"
    assert "allows 1 associations, limits.associations of the node is 2" in str(error)


# --------------------------------------------------------------------------- what they let out


@pytest.mark.parametrize("step", ["discover", "retrieve", "archive_chunk"])
def test_a_task_replaces_errors_of_others_by_their_type(place, logged, monkeypatch, step):
    def fail(self, *_):
        raise ValueError(f"no such patient: {PATIENT}")

    monkeypatch.setattr(*STEPS[step], fail)
    state = run_pull(place)
    assert str(error_of(state)) == "unexpected: ValueError"
    assert "raise ValueError" in logged.text, "the local log says where it came from"
    assert PATIENT not in state.message + logged.text


def test_a_flow_replaces_errors_of_others_too(place, logged, monkeypatch):
    def fail(*_):
        raise KeyError(PATIENT)

    monkeypatch.setattr(pipeline, "write_reports", fail)
    states = [run_pull(place), rerun_failed("1", str(place.file), return_state=True)]
    # The package's attribute of this name is the flow, not its module.
    module = sys.modules["prefect_dicom.flows.verify_archive"]
    monkeypatch.setattr(module, "verify_cohort", fail)
    states.append(verify_archive("1", str(place.file), return_state=True))
    assert [str(error_of(state)) for state in states] == ["unexpected: KeyError"] * 3
    assert PATIENT not in logged.text + "".join(state.message for state in states)


def test_what_an_error_was_made_from_stays_inside(place, logged, monkeypatch):
    def fail(self, *_):
        try:
            raise ValueError(PATIENT)
        except ValueError as error:
            raise PacsError("not-permitted") from error

    monkeypatch.setattr(ChunkRetrieval, "retrieve", fail)
    state = run_pull(place)
    assert str(error_of(state)).startswith("not-permitted: 3 rows stay pending")
    assert "Traceback" in logged.text
    assert PATIENT not in state.message + logged.text


def test_a_stop_order_passes_the_edge_as_it_is():
    with pytest.raises(KeyboardInterrupt), without_phi():
        raise KeyboardInterrupt


# ------------------------------------------------------------------------------------- windows


def only_in(seconds: float, on_close: str = "stop") -> dict:
    """A schedule with one window, which opens so many seconds from now, at the minute."""
    opens = datetime.now(UTC) + timedelta(seconds=seconds)
    closes = opens + timedelta(hours=2)
    window = {"name": "night", "hours": f"{opens:%H:%M}-{closes:%H:%M}"}
    return {"time_zone": "UTC", "on_close": on_close, "windows": [window]}


def test_a_run_outside_of_the_windows_ends_as_partial_and_says_when_the_next_one_opens(
    place, logged
):
    schedule = only_in(3 * 3600)
    place.change(node={"access_schedule": schedule})

    state = run_pull(place)

    assert state.name == "Partial" and state.is_completed()
    opens = schedule["windows"][0]["hours"][:5]
    assert f"node pacs: closed until {opens}" in state.message
    assert not place.pacs.log and not logged.ended_tasks()
    assert {verdict.reason for verdict in place.verdicts()} == {"interrupted"}


def test_a_run_that_is_to_wait_for_its_window_goes_on_when_it_opens(place, monkeypatch):
    place.change(node={"access_schedule": only_in(3 * 3600, "wait")})
    shown: list[str] = []
    show = artifacts.ProgressArtifact.show
    monkeypatch.setattr(
        artifacts.ProgressArtifact,
        "show",
        lambda self, count, waits="", **more: (
            shown.append(waits),
            show(self, count, waits, **more),
        ),
    )
    waits = []

    class Leaping(Clock):
        """Three hours pass with the first wait."""

        def now(self) -> datetime:
            return super().now() + timedelta(hours=4 if waits else 0)

        def wait(self, event, seconds: float) -> bool:
            waits.append(seconds)
            return super().wait(event, 0)

    monkeypatch.setattr(run, "Clock", Leaping)

    state = run_pull(place)

    assert state.name == "Completed", state.message
    assert waits and any("closed until" in words for words in shown)
    assert "night window until" in shown[-1]
    place.is_whole()


@pytest.mark.parametrize("on_close", ["stop", "wait"])
def test_a_run_that_a_second_node_keeps_waiting_is_not_begun_again_and_again(
    place, monkeypatch, on_close
):
    """The first node may be asked and lacks a study; the second one's window opens tomorrow."""
    document = yaml.safe_load(place.file.read_text())
    first = document["nodes"]["pacs"]
    schedule = only_in(3 * 3600, on_close)
    document["nodes"]["other"] = {**first, "access_schedule": schedule}
    place.file.write_text(yaml.safe_dump(document))
    passes = []
    one_pass = PullLoop.one_pass

    def counted(self):
        passes.append(len(passes))
        if len(passes) > 1:
            self.run.control.stop.set()
        return one_pass(self)

    def waited(self, event, seconds):
        event.set()
        return True

    monkeypatch.setattr(PullLoop, "one_pass", counted)
    monkeypatch.setattr(Clock, "wait", waited)
    rows = [{"StudyInstanceUID": uid} for uid in place.pacs.holdings.study_instance_uids()]
    cohort = place.cohort([*rows, {"StudyInstanceUID": "2.25.4711"}])

    state = pull_cohort(str(cohort), str(place.file), ["pacs", "other"], return_state=True)

    assert state.is_final() and len(passes) <= 1 + (on_close == "wait")
