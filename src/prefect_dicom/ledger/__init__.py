"""Where the state of every cohort row, study and instance is kept, and who may write about it.

The only package that imports SQLAlchemy. It holds identifiers of patients: treat its file or
database as you treat the images.
"""

from prefect_dicom.ledger.records import (
    Adopted,
    Adoption,
    Amounts,
    Claim,
    Cohort,
    Copy,
    FoundStudy,
    InstanceRecord,
    ListChange,
    LivingRun,
    Reopened,
    RowFindings,
    Run,
    Sample,
    StudyGroup,
    StudyRecord,
    Totals,
)
from prefect_dicom.ledger.store import Ledger

__all__ = [
    "Adopted",
    "Adoption",
    "Amounts",
    "Claim",
    "Cohort",
    "Copy",
    "FoundStudy",
    "InstanceRecord",
    "Ledger",
    "ListChange",
    "LivingRun",
    "Reopened",
    "RowFindings",
    "Run",
    "Sample",
    "StudyGroup",
    "StudyRecord",
    "Totals",
]
