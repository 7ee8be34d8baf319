"""Everything that rank 0 shows and writes: one live line, metrics.jsonl, TensorBoard."""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.live import Live
from rich.text import Text
from torch.utils.tensorboard.writer import SummaryWriter

from infini_ds.errors import RunError
from infini_ds.system.console import Console, leave_to_the_caller

_SECONDS_BETWEEN_LINES = 10.0
_TIMED_STEPS, _TIMED_SECONDS = 3, 5.0
"""The remaining time is estimated only after this many steps and seconds."""


class _Shown(Console):
    """A console that goes silent, instead of ending the run, on a full disk or closed terminal."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except RunError:
            self.on_broken_pipe()

    def __exit__(self, *error: Any) -> None:
        try:  # the live line writes its content here
            super().__exit__(*error)
        except OSError:
            self.on_broken_pipe()


class Monitor:
    """Shows and records the progress of one run, on rank 0 only.

    Args:
        output_dir: the run's directory.
        step: the step that the run starts from; an earlier process's records of later steps are
            dropped.
        steps: the step at which the run ends.
        config: the resolved config as text.
    """

    def __init__(self, output_dir: Path, step: int, steps: int, config: str):
        self.console = _Shown()
        self._first_step, self._last_step, self._steps = step, step, steps
        self._began = time.monotonic()
        self._next_line = self._began
        self._timed_from: tuple[int, float] | None = None
        """Step and time that timing starts from: after a process's first step, which is slower."""
        self._has_said_how_long = False
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        output_dir.mkdir(parents=True, exist_ok=True)
        self._output_dir = output_dir
        self._complained = False
        leave_to_the_caller()
        self._open(step)
        self.text(step, "config", config, "yaml")

    def _open(self, step: int) -> None:
        path = self._output_dir / "metrics.jsonl"
        _drop_steps_after(path, step)
        self._metrics = open(path, "a", buffering=1)  # noqa: SIM115
        self._board = SummaryWriter(str(self._output_dir / "tensorboard"), purge_step=step + 1)

    def go_back_to(self, step: int) -> None:
        """Drops what was written after a step, because the run makes those steps again."""
        self._metrics.close()
        self._board.close()
        self._open(step)
        self._timed_from = step, time.monotonic()

    def step(self, step: int, metrics: dict[str, Any], log: bool) -> None:
        """Records one step; `metrics` are flat, with TensorBoard's names, such as "train/loss"."""
        self._last_step = step
        if log:
            self.record(step, metrics)
        now = time.monotonic()
        left = self._seconds_left(step, now)
        line = (
            f"step {step}/{self._steps}  loss {metrics['train/loss']:.4f}  "
            f"{metrics['speed/tokens_per_second']:,.0f} tokens/s  "
            f"{metrics['speed/useful_tokens']:.0%} useful  {_duration(left)} left"
        )
        if metrics["train/skipped_steps"]:
            line += f"  {metrics['train/skipped_steps']:.0f} steps skipped"
        if metrics["train/rollbacks"]:
            line += f"  {metrics['train/rollbacks']:.0f} rollbacks"
        if self._live:
            self._live.update(Text(line), refresh=True)
        elif now >= self._next_line or step == self._steps:
            self.console.print(line)
            self._next_line = now + _SECONDS_BETWEEN_LINES

    def _seconds_left(self, step: int, now: float) -> float:
        """Estimates from the timed steps; prints the estimate once, when there are enough."""
        if self._timed_from is None:
            self._timed_from = step, now
            return (now - self._began) * (self._steps - step)
        first, begin = self._timed_from
        left = (now - begin) / (step - first) * (self._steps - step)
        enough = step - first >= _TIMED_STEPS and now - begin >= _TIMED_SECONDS
        if enough and left and not self._has_said_how_long:
            self._has_said_how_long = True
            self.say(
                f"about {_roughly(left)} on this machine for the {self._steps - step:,} steps left"
            )
        return left

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes a step's figures to metrics.jsonl and TensorBoard."""
        # JSON has no infinity.
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        with self._writing():
            self._metrics.write(json.dumps({"step": step, **finite}) + "\n")
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def has_evaluation(self, step: int) -> bool:
        """Whether metrics.jsonl has the evaluation of a step."""
        lines = map(json.loads, (self._output_dir / "metrics.jsonl").read_text().splitlines())
        return any(line["step"] == step and "memory/norm_of_block_000" in line for line in lines)

    def say(self, message: str) -> None:
        """Prints a line that stays."""
        self.console.print(message)

    def gates(self, step: int, gates: np.ndarray) -> None:
        """Records the memory's share of every head, [layers, heads], as histogram and image."""
        pixels = np.kron(gates, np.ones((16, 16)))[None]
        with self._writing():
            self._board.add_histogram("memory/gate", gates, step)
            self._board.add_image("memory/gate_by_layer_and_head", pixels, step)

    def text(self, step: int, name: str, text: str, language: str = "text") -> None:
        """Writes text to TensorBoard."""
        with self._writing():
            self._board.add_text(name, f"```{language}\n{text}\n```", step)

    def close(self) -> None:
        """Prints how long the run took and writes everything out."""
        if self._live:
            self._live.stop()
        if self._last_step > self._first_step:
            taken = f"{self._last_step - self._first_step:,} steps"
            self.console.print(f"{taken} in {_duration(time.monotonic() - self._began)}")
        with self._writing():
            self._metrics.close()
            self._board.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Lets a run go on without its figures where they cannot be written; warns once."""
        try:
            yield
        except OSError as error:
            if not self._complained:
                self.console.print(
                    f"warning: {self._output_dir}: figures cannot be written ({error.strerror}), "
                    "and are missing from here on; the run goes on"
                )
            self._complained = True


def _drop_steps_after(path: Path, step: int) -> None:
    """Drops the steps after `step`, which a killed process made after its last save."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # the line was cut off
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)


def _roughly(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return "a minute" if seconds >= 45 else f"{math.ceil(seconds / 10) * 10} seconds"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
