"""Python API for notebooks and for flows of your own: cohorts in, pandas frames out.

:func:`read_cohort` shows how a cohort file is understood, :func:`find` asks a PACS for its
studies, :func:`pull` archives them. All three names are also those of :mod:`prefect_dicom` itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pandas

from prefect_dicom.cohort import rows
from prefect_dicom.cohort.data_frame import frame_of_rows, list_of_rows, read_frame_as_list
from prefect_dicom.cohort.definition import is_definition
from prefect_dicom.cohort.list_options import FaultyLines, HiddenRows, ListOptions
from prefect_dicom.config.site import Site, ledger_url, load_site
from prefect_dicom.core.errors import CohortError, Interrupted, PrefectDicomError
from prefect_dicom.core.files import atomic_write, create_file
from prefect_dicom.core.proxies import spare_loopback
from prefect_dicom.ledger import Cohort, Ledger, Totals
from prefect_dicom.report import format_totals, is_archived, write_reports
from prefect_dicom.report.frames import (
    findings_frame,
    instances_frame,
    rows_frame,
    studies_frame,
)
from prefect_dicom.run.error_translation import without_phi
from prefect_dicom.run.loop import DiscoveryLoop, note_disabled_nodes, remaining_error
from prefect_dicom.run.monitoring import measured
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import DryRun, open_dry_run

__all__ = ["PullResult", "find", "pull", "read_cohort"]

log = logging.getLogger(__name__)

SiteLike: TypeAlias = "Site | str | os.PathLike[str]"
"""The path of a site file, ``block:NAME`` of a DicomSite block, or a Site."""
CohortLike: TypeAlias = "pandas.DataFrame | Mapping[str, object] | str | os.PathLike[str]"
"""The path of a cohort file, a frame as :func:`read_cohort` returns it, or one row as a mapping."""

_LISTS = "lists"
"""The folder, among the reports, with the lists that are written for frames."""


def read_cohort(
    path: str | os.PathLike[str], *, hidden_rows: HiddenRows | None = None
) -> pandas.DataFrame:
    """Read a cohort list as it is understood: what its rows will be asked for.

    Parameters
    ----------
    path : str or path-like
        A list in CSV (UTF-8, or UTF-16 with a byte order mark), XLSX or Parquet, or a table of
        candidates that a person has marked. Definitions in YAML go to :func:`find` and
        :func:`pull` by their path: their filters are more than a frame can hold.
    hidden_rows : {"take", "leave-out"}, optional
        Whether rows that a workbook hides are taken; needed where it hides some.

    Returns
    -------
    pandas.DataFrame
        One line for each row, by its line in the file (index ``line``; the header is line 1, and
        so are the names of the columns in Parquet). The columns are keywords of PS3.6, of dtype
        ``string`` with missing values: ``PatientID``, ``AccessionNumber``, ``StudyInstanceUID``,
        ``StudyDate`` (``YYYYMMDD``, or ``YYYYMMDD-YYYYMMDD`` with one end left out where the range
        is open), ``Modality``, ``StudyDescription``, ``PatientName``, ``PatientBirthDate``.
        ``attrs["notes"]`` has in words what was not taken of the file, such as other columns.

    Raises
    ------
    CohortError
        With all faults of the file, each with its line, column and remedy; none repeats the
        content of a cell.

    Examples
    --------
    >>> import prefect_dicom
    >>> cohort = prefect_dicom.read_cohort("cohort.csv")  # doctest: +SKIP
    >>> cohort[cohort.Modality == "CT"].index.tolist()  # doctest: +SKIP
    [2, 5]
    """
    path = Path(path)
    if is_definition(path):
        fault = "is a definition; give its path to find or pull, or read the list that it names"
        raise CohortError(path.name, [fault])
    given = rows.read_list(path, options=ListOptions.of(hidden_rows))
    frame = frame_of_rows(given.rows)
    frame.attrs["notes"] = list(given.notes)
    return frame


def find(
    site: SiteLike,
    cohort: CohortLike,
    *,
    node: str | Sequence[str] | None = None,
    hidden_rows: HiddenRows | None = None,
    faulty_lines: FaultyLines | None = None,
) -> pandas.DataFrame:
    """Find the studies of a cohort with C-FIND; retrieve nothing.

    This is the discovery of ``prefect-dicom pull --dry-run``: the cohort is registered in the
    site's ledger, and access schedules, association slots, rate limits, filters and
    cancellation apply. Findings stay in the ledger: the same cohort is not asked for again, by
    :func:`find` or by :func:`pull`. Prefect takes no part in it, nor do its concurrency limits.

    Parameters
    ----------
    site : Site, str or path-like
        The path of a site file, ``block:NAME`` of a DicomSite block, or a Site.
    cohort : pandas.DataFrame, mapping, str or path-like
        The path of a cohort file (a list, or a definition in YAML); a frame with the columns of a
        list, as of :func:`read_cohort`; or a single row as a mapping. A frame or mapping is
        written as a list among the site's reports, with mode 0600.
    node : str or sequence of str, optional
        Which of the site's PACS nodes to ask; needed where it has several. Several in the order
        in which they are asked, for what those before have no answer for.
    hidden_rows : {"take", "leave-out"}, optional
        Whether rows that a workbook hides are taken; needed where it hides some.
    faulty_lines : {"refuse", "set-apart"}, optional
        Whether lines with faults refuse a cohort file, the default, or are set apart with the
        verdict ``faulty``. A frame with faults is refused.

    Returns
    -------
    pandas.DataFrame
        One line for each row and study: ``line``, ``study`` (the ledger's reference),
        ``StudyInstanceUID``, ``PatientID``, ``AccessionNumber``, ``StudyDate``,
        ``ModalitiesInStudy`` (codes separated by blanks), ``StudyDescription``,
        ``NumberOfStudyRelatedInstances``, ``node``, ``verdict`` and ``reason``, as the PACS
        answered, missing where it did not. A row without studies has one line with its verdict and
        reason, and ``pending`` where it has not been asked for: a node was away, or its access
        schedule is closed. ``line`` is that of the cohort file or of the frame's index ``line``;
        of a frame without this index, the position of the row from 2 on. Holds patient data.

    Raises
    ------
    CohortError
        With all faults of the cohort; nothing was sent.
    PrefectDicomError
        Whatever stopped it; what was found before stays, and the next call goes on from there.

    See Also
    --------
    pull : Archive the studies.

    Examples
    --------
    >>> import prefect_dicom
    >>> row = {"PatientID": "000123", "StudyDate": "20240101-20240331"}
    >>> found = prefect_dicom.find("site.yaml", row)  # doctest: +SKIP
    >>> chosen = found.loc[found.NumberOfStudyRelatedInstances < 500, ["StudyInstanceUID"]]
    ... # doctest: +SKIP
    >>> prefect_dicom.pull("site.yaml", chosen).is_complete  # doctest: +SKIP
    True
    """
    settings, _ = _resolve(site)
    path, notes = _cohort_file(settings, cohort)
    options = ListOptions.of(hidden_rows, faulty_lines)
    with without_phi(), Ledger.open(ledger_url(settings)) as ledger:
        registered = register_cohort(
            settings, path, node, options=options, notes=notes, ledger=ledger
        )
        with open_dry_run(settings, registered.number, ledger=ledger) as run, measured(run):
            _discover(run)
        return findings_frame(ledger, registered)


@dataclass(frozen=True, eq=False)
class PullResult:
    """Where a cohort stands after :func:`pull`.

    Attributes
    ----------
    cohort : str
        Name of the cohort in the ledger, for the commands too.
    number : int
        Its number there.
    is_complete : bool
        Whether every row is archived, or excluded by filters; not where all are excluded.
    summary : str
        Counts of rows, studies and instances in words.
    reports : Path
        The folder with ``report.html``, ``results.csv``, ``instances.parquet`` and the others.
    rows : pandas.DataFrame
        The verdict of every row: the columns of ``results.csv`` (``line``, ``verdict``,
        ``reason``, ``studies`` as references separated by blanks, counts of instances, bytes,
        ``meaning``, ``what_to_do``, …).
    studies : pandas.DataFrame
        Every study that the cohort takes: ``study`` (the ledger's reference),
        ``StudyInstanceUID``, ``state``, ``reason``, ``evidence``, ``node``,
        ``expected_instances``, ``archived_instances``, ``withheld_instances``, ``size_bytes``, and
        ``manifest_key`` in the archive where it is archived.
    instances : pandas.DataFrame
        Every archived instance: the columns of ``instances.parquet`` (``study``, UIDs, ``key``,
        ``size_bytes``, ``sha256``, …).
    """

    cohort: str
    number: int
    is_complete: bool
    summary: str
    reports: Path
    rows: pandas.DataFrame = field(repr=False)
    studies: pandas.DataFrame = field(repr=False)
    instances: pandas.DataFrame = field(repr=False)


def pull(
    site: SiteLike,
    cohort: CohortLike,
    *,
    node: str | Sequence[str] | None = None,
    name: str | None = None,
    hidden_rows: HiddenRows | None = None,
    faulty_lines: FaultyLines | None = None,
) -> PullResult:
    """Pull every study of a cohort into the archive.

    Runs the flow :func:`~prefect_dicom.flows.pull_cohort`: in a notebook on Prefect's embedded
    server unless another is configured, and as a subflow inside a flow of your own. Calling it
    again moves only what is missing, and a finished cohort asks the PACS for nothing.

    Parameters
    ----------
    site : Site, str or path-like
        The path of a site file, ``block:NAME`` of a DicomSite block, or a Site.
    cohort : pandas.DataFrame, mapping, str or path-like
        As for :func:`find`. Prefect stores the path of the cohort file as a parameter of the
        flow; of a frame or mapping this is a list that is named by its digest.
    node : str or sequence of str, optional
        Which of the site's PACS nodes to ask; needed where it has several. Several in the order
        in which they are asked, for what those before have no answer for or cannot deliver.
    name : str, optional
        A name for the cohort; by default the beginning of the list's SHA-256.
    hidden_rows, faulty_lines : str, optional
        As for :func:`find`.

    Returns
    -------
    PullResult
        Also where rows are not archived: ``is_complete`` is false then, and ``rows`` has reasons
        and advice.

    Raises
    ------
    CohortError
        With all faults of the cohort; nothing was sent.
    Interrupted
        The run was cancelled.
    PrefectDicomError
        Whatever else stopped the run. What was archived before stays, and the next call goes on
        from there.

    See Also
    --------
    prefect_dicom.flows.rerun_failed : Try again what failed.

    Examples
    --------
    >>> import prefect_dicom
    >>> cohort = prefect_dicom.read_cohort("cohort.csv")  # doctest: +SKIP
    >>> result = prefect_dicom.pull("site.yaml", cohort[cohort.Modality == "CT"])
    ... # doctest: +SKIP
    >>> result.instances.groupby("StudyInstanceUID").size_bytes.sum()  # doctest: +SKIP
    """
    from prefect_dicom.flows.binding import bound
    from prefect_dicom.flows.pull_cohort import pull_cohort
    from prefect_dicom.run import pipeline

    spare_loopback(os.environ)
    settings, reference = _resolve(site)
    path, notes = _cohort_file(settings, cohort)
    options = ListOptions.of(hidden_rows, faulty_lines)
    with Ledger.open(ledger_url(settings)) as ledger:
        with without_phi():
            registered = register_cohort(
                settings, path, node, name, options=options, notes=notes, ledger=ledger
            )
        flow = bound(
            pull_cohort,
            f"pull-{registered.digest[:12]}",
            lambda engine: pipeline.pull(engine, settings, ledger, registered),
        )
        nodes = node if node is None or isinstance(node, str) else list(node)
        # What Prefect itself raises comes out as it is: a server that does not answer.
        state: Any = flow(
            str(path),
            reference,
            nodes,
            name,
            hidden_rows=hidden_rows,
            faulty_lines=faulty_lines,
            return_state=True,
        )
        with without_phi():
            _raise_failure(state)
            return _result(settings, ledger, registered)


def _resolve(site: SiteLike) -> tuple[Site, str]:
    """The site, and the text by which a flow run names it."""
    if isinstance(site, Site):
        return site, "a Site object"
    reference = os.fspath(site)
    if not reference.startswith("block:"):
        return load_site(reference), reference
    # Prefect takes two seconds to import.
    from prefect_dicom.blocks import resolve_site

    return resolve_site(reference), reference


# --- cohorts


def _cohort_file(site: Site, cohort: CohortLike) -> tuple[Path, Sequence[str]]:
    """The path of a cohort file; of a frame or mapping, that of the list that is written.

    And what was not taken of a frame, in words.
    """
    if isinstance(cohort, str | os.PathLike):
        return Path(cohort), ()
    given = read_frame_as_list(cohort)
    content = list_of_rows(given.rows, of_candidates=given.is_of_candidates).encode()
    path = site.reports / _LISTS / f"{hashlib.sha256(content).hexdigest()[:12]}.csv"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as draft, open(create_file(draft), "wb") as file:
            file.write(content)
    except OSError as error:
        fault = f"reports: no list can be written there ({error.strerror})"
        raise CohortError("the data frame", [fault]) from None
    return path, given.notes


# --- finding


def _discover(run: DryRun) -> None:
    """Query the rows of a cohort as far as they can be queried now, and report."""

    def discover(first_line: int, last_line: int) -> PrefectDicomError | None:
        try:
            with without_phi():
                run.discovery.discover(first_line, last_line)
        except PrefectDicomError as error:
            return error
        return None

    loop = DiscoveryLoop(run=run, discover=discover, show=_show, say=log.info, limits=nullcontext)
    trouble = loop.work_through()
    run.discovery.limit_per_patient()
    write_reports(run.ledger, run.cohort, run.site.reports)
    note_disabled_nodes(run)
    error = remaining_error(run, trouble, run.reporting.totals())
    if error is None and run.control.is_cancelled():
        error = Interrupted()
    if error is not None:
        raise error


def _show(count: Callable[[], Totals], waits: str = "", *, now: bool = False) -> None:
    """Show nothing: the caller waits for the frame."""


# --- pulling


def _raise_failure(state: Any) -> None:
    """Raise the error that stopped a flow, of its state."""
    if state.is_completed():
        return
    if not state.is_final() or state.is_cancelled():
        # Suspended in Prefect's UI, or cancelled by people.
        raise Interrupted()
    error = state.result(raise_on_failure=False)
    if isinstance(error, PrefectDicomError):
        raise error
    raise PrefectDicomError("unexpected", type(error).__name__)


def _result(site: Site, ledger: Ledger, cohort: Cohort) -> PullResult:
    totals = ledger.progress.totals(cohort.number)
    return PullResult(
        cohort=cohort.name,
        number=cohort.number,
        is_complete=is_archived(totals, may_be_empty=cohort.may_be_empty),
        summary=format_totals(totals),
        reports=site.reports / cohort.name,
        rows=rows_frame(ledger, cohort),
        studies=studies_frame(ledger, cohort),
        instances=instances_frame(ledger, cohort),
    )
