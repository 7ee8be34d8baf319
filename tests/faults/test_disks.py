"""Disks that are full or that may not be written: the run says so and keeps what it had."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.distributed.conftest import assert_equal_states
from tests.faults.runs import END, START, FaultyRun

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")

SETTINGS = {"train__steps": 12, "train__save_every": 4}
WORLD = 2


@contextlib.contextmanager
def disk(place: Path, options: str):
    """A small file system in memory."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def resize(place: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


@pytest.mark.parametrize("zero", [1, 3], ids=["pipeline2", "zero3"])
@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_full_disk_in_a_save_leaves_the_older_checkpoint(tmp_path, data, trial, background, zero):
    settings = {**SETTINGS, "parallel__zero_stage": zero}
    undisturbed = FaultyRun(tmp_path / "undisturbed", data, **settings)
    undisturbed.finish(WORLD)
    sizes = [path.stat().st_size for path in undisturbed.checkpoint(12).rglob("*")]
    place = tmp_path / "disk"
    settings |= {"train__async_save": background}
    run = FaultyRun(tmp_path / "run", data, output_dir=str(place / "output"), **settings)
    saved, broken = run.checkpoint(4), run.checkpoint(8)
    with trial("full disk in a save"), disk(place, "size=64m"):
        with run.start(WORLD) as ranks:
            ranks.wait_until((saved / "manifest.json").exists, START, "the first save")
            # Room for metrics and for a part of the next checkpoint.
            resize(place, shutil.disk_usage(place).used + sum(sizes) // 2)
            assert ranks.wait(END) == [1, 1], ranks.outputs()
            output = ranks.outputs()
        assert f"checkpoint {broken} could not be written" in output
        assert "the older ones are kept" in output
        assert (saved / "manifest.json").exists()
        resize(place, 64 << 20)
        output = run.finish(WORLD)
        assert f"checkpoint {broken}: passed over, it was not finished" in output
        assert f"resumed from {saved}" in output
        assert run.losses == undisturbed.losses
        assert_equal_states(run, undisturbed, 12)


def test_output_dir_that_may_not_be_written_is_told_in_one_line(tmp_path, data, trial):
    place = tmp_path / "disk"
    run = FaultyRun(tmp_path / "run", data, output_dir=str(place / "output"), **SETTINGS)
    with trial("output_dir that may not be written"), disk(place, "ro"):
        with run.start(WORLD) as ranks:
            assert ranks.wait(START) == [2, 2], ranks.outputs()
        output = "".join(process.output for process in ranks.all)
        assert "Traceback" not in output
        (line,) = (line for line in output.splitlines() if "Read-only file" in line)
        assert line.startswith(f"infini-ds: output_dir {place}/output: cannot be written")
