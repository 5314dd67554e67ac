"""A sender that pipelines, and one that does not, to several receivers over several distances."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.corpus import Study
from benchmarks.receivers import CALLER
from benchmarks.round_trip import at_a_round_trip
from prefect_dicom.testing import StoredInstance
from prefect_dicom.testing.instances import instance_of_file
from prefect_dicom.testing.sending import SenderManner, StoreAssociation, context_key

_processes = multiprocessing.get_context("spawn")
_SECONDS = 240


@dataclass(frozen=True)
class Manner:
    """How a study is sent: over so many associations, so far away, with or without waiting."""

    round_trip_seconds: float
    associations: int
    pipelines: bool


def sending_rates(
    work: Sequence[tuple[Any, Study]], manner: Manner, rounds: int
) -> dict[str, list[float]]:
    """Objects a second for each (receiver, study), measured in turn so many times.

    Raises
    ------
    RuntimeError
        Objects are missing.
    """
    rates: dict[str, list[float]] = {receiver.name: [] for receiver, _ in work}
    with contextlib.ExitStack() as stack:
        sides = [
            (
                receiver,
                study,
                stack.enter_context(at_a_round_trip(receiver.port, manner.round_trip_seconds)),
                stack.enter_context(_senders(study, manner.associations)),
            )
            for receiver, study in work
        ]
        # One round more, whose figures are left out: caches and processes are cold.
        for number in range(rounds + 1):
            for receiver, study, port, senders in sides:
                address = "127.0.0.1", port
                with receiver.expecting(study):
                    seconds = _sent(senders, receiver.ae_title, address, manner.pipelines)
                    if (arrived := receiver.emptied(study)) != len(study.files):
                        raise RuntimeError(f"{receiver.name}: {arrived} of {len(study.files)}")
                if number:
                    rates[receiver.name].append(len(study.files) / seconds)
    return rates


@contextlib.contextmanager
def _senders(study: Study, count: int) -> Iterator[list[Connection]]:
    """As many processes as there are associations, each with its share of the study in memory."""
    pipes, processes = [], []
    for number in range(count):
        ours, theirs = _processes.Pipe()
        files = study.files[number::count]
        processes.append(_processes.Process(target=_sender, args=(theirs, files), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    try:
        yield pipes
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _sent(
    senders: Sequence[Connection], called: str, address: tuple[str, int], pipelines: bool
) -> float:
    """Have everything sent; the seconds from the first request to the last response."""
    for sender in senders:
        sender.send((called, address, pipelines))
    for sender in senders:
        sender.recv()
    for sender in senders:
        sender.send(None)
    times = []
    for sender in senders:
        if not sender.poll(_SECONDS):
            raise RuntimeError("a sender does not come to its end")
        times.append(sender.recv())
    return max(end for _, end in times) - min(begin for begin, _ in times)


def _sender(orders: Connection, files: Sequence[Path]) -> None:
    instances = [(stored, stored.encoded()) for stored in map(instance_of_file, files)]
    while True:
        called, address, pipelines = orders.recv()
        manner = SenderManner(window=0 if pipelines else None)
        contexts = dict.fromkeys(context_key(stored) for stored, _ in instances)
        association = StoreAssociation(CALLER, called, address, contexts, manner=manner)
        orders.send(None)
        orders.recv()
        begin = time.monotonic()
        _send_all(association, instances)
        orders.send((begin, time.monotonic()))
        association.release()


def _send_all(
    association: StoreAssociation, instances: Sequence[tuple[StoredInstance, bytes]]
) -> None:
    """Send as far ahead as was granted; every status has to be success."""
    window = association.window or len(instances)
    message_ids = itertools.cycle(range(1, 65536))
    statuses = []
    for number, (stored, data) in enumerate(instances):
        if number - len(statuses) >= window:
            statuses.append(association.response()[1])
        context_id = association.context_id(stored)
        if context_id is None:
            raise RuntimeError("a context was not accepted")
        association.request(
            context_id,
            message_id=next(message_ids),
            sop_class_uid=stored.sop_class_uid,
            sop_instance_uid=stored.sop_instance_uid,
            data=data,
        )
    while len(statuses) < len(instances):
        statuses.append(association.response()[1])
    if any(statuses):
        raise RuntimeError("an instance was not stored")
