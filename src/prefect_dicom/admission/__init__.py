"""Admission: whether a request to a PACS node may start, and how many at a time.

====================  ==========================================================================
schedule              by the access schedule of the site file: at which time of the week
circuit_breaker       after failures: not now, one at a time, or not before a person has acted
concurrency_limit     by the strain a node shows: additive increase, multiplicative decrease
health                the signals that breaker and limit go by
node                  breaker, limit and health of one node, behind one lock
node_access           the way of every request to a node: admission, association, breaker
node_failover         which nodes of a cohort are disabled, and whether others remain
node_notes            notes about nodes for people, once each
association_pool      slots, leases and rate limits that all runs on a ledger share
request_rates         rate limits: what a request is charged, and how large it may be
retry                 immediate repetition of a query
====================  ==========================================================================
"""
