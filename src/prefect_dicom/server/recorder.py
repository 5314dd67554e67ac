"""``python -m prefect_dicom.server.recorder``: journals into the database of Prefect's home.

The home is that of ``PREFECT_HOME``. A recorder takes all journals that are there, deletes those
of runs that have ended, and ends itself. It writes with Prefect's own models, so that Prefect shows
the same as of a run with a server: flow and task runs with their states, artifacts, logs, events.

Everything has an id in the journal, and is written where the database has none with it. So a
journal may be read again: after a kill of the recorder, or while its run goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from prefect_dicom.core.files import is_locked, lock_file
from prefect_dicom.run.journal import FAILED, JOURNALS, SUFFIX, Kind, StateType, recorder_lock
from prefect_dicom.server.database import migrated

log = logging.getLogger(__name__)

_NICE = 10
_LINES_AT_A_TIME = 200
_LOGGER = "prefect.flow_runs"


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a journal; a kill may have left a part of one."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def ends_of(path: Path) -> Iterator[dict[str, Any]]:
    """The states in which the runs of a journal end whose process was killed."""
    running: dict[str, None] = {}
    for line in lines_of(path):
        if line["kind"] in (Kind.FLOW_RUN, Kind.TASK_RUN):
            running[line["id"]] = None
        elif line["kind"] == Kind.STATE and StateType(line["type"]).is_final:
            running.pop(line["run"], None)
    at = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat()
    # The flow run is the first of them, and ends last.
    for run in reversed(running):
        yield {
            "kind": Kind.STATE,
            "id": str(uuid5(NAMESPACE_URL, f"crashed:{run}")),
            "at": at,
            "run": run,
            "type": StateType.CRASHED,
            "name": "Crashed",
            "message": "its process ended without a word",
        }


class Recording:
    """Writes lines of one journal into Prefect's database."""

    def __init__(self) -> None:
        from prefect.server import models
        from prefect.server.database import provide_database_interface
        from prefect.server.events.schemas.events import ReceivedEvent
        from prefect.server.events.storage.database import write_events
        from prefect.server.schemas import actions, core, states

        # Without types: Prefect's are those of its own dates and of decorators.
        self._models: Any = models
        self._actions: Any = actions
        self._core: Any = core
        self._states: Any = states
        self._received_event: Any = ReceivedEvent
        self._write_events = write_events
        self._database: Any = provide_database_interface()
        self._flow_run: UUID | None = None
        self._name = ""
        self._task_runs: set[str] = set()

    async def record(self, lines: Iterable[dict[str, Any]]) -> None:
        """Record lines, some at a time in a transaction."""
        rest = iter(lines)
        while some := list(islice(rest, _LINES_AT_A_TIME)):
            async with self._database.session_context(begin_transaction=True) as session:
                for line in some:
                    await self._record(session, line)

    async def _record(self, session: Any, line: dict[str, Any]) -> None:
        number, at = UUID(line["id"]), datetime.fromisoformat(line["at"])
        match line["kind"]:
            case Kind.FLOW_RUN:
                await self._begin(session, number, at, line)
            case Kind.TASK_RUN:
                await self._task_run(session, number, line)
            case Kind.STATE:
                await self._state(session, number, at, line)
            case Kind.ARTIFACT:
                await self._artifact(session, number, at, line)
            case Kind.PROGRESS:
                update = self._actions.ArtifactUpdate(
                    data=line["data"], description=line["description"]
                )
                artifact = UUID(line["artifact"])
                await self._models.artifacts.update_artifact(session, artifact, update)
            case Kind.LOG:
                await self._log(session, number, at, line)
            case Kind.EVENT:
                await self._event(session, number, line)

    async def _begin(self, session: Any, number: UUID, at: datetime, line: dict[str, Any]) -> None:
        self._flow_run = number
        flow = await self._models.flows.create_flow(session, self._core.Flow(name=line["flow"]))
        known = await self._models.flow_runs.read_flow_run(session, number)
        if known is None:
            named = {} if line["name"] is None else {"name": line["name"]}
            known = await self._models.flow_runs.create_flow_run(
                session,
                self._core.FlowRun(
                    id=number, flow_id=flow.id, parameters=line["parameters"], **named
                ),
            )
            known.created = at
        self._name = known.name

    async def _task_run(self, session: Any, number: UUID, line: dict[str, Any]) -> None:
        self._task_runs.add(line["id"])
        if await self._models.task_runs.read_task_run(session, number) is None:
            await self._models.task_runs.create_task_run(
                session,
                self._core.TaskRun(
                    id=number,
                    flow_run_id=self._flow_run,
                    name=line["name"],
                    task_key=line["task"],
                    dynamic_key=str(line["number"]),
                    tags=[line["tag"]],
                ),
            )

    async def _state(self, session: Any, number: UUID, at: datetime, line: dict[str, Any]) -> None:
        of_a_task = line["run"] in self._task_runs
        table = self._database.TaskRunState if of_a_task else self._database.FlowRunState
        if await session.get(table, number) is not None:
            return
        state = self._states.State(
            id=number, timestamp=at, type=line["type"], name=line["name"], message=line["message"]
        )
        run = UUID(line["run"])
        if of_a_task:
            await self._models.task_runs.set_task_run_state(session, run, state, force=True)
        else:
            await self._models.flow_runs.set_flow_run_state(session, run, state, force=True)

    async def _artifact(
        self, session: Any, number: UUID, at: datetime, line: dict[str, Any]
    ) -> None:
        if await self._models.artifacts.read_artifact(session, number) is None:
            artifact = self._core.Artifact(
                id=number,
                flow_run_id=self._flow_run,
                **{name: line[name] for name in ("type", "key", "description", "data")},
            )
            created = await self._models.artifacts.create_artifact(session, artifact)
            created.created = at

    async def _log(self, session: Any, number: UUID, at: datetime, line: dict[str, Any]) -> None:
        if await session.get(self._database.Log, number) is None:
            content = {"name": _LOGGER, "level": line["level"], "message": line["message"]}
            own = {"id": number, "timestamp": at, "flow_run_id": self._flow_run}
            session.add(self._database.Log(**content, **own))

    async def _event(self, session: Any, number: UUID, line: dict[str, Any]) -> None:
        flow_run = {
            "prefect.resource.id": f"prefect.flow-run.{self._flow_run}",
            "prefect.resource.role": "flow-run",
            "prefect.resource.name": self._name,
        }
        content = {name: line[name] for name in ("event", "occurred", "resource", "payload")}
        event = self._received_event(id=number, related=[*line["related"], flow_run], **content)
        if await session.get(self._database.Event, number) is None:
            await self._write_events(session, [event])


async def record_all(home: Path) -> bool:
    """Record every journal of a home. Returns whether all could be recorded for now."""
    await migrated(home)
    is_well = True
    for path in sorted((home / JOURNALS).glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime):
        lives = is_locked(path)
        try:
            recording = Recording()
            await recording.record(lines_of(path))
            if not lives:
                await recording.record(ends_of(path))
                path.unlink()
        except (OSError, TimeoutError):
            raise
        except Exception as error:
            is_well = False
            if not _may_pass(error) and not lives:
                log.exception("%s cannot be recorded and is set aside", path.name)
                path.rename(path.with_suffix(FAILED))
            else:
                log.warning("%s is left for later (%s)", path.name, type(error).__name__)
    return is_well


def _may_pass(error: Exception) -> bool:
    """Whether it is the database that cannot be used now, and not the journal."""
    return isinstance(getattr(error, "orig", error), sqlite3.OperationalError)


def main() -> int:
    """Record the journals of Prefect's home, unless another process does; returns the exit code."""
    home = Path(os.environ["PREFECT_HOME"])
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    os.umask(0o077)
    with contextlib.suppress(OSError):
        # A service manager may forbid it.
        os.nice(_NICE)
    while any(not is_locked(path) for path in (home / JOURNALS).glob(f"*{SUFFIX}")):
        try:
            descriptor = lock_file(recorder_lock(home), wait=False)
        except BlockingIOError:
            # It looks for others before it ends.
            return 0
        with contextlib.closing(os.fdopen(descriptor)):
            if not asyncio.run(record_all(home)):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
