from prefect_dicom.report.running import main

raise SystemExit(main())
