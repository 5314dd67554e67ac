"""A dry run in a process that can be killed: ``python planning_process.py SITE COHORT``.

The steps of the flow without Prefect, in its order.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from prefect_dicom.config.site import load_site
from prefect_dicom.report.estimate import estimate_pull, write_estimate
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import open_dry_run


def main(site_file: str, cohort: str) -> None:
    site = load_site(site_file)
    registered = register_cohort(site, Path(cohort), None)
    with open_dry_run(site, registered.number) as plan:
        for page in plan.discovery.pages():
            plan.discovery.discover(*page)
        plan.discovery.limit_per_patient()
        estimate = estimate_pull(plan.ledger, plan.cohort, site)
        write_estimate(estimate, site.reports / plan.cohort.name)


if __name__ == "__main__":
    os.umask(0o077)
    main(*sys.argv[1:])
