"""Runs many small trainings side by side: a process with one thread for each, and their progress.

This module does not import torch, so that mistakes are reported at once.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

from infini_ds.errors import RunError
from infini_ds.system.console import Console
from infini_ds.system.progress import ProgressLine
from infini_ds.system.resources import cores_at_hand

Job = TypeVar("Job")


class Progress(NamedTuple):
    """Progress of a run."""

    share: float
    """Share of its work that is done, 0 to 1."""
    step: int
    """Training steps done."""
    loss: float
    """Loss of the last step, in nats per label."""
    tokens: int
    """Valid tokens read since the last report, in training or evaluation."""


Work = Callable[[Job, Callable[[Progress], None]], dict[str, Any]]
"""A function of a module, which does a job, reports its progress and returns its figures."""


class RunsProgress(ProgressLine):
    """Shows the steps, the loss of each unfinished run, tokens per second and the time left.

    Args:
        title: name of the command.
        runs: total number of runs.
        steps: number of steps of each run.
    """

    def __init__(self, console: Console, title: str, runs: int, steps: int):
        super().__init__(console, title, float(runs))
        self._title = title
        self._runs = runs
        self._steps = steps
        self._tokens = 0
        self._latest: dict[str, Progress] = {}

    def update(self, name: str, progress: Progress) -> None:
        """Reports progress of the run with this name."""
        self._latest[name] = progress
        self._tokens += progress.tokens
        share = sum(latest.share for latest in self._latest.values()) / self._runs
        self.show(share * self._runs, self._line(self.seconds, share))

    def _line(self, seconds: float, share: float) -> str:
        steps = sum(latest.step for latest in self._latest.values())
        losses = ", ".join(
            f"{name} {latest.loss:.3f}" for name, latest in self._latest.items() if latest.share < 1
        )
        return (
            f"{self._title}: {steps:,} of {self._runs * self._steps:,} steps"
            f"{f' (loss of {losses})' if losses else ''}, {self._tokens / seconds:,.0f} tokens/s, "
            f"{seconds * (1 - share) / share:,.0f} s left"
        )


def run_all(title: str, jobs: dict[str, Job], work: Work[Job], steps: int) -> list[dict[str, Any]]:
    """Does all jobs, as many at the same time as there are cores, and shows their progress.

    Args:
        title: name of the command.
        jobs: the jobs by the names under which they are shown.
        work: does a job in a process of its own.
        steps: number of training steps of each job.

    Returns:
        The figures of each job, in the order of the jobs.

    Raises:
        RunError: a process ended before it was done.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(jobs))
    running: dict[Connection, tuple[str, Any]] = {}
    results: dict[str, dict[str, Any]] = {}
    try:
        with RunsProgress(Console(), title, len(jobs), steps) as progress:
            while waiting or running:
                while waiting and len(running) < cores_at_hand():
                    name = waiting.pop()
                    connection, other = context.Pipe()
                    process = context.Process(
                        target=_do, args=(other, work, jobs[name]), daemon=True
                    )
                    process.start()
                    other.close()
                    running[connection] = name, process
                for connection in wait(list(running)):
                    assert isinstance(connection, Connection)
                    name, process = running[connection]
                    try:
                        message = connection.recv()
                    except EOFError:
                        raise RunError(f"{title}: {name} ended too early") from None
                    if isinstance(message, dict):
                        results[name] = message
                        del running[connection]
                        process.join()
                    else:
                        progress.update(name, message)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return [results[name] for name in jobs]


def print_skipped(results: Iterable[tuple[str, dict[str, Any]]], console: Console) -> None:
    """Names the runs, given with their figures, that had to leave out steps."""
    for name, figures in results:
        if figures["skipped_steps"]:
            console.print(
                f"{name}: {figures['skipped_steps']} steps were skipped, as their gradient "
                "was not finite"
            )


def _do(connection: Connection, work: Work[Job], job: Job) -> None:
    """Does one job, which sends its progress and finally its figures."""
    connection.send(work(job, connection.send))
