"""Deliveries: archived studies sent to other nodes, and the evidence that they are there."""
