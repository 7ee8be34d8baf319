"""`sbatch launch/pretrain.sbatch CONFIG` on two nodes."""

import re
import signal
from pathlib import Path

import pytest

from infini_ds import layout
from tests.cluster.conftest import FP32, LAYOUTS, LIMIT
from tests.cluster.slurm import Job
from tests.distributed.conftest import Run

LIMIT_OF_PREFLIGHT = 120
"""Seconds in which a node that does not answer ends the job."""
LIMIT_OF_END = 30
"""Seconds in which Slurm clears away what a job leaves."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nodes_train_as_one_process_does(slurm, tmp_path, data, alone, layout):
    job = Job(slurm, Run(tmp_path, data, **FP32), [], [LAYOUTS[layout]])
    assert job.finish(LIMIT)["JobState"] == "COMPLETED", job.outputs
    assert job.run.losses == pytest.approx(alone.losses, rel=1e-5)
    assert "finished at step 8" in job.log


@pytest.mark.slow
def test_job_goes_on_with_another_number_of_nodes(slurm, tmp_path, data):
    first = "train.steps=4"
    expected = Run(tmp_path / "expected", data, **FP32)
    run = Run(tmp_path / "run", data, **FP32)
    expected.finish(1, first)
    assert Job(slurm, run, [], [first]).finish(LIMIT)["JobState"] == "COMPLETED"
    job = Job(slurm, run, ["--nodes=1"], [])
    expected.finish(1)
    assert job.finish(LIMIT)["JobState"] == "COMPLETED", job.outputs
    assert "layout: 1 pipeline stages x 1 data-parallel" in job.outputs
    assert run.losses == pytest.approx(expected.losses, rel=1e-5)


def test_mistake_in_the_config_fails_and_is_not_queued_again(slurm, tmp_path, data):
    job = Job(slurm, Run(tmp_path, data, **FP32), [], ["train.stepz=1"])
    state = job.finish(LIMIT)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0")
    assert "unknown setting train.stepz" in job.log


def test_missing_store_fails_and_is_not_queued_again(slurm, tmp_path, data):
    run = Run(tmp_path, data.model_copy(update={"store": str(tmp_path / "nowhere")}), **FP32)
    assert_not_started(Job(slurm, run, [], []), "node-1: store: data.store .*nowhere: not found")


def assert_not_started(job: Job, why: str) -> None:
    """It fails soon, with one line that says why, and nothing of it is left."""
    state = job.finish(LIMIT_OF_PREFLIGHT)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0")
    (line,) = (line for line in job.log.splitlines() if line.startswith("infini-ds: "))
    assert re.match(f"infini-ds: preflight: {why}", line), job.outputs
    assert "not started, and not queued again" in job.log
    job.wait_until(lambda: not job.processes(), LIMIT_OF_END, "the end of its processes")
    assert not job.run.losses


@pytest.fixture
def cover(slurm):
    """Mounts something over a path of the second node, until the end of the test."""
    second, covered = slurm.hosts[1], []

    def mount(path, *what: str) -> None:
        second.run("mount", *what, str(path))
        covered.append(str(path))

    yield mount
    for path in covered:
        second.run("umount", path)


class TestNodeThatIsNotReady:
    """It is named by the job, which does not start."""

    def test_lacks_the_store(self, slurm, cover, tmp_path, data, trial):
        run = Run(tmp_path, data, **FP32)
        cover(data.store, "-t", "tmpfs", "tmpfs")
        with trial("node of a Slurm job that lacks the store"):
            assert_not_started(
                Job(slurm, run, [], []), "node-2: store: data.store .*no valid manifest"
            )

    @pytest.mark.slow
    def test_has_another_version_of_a_file(self, slurm, cover, tmp_path, data, trial):
        other = tmp_path / "layout.py"
        other.write_text(Path(layout.__file__).read_text() + "# another version\n")
        cover(layout.__file__, "--bind", str(other))
        job = Job(slurm, Run(tmp_path, data, **FP32), [], [])
        with trial("... that has another version of a file of `infini_ds`"):
            assert_not_started(job, r"node-2: versions: infini_ds \S+ \(sources \w+\), here ")

    @pytest.mark.slow
    def test_cannot_be_reached(self, slurm, tmp_path, data, trial):
        second = slurm.hosts[1]
        second.send("slurmd -D", signal.SIGSTOP)
        with trial("... that cannot be reached"):
            try:
                job = Job(slurm, Run(tmp_path, data, **FP32), [], [])
                job.wait_until(
                    lambda: "infini-ds: " in job.log, LIMIT_OF_PREFLIGHT, "its last line"
                )
            finally:
                second.send("slurmd -D", signal.SIGCONT)
            assert_not_started(
                job, "node-2: reached: .*; see `scontrol show node node-2`, or go without"
            )


STEPS = 40
LONG = {**FP32, "train__steps": STEPS, "train__save_every": 10**6, "parallel__pipeline_stages": 2}
"""A run that only saves when it is asked to stop, and at its end."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data) -> Run:
    """The long run from its first step to its last."""
    run = Run(tmp_path_factory.mktemp("undisturbed"), data, **LONG)
    with run.start(2) as ranks:
        assert ranks.wait(LIMIT, together=True) == [0, 0]
    assert sorted(run.losses) == list(range(1, STEPS + 1))
    return run


@pytest.fixture
def start_long(slurm, tmp_path, data):
    """Starts the long run on a link that makes a step last more than a second.

    It does so without work for this machine; after the first interruption the link is fast again.
    """

    def start(*options: str) -> Job:
        slurm.hosts.limit("100kbit")
        return Job(slurm, Run(tmp_path, data, **LONG), [*options], [])

    yield start
    slurm.hosts.limit("10gbit")


def finish_resumed(slurm, job: Job, undisturbed: Run) -> None:
    """It comes to its end without a person, exactly as the undisturbed run."""
    job.wait_until(lambda: "queued again" in job.log, LIMIT, "the first interruption")
    slurm.hosts.limit("10gbit")
    assert job.finish(LIMIT)["JobState"] == "COMPLETED", job.outputs
    text = (job.run.output / "logs" / "rank_0.log").read_text()
    assert text.count("resumed from") == job.log.count("queued again"), job.outputs
    assert job.run.losses == undisturbed.losses
    assert job.run.checksums(STEPS) == undisturbed.checksums(STEPS)


@pytest.mark.slow
class TestInterruptedJob:
    def test_goes_on_after_its_time_limit(self, slurm, start_long, undisturbed, trial):
        with trial("Slurm's time limit"):
            # Slurm gives the signal up to a minute earlier than it is asked to.
            job = start_long("--time=3", "--signal=B:USR1@60")
            finish_resumed(slurm, job, undisturbed)

    def test_goes_on_after_the_signal(self, slurm, start_long, undisturbed, trial):
        with trial("`scancel --signal` of a Slurm job"):
            job = start_long()
            job.wait_until(lambda: len(job.run.losses) >= 5, LIMIT, "step 5")
            slurm.run("scancel", "--batch", "--signal=USR1", job.id)
            finish_resumed(slurm, job, undisturbed)
            assert job.log.count("queued again") == 1

    def test_goes_on_after_a_more_urgent_one(self, slurm, start_long, undisturbed, tmp_path, trial):
        with trial("preemption by a more urgent job"):
            job = start_long()
            job.wait_until(lambda: len(job.run.losses) >= 5, LIMIT, "step 5")
            urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--wrap=srun hostname"]
            other = slurm.submit(*urgent, cwd=tmp_path)
            finish_resumed(slurm, job, undisturbed)
            assert slurm.job(other)["JobState"] == "COMPLETED"

    def test_stays_cancelled(self, slurm, start_long, trial):
        with trial("`scancel` of a Slurm job"):
            job = start_long()
            job.wait_until(lambda: len(job.run.losses) >= 5, LIMIT, "step 5")
            slurm.run("scancel", job.id)
            state = job.finish(LIMIT)
            assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0")
            stopped = max(job.run.losses)
            assert (job.run.checkpoint(stopped) / "manifest.json").exists(), job.outputs
