"""Studies to instances in the spool, by C-MOVE or C-GET."""
