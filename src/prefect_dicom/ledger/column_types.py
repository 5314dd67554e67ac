"""Types of columns: texts of peers, JSON, DICOM dates and UTC times."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import DateTime, Text, TypeDecorator

from prefect_dicom.core.model import DateRange

_UNSTORABLE = re.compile("[\x00\x1a\ud800-\udfff]")
_ESCAPED = re.compile("\x1a([0-9a-f]{4})")


class PeerText(TypeDecorator[str]):
    """Text of a peer, kept byte for byte.

    PostgreSQL takes no NUL and neither database takes a lone surrogate (what is left of bytes
    in an undeclared character set). Both are escaped with SUBSTITUTE, which escapes itself.
    """

    impl = Text
    cache_ok = True

    # The processors themselves, not process_bind_param and its twin: these texts come by the
    # hundred thousand, and each layer of calls shows.
    def bind_processor(self, dialect: Any) -> Callable[[str | None], str | None]:
        unstorable = _UNSTORABLE.search

        def escape(value: str | None) -> str | None:
            if value is None or unstorable(value) is None:
                return value
            return _UNSTORABLE.sub(lambda match: f"\x1a{ord(match[0]):04x}", value)

        return escape

    def result_processor(self, dialect: Any, coltype: Any) -> Callable[[str | None], str | None]:
        def restore(value: str | None) -> str | None:
            if value is None or "\x1a" not in value:
                return value
            return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), value)

        return restore


class Json(TypeDecorator[Any]):
    """A list or dictionary as JSON in ASCII; None is NULL."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        return None if value is None else json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Any) -> Any:
        return None if value is None else json.loads(value)


class DicomDateRange(TypeDecorator[DateRange]):
    """A range of dates as range matching writes it (PS3.4 C.2.2.2.5), with "-" for any date."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: DateRange | None, dialect: Any) -> str | None:
        if value is None:
            return None
        return "-".join(f"{day:%Y%m%d}" if day else "" for day in (value.first, value.last))

    def process_result_value(self, value: str | None, dialect: Any) -> DateRange | None:
        if value is None:
            return None
        first, last = (
            date(int(day[:-4]), int(day[-4:-2]), int(day[-2:])) if day else None
            for day in value.split("-")
        )
        return DateRange(first, last)


class DicomDate(TypeDecorator[date]):
    """A day as DICOM writes it, PS3.5 6.2."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: date | None, dialect: Any) -> str | None:
        return None if value is None else f"{value:%Y%m%d}"

    def process_result_value(self, value: str | None, dialect: Any) -> date | None:
        if value is None:
            return None
        return date(int(value[:-4]), int(value[-4:-2]), int(value[-2:]))


class UtcTime(TypeDecorator[datetime]):
    """A time: aware UTC in Python, whatever the database makes of it."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
