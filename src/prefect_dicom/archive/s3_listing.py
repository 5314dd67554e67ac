"""Listing of all keys below a prefix, also of services that do not say where to go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from prefect_dicom.archive.s3_connection import S3Clients, S3Connection
from prefect_dicom.archive.s3_errors import S3Error, S3RequestError

_NOT_S3 = S3Error("archive-unavailable", "the answer is not one of S3")
_FAULTY = S3Error(
    "archive-listing-faulty",
    "a page says that there is more and not where it goes on, and what comes after its last key "
    "is not listed either",
)


class _Way(Enum):
    """How the next page of a listing is asked for, in the order in which they are tried."""

    TOKEN = "ContinuationToken"
    START_AFTER = "StartAfter"
    MARKER = "Marker"


_NEXT_WAY = {_Way.TOKEN: _Way.START_AFTER, _Way.START_AFTER: _Way.MARKER}


@dataclass(frozen=True, slots=True)
class _Page:
    entries: list[tuple[str, int]]
    truncated: bool | None
    """Whether there is more; None where the answer does not say so."""
    token: str | None

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> _Page:
        try:
            entries = [(entry["Key"], entry["Size"]) for entry in answer.get("Contents", ())]
        except KeyError:
            raise S3RequestError(_NOT_S3) from None
        return cls(entries, answer.get("IsTruncated"), answer.get("NextContinuationToken") or None)

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after it: a page that does not say so ends where it is empty."""
        if self.token is not None or self.truncated:
            return False
        return self.truncated is False or not self.entries


def list_objects(connection: S3Connection, bucket: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield name and size in bytes of all objects with a prefix.

    A page that says that there is more is followed by its token. If it has none, the service is
    asked for what comes after the last name, and then by the first version of the listing.

    Raises
    ------
    S3RequestError
        Also with ``archive-listing-faulty``: the service says that there is more, and lists
        nothing that was not listed.
    """
    way, where, last = _Way.TOKEN, "", ""
    while True:
        page = _page(connection, bucket, prefix, way, where)
        # A token is believed; after a name only greater names are new.
        new = [entry for entry in page.entries if way is _Way.TOKEN or entry[0] > last]
        yield from new
        last = new[-1][0] if new else last
        if page.is_last:
            return
        if way is _Way.TOKEN and page.token not in (None, where):
            where = page.token or ""
            continue
        if way is _Way.TOKEN or not new:
            if way not in _NEXT_WAY or not last:
                raise S3RequestError(_FAULTY)
            way = _NEXT_WAY[way]
        where = last


def _page(connection: S3Connection, bucket: str, prefix: str, way: _Way, where: str) -> _Page:
    arguments = {"Bucket": bucket, "Prefix": prefix}
    if where:
        arguments[way.value] = where

    def ask(clients: S3Clients) -> Mapping[str, Any]:
        client = clients.client
        listing = client.list_objects if way is _Way.MARKER else client.list_objects_v2
        answer: Mapping[str, Any] = listing(**arguments)
        return answer

    return _Page.of(connection.call(ask))
