"""Faults are counted: how often each was tried and survived is shown at the end of the tests."""

import contextlib

import pytest

COUNTS = pytest.StashKey[dict[str, list[int]]]()


@pytest.fixture(scope="session")
def trial(pytestconfig):
    """`with trial("a fault"):` around one of them and all that must hold after it."""
    counts = pytestconfig.stash.setdefault(COUNTS, {})

    @contextlib.contextmanager
    def one(fault: str):
        count = counts.setdefault(fault, [0, 0])
        count[0] += 1
        yield
        count[1] += 1

    return one


def pytest_terminal_summary(terminalreporter, config):
    counts = config.stash.get(COUNTS, {})
    if not counts:
        return
    terminalreporter.section("faults")
    width = max(len(fault) for fault in counts)
    terminalreporter.line(f"| {'fault':{width}} | tried | survived |")
    for fault, (tried, survived) in counts.items():
        terminalreporter.line(f"| {fault:{width}} | {tried:5} | {survived:8} |")
