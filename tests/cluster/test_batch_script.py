"""When launch/pretrain.sbatch queues its job again: on a real Slurm, a stand-in for the run."""

from pathlib import Path

import pytest

from tests.cluster.conftest import LIMIT
from tests.cluster.slurm import Job
from tests.distributed.conftest import Run

STAND_IN = """#!/usr/bin/env bash
# Instead of `infini-ds`: at the first attempt to start or pretrain it does what the test says, at
# the second it is content, and finishes.
if [[ $1 == preflight ]]; then
  touch output/preflight.$SLURM_RESTART_COUNT
  [[ ${SLURM_RESTART_COUNT:-0} -gt 0 ]] || { PREFLIGHT; }
  exit 0
fi
save() {
  local saved=output/checkpoints/step_0000000$1
  mkdir -p $saved; touch $saved/manifest.json
}
wait_for_signal() { until [[ $asked ]]; do sleep 0.2; done; }
trap asked=1 USR1 TERM
touch output/started.$SLURM_RESTART_COUNT
if [[ ! ${SLURM_RESTART_COUNT:-0} -gt 0 ]]; then
  FIRST
fi
(( RANK )) || echo '{"step": 8}' > output/report.json
"""


@pytest.fixture
def start(slurm, tmp_path, data):
    """Starts the job whose tasks do something at the first attempt; it is past its start."""

    def start_job(first: str, preflight: str = "true") -> Job:
        program = tmp_path / "bin" / "infini-ds"
        program.parent.mkdir()
        program.write_text(STAND_IN.replace("FIRST", first).replace("PREFLIGHT", preflight))
        program.chmod(0o755)
        run = Run(tmp_path, data, train__steps=8)
        path = slurm.run("bash", "-c", "echo $PATH").strip()
        job = Job(slurm, run, [f"--export=ALL,PATH={program.parent}:{path}"], [])
        begun = "started." if preflight == "true" else "preflight."
        job.wait_until((run.output / begun).exists, LIMIT, begun)
        return job

    return start_job


def preempt(slurm, folder: Path) -> str:
    """Submits a job that takes all nodes from the others; its id."""
    options = ["--partition=urgent", "--nodes=2", "--exclusive", "--wrap=srun hostname"]
    return slurm.submit(*options, cwd=folder)


def assert_finished_after_one_restart(job: Job) -> None:
    state = job.finish(LIMIT)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), job.outputs
    assert job.log.count("queued again") == 1
    assert "finished at step 8" in job.log


def test_after_its_signal_it_is(slurm, start):
    job = start("wait_for_signal; save 1; exit 0")
    slurm.run("scancel", "--batch", "--signal=USR1", job.id)
    assert_finished_after_one_restart(job)


def test_after_preemption_it_is(slurm, start, tmp_path):
    job = start("wait_for_signal; save 1; exit 0")
    other = preempt(slurm, tmp_path)
    assert_finished_after_one_restart(job)
    assert slurm.job(other)["JobState"] == "COMPLETED"


def test_after_preemption_before_the_first_step_it_is(slurm, start, tmp_path):
    job = start("trap - USR1 TERM; exec sleep 1000")
    preempt(slurm, tmp_path)
    assert_finished_after_one_restart(job)


def test_after_preemption_in_its_preflight_it_is(slurm, start, tmp_path):
    job = start("exit 1", preflight="sleep 5; exit 2")
    preempt(slurm, tmp_path)
    assert_finished_after_one_restart(job)
    assert "preempted before its start" in job.log


@pytest.mark.parametrize("code", [0, 2])
def test_after_a_signal_in_its_preflight_it_is_not(slurm, start, code):
    """A time limit that is no longer than the time before it at which Slurm sends the signal."""
    job = start("exit 1", preflight=f"sleep 5; exit {code}")
    slurm.run("scancel", "--batch", "--signal=USR1", job.id)
    state = job.finish(LIMIT)
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0"), job.outputs
    assert state["ExitCode"] == "2:0"
    assert "--time must leave room" in job.log


def test_after_a_failure_beyond_a_checkpoint_it_is(start):
    assert_finished_after_one_restart(start("save 1; exit 1"))


@pytest.mark.parametrize("code", [1, 2])
def test_after_a_failure_without_one_it_is_not(start, code):
    job = start(f"exit {code}")
    state = job.finish(LIMIT)
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0"), job.outputs
    # srun ends a task that is slower to fail than the other one, and tells the highest code.
    assert state["ExitCode"] in (f"{code}:0", "143:0")


def test_after_a_failure_of_one_task_that_ends_the_others_it_is_not(start):
    job = start("trap - TERM; (( RANK )) || exit 1; exec sleep 1000")
    state = job.finish(LIMIT)
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0"), job.outputs


def test_cancelled_it_is_not(slurm, start):
    job = start("wait_for_signal; save 1; exit 0")
    slurm.run("scancel", job.id)
    state = job.finish(LIMIT)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0"), job.outputs
    assert job.run.checkpoint(1).exists()
    assert not (job.run.output / "started.1").exists()
