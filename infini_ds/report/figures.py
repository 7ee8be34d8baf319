"""Collects what is known of a run, from its files alone."""

import base64
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infini_ds.cluster import status
from infini_ds.errors import UserError
from infini_ds.inspection.weights import gates, is_gate
from infini_ds.runs import failures
from infini_ds.runs.directory import TASKS
from infini_ds.runs.export import open_model
from infini_ds.system.figures import read_figures
from infini_ds.training.recorders import training_board

_MOST_POINTS = 1500
"""A longer curve is shown by means of neighbouring steps."""
_PICTURES = {
    "passkey.png": "Pass keys found, by length of the document and depth of the key",
    "babilong.png": "Questions about facts in long text, by task and length",
    "evaluation.png": "Bits per byte by position in the document",
    "recall.png": "Pairs of keys and values recalled",
}
"""What other commands draw into a run's directory."""


class Curve(NamedTuple):
    """A figure over steps."""

    steps: list[float]
    values: list[float]


class RunFigures(NamedTuple):
    """What a page about a run shows."""

    status: dict[str, Any]
    """See `status.figures_of`."""
    curves: dict[str, Curve]
    """By their names in metrics.jsonl."""
    gates: list[list[float]]
    """The memory's share in every head of the newest checkpoint, [layers][heads]; may be empty."""
    sample: str
    """The newest sample text; empty if there is none."""
    pictures: dict[str, str]
    """Pictures as data URLs, by their captions."""
    tasks: dict[str, Any]
    """The newest evaluation on tasks; may be empty."""
    faults: list[dict[str, Any]]
    """What ended ranks, see `failures.read`."""
    config: str
    """The resolved config."""


def collect(directory: Path) -> RunFigures:
    """Reads a run's files; what is not there, or cannot be read, is left out.

    Raises:
        UserError: the directory is not a run's.
    """
    try:
        known = status.figures_of(directory)
        config = (directory / "config.yaml").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"report {error.filename}: cannot be read ({error.strerror})") from None
    except UserError as error:
        raise UserError(str(error).replace("status ", "report ", 1)) from None
    return RunFigures(
        known,
        _curves(directory / "metrics.jsonl"),
        _gates(directory),
        _sample(training_board(directory)),
        _pictures(directory),
        read_figures(directory / TASKS),
        failures.read(directory),
        config,
    )


def _curves(path: Path) -> dict[str, Curve]:
    found: dict[str, Curve] = {}
    for line in _lines(path):
        step = line.pop("step", None)
        if not isinstance(step, int):
            continue
        for name, value in line.items():
            if isinstance(value, int | float):
                curve = found.setdefault(name, Curve([], []))
                curve.steps.append(step)
                curve.values.append(value)
    return {name: thinned(curve) for name, curve in found.items()}


def thinned(curve: Curve, most: int = _MOST_POINTS) -> Curve:
    """Returns at most so many points, each the mean of as many neighbours."""
    size = -(-len(curve.steps) // most)
    if size <= 1:
        return curve
    places = range(0, len(curve.steps), size)
    return Curve(*([_mean(part[i : i + size]) for i in places] for part in curve))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):  # the last line may be cut off
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found


def _gates(directory: Path) -> list[list[float]]:
    try:
        weights = open_model(directory).weights
        return gates({name: weights.read(name) for name in weights.metas if is_gate(name)})
    except (UserError, OSError, ValueError, SafetensorError):  # there is no checkpoint yet
        return []


def _sample(board: Path) -> str:
    if not board.is_dir():
        return ""
    events = EventAccumulator(str(board), size_guidance={"tensors": 0})
    events.Reload()
    if "sample/text_summary" not in events.Tags()["tensors"]:
        return ""
    text = events.Tensors("sample/text_summary")[-1].tensor_proto.string_val[0].decode()
    return text.removeprefix("```text\n").removesuffix("\n```")


def _pictures(directory: Path) -> dict[str, str]:
    found = {}
    for name, caption in _PICTURES.items():
        with contextlib.suppress(OSError):
            encoded = base64.b64encode((directory / name).read_bytes()).decode()
            found[caption] = f"data:image/png;base64,{encoded}"
    return found
