"""Admission: whether a request to a PACS node may start, and how many at a time.

====================  ==========================================================================
schedule              by the access schedule of the site file: at which time of the week
circuit_breaker       after failures: not now, one at a time, or not before a person has acted
concurrency_limit     by the strain a node shows: additive increase, multiplicative decrease
health                the signals that breaker and limit go by
node                  breaker, limit and health of one node, behind one lock
association_pool      slots, leases and rate limits that all runs on a ledger share
retry                 immediate repetition of a query
====================  ==========================================================================
"""
