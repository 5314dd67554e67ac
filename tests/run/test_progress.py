"""The live display, which reads the ledger while Prefect is still being imported."""

from __future__ import annotations

import subprocess
import sys

from prefect_dicom.run.registration import register_cohort
from tests.support.sites import site_around, study

SHOWS_PROGRESS = """
import sys
from rich.console import Console
from prefect_dicom.config.site import ledger_url, load_site
from prefect_dicom.ledger import Ledger
from prefect_dicom.run.progress import progress_shown

site = load_site(sys.argv[1])
with Ledger.open(ledger_url(site)) as ledger:
    cohort = ledger.cohorts.get(sys.argv[2])
assert "prefect" not in sys.modules
with progress_shown(Console(), site, cohort):
    assert "sqlalchemy.orm" in sys.modules
"""


def test_what_breaks_queries_while_prefect_imports_it_is_imported_before(tmp_path):
    with site_around(tmp_path, study(1), retrieve="c-get") as place:
        cohort = register_cohort(place.site, place.cohort(), None)
        words = [sys.executable, "-c", SHOWS_PROGRESS, str(place.file), cohort.name]
        ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stderr) == (0, "")
