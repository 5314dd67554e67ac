"""One step of a flow each, with its retry."""
