"""Cohort files and definitions, and how answers are matched with their rows."""
