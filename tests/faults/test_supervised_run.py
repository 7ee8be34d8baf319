"""`bash launch/pretrain.sh --max-restarts N CONFIG` around real runs."""

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.distributed.conftest import SCRIPT
from tests.distributed.processes import Process, Processes, free_port
from tests.faults.runs import LIMIT, START, FaultyRun, rank_of

SETTINGS = {"train__steps": 60, "train__save_every": 4}


def supervised(run: FaultyRun, restarts: int) -> Processes:
    """A job of two processes."""
    launcher = f"--num_accelerators 2 --master_port {free_port()}"
    options = ["--max-restarts", str(restarts), "--deepspeed", launcher]
    command = ["bash", str(SCRIPT), *options, str(run.config)]
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return Processes([Process(command, run.folder / "log", env, run.folder)])


def launcher_of(job: Processes) -> int:
    """The process group of the launcher."""
    (child,) = psutil.Process(job.all[0].pid).children()
    return child.pid


def test_killed_rank_is_started_again_and_a_signal_ends_the_job(tmp_path, data, trial):
    undisturbed = FaultyRun(tmp_path / "undisturbed", data, **SETTINGS)
    undisturbed.finish(2)
    run = FaultyRun(tmp_path / "run", data, **SETTINGS)
    with trial("`kill -9` of a rank, started again by the supervisor"), supervised(run, 1) as job:
        job.wait_until(lambda: run.step >= 6, START, "steps")
        os.kill(rank_of(launcher_of(job), "1"), signal.SIGKILL)
        assert job.wait(LIMIT) == [0]
        output = job.all[0].output
        assert "restart 1 of 1 in 5 s" in output
        assert "(rank 0: " in output
        assert run.losses == undisturbed.losses
        assert run.checksums(60) == undisturbed.checksums(60)


def test_asked_to_stop_the_run_saves_and_is_not_started_again(tmp_path, data, trial):
    run = FaultyRun(tmp_path, data, train__steps=100000)
    with trial("`SIGTERM` of the supervisor"), supervised(run, 3) as job:
        job.wait_until(lambda: run.step >= 3, START, "steps")
        group = launcher_of(job)
        job.all[0].send(signal.SIGTERM)
        assert job.wait(60) == [0]
        assert f"stopped as asked at step {run.step};" in job.all[0].output
        assert (run.checkpoint(run.step) / "manifest.json").exists()
        with pytest.raises(ProcessLookupError):
            os.killpg(group, 0)


def test_missing_hostfile_of_the_launcher_is_a_mistake(tmp_path, data, trial):
    """DeepSpeed itself warns, and would train on this host alone."""
    run = FaultyRun(tmp_path, data, train__steps=2)
    options = ["--hostfile", "none", "--num_accelerators", "2", "--master_port", str(free_port())]
    command = ["deepspeed", *options, str(SCRIPT), str(run.config)]
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    # Rank 0, which tells it, begins later than the launcher looks for ranks that have ended.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('RANK') == '0': time.sleep(3)\n"
    )
    env["PYTHONPATH"] = str(tmp_path)
    with Processes([Process(command, tmp_path / "log", env, tmp_path)]) as job:
        assert job.wait(START) == [2], job.outputs()
        assert "infini-ds: hostfile none: cannot be read" in job.all[0].output
    assert not run.output.exists()
