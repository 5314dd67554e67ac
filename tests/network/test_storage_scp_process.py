"""The managed receiver: one process for all runs of a site, and for nobody else."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefect_dicom.core.errors import ReceiverError, SpoolFull
from prefect_dicom.core.model import Disposition, Verdict
from prefect_dicom.network.storage_scp import ReceiverLease, running_receiver
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import open_run
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support.campaign import subset
from tests.support.sites import site_around, until

MORE_THAN_ANY_DISK = 1 << 60


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.campaign("concurrency")
def test_leases_share_one_process_that_ends_when_the_last_has_gone(tmp_path):
    with site_around(tmp_path, [], receiver={"idle_seconds": 0}) as place:
        assert running_receiver(place.site) is None
        with ReceiverLease(place.site) as one:
            with ReceiverLease(place.site) as other:
                pid = one.status()["pid"]
                assert other.status()["pid"] == pid
                # Others than the one that asks.
                assert one.status()["runs"] == 1
            until(lambda: one.status()["runs"] == 0, "the other lease is given back")
            # Longer than it takes it to look whether anybody needs it.
            end = time.monotonic() + 1.5
            until(lambda: one.status()["pid"] != pid or time.monotonic() > end, "it has looked")
            assert one.status()["pid"] == pid
        until(lambda: not lives(pid), "the receiver has ended")
        assert running_receiver(place.site) is None
        with ReceiverLease(place.site) as again:
            assert again.status()["pid"] != pid


def test_the_control_socket_is_the_owners_alone(tmp_path):
    with site_around(tmp_path, []) as place, ReceiverLease(place.site):
        spool = place.site.spool.path
        assert stat.S_IMODE(spool.stat().st_mode) == 0o700
        assert stat.S_IMODE((spool / "receiver.sock").stat().st_mode) & 0o077 == 0


@pytest.mark.campaign("concurrency")
def test_two_runs_at_once_each_get_what_they_asked_for(tmp_path):
    objects = list(tiny_instances(4, instances=3))
    uids = list(dict.fromkeys(o.study_instance_uid for o in objects))
    met = threading.Barrier(2, timeout=20)

    class Meeting(threading.Event):
        """In place of an event: goes on when both runs have begun to receive."""

        def wait(self, timeout: float | None = None) -> bool:
            met.wait()
            return True

    script = [
        Behaviour("net.stall_after", answers=2, hold=Meeting(), service="C-MOVE", on_request=n)
        for n in (1, 2)
    ]
    with site_around(tmp_path, objects, script=script) as place:
        cohorts = []
        for half in (uids[:2], uids[2:]):
            path = place.cohort([{"StudyInstanceUID": uid} for uid in half])
            cohorts.append(register_cohort(place.site, path, None).number)

        def run(cohort: int) -> tuple[Counter, int]:
            with open_run(place.site, cohort) as pull:
                work_through(pull)
                return pull.ledger.progress.totals(cohort).rows, pull.nodes.receiver().status()[
                    "pid"
                ]

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(run, cohorts))
        assert [rows for rows, _ in results] == [{Verdict.ARCHIVED: 2}] * 2
        assert len({pid for _, pid in results}) == 1
        assert place.quarantined() == []
        assert set(Counter(place.pacs.sent_instances()).values()) == {1}
        ids = [request.message_id for request in place.pacs.requests("C-MOVE")]
        assert len(set(ids)) == len(ids)


@pytest.mark.campaign("concurrency")
@pytest.mark.parametrize("shared", subset(["ae_title", "port"], ["ae_title"]))
def test_another_site_cannot_have_the_same_ae_title_or_port(tmp_path, shared):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    with (
        site_around(tmp_path / "one", tiny_instances(1)) as one,
        site_around(tmp_path / "other", tiny_instances(1)) as other,
    ):
        value = getattr(one.site.receiver, shared)
        own = getattr(other.site.receiver, shared)
        other.change(receiver={shared: value})
        with ReceiverLease(one.site):
            with pytest.raises(ReceiverError) as caught:
                other.pull()
            assert caught.value.code == "receiver-taken"
            assert caught.value.disposition is Disposition.OPERATOR
            assert str(value) in caught.value.detail
            # Nothing was asked of the PACS before that was clear.
            assert other.asked_for() == 0
            assert one.pull().rows == {Verdict.ARCHIVED: 1}
        other.change(receiver={shared: own})
        assert other.pull().rows == {Verdict.ARCHIVED: 1}


@pytest.mark.campaign("concurrency")
def test_other_settings_do_not_take_over_a_receiver_that_is_in_use(tmp_path):
    with site_around(tmp_path, []) as place:
        before = place.file.read_text()
        with ReceiverLease(place.site) as lease:
            pid = lease.status()["pid"]
            place.change(receiver={"idle_seconds": 2})
            with pytest.raises(ReceiverError, match="receiver-taken"):
                ReceiverLease(place.site)
            assert lease.status()["pid"] == pid
        place.file.write_text(before)


@pytest.mark.campaign("concurrency")
def test_a_receiver_that_died_is_started_again(tmp_path):
    with site_around(tmp_path, []) as place, ReceiverLease(place.site) as lease:
        pid = lease.status()["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda: not lives(pid), "it is dead")
        assert lease.status()["pid"] != pid


def test_at_the_disk_reserve_instances_are_refused_for_want_of_resources(tmp_path):
    parts = {"spool": {"reserve_bytes": MORE_THAN_ANY_DISK}}
    with site_around(tmp_path, [], **parts) as place, ReceiverLease(place.site):
        assert place.store(next(tiny_instances(1))) == 0xA700
        assert place.spooled() == []
        assert place.quarantined() == []


@pytest.mark.parametrize("retrieve", ["c-move", "c-get"])
def test_at_the_disk_reserve_a_run_stops_and_fails_no_study(tmp_path, retrieve):
    with site_around(tmp_path, tiny_instances(2), retrieve=retrieve) as place:
        place.change(spool={"reserve_bytes": MORE_THAN_ANY_DISK})
        with pytest.raises(SpoolFull) as caught:
            place.pull()
        assert caught.value.disposition is Disposition.OPERATOR
        assert place.totals().rows == {Verdict.PENDING: 2}
        assert place.asked_for("C-MOVE", "C-GET") == 0
        control = place.site.spool.path / "receiver.sock"
        until(lambda: not control.exists(), "the receiver has ended")
        place.change(spool={"reserve_bytes": 0})
        assert place.pull().rows == {Verdict.ARCHIVED: 2}
        place.audit()


def test_a_disk_that_fills_up_within_a_move_stops_the_run_and_loses_nothing(tmp_path):
    class Full(threading.Event):
        """In place of an event: from now on there is no room."""

        def wait(self, timeout: float | None = None) -> bool:
            spool.free_bytes = lambda: 0
            return True

    stall = Behaviour("net.stall_after", answers=3, hold=Full(), service="C-GET", on_request=1)
    objects = list(tiny_instances(1, instances=8))
    with site_around(tmp_path, objects, retrieve="c-get", script=[stall]) as place:
        with place.opened() as pull:
            spool = pull.spool
            with pytest.raises(SpoolFull):
                work_through(pull)
        statuses = [sent.status for sent in place.pacs.requests("C-GET")[0].sent]
        assert statuses == [0x0000] * 3 + [0xA700] * 5
        assert place.totals().rows == {Verdict.PENDING: 1}
        # What had arrived made room for itself.
        assert len(place.archived()) == 3
        assert place.spooled() == []
        place.audit()
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert len(place.pacs.sent_instances()) == 8 + 5
        place.audit()


def test_a_spool_that_is_smaller_than_a_study_is_filled_and_emptied_in_turns(tmp_path):
    with site_around(tmp_path, tiny_instances(1, instances=8), retrieve="c-get") as place:
        with place.opened() as pull:
            pull.spool.free_bytes = lambda: 3 - len(place.spooled())
            work_through(pull)
        assert place.totals().rows == {Verdict.ARCHIVED: 1}
        assert len(place.pacs.requests("C-GET")) == 3
        place.audit()
