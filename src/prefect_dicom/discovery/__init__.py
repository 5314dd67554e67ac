"""Rows of a cohort to studies, by C-FIND."""
