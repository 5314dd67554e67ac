"""C-STORE as its requestor, PS3.4 Annex B and PS3.7 9.1.1: send instances as they are.

One presentation context for each pair of SOP class and transfer syntax, with that syntax alone:
what the peer accepts is sent byte for byte, and what it refuses is not sent. Nothing is re-encoded
on the way. Files are read in blocks, so memory does not depend on their size.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prefect_dicom.config.node import PacsNode
from prefect_dicom.core.errors import InstanceRejected, Interrupted, PacsError
from prefect_dicom.dicom.part10 import data_set_offset
from prefect_dicom.network.association import abort, associate
from prefect_dicom.network.association_errors import aborted
from prefect_dicom.network.dimse import (
    HAS_DATA_SET,
    LONGEST_PDU_BYTES,
    RESPONSE,
    AssociationAborted,
    CommandField,
    Element,
    Elements,
    MessageReader,
    unsigned_short,
    write_command,
)
from prefect_dicom.network.logging import configure_logging
from prefect_dicom.network.upper_layer.association_items import MOST_CONTEXTS, OperationsWindow
from prefect_dicom.network.upper_layer.negotiation import (
    ACCEPTED,
    MODEL_CONTEXT_ID,
    Pair,
    request_pdu,
)
from prefect_dicom.network.upper_layer.pdu import (
    ANNOUNCED_PDU_BYTES,
    LAST_FRAGMENT,
    P_DATA_TF,
    PDU_HEADER,
    PDV_HEADER,
    ProtocolError,
    message_pdus,
)
from prefect_dicom.network.upper_layer.stream import BUFFER_BYTES

_MEDIUM_PRIORITY = 0x0000
_HIGHEST_MESSAGE_ID = 0xFFFF
_MOST_OUTSTANDING = 32
"""Instances that are sent ahead of their responses, where the peer grants it."""
_RELEASE_SECONDS = 5.0
_SHORTEST_PDU_BYTES = 8
_PDV_BYTES = PDV_HEADER.size
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class OutgoingInstance:
    """An instance to send.

    Parameters
    ----------
    sop_class_uid, sop_instance_uid, transfer_syntax_uid : str
        As they are sent.
    file : callable
        Returns the Part 10 file in blocks; of it the data set is sent.
    size_bytes : int
        Of the file.
    """

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    file: Callable[[], Iterator[bytes]]
    size_bytes: int

    @property
    def pair(self) -> Pair:
        """SOP class and transfer syntax: what its presentation context is for."""
        return self.sop_class_uid, self.transfer_syntax_uid


def pack_contexts(pairs: Iterable[Pair]) -> list[tuple[Pair, ...]]:
    """The pairs in groups, each for one association: 128 contexts at most, PS3.8 9.3.2.2.

    Examples
    --------
    >>> [len(group) for group in pack_contexts((str(n), "1.2.840.10008.1.2") for n in range(200))]
    [128, 72]
    """
    unique = list(dict.fromkeys(pairs))
    return [
        tuple(unique[start : start + MOST_CONTEXTS])
        for start in range(0, len(unique), MOST_CONTEXTS)
    ]


class StoreAssociation:
    """An association on which instances are sent. A context manager, which releases it.

    Parameters
    ----------
    node : PacsNode
        The node, our AE title, and the time limits: ``stall_seconds`` for a response, and for
        the peer to take a block.
    pairs : sequence of (SOP class UID, transfer syntax UID)
        At most 128, a presentation context each.
    should_stop : callable, optional
        Called before each instance and about once a second; true ends the association.

    Raises
    ------
    PacsError
        The association could not be opened.
    ValueError
        No pair, or more than an association has contexts.
    """

    def __init__(
        self,
        node: PacsNode,
        pairs: Sequence[Pair],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        if not 0 < len(pairs) <= MOST_CONTEXTS:
            raise ValueError(f"an association has 1 to {MOST_CONTEXTS} contexts")
        configure_logging()
        self.proposed = frozenset(pairs)
        """The pairs that were proposed."""
        self._should_stop = should_stop
        self._seconds = node.timeouts.stall_seconds
        request = request_pdu(
            node.calling_ae_title,
            node.called_ae_title,
            [(sop_class, [syntax]) for sop_class, syntax in pairs],
            operations_window=OperationsWindow(_MOST_OUTSTANDING, 1),
        )
        self._stream, granted = associate(node, request, LONGEST_PDU_BYTES + BUFFER_BYTES)
        self._reader = MessageReader(self._stream)
        self._contexts: dict[Pair, int] = {}
        for number, pair in enumerate(pairs):
            context_id = 2 * number + MODEL_CONTEXT_ID
            if (
                granted.results.get(context_id) == ACCEPTED
                and granted.transfer_syntaxes[context_id] == pair[1]
            ):
                self._contexts.setdefault(pair, context_id)
        self.window = min(granted.operations_window or _MOST_OUTSTANDING, _MOST_OUTSTANDING)
        """Instances that may be sent before the first of them is answered, PS3.7 D.3.3.3."""
        longest = granted.peer_pdu_bytes or ANNOUNCED_PDU_BYTES
        longest = max(_SHORTEST_PDU_BYTES, min(longest, ANNOUNCED_PDU_BYTES))
        self._peer_pdu_bytes = longest
        # Fragments have an even length, PS3.8 Annex E.2.
        self._fragment_bytes = (longest - _PDV_BYTES) // 2 * 2
        self._message_id = 0
        self._answered = False
        self._is_open = True

    def __enter__(self) -> StoreAssociation:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._abort()

    def accepts(self, pair: Pair) -> bool:
        """Whether the peer takes instances of this class in this syntax."""
        return pair in self._contexts

    def send(self, instances: Iterable[OutgoingInstance]) -> Iterator[tuple[OutgoingInstance, int]]:
        """Send instances whose pairs are accepted; yields each with the status of its response.

        Where the peer grants an asynchronous operations window, instances are sent ahead of the
        responses to those before them.

        Raises
        ------
        PacsError
            The association has ended, or the peer does not respond. What was not yielded may
            have been stored or not. Any error ends the association.
        Interrupted
            ``should_stop`` says so; the same holds.
        InstanceRejected
            The file is no Part 10 file, or has another size.
        """
        outstanding: dict[int, OutgoingInstance] = {}
        order: deque[int] = deque()
        try:
            going = iter(instances)
            while (instance := next(going, None)) is not None:
                if self._should_stop():
                    raise Interrupted()
                message_id = self._next_message_id()
                outstanding[message_id] = instance
                order.append(message_id)
                self._send(instance, message_id)
                # Before the next one is taken, which is in flight from then on.
                while len(outstanding) >= self.window:
                    yield self._receive(outstanding, order)
            while outstanding:
                yield self._receive(outstanding, order)
        except BaseException:
            # Also where the caller gives up between two instances.
            self._abort()
            raise

    def close(self) -> None:
        """Release the association; never raises, and is fine to repeat."""
        if self._is_open:
            self._is_open = False
            self._stream.release(time.monotonic() + _RELEASE_SECONDS)
            self._stream.connection.close()

    # --- private

    def _abort(self, source: int = 0, reason: int = 0) -> None:
        if self._is_open:
            self._is_open = False
            abort(self._stream, source, reason)

    def _next_message_id(self) -> int:
        self._message_id = self._message_id % _HIGHEST_MESSAGE_ID + 1
        return self._message_id

    def _send(self, instance: OutgoingInstance, message_id: int) -> None:
        context_id = self._contexts[instance.pair]
        command = write_command(
            {
                Element.AFFECTED_SOP_CLASS_UID: _raw(instance.sop_class_uid),
                Element.COMMAND_FIELD: CommandField.C_STORE_RQ,
                Element.MESSAGE_ID: message_id,
                Element.PRIORITY: _MEDIUM_PRIORITY,
                Element.COMMAND_DATA_SET_TYPE: HAS_DATA_SET,
                Element.AFFECTED_SOP_INSTANCE_UID: _raw(instance.sop_instance_uid),
            }
        )
        pdus = message_pdus(context_id, command, None, self._peer_pdu_bytes)
        left = instance.size_bytes
        rest: bytes | memoryview = b""
        in_data_set = False
        for block in instance.file():
            left -= len(block)
            data = bytes(rest) + block if rest else block
            if not in_data_set:
                offset = data_set_offset(data)
                if offset is None or (offset >= len(data) and left > 0):
                    rest = data
                    continue
                in_data_set = True
                rest = self._write(context_id, pdus, memoryview(data)[offset:], is_last=left <= 0)
            else:
                rest = self._write(context_id, b"", memoryview(data), is_last=left <= 0)
        if left != 0 or not in_data_set:
            raise InstanceRejected("instance-unreadable", "another size, or no data set")

    def _write(
        self, context_id: int, before: bytes, data: memoryview, *, is_last: bool
    ) -> memoryview:
        """Write what fills whole fragments, and all of the last block; returns what is left."""
        size = self._fragment_bytes
        whole = len(data) if is_last else len(data) // size * size
        parts: list[bytes | memoryview] = [before]
        for start in range(0, whole, size):
            fragment = data[start : min(start + size, whole)]
            control = LAST_FRAGMENT if is_last and start + size >= whole else 0
            parts.append(
                PDU_HEADER.pack(P_DATA_TF, len(fragment) + _PDV_BYTES)
                + PDV_HEADER.pack(len(fragment) + 2, context_id, control)
            )
            parts.append(fragment)
        try:
            self._stream.send(b"".join(parts), time.monotonic() + self._seconds)
        except TimeoutError:
            raise self._stalled() from None
        except OSError:
            # Why is still to be read, where the peer has said it.
            raise self._lost() from None
        return data[whole:]

    def _receive(
        self, outstanding: dict[int, OutgoingInstance], order: deque[int]
    ) -> tuple[OutgoingInstance, int]:
        elements = self._next_response()
        status = unsigned_short(elements, Element.STATUS)
        number = unsigned_short(elements, Element.MESSAGE_ID_BEING_RESPONDED_TO)
        is_response = (
            unsigned_short(elements, Element.COMMAND_FIELD) == CommandField.C_STORE_RQ | RESPONSE
        )
        if not is_response or status is None or number not in outstanding:
            raise PacsError("answer-unusable", "no response to a C-STORE where one was due")
        order.remove(number)
        self._answered = True
        return outstanding.pop(number), status

    def _next_response(self) -> Elements:
        deadline = time.monotonic() + self._seconds
        while True:
            try:
                return self._reader.read(min(deadline, time.monotonic() + _LOOK_SECONDS)).elements
            except TimeoutError:
                if self._should_stop():
                    raise Interrupted() from None
                if time.monotonic() >= deadline:
                    raise self._stalled() from None
            except ProtocolError as fault:
                self._abort(fault.source, fault.reason)
                raise PacsError("answer-unusable", fault.detail) from None
            except AssociationAborted as end:
                raise self._ended(end.source, end.reason) from None
            except OSError:
                raise self._ended(None, None) from None

    def _stalled(self) -> PacsError:
        code = "association-stalled" if self._answered else "pacs-silent"
        return PacsError(code, f"no response to a C-STORE within {self._seconds:g} s")

    def _lost(self) -> PacsError:
        try:
            self._reader.wait(time.monotonic() + _LOOK_SECONDS)
        except AssociationAborted as end:
            return self._ended(end.source, end.reason)
        except (OSError, ProtocolError):
            pass
        return self._ended(None, None)

    def _ended(self, source: int | None, reason: int | None) -> PacsError:
        # A peer that forbids storage aborts at the first instance, and so does one that cannot
        # take this one: who sends others knows which it is.
        return aborted(source, reason, first_request=False)


def _raw(uid: str) -> bytes:
    """A UID as it is, whatever it holds (:func:`prefect_dicom.dicom.part10.file_meta`)."""
    return uid.encode("latin-1", "surrogateescape")
