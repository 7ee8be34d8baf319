"""`kill -9` of each rank at random moments, again and again: the run ends as if nothing had been.

Each kill must end the other ranks with an error that names the lost one; the next start goes on
from the newest valid checkpoint.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from infini_ds.data.store import Store
from tests import tiny
from tests.distributed.conftest import assert_equal_states
from tests.distributed.processes import Process, Processes
from tests.faults.runs import START, FaultyRun, end_of_others

pytestmark = pytest.mark.timeout(3600)

SETTINGS = {
    "train__steps": 80, "train__save_every": 4, "train__keep_last": 3, "evaluation__every": 5,
    "evaluation__max_segments": 16,
}  # fmt: skip
WORLD = 2
MOMENTS = ["in training"] * 6 + ["in a save"] * 5 + ["in an evaluation"] * 4


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    """Finished runs by their ZeRO stage, of which 1 has a pipeline."""
    runs: dict[int, FaultyRun] = {}

    def of(zero: int) -> FaultyRun:
        if zero not in runs:
            settings = {**SETTINGS, "parallel__zero_stage": zero}
            runs[zero] = FaultyRun(tmp_path_factory.mktemp("undisturbed"), data, **settings)
            runs[zero].finish(WORLD)
        return runs[zero]

    return of


def resumed_at(step: int) -> str:
    """What a run says that goes on from a step."""
    return f" at step {step}\n" if step else "starting at step 0\n"


def wait_for_moment(run: FaultyRun, ranks: Processes, moment: str, begin: int, draw) -> None:
    """Waits until the run is at a moment at which a rank is to be killed.

    Args:
        begin: the step it started from.
    """
    # Until then metrics.jsonl is that of the run before.
    ranks.wait_until(lambda: resumed_at(begin) in ranks.all[0].output, START, "the start")
    every = {"in a save": SETTINGS["train__save_every"], "in an evaluation": 5}.get(moment)
    step = begin - begin % every + every if every else begin + draw.randint(1, 6)
    ranks.wait_until(lambda: run.step >= step, START, f"step {step}")
    time.sleep(draw.random() * 0.05)


@pytest.mark.parametrize("zero", [1, 3], ids=["pipeline2", "zero3"])
def test_killed_ranks_cost_no_more_than_steps_since_the_last_save(
    tmp_path, data, undisturbed, trial, zero
):
    draw = random.Random(0)
    moments = [(moment, number % WORLD) for number, moment in enumerate(MOMENTS)]
    draw.shuffle(moments)
    expected = undisturbed(zero)
    run = FaultyRun(tmp_path, data, **SETTINGS, parallel__zero_stage=zero)
    for moment, rank in moments:
        with trial(f"`kill -9` of a rank {moment}"):
            begin = max((int(p.parent.name[5:]) for p in run.output.glob(
                "checkpoints/*/manifest.json")), default=0)  # fmt: skip
            with run.start(WORLD) as ranks:
                wait_for_moment(run, ranks, moment, begin, draw)
                ranks.all[rank].send(signal.SIGKILL)
                end_of_others(ranks, rank)
    run.finish(WORLD)
    assert run.losses == expected.losses
    last = SETTINGS["train__steps"]
    assert run.checksums(last) == expected.checksums(last)


def test_kills_while_checkpoints_are_written_in_the_background_cost_nothing_that_was_safe(
    tmp_path, data, undisturbed, trial
):
    draw = random.Random(1)
    run = FaultyRun(tmp_path, data, train__async_save=True, **SETTINGS)
    for number in range(20):
        with trial("`kill -9` of a rank while a checkpoint is written in the background"):
            safe = {path.parent for path in run.output.glob("checkpoints/*/manifest.json")}
            begin = max((int(path.name[5:]) for path in safe), default=0)
            with run.start(WORLD) as ranks:
                wait_for_moment(run, ranks, "in a save", begin, draw)
                ranks.all[number % WORLD].send(signal.SIGKILL)
                end_of_others(ranks, number % WORLD)
            after = [path.parent for path in run.output.glob("checkpoints/*/manifest.json")]
            assert max(after, default=None) >= max(safe) if safe else True
    run.finish(WORLD)
    assert run.losses == undisturbed(1).losses
    assert_equal_states(run, undisturbed(1), SETTINGS["train__steps"])


def test_every_rank_of_a_grid_names_the_one_that_was_killed(tmp_path, data, trial):
    """Two pipelines of two stages: most ranks have no traffic with the lost one."""
    run = FaultyRun(tmp_path, data, parallel__pipeline_stages=2, train__steps=100000)
    with trial("`kill -9` of one rank of four"), run.start(4) as ranks:
        ranks.wait_until(lambda: run.step >= 3, START, "steps")
        ranks.all[3].send(signal.SIGKILL)
        end_of_others(ranks, 3)
        assert sorted(failure["rank"] for failure in run.recorded) == [0, 1, 2]


@pytest.fixture
def corpus(tmp_path):
    """A config whose store takes some seconds to make."""
    text = tmp_path / "corpus.txt"
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(1000)]
    with text.open("w") as file:
        for _ in range(6000):
            file.write(" ".join(draw.choices(words, k=400)) + "\n\n\n")

    def config(store: str):
        path = tiny.write_run(
            tmp_path / f"{store}.yaml",
            output_dir=str(tmp_path / "unused"),
            data={
                "source": "files", "files": [str(text)], "store": str(tmp_path / store),
                "document_separator": "\n\n\n", "tokenizer": {"kind": "bytes"},
            },
        )  # fmt: skip
        command = [sys.executable, "-m", "infini_ds.cli", "prepare", str(path)]
        return command, tmp_path / store

    return config


def test_killed_prepare_leaves_no_half_store(tmp_path, corpus, trial):
    command, expected = corpus("undisturbed")
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.monotonic() - began
    draw = random.Random(2)
    command, store = corpus("store")
    for number in range(6):
        with trial("`kill -9` of `infini-ds prepare`"):
            process = Process(command, tmp_path / f"prepare{number}.log", {}, None)
            with Processes([process]) as processes:
                time.sleep(draw.uniform(0.3, 0.95) * seconds)
                process.send(signal.SIGKILL)
                processes.wait(10)
                wait_for_end_of_group(process.pid, 20)
            assert not store.exists() or Store.open(store).fingerprint
    subprocess.run(command, check=True, capture_output=True)
    assert Store.open(store).fingerprint == Store.open(expected).fingerprint
    assert not list(tmp_path.glob(".store.*")), "nothing unfinished is left"


def wait_for_end_of_group(group: int, limit: float) -> None:
    """Waits until no process of a process group is left."""
    deadline = time.monotonic() + limit
    while left := [process for process in psutil.process_iter() if is_of(process, group)]:
        assert time.monotonic() < deadline, f"left after {limit} s: {left}"
        time.sleep(0.1)


def is_of(process: psutil.Process, group: int) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        in_group = os.getpgid(process.pid) == group
        return in_group and process.status() != psutil.STATUS_ZOMBIE
    return False
