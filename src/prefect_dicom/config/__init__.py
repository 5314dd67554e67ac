"""The site file: read, checked, and refused with all its faults at once."""
