"""Ranks that do not die but stop: the others find out, say what they waited for, and end."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.distributed.processes import Process, Processes, free_port
from tests.faults.runs import END, START, FaultyRun, end_of_others, rank_of

WORKER = Path(__file__).with_name("hang_worker.py")
HANG = 6.0


def worker(mode: str, folder: Path) -> Processes:
    """One rank under a watchdog whose limit is a second."""
    config = tiny.write_run(
        folder / "run.yaml", output_dir=str(folder), train__hang_timeout=1.0, train__timeout=4.0
    )
    command = [sys.executable, str(WORKER), mode, str(config)]
    return Processes([Process(command, folder / "log", {}, None)])


@pytest.mark.parametrize("mode", ["sleeps", "sleeps_patiently", "keeps_the_lock"])
def test_process_that_hangs_writes_its_stacks_and_ends(tmp_path, mode):
    with worker(mode, tmp_path) as processes:
        assert processes.wait(START) == [1]
        output = processes.all[0].output
    if mode == "keeps_the_lock":  # no line of Python can run: the stacks go to the output
        assert "Timeout (0:00:02)!" in output
        assert "in hang" in output
        return
    line = next(line for line in output.splitlines() if line.startswith("infini-ds rank 0"))
    stacks = tmp_path / "stacks" / "rank_0.txt"
    limit = "train.timeout = 4 s" if mode == "sleeps_patiently" else "train.hang_timeout = 1 s"
    assert f"got nothing done for {limit} at step 3, after the test's work" in line
    assert line.endswith(f"stacks are in {stacks}")
    assert "in hang" in stacks.read_text()
    assert "got nothing done" in (tmp_path / "failures.jsonl").read_text()


def test_limit_counts_from_the_first_step_and_from_each_progress(tmp_path):
    with worker("works", tmp_path) as processes:
        assert processes.wait(START) == [0], processes.outputs()
    assert not (tmp_path / "stacks").exists()


SETTINGS = {"train__steps": 100000, "train__hang_timeout": HANG, "train__timeout": 120.0}


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3], ids=["pipeline2", "zero3"])
@pytest.mark.parametrize("rank", [0, 1])
def test_frozen_rank_is_named_by_the_other(tmp_path, data, trial, rank, zero):
    run = FaultyRun(tmp_path, data, **SETTINGS, parallel__zero_stage=zero)
    with trial("`SIGSTOP` of a rank"), run.start(2) as ranks:
        ranks.wait_until(lambda: run.step >= 3, START, "steps")
        ranks.all[rank].send(signal.SIGSTOP)
        seconds = end_of_others(ranks, rank, HANG + 40)
        print(f"the other rank ended after {seconds:.1f} s, train.hang_timeout = {HANG:g} s")
        stacks = (run.output / "stacks" / f"rank_{1 - rank}.txt").read_text()
        assert "in train_step" in stacks
        (failure,) = run.recorded
        assert failure["rank"] == 1 - rank
        assert "got nothing done" in failure["message"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_rank_that_shares_windows_is_named_by_the_other(tmp_path, data, trial, rank, number):
    """At once if it is dead; a frozen one within train.hang_timeout. Nothing is lost."""
    settings = {**SETTINGS, "train__save_every": 2, "parallel": {"context_parallel": 2}}
    run = FaultyRun(tmp_path, data, **settings)
    what = "`SIGSTOP`" if number == signal.SIGSTOP else "`kill -9`"
    with trial(f"{what} of a rank that shares windows"):
        with run.start(2) as ranks:
            ranks.wait_until(lambda: run.step >= 3, START, "steps")
            ranks.all[rank].send(number)
            end_of_others(ranks, rank, (HANG if number == signal.SIGSTOP else 0) + 40)
            line = next(x for x in ranks.all[1 - rank].output.splitlines() if "infini-ds rank" in x)
            print(line)
        assert "Traceback" not in ranks.all[1 - rank].output
        saved = max(int(p.parent.name[5:]) for p in run.output.glob("checkpoints/*/manifest.json"))
        assert f"at step {saved}\n" in run.finish(2, f"train.steps={saved + 2}")
        assert max(run.losses) == saved + 2


SHARED = {
    "train__steps": 12, "train__save_every": 4, "train__window_segments": 4,
    "train__hang_timeout": HANG, "train__timeout": 120.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    """Finished runs whose ranks share windows, by their number of stages."""
    runs: dict[int, FaultyRun] = {}

    def of(stages: int) -> FaultyRun:
        if stages not in runs:
            run = FaultyRun(tmp_path_factory.mktemp("undisturbed"), data, **SHARED)
            run.finish(2 * stages, "parallel.context_parallel=2")
            runs[stages] = run
        return runs[stages]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize(
    ("call", "rank", "stages"),
    [("all_gather", 0, 1), ("sum_of_own", 1, 1), ("all_gather", 3, 2), ("sum_of_own", 2, 2)],
)
def test_rank_lost_in_an_exchange_costs_nothing(
    tmp_path, data, trial, undisturbed, call, rank, stages, number
):
    """Forward or back, all others name it, also those of another stage; the run goes on as if
    nothing had been."""
    faults = {"exchange": [call, rank, number, 6]}
    run = FaultyRun(tmp_path, data, json.dumps(faults), **SHARED)
    context, world = "parallel.context_parallel=2", 2 * stages
    what = "`SIGSTOP`" if number == signal.SIGSTOP else "`kill -9`"
    with trial(f"{what} of a rank in an exchange of memories"):
        with run.start(world, context) as ranks:
            ranks.wait_until(lambda: run.step == 6, START, "the step before")
            seconds = end_of_others(ranks, rank, (HANG if number == signal.SIGSTOP else 0) + END)
            other = rank ^ 1  # the one that shares its windows
            line = next(x for x in ranks.all[other].output.splitlines() if "infini-ds rank" in x)
            print(f"after {seconds:.1f} s: {line}")
            assert f" for memories of rank {rank}" in line
        run.faults = "{}"
        assert "at step 4\n" in run.finish(world, context)
        assert run.losses == undisturbed(stages).losses
        assert run.checksums(12) == undisturbed(stages).checksums(12)


@pytest.mark.slow
def test_frozen_rank_does_not_keep_the_job(tmp_path, data, trial):
    """DeepSpeed's launcher gives a rank 30 seconds to end before it kills it."""
    run = FaultyRun(tmp_path, data, **SETTINGS)
    port = str(free_port())
    options = ["--log_level", "warning", "--num_accelerators", "2", "--master_port", port]
    command = ["deepspeed", *options, *run.script()]
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    job = Processes([Process(command, tmp_path / "log", env, tmp_path)])
    with trial("`SIGSTOP` of a rank, under the launcher"), job as processes:
        processes.wait_until(lambda: run.step >= 3, START, "steps")
        frozen = rank_of(processes.all[0].pid, "1")
        os.kill(frozen, signal.SIGSTOP)
        assert processes.wait(HANG + 40 + 45) == [1]
        assert "rank 1 on" in processes.all[0].output
