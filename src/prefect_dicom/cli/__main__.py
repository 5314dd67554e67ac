from prefect_dicom.cli import main

main()
