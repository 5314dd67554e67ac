"""The command line as a process: what it prints, how it ends, and which modules it loaded."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TEMPLATE = """
import atexit, gc, json, os, sys, threading
from prefect_dicom.cli import main
if "PREFECT_API_URL" in os.environ:
    from prefect_dicom.cli.flow_runner import settle_prefect
    settle_prefect()
    import prefect_dicom.flows, prefect_dicom.report.page, prefect_dicom.server.connection
gc.collect()
gc.freeze()
def end(code):
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
for line in sys.stdin:
    command = json.loads(line)
    if not (child := os.fork()):
        os.environ.clear()
        os.environ.update(command["environment"])
        os.chdir(command["folder"])
        for number, path in enumerate((os.devnull, command["output"], command["stderr"])):
            os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY), number)
        sys.argv[1:] = command["arguments"]
        note = command["modules"]
        try:
            main()
        except SystemExit as ended:
            # The command's own handlers end the process.
            atexit.register(lambda: open(note, "w").write(" ".join(sys.modules)))
            end(ended.code or 0)
        end(0)
    _, status, used = os.wait4(child, 0)
    print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, flush=True)
"""
"""Forks a process for each command: importing the command line takes longer than most commands.

Prefect reads its settings when it is imported. Those of a server are the same for all commands.
A process ends as Python does but for the teardown of its modules, which takes longer than most
commands too, once Prefect is among them.
"""

_CACHE = Path(__file__).parents[2] / "build" / "cache"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    stderr: str
    modules: frozenset[str] = frozenset()
    """Packages it had imported by its end, by their first name."""
    cpu_seconds: float = 0.0

    @property
    def result(self) -> Any:
        """What it printed with ``--json``."""
        return json.loads(self.output)


@dataclass(frozen=True)
class CommandLine:
    """Runs commands in a folder, with a home of their own."""

    folder: Path
    home: Path

    def __call__(self, *arguments: str | Path, **variables: str) -> Ended:
        self.home.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.home) as kept:
            files = {name: Path(kept, name) for name in ("output", "stderr", "modules")}
            for file in files.values():
                file.touch()
            command = {
                "arguments": list(map(str, arguments)),
                "folder": str(self.folder),
                "environment": self.environment(variables),
                **{name: str(file) for name, file in files.items()},
            }
            code, seconds = _run(command, variables.get("PREFECT_API_URL"))
            output, stderr, modules = (file.read_text() for file in files.values())
        packages = frozenset(name.split(".")[0] for name in modules.split())
        return Ended(code, output, stderr, packages, seconds)

    def start(self, *arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
        """Start a command as a terminal does: in a process group of its own."""
        self.home.mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-m", "prefect_dicom.cli", *map(str, arguments)],
            cwd=self.folder,
            env=self.environment(variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """The process's environment: nothing of this user's Prefect, wide lines."""
        own = {"HOME": str(self.home), "PREFECT_HOME": str(self.home / "prefect")}
        return {**_plain_environment(), **own, **variables}


def _plain_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if "PREFECT" not in name}
    # Fonts that were searched, and an empty database of Prefect: for all homes of the tests.
    return {"XDG_CACHE_HOME": str(_CACHE), **kept, "COLUMNS": "300"}


@functools.cache
def _template(api_url: str | None) -> subprocess.Popen[str]:
    environment = _plain_environment()
    if api_url is not None:
        home = tempfile.TemporaryDirectory()
        atexit.register(home.cleanup)
        environment |= {"HOME": home.name, "PREFECT_HOME": home.name, "PREFECT_API_URL": api_url}
    template = subprocess.Popen(
        [sys.executable, "-c", _TEMPLATE],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(template.communicate)
    return template


def _run(command: dict[str, Any], api_url: str | None) -> tuple[int, float]:
    template = _template(api_url)
    assert template.stdin is not None and template.stdout is not None
    try:
        template.stdin.write(json.dumps(command) + "\n")
        template.stdin.flush()
        code, seconds = template.stdout.readline().split()
        return int(code), float(seconds)
    except BaseException:
        # Out of time: what it says next is not about the next command.
        template.kill()
        _template.cache_clear()
        raise
