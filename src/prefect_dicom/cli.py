"""The command line: a thin face over the flows and steps.

Results go to standard output, progress and complaints to standard error. Exit codes: 0 all
archived (or all well), 1 something unexpected, 2 some rows are not archived (or a check found
faults), 3 configuration, cohort file or command line, 4 interrupted.

What a command needs is imported in it: `--help`, a complaint about a file and `status` come
without Prefect, pynetdicom, pandas or boto3.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, date, datetime
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from prefect_dicom import __version__
from prefect_dicom.configuration import Site, ledger_url, load_site
from prefect_dicom.courtesy import state_in_words
from prefect_dicom.errors import (
    ConfigurationError,
    FaultyFileError,
    Interrupted,
    PrefectDicomError,
)
from prefect_dicom.identifiers import is_safe_key
from prefect_dicom.model import CohortRow, Disposition, Level
from prefect_dicom.reasons import REASONS

if TYPE_CHECKING:
    from prefect_dicom.doctor import Finding
    from prefect_dicom.learn import Learnt
    from prefect_dicom.ledger import Cohort, Ledger, LivingRun, Totals
    from prefect_dicom.spool import Quarantined


class Exit(IntEnum):
    """What the exit code says."""

    ALL_WELL = 0
    UNEXPECTED = 1
    NOT_ALL = 2
    CONFIGURATION = 3
    INTERRUPTED = 4


_one_spelling = Parameter(negative=())
app = App(
    name="prefect-dicom",
    version=__version__,
    help="Pull a cohort out of a PACS into an archive, with a proof for every study and a "
    "verdict for every row. Begin with `prefect-dicom demo`, then `prefect-dicom doctor`.",
    default_parameter=_one_spelling,
    suppress_keyboard_interrupt=False,
)
receiver = App(
    name="receiver",
    help="The managed storage SCP that C-MOVE sends to.",
    default_parameter=_one_spelling,
    sort_key=9,
)
quarantine = App(
    name="quarantine",
    help="What arrived and cannot be archived: look at it, give it back, or delete it.",
    default_parameter=_one_spelling,
    sort_key=8,
)
app.command(receiver)
app.command(quarantine)

console = Console(stderr=True, highlight=False)
output = Console(highlight=False)

DEFAULT_SITE = "site.yaml"
SiteOption = Annotated[str, Parameter(name=["--site", "-s"], help="Site file, or block:NAME.")]
JsonOption = Annotated[
    bool, Parameter(name="--json", help="Print the result as JSON.", show_default=False)
]
CohortName = Annotated[str, Parameter(help="Name or number of a cohort; see `status`.")]


@app.command(sort_key=2)
def doctor(
    *,
    site: SiteOption = DEFAULT_SITE,
    node: Annotated[tuple[str, ...], Parameter(help="Only this node.", show_default=False)] = (),
    study: Annotated[str | None, Parameter(help="StudyInstanceUID to try with.")] = None,
    accession: Annotated[str | None, Parameter(help="AccessionNumber to try with.")] = None,
    patient: Annotated[str | None, Parameter(help="PatientID to try with.")] = None,
    learn: Annotated[
        bool,
        Parameter(help="Learn what each node does, instead, and write it.", show_default=False),
    ] = False,
    json_: JsonOption = False,
) -> int:
    """Prove a set-up before a long run.

    Opens the ledger and the spool, puts and checks a small object in the archive, starts the
    receiver, and for each PACS node does a C-ECHO, a C-FIND, reads one instance list and
    retrieves one instance over the configured way. Names what is broken and what to do, and
    prints the line to add to the PACS's table of known nodes.

    With `--learn` it finds out what each node does, by some 60 requests and at most 120, and
    writes that beside the site file, where runs find it: profiles/NODE.yaml. Nothing is stored on
    the node or deleted; a handful of instances is retrieved and thrown away.
    """
    if learn and site.startswith("block:"):
        fault = "--learn: a profile lies beside a site file, and blocks have none; name a file"
        raise ConfigurationError("command line", [fault])
    settings = _site(site)
    _check_known("--node", node, settings.nodes)
    given = {"--study": study, "--accession": accession, "--patient": patient}
    faults = [
        f"{option}: is empty or holds a wildcard or a backslash; it would select others"
        for option, value in given.items()
        if value is not None and not is_safe_key(value)
    ]
    if faults:
        raise ConfigurationError("command line", faults)
    row = CohortRow(0, patient, accession, study) if any(given.values()) else None
    if learn:
        return _learn(settings, site, node or tuple(settings.nodes), row, json_)

    from prefect_dicom.doctor import entries_for_the_pacs, examine

    findings: list[Finding] = []
    for finding in examine(settings, node, row):
        if not json_:
            _print_finding(finding, findings[-1].part if findings else "")
        findings.append(finding)
    well = all(finding.ok for finding in findings)
    entries = {
        name: entries_for_the_pacs(settings, settings.nodes[name])
        for name in node or settings.nodes
    }
    if json_:
        result = {
            "well": well,
            "findings": [asdict(finding) for finding in findings],
            "entries": {name: [asdict(e) for e in some] for name, some in entries.items()},
        }
        print(json.dumps(result, indent=1))
        return Exit.ALL_WELL if well else Exit.NOT_ALL
    for name, some in entries.items():
        peer = settings.nodes[name]
        output.print(
            f"\nWhat [bold]{name}[/] ({escape(peer.called_ae_title)} at {peer.host}:{peer.port}) "
            "has to know of this site:",
            soft_wrap=True,
        )
        for place in dict.fromkeys(entry.place for entry in some):
            output.print(f"  {place}:", style="dim", markup=False)
            for entry in some:
                if entry.place == place:
                    output.print(f"    {entry.line}", markup=False, soft_wrap=True)
    faulty = sum(not finding.ok for finding in findings)
    warnings = sum(finding.ok and bool(finding.advice) for finding in findings)
    output.print(
        f"\n{len(findings)} checks: "
        + (f"[red]{_counted(faulty, 'fault')}[/]" if faulty else "[green]no fault[/]")
        + (f", [yellow]{_counted(warnings, 'note')}[/]" if warnings else "")
    )
    return Exit.ALL_WELL if well else Exit.NOT_ALL


def _learn(
    site: Site, reference: str, nodes: Collection[str], row: CohortRow | None, as_json: bool
) -> int:
    from prefect_dicom.learn import learn
    from prefect_dicom.profile import profile_path, values_of, write_profile

    folder = Path(reference).expanduser().absolute().parent
    results: dict[str, Any] = {}
    code = Exit.ALL_WELL
    for name in nodes:
        try:
            learnt = learn(site, name, row)
        except PrefectDicomError as error:
            if not as_json:
                output.print(f"[bold]{name}[/]: nothing was learnt", soft_wrap=True)
                _print_error(error)
            results[name] = {"error": error.code}
            code = Exit.NOT_ALL
            continue
        path = profile_path(folder, name)
        try:
            write_profile(path, learnt.profile, datetime.now(UTC))
        except OSError as error:
            fault = f"cannot be written ({error.strerror}); let this user write there"
            raise ConfigurationError(str(path), [fault]) from None
        results[name] = {
            "profile": values_of(learnt.profile),
            "file": str(path),
            "requests": learnt.requests,
            "instances": learnt.instances,
            "notes": learnt.notes,
        }
        if not as_json:
            _print_learnt(name, learnt, path)
    if as_json:
        print(json.dumps(results, indent=1))
    return code


def _print_learnt(name: str, learnt: Learnt, path: Path) -> None:
    from prefect_dicom.profile import in_words

    table = Table(title=f"What {name} does", title_justify="left")
    table.add_column("key", no_wrap=True)
    table.add_column("value")
    table.add_column("means")
    for key, value, meaning in in_words(learnt.profile):
        table.add_row(Text(key), Text(value), Text(meaning))
    output.print(table)
    for note in learnt.notes:
        output.print(f"  {note}", style="yellow", markup=False, soft_wrap=True)
    asked = _counted(learnt.requests, "request")
    output.print(
        f"Learnt by {asked} and {_counted(learnt.instances, 'instance')}, thrown away; runs use "
        f"it from now on: {path}",
        markup=False,
        soft_wrap=True,
    )


@app.command(sort_key=3)
def pull(
    cohort: Annotated[Path, Parameter(help="CSV, XLSX or Parquet list, or a definition in YAML.")],
    /,
    *,
    site: SiteOption = DEFAULT_SITE,
    node: Annotated[
        tuple[str, ...],
        Parameter(
            help="PACS node to ask, if there are several; repeated, a node to ask instead where "
            "those before have no answer or cannot deliver.",
            show_default=False,
        ),
    ] = (),
    every_node: Annotated[
        bool, Parameter(help="Ask each of several nodes for every row.", show_default=False)
    ] = False,
    name: Annotated[str | None, Parameter(help="A name for the cohort.")] = None,
    dry_run: Annotated[
        bool, Parameter(help="Only find the studies, and say what pulling them would take.")
    ] = False,
    json_: JsonOption = False,
) -> int:
    """Pull every study of a cohort file into the archive.

    Columns by DICOM keyword or plain name: PatientID, AccessionNumber, StudyInstanceUID,
    StudyDate (or a range), Modality, StudyDescription. Each row needs a PatientID, an
    AccessionNumber or a StudyInstanceUID. A definition (docs/cohorts.md) has filters for studies
    and series as well, and may do without a list. Running it again moves only what is missing.
    """
    from prefect_dicom.registration import register_cohort

    settings = _site(site)
    known = register_cohort(settings, cohort, node, name, every_node=every_node)

    def flow() -> Any:
        from prefect_dicom.flows import pull_cohort

        return pull_cohort(
            str(cohort), site, list(node) or None, name, dry_run, every_node, return_state=True
        )

    return _run(settings, site, known, flow, json_, _show_estimate if dry_run else _show)


@app.command(sort_key=5)
def rerun(
    cohort: CohortName,
    /,
    *,
    site: SiteOption = DEFAULT_SITE,
    reason: Annotated[
        tuple[str, ...], Parameter(help="Only failures with this code.", show_default=False)
    ] = (),
    node: Annotated[
        tuple[str, ...], Parameter(help="Only studies of this node.", show_default=False)
    ] = (),
    line: Annotated[
        tuple[int, ...], Parameter(help="Only this line of the cohort file.", show_default=False)
    ] = (),
    json_: JsonOption = False,
) -> int:
    """Go on with a cohort: what was interrupted, and what failed and can be retried.

    Without filters everything that is not permanent. With `--reason` exactly these failures,
    permanent ones too. An option may be repeated. Only missing instances are asked for.
    """
    from prefect_dicom.ledger import Ledger

    settings = _site(site)
    _check_known("--reason", reason, REASONS)
    _check_known("--node", node, settings.nodes)
    with Ledger.open(ledger_url(settings)) as ledger:
        known = ledger.cohort(cohort)

    def flow() -> Any:
        from prefect_dicom.flows import rerun_failed

        return rerun_failed(known.name, site, reason, node, line, return_state=True)

    return _run(settings, site, known, flow, json_, _show)


@app.command(sort_key=5)
def pause(
    cohort: CohortName, /, *, site: SiteOption = DEFAULT_SITE, json_: JsonOption = False
) -> int:
    """Let the runs of a cohort ask for nothing until it is resumed, on whatever host they are.

    Waits until they have heard, which takes seconds: requests under way are cancelled, what has
    arrived is kept. A run that begins while the cohort is paused ends at once.
    """

    def wish(ledger: Ledger, known: Cohort) -> None:
        ledger.pause(known.number)

    def is_heard(runs: Collection[LivingRun]) -> bool:
        return all(run.paused_at is not None for run in runs)

    return _steer(site, cohort, json_, wish, is_heard)


@app.command(sort_key=5)
def resume(
    cohort: CohortName, /, *, site: SiteOption = DEFAULT_SITE, json_: JsonOption = False
) -> int:
    """Let the runs of a paused cohort go on from where they are."""

    def wish(ledger: Ledger, known: Cohort) -> None:
        ledger.resume(known.number)

    def is_heard(runs: Collection[LivingRun]) -> bool:
        return all(run.paused_at is None for run in runs)

    return _steer(site, cohort, json_, wish, is_heard)


@app.command(sort_key=5)
def cancel(
    cohort: CohortName, /, *, site: SiteOption = DEFAULT_SITE, json_: JsonOption = False
) -> int:
    """End the runs of a cohort that are under way, on whatever host they are.

    Waits until they have ended, which takes seconds. What has arrived is kept, and `rerun` goes
    on from there.
    """
    told: set[int] = set()

    def wish(ledger: Ledger, known: Cohort) -> None:
        told.update(ledger.cancel(known.number))

    def is_heard(runs: Collection[LivingRun]) -> bool:
        return not told & {run.number for run in runs}

    return _steer(site, cohort, json_, wish, is_heard)


@app.command(sort_key=5)
def prioritise(
    cohort: CohortName,
    priority: Annotated[int, Parameter(help="Any number; without one a cohort has 0.")],
    /,
    *,
    site: SiteOption = DEFAULT_SITE,
    json_: JsonOption = False,
) -> int:
    """Let the runs of a cohort come before or behind those of others that ask the same node.

    Where the node's associations do not suffice for all, those of higher numbers have them first.
    """

    def wish(ledger: Ledger, known: Cohort) -> None:
        ledger.prioritise(known.number, priority)

    return _steer(site, cohort, json_, wish, lambda runs: True)


_HEARD_SECONDS = 30.0


def _steer(
    reference: str,
    cohort: str,
    as_json: bool,
    wish: Callable[[Ledger, Cohort], None],
    is_heard: Callable[[Collection[LivingRun]], bool],
) -> int:
    """Write a wish into the ledger, wait until the runs have heard it, and say where it stands."""
    from prefect_dicom.ledger import Ledger
    from prefect_dicom.report import unarchived_rows

    with Ledger.open(ledger_url(_site(reference))) as ledger:
        known = ledger.cohort(cohort)
        wish(ledger, known)
        deadline = time.monotonic() + _HEARD_SECONDS
        while not (heard := is_heard(runs := ledger.runs_under_way(known.number))):
            if time.monotonic() >= deadline:
                break
            time.sleep(0.2)
        known = ledger.cohort(known.name)
        left = unarchived_rows(ledger.totals(known.number))
    if as_json:
        print(json.dumps({"cohort": known.name, **_hands(known, runs), "heard": heard}, indent=1))
    else:
        output.print(f"Cohort {known.number}: {_hands_in_words(known, runs)}.", soft_wrap=True)
        if not heard:
            output.print("Not all of them have heard of it yet: look at `status` again.")
        if left and (not runs or known.paused):
            _print_how_to_go_on(known, reference)
    return Exit.ALL_WELL if heard else Exit.NOT_ALL


def _print_windows(site: Site, nodes: Iterable[str]) -> None:
    """What the windows of nodes say now, where they have some."""
    for words in _windows(site, nodes).values():
        output.print(words, markup=False, soft_wrap=True)


def _windows(site: Site, nodes: Iterable[str]) -> dict[str, str]:
    now = datetime.now(UTC)
    return {
        name: f"node {name}: " + state_in_words(courtesy, now, site.asked(name).limits.associations)
        for name in nodes
        if name in site.nodes and (courtesy := site.nodes[name].courtesy) is not None
    }


def _hands(cohort: Cohort, runs: Collection[LivingRun]) -> dict[str, Any]:
    """What people want of a cohort's runs, and what these do, as a result."""
    return {
        "paused": cohort.paused,
        "priority": cohort.priority,
        "runs": [
            {
                "number": run.number,
                "kind": run.kind,
                "started_at": run.started_at.isoformat(timespec="seconds"),
                "waits": run.paused_at is not None,
                "cancelled": run.cancelled,
                "waits_for": run.waits,
            }
            for run in runs
        ],
    }


def _hands_in_words(cohort: Cohort, runs: Collection[LivingRun]) -> str:
    """The same for people."""
    words = ["paused"] if cohort.paused else []
    if cohort.priority:
        words.append(f"priority {cohort.priority}")
    ending = sum(run.cancelled for run in runs)
    waiting = sum(run.paused_at is not None and not run.cancelled for run in runs)
    states = (
        (len(runs) - ending - waiting, "under way"),
        (waiting, "waiting to be resumed"),
        (ending, "ending"),
    )
    words += [f"{_counted(number, 'run')} {state}" for number, state in states if number]
    words += dict.fromkeys(run.waits for run in runs if run.waits)
    return ", ".join(words if runs else [*words, "no run under way"])


def _print_how_to_go_on(cohort: Cohort, reference: str) -> None:
    option = "" if reference == DEFAULT_SITE else f" --site {reference}"
    verb = "resume" if cohort.paused else "rerun"
    output.print(
        f"Go on with: prefect-dicom {verb} {cohort.name}{option}", markup=False, soft_wrap=True
    )


@app.command(sort_key=4)
def status(
    cohort: Annotated[str | None, Parameter(help="Name or number of a cohort.")] = None,
    /,
    *,
    site: SiteOption = DEFAULT_SITE,
    json_: JsonOption = False,
) -> int:
    """Show where cohorts stand: all in a line each, or one with its verdicts by reason.

    Of one cohort the exit code says whether all its rows are archived. Without one, and where
    `up` has started a server, it says how that is, too.
    """
    from prefect_dicom.ledger import Ledger
    from prefect_dicom.report import in_words

    settings = _site(site)
    with Ledger.open(ledger_url(settings)) as ledger:
        if cohort is not None:
            return _show(settings, site, ledger, ledger.cohort(cohort), json_)
        lines = [
            (known, ledger.totals(known.number), ledger.runs_under_way(known.number))
            for known in ledger.cohorts()
        ]
    if json_:
        results = [_figures(known, totals) | _hands(known, runs) for known, totals, runs in lines]
        print(json.dumps(results, indent=1))
        return Exit.ALL_WELL
    for known, totals, runs in lines:
        words = (
            f"{known.number}  [bold]{known.name}[/] ({', '.join(known.nodes)}): {in_words(totals)}"
        )
        if runs or known.paused or known.priority:
            words += f"; {_hands_in_words(known, runs)}"
        output.print(words, soft_wrap=not output.is_terminal)
    if not lines:
        console.print("No cohort yet: prefect-dicom pull cohort.csv")
    _print_windows(settings, settings.nodes)
    _print_server(settings)
    return Exit.ALL_WELL


@app.command(sort_key=3.5)
def archive_new(
    *,
    site: SiteOption = DEFAULT_SITE,
    node: Annotated[str | None, Parameter(help="PACS node to ask, if there are several.")] = None,
    days: Annotated[int, Parameter(help="How many days to look back, up to yesterday.")] = 7,
    json_: JsonOption = False,
) -> int:
    """Archive every study of the last days; what is archived already is not asked for.

    Looking back further than to yesterday finds what has reached the PACS late. Each day it is
    another cohort, with a report of its own.
    """
    from prefect_dicom.registration import register_new

    settings = _site(site)
    known = register_new(settings, node, date.today(), days)

    def flow() -> Any:
        from prefect_dicom.flows import archive_new

        return archive_new(site, node, days, return_state=True)

    return _run(settings, site, known, flow, json_, _show)


@app.command(sort_key=4.5)
def report(
    cohort: CohortName,
    /,
    *,
    with_identifiers: Annotated[
        bool,
        Parameter(
            help="Name patients and studies; a file of its own, for your eyes.", show_default=False
        ),
    ] = False,
    site: SiteOption = DEFAULT_SITE,
    json_: JsonOption = False,
) -> int:
    """Write the report of a cohort: one HTML page that says how far it is and what failed.

    It needs no network, and holds no patient data but with `--with-identifiers`. While a run is
    under way, and at its end, it is written by itself; the command prints where it is.
    """
    from prefect_dicom.ledger import Ledger
    from prefect_dicom.report.page import write_page

    settings = _site(site)
    with Ledger.open(ledger_url(settings)) as ledger:
        known = ledger.cohort(cohort)
        # A ledger may be older than the site's name for a node.
        node = settings.asked(known.node) if known.node in settings.nodes else None
        path = write_page(
            ledger,
            known,
            settings.reports,
            courtesy=node and node.courtesy,
            associations=node.limits.associations if node else 1,
            with_identifiers=with_identifiers,
        )
    print(json.dumps({"report": str(path)}) if json_ else path)
    return Exit.ALL_WELL


@app.command(sort_key=6)
def verify(
    cohort: Annotated[
        str | None, Parameter(help="Name or number of a cohort; without one, all studies.")
    ] = None,
    /,
    *,
    site: SiteOption = DEFAULT_SITE,
    level: Annotated[Level, Parameter(help="How hard to look.")] = Level.CHECKSUM,
    json_: JsonOption = False,
) -> int:
    """Check that every archived study still is what its manifest says.

    `exists` and `size` list the archive, `checksum` compares the SHA-256 that the store keeps,
    `read` downloads and hashes every object. The PACS is not asked.
    """
    from prefect_dicom.display import counting_shown
    from prefect_dicom.verification import verify_cohort

    faults = _Faults(json_)
    studies = instances = 0
    with counting_shown(console) as say:
        for study in verify_cohort(_site(site), cohort, level):
            studies, instances = studies + 1, instances + study.instances
            faults.note(study.reference, study.faults)
            say(f"{_counted(studies, 'study', 'studies')}, {_counted(instances, 'instance')}")
    if json_:
        figures = {"level": level, "studies": studies, "instances": instances}
        print(json.dumps(figures | {"faulty": faults.studies}, indent=1))
        return faults.exit
    faults.explain()
    output.print(
        f"{_counted(studies, 'study', 'studies')} with {_counted(instances, 'instance')} checked "
        f"at level {level}: {faults.in_words}"
    )
    return faults.exit


@app.command(sort_key=10)
def explain(code: Annotated[str, Parameter(help="A reason code, like no-match.")], /) -> int:
    """Tell all there is to say about a reason code: causes by PACS, what to do, and reruns.

    The same as the code's section in docs/reasons.md.
    """
    from prefect_dicom.explanations import section

    _check_known("CODE", (code,), REASONS)
    if output.is_terminal:
        output.print(Markdown(section(code)))
    else:
        print(section(code), end="")
    return Exit.ALL_WELL


@app.command(sort_key=7)
def rebuild_ledger(
    *,
    site: SiteOption = DEFAULT_SITE,
    level: Annotated[
        Level, Parameter(help="How hard to look at the objects, as in `verify`; sizes at least.")
    ] = Level.SIZE,
    json_: JsonOption = False,
) -> int:
    """Build a lost ledger anew from the manifests in the archive.

    Every manifest is checked, and what it names. What the ledger has is kept: an empty one is
    filled, an older one completed. A study with faults is added as failed, not as archived. The
    PACS is not asked. After it, `pull` of the same cohort file moves only what is missing.
    """
    from prefect_dicom import repair
    from prefect_dicom.display import counting_shown

    faults = _Faults(json_)
    outcomes: Counter[str] = Counter()
    instances = 0
    with counting_shown(console) as say:
        for study in repair.rebuild_ledger(_site(site), level):
            faults.note(study.reference, study.faults)
            instances += study.instances
            if not study.faults:
                outcomes[study.adoption or "without-manifest"] += 1
            say(f"{_counted(outcomes.total() + len(faults.studies), 'study', 'studies')}")
    if json_:
        figures = {"level": level, "instances": instances, "studies": dict(outcomes)}
        print(json.dumps(figures | {"faulty": faults.studies}, indent=1))
        return faults.exit
    faults.explain()
    for outcome, meaning in _ADOPTIONS.items():
        if outcomes[outcome]:
            output.print(f"{outcomes[outcome]:>8} {meaning}", markup=False, soft_wrap=True)
    output.print(f"Manifests naming {_counted(instances, 'instance')} checked: {faults.in_words}")
    return faults.exit


_ADOPTIONS = {
    "added": "added to the ledger as archived",
    "completed": "archived now, and unfinished in the ledger before",
    "known": "archived in the ledger already",
    "claimed": "left to the run that works on them",
    "listed-otherwise": "left as they are: the PACS has listed other instances since",
    "without-manifest": "without a manifest: not archived yet, pulled like any other",
}


EntryNames = Annotated[
    tuple[str, ...], Parameter(help="Names of objects, from `list`.", show_default=False)
]
AllOption = Annotated[
    bool, Parameter(name="--all", help="All that lies there.", show_default=False)
]
QuarantineReason = Annotated[
    tuple[str, ...], Parameter(help="Those with this reason code.", show_default=False)
]


@quarantine.command(name="list", sort_key=1)
def quarantine_list(
    *,
    site: SiteOption = DEFAULT_SITE,
    reason: QuarantineReason = (),
    json_: JsonOption = False,
) -> int:
    """List what lies in quarantine, the oldest first; no object is read for it."""
    from prefect_dicom.quarantine import in_quarantine, name_of

    _check_known("--reason", reason, REASONS)
    entries = in_quarantine(_site(site), reason)
    lines = [
        {
            "name": name_of(entry),
            "study": entry.study,
            "reason": entry.reason,
            "size_bytes": entry.size_bytes,
            "since": entry.since.isoformat(timespec="seconds"),
            "sender": entry.sender,
        }
        for entry in entries
    ]
    if json_:
        print(json.dumps(lines, indent=1))
        return Exit.ALL_WELL
    # Not a table of rich's: that takes seconds for thousands of rows.
    row = "{name:12}  {study:>8}  {reason:20}  {size_bytes:>11}  {since:25}  {sender}"
    if lines:
        print(row.format_map({key: key for key in lines[0]} | {"size_bytes": "bytes"}))
    for line in lines:
        shown = {"study": line["study"] or "-", "sender": _escaped(line["sender"]) or "-"}
        print(row.format_map(line | shown))
    for code, count in Counter(entry.reason for entry in entries).most_common():
        console.print(f"{count} {code}: {REASONS[code].meaning}", markup=False)
    if not lines:
        console.print("Nothing lies in quarantine.")
    return Exit.ALL_WELL


@quarantine.command(name="show", sort_key=2)
def quarantine_show(
    name: Annotated[str, Parameter(help="Name of an object, from `list`.")],
    /,
    *,
    with_identifiers: Annotated[
        bool,
        Parameter(help="Show PatientID and UIDs too: mind who sees it.", show_default=False),
    ] = False,
    site: SiteOption = DEFAULT_SITE,
    json_: JsonOption = False,
) -> int:
    """Show what the headers of one object say, and why it is here."""
    from prefect_dicom.quarantine import described, in_quarantine, named

    settings = _site(site)
    (entry,) = named(in_quarantine(settings), [name])
    facts = described(settings, entry, with_identifiers=with_identifiers)
    if json_:
        print(json.dumps(facts, indent=1))
        return Exit.ALL_WELL
    for key, value in facts.items():
        print(f"{key}: {'-' if value in (None, '') else _escaped(str(value))}")
    return Exit.ALL_WELL


@quarantine.command(name="release", sort_key=3)
def quarantine_release(
    names: EntryNames = (),
    /,
    *,
    all_: AllOption = False,
    reason: QuarantineReason = (),
    site: SiteOption = DEFAULT_SITE,
    json_: JsonOption = False,
) -> int:
    """Give objects back to their studies, for a rerun to archive.

    Only where the study's instance list names the object and nothing has come in its place. The
    rerun judges it as if it had just arrived.
    """
    from prefect_dicom.quarantine import name_of, release

    settings = _site(site)
    entries = _chosen_entries(settings, names, all_, reason)
    lines = []
    for given in release(settings, entries):
        code = given.trouble.code if given.trouble else None
        why = given.trouble.detail if given.trouble else ""
        lines.append(
            {
                "name": name_of(given.entry),
                "released": code is None,
                "study": given.study,
                "reason": code,
                "why": why,
                "rerun_with_reason": given.reopened_by,
            }
        )
        if not json_:
            words = f"stays: {why} ({code})" if code else f"given back to study {given.study}"
            output.print(f"{name_of(given.entry)}  {words}", markup=False, soft_wrap=True)
    released = [line for line in lines if line["released"]]
    if json_:
        print(json.dumps(lines, indent=1))
    else:
        output.print(f"{len(released)} of {_counted(len(lines), 'object')} given back.")
        if released:
            again = sorted({line["rerun_with_reason"] for line in released} - {None})
            options = "".join(f" --reason {code}" for code in again)
            output.print(f"Go on with: prefect-dicom rerun COHORT{options}", markup=False)
    return Exit.ALL_WELL if len(released) == len(lines) else Exit.NOT_ALL


@quarantine.command(name="drop", sort_key=4)
def quarantine_drop(
    names: EntryNames = (),
    /,
    *,
    all_: AllOption = False,
    reason: QuarantineReason = (),
    yes: Annotated[bool, Parameter(help="Do not ask.", show_default=False)] = False,
    site: SiteOption = DEFAULT_SITE,
) -> int:
    """Delete objects in quarantine, for good."""
    from prefect_dicom.quarantine import drop

    settings = _site(site)
    entries = _chosen_entries(settings, names, all_, reason)
    if entries and not yes:
        if not sys.stdin.isatty():
            raise ConfigurationError("command line", ["--yes: say so where nobody can be asked"])
        question = f"Delete {_counted(len(entries), 'object')} for good? [y/N] "
        if console.input(escape(question)).strip().lower() not in ("y", "yes"):
            output.print("Nothing was deleted.")
            return Exit.NOT_ALL
    drop(settings, entries)
    output.print(f"{_counted(len(entries), 'object')} deleted.")
    return Exit.ALL_WELL


def _chosen_entries(
    site: Site, names: Collection[str], everything: bool, reasons: Collection[str]
) -> list[Quarantined]:
    from prefect_dicom.quarantine import in_quarantine, named

    ways = sum(map(bool, (names, everything, reasons)))
    if ways != 1:
        fault = "names, --all or --reason: choose objects in one of these ways"
        raise ConfigurationError("command line", [fault])
    _check_known("--reason", reasons, REASONS)
    entries = in_quarantine(site, reasons)
    return named(entries, names) if names else entries


def _escaped(text: str) -> str:
    """A peer's text, which may hold what moves a terminal's cursor."""
    return text.encode("unicode_escape").decode("ascii")


@app.command(sort_key=11)
def up(
    *,
    site: SiteOption = DEFAULT_SITE,
    port: Annotated[
        int | None,
        Parameter(help="Port on loopback; 4200 or another free one, and then always that."),
    ] = None,
) -> int:
    """Start a Prefect server of this site's own in the background, for a machine without one.

    With a worker, and with all flows deployed. Twice is as good as once; run it again when the
    site file has changed. It keeps its database and logs in `prefect-server` beside the ledger.
    `pull` and `rerun` use it where PREFECT_API_URL is not set. Stop it with `down`.
    """
    from prefect_dicom.server import LocalServer

    _refuse_block(site, "up")
    local = LocalServer.of(load_site(site))
    with console.status("Starting Prefect's server: half a minute, the first time longer"):
        local.up(Path(site).expanduser(), port)
    _print_server(load_site(site))
    output.print(f"Logs: {local.logs}", markup=False, soft_wrap=True)
    return Exit.ALL_WELL


@app.command(sort_key=12)
def down(*, site: SiteOption = DEFAULT_SITE) -> int:
    """Stop the Prefect server that `up` started, its worker and the runs of that worker.

    Runs end as by Ctrl-C: nothing is lost, `rerun` goes on.
    """
    from prefect_dicom.server import LocalServer

    _refuse_block(site, "down")
    with console.status("Ending what is under way"):
        stopped = LocalServer.of(load_site(site)).down()
    output.print("Stopped." if stopped else "It did not run.")
    return Exit.ALL_WELL


def _refuse_block(site: str, command: str) -> None:
    if site.startswith("block:"):
        fault = f"{command}: a block lies in a Prefect server already; name a site file"
        raise ConfigurationError("command line", [fault])


def _print_server(site: Site) -> None:
    """How the server is that `up` has started; nothing where it never did."""
    from prefect_dicom.server import LocalServer

    words = LocalServer.of(site).in_words()
    if words:
        output.print(words, markup=False, soft_wrap=True)


@receiver.command(name="run")
def receiver_run(*, site: SiteOption = DEFAULT_SITE) -> int:
    """Run the receiver in the foreground until it is stopped (for service managers).

    Runs start it by themselves when they need it; this is for sites that want it always on.
    """
    from prefect_dicom.receiver.client import assignment_of
    from prefect_dicom.receiver.server import serve_forever

    settings = _site(site)
    console.print(
        f"{settings.receiver.ae_title} on {settings.receiver.bind}:{settings.receiver.port}"
    )
    serve_forever(assignment_of(settings))
    return Exit.ALL_WELL


@receiver.command(name="status")
def receiver_status(*, site: SiteOption = DEFAULT_SITE, json_: JsonOption = False) -> int:
    """Show whether the receiver runs, and for whom."""
    from prefect_dicom.receiver import running_receiver

    lease = running_receiver(_site(site))
    if lease is None:
        print(json.dumps(None)) if json_ else output.print("The receiver does not run.")
        return Exit.NOT_ALL
    with lease:
        facts = lease.status()
    if json_:
        print(json.dumps(facts, indent=1))
    else:
        for key, value in facts.items():
            output.print(f"{key}: {value}", markup=False)
    return Exit.ALL_WELL


@receiver.command(name="stop")
def receiver_stop(*, site: SiteOption = DEFAULT_SITE) -> int:
    """Stop the receiver; objects under way are finished first."""
    from prefect_dicom.receiver import running_receiver

    lease = running_receiver(_site(site))
    if lease is not None:
        with lease:
            lease.stop()
    output.print("Stopped." if lease else "The receiver did not run.")
    return Exit.ALL_WELL


@app.command(sort_key=1)
def demo(
    folder: Annotated[Path, Parameter(help="Where the demo lives.")] = Path("demo"),
    /,
    *,
    studies: Annotated[int, Parameter(help="Studies to generate.")] = 12,
) -> int:
    """See it work in a minute: a small PACS on this machine, a cohort, a local archive.

    Generates studies of several modalities, starts a PACS that holds them on loopback, pulls
    them with the real flow, and pulls them again to show that nothing moves. Needs nothing but
    Python.
    """
    from prefect_dicom.testing.demo import prepared_demo

    with prepared_demo(folder, studies) as ready:
        output.print(f"A PACS with {ready.instances} instances listens on port {ready.port}.")
        output.print(f"[bold]prefect-dicom pull {ready.cohort} --site {ready.site}[/]\n")
        first = pull(ready.cohort, site=str(ready.site))
        if first != Exit.ALL_WELL:
            return first
        sent = ready.requests()
        output.print("\n[bold]The same again[/]: nothing is asked for, nothing moves.\n")
        second = pull(ready.cohort, site=str(ready.site))
        moved = ready.requests() - sent
        output.print(
            f"\nRequests the PACS saw in the first pull: {sent}; in the second: {moved}."
            f"\nEverything lies in {folder}: site.yaml, cohort.csv, archive/, reports/, ledger."
            "\nNext: copy site.yaml, enter your PACS, and run `prefect-dicom doctor`."
        )
    return second if not moved else Exit.UNEXPECTED


def main() -> None:
    """Entry point: exceptions become messages and exit codes."""
    os.umask(0o077)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        code = app(exit_on_error=False, result_action="return_value")
    except CycloptsError:
        # It has been printed.
        code = Exit.CONFIGURATION
    except FaultyFileError as error:
        console.print(
            Text.assemble((error.source, "red"), f": {_counted(len(error.faults), 'fault')}")
        )
        for fault in error.faults:
            console.print(f"  - {fault}", markup=False)
        code = Exit.CONFIGURATION
    except PrefectDicomError as error:
        _print_error(error)
        code = _exit_for(error)
    except KeyboardInterrupt:
        console.print("Interrupted.")
        code = Exit.INTERRUPTED
    sys.exit(code if isinstance(code, int) else Exit.ALL_WELL)


# --- around a flow

_INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)


def _run(
    site: Site,
    reference: str,
    cohort: Cohort,
    flow: Callable[[], Any],
    as_json: bool,
    show: Callable[..., int],
) -> int:
    """Run a flow with a live display, then show where the cohort stands."""
    from prefect_dicom.display import progress_shown
    from prefect_dicom.ledger import Ledger

    _settle_prefect(site)
    error: BaseException | None = None
    try:
        with _interruptible() as interrupted, progress_shown(console, site, cohort):
            if not _prefect_answers():
                return Exit.CONFIGURATION
            state = flow()
            if state.is_cancelled():
                error = Interrupted()
            elif not state.is_completed():
                error = state.result(raise_on_failure=False)
    except KeyboardInterrupt:
        error = Interrupted()
    except Exception:
        # A signal to the whole process group ends the embedded server too.
        if not interrupted.is_set():
            raise
        error = Interrupted()
    with Ledger.open(ledger_url(site)) as ledger:
        code = show(site, reference, ledger, cohort, as_json, error)
    if error is None:
        return code
    if isinstance(error, Interrupted):
        return Exit.INTERRUPTED
    if isinstance(error, PrefectDicomError):
        _print_error(error)
        return _exit_for(error)
    console.print(f"[red]The flow did not complete[/] ({type(error).__name__}).")
    return Exit.UNEXPECTED


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM ends the run in order, and is noted; the next at once."""
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        if interrupted.is_set():
            # Nothing is lost by it: the next run goes on from what is on the disk.
            os._exit(Exit.INTERRUPTED)
        interrupted.set()
        console.print("Interrupted: ending what is under way. Once more to end at once.")
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _INTERRUPTIONS}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prefect_answers() -> bool:
    """Whether Prefect's server answers; where none is configured its embedded one is started."""
    from prefect.client.orchestration import get_client

    # A Ctrl-C goes to every process of the terminal, and the embedded server would be gone
    # before the run can tell it how it ended. A blocked signal stays blocked in a child.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with get_client(sync_client=True) as client:
            trouble = client.api_healthcheck()
    except RuntimeError as error:
        trouble = error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if trouble is None:
        return True
    url = os.environ.get("PREFECT_API_URL")
    console.print(
        f"[red]Prefect's server does not answer[/] ({type(trouble).__name__}). "
        + (
            "Start it, or unset PREFECT_API_URL for an embedded one."
            if url
            else "See `prefect config view` for its address; without one it is embedded."
        )
    )
    return False


def _settle_prefect(site: Site | None = None) -> None:
    """Prefect's settings for a run of its own; whatever the user has set stays."""
    if site is not None and "PREFECT_API_URL" not in os.environ:
        from prefect_dicom.server import LocalServer

        if (url := LocalServer.of(site).url) is not None:
            os.environ["PREFECT_API_URL"] = url
    for name, value in {
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    }.items():
        os.environ.setdefault(name, value)


def _show(
    site: Site,
    reference: str,
    ledger: Ledger,
    cohort: Cohort,
    as_json: bool,
    error: BaseException | None = None,
) -> int:
    from prefect_dicom.report import (
        CANDIDATES,
        REPORT,
        RESULTS,
        in_words,
        reason_table,
        unarchived_rows,
    )

    totals = ledger.totals(cohort.number)
    reasons = reason_table(ledger.verdicts(cohort.number))
    folder = site.reports / cohort.name
    missing = unarchived_rows(totals)
    notes = ledger.notes(cohort.number)
    # As it stands now: somebody may have paused it since the run began.
    cohort, runs = ledger.cohort(cohort.name), ledger.runs_under_way(cohort.number)
    code = Exit.NOT_ALL if missing else Exit.ALL_WELL
    if as_json:
        result = _figures(cohort, totals) | _hands(cohort, runs)
        result |= {"reasons": reasons, "reports": str(folder)}
        result["notes"] = [{"node": node, "words": words} for node, words in notes]
        result["windows"] = list(_windows(site, cohort.nodes).values())
        if error is not None:
            result["error"] = getattr(error, "code", "unexpected")
        print(json.dumps(result, indent=1))
        return code
    table = Table(title=f"Cohort {cohort.number}: {cohort.name}", title_justify="left")
    table.add_column("rows", justify="right")
    table.add_column("verdict", no_wrap=True)
    table.add_column("reason", no_wrap=True)
    table.add_column("what to do")
    for row in reasons:
        table.add_row(str(row["rows"]), row["verdict"], row["reason"], row["what_to_do"])
    output.print(table)
    output.print(in_words(totals), markup=False, soft_wrap=not output.is_terminal)
    if runs or cohort.paused or cohort.priority:
        output.print(f"{_hands_in_words(cohort, runs)}.".capitalize(), soft_wrap=True)
    _print_windows(site, cohort.nodes)
    for node, words in notes:
        output.print(f"Noted of {node}: {words}.", markup=False, soft_wrap=True)
    if (folder / REPORT).exists():
        output.print(f"The whole of it: {folder / REPORT}", markup=False, soft_wrap=True)
    if (folder / RESULTS).exists():
        output.print(f"Row by row: {folder / RESULTS}", markup=False, soft_wrap=True)
    if (folder / CANDIDATES).exists():
        output.print(f"To choose from: {folder / CANDIDATES}", markup=False, soft_wrap=True)
    if missing and (cohort.paused or not runs):
        _print_how_to_go_on(cohort, reference)
    return code


def _show_estimate(
    site: Site,
    reference: str,
    ledger: Ledger,
    cohort: Cohort,
    as_json: bool,
    error: BaseException | None = None,
) -> int:
    """What pulling a cohort would take; the exit code says whether all of its rows were found."""
    from prefect_dicom.display import estimate_in_words
    from prefect_dicom.estimate import ESTIMATE, estimate_pull
    from prefect_dicom.report import RESULTS, bytes_in_words

    estimate = estimate_pull(ledger, cohort, site)
    folder = site.reports / cohort.name
    code = Exit.NOT_ALL if estimate.unfound_rows else Exit.ALL_WELL
    if as_json:
        result = {
            "cohort": cohort.name,
            "number": cohort.number,
            "node": cohort.node,
            "nodes": [*cohort.nodes],
        }
        result |= estimate.as_result() | {"reports": str(folder)}
        if error is not None:
            result["error"] = getattr(error, "code", "unexpected")
        print(json.dumps(result, indent=1))
        return code
    table = Table(title=f"Cohort {cohort.number}: {cohort.name}, a dry run", title_justify="left")
    table.add_column("modality", no_wrap=True)
    for name in ("studies", "series", "instances", "size", "an instance"):
        table.add_column(name, justify="right")
    table.add_column("its size", no_wrap=True)
    for share in (*estimate.shares, estimate.total):
        if share is estimate.total:
            table.add_section()
        table.add_row(
            share.modality,
            *(f"{number:,}" for number in (share.studies, share.series, share.instances)),
            bytes_in_words(share.size_bytes),
            bytes_in_words(share.instance_bytes),
            "" if share is estimate.total else "as archived before" if share.learned else "assumed",
        )
    output.print(table)
    for (word, reason), count in estimate.rows.most_common():
        what = f": {REASONS[reason].meaning} {REASONS[reason].what_to_do}" if reason else ""
        output.print(f"{_counted(count, 'row')} {word}{what}", markup=False, soft_wrap=True)
    output.print(estimate_in_words(estimate), markup=False, soft_wrap=not output.is_terminal)
    if (folder / RESULTS).exists():
        output.print(f"Row by row: {folder / RESULTS}", markup=False, soft_wrap=True)
        output.print(f"This table: {folder / ESTIMATE}.csv", markup=False, soft_wrap=True)
    return code


def _figures(cohort: Cohort, totals: Totals) -> dict[str, Any]:
    return {
        "cohort": cohort.name,
        "number": cohort.number,
        "node": cohort.node,
        "nodes": [*cohort.nodes],
        "rows": {str(v): n for v, n in totals.rows.items() if n},
        "studies": {str(s): n for s, n in totals.studies.items() if n},
        "expected_instances": totals.expected,
        "archived_instances": totals.stored,
        "size_bytes": totals.size_bytes,
        "unproved": dict(totals.unproved.most_common()),
        "evidence": {str(e): n for e, n in totals.evidence.items() if n},
    }


class _Faults:
    """Studies with faults: each is printed as it is found, what the codes mean at the end."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self.studies: list[dict[str, Any]] = []

    def note(self, reference: int | None, faults: Mapping[str, int]) -> None:
        if not faults:
            return
        counts = dict(sorted(faults.items()))
        self.studies.append({"study": reference, "faults": counts})
        if not self._as_json:
            name = "a study without a number" if reference is None else f"study {reference}"
            words = ", ".join(f"{count} {code}" for code, count in counts.items())
            output.print(f"[red]{name}[/]: {words}")

    def explain(self) -> None:
        for code in sorted({code for study in self.studies for code in study["faults"]}):
            output.print(
                f"{code}: {REASONS[code].meaning} {REASONS[code].what_to_do}", markup=False
            )

    @property
    def in_words(self) -> str:
        return f"[red]{len(self.studies)} with faults[/]" if self.studies else "[green]no faults[/]"

    @property
    def exit(self) -> Exit:
        return Exit.NOT_ALL if self.studies else Exit.ALL_WELL


def _print_finding(finding: Finding, part_before: str) -> None:
    mark, style = ("FAIL", "bold red") if not finding.ok else ("ok", "green")
    if finding.ok and finding.advice:
        mark, style = "note", "yellow"
    line = Table.grid(padding=(0, 1))
    line.add_column(width=12, overflow="fold")
    line.add_column(width=4)
    line.add_column()
    part = finding.part if finding.part != part_before else ""
    words = f"{finding.check}: {finding.words}" if finding.words else finding.check
    line.add_row(Text(part, style="bold"), Text(mark, style=style), Text(words))
    for advice in finding.advice.splitlines():
        line.add_row("", "", Text(advice, style="" if finding.ok else "bold"))
    output.print(line)


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _check_known(option: str, given: Collection[str], known: Collection[str]) -> None:
    faults = []
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            words = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            faults.append(f"{option}: no {ascii(name)[:80]} is known; {words}")
    if faults:
        raise ConfigurationError("command line", faults)


def _print_error(error: PrefectDicomError) -> None:
    console.print(Text.assemble((error.reason.meaning, "red"), f" ({error.code})"))
    if error.detail:
        console.print(f"  {error.detail}", markup=False)
    console.print(f"  {error.reason.what_to_do}", markup=False)


def _exit_for(error: PrefectDicomError) -> Exit:
    if isinstance(error, Interrupted):
        return Exit.INTERRUPTED
    if error.disposition is Disposition.OPERATOR:
        return Exit.CONFIGURATION
    if error.code != "unexpected":
        return Exit.NOT_ALL
    return Exit.UNEXPECTED


def _site(reference: str) -> Site:
    if reference.startswith("block:"):
        _settle_prefect()
        from prefect_dicom.blocks import resolve_site

        return resolve_site(reference)
    return load_site(reference)


if __name__ == "__main__":
    main()
