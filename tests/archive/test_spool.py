"""The spool is a cache: whatever happens to it costs the objects it happened to, nothing else.

Disks that are full, read-only or limited are real ones. What a fault has cost is asked for again,
exactly that, and the archive never sees a byte that did not arrive.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from prefect_dicom.archive.spool import Spool
from prefect_dicom.core.errors import PrefectDicomError, SpoolFull
from prefect_dicom.core.model import Disposition, Verdict
from prefect_dicom.network.storage_scp import ReceiverLease
from prefect_dicom.testing import Behaviour, StoredInstance, tiny_instances
from tests.support.campaign import subset
from tests.support.disks import fill, read_only, remount, small_disk
from tests.support.sites import LOOPBACK, Place, site_around, until

pytestmark = pytest.mark.campaign("spool")

METHODS = ("c-move", "c-get")
SERVICES = {"c-move": "C-MOVE", "c-get": "C-GET"}
MANY = 6
_SIDE = 200  # of an image: 40 KB, ten pages


def objects_of_pages() -> list[StoredInstance]:
    return list(tiny_instances(1, instances=MANY, side=_SIDE))


@contextmanager
def on_a_disk(folder: Path, retrieve: str, *, mebibytes: int = 4, **more) -> Iterator[Place]:
    """A site whose spool has a small disk of its own."""
    inodes = more.pop("inodes", None)
    with small_disk(folder / "disk", mebibytes=mebibytes, inodes=inodes) as disk:
        parts = {"spool": {"path": str(disk / "spool"), "reserve_bytes": 0}, **more}
        objects = parts.pop("objects", None) or objects_of_pages()
        with site_around(folder, objects, retrieve=retrieve, **parts) as place:
            yield place


def disk_of(place: Place) -> Path:
    return place.site.spool.path.parent


def times_kept(place: Place) -> Counter[str]:
    """How often the receiver has said success to each object that the PACS holds."""
    sent = [one for request in list(place.pacs.log) for one in request.sent]
    held = {stored.sop_instance_uid for stored in place.pacs.holdings}
    return Counter(
        one.sop_instance_uid
        for one in sent
        if one.status == 0x0000 and one.sop_instance_uid in held
    )


@contextmanager
def standing_by(place: Place) -> Iterator[int | None]:
    """Have the receiver run before the disk is full; its process id, None for C-GET."""
    if place.site.nodes["pacs"].retrieve == "c-get":
        Spool(place.site.spool.path)
        yield None
        return
    with ReceiverLease(place.site) as lease:
        yield lease.status()["pid"]


# --- full disks


ROOMS = [0, 1, 5_000, 39_000, 41_000, 100_000, 200_000]


@pytest.mark.parametrize("retrieve", METHODS)
@pytest.mark.parametrize("room", subset(ROOMS, [5_000]))
def test_a_disk_that_is_full_at_some_byte_is_never_blamed_on_the_pacs(tmp_path, retrieve, room):
    with on_a_disk(tmp_path, retrieve) as place, standing_by(place):
        filler = fill(disk_of(place), but=room)
        if room > 40_000:
            # What has arrived is archived, and makes room for the rest.
            assert dict(place.pull().rows) == {Verdict.ARCHIVED: 1}
        else:
            with pytest.raises(SpoolFull) as caught:
                place.pull()
            assert caught.value.disposition is Disposition.OPERATOR
            assert dict(place.totals().rows) == {Verdict.PENDING: 1}
            assert place.asked_for(SERVICES[retrieve]) <= 1
        # Half an object takes no room from the next.
        assert list(place.site.spool.path.joinpath("incoming").iterdir()) == []
        place.audit()
        filler.unlink()
        place.goes_on()
        assert set(times_kept(place).values()) == {1}


@pytest.mark.parametrize("retrieve", subset(METHODS, ["c-move"]))
def test_a_disk_that_fills_up_in_the_middle_of_a_study_keeps_what_has_come(tmp_path, retrieve):
    fillers: list[Path] = []

    class Filling(threading.Event):
        """In place of an event: from now on there is room for half an object."""

        def wait(self, timeout: float | None = None) -> bool:
            if not fillers:
                fillers.append(fill(disk_of(place), but=20_000))
            return True

    service = SERVICES[retrieve]
    stall = Behaviour("net.stall_after", answers=3, hold=Filling(), service=service, on_request=1)
    objects = objects_of_pages()
    with on_a_disk(tmp_path, retrieve, script=[stall]) as place, standing_by(place):
        # Three were archived and made room for one or two at a time.
        assert dict(place.pull().rows) == {Verdict.ARCHIVED: 1}
        first = place.pacs.requests(service)[0]
        assert [one.status for one in first.sent] == [0x0000] * 3 + [0xA700] * (len(objects) - 3)
        place.is_whole()
        assert set(times_kept(place).values()) == {1}


@pytest.mark.parametrize("retrieve", subset(METHODS, ["c-get"]))
def test_a_disk_without_room_for_another_name_is_full(tmp_path, retrieve):
    with on_a_disk(tmp_path, retrieve, inodes=64) as place, standing_by(place):
        # A part can be made, the folder it would be moved to cannot.
        names = use_up_names(disk_of(place), but=1)
        with pytest.raises(SpoolFull):
            place.pull()
        [request] = place.pacs.requests(SERVICES[retrieve])
        assert {one.status for one in request.sent} == {0xA700}
        assert place.spooled() == []
        place.audit()
        for name in names:
            name.unlink()
        place.goes_on()
        assert set(times_kept(place).values()) == {1}


def use_up_names(disk: Path, *, but: int) -> list[Path]:
    """Make empty files until so many inodes are left."""
    names = [disk / f"name-{number}" for number in range(os.statvfs(disk).f_favail - but)]
    for name in names:
        name.touch()
    return names


@pytest.mark.parametrize("retrieve", subset(METHODS, ["c-move"]))
def test_a_quarantine_without_room_is_reported_to_the_sender(tmp_path, retrieve):
    stranger = list(tiny_instances(1, seed=7, side=_SIDE))
    script = [Behaviour("store.unsolicited", extra=stranger)]
    with on_a_disk(tmp_path, retrieve, inodes=64, script=script) as place, standing_by(place):
        # Enough for the stranger's part, and none for its note.
        names = use_up_names(disk_of(place), but=1)
        with pytest.raises(SpoolFull):
            place.pull()
        assert place.quarantined() == []
        assert place.spooled() == []
        for name in names:
            name.unlink()
        place.goes_on()
        [note] = place.quarantined()
        assert note.with_suffix(".dcm").read_bytes().endswith(stranger[0].encoded())


# --- read-only and limited


@pytest.mark.parametrize("retrieve", subset(METHODS, ["c-get"]))
def test_a_spool_that_is_read_only_is_named_before_anything_is_asked(tmp_path, retrieve):
    with on_a_disk(tmp_path, retrieve) as place:
        place.cohort()
        with standing_by(place):
            pass
        # Not before the receiver has ended, which holds a file open.
        until(lambda: remount(disk_of(place), "ro"), "the disk is read-only")
        with pytest.raises(PrefectDicomError) as caught:
            place.pull()
        assert caught.value.code == "spool-unusable"
        assert caught.value.disposition is Disposition.OPERATOR
        assert place.asked_for() == 0
        remount(disk_of(place), "rw")
        place.goes_on()


@pytest.mark.parametrize("retrieve", subset(METHODS, ["c-move"]))
def test_a_spool_that_becomes_read_only_stops_the_run_and_fails_no_study(tmp_path, retrieve):
    class Remounting(threading.Event):
        """In place of an event: from now on nothing can be written."""

        def wait(self, timeout: float | None = None) -> bool:
            disk.append(stack.enter_context(read_only(place.site.spool.path / "incoming")))
            return True

    service, disk = SERVICES[retrieve], []
    stall = Behaviour(
        "net.stall_after", answers=3, hold=Remounting(), service=service, on_request=1, times=1
    )
    with on_a_disk(tmp_path, retrieve, script=[stall]) as place, standing_by(place):
        with ExitStack() as stack, pytest.raises(PrefectDicomError) as caught:
            place.pull()
        assert disk
        assert caught.value.code == "spool-unusable"
        assert dict(place.totals().rows) == {Verdict.PENDING: 1}
        assert place.asked_for(service) == 1
        place.audit()
        place.goes_on()
        assert set(times_kept(place).values()) == {1}


@pytest.mark.parametrize("retrieve", subset(METHODS, ["c-get"]))
def test_an_instance_that_is_larger_than_a_quota_allows_stops_the_run(tmp_path, retrieve):
    objects = list(tiny_instances(1, instances=MANY, side=64))
    script = [Behaviour("store.huge", instances=1, mebibytes=12)]
    with site_around(tmp_path, objects, retrieve=retrieve, script=script) as place:
        with standing_by(place) as receiver, limited_to(8 << 20, receiver):
            with pytest.raises(SpoolFull):
                place.pull()
            # All but the large one are in the archive.
            assert len(place.archived()) == MANY - 1
            assert dict(place.totals().rows) == {Verdict.PENDING: 1}
            place.audit()
        place.pull()
        assert dict(place.totals().rows) == {Verdict.ARCHIVED: 1}
        place.audit()
        assert set(times_kept(place).values()) == {1}


@contextmanager
def limited_to(size_bytes: int, receiver: int | None) -> Iterator[None]:
    """No file of whoever receives may become larger: as a quota, with an error of its own."""
    process = receiver or os.getpid()
    before = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_FSIZE, before)


# --- files that are damaged, gone or foreign


@dataclass(frozen=True)
class Damage:
    """What happens to the spool of a study between two runs, and how many objects it costs."""

    what: str
    happens: Callable[[Place, list[Path]], object]
    costs: int | None = None
    """None: all that were there."""


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def flip_the_sop_instance_uid(path: Path) -> None:
    data = path.read_bytes()
    last = data.rindex(b"2.25.", 0, data.index(b"\x10\x00\x20\x00"))
    flip(path, last + 6)


def of_a_stranger(place: Place, files: list[Path]) -> None:
    folder = files[0].parent
    stranger = next(tiny_instances(1, seed=7, side=_SIDE))
    (folder / "README.txt").write_text("not an object")
    (folder / "half.part").write_bytes(b"half")
    (folder / f"{'0' * 64}.dcm").write_bytes(stranger.encoded())
    (folder / f"{'1' * 64}.dcm").mkdir()
    (folder / f"{'2' * 64}.dcm").symlink_to("/etc/passwd")
    (folder.parent / "not-a-study").mkdir(exist_ok=True)


def copied_under_another_name(place: Place, files: list[Path]) -> None:
    """A file of the study with other content than its name says."""
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].with_name(f"{'3' * 64}.dcm").write_bytes(data)


def remove_the_spool(place: Place, files: list[Path]) -> None:
    shutil.rmtree(place.site.spool.path)
    if place.site.nodes["pacs"].retrieve == "c-move":
        # It belongs to nobody's spool now, and ends.
        address = (LOOPBACK, place.site.receiver.port)
        until(lambda: refuses(address), "the receiver has ended")


def refuses(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, 1).close()
    except ConnectionRefusedError:
        return True
    return False


DAMAGES = (
    Damage("a bit of the pixels is flipped", lambda place, files: flip(files[0], -100), 1),
    Damage(
        "a bit of a UID is flipped", lambda place, files: flip_the_sop_instance_uid(files[0]), 1
    ),
    Damage(
        "a bit of the PatientID is flipped",
        lambda place, files: flip(files[0], files[0].read_bytes().index(b"00000000")),
        1,
    ),
    Damage("a bit of the preamble is flipped", lambda place, files: flip(files[0], 5), 1),
    Damage("a file is cut", lambda place, files: os.truncate(files[0], 20_000), 1),
    Damage("a file is cut to nothing", lambda place, files: os.truncate(files[0], 0), 1),
    Damage("a file has grown", lambda place, files: os.truncate(files[0], 60_000), 1),
    Damage("two files are gone", lambda place, files: [f.unlink() for f in files[:2]], 2),
    Damage("foreign files lie there", of_a_stranger, 0),
    Damage("a file has another content than its name", copied_under_another_name, 0),
    Damage("the study's folder is gone", lambda place, files: shutil.rmtree(files[0].parent)),
    Damage(
        "the folder of all studies is gone",
        lambda place, files: shutil.rmtree(files[0].parent.parent),
    ),
    Damage("the whole spool is gone", remove_the_spool),
)


RECORDED = ("recorded", "not recorded")
CASES = [(damage, method, how) for damage in DAMAGES for method in METHODS for how in RECORDED]


@pytest.mark.parametrize(
    "case",
    # One of a run that was killed, which takes its time, and others that differ.
    subset(CASES, [*CASES[:40:12], CASES[7]]),
    ids=lambda case: f"{case[0].what}, {case[1]}, {case[2]}",
)
def test_damage_between_two_runs_costs_what_was_damaged(tmp_path, case):
    damage, retrieve, recorded = case
    with site_around(tmp_path, objects_of_pages(), retrieve=retrieve) as place:
        files = arrived(place) if recorded == "recorded" else arrived_unseen(place, 4)
        assert set(times_kept(place).values()) == {1}
        damage.happens(place, files)
        place.pacs.script.clear()
        place.goes_on()
        kept = times_kept(place)
        costs = len(files) if damage.costs is None else damage.costs
        assert sum(kept.values()) == MANY + costs
        assert set(kept) == {stored.sop_instance_uid for stored in place.pacs.holdings}
        assert max(kept.values()) <= 2


def arrived(place: Place) -> list[Path]:
    """As after a run that died when it had looked at all that came, before it archived any."""
    with place.opened() as pull:
        for page in pull.discovery.pages():
            pull.discovery.discover(*page)
        [chunk] = pull.chunks.chunks()
        pull.retrieval.retrieve(chunk)
    return in_ready(place, MANY)


def arrived_unseen(place: Place, number: int) -> list[Path]:
    """Let so many objects arrive, and a run die before it has looked at any."""
    service = SERVICES[place.site.nodes["pacs"].retrieve]
    stall = Behaviour(
        "net.stall_after", answers=number, hold=threading.Event(), service=service, on_request=1
    )
    place.pacs.script.append(stall)
    with place.victim(place.cohort()):
        until(lambda: sum(times_kept(place).values()) == number, "the PACS has fallen silent")
    return in_ready(place, number)


def in_ready(place: Place, number: int) -> list[Path]:
    files = sorted((place.site.spool.path / "ready").rglob("*.dcm"))
    assert len(files) == number
    return files
