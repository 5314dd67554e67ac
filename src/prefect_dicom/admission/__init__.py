"""When a node may be asked, and for how much at a time."""
