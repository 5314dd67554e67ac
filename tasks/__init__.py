"""Prefect tasks: one step of a flow each, with its retries."""
