import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from infini_ds.data import progress
from infini_ds.errors import RunError
from infini_ds.system import progress as system_progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; the test moves its `now` on."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(system_progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize(("total", "left"), [(1000, True), (0, False)], ids=["known", "stream"])
def test_corpus_progress_prints_a_line_now_and_then_without_a_terminal(clock, total, left):
    output = io.StringIO()
    with progress.CorpusProgress(Console(file=output), "tokenising", total) as shown:
        for step in range(1, 11):
            clock.now += 4
            shown.update(step * 100, step, step * 1_000_000)
    lines = output.getvalue().splitlines()
    assert len(lines) == 3  # at 12, 24 and 36 s of 40 s
    assert lines[0].startswith("tokenising: 3 documents, 3.0 MB, 0.2 MB/s")
    assert lines[0].endswith("28 s left") == left


def test_work_goes_on_when_its_progress_cannot_be_printed(clock, monkeypatch):
    def full(*_, **__):
        raise RunError("standard output: cannot be written (No space left on device)")

    monkeypatch.setattr(Console, "print", full)
    with progress.CorpusProgress(Console(), "tokenising", 1000) as shown:
        clock.now += 12
        shown.update(100, 1, 1_000_000)


def test_corpus_progress_shows_a_bar_on_a_terminal():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with progress.CorpusProgress(console, "tokenising", 1000) as shown:
        shown.update(500, 7, 5_000_000)
    assert "7 documents, 5.0 MB" in output.getvalue()
    assert "━" in output.getvalue()
