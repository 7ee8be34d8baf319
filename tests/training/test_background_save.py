"""Checkpoints that a thread writes: valid only when whole, one at a time, and never waited for
without a limit."""

import json
import threading
import time
from pathlib import Path

import pytest

from infini_ds.errors import RunError
from infini_ds.parallel.engine import EngineLayout
from infini_ds.runs.directory import Depth, RunDirectory
from infini_ds.training import background_save, checkpoint
from infini_ds.training.background_save import BackgroundSave
from tests import tiny


class FakeEngine:
    """Writes one file for each checkpoint, once it may."""

    layout = EngineLayout(1, 1, 1, "all")

    def __init__(self):
        self.may_write = threading.Event()
        self.may_write.set()
        self.error: Exception | None = None

    def keep(self, directory: Path, step: int):
        def write() -> list[str]:
            assert self.may_write.wait(20)
            if self.error:
                raise self.error
            path = directory / "weights"
            path.write_text(f"of step {step}")
            return [str(path)]

        return write


@pytest.fixture
def saving(tmp_path, monkeypatch):
    """One rank of one: the engine, what saves, and what was saved."""
    for name, value in {
        "is_first_rank": lambda: True, "own_rank": lambda: 0, "world_size": lambda: 1,
        "gathered": lambda value: [value],
    }.items():  # fmt: skip
        monkeypatch.setattr(background_save, name, value)
    monkeypatch.setattr(checkpoint, "is_first_rank", lambda: True)
    monkeypatch.setattr(checkpoint.dist, "barrier", lambda: None)
    config = tiny.run_config(output_dir=str(tmp_path), train__keep_last=2, train__timeout=0.5)
    engine, saved = FakeEngine(), []
    return engine, BackgroundSave(engine, config, saved.append), saved  # type: ignore[arg-type]


def valid(folder: Path) -> list[int]:
    directory = RunDirectory(folder)
    found = directory.checkpoints()
    return [each.step for each in found if not each.problem(Depth.CHECKSUMS)]


def test_a_checkpoint_is_valid_once_it_is_written(saving, tmp_path):
    engine, background, saved = saving
    engine.may_write.clear()
    directory = background.start({"step": 3})
    time.sleep(0.1)
    assert (valid(tmp_path), saved) == ([], [])
    engine.may_write.set()
    background.finish()
    assert (valid(tmp_path), saved) == ([3], [directory])
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    assert names == ["config.yaml", "manifest.json", "state.json", "weights"]
    assert json.loads((directory / "state.json").read_text())["step"] == 3
    background.finish()  # there is nothing to wait for


def test_the_next_one_waits_for_it_and_the_oldest_goes(saving, tmp_path):
    engine, background, _ = saving
    for step in (1, 2, 3):
        background.start({"step": step})
    engine.may_write.clear()
    threading.Timer(0.2, engine.may_write.set).start()
    begin = time.monotonic()
    background.start({"step": 4})
    background.finish()
    assert time.monotonic() - begin > 0.15
    assert valid(tmp_path) == [4, 3]


def test_one_that_fails_is_told_at_the_next_and_the_older_stay(saving, tmp_path):
    engine, background, saved = saving
    background.start({"step": 1})
    background.finish()
    engine.error = OSError(28, "No space left on device")
    broken = background.start({"step": 2})
    with pytest.raises(RunError) as error:
        background.start({"step": 3})
    assert str(error.value) == (
        f"checkpoint {broken} could not be written (No space left on device; make room there, or "
        "name another place); the older ones are kept"
    )
    assert (valid(tmp_path), len(saved)) == ([1], 1)


def test_one_that_takes_too_long_is_told(saving, tmp_path):
    engine, background, _ = saving
    engine.may_write.clear()
    background.start({"step": 1})
    with pytest.raises(RunError, match=r"was not done within train\.timeout \(0\.5 s\)"):
        background.finish()
    engine.may_write.set()


def test_a_rank_whose_part_does_not_come_is_named(saving, tmp_path, monkeypatch):
    _, background, _ = saving
    monkeypatch.setattr(background_save, "world_size", lambda: 2)
    monkeypatch.setattr(background_save, "gathered", lambda value: [value, (False, "")])
    background.start({"step": 1})
    time.sleep(0.7)
    with pytest.raises(RunError, match=r"rank 1 did not finish its part within train\.timeout"):
        background.finish()
    assert valid(tmp_path) == []


def test_remains_of_a_save_that_was_cut_off_are_not_taken_over(saving, tmp_path):
    _, background, _ = saving
    directory = RunDirectory(tmp_path).checkpoint(1).path
    directory.mkdir(parents=True)
    (directory / "part_00000.json").write_text("{}")
    (directory / "old").write_text("of another layout")
    background.start({"step": 1})
    background.finish()
    assert valid(tmp_path) == [1]
    assert not (directory / "old").exists()
