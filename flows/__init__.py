"""The flows that a user runs or deploys."""

from prefect_dicom.flows.archive_new import archive_new
from prefect_dicom.flows.deliver_cohort import deliver_cohort
from prefect_dicom.flows.pull_cohort import pull_cohort
from prefect_dicom.flows.rerun_failed import rerun_failed
from prefect_dicom.flows.verify_archive import verify_archive

__all__ = ["archive_new", "deliver_cohort", "pull_cohort", "rerun_failed", "verify_archive"]
