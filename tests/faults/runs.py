"""Tiny fp32 runs that are going to be disturbed."""

import os
import time
from pathlib import Path

from infini_ds.runs import failures
from tests.distributed.conftest import Run
from tests.distributed.processes import Processes

WORKER = Path(__file__).with_name("worker.py")
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


class FaultyRun(Run):
    """A run whose ranks make the faults that `worker.py` knows."""

    def __init__(self, folder: Path, data, faults: str = "{}", **settings):
        super().__init__(folder, data, **{**FP32, **settings})
        self.faults = faults

    def script(self, *overrides: str) -> list[str]:
        if self.faults == "{}":
            return super().script(*overrides)
        return [str(WORKER), self.faults, str(self.config), *overrides]

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
