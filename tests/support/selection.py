"""Which tests `make check` runs: those that need nothing but Python, and little time.

What a test needs follows from what it uses. Its function and its fixtures are searched for the
names in :data:`SOURCES`, through the helpers of ``tests`` that they use. A test without a need
gets the marker ``plain``, which ``make check`` selects; the others get the marker ``needs``. A test
may say more by itself, ``@pytest.mark.needs("time")``, or that it is ``plain`` nevertheless.

With ``--budget SECONDS`` a plain test that takes more CPU time fails.
"""

from __future__ import annotations

import os
import types
import unittest
from collections.abc import Iterator

import pytest

SOURCES = {
    "tests.support.peers.Peer": "archives",
    "tests.support.peers.Orthanc": "archives",
    "tests.support.peers.Dcmqrscp": "archives",
    "tests.support.peers.prepared": "archives",
    "tests.support.wire.tool": "DCMTK",
    "tests.support.corpus": "the corpus",
    "tests.support.corpus_oracle": "the corpus",
    "tests.support.radosgw": "radosgw",
    "tests.support.postgres": "PostgreSQL",
    "tests.support.browser": "Chromium",
    "tests.support.disks": "root",
    "tests.support.hosts": "root",
    "tests.support.prefect_server": "a Prefect server",
    "prefect.testing": "a Prefect server",
    "tests.support.commands": "processes",
    "tests.support.crashes": "processes",
    "tests.support.program": "processes",
    "tests.support.s3_server": "time",
    "tests.support.sites.site_around": "processes",
    "tests.support.sites.standing_receiver": "processes",
    "prefect_dicom.network.storage_scp.client": "processes",
    "subprocess": "processes",
    "multiprocessing": "processes",
    "/proc/": "Linux",
    "/dev/": "Linux",
    "/sys/": "Linux",
}
"""What nobody uses without a need: modules, names in modules, and begins of paths."""

SPARED = {
    "sqlite": {"PostgreSQL"},
    "directory": {"radosgw", "time"},
    "s3": {"radosgw"},
}
"""Parameters that choose one of several kinds, and what the other kinds need."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("selection")
    group.addoption("--budget", type=float, help="CPU seconds that a plain test may take")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(thing, ...): more than Python and a second")
    config.addinivalue_line("markers", "plain: needs nothing but Python; set where it is so")
    config.addinivalue_line("markers", "corpus: uses the corpus of real files; set where it is so")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    search = Search()
    for item in items:
        if isinstance(item, pytest.Function) and not item.get_closest_marker("plain"):
            if found := sorted(search.of_test(item)):
                item.add_marker(pytest.mark.needs(*found))
            if "the corpus" in found:
                item.add_marker(pytest.mark.corpus)
            if not any(item.iter_markers("needs")):
                item.add_marker(pytest.mark.plain)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    budget = item.config.getoption("--budget")
    began = _cpu_seconds()
    result = yield
    took = _cpu_seconds() - began
    if budget is not None and took > budget and item.get_closest_marker("plain"):
        pytest.fail(
            f"took {took:.1f} s of CPU time, and {budget:g} are plain: make it faster, "
            f'or mark it with needs("time")'
        )
    return result


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


class Search:
    """What tests need, by the names that their code uses."""

    def __init__(self) -> None:
        self._known: dict[object, frozenset[str]] = {}

    def of_test(self, item: pytest.Function) -> set[str]:
        """The needs of a test, of its fixtures and of the functions among its parameters."""
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        # A parameter may be the name of the fixture that a test asks for by itself.
        names = {*item.fixturenames, *filter(_is_text, parameters.values())}
        used = [item.function, *parameters.values(), *_fixtures(item, names)]
        if isinstance(item.cls, type) and issubclass(item.cls, unittest.TestCase):
            used.append(item.cls.setUp)
        needs = set().union(*map(self.of, used))
        return needs.difference(*(SPARED.get(v, ()) for v in filter(_is_text, parameters.values())))

    def of(self, used: object) -> frozenset[str]:
        """The needs of a function or class of the tests; of anything else, those of its name."""
        named = _named(used)
        if named is not None:
            return frozenset({named})
        if not isinstance(used, types.FunctionType | type) or not _is_ours(used.__module__):
            return frozenset()
        if used not in self._known:
            # Functions may call each other in a circle.
            self._known[used] = frozenset()
            self._known[used] = frozenset().union(*map(self.of, _members(used)), _words(used))
        return self._known[used]


def _fixtures(item: pytest.Function, names: set[str]) -> Iterator[object]:
    """The functions of fixtures, and of those that they use."""
    known, left = set(), set(names)
    while left:
        name = left.pop()
        known.add(name)
        for definition in item.session._fixturemanager.getfixturedefs(name, item) or ():
            yield definition.func
            left |= {*definition.argnames, *_asked_for_by_name(definition.func)} - known


def _asked_for_by_name(function: types.FunctionType) -> Iterator[str]:
    code = getattr(function, "__code__", None)
    if code is not None and "getfixturevalue" in code.co_names:
        yield from filter(_is_text, code.co_consts)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_ours(module: str | None) -> bool:
    return (module or "").startswith("tests.")


def _named(used: object) -> str | None:
    """The need of a module, or of what lies in one."""
    if isinstance(used, types.ModuleType):
        return SOURCES.get(used.__name__)
    module = getattr(used, "__module__", None)
    if not isinstance(module, str) or not isinstance(getattr(used, "__name__", None), str):
        return None
    return SOURCES.get(module) or SOURCES.get(f"{module}.{used.__name__}")


def _members(used: types.FunctionType | type) -> Iterator[object]:
    """What a function's code names, or a class has."""
    if isinstance(used, type):
        yield from used.__bases__
        for member in vars(used).values():
            yield getattr(member, "__func__", getattr(member, "fget", member))
        return
    inner = getattr(used, "__wrapped__", None)
    if inner is not None:
        yield inner
    for cell in used.__closure__ or ():
        yield cell.cell_contents
    for code in _codes(used.__code__):
        for name in code.co_names:
            value = used.__globals__.get(name)
            yield value
            if isinstance(value, types.ModuleType) and _is_ours(value.__name__):
                yield from (vars(value)[other] for other in code.co_names if other in vars(value))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _words(used: types.FunctionType | type) -> Iterator[str]:
    """The needs of modules that a function imports, and of paths that it names."""
    if isinstance(used, types.FunctionType):
        for code in _codes(used.__code__):
            for word in (*code.co_names, *code.co_consts):
                if isinstance(word, str) and ("." in word or word.startswith("/")):
                    yield from (need for name, need in SOURCES.items() if word.startswith(name))
