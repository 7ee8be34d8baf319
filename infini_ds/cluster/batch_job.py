"""Runs a training run as a Slurm job, queueing the job again until the run is finished.

It is started by `sbatch launch/pretrain.sbatch CONFIG`. The script replaces itself with this
program, so that Slurm's signals to the batch script arrive here:

    python3 -m infini_ds.cluster.batch_job [--asked] CONFIG [key.path=value ...]

It checks that every node is ready, starts the tasks, forwards signals to them, and then decides
whether the job is queued again. `--asked` says that a signal arrived before this program started.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from infini_ds.cluster.slurm import JobState, SlurmError, nodes_of_job, scontrol, state_of_job
from infini_ds.errors import UserError
from infini_ds.runs.directory import Depth, RunDirectory
from infini_ds.system import environment
from infini_ds.system.exit_code import exit_code

USAGE = "usage: sbatch launch/pretrain.sbatch CONFIG [key.path=value ...]"
PREFLIGHT_SECONDS = 900.0
"""Time limit of the preflight, which itself limits the time of each question to the nodes."""
TERMINATED = 128 + signal.SIGTERM
"""Exit code of a job that was told to end and did."""
_FIRST_PORT, _PORTS = 20000, 10000
"""The ranks meet at a port that follows from the job's number, so that jobs do not collide."""
_TASK = """
  exec >> "$0/logs/rank_$SLURM_PROCID.log" 2>&1
  local_tasks=(${SLURM_GTIDS//,/ })
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
  export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=${#local_tasks[@]}
  exec infini-ds pretrain "$@"
"""
"""Shell script of a task, which becomes a rank. It opens the log itself, because srun would take
the path for a pattern. SLURM_GTIDS lists the tasks of this node, separated by commas."""


class Verdict(NamedTuple):
    """The way in which the job ends."""

    message: str
    code: int
    queue_again: bool = False


def before_start(ready: int, asked: bool, job: JobState) -> Verdict | None:
    """Returns the verdict on a job after its preflight; None if it can start.

    Args:
        ready: exit code of the preflight.
        asked: whether a signal has asked the job to end.
    """
    if job.preempted and job.running:
        return Verdict("preempted before its start: queued again", TERMINATED, queue_again=True)
    if asked:
        return Verdict(
            "told to end before its start: not queued again; --time must leave room, before the "
            "signal of --signal, for the start and a step",
            2,
        )
    if ready != 0:
        return Verdict("not started, and not queued again", 2)
    return None


class Outcome(NamedTuple):
    """The outcome of a run whose tasks have ended."""

    code: int
    """The exit code of srun, which is the highest one of its tasks."""
    reported: int
    """The step in the report that a run writes at its end; 0 without one."""
    before: int
    """The step of the newest checkpoint when the tasks started; 0 without one."""
    saved: int
    """The step of the newest checkpoint now; 0 without one."""
    job: JobState


def after_end(outcome: Outcome, steps: int, logs: str) -> Verdict:
    """Returns the verdict on a job after the end of its tasks.

    An unfinished run is queued again if it saved a new checkpoint or was preempted, even before its
    first step, unless the job was cancelled or the config is wrong. Any other run would fail again
    and again.

    Args:
        steps: number of steps of the whole run.
        logs: the directory of the tasks' output.
    """
    code = outcome.code
    if outcome.reported >= steps:
        return Verdict(f"finished at step {steps}", code)
    if not outcome.job.running:
        return Verdict(f"ended ({outcome.job.name})", code)
    if code == 2:
        return Verdict(
            f"a mistake in the config or its files, see {logs}/rank_0.log; not queued again", code
        )
    if outcome.job.preempted or outcome.saved != outcome.before:
        return Verdict(
            f"not finished (exit code {code}), newest checkpoint at step {outcome.saved}: "
            "queued again",
            code,
            queue_again=True,
        )
    return Verdict(
        f"failed with exit code {code} before its first checkpoint, see {logs}; not queued again",
        code,
    )


class Signals:
    """Notes SIGUSR1 and SIGTERM to the job, and passes them on to the tasks as SIGUSR1."""

    def __init__(self, asked: bool):
        self.asked = asked
        self._tasks: subprocess.Popen | None = None
        numbers = (signal.SIGUSR1, signal.SIGTERM)
        for number in numbers:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # the script has blocked them

    def hand_to(self, tasks: subprocess.Popen) -> None:
        """Forwards signals to these tasks from now on, and one that came while they started."""
        self._tasks = tasks
        if self.asked:
            tasks.send_signal(signal.SIGUSR1)

    def _note(self, number: int, frame: object) -> None:
        self.asked = True
        if self._tasks:
            self._tasks.send_signal(signal.SIGUSR1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the job and returns its exit code, which is srun's if the tasks were started."""
    if arguments is None:
        environment.use_utf8()
        arguments = sys.argv[1:]
    asked = [*arguments[:1]] == ["--asked"]
    signals = Signals(asked)
    arguments = arguments[asked:]
    if not arguments:
        print(USAGE, file=sys.stderr)
        return 2
    codes: list[int] = []
    code = exit_code(lambda: codes.append(run(arguments, signals)))
    return codes[0] if codes else code


def run(arguments: Sequence[str], signals: Signals) -> int:
    """Runs the config and overrides that the arguments name, and queues the job again if needed.

    Returns:
        The exit code of the job.

    Raises:
        UserError: the config is wrong, or this is not a Slurm job.
    """
    environment.forget_launcher()
    output, steps = _settings(arguments)
    job = str(_number("SLURM_JOB_ID"))
    with contextlib.suppress(OSError):  # the preflight reports it
        (output / "logs").mkdir(parents=True, exist_ok=True)
    _set_variables(int(job))
    ready = _preflight(arguments, job)
    verdict = before_start(ready, signals.asked, _state(job))
    if not verdict:
        outcome = _run_tasks(arguments, output, signals, job)
        verdict = after_end(outcome, steps, f"{output}/logs")
    _say(job, verdict.message)
    if verdict.queue_again:
        try:
            scontrol("requeue", job)
        except SlurmError as error:
            _warn(f"scontrol requeue {job}: {error}")
    return verdict.code


def _settings(arguments: Sequence[str]) -> tuple[Path, int]:
    """Returns the run's output directory and steps, if its config suits the number of tasks."""
    from infini_ds import config as configuration  # late, because signals must be handled early

    config = configuration.load(arguments[0], list(arguments[1:]))
    config.data_parallel_size(_number("SLURM_NTASKS"))
    return Path(os.path.abspath(config.output_dir)), config.train.steps


def _number(name: str) -> int:
    """Returns the number in a variable that Slurm sets in a job."""
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise UserError(
            f"environment variable {name}={value!r}: must be a number, which Slurm sets in a job; "
            "start it by `sbatch launch/pretrain.sbatch CONFIG`"
        )
    return int(value)


def _set_variables(job: int) -> None:
    """Sets variables that tell the tasks where to meet and how many cores they have."""
    first = next(iter(nodes_of_job()), None)
    if not first:
        raise UserError("environment variable SLURM_JOB_NODELIST: must name the nodes of the job")
    os.environ["MASTER_ADDR"] = first
    os.environ["MASTER_PORT"] = str(_FIRST_PORT + job % _PORTS)
    if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
        os.environ["SRUN_CPUS_PER_TASK"] = cores


def _preflight(arguments: Sequence[str], job: str) -> int:
    """Checks that every node is ready, since tasks would wait for a node that is not.

    A signal does not cut it short, so that its findings are always printed.

    Returns:
        The exit code of the preflight; 1 if it cannot run or does not end in time.
    """
    command = ["infini-ds", "preflight", "--quiet", *arguments]
    try:
        return subprocess.run(command, timeout=PREFLIGHT_SECONDS, check=False).returncode
    except subprocess.TimeoutExpired:
        _say(job, f"the preflight did not end within {PREFLIGHT_SECONDS:g} s")
    except OSError as error:
        _warn(f"{command[0]}: cannot be started ({error.strerror})")
    return 1


def _run_tasks(arguments: Sequence[str], output: Path, signals: Signals, job: str) -> Outcome:
    """Starts the tasks and waits for them; only the time limit of the job limits the wait."""
    directory = RunDirectory(output)
    before = _newest(directory)
    _say(
        job,
        f"start {os.environ.get('SLURM_RESTART_COUNT') or 0}, {os.environ['SLURM_NTASKS']} tasks "
        f"on {os.environ['SLURM_JOB_NODELIST']}, output in {output}/logs/rank_*.log",
    )
    command = ["srun", "--kill-on-bad-exit=1", "bash", "-c", _TASK, str(output), *arguments]
    try:
        tasks = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be started ({error.strerror})") from None
    signals.hand_to(tasks)
    code = tasks.wait()
    code = code if code >= 0 else 128 - code
    state = _state(job)
    try:
        reported = directory.reported_step()
    except OSError:
        reported = 0
    return Outcome(code, reported, before, _newest(directory), state)


def _newest(directory: RunDirectory) -> int:
    """Returns the step of the newest finished checkpoint; 0 without one."""
    found = directory.newest(Depth.FINISHED)
    return found.step if found else 0


def _state(job: str) -> JobState:
    """Returns the state of the job, or the defaults if Slurm does not tell it."""
    try:
        return state_of_job(job)
    except SlurmError as error:
        _warn(f"scontrol show job {job}: {error}")
        return JobState()


def _say(job: str, message: str) -> None:
    with contextlib.suppress(OSError):  # a full disk must not change how the job ends
        print(f"{time.strftime('%F %T')} job {job}: {message}", flush=True)


def _warn(message: str) -> None:
    with contextlib.suppress(OSError):
        print(f"infini-ds: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
