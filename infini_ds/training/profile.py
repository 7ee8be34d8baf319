"""Traces a few steps of a run on every rank, for Perfetto and for people."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from infini_ds.config import ProfileConfig
from infini_ds.system.causes import one_line

_DEAREST = 10
_MEMORY_EVENTS = 200_000
"""The most allocations that a memory snapshot has; it keeps the latest."""


class Profile:
    """Records the steps from `config.steps[0]` to `config.steps[1]`, and nothing outside of them.

    Writes into `directory`, for each rank: the trace, the dearest operations as a table and, on
    CUDA, a snapshot of the memory for https://pytorch.org/memory_viz.

    Args:
        config: None records nothing.
        say: gets a line once everything is written.
    """

    def __init__(
        self,
        config: ProfileConfig | None,
        directory: Path,
        rank: int,
        device: torch.device,
        say: Callable[[str], None],
    ):
        self._config, self._directory, self._rank = config, directory, rank
        self._cuda, self._say = device.type == "cuda", say
        self._running: profile | None = None
        self._first = 0

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Surrounds one step of the run."""
        if self._config is None:
            yield
            return
        first, last = self._config.steps
        if first <= step <= last and self._running is None:
            self._start(step)
        yield
        if step >= last:
            self.finish(step)

    def _start(self, step: int) -> None:
        self._first = step
        activities = [ProfilerActivity.CPU]
        if self._cuda:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._running = profile(activities=activities)
        self._running.start()

    def finish(self, step: int) -> None:
        """Writes what has been recorded up to this step, if anything has."""
        running, self._running = self._running, None
        if running is None:
            return
        running.stop()
        name = f"steps_{self._first}_to_{step}_rank_{self._rank:03d}"
        try:
            self._write(running, self._directory / name)
        except (OSError, RuntimeError) as error:  # a full disk must not end the run
            self._say(f"warning: {self._directory}: no traces ({one_line(error)}); the run goes on")
            return
        self._say(
            f"steps {self._first} to {step}: traces of all ranks in {self._directory}, for "
            "https://ui.perfetto.dev, with the dearest operations as tables"
        )

    def _write(self, recorded: profile, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(f"{path}.trace.json.gz")
        if self._cuda:
            torch.cuda.memory._dump_snapshot(f"{path}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        order = "self_cuda_time_total" if self._cuda else "self_cpu_time_total"
        table = recorded.key_averages().table(
            sort_by=order, row_limit=_DEAREST, max_name_column_width=60
        )
        Path(f"{path}.operations.txt").write_text(table)
