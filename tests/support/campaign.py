"""The campaign: everything we do to break the promise, as one matrix.

A test with ``@pytest.mark.campaign("section")`` shows up in the matrix that is printed at the
end of a run with ``--campaign`` (``make campaign``). Without it the same tests run on a seeded
subset: :func:`subset` marks what only the whole campaign runs, and :func:`scale` says how much of
something that has no end.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import pytest

T = TypeVar("T")

SEED = 20261121
_SECONDS = 900
"""How long a test of the whole campaign may take: it does more than a hundred times as much."""
_OUTCOMES = ("passed", "failed", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("campaign")
    group.addoption(
        "--campaign", action="store_true", help="all cases of the campaign, not a subset of them"
    )
    group.addoption("--seed", type=int, default=SEED, help="for what is drawn by lot")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "campaign(section): a case of the campaign's matrix")
    config.addinivalue_line("markers", "whole_campaign: runs with --campaign only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--campaign"):
        for item in items:
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(_SECONDS))
        return
    left_out = [item for item in items if item.get_closest_marker("whole_campaign")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("whole_campaign")]


def subset(cases: Iterable[T], of: Sequence[T] | int) -> list:
    """The cases for ``pytest.mark.parametrize``; those not among ``of`` run with --campaign only.

    Parameters
    ----------
    of : sequence or int
        The cases that always run, or how many of them, drawn by a fixed seed.
    """
    cases = list(cases)
    if isinstance(of, int):
        of = random.Random(SEED).sample(cases, min(of, len(cases)))
    return [
        case if case in of else pytest.param(case, marks=pytest.mark.whole_campaign)
        for case in cases
    ]


def only_in(section: str) -> Callable[[T], T]:
    """Mark a test of a section of the campaign that runs with --campaign only."""

    def mark(test: T) -> T:
        return pytest.mark.whole_campaign(pytest.mark.campaign(section)(test))

    return mark


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run, for ``random.Random``; printed with the matrix."""
    return request.config.getoption("--seed")


@pytest.fixture
def scale(request: pytest.FixtureRequest):
    """A function (by default, in the campaign) -> how many to do in this run.

    What it returns is counted as cases of the test's section.
    """

    def many(by_default: int, in_the_campaign: int) -> int:
        whole = request.config.getoption("--campaign")
        number = in_the_campaign if whole else by_default
        request.node.user_properties.append(("cases", number))
        return number

    return many


_results: Counter[tuple[str, str]] = Counter()


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("campaign")
    if marker is not None:
        # A property, because the tests may run in other processes than the one that counts.
        item.user_properties.append(("campaign", marker.args[0]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    properties = dict(report.user_properties)
    if "campaign" in properties and (report.when == "call" or not report.passed):
        cases = properties.get("cases", 1) if report.passed else 1
        _results[properties["campaign"], report.outcome] += cases


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not (_results and config.getoption("--campaign")):
        return
    terminalreporter.section(f"campaign, seed {config.getoption('--seed')}")
    width = max(len(section) for section, _ in _results)
    terminalreporter.line(f"{'':{width}}" + "".join(f"{name:>10}" for name in _OUTCOMES))
    for section in sorted({section for section, _ in _results}):
        numbers = "".join(f"{_results[section, name]:>10,}" for name in _OUTCOMES)
        terminalreporter.line(f"{section:{width}}{numbers}")
