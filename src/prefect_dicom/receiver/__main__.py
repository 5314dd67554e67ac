from prefect_dicom.receiver.server import main

raise SystemExit(main())
