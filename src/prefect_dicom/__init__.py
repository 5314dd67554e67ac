"""Pull a cohort out of a PACS into object storage, with a proof for every study.

Prefect imports this package at every server and worker start (entry point
``prefect.collections``), so it stays light: only the blocks are imported here.
"""

from importlib.metadata import version

__version__ = version("prefect-dicom")
