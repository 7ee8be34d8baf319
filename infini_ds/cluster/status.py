"""`infini-ds status`: shows how a run is doing from the ends of its files alone, without torch."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from infini_ds import config as configuration
from infini_ds.cluster.tail import lines_backwards
from infini_ds.config import RunConfig
from infini_ds.errors import UserError
from infini_ds.runs import failures, manifest
from infini_ds.runs.directory import Depth, RunDirectory
from infini_ds.system.console import Console
from infini_ds.system.figures import write_figures

_AVERAGED_STEPS = 20
_READ_AT_MOST = 64 << 20


def run(directory: str, json_path: str | None) -> None:
    """Prints a table, and writes the same figures to a file if asked to.

    Raises:
        UserError: the directory is not a run's, or cannot be read.
    """
    try:
        figures = figures_of(Path(directory))
    except OSError as error:
        raise UserError(f"status {error.filename}: cannot be read ({error.strerror})") from None
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # the last error may be long
    for name, text in _rows(figures):
        table.add_row(name, text)
    Console(must_be_read=True).print(table)
    write_figures(json_path, figures)


def figures_of(directory: Path) -> dict[str, Any]:
    """Returns all figures of a run; a figure that does not exist yet is None.

    Speeds are means over the last steps in metrics.jsonl. Ages are in seconds by this host's clock.
    "state" is one of
        "finished": train.steps have been made and reported;
        "failed": an error is on record, and nothing was written after it;
        "running": something was written recently, compared to the time of a step;
        "stopped": nothing was written recently, and the last step is in a valid checkpoint;
        "perhaps dead": nothing was written recently; a long evaluation looks the same.

    Raises:
        UserError: the directory is not a run's.
        OSError: a file in it cannot be read.
    """
    metrics = directory / "metrics.jsonl"
    failure = _last_failure(directory / failures.NAME)
    if not metrics.is_file() or not (directory / "config.yaml").is_file():
        why = f"the run did not start: {failure['message']}" if failure else "is no run"
        raise UserError(f"status {directory}: {why}; name the output_dir of a run")
    config = configuration.load_resolved(directory / "config.yaml")
    steps, evaluation = _last_lines(metrics)
    last = steps[0] if steps else {}
    saved = _last_checkpoint(directory)
    step = last.get("step") or (saved["step"] if saved else 0)
    seconds = _mean(steps, "seconds/step")
    state = _state(directory, config, step, seconds, saved)
    left = None
    if state == "running" and seconds is not None:
        left = (config.train.steps - step) * seconds
    return {
        "run": str(directory),
        "state": state,
        "step": step,
        "steps": config.train.steps,
        "loss": _number(last, "train/loss"),
        "held_out_bits_per_byte": _number(evaluation, "held_out/bits_per_byte"),
        "held_out_step": evaluation.get("step"),
        "tokens_per_second": _mean(steps, "speed/tokens_per_second"),
        "tokens": _number(last, "train/tokens"),
        "seconds_left": left,
        "age": _age(metrics),
        "checkpoint": saved,
        "skipped_steps": _number(last, "train/skipped_steps"),
        "last_error": failure,
    }


def _last_lines(path: Path) -> tuple[list[dict], dict]:
    """Returns the last training steps, newest first, and the last evaluation."""
    steps: list[dict] = []
    evaluation: dict = {}
    for line in lines_backwards(path, _READ_AT_MOST):
        is_step = b'"train/loss"' in line and len(steps) < _AVERAGED_STEPS
        if is_step or (b'"held_out/bits_per_byte"' in line and not evaluation):
            found = _object(line)
            if not isinstance(found.get("step"), int):
                continue  # the line is being written, or is damaged
            if is_step:
                steps.append(found)
            else:
                evaluation = found
        if len(steps) == _AVERAGED_STEPS and evaluation:
            break
    return steps, evaluation


def _last_failure(path: Path) -> dict[str, Any] | None:
    """Returns the last recorded error that ended a rank, if the record is intact."""
    known = {"time", "rank", "host", "step", "message"}
    if not path.is_file():
        return None
    records = map(_object, lines_backwards(path, _READ_AT_MOST))
    return next((record for record in records if known <= record.keys()), None)


def _object(text: str | bytes) -> dict[str, Any]:
    """Parses a JSON object; {} if the text is not one."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _number(line: dict[str, Any], name: str) -> Any:
    return line[name] if isinstance(line.get(name), int | float) else None


def _mean(lines: list[dict], name: str) -> float | None:
    """Averages a figure over the lines that have it."""
    numbers = [line[name] for line in lines if _number(line, name) is not None]
    return fmean(numbers) if numbers else None


def _last_checkpoint(directory: Path) -> dict[str, Any] | None:
    """Describes the newest checkpoint that its manifest calls complete, without checksums."""
    run = RunDirectory(directory)
    if run.checkpoints_path.exists():
        os.scandir(run.checkpoints_path).close()  # an unreadable directory must not look empty
    for saved in run.checkpoints():
        with contextlib.suppress(OSError):  # the checkpoint is being deleted
            if not saved.problem(Depth.SIZES):
                age = _age(saved.path / manifest.NAME)
                return {"step": saved.step, "path": str(saved.path), "age": age}
    return None


def _state(
    directory: Path, config: RunConfig, step: int, seconds: float | None, saved: dict | None
) -> str:
    metrics = directory / "metrics.jsonl"
    if RunDirectory(directory).reported_step() == config.train.steps:
        return "finished"
    record = directory / failures.NAME
    if record.exists() and record.stat().st_mtime >= metrics.stat().st_mtime:
        return "failed"
    being_saved = RunDirectory(directory).checkpoints()[:1]
    quiet = min(_age(path) for path in (metrics, *(saved.path for saved in being_saved)))
    limit = config.train.timeout
    if seconds is not None:
        limit = 60 + 10 * seconds * config.train.log_every
    if quiet <= limit:
        return "running"
    return "stopped" if saved and saved["step"] == step else "perhaps dead"


def _age(path: Path) -> float:
    return max(time.time() - path.stat().st_mtime, 0.0)


def _rows(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "run", figures["run"]
    yield "state", f"{figures['state']}, written {_duration(figures['age'])} ago"
    yield "step", f"{figures['step']:,} of {figures['steps']:,}"
    yield "loss", _text(figures["loss"], ".4f")
    held_out = _text(figures["held_out_bits_per_byte"], ".4f")
    if figures["held_out_step"] is not None:
        held_out += f" at step {figures['held_out_step']:,}"
    yield "held-out bits per byte", held_out
    yield "tokens/s", _text(figures["tokens_per_second"], ",.0f")
    yield "tokens", _text(figures["tokens"], ",")
    left = figures["seconds_left"]
    yield "time left", "-" if left is None else _duration(left)
    saved = figures["checkpoint"]
    yield (
        "valid checkpoint",
        f"step {saved['step']:,}, {_duration(saved['age'])} ago" if saved else "-",
    )
    yield "skipped steps", _text(figures["skipped_steps"], ",")
    error = figures["last_error"]
    if error:
        yield (
            "last error",
            (
                f"{error['time']} rank {error['rank']} on {error['host']}, step {error['step']}: "
                f"{error['message']}"
            ),
        )


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
