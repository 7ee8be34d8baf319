"""What rank 0 shows of a run, one live line, and hands on to the recorders of its figures."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.live import Live
from rich.text import Text

from infini_ds.config import RunConfig, dump
from infini_ds.errors import RunError
from infini_ds.evaluation.heat_map import Axis, heat_map
from infini_ds.system.causes import one_line
from infini_ds.system.console import Console, leave_to_the_caller
from infini_ds.training.recorders import JsonLines, Recorder, open_recorders

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
        config: the resolved config.
        step: the step that the run starts from; an earlier process's records of later steps are
            dropped.

    Raises:
        UserError: a recorder of `config.monitor` cannot be opened.
    """

    def __init__(self, config: RunConfig, step: int):
        self.console = _Shown()
        self._first_step, self._last_step, self._steps = step, step, config.train.steps
        self._began = time.monotonic()
        self._next_line = self._began
        self._timed_from: tuple[int, float] | None = None
        """Step and time that timing starts from: after a process's first step, which is slower."""
        self._has_said_how_long = False
        self._complained: set[Recorder] = set()
        self._recorders = open_recorders(config, step)
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        leave_to_the_caller()
        self.text(step, "config", dump(config), "yaml")

    def go_back_to(self, step: int) -> None:
        """Drops what was recorded after a step, because the run makes those steps again."""
        self._tell(lambda recorder: recorder.go_back_to(step))
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
        """Records a step's figures."""
        self._tell(lambda recorder: recorder.scalars(step, metrics))

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation of a step is on record."""
        lines = (each for each in self._recorders if isinstance(each, JsonLines))
        return any(each.has_evaluation(step) for each in lines)

    def say(self, message: str) -> None:
        """Prints a line that stays."""
        self.console.print(message)

    def gates(self, step: int, gates: np.ndarray) -> None:
        """Records the memory's share of every head, [layers, heads], as histogram and drawing."""
        layers, heads = (list(map(str, range(count))) for count in gates.shape)
        figure = heat_map(
            gates, Axis(layers, "layer"), Axis(heads, "head"), "percent read from the memory",
            colors="viridis",
        )  # fmt: skip
        self._tell(lambda recorder: recorder.histogram(step, "memory/gate", gates))
        name = "memory/gate_by_layer_and_head"
        self._tell(lambda recorder: recorder.figure(step, name, figure))

    def text(self, step: int, name: str, text: str, language: str = "text") -> None:
        """Records a text."""
        self._tell(lambda recorder: recorder.text(step, name, text, language))

    def close(self) -> None:
        """Prints how long the run took and writes everything out."""
        if self._live:
            self._live.stop()
        if self._last_step > self._first_step:
            taken = f"{self._last_step - self._first_step:,} steps"
            self.console.print(f"{taken} in {_duration(time.monotonic() - self._began)}")
        self._tell(lambda recorder: recorder.close())

    def _tell(self, record: Callable[[Recorder], None]) -> None:
        """Lets the run go on without figures that a recorder cannot take; warns of each once."""
        for recorder in self._recorders:
            try:
                record(recorder)
            except recorder.faults as error:
                if recorder not in self._complained:
                    self.console.print(
                        f"warning: {type(recorder).__name__}: figures cannot be recorded "
                        f"({one_line(error)}), and are missing from here on; the run goes on"
                    )
                self._complained.add(recorder)


def _roughly(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return "a minute" if seconds >= 45 else f"{math.ceil(seconds / 10) * 10} seconds"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
