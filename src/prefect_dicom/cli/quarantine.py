"""The commands ``quarantine list``, ``show``, ``release`` and ``drop``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from rich.markup import escape

from prefect_dicom.cli.app import (
    DEFAULT_SITE,
    Exit,
    JsonOption,
    SiteOption,
    _one_spelling,
    app,
    check_known,
    console,
    counted,
    output,
)
from prefect_dicom.cli.flow_runner import site_of
from prefect_dicom.config.site import Site
from prefect_dicom.core.errors import ConfigurationError
from prefect_dicom.core.reasons import REASONS

if TYPE_CHECKING:
    from prefect_dicom.archive.spool import Quarantined
    from prefect_dicom.operations.quarantine import Released


quarantine = App(
    name="quarantine",
    help="Received instances that cannot be archived: inspect, release or delete them.",
    default_parameter=_one_spelling,
    sort_key=8,
)
app.command(quarantine)


EntryNames = Annotated[
    tuple[str, ...], Parameter(help="Names of instances, from `list`.", show_default=False)
]
AllOption = Annotated[
    bool, Parameter(name="--all", help="All instances in quarantine.", show_default=False)
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
    """List the instances in quarantine, the oldest first, without reading them."""
    from prefect_dicom.operations.quarantine import in_quarantine, name_of

    check_known("--reason", reason, REASONS)
    entries = in_quarantine(site_of(site), reason)
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
    for entry, line in zip(entries, lines, strict=True):
        shown = {"study": entry.study or "-", "sender": _escaped(entry.sender) or "-"}
        print(row.format_map(line | shown))
    for code, count in Counter(entry.reason for entry in entries).most_common():
        console.print(f"{count} {code}: {REASONS[code].meaning}", markup=False)
    if not lines:
        console.print("The quarantine is empty.")
    return Exit.ALL_WELL


@quarantine.command(name="show", sort_key=2)
def quarantine_show(
    name: Annotated[str, Parameter(help="Name of an instance, from `list`.")],
    /,
    *,
    with_identifiers: Annotated[
        bool,
        Parameter(help="Show PatientID and UIDs too: patient data.", show_default=False),
    ] = False,
    site: SiteOption = DEFAULT_SITE,
    json_: JsonOption = False,
) -> int:
    """Show what the header of one instance says, and why it is here."""
    from prefect_dicom.operations.quarantine import described, in_quarantine, named

    settings = site_of(site)
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
    """Release instances to their studies, for a rerun to archive.

    Only where the study's instance list names the instance and no other copy of it was received.
    The rerun validates it as if it had just arrived.
    """
    from prefect_dicom.operations.quarantine import name_of, release

    settings = site_of(site)
    entries = _chosen_entries(settings, names, all_, reason)
    outcomes: list[Released] = []
    lines = []
    for given in release(settings, entries):
        outcomes.append(given)
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
            words = f"stays: {why} ({code})" if code else f"released to study {given.study}"
            output.print(f"{name_of(given.entry)}  {words}", markup=False, soft_wrap=True)
    released = [line for line in lines if line["released"]]
    if json_:
        print(json.dumps(lines, indent=1))
    else:
        output.print(f"{len(released)} of {counted(len(lines), 'instance')} released.")
        if released:
            again = sorted({each.reopened_by for each in outcomes if each.reopened_by})
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
    """Delete instances in quarantine, for good."""
    from prefect_dicom.operations.quarantine import drop

    settings = site_of(site)
    entries = _chosen_entries(settings, names, all_, reason)
    if entries and not yes:
        if not sys.stdin.isatty():
            raise ConfigurationError(
                "command line", ["--yes: needed where standard input is no terminal"]
            )
        question = f"Delete {counted(len(entries), 'instance')} for good? [y/N] "
        if console.input(escape(question)).strip().lower() not in ("y", "yes"):
            output.print("Nothing was deleted.")
            return Exit.NOT_ALL
    drop(settings, entries)
    output.print(f"{counted(len(entries), 'instance')} deleted.")
    return Exit.ALL_WELL


def _chosen_entries(
    site: Site, names: Collection[str], everything: bool, reasons: Collection[str]
) -> list[Quarantined]:
    from prefect_dicom.operations.quarantine import in_quarantine, named

    ways = sum(map(bool, (names, everything, reasons)))
    if ways != 1:
        fault = "names, --all or --reason: choose instances in one of these ways"
        raise ConfigurationError("command line", [fault])
    check_known("--reason", reasons, REASONS)
    entries = in_quarantine(site, reasons)
    return named(entries, names) if names else entries


def _escaped(text: str) -> str:
    """Escape a peer's text, which may hold control sequences of a terminal."""
    return text.encode("unicode_escape").decode("ascii")
