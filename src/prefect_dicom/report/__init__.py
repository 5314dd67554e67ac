"""What became of a cohort, for people: tables as files, words, and one page that shows all of it.

Imported from here is what most others want, and nothing heavy; the page and its plots
(``page.py``, ``plots.py``) are imported where one is written.
"""

from prefect_dicom.report.acceptances import ACCEPTANCES, format_acceptance, open_questions
from prefect_dicom.report.files import replacing
from prefect_dicom.report.formatting import (
    format_bytes,
    format_duration,
    format_evidence,
    format_gaps,
    format_totals,
)
from prefect_dicom.report.tables import (
    CANDIDATES,
    INSTANCES,
    REPORT,
    RESULTS,
    finished_fraction,
    is_archived,
    next_count,
    reason_table,
    summary_markdown,
    unarchived_rows,
    write_reports,
)

__all__ = [
    "ACCEPTANCES",
    "CANDIDATES",
    "INSTANCES",
    "REPORT",
    "RESULTS",
    "format_acceptance",
    "format_bytes",
    "format_duration",
    "format_evidence",
    "finished_fraction",
    "format_gaps",
    "format_totals",
    "is_archived",
    "next_count",
    "open_questions",
    "reason_table",
    "replacing",
    "summary_markdown",
    "unarchived_rows",
    "write_reports",
]
