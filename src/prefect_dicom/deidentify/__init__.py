"""De-identified copies by PS3.15 Annex E: the table as data, an engine, and classes of pixels."""
