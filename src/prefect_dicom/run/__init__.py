"""What a run holds, and the loop of its passes."""
