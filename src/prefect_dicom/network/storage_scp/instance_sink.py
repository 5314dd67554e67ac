"""What the transfer loop hands received instances to."""

from __future__ import annotations

from typing import Protocol, TypeVar

from prefect_dicom.core.model import StoreRequest


class IncomingInstance(Protocol):
    """An instance on its way to the disk."""

    def write(self, fragments: list[memoryview]) -> object:
        """Take the next bytes of the data set; they are only valid during the call."""


InstanceT = TypeVar("InstanceT", bound=IncomingInstance)


class InstanceSink(Protocol[InstanceT]):
    """Where received instances go. Shared by all associations, so thread-safe."""

    def begin(self, request: StoreRequest) -> InstanceT:
        """Begin an instance. Raises SpoolFull when there is no room for it."""

    def complete(self, instance: InstanceT, /) -> int:
        """Take an instance whose data set is whole; the status to answer (0x0000 and so on)."""

    def abandon(self, instance: InstanceT, /) -> None:
        """Discard an instance: the association ended, or the disk is full."""
