"""One study that fails in the same way each time does not hold the run that asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from prefect_dicom.core.model import Verdict
from prefect_dicom.run.loop import PullLoop, _pull_chunks
from prefect_dicom.run.run import Run, reopen_transient
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support.walking import Walk


def loop_of(run: Run, show: Callable[[], None] = lambda: None) -> PullLoop:
    def discover(first_line: int, last_line: int) -> None:
        run.discovery.discover(first_line, last_line)

    def pull() -> None:
        for node, chunks in run.chunks.chunks_by_node().items():
            _pull_chunks(run, node, chunks)

    return PullLoop(
        run=run,
        discover=discover,
        pull=pull,
        show=lambda count, waits="", *, now=False: show(),
        say=lambda words: None,
        limits=contextlib.nullcontext,
    )


def test_a_study_that_can_never_be_whole_makes_no_further_pass(around):
    """Asked for among others and alone, to the same end; a rerun tries it again."""
    objects = list(tiny_instances(3, instances=3))
    corrupt = objects[-1].sop_instance_uid
    walk = Walk()
    with around(objects, script=[Behaviour("pacs.corrupt", instances=[corrupt])]) as place:
        with place.opened(clock=walk) as run:
            began = walk.seconds
            assert loop_of(run).work_through() is None
            assert walk.seconds - began < min(run.site.retry_after_seconds)
        assert place.totals().rows == {Verdict.ARCHIVED: 2, Verdict.PARTIAL: 1}
        place.pacs.script.clear()
        assert place.rerun().rows == {Verdict.ARCHIVED: 3}


def test_the_others_are_tried_again_beside_it(around):
    objects = list(tiny_instances(2, instances=2))
    fails = objects[0].study_instance_uid
    script = [
        Behaviour("pacs.corrupt", instances=[objects[-1].sop_instance_uid]),
        Behaviour("move.success_nothing", study=fails),
    ]
    with around(objects, script=script) as place, place.opened() as run:
        for first, last in run.discovery.pages():
            run.discovery.discover(first, last)
        for node, chunks in run.chunks.chunks_by_node().items():
            _pull_chunks(run, node, chunks)
        assert reopen_transient(run)
        states = {uid: str(s.state) for uid, s in place.studies().items()}
        assert states.pop(fails) == "pending"
        assert set(states.values()) == {"failed"}


def test_status_says_what_a_living_run_waits_for_and_until_when(around):
    seen: set[str] = set()
    script = [Behaviour("move.success_nothing")]
    with around(tiny_instances(1, instances=2), script=script) as place:

        def look() -> None:
            with place.ledger() as ledger:
                seen.update(run.waits for run in ledger.runs.under_way(1))

        with place.opened(clock=Walk()) as run:
            loop_of(run, look).work_through()
        assert any("waiting until" in words and "before another pass" in words for words in seen)
