"""What a save deletes, once it is valid, and how long a conversion may take."""

import time
from itertools import pairwise
from pathlib import Path

import pytest

from infini_ds.runs import manifest
from infini_ds.runs.directory import RunDirectory
from infini_ds.training import checkpoint


def make(folder: Path, step: int, finished: bool = True) -> Path:
    directory = RunDirectory(folder).checkpoint(step).path
    directory.mkdir(parents=True)
    if finished:
        manifest.write(directory, {})
    return directory


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_older_ones_but_the_newest_are_deleted(tmp_path):
    names = [make(tmp_path, step).name for step in (1, 2, 3, 4)]
    checkpoint.delete_useless(tmp_path / "checkpoints" / names[3], keep_last=2)
    assert left(tmp_path) == names[2:]


def test_saves_that_were_cut_off_are_deleted(tmp_path):
    old, cut = make(tmp_path, 10), make(tmp_path, 13, finished=False)
    new = make(tmp_path, 20)
    checkpoint.delete_useless(new, keep_last=2)
    assert left(tmp_path) == [old.name, new.name]
    assert not cut.exists()


def test_later_ones_that_were_passed_over_are_deleted_and_never_this_one(tmp_path):
    make(tmp_path, 1000)
    old, new = make(tmp_path, 500), make(tmp_path, 600)
    checkpoint.delete_useless(new, keep_last=1)
    assert left(tmp_path) == [new.name]
    assert not old.exists()


def test_copies_by_other_names_are_left_alone(tmp_path):
    copy = tmp_path / "checkpoints" / "step_best"
    copy.mkdir(parents=True)
    make(tmp_path, 1)
    new = make(tmp_path, 2)
    checkpoint.delete_useless(new, keep_last=1)
    assert left(tmp_path) == [new.name, copy.name]


def test_what_cannot_be_deleted_is_left(tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr("infini_ds.training.checkpoint.shutil.rmtree", refuse)
    old, new = make(tmp_path, 1), make(tmp_path, 2)
    checkpoint.delete_useless(new, keep_last=1)
    assert left(tmp_path) == [old.name, new.name]
    assert not (old / manifest.NAME).exists(), "it no longer counts"


@pytest.mark.parametrize("failure", ["", "the disk is full"])
def test_the_other_ranks_hear_of_a_conversion_before_their_limit(tmp_path, monkeypatch, failure):
    def convert(directory):
        time.sleep(1.5)
        return failure

    heard: list[tuple[float, str | None]] = []

    def share(value):
        heard.append((time.monotonic(), value))
        return value

    monkeypatch.setattr(checkpoint, "make_universal", convert)
    monkeypatch.setattr(checkpoint, "shared", share)
    monkeypatch.setattr(checkpoint, "is_first_rank", lambda: True)
    began, timeout = time.monotonic(), 1.2
    assert checkpoint._convert(tmp_path, timeout) == failure
    assert [value for _, value in heard] == [None] * (len(heard) - 1) + [failure]
    moments = [began, *(moment for moment, _ in heard)]
    assert max(later - earlier for earlier, later in pairwise(moments)) < timeout
