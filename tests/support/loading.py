"""Files into an archive, by C-STORE."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pydicom
from pydicom.errors import InvalidDicomError
from pynetdicom import AE, evt
from pynetdicom.presentation import build_context

from prefect_dicom.network.logging import configure_logging
from prefect_dicom.network.upper_layer.sockets import acknowledge, prepare

_CONTEXTS_PER_ASSOCIATION = 100


@dataclass(frozen=True)
class Loaded:
    """What became of files sent to an archive: C-STORE statuses, and those that were not sent."""

    statuses: Counter
    unsent: tuple[Path, ...]

    @property
    def stored(self) -> int:
        return self.statuses[0x0000]


class _Sendable(NamedTuple):
    path: Path
    sop_class: str
    syntax: str


def load(port: int, ae_title: str, paths: Iterable[Path], associations: int = 1) -> Loaded:
    """Store files, each over a context of exactly its own class and transfer syntax.

    Files without SOP class or transfer syntax cannot be sent, nor those that pydicom cannot encode
    or the archive takes no context for.
    """
    configure_logging()
    sendable, unsent = [], []
    for path in paths:
        kind = _kind(path)
        if kind is None:
            unsent.append(path)
        else:
            sendable.append(_Sendable(path, *kind))
    kinds = sorted({(one.sop_class, one.syntax) for one in sendable})
    statuses: Counter = Counter()
    with ThreadPoolExecutor(associations) as pool:
        shares = []
        for some in map(set, _batches(kinds, _CONTEXTS_PER_ASSOCIATION)):
            files = [one for one in sendable if (one.sop_class, one.syntax) in some]
            for start in range(min(associations, len(files))):
                share = files[start::associations]
                shares.append(pool.submit(_store, port, ae_title, share))
        for share in shares:
            some_statuses, some_unsent = share.result()
            statuses.update(some_statuses)
            unsent.extend(some_unsent)
    return Loaded(statuses, tuple(sorted(unsent)))


def _kind(path: Path) -> tuple[str, str] | None:
    """SOP class and transfer syntax of a file, or None where it cannot be sent for want of them."""
    try:
        dataset = pydicom.dcmread(path, specific_tags=["SOPClassUID", "SOPInstanceUID"], force=True)
        kind = (str(dataset.SOPClassUID), str(dataset.file_meta.TransferSyntaxUID))
    except (InvalidDicomError, AttributeError, OSError, ValueError, EOFError):
        return None
    return kind if all(re.fullmatch(r"[0-9.]{1,64}", uid) for uid in kind) else None


def _store(port: int, ae_title: str, files: Sequence[_Sendable]) -> tuple[Counter, list[Path]]:
    statuses: Counter = Counter()
    unsent = []
    application = AE(ae_title="LOADER")
    application.acse_timeout = 30
    # An answer takes milliseconds. Now and then pynetdicom's own thread takes it off the queue
    # before send_c_store does; the object is then sent again.
    application.dimse_timeout = 3
    contexts = [build_context(*kind) for kind in sorted({one[1:] for one in files})]
    association = None
    for one in files:
        for _attempt in range(2):
            if association is None or not association.is_established:
                association = application.associate(
                    "127.0.0.1",
                    port,
                    ae_title=ae_title,
                    contexts=contexts,
                    evt_handlers=[
                        (evt.EVT_CONN_OPEN, lambda event: prepare(event.assoc.dul.socket.socket)),
                        (evt.EVT_DATA_RECV, acknowledge_received),
                    ],
                )
            if not association.is_established:
                # None of its contexts was accepted.
                unsent.append(one.path)
                break
            try:
                status = association.send_c_store(pydicom.dcmread(one.path, force=True))
            except Exception:
                # Whatever pydicom cannot encode or the archive has no context for.
                unsent.append(one.path)
                break
            if "Status" in status:
                statuses[status.Status] += 1
                break
        else:
            # An abort, twice: DCMTK dislikes values of odd length.
            unsent.append(one.path)
    if association is not None and association.is_established:
        association.release()
    return statuses, unsent


def acknowledge_received(event) -> None:
    """Acknowledge received data at once; a handler for pynetdicom's ``EVT_DATA_RECV``."""
    connection = event.assoc.dul.socket
    if connection is not None and connection.socket is not None:
        acknowledge(connection.socket)


def _batches(items: Sequence, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
