"""The command line as a process: what it prints, how it ends, and which modules it loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WITH_A_NOTE_OF_ITS_MODULES = """
import atexit, sys
target = sys.argv.pop(1)
atexit.register(lambda: open(target, "w").write(" ".join(sys.modules)))
from prefect_dicom.cli import main
main()
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    complaints: str
    modules: frozenset[str] = frozenset()
    """Packages it had imported by its end, by their first name."""

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
        note = self.home / "modules"
        note.unlink(missing_ok=True)
        process = subprocess.run(
            [sys.executable, "-c", _WITH_A_NOTE_OF_ITS_MODULES, note, *map(str, arguments)],
            cwd=self.folder,
            env=self.environment(variables),
            capture_output=True,
            text=True,
            timeout=120,
        )
        modules = {name.split(".")[0] for name in note.read_text().split()}
        return Ended(process.returncode, process.stdout, process.stderr, frozenset(modules))

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
        kept = {name: value for name, value in os.environ.items() if "PREFECT" not in name}
        own = {"HOME": str(self.home), "PREFECT_HOME": str(self.home / "prefect")}
        return {**kept, **own, "COLUMNS": "300", **variables}
