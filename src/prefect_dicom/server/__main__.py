"""``python -m prefect_dicom.server FOLDER SITE PORT``: run the supervisor."""

import sys

from prefect_dicom.server.supervisor import main

sys.exit(main(*sys.argv[1:]))
