"""What became of a cohort, for people: tables as files, words, and one page that shows all of it.

Imported from here is what most others want, and nothing heavy; the page and its plots
(``page.py``, ``plots.py``) are imported where one is written.
"""

from prefect_dicom.report.tables import (
    CANDIDATES,
    INSTANCES,
    REPORT,
    RESULTS,
    bytes_in_words,
    duration_in_words,
    evidence_in_words,
    finished_fraction,
    gaps_in_words,
    in_words,
    next_count,
    reason_table,
    replacing,
    summary_markdown,
    unarchived_rows,
    write_reports,
)

__all__ = [
    "CANDIDATES",
    "INSTANCES",
    "REPORT",
    "RESULTS",
    "bytes_in_words",
    "duration_in_words",
    "evidence_in_words",
    "finished_fraction",
    "gaps_in_words",
    "in_words",
    "next_count",
    "reason_table",
    "replacing",
    "summary_markdown",
    "unarchived_rows",
    "write_reports",
]
