"""Where a run's figures go: metrics.jsonl, TensorBoard, Weights & Biases, and what users add."""

import html
import importlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.tensorboard.writer import SummaryWriter

from infini_ds.config import RunConfig, WandbConfig
from infini_ds.errors import RunError, UserError
from infini_ds.system.whole_file import whole_file

_WRITES = "share of tokens that each layer writes"
_ANSWERS = "right answers in training"
_OVERVIEW = {
    "loss": "train/loss",
    "held-out bits per byte: with memory, ablated, frequencies": (
        "held_out(_without_memory|_unigram)?/bits_per_byte"
    ),
    _ANSWERS: "train/exact_match",
    "tokens a second": "speed/tokens_per_second",
    "seconds of a step": "seconds/(?!saving).*",
    _WRITES: "memory/write_mass/.*",
    "norm of each layer's memories": "memory/norm_of_block_.*",
}
"""What TensorBoard's page "custom scalars" shows first, by patterns of names."""


class Recorder:
    """Keeps a run's figures in one place; every method may stay as it is, and does nothing.

    Subclass it and name the class in `monitor.recorders`. Rank 0 makes one at each start of the
    run. If a method fails, the run says so once and goes on.

    Args:
        config: the run's config.
        step: the step that the run starts from; an earlier process may have recorded later ones,
            which the run makes again.
    """

    faults: tuple[type[Exception], ...] = (Exception,)
    """What may go wrong with it while the run goes on."""

    def __init__(self, config: RunConfig, step: int):
        pass

    def scalars(self, step: int, metrics: dict[str, float]) -> None:
        """Records numbers of a step, with names such as "train/loss"; some may not be finite."""

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Records the distribution of numbers."""

    def figure(self, step: int, name: str, figure: Figure) -> None:
        """Records a drawing."""

    def text(self, step: int, name: str, text: str, language: str) -> None:
        """Records a text in a language, such as "yaml" or "text"."""

    def go_back_to(self, step: int) -> None:
        """Notes that the run makes the steps after this one again."""

    def close(self) -> None:
        """Writes everything out."""


class JsonLines(Recorder):
    """The numbers of each step as a line of metrics.jsonl."""

    faults = (OSError,)

    def __init__(self, config: RunConfig, step: int):
        self._path = Path(config.output_dir) / "metrics.jsonl"
        self._open(step)

    def _open(self, step: int) -> None:
        _drop_steps_after(self._path, step)
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115

    def scalars(self, step: int, metrics: dict[str, float]) -> None:
        # JSON has no infinity.
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")

    def has_evaluation(self, step: int) -> bool:
        """Whether there is the evaluation of a step."""
        lines = map(json.loads, self._path.read_text().splitlines())
        return any(line["step"] == step and "memory/norm_of_block_000" in line for line in lines)

    def go_back_to(self, step: int) -> None:
        self._file.close()
        self._open(step)

    def close(self) -> None:
        self._file.close()


class TensorBoard(Recorder):
    """TensorBoard's event files in the run's directory."""

    faults = (OSError,)

    def __init__(self, config: RunConfig, step: int):
        self._directory = str(training_board(Path(config.output_dir)))
        has = {_WRITES: config.model.memory.write_gate, _ANSWERS: config.train.curriculum}
        self._overview = {
            chart: ["Multiline", [pattern]]
            for chart, pattern in _OVERVIEW.items()
            if has.get(chart, True)
        }
        self._open(step)

    def _open(self, step: int) -> None:
        self._board = SummaryWriter(self._directory, purge_step=step + 1)
        self._board.add_custom_scalars({"run": self._overview})

    def scalars(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        self._board.add_histogram(name, values, step)

    def figure(self, step: int, name: str, figure: Figure) -> None:
        self._board.add_figure(name, figure, step)

    def text(self, step: int, name: str, text: str, language: str) -> None:
        self._board.add_text(name, f"```{language}\n{text}\n```", step)

    def go_back_to(self, step: int) -> None:
        self._board.close()
        self._open(step)

    def close(self) -> None:
        self._board.close()


def training_board(output_dir: Path) -> Path:
    """Returns the directory of a run's events, beside those of evaluations; TensorBoard shows its
    name. Runs of earlier versions go on with theirs one level up."""
    boards = output_dir / "tensorboard"
    return boards if any(boards.glob("events.*")) else boards / "training"


class WeightsAndBiases(Recorder):
    """A run of Weights & Biases, which each start of ours resumes.

    Its own steps only grow, so figures are drawn over a number of their own, `step`; steps that are
    made again stand there twice.

    Raises:
        UserError: wandb is not installed, or does not let us begin.
    """

    def __init__(self, config: RunConfig, step: int):
        settings = config.monitor.wandb or WandbConfig()
        try:
            import wandb
        except ImportError:
            raise UserError(
                "monitor.wandb: needs the package wandb; `pip install infini-ds[wandb]`, or leave "
                "monitor.wandb out"
            ) from None
        self._wandb = wandb
        directory = Path(config.output_dir)
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity or None,
                mode=settings.mode,
                name=directory.name,
                id=_identity(directory / "wandb" / "id"),
                resume="allow",
                dir=str(directory),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off", finish_timeout=config.train.timeout / 2),
            )
        except wandb.Error as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"monitor.wandb ({settings.mode}): {first}") from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _log(self, step: int, name: str, value: Any) -> None:
        self._run.log({"step": step, name: value})

    def scalars(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        self._log(step, name, self._wandb.Histogram(values.flatten().tolist()))

    def figure(self, step: int, name: str, figure: Figure) -> None:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self._log(step, name, self._wandb.Image(np.asarray(canvas.buffer_rgba())))

    def text(self, step: int, name: str, text: str, language: str) -> None:
        self._log(step, name, self._wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False))

    def close(self) -> None:
        self._run.finish()


def open_recorders(config: RunConfig, step: int) -> list[Recorder]:
    """Opens metrics.jsonl, TensorBoard, and what `monitor` asks for.

    Args:
        step: the step that the run starts from.

    Raises:
        UserError: one of them cannot be opened.
    """
    kinds: list[type[Recorder]] = [JsonLines, TensorBoard]
    if config.monitor.wandb:
        kinds.append(WeightsAndBiases)
    kinds += [_named(name) for name in config.monitor.recorders]
    return [kind(config, step) for kind in kinds]


def _named(name: str) -> type[Recorder]:
    """Imports "package.module:Class"."""
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"monitor.recorders ({name}): {error}; it must be package.module:Class, which Python "
            "can import"
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, Recorder)):
        raise UserError(
            f"monitor.recorders ({name}) must name a subclass of infini_ds.training.recorders."
            "Recorder"
        )
    return kind


def _identity(path: Path) -> str:
    """Returns the run's name at Weights & Biases, the same at every start."""
    if path.exists():
        return path.read_text().strip()
    identity = os.urandom(6).hex()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, "output_dir", RunError) as file:
        file.write_text(identity)
    return identity


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
