"""Runs steps one after another within a total time limit, each with its own limit and log."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from infini_ds.benchmarks.gpu_check.results import summary

LEAST_SECONDS = 8.0
"""A step is not started with less time left than this."""
GRACE_SECONDS = 5.0
"""Time between asking a process to end and killing it; parts start nothing in that time either."""
POLL_SECONDS = 0.05
SHOWN_LINES = 4


class Command(NamedTuple):
    """One process of a step."""

    arguments: Sequence[str]
    environment: dict[str, str] = {}  # noqa: RUF012


class Steps:
    """The state of a check: its remaining time and the results so far.

    Args:
        out: folder for results.jsonl, summary.txt and logs/.
        seconds: time limit for all steps together.
        patience: factor on the limit of each step.
    """

    def __init__(self, out: Path, seconds: float, patience: float = 1.0) -> None:
        self.out, self.results = out, out / "results.jsonl"
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self.results.write_text("")
        self._ends, self._patience = time.monotonic() + seconds, patience
        self._lines: list[str] = []
        self.codes: dict[str, int | None] = {}
        """Exit code of each step; None if there was no time for it."""

    def run(self, name: str, limit: float, commands: Sequence[Command], at_once: int = 1) -> bool:
        """Runs a step; returns whether all its commands succeeded.

        Args:
            limit: time limit for all commands together, in seconds.
            at_once: number of commands to run at the same time.
        """
        limit = min(self._patience * limit, self._ends - time.monotonic() - GRACE_SECONDS)
        if limit < LEAST_SECONDS:
            self.codes[name] = None
            self.say(f"{name}: no time left")
            return False
        began = time.monotonic()
        code = self.start(name, limit, commands, at_once).wait()
        self.codes[name] = code
        took = time.monotonic() - began
        self.say(f"{name:12} exit {code:3d} after {took:5.1f} s (limit {limit:.0f})")
        if code:
            log = self.log(name).read_text(errors="replace").strip().splitlines()
            for line in log[-SHOWN_LINES:]:
                self.say(f"    {line[:300]}")
        return code == 0

    def start(
        self, name: str, limit: float, commands: Sequence[Command], at_once: int = 1
    ) -> "Running":
        """Starts the same in the background, without printing anything."""
        environment = {
            "RESULTS": str(self.results), "PART_SECONDS": f"{limit - GRACE_SECONDS:.0f}"
        }  # fmt: skip
        return Running(self.log(name), limit, commands, at_once, environment)

    def log(self, name: str) -> Path:
        """Returns the file with the output of a step."""
        return self.out / "logs" / f"{name}.log"

    def say(self, line: str) -> None:
        """Prints a line about the steps and updates the summary."""
        print(line, flush=True)
        self._lines.append(line)
        text = "\n".join((*self._lines, "", *summary(self.results)))
        (self.out / "summary.txt").write_text(text + "\n")


class Running:
    """Commands that share a log and a limit and may run in parallel; a failure stops no others."""

    def __init__(
        self, log: Path, limit: float, commands: Sequence[Command], at_once: int,
        environment: dict[str, str],
    ) -> None:  # fmt: skip
        self._waiting, self._at_once = list(commands), at_once
        self._environment = os.environ | environment
        self._ends = time.monotonic() + limit
        self._log = log.open("ab")
        self._processes: list[subprocess.Popen[Any]] = []
        self._codes: list[int] = []
        self._fill()

    def wait(self) -> int:
        """Waits for all commands; returns the first nonzero exit code, or 124 after a timeout."""
        while self._processes:
            self._fill()
            if time.monotonic() > self._ends:
                self.end()
                return 124
            time.sleep(POLL_SECONDS)
        self._log.close()
        return next((abs(code) for code in self._codes if code), 0)

    def _fill(self) -> None:
        for process in list(self._processes):
            if process.poll() is not None:
                self._codes.append(process.returncode)
                self._processes.remove(process)
        while self._waiting and len(self._processes) < self._at_once:
            command = self._waiting.pop(0)
            self._processes.append(
                subprocess.Popen(
                    list(command.arguments), stdin=subprocess.DEVNULL, stdout=self._log,
                    stderr=subprocess.STDOUT, env=self._environment | command.environment,
                    start_new_session=True,
                )
            )  # fmt: skip

    def end(self) -> None:
        """Asks all processes to end, then kills those that do not."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            ends = time.monotonic() + GRACE_SECONDS
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, ends - time.monotonic()))
        self._log.close()
