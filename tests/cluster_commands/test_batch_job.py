"""How a job ends, by what is known of it; and which signals its tasks get: without Slurm."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from infini_ds.cluster import batch_job
from infini_ds.cluster.batch_job import Outcome, Verdict, after_end, before_start
from infini_ds.cluster.slurm import JobState
from infini_ds.errors import UserError
from tests.config.test_config import TREE

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "pretrain.sbatch"
RUNNING, UNKNOWN = JobState("RUNNING"), JobState()
PREEMPTED = JobState("RUNNING", preempted=True)
CANCELLED = JobState("CANCELLED")
NO_TIME = (
    "told to end before its start: not queued again; --time must leave room, before the signal of "
    "--signal, for the start and a step"
)
STEPS, LOGS = 10, "/run/logs"


@pytest.mark.parametrize(
    ("ready", "asked", "job", "verdict"),
    [
        (0, False, RUNNING, None),
        (0, False, UNKNOWN, None),
        (0, False, PREEMPTED, (True, 143, "preempted before its start: queued again")),
        (2, True, PREEMPTED, (True, 143, "preempted before its start: queued again")),
        # It was preempted and has been cancelled since, or Slurm itself has queued it again.
        (0, True, JobState("CANCELLED", preempted=True), (False, 2, NO_TIME)),
        (0, True, RUNNING, (False, 2, NO_TIME)),
        (2, True, RUNNING, (False, 2, NO_TIME)),
        (0, True, UNKNOWN, (False, 2, NO_TIME)),
        (2, False, RUNNING, (False, 2, "not started, and not queued again")),
        (1, False, UNKNOWN, (False, 2, "not started, and not queued again")),
    ],
)
def test_before_its_start(ready, asked, job, verdict):
    found = before_start(ready, asked, job)
    assert (found and (found.queue_again, found.code, found.message)) == verdict


def outcome(code: int, reported=0, before=0, saved=0, job=RUNNING) -> Outcome:
    return Outcome(code, reported, before, saved, job)


@pytest.mark.parametrize(
    ("ended", "again", "message"),
    [
        (outcome(0, reported=10, saved=10), False, "finished at step 10"),
        (outcome(0, reported=12, before=12, saved=12), False, "finished at step 10"),
        (outcome(1, reported=10, job=PREEMPTED), False, "finished at step 10"),
        (outcome(0, reported=10, job=CANCELLED), False, "finished at step 10"),
        (outcome(0, saved=5, job=CANCELLED), False, "ended (CANCELLED)"),
        (outcome(143, job=JobState("COMPLETING", preempted=True)), False, "ended (COMPLETING)"),
        (outcome(0, saved=5, job=UNKNOWN), False, "ended ()"),
        (
            outcome(2, saved=5), False,
            "a mistake in the config or its files, see /run/logs/rank_0.log; not queued again",
        ),
        (
            outcome(2, job=PREEMPTED), False,
            "a mistake in the config or its files, see /run/logs/rank_0.log; not queued again",
        ),
        (
            outcome(0, saved=5), True,
            "not finished (exit code 0), newest checkpoint at step 5: queued again",
        ),
        (
            outcome(1, reported=5, before=5, saved=9), True,
            "not finished (exit code 1), newest checkpoint at step 9: queued again",
        ),
        (
            outcome(143, job=PREEMPTED), True,
            "not finished (exit code 143), newest checkpoint at step 0: queued again",
        ),
        (
            outcome(1, before=5, saved=5, job=PREEMPTED), True,
            "not finished (exit code 1), newest checkpoint at step 5: queued again",
        ),
        # A rollback that has deleted what lay beyond it.
        (
            outcome(1, before=5, saved=3), True,
            "not finished (exit code 1), newest checkpoint at step 3: queued again",
        ),
        (
            outcome(1), False,
            "failed with exit code 1 before its first checkpoint, see /run/logs; not queued again",
        ),
        (
            outcome(0, before=5, saved=5), False,
            "failed with exit code 0 before its first checkpoint, see /run/logs; not queued again",
        ),
    ],
)  # fmt: skip
def test_after_its_end(ended, again, message):
    assert after_end(ended, STEPS, LOGS) == Verdict(message, ended.code, again)


PROGRAMS = {
    "scontrol": """#!/bin/bash
echo "$*" >> "$HERE/scontrol"
[[ $2 == hostnames ]] && echo node-1 && echo node-2
[[ $1-$2 == show-job ]] && cat "$HERE/job"
exit 0
""",
    "srun": """#!/bin/bash
printf '%s\\n' "$MASTER_ADDR:$MASTER_PORT ${SRUN_CPUS_PER_TASK-unset} ${RANK-unset}" "$@" \\
  > "$HERE/srun"
trap 'echo asked >> "$HERE/asked"; mkdir -p "$HERE/output/checkpoints/step_00000005"
  touch "$HERE/output/checkpoints/step_00000005/manifest.json"; exit 0' USR1
touch "$HERE/started"
[[ -z $WAIT ]] || while :; do sleep 0.1; done
exit ${CODE:-0}
""",
    "infini-ds": """#!/bin/bash
touch "$HERE/preflight"
[[ -z $HOLD ]] || until [[ -e $HERE/go ]]; do sleep 0.1; done
""",
}
JOB = """JobId=12345 JobName=infini_ds
   JobState={state} Reason=None Dependency=(null)
   SuspendTime=None SecsPreSuspend=0
   PreemptEligibleTime=2026-11-28T10:00:00 PreemptTime={time}
   Command=/home/me/launch/pretrain.sbatch run.yaml JobState=TIMEOUT PreemptTime=now
"""
LIMIT = 60.0


class BatchJob:
    """The script, started on stand-ins for Slurm's commands and for `infini-ds`."""

    def __init__(self, folder: Path, *arguments: str, script: Path = SCRIPT, **variables: str):
        self.folder = folder
        for name, text in PROGRAMS.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        self.tell("RUNNING")
        (folder / "run.yaml").write_text(yaml.safe_dump({**TREE, "output_dir": "output"}))
        slurm = {
            "SLURM_JOB_ID": "12345", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node-[1-2]",
            "SLURM_CPUS_PER_TASK": "3", "RANK": "7",
        }  # fmt: skip
        python = str(Path(sys.executable).parent)
        path = os.pathsep.join([str(folder / "bin"), python, os.environ["PATH"]])
        environment = {**os.environ, **slurm, "PATH": path, "PYTHONPATH": str(ROOT)}
        environment |= {"HERE": str(folder), **variables}
        self.process = subprocess.Popen(
            ["bash", str(script), *(arguments or ["run.yaml"])],
            cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={name: value for name, value in environment.items() if value},
        )  # fmt: skip

    def tell(self, state: str, time: str = "None") -> None:
        """What Slurm tells of the job from now on."""
        (self.folder / "job").write_text(JOB.format(state=state, time=time))

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + LIMIT
        while not (self.folder / name).exists():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, name
            time.sleep(0.05)

    def end(self) -> tuple[int, list[str]]:
        """Its exit code, and what it said about the job."""
        output, _ = self.process.communicate(timeout=LIMIT)
        lines = output.splitlines()
        said = [re.sub(r"^[\d-]{10} [\d:]{8} job 12345: ", "", line) for line in lines]
        assert said == [line[len("2026-11-28 10:00:00 job 12345: ") :] for line in lines], output
        return self.process.returncode, said

    @property
    def queued_again(self) -> bool:
        return "requeue 12345" in (self.folder / "scontrol").read_text()


@pytest.fixture
def start(tmp_path):
    """Starts a job; it does not outlive its test."""
    jobs = []

    def start_job(*arguments: str, **options) -> BatchJob:
        jobs.append(BatchJob(tmp_path, *arguments, **options))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.process.kill()
        job.process.communicate()


def test_tasks_are_told_where_they_meet(start, tmp_path):
    job = start("run.yaml", "train.steps=20", CODE="1")
    assert job.end() == (1, [
        f"start 0, 2 tasks on node-[1-2], output in {tmp_path}/output/logs/rank_*.log",
        f"failed with exit code 1 before its first checkpoint, see {tmp_path}/output/logs; "
        "not queued again",
    ])  # fmt: skip
    told = (tmp_path / "srun").read_text().splitlines()
    assert told[:4] == ["node-1:22345 3 unset", "--kill-on-bad-exit=1", "bash", "-c"]
    assert told[-3:] == [f"{tmp_path}/output", "run.yaml", "train.steps=20"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_handed_to_the_tasks(start, number):
    job = start(WAIT="1")
    job.wait_for("started")
    job.process.send_signal(number)
    code, (_, last) = job.end()
    assert (code, last) == (
        0, "not finished (exit code 0), newest checkpoint at step 5: queued again",
    )  # fmt: skip
    assert (job.folder / "asked").read_text() == "asked\n"
    assert job.queued_again


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_in_the_preflight_ends_the_job(start, number):
    job = start(HOLD="1")
    job.wait_for("preflight")
    job.process.send_signal(number)
    (job.folder / "go").touch()
    assert job.end() == (2, [NO_TIME])
    assert not (job.folder / "started").exists()
    assert not job.queued_again


def test_preemption_in_the_preflight_queues_it_again(start):
    job = start(HOLD="1")
    job.wait_for("preflight")
    job.tell("RUNNING", "2026-11-28T10:00:01")
    (job.folder / "go").touch()
    assert job.end() == (143, ["preempted before its start: queued again"])
    assert job.queued_again


def test_a_signal_before_python_listens_is_not_lost(start, tmp_path):
    """It comes to the shell, as while modules are loaded."""
    script = tmp_path / "script"
    script.write_text(SCRIPT.read_text().replace("# module load cuda\n", "kill -USR1 $$\n"))
    assert start(script=script).end() == (2, [NO_TIME])


def holds_signals() -> bool:
    command = ["env", "--block-signal=USR1", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not holds_signals(), reason="env of coreutils 8.31 holds signals up")
def test_a_signal_while_python_starts_is_not_lost(start, tmp_path):
    """Python takes a second to come up here."""
    script = tmp_path / "script"
    ignoring = "trap '' USR1 TERM\n"
    text = SCRIPT.read_text().replace(ignoring, f"{ignoring}(sleep 0.5; kill -USR1 $$) &\n")
    script.write_text(text)
    slow = tmp_path / "bin" / "python3"
    slow.parent.mkdir()
    slow.write_text(
        f"#!{sys.executable}\nimport os, sys, time\ntime.sleep(1)\n"
        f"os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
    )
    slow.chmod(0o755)
    assert start(script=script).end() == (2, [NO_TIME])


def test_a_task_that_a_signal_has_killed_counts_as_in_a_shell(start):
    job = start(WAIT="1")
    job.wait_for("started")
    (child,) = Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    code, (_, last) = job.end()
    assert code == 137
    assert last.startswith("failed with exit code 137 before its first checkpoint")


class TestMistake:
    """It is one line, with exit code 2."""

    def test_no_config(self, capsys):
        assert batch_job.main([]) == 2
        assert capsys.readouterr().err == batch_job.USAGE + "\n"

    def test_wrong_setting(self, start):
        job = start("run.yaml", "train.stepz=1")
        output, _ = job.process.communicate(timeout=LIMIT)
        assert job.process.returncode == 2
        (line,) = output.splitlines()
        assert line.startswith("infini-ds: ")
        assert "unknown setting train.stepz" in line

    @pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_JOB_NODELIST"])
    def test_no_job(self, start, name):
        job = start(**{name: ""})
        output, _ = job.process.communicate(timeout=LIMIT)
        assert job.process.returncode == 2
        (line,) = output.splitlines()
        assert line.startswith(f"infini-ds: environment variable {name}")

    def test_no_srun(self, tmp_path, monkeypatch):
        variables = {"PATH": "/nowhere", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node-[1-2]"}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="srun: cannot be started"):
            batch_job._run_tasks(["run.yaml"], tmp_path, None, "5")


def test_preflight_that_does_not_end_is_limited(start, tmp_path, monkeypatch, capsys):
    start().end()
    monkeypatch.setattr(batch_job, "PREFLIGHT_SECONDS", 0.2)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("HOLD", "1")
    assert batch_job._preflight(["run.yaml"], "5") == 1
    assert "job 5: the preflight did not end within 0.2 s\n" in capsys.readouterr().out


def test_slurm_that_does_not_tell_is_named_and_the_job_is_not_queued_again(start, tmp_path):
    job = start(WAIT="1")
    job.wait_for("started")
    (tmp_path / "bin" / "scontrol").write_text(
        '#!/bin/bash\necho "$*" >> "$HERE/scontrol"; echo "slurm_load_jobs error" >&2; exit 1\n'
    )
    job.process.send_signal(signal.SIGUSR1)
    output, _ = job.process.communicate(timeout=LIMIT)
    assert "infini-ds: scontrol show job 12345: slurm_load_jobs error\n" in output
    assert "job 12345: ended ()\n" in output
    assert not job.queued_again
