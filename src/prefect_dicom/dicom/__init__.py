"""DICOM files, texts and values; no network."""
