"""Knobs of a scripted DICOMweb server: pages of searches, multipart bodies, statuses."""

from __future__ import annotations

import gzip
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from prefect_dicom.testing.instances import with_elements
from prefect_dicom.testing.plans import Knob, Stage
from prefect_dicom.testing.web_plans import WebPlan

if TYPE_CHECKING:
    from prefect_dicom.testing.script import Behaviour

SEARCH, RETRIEVE = (Stage.WEB_SEARCH,), (Stage.WEB_RETRIEVE,)
QUERY = (Stage.WEB_QUERY,)
ANY = (Stage.WEB_SEARCH, Stage.WEB_RETRIEVE)


# --- statuses


def _status(
    plan: WebPlan, by: Behaviour, *, status: int, retry_after: str = "", location: str = ""
) -> None:
    plan.status, plan.answers, plan.parts, plan.body = status, [], [], b""
    if retry_after:
        plan.headers["Retry-After"] = retry_after
    if location:
        plan.headers["Location"] = location


def _expire(plan: WebPlan, by: Behaviour) -> None:
    plan.web.tokens.clear()
    _status(plan, by, status=401)


# --- searches


def _ignore_keys(plan: WebPlan, by: Behaviour, *, keys: Sequence[str]) -> bool:
    plan.ignored_keys |= frozenset(keys)
    return any(key in plan.keys for key in keys)


def _literal(plan: WebPlan, by: Behaviour) -> None:
    plan.decodes = False


def _page(plan: WebPlan, by: Behaviour, *, offset: bool = True, limit: bool = True) -> None:
    if not offset:
        plan.offset = 0
    if not limit:
        plan.limit = None


def _cap(plan: WebPlan, by: Behaviour, *, answers: int, warning: bool = False) -> bool:
    room = max(0, answers - plan.offset)
    capped = len(plan.answers) > room
    plan.answers = plan.answers[:room]
    if warning and capped:
        plan.headers["Warning"] = "299 scripted: There are additional results that can be requested"
    return capped


def _short(plan: WebPlan, by: Behaviour, *, answers: int) -> bool:
    was = len(plan.answers)
    plan.answers = plan.answers[:answers]
    return len(plan.answers) < was


def _no_content(plan: WebPlan, by: Behaviour) -> bool:
    if plan.answers:
        return False
    plan.status, plan.body = 204, b""
    return True


def _shift(plan: WebPlan, by: Behaviour, *, by_number: int = 1) -> bool:
    if not plan.offset:
        return False
    plan.offset = max(0, plan.offset + by_number)
    return True


# --- bodies


def _cut(plan: WebPlan, by: Behaviour, *, after: int, framing: str = "close") -> None:
    plan.cut_after, plan.framing = after, framing


def _no_closing(plan: WebPlan, by: Behaviour) -> bool:
    plan.closing, plan.framing = False, "close"
    return bool(plan.parts)


def _frame(plan: WebPlan, by: Behaviour, *, framing: str, chunk_bytes: int = 65536) -> None:
    plan.framing, plan.chunk_bytes = framing, chunk_bytes


def _slow(plan: WebPlan, by: Behaviour, *, seconds: float, chunk_bytes: int = 1024) -> None:
    plan.pause_seconds, plan.chunk_bytes = seconds, chunk_bytes


def _stall(plan: WebPlan, by: Behaviour, *, after: int, hold: threading.Event) -> None:
    plan.hold_after, plan.hold = after, hold


def _boundary(plan: WebPlan, by: Behaviour, *, boundary: str) -> None:
    plan.boundary = boundary


def _delimiter_inside(plan: WebPlan, by: Behaviour, *, behind: bytes = b"x") -> bool:
    for part in plan.parts:
        middle = len(part.data) // 2
        delimiter = b"\r\n--" + plan.boundary.encode() + behind
        part.data = part.data[:middle] + delimiter + part.data[middle:]
        part.headers.pop("Content-Length", None)
    return bool(plan.parts)


def _part_header(plan: WebPlan, by: Behaviour, *, name: str, value: str) -> bool:
    for part in plan.parts:
        part.headers[name] = value
    return bool(plan.parts)


def _part_length(plan: WebPlan, by: Behaviour, *, more: int = 1) -> bool:
    for part in plan.parts:
        part.headers["Content-Length"] = str(len(part.data) + more)
    return bool(plan.parts)


def _single(plan: WebPlan, by: Behaviour) -> bool:
    plan.single = len(plan.parts) == 1
    return plan.single


def _drop(plan: WebPlan, by: Behaviour, *, instances: int, status: int = 200) -> bool:
    last = plan.web.last_of_studies(instances)
    kept = [part for part in plan.parts if part.stored.sop_instance_uid not in last]
    changed = len(kept) < len(plan.parts)
    plan.parts = kept
    if changed:
        plan.status = status
    return changed


def _fail(plan: WebPlan, by: Behaviour, *, instances: int, status: int = 500) -> bool:
    last = plan.web.last_of_studies(instances)
    if not any(part.stored.sop_instance_uid in last for part in plan.parts):
        return False
    _status(plan, by, status=status)
    return True


def _break(plan: WebPlan, by: Behaviour, *, instances: int) -> bool:
    last = plan.web.last_of_studies(instances)
    faulty = [n for n, p in enumerate(plan.parts) if p.stored.sop_instance_uid in last]
    if not faulty:
        return False
    plan.parts = plan.parts[: faulty[0]]
    plan.closing, plan.framing = False, "close"
    return True


def _change(plan: WebPlan, by: Behaviour, *, element: str, value: str) -> bool:
    for part in plan.parts:
        stored = part.stored
        data = with_elements(stored.encoded(), stored.transfer_syntax_uid, {element: value})
        part.data = part.data[: len(part.data) - len(stored.encoded())] + data
        part.headers.pop("Content-Length", None)
    return bool(plan.parts)


def _compress(plan: WebPlan, by: Behaviour, *, mebibytes: int = 0) -> None:
    plan.headers["Content-Encoding"] = "gzip"
    if not mebibytes:
        plan.edit = gzip.compress
        return

    def bomb() -> Iterator[bytes]:
        packer = zlib.compressobj(wbits=31)
        for _ in range(mebibytes):
            yield packer.compress(bytes(1024 * 1024))
        yield packer.flush()

    plan.body, plan.framing = bomb, "chunked"


def _call(plan: WebPlan, by: Behaviour, *, call: Callable[[WebPlan, Behaviour], object]) -> None:
    call(plan, by)


def _body(plan: WebPlan, by: Behaviour, *, body: bytes) -> None:
    plan.body = body


def _endless(plan: WebPlan, by: Behaviour, *, what: str = "header") -> None:
    """An endless header of a part, preamble, or body of a search."""
    start = f"--{plan.boundary}\r\nX: ".encode() if what == "header" else b"["

    def body() -> Iterator[bytes]:
        yield start
        while True:
            yield b"a" * 65536

    plan.body, plan.framing = body, "close"


WEB_KNOBS = (
    Knob(
        "web.status",
        ANY,
        "Answers with `status`, and with a Retry-After or a Location.",
        _status,
    ),
    Knob("web.expire", ANY, "Answers 401 and forgets all tokens it has issued.", _expire),
    Knob("web.ignore_keys", QUERY, "Does not match by these `keys`.", _ignore_keys),
    Knob("web.literal", QUERY, "Does not undo percent-encoding in values.", _literal),
    Knob(
        "web.paging",
        QUERY,
        "Ignores `offset` or `limit` where they are False.",
        _page,
    ),
    Knob(
        "web.shift",
        QUERY,
        "Begins later pages `by_number` answers further on: the set has changed.",
        _shift,
    ),
    Knob(
        "web.cap",
        SEARCH,
        "Gives no more than `answers` of all pages together; with a `warning` it says so.",
        _cap,
    ),
    Knob(
        "web.short",
        SEARCH,
        "Gives `answers` on a page at most, however many are asked for.",
        _short,
    ),
    Knob("web.no_content", SEARCH, "Answers 204 where there is nothing.", _no_content),
    Knob(
        "web.cut",
        ANY,
        "Closes the connection `after` so many bytes of the body; `framing`: length, chunked, "
        "close.",
        _cut,
    ),
    Knob(
        "web.no_closing",
        RETRIEVE,
        "Leaves out the closing delimiter and closes the connection.",
        _no_closing,
    ),
    Knob(
        "web.frame",
        ANY,
        "Ends bodies by `framing` (length, chunked, close) and sends them in pieces of "
        "`chunk_bytes`.",
        _frame,
    ),
    Knob(
        "web.slow",
        ANY,
        "Waits `seconds` before each piece of `chunk_bytes` of the body.",
        _slow,
    ),
    Knob(
        "web.stall",
        ANY,
        "Falls silent `after` so many bytes of the body until `hold` is set.",
        _stall,
    ),
    Knob("web.boundary", RETRIEVE, "Uses this `boundary`.", _boundary),
    Knob(
        "web.delimiter_inside",
        RETRIEVE,
        "Puts a delimiter, and the bytes `behind` it, into the middle of each instance.",
        _delimiter_inside,
    ),
    Knob(
        "web.part_header",
        RETRIEVE,
        "Gives each part a header with a `name` and a `value`.",
        _part_header,
    ),
    Knob(
        "web.part_length",
        RETRIEVE,
        "Says of each part that it is `more` bytes longer than it is.",
        _part_length,
    ),
    Knob("web.single", RETRIEVE, "Sends a single instance without parts.", _single),
    Knob(
        "web.drop",
        RETRIEVE,
        "Leaves out the last `instances` of each study and answers with `status`: 200, 206.",
        _drop,
    ),
    Knob(
        "web.fail",
        RETRIEVE,
        "Answers with `status` where one of the last `instances` of a study is asked for.",
        _fail,
    ),
    Knob(
        "web.break",
        RETRIEVE,
        "Breaks off with status 200 before the last `instances` of a study, as Orthanc does where "
        "it cannot decode one.",
        _break,
    ),
    Knob(
        "web.change",
        RETRIEVE,
        "Sends instances with another `value` of an `element`.",
        _change,
    ),
    Knob(
        "web.compress",
        ANY,
        "Compresses the body though that was not asked for; with `mebibytes` it is a bomb.",
        _compress,
    ),
    Knob("web.call", ANY, "Calls `call` with its plan of the answer, to be changed.", _call),
    Knob("web.body", ANY, "Answers with this `body` in place of the true one.", _body),
    Knob(
        "web.endless",
        ANY,
        "Sends without end; `what`: header (of a part), body.",
        _endless,
    ),
)
