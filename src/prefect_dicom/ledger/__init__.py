"""The ledger: the state of every cohort row, study and instance, and the claims on studies.

The only package that imports SQLAlchemy. It holds identifiers of patients: treat its file or
database as you treat the images.
"""

from prefect_dicom.ledger.ledger import Ledger
from prefect_dicom.ledger.records import (
    Acceptance,
    Claim,
    Cohort,
    DeliveryRecord,
    DeliveryTotals,
    FoundStudy,
    InstanceRecord,
    ListChange,
    LivingRun,
    RebuildOutcome,
    Rebuilt,
    Reopened,
    RowFindings,
    Run,
    Sample,
    StudyGroup,
    StudyLocation,
    StudyRecord,
    Totals,
    Usage,
)

__all__ = [
    "Acceptance",
    "Rebuilt",
    "RebuildOutcome",
    "Usage",
    "Claim",
    "Cohort",
    "DeliveryRecord",
    "DeliveryTotals",
    "StudyLocation",
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
