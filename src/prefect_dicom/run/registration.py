"""Registration of cohort files in the ledger, with the nodes to pull them from."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from prefect_dicom.cohort.definition import (
    cohort_file_digest,
    definition_by_date,
    nodes_of_definition,
    read_cohort_file,
)
from prefect_dicom.cohort.list_options import NO_CHOICES, ListOptions
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.core.errors import CohortError
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import NodeOrder, Verdict
from prefect_dicom.ledger import Cohort, Ledger
from prefect_dicom.report import replacing

COHORT_FILE = "cohort file"
"""What notes on a cohort file have in the place of a node, whose name has no blanks."""
_MOST_DAYS = 366


def register_cohort(
    site: Site,
    path: Path,
    node: str | Sequence[str] | None,
    name: str | None = None,
    *,
    every_node: bool = False,
    options: ListOptions = NO_CHOICES,
    notes: Sequence[str] = (),
    may_be_empty: bool = False,
    ledger: Ledger | None = None,
) -> Cohort:
    """Register a cohort file and its rows in the ledger; the same file is the same cohort.

    A registered file is not read again: a large workbook takes half a minute.

    Parameters
    ----------
    node : str or sequence of str, optional
        Nodes to pull from, the preferred one first. Default: those that a definition names, or
        the site's only one.
    every_node : bool
        Query each of several nodes for every row.
    options : ListOptions
        What a person has chosen for lists that leave a choice; another choice is another cohort.
    notes : sequence of str
        What was not taken of what the file was made of, in words for people.
    may_be_empty : bool
        Whether it is no fault that all rows are excluded.
    ledger : Ledger, optional
        The site's ledger, where the caller has it open.

    Raises
    ------
    CohortError
        Lists all faults of the file; none of its rows was recorded.
    """
    order = order_for(site, path, node, every_node=every_node).text
    try:
        digest = cohort_file_digest(path, options)
    except OSError:
        # Who reads it says what is wrong with it.
        read_cohort_file(path, options)
        raise
    with _open(site, ledger) as opened:
        cohort = opened.cohorts.find(digest, order)
        if cohort is None:
            file = read_cohort_file(path, options)
            cohort = opened.cohorts.add(
                digest,
                order,
                file.rows,
                name,
                file.filters,
                file.faulty,
                may_be_empty=may_be_empty,
            )
            for words in (*notes, *file.notes):
                opened.cohorts.add_note(cohort.number, COHORT_FILE, words)
    failpoint("cohort-recorded")
    return cohort


def register_new(
    site: Site, node: str | None, today: date, days: int, *, ledger: Ledger | None = None
) -> Cohort:
    """Register a cohort of all studies of the days before today.

    Its definition is written beside its reports. On the same day it is the same cohort. The next
    day it is another one with mostly the same days: it finds studies that reached the PACS since,
    and does not retrieve archived ones again.

    Parameters
    ----------
    days : int
        Number of days, 1 to 366; the last one is yesterday.
    ledger : Ledger, optional
        The site's ledger, where the caller has it open.
    """
    if not 1 <= days <= _MOST_DAYS:
        raise CohortError("the new studies", [f"days: expected 1 to {_MOST_DAYS}"])
    order = order_for(site, None, node)
    first, last = today - timedelta(days), today - timedelta(1)
    name = f"new-{first:%Y%m%d}-{last:%Y%m%d}"
    if len(site.nodes) > 1:
        name += f"-{'-'.join(order.names)}"
    folder = site.reports / name
    path = folder / "cohort.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            draft.write_text(definition_by_date(first, last))
    except OSError as error:
        fault = f"reports: no definition can be written there ({error.strerror})"
        raise CohortError(name, [fault]) from None
    return register_cohort(site, path, order.names, name, may_be_empty=True, ledger=ledger)


def cohorts_to_rerun(
    site: Site, chosen: Mapping[str, Collection[Any]], *, ledger: Ledger | None = None
) -> list[str]:
    """Return the names of cohorts with unfinished rows, without paused ones.

    Their chosen failures are reopened (:meth:`~prefect_dicom.ledger.cohorts.Cohorts.reopen`).
    """
    names = []
    with _open(site, ledger) as opened:
        for cohort in sorted(opened.cohorts.all(), key=lambda cohort: -cohort.priority):
            if not {*cohort.nodes} <= {*site.nodes} or cohort.paused:
                continue
            reopened = opened.cohorts.reopen(cohort.number, **chosen)
            if (
                reopened.studies
                or reopened.rows
                or opened.progress.totals(cohort.number).rows[Verdict.PENDING]
            ):
                names.append(cohort.name)
    return names


def _open(site: Site, ledger: Ledger | None) -> AbstractContextManager[Ledger]:
    """The ledger that the caller has open, or the site's for the block."""
    return Ledger.open(ledger_url(site)) if ledger is None else contextlib.nullcontext(ledger)


def order_for(
    site: Site, path: Path | None, node: str | Sequence[str] | None, *, every_node: bool = False
) -> NodeOrder:
    """Return the nodes to pull from: given, of the definition, or the site's only one.

    A node with ``destination`` is not the only one beside others.

    Raises
    ------
    CohortError
        No node is given, one twice, or one that the site does not have.
    """
    given = [node] if isinstance(node, str) else [*(node or ())]
    order = NodeOrder(tuple(given), every=every_node and len(given) > 1)
    if not given and path is not None:
        order = nodes_of_definition(path, every_node=every_node) or order
    # Studies are delivered to the others; they are queried where somebody says so.
    sources = [name for name, known in site.nodes.items() if known.destination is None]
    if not order.names and len(sources or site.nodes) == 1:
        return NodeOrder((*(sources or site.nodes),))
    if not order.names or len({*order.names}) < len(order.names) or {*order.names} - {*site.nodes}:
        names = ", ".join(sorted(site.nodes))
        fault = f"node: name one of the site's nodes with --node, or several in order: {names}"
        raise CohortError("the cohort's PACS", [fault])
    return order
