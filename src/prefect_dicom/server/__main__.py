"""``python -m prefect_dicom.server FOLDER SITE PORT``: the keeper."""

import sys

from prefect_dicom.server.keeper import main

sys.exit(main(*sys.argv[1:]))
