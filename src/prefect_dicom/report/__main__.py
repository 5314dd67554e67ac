from prefect_dicom.report.background import main

raise SystemExit(main())
