"""What tests of several rooms use: peers, servers, sites, and the campaign."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The project's own directory."""


def program(module: str) -> list[str]:
    """The command that runs a module of this package as a process; its arguments follow."""
    start = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); "
        f"runpy.run_module('tests.support.{module}', run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", start]
