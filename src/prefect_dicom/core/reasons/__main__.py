"""``python -m prefect_dicom.core.reasons``: write the text of ``docs/reasons.md``."""

from __future__ import annotations

import sys

from prefect_dicom.core.reasons import page

if __name__ == "__main__":
    sys.stdout.write(page())
