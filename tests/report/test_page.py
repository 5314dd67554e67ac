"""The report of a cohort says how far it is, how fast, what failed and what next, and no more."""

from __future__ import annotations

import re
import resource
import stat
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pytest

from prefect_dicom.config.access_schedule import AccessSchedule
from prefect_dicom.core.model import StudyState, Verdict
from prefect_dicom.ledger import Ledger
from prefect_dicom.report import REPORT, format_bytes
from prefect_dicom.report.background import EVERY_SECONDS, BackgroundPage
from prefect_dicom.report.page import REPORT_WITH_IDENTIFIERS, page, write_page
from prefect_dicom.report.summary import summarize
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support.browser import PROGRAM, Browser, chromium
from tests.support.campaign import subset
from tests.support.commands import CommandLine
from tests.support.histories import written
from tests.support.postgres import ledger_url
from tests.support.sites import Place, site_around, study, until

NIGHTS = AccessSchedule.model_validate(
    {"time_zone": "Europe/Berlin", "windows": [{"name": "night", "hours": "19:00-07:00"}]}
)
HOSTILE = '"><script>document.title="owned"</script><img src=http://evil.example/x>&$\\frac{x}$'
SECRETS = ("GRAY^DORIAN", "ID-4711", "ACC-0815", "19310228", "Lung of the portrait")


class Figures(HTMLParser):
    """The texts of the elements that have a name for what they say."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.said: dict[str, str] = {}
        self._open: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes) -> None:
        if name := dict(attributes).get("data-figure"):
            self._open.append((tag, name))
            self.said[name] = ""

    def handle_data(self, data) -> None:
        for _, name in self._open:
            self.said[name] += data

    def handle_endtag(self, tag) -> None:
        if self._open and self._open[-1][0] == tag:
            self._open.pop()


@pytest.fixture
def ledger(tmp_path) -> Iterator[Ledger]:
    with Ledger.open(f"sqlite:///{tmp_path}/history.sqlite") as opened:
        yield opened


def report_of(place: Place, **options) -> str:
    with place.ledger() as ledger:
        cohort = ledger.cohorts.get("1")
        return write_page(ledger, cohort, place.site.reports, **options).read_text()


@pytest.fixture(scope="module")
def pulled(tmp_path_factory) -> Iterator[Place]:
    """Four studies and a row that finds none; the study of a known person lacks an instance."""
    name, patient, accession, date, description = SECRETS
    of_dorian = {"PatientName": name, "PatientID": patient, "AccessionNumber": accession}
    torn = study(1, StudyDate=date, StudyDescription=description, **of_dorian)
    lacks = Behaviour("move.drop_instances", instances=1, study=torn[0].study_instance_uid)
    objects = [*torn, *study(2), *study(3), *study(4)]
    folder = tmp_path_factory.mktemp("site")
    with site_around(folder, objects, script=[lacks], retrieve="c-get") as place:
        uids = [*place.pacs.holdings.study_instance_uids(), "1.2.3.4.5"]
        place.pull(place.cohort([{"StudyInstanceUID": uid} for uid in uids]))
        yield place


def agrees_with_the_ledger(said: dict[str, str], place: Place) -> None:
    totals = place.totals()
    assert said["studies"] == f"{totals.studies.total():,}"
    assert said["studies-archived"] == f"{totals.studies[StudyState.ARCHIVED]:,}"
    assert said["studies-failed"] == f"{totals.studies[StudyState.FAILED]:,}"
    assert said["instances"] == f"{totals.stored:,}"
    assert said["bytes"].replace("\N{NO-BREAK SPACE}", " ") == format_bytes(totals.size_bytes)
    well = totals.rows[Verdict.ARCHIVED] + totals.rows[Verdict.PENDING]
    assert said["rows-unwell"] == f"{totals.rows.total() - well:,}"


def test_its_figures_are_those_of_the_ledger(pulled):
    html = report_of(pulled)
    said = Figures(html).said
    agrees_with_the_ledger(said, pulled)
    assert (said["studies-archived"], said["studies-failed"], said["rows-unwell"]) == (
        "3",
        "1",
        "2",
    )
    assert (said["percent"], said["state"]) == ("100", "ended, 2 rows not archived")
    row_groups = re.findall(r'data-verdict="(.*?)" data-reason="(.*?)" data-rows="(\d+)"', html)
    listed = sorted((v, r) for v, r, rows in row_groups for _ in range(int(rows)))
    assert listed == sorted((v.verdict, v.reason) for v in pulled.verdicts())


def test_what_failed_stands_there_with_what_to_do(pulled):
    html = report_of(pulled)
    next_steps = html[html.index("What next") : html.index("Rows by verdict")]
    assert "1 row <code>no-match</code>: Check the identifiers at their source" in next_steps
    assert "1 row <code>instances-missing</code>: <code>prefect-dicom rerun</code>" in next_steps
    [failed] = [s.reference for s in pulled.studies().values() if s.state is StudyState.FAILED]
    assert f'data-study="{failed}"' in html[html.index('id="failed"') :]
    # The row that finds nothing, by its line in the file.
    assert "<span>6</span></td>\n</tr>" in html


def test_it_holds_nothing_of_patients_until_it_is_asked_to(pulled):
    html = report_of(pulled)
    for secret in (*SECRETS, *pulled.pacs.holdings.study_instance_uids()):
        assert secret not in html
    html = report_of(pulled, with_identifiers=True)
    for reported in (*SECRETS[1:], "1.2.3.4.5", "This page holds patient data"):
        assert reported in html
    [folder] = pulled.site.reports.iterdir()
    assert stat.S_IMODE((folder / REPORT_WITH_IDENTIFIERS).stat().st_mode) == 0o600
    assert SECRETS[1] not in (folder / REPORT).read_text()


def test_no_text_of_a_peer_becomes_a_part_of_the_page(ledger):
    cohort = written(
        ledger, 60, begin=datetime.now(UTC), work=timedelta(hours=1), description=HOSTILE
    )
    summary = summarize(ledger, cohort)
    summary.notes.append(("main", HOSTILE))
    for study_ in summary.failed + summary.slowest:
        assert study_.study.study_description == HOSTILE
    html = page(summary, with_identifiers=True)
    assert "&lt;script&gt;" in html
    for part in ("<script", "<img", "<iframe", " onload"):
        assert part not in html
    assert "default-src 'none'" in html


def test_a_modality_that_is_none_is_a_label_like_another(ledger):
    cohort = written(ledger, 30, begin=datetime.now(UTC), work=timedelta(hours=1))
    summary = summarize(ledger, cohort)
    largest = max(summary.groups, key=lambda group: group.size_bytes)
    hostile = replace(largest, modalities=("$\\frac</text><b>\ud800\x01",))
    summary.groups[summary.groups.index(largest)] = hostile
    html = page(summary)
    assert "$\\FRAC&lt;/TEXT&gt;&lt;B&gt;??" in html
    assert "</TEXT>" not in html


def test_it_needs_nothing_but_itself(ledger):
    cohort = written(ledger, 200, begin=datetime.now(UTC), work=timedelta(hours=9))
    html = page(summarize(ledger, cohort, schedule=NIGHTS))
    assert html.count("<svg") == 6
    for part in ("http:", "https:", "//", "@import", "src=", "url(&", "<link"):
        assert part not in html.replace("/* ", ""), part
    # Names within the page are the page's own, each once.
    names = re.findall(r'\bid="([^"]*)"', html)
    assert len(names) == len(set(names))
    for name in re.findall(r'(?:href="#|url\(#)([^")]*)', html):
        assert name in names


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_both_databases_tell_the_same(database, tmp_path):
    with Ledger.open(ledger_url(database, tmp_path)) as ledger:
        cohort = written(ledger, 400, begin=datetime.now(UTC), work=timedelta(hours=2))
        summary = summarize(ledger, cohort)
        totals = summary.totals
        assert totals == ledger.progress.totals(cohort.number)
        assert sum(kind.size_bytes for kind in summary.modalities) == totals.size_bytes
        assert sum(kind.studies for kind in summary.modalities) == totals.studies.total()
        assert summary.failures.total() == totals.studies[StudyState.FAILED]
        assert {s.reason for s in summary.failed} == set(summary.failures)
        all_of_them = list(ledger.studies.of_cohort(cohort.number))
        took = sorted(s.archived_at - s.claimed_at for s in all_of_them if s.archived_at)
        slowest = [s.archived_at - s.claimed_at for s in summary.slowest]
        assert slowest == took[: -len(slowest) - 1 : -1]
        latest = max(s.failed_at for s in all_of_them if s.reason == "instances-missing")
        named = [s.failed_at for s in summary.failed if s.reason == "instances-missing"]
        assert (named[0], len(named)) == (latest, 8)


def test_it_tells_when_the_end_will_be_by_the_pace_and_the_windows(ledger):
    # Half of it took three hours of work, of nights: the rest takes three hours of a night.
    begin = datetime(2026, 3, 2, 18, 0, tzinfo=UTC)
    cohort = written(
        ledger, 600, begin=begin, work=timedelta(hours=3), done=0.5, schedule=NIGHTS, seed=3
    )
    noon = datetime(2026, 3, 3, 11, 0, tzinfo=UTC)
    summary = summarize(ledger, cohort, schedule=NIGHTS, at=noon)
    assert summary.seconds_left == pytest.approx(3 * 3600, rel=0.1)
    opens = datetime(2026, 3, 3, 18, 0, tzinfo=UTC)
    assert summary.ends_at == opens + timedelta(seconds=summary.seconds_left)
    opened, used = summary.window_use
    assert opened == pytest.approx(12 * 3600, rel=0.01)
    assert used == pytest.approx(3 * 3600, rel=0.1)
    # Without windows it is just that much later.
    summary = summarize(ledger, cohort, at=noon)
    assert summary.ends_at == noon + timedelta(seconds=summary.seconds_left)


@pytest.mark.needs("time")
def test_what_kept_the_last_run_from_its_end_comes_first_until_another_did_better(ledger):
    cohort = written(ledger, 50, begin=datetime.now(UTC), work=timedelta(hours=1), done=0.5)
    with ledger.runs.begin("pull", cohort.number) as run:
        ledger.runs.record_reason(run, "called-ae-title-unknown")
        assert "PACS does not accept the called" not in page(summarize(ledger, cohort))
        # As the run itself tells, at its end.
        html = page(summarize(ledger, cohort, without_run=run.number))
    steps = html[html.index("What next") :]
    advice = (
        "The PACS does not accept the called AE title as its own. Correct <code>called_ae_title"
    )
    assert steps.index("The last run was kept from its end: " + advice) < steps.index("<li>", 40)
    assert advice in page(summarize(ledger, cohort))
    with ledger.runs.begin("rerun", cohort.number):
        pass
    assert "kept from its end" not in page(summarize(ledger, cohort))


@pytest.mark.needs("time")
def test_time_in_which_no_run_was_there_is_no_time_of_work(ledger):
    begin = datetime(2026, 3, 2, 18, 0, tzinfo=UTC)
    cohort = written(
        ledger, 900, begin=begin, work=timedelta(hours=20), done=0.9, schedule=NIGHTS, seed=4
    )
    summary = summarize(ledger, cohort, at=begin + timedelta(days=2))
    spent = summary.samples[-1].at - summary.samples[0].at
    assert spent > timedelta(hours=30)
    assert summary.rates().seconds == pytest.approx(20 * 3600, rel=0.05)
    bytes_per_second = summary.totals.size_bytes / summary.rates().seconds
    assert summary.rates().bytes_per_second == pytest.approx(bytes_per_second, rel=0.05)


@pytest.mark.campaign("operations")
@pytest.mark.parametrize("rows", subset([2_000, 100_000], of=[2_000]))
@pytest.mark.needs("time")
def test_a_large_cohort_has_a_page_no_larger_than_another(ledger, rows):
    begin = datetime.now(UTC) - timedelta(days=40)
    cohort = written(ledger, rows, begin=begin, work=timedelta(hours=150), schedule=NIGHTS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    html = page(summarize(ledger, cohort, schedule=NIGHTS))
    seconds = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{rows:,} rows: {seconds:.1f} s of computing, {len(html):,} bytes, {grown:.0f} MB more")
    assert len(html) < 300_000
    assert grown < 100
    # What is cut says so.
    assert " more</span>" in html
    assert "the latest of each reason" in html


def test_while_a_run_is_at_work_another_process_writes_it_once_a_minute(pulled):
    minutes = iter([0.0, 1.0, EVERY_SECONDS + 1, EVERY_SECONDS + 2])
    with pulled.ledger() as ledger, ledger.runs.begin("pull", 1) as run:
        page_file = pulled.site.reports / ledger.cohorts.get("1").name / REPORT
        running = BackgroundPage(
            pulled.site, ledger.cohorts.get("1"), run.number, lambda: next(minutes)
        )
        assert not running.refresh()
        page_file.unlink(missing_ok=True)
        assert running.refresh() and not running.refresh()
        until(page_file.exists, "the page is written", 120)
        agrees_with_the_ledger(Figures(page_file.read_text()).said, pulled)
        assert Figures(page_file.read_text()).said["state"] == "at work"
        assert 'http-equiv="refresh"' in page_file.read_text()
        running.close()
        until(
            lambda: Figures(page_file.read_text()).said["state"].startswith("ended"),
            "the page says that no run is at work",
            120,
        )


def test_a_command_writes_it_and_says_where_it_is(pulled, tmp_path):
    command = CommandLine(pulled.folder, tmp_path / "home")
    ended = command("report", "1")
    assert ended.code == 0, ended.stderr
    [folder] = pulled.site.reports.iterdir()
    assert ended.output.strip() == str(folder / REPORT)
    agrees_with_the_ledger(Figures((folder / REPORT).read_text()).said, pulled)
    assert "prefect" not in ended.modules
    named = command("report", "1", "--with-identifiers", "--json").result["report"]
    assert named == str(folder / REPORT_WITH_IDENTIFIERS)


# --- in a real browser

SHAPES = {
    "desktop": {"width": 1280, "height": 800},
    "dark": {"width": 1280, "height": 800, "dark": True},
    "phone": {"width": 390, "height": 844},
    "print": {"width": 720, "height": 1018, "media": "print"},
}
QUESTIONS = ("how-far", "how-fast", "what-failed", "what-next")


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("Chromium is not installed")
    with chromium(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def figures_in(shown: Browser) -> dict[str, str]:
    """What :class:`Figures` finds in the file, as the browser shows it."""
    names = "[...document.querySelectorAll('[data-figure]')].map(e => e.dataset.figure)"
    return dict(zip(shown.value(names), shown.texts("[data-figure]"), strict=True))


def test_a_browser_shows_the_ledgers_figures_and_fetches_nothing(pulled, shown, tmp_path):
    report_of(pulled)
    [folder] = pulled.site.reports.iterdir()
    shown.open(folder / REPORT, **SHAPES["desktop"])
    agrees_with_the_ledger(figures_in(shown), pulled)
    assert shown.requests == [(folder / REPORT).as_uri()]
    assert shown.log_entries == []


@pytest.mark.campaign("operations")
def test_the_first_screen_answers_on_every_screen_and_on_paper(ledger, shown, tmp_path):
    """Five hundred rows, failures of seven kinds, and texts that want to be more than texts."""
    begin = datetime.now(UTC) - timedelta(days=2)
    cohort = written(
        ledger,
        500,
        begin=begin,
        work=timedelta(hours=14),
        done=0.7,
        schedule=NIGHTS,
        description=HOSTILE,
    )
    path = write_page(ledger, cohort, tmp_path, schedule=NIGHTS, with_identifiers=True)
    for name, shape in SHAPES.items():
        shown.open(path, **shape)
        assert shown.requests == [path.as_uri()], name
        assert shown.log_entries == [], name
        assert shown.value("document.title").startswith("chest-1"), name
        width = shown.value("document.documentElement.scrollWidth")
        assert width <= shape["width"], f"{name}: {width} pixels wide"
        for question in QUESTIONS:
            top = shown.value(f"document.getElementById('{question}').getBoundingClientRect().top")
            assert 0 < top < shape["height"] - 60, f"{name}: {question} at {top}"
        pictures = (
            "[...document.querySelectorAll('svg')].filter(e => e.getBoundingClientRect().width)"
        )
        assert shown.value(f"{pictures}.length") == 3, name
        assert len(shown.screenshot(tmp_path / f"{name}.png")) > 20_000
    ground = "getComputedStyle(document.body).backgroundColor"
    shown.open(path, **SHAPES["dark"])
    dark = shown.value(ground)
    shown.open(path, **SHAPES["desktop"])
    assert shown.value(ground) != dark
    assert shown.printed().startswith(b"%PDF")


@pytest.mark.timeout(900)
@pytest.mark.campaign("operations")
def test_a_cohort_that_was_really_pulled_is_reported_as_it_went(around, scale, shown):
    """As many studies as the scale says, some of which fail in three ways."""
    studies = scale(20, 500)
    objects = list(tiny_instances(studies, instances=2, seed=11))
    uids = list(dict.fromkeys(o.study_instance_uid for o in objects))
    script = [
        *(Behaviour("move.drop_instances", instances=1, study=uid) for uid in uids[::10]),
        *(Behaviour("find.availability", value="OFFLINE", study=uid) for uid in uids[1::20]),
        *(Behaviour("store.other_patient", study=uid) for uid in uids[2::20]),
    ]
    with around(objects, script=script, retrieve="c-get") as place:
        rows = [{"StudyInstanceUID": uid} for uid in (*uids, "1.2.3.4")]
        place.pull(place.cohort(rows))
        report_of(place)
        [folder] = place.site.reports.iterdir()
        shown.open(folder / REPORT, **SHAPES["phone"])
        agrees_with_the_ledger(figures_in(shown), place)
        reported = shown.value(
            "[...document.querySelectorAll('#row_groups tr[data-rows]')]"
            ".map(e => [e.dataset.verdict, e.dataset.reason, +e.dataset.rows])"
        )
        counts = Counter((v.verdict, v.reason) for v in place.verdicts())
        assert {(verdict, reason): rows for verdict, reason, rows in reported} == counts
        assert len(counts) >= 4
