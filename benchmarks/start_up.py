"""Seconds from a command to its first query, and to the end of a cohort that is finished."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks.table import Line, spread
from prefect_dicom.testing.demo import Demo, prepared_demo

_QUERY_SECONDS = 3.0
_AGAIN_SECONDS = 4.0
_PEAK_MB = 200
_SECONDS = 120


def start_up(folder: Path, rounds: int) -> Iterator[Line]:
    """Lines of commands without a Prefect server, in a home that is in use.

    The first round, in a new home, is not counted. Each has a cohort of its own of one study, and
    then the same again, finished.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment["PREFECT_HOME"] = str(folder / "prefect")
    queries, again, processors = [], [], []
    for number in range(rounds + 1):
        with prepared_demo(folder / f"demo-{number}", 1) as demo:
            seconds = _to_first_query(demo, environment)
            before, began = _processor_seconds(), time.monotonic()
            subprocess.run(_command(demo), env=environment, stdout=subprocess.DEVNULL, check=True)
            if number:
                queries.append(seconds)
                again.append(time.monotonic() - began)
                processors.append(_processor_seconds() - before)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    yield Line(
        "command to its first query, no server, home in use",
        median(queries),
        _QUERY_SECONDS,
        at_least=False,
        unit=" s",
        detail=spread(queries),
    )
    yield Line(
        "finished cohort again, no server",
        median(again),
        _AGAIN_SECONDS,
        at_least=False,
        unit=" s",
        detail=f"{spread(again)}; {spread(processors)} s of processor",
    )
    yield Line("peak of these commands", peak, _PEAK_MB, at_least=False, unit=" MB")


def _to_first_query(demo: Demo, environment: dict[str, str]) -> float:
    began = time.monotonic()
    command = subprocess.Popen(_command(demo), env=environment, stdout=subprocess.DEVNULL)
    while not demo.requests():
        if command.poll() is not None or time.monotonic() - began > _SECONDS:
            raise RuntimeError("the command sent no query")
        time.sleep(0.005)
    seconds = time.monotonic() - began
    if command.wait(_SECONDS):
        raise RuntimeError(f"the command ended with {command.returncode}")
    return seconds


def _command(demo: Demo) -> list[str]:
    words = ["pull", str(demo.cohort), "--site", str(demo.site)]
    return [sys.executable, "-m", "prefect_dicom.cli", *words]


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
