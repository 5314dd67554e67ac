"""Archive: conditional writes and verified bytes, one protocol for bucket and directory."""

from __future__ import annotations

from prefect_dicom.archive.base import Archive, Check, ObjectFacts
from prefect_dicom.config.archive import DirectoryArchive, S3Archive

__all__ = ["Archive", "Check", "ObjectFacts", "open_archive"]


def open_archive(settings: S3Archive | DirectoryArchive) -> Archive:
    """Open the archive of a site, without a request yet; a context manager.

    One archive serves all threads of a process: it holds the connection pool.
    """
    # Imported here: boto3 takes most of a second.
    if isinstance(settings, S3Archive):
        from prefect_dicom.archive.s3 import BucketArchive

        return BucketArchive(settings)
    from prefect_dicom.archive.directory import FolderArchive

    return FolderArchive(settings)
