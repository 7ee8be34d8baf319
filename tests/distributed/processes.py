"""The ranks of a distributed program as processes of this machine, never left behind."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

POLL_SECONDS = 0.02
FORKED = Path(__file__).with_name("forked.py")
IMPORTED = [
    "infini_ds.training.trainer", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo",
    "torch._inductor.compile_fx", "matplotlib.figure", "torch.utils.tensorboard", "pytest",
]  # fmt: skip
"""What a forked process finds imported; it takes twelve seconds of a core."""


class Logged:
    """Whatever writes its output to a file."""

    log: Path

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")


class Process(Logged):
    """One command in a process group of its own, with its output in a file."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str], cwd: Path | None):
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*map(str, command)], stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, env={**os.environ, **env}, cwd=cwd,
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Exit code, or None while it runs."""
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        """Signals this process alone."""
        self._process.send_signal(number)

    def kill_group(self) -> None:
        """Ends it and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


class ForkedProcess(Logged):
    """A script of Python, as `Process` is one, forked from a process that has made the imports.

    It is a process of its own in every other way: a session, an environment, signals, an exit code.
    """

    def __init__(self, script: Sequence[str], log: Path, env: dict[str, str], cwd: Path | None):
        self.log = log
        log.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        given = {
            "SCRIPT": list(map(str, script)), "LOG": str(log), "CWD": str(cwd or Path.cwd()),
            "ENVIRONMENT": {**os.environ, **env},
        }  # fmt: skip
        self._process = context.Process(target=runpy.run_path, args=(str(FORKED), given))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Exit code, or None while it runs."""
        return self._process.exitcode

    def send(self, number: signal.Signals) -> None:
        """Signals this process alone."""
        os.kill(self.pid, number)

    def kill_group(self) -> None:
        """Ends it and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()


class Processes:
    """Some processes that belong together. A context manager: at its end none of them is left."""

    def __init__(self, processes: Sequence[Process | ForkedProcess]):
        self.all = list(processes)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_) -> None:
        for process in self.all:
            process.kill_group()

    def wait(self, limit: float, together: bool = False) -> list[int]:
        """Exit codes of all, within `limit` seconds.

        Args:
            together: the first failure ends the wait: the others may be waiting for that one.
        """
        deadline = time.monotonic() + limit
        while None in (codes := [process.code for process in self.all]):
            if together and any(codes):
                raise AssertionError(f"exit codes {codes}\n{self.outputs()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"not over after {limit} s: {codes}\n{self.outputs()}")
            time.sleep(POLL_SECONDS)
        return [code for code in codes if code is not None]

    def wait_until(self, condition, limit: float, what: str):
        """The first value of `condition()` that is true, as long as all processes run."""
        deadline = time.monotonic() + limit
        while not (value := condition()):
            codes = [process.code for process in self.all]
            if time.monotonic() > deadline or any(code is not None for code in codes):
                raise AssertionError(f"waited for {what}; exit codes {codes}\n{self.outputs()}")
            time.sleep(POLL_SECONDS)
        return value

    def outputs(self) -> str:
        """What all of them have written, for a failing test to show."""
        return "\n".join(
            f"--- process {index} (exit code {process.code})\n{process.output}"
            for index, process in enumerate(self.all)
        )


def start_ranks(
    script: Sequence[str],
    world: int,
    logs: Path,
    env: dict[str, str] | None = None,
    directories: Sequence[Path] | None = None,
) -> Processes:
    """Starts `world` ranks of a script, with the environment that a launcher gives them.

    Args:
        script: its path and arguments.
        logs: folder of their output.
        env: in addition.
        directories: working directory of each rank.
    """
    logs.mkdir(parents=True, exist_ok=True)
    shared = {
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **(env or {}),
    }  # fmt: skip
    started = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        cwd = directories[rank] if directories else None
        started.append(ForkedProcess(script, logs / f"rank{rank}.log", {**shared, **own}, cwd))
    return Processes(started)


def run_ranks(script: Sequence[str], world: int, logs: Path, limit: float) -> None:
    """Runs all ranks to their end; fails if one of them fails or the time is over."""
    with start_ranks(script, world, logs) as ranks:
        codes = ranks.wait(limit, together=True)
        assert not any(codes), ranks.outputs()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
