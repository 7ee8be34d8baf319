"""Tiny fp32 runs that are going to be disturbed."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import time
from pathlib import Path

from infini_ds.training import failures
from tests.distributed.conftest import SCRIPT, Run
from tests.distributed.processes import Processes, free_port

WORKER = Path(__file__).with_name("worker.py")
FORKED = Path(__file__).with_name("forked_rank.py")
START = 400
"""Seconds that anything may take to start, on a machine with other work."""
LIMIT = 600
"""Seconds that a whole run may take."""
END = 40
"""Seconds in which ranks must end when another one has."""
FP32 = {
    "train__dtype": "fp32", "train__chunks": 1, "optimizer__eps": 1e-5,
    "optimizer__learning_rate": 1e-3,
}  # fmt: skip


class ForkedRank:
    """A rank of a run, as `Process` is one, that is forked from a process with all imports done."""

    def __init__(self, arguments: list[str], log: Path, env: dict[str, str]):
        self.log = log
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["infini_ds.training.trainer"])
        given = {"ARGUMENTS": arguments, "LOG": str(log), "ENVIRONMENT": env}
        self._process = context.Process(target=runpy.run_path, args=(str(FORKED), given))
        log.touch()
        self._process.start()

    @property
    def code(self) -> int | None:
        """Exit code, or None while it runs."""
        return self._process.exitcode

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Signals this process."""
        os.kill(self._process.pid, number)

    def kill_group(self) -> None:
        """Ends it and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()


class FaultyRun(Run):
    """A run whose ranks make the faults that `worker.py` knows."""

    def __init__(self, folder: Path, data, faults: str = "{}", **settings):
        super().__init__(folder, data, **{**FP32, **settings})
        self.faults = faults

    def start(self, world: int, *overrides: str) -> Processes:
        self._launches += 1
        logs = self.folder / f"launch{self._launches}"
        logs.mkdir()
        script = [str(SCRIPT)] if self.faults == "{}" else [str(WORKER), self.faults]
        arguments = [*script, str(self.config), *overrides]
        shared = {
            "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        }  # fmt: skip
        ranks = []
        for rank in range(world):
            env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(ForkedRank(arguments, logs / f"rank{rank}.log", env))
        return Processes(ranks)

    def finish(self, world: int, *overrides: str) -> str:
        with self.start(world, *overrides) as ranks:
            assert ranks.wait(LIMIT, together=True) == [0] * world
            return ranks.all[0].output

    @property
    def recorded(self) -> list[dict]:
        """All lines of failures.jsonl."""
        return failures.read(self.output)

    @property
    def step(self) -> int:
        """Steps made so far."""
        return max(self.losses, default=0)


def end_of_others(ranks: Processes, lost: int, limit: float = END) -> float:
    """Waits until all ranks but one have ended with an error that names that one; the seconds."""
    began = time.monotonic()
    others = [process for rank, process in enumerate(ranks.all) if rank != lost]
    codes = Processes(others).wait(limit)
    seconds = time.monotonic() - began
    assert codes == [1] * len(others), ranks.outputs()
    for process in others:
        lines = [line for line in process.output.splitlines() if line.startswith("infini-ds rank")]
        assert len(lines) == 1, ranks.outputs()
        assert f"rank {lost}" in lines[0].partition(": ")[2], ranks.outputs()
    return seconds


def rank_of(group: int, rank: str) -> int:
    """The process of a rank in a process group."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(path.name)) != group:
                continue
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"no process of rank {rank}")
