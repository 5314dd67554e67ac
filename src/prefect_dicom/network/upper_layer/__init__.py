"""The DICOM upper layer, PS3.8: PDUs, their stream, and what an association agrees on."""
