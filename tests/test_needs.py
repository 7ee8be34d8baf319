"""Markers of what tests need: the tables name what is there, and no file of ranks is forgotten."""

import re
from pathlib import Path

import pytest

from tests.needs import FIXTURES, NEEDS, needs_of

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))
STARTS = (
    r"\b(run_ranks|start_ranks|ForkedProcess|FaultyRun|conftest import.*\bRun|outcome_of_ranks)\b"
)
"""How a file names what starts the processes of a run."""


@pytest.mark.parametrize("prefix", NEEDS)
def test_what_the_table_names_is_there(prefix):
    path, _, test = prefix.partition("::")
    assert (ROOT / path).exists()
    assert not test or f"\ndef {test}" in (ROOT / path).read_text()


@pytest.mark.parametrize("name", FIXTURES)
def test_fixtures_that_the_table_names_are_there(name):
    texts = [path.read_text() for path in (ROOT / "tests").rglob("conftest.py")]
    assert any(f"\ndef {name}(" in text for text in texts)


def test_files_that_start_ranks_are_marked():
    starting = [path for path in FILES if re.search(STARTS, (ROOT / path).read_text())]
    starting.remove("tests/test_needs.py")
    assert len(starting) > 5
    for path in starting:
        tests = [prefix for prefix in NEEDS if prefix.startswith(path)]
        assert {"ranks", "hosts"} & set().union(*(needs_of(name, []) for name in [path, *tests])), (
            path
        )


def test_markers_are_those_of_the_folder_and_of_the_file(request):
    assert needs_of("tests/faults/test_kills.py::test_a", []) == {"ranks", "slow"}
    assert needs_of("tests/evaluation/test_load_run.py::test_a", ["saved"]) == {"long"}
    assert needs_of(request.node.nodeid, []) == set()


def test_pytest_has_set_them(request):
    """Whatever tests are chosen, each has the markers that the tables give it."""
    for item in request.session.items:
        own = {marker.name for marker in item.iter_markers()}
        assert needs_of(item.nodeid, item.fixturenames) <= own
