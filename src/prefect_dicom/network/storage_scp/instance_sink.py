"""What the transfer loop hands received instances to."""

from __future__ import annotations

from typing import Protocol, TypeVar

from prefect_dicom.core.background import Background
from prefect_dicom.core.model import StoreRequest


class IncomingInstance(Protocol):
    """An instance on its way to the disk."""

    def write(self, fragments: list[memoryview]) -> object:
        """Take the next bytes of the data set; they are valid until they are given back.

        Without a background they are only valid during the call.
        """

    def give_back(self, *, all_of_it: bool) -> bool:
        """Whether no bytes are needed any more, but by the background; all have to if told so."""


InstanceT = TypeVar("InstanceT", bound=IncomingInstance)


class InstanceSink(Protocol[InstanceT]):
    """Where received instances go. Shared by all associations, so thread-safe."""

    def begin(self, request: StoreRequest, background: Background | None, /) -> InstanceT:
        """Begin an instance. Raises SpoolFull when there is no room for it.

        The background, if there is one, may do what is not to delay the transfer; it is done
        when the association has ended.
        """

    def complete(self, instance: InstanceT, /) -> int:
        """Take an instance whose data set is whole; the status to answer (0x0000 and so on).

        Its bytes are written; what becomes of it may be left to the background.
        """

    def abandon(self, instance: InstanceT, /) -> None:
        """Discard an instance: the association ended, or the disk is full."""
