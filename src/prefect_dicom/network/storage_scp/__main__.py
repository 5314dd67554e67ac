from prefect_dicom.network.storage_scp.process import main

raise SystemExit(main())
