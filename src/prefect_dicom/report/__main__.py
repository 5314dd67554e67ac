"""``python -m prefect_dicom.report``: write one report page in the background."""

from prefect_dicom.report.background import main

raise SystemExit(main())
