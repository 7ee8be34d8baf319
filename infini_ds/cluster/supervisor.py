"""The program behind `bash launch/pretrain.sh`: starts a run, and restarts it when it fails.

It forwards signals, which DeepSpeed's launcher does not do on a single machine. Restarts are for
machines without a scheduler: a restarted run goes on from its newest valid checkpoint. A run is not
restarted after a mistake of the user (exit code 2), when it was asked to stop, or when it failed
without making a step.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from infini_ds import config as configuration
from infini_ds.cluster import preflight
from infini_ds.cluster.devices import translate_visible_devices
from infini_ds.cluster.launcher import check_what_is_not_quoted, quoted
from infini_ds.cluster.tail import lines_backwards
from infini_ds.cluster.way import words
from infini_ds.errors import UserError
from infini_ds.guard.signals import stop_signals
from infini_ds.runs import failures
from infini_ds.runs.directory import Depth, RunDirectory
from infini_ds.system import environment
from infini_ds.system.arguments import Checked, at_least
from infini_ds.system.exit_code import exit_code
from infini_ds.system.paths import argument

FIRST_DELAY = 5.0
LONGEST_DELAY = 300.0
"""Longest delay before a restart, in seconds; the delay doubles with each restart."""
END_SECONDS = 60.0
"""Seconds that a launcher has to end after a failure, and then that its leftovers have."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts a run as its options say; returns the exit code of its last launcher."""
    if arguments is None:
        environment.use_utf8()
    codes: list[int] = []
    code = exit_code(lambda: codes.append(run(_parser().parse_intermixed_args(arguments))))
    return codes[0] if codes else code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bash launch/pretrain.sh", description="Starts a run, and restarts it when it fails."
    )
    parser.add_argument("script", help=argparse.SUPPRESS)
    parser.add_argument(
        "config", action=Checked, check=argument, metavar="CONFIG", help="YAML file of the run"
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    parser.add_argument(
        "--max-restarts", type=int, action=Checked, check=at_least(0), default=0, metavar="N",
        help="number of restarts after failures (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--hostfile", action=Checked, check=argument, metavar="FILE",
        help="DeepSpeed's hostfile: one line HOST slots=N per host",
    )  # fmt: skip
    parser.add_argument(
        "--deepspeed", default="", metavar="OPTIONS",
        help="more options for DeepSpeed's launcher, such as '--num_accelerators 2'",
    )  # fmt: skip
    return parser


def run(options: argparse.Namespace) -> int:
    """Checks what can be checked on this host, then supervises the launcher.

    Raises:
        UserError: an option, the hostfile, the config or a host is not valid.
    """
    environment.forget_launcher()  # the launcher sets these variables itself
    environment.check_accelerator()
    environment.world_size()
    config = configuration.load(options.config, options.overrides)
    arguments = [options.config, *options.overrides]
    command = ["deepspeed", "--log_level", "error", *words("--deepspeed", options.deepspeed)]
    if options.hostfile:
        check_what_is_not_quoted(options.script)
        preflight.run(options.config, options.overrides, options.hostfile, quiet=True)
        command.append(f"--hostfile={options.hostfile}")
        arguments = quoted(arguments)
    else:
        translate_visible_devices()
    command += [options.script, *arguments]
    return supervise(command, Path(config.output_dir), options.max_restarts)


def supervise(
    command: Sequence[str], output_dir: Path, max_restarts: int, first_delay: float = FIRST_DELAY
) -> int:
    """Runs a launcher until it succeeds, is asked to stop, or a restart would not help.

    Returns:
        The exit code of the last launcher.
    """
    job = Job(command, output_dir)
    for restarts in range(max_restarts + 1):
        before, known = Progress(output_dir), len(failures.read(output_dir))
        code = job.run()
        if code == 0 or job.asked_to_stop:
            return code
        records = failures.read(output_dir)[known:]
        reason = f"the run ended with exit code {code}"
        if records:
            reason += f" (rank {records[-1]['rank']}: {records[-1]['message']})"
        reason += _killed(code)
        if code == 2:
            if max_restarts:
                _say(f"{reason}; not started again, as this is a mistake in the command")
            return code
        if restarts == max_restarts:
            _say(f"{reason}; not started again, after {restarts} restarts")
            return code
        if not Progress(output_dir).is_beyond(before):
            _say(f"{reason}; not started again, as it made no step")
            return code
        delay = min(first_delay * 2**restarts, LONGEST_DELAY)
        _say(f"{reason}; restart {restarts + 1} of {max_restarts} in {delay:g} s")
        job.stopped.wait(delay)
        if job.asked_to_stop:
            return code
    raise AssertionError("the last round returns")


class Job:
    """A run's launcher and everything it starts on this host, in one process group.

    SIGTERM, SIGINT and SIGHUP (the terminal was closed) ask the run to finish its step, save and
    end; a second signal kills it. Under nohup, a run goes on without a terminal.
    """

    def __init__(self, command: Sequence[str], output_dir: Path):
        self.stopped = threading.Event()
        self._output_dir = output_dir
        self._command = list(command)
        self._launcher: subprocess.Popen | None = None
        for number in stop_signals(signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    @property
    def asked_to_stop(self) -> bool:
        return self.stopped.is_set()

    def run(self) -> int:
        """Runs the launcher to its end, and makes sure that nothing is left of it."""
        try:
            self._launcher = subprocess.Popen(self._command, start_new_session=True)
        except OSError as error:
            raise UserError(f"{self._command[0]}: cannot be started ({error.strerror})") from None
        if self.asked_to_stop:  # the signal came before the launcher was there to receive it
            self._send_all(signal.SIGTERM)
        code = self._wait(self._launcher)
        deadline = time.monotonic() + END_SECONDS
        while self._alive() and time.monotonic() < deadline:
            time.sleep(0.2)
        if self._alive():
            _say(f"processes are left {END_SECONDS:g} s after the launcher's end: killed")
            self._send_all(signal.SIGKILL)
        return code if code >= 0 else 128 - code

    def _wait(self, launcher: subprocess.Popen) -> int:
        """Returns the exit code; a launcher by itself waits forever for a frozen rank elsewhere."""
        known, failed = len(failures.read(self._output_dir)), False
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return launcher.wait(END_SECONDS)
            if failed and not self.asked_to_stop:
                _say(f"the run failed, but has not ended after {END_SECONDS:g} s: told to end")
                launcher.send_signal(signal.SIGINT)
            failed = len(failures.read(self._output_dir)) > known

    def _stop(self, number: int, frame: object) -> None:
        again = self.asked_to_stop
        if again and number == signal.SIGHUP:
            return  # a shell that ends repeats the system's SIGHUP
        self.stopped.set()
        if self._launcher is None or not self._alive():
            return
        if again:
            _say("asked to stop once more: the run is killed")
            self._send_all(signal.SIGKILL)
            return
        _say("asked to stop: the run finishes its step, saves and ends")
        # The launcher would kill its ranks 30 seconds after it is told to end. Ranks that are asked
        # directly have as much time as they need.
        ranks = [process for process in self._alive() if _is_rank(process)]
        for process in ranks:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        if not ranks:  # not yet started, or on other hosts, where the launcher forwards it
            self._send_all(signal.SIGTERM)

    def _alive(self) -> list[psutil.Process]:
        assert self._launcher
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                group = os.getpgid(process.pid)
                if group == self._launcher.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _send_all(self, number: signal.Signals) -> None:
        assert self._launcher
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._launcher.pid, number)


class Progress:
    """How far a run has come, according to its files."""

    def __init__(self, output_dir: Path):
        saved = RunDirectory(output_dir).newest(Depth.FINISHED)
        self._saved = saved.step if saved else 0
        metrics = output_dir / "metrics.jsonl"
        self._written, self._step = 0, 0
        if metrics.exists():
            self._written = metrics.stat().st_mtime_ns
            lines = lines_backwards(metrics, 1 << 20)
            self._step = next((step for step in map(_step_of, lines) if step), 0)

    def is_beyond(self, before: "Progress") -> bool:
        """Whether a step was made since `before`; a run starts at the newest checkpoint."""
        made = self._written != before._written and self._step > before._saved
        return made or self._saved > before._saved


def _step_of(line: bytes) -> int:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return int(json.loads(line)["step"])
    return 0


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "RANK" in process.environ()
    return False


def _killed(code: int) -> str:
    """Explains a launcher's exit code that means that the system killed a rank."""
    # The launcher exits with a rank's -9, which the system reports as 247.
    if code in (256 - signal.SIGKILL, 128 + signal.SIGKILL):
        return (
            "; a process was killed (SIGKILL), most often by the kernel as memory ran out: see "
            "`dmesg`, and `infini-ds plan` for what a layout needs"
        )
    if code in (256 - signal.SIGBUS, 128 + signal.SIGBUS):
        return "; SIGBUS, most often as /dev/shm is full: in a container, docker run --shm-size=8g"
    return ""


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(f"infini-ds supervisor: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
