"""The contract of an engine: all that trainer, evaluation and checkpoints know of it."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from infini_ds.data.windows import Windows
from infini_ds.parallel.lane_memory import LaneMemory

Reader = Callable[[int], Windows]
"""Gives this rank's windows of a micro-batch; asked where tokens or labels are needed."""

NOT_FINITE = "the loss or the gradient was not finite"
CORRUPT = "the store held tokens that its tokenizer does not have"


class StepSize(NamedTuple):
    """What the sums of a step are divided by: sizes of its whole global batch."""

    loss_weight: float
    """Sum of the weights of all losses: the number of valid tokens if each weighs 1."""
    tokens: int
    """Valid tokens."""


class StepResult(NamedTuple):
    """What a training step did; the same on all ranks, but for `seconds`."""

    loss_sum: float
    """Weighted sum of the losses of all lanes."""
    fault: str
    """Why the step changed no weight; empty if it did."""
    bad_lanes: Tensor
    """[lanes of the global batch] fp64: above 0 where tokens were corrupt."""
    right: float
    """Answers that were right, with a curriculum."""
    answers: float
    """All answers, with a curriculum."""
    stop: bool
    """Whether any rank was asked to stop."""
    gradient_norm: float
    """Norm of the whole gradient, before clipping."""
    learning_rates: dict[str, float]
    """By the names of the parameter groups of this rank."""
    seconds: dict[str, float]
    """Time by phase: pipeline, reduce, optimizer, and waiting_for_stages, a part of the first."""


class EngineLayout(NamedTuple):
    """How an engine has laid the work out."""

    pipeline: int
    """Stages."""
    data: int
    """Data-parallel ranks."""
    micro_batches: int
    """Micro-batches of a step, on each data-parallel rank."""
    stages: str
    """What each stage holds, in one line."""


class Engine(Protocol):
    """Trains a model on windows whose memories go on from step to step.

    All ranks call the same members in the same order, but for those that are said to need no other.
    """

    device: torch.device

    @property
    def layout(self) -> EngineLayout:
        """Needs no other rank."""
        ...

    @property
    def skipped_steps(self) -> int:
        """Steps so far that changed no weight. Needs no other rank."""
        ...

    @property
    def skipped_in_a_row(self) -> int:
        """Those since the last step that changed the weights. Needs no other rank."""
        ...

    @property
    def waiting_for(self) -> str:
        """What this rank waits for at this moment, and from whom; empty if it does not."""
        ...

    @property
    def reads_labels(self) -> bool:
        """Whether this rank computes losses. Needs no other rank."""
        ...

    def lanes_of(self, micro_batch: int) -> range:
        """The global lanes that this rank reads in a micro-batch. Needs no other rank."""
        ...

    def train_step(
        self, read: Reader, size: StepSize, rate_factor: float, stop: bool = False
    ) -> StepResult:
        """Forward, backward and optimizer step on one window of every lane.

        Args:
            read: windows of each micro-batch.
            size: of the step; the loss is the weighted sum over all valid tokens divided by
                its weight.
            rate_factor: of all learning rates.
            stop: whether this rank was asked to stop.
        """
        ...

    def skip_window(self, starts: Tensor) -> None:
        """Counts a step that reads nothing and changes no weight.

        Args:
            starts: bool [lanes of the global batch], where a document began in the window; its
                memory would be that of the lane's earlier document.
        """
        ...

    def empty_memories(self) -> LaneMemory:
        """Memories of lanes that have read nothing, for `evaluate_window`."""
        ...

    def evaluate_window(self, read: Reader, memories: LaneMemory) -> Tensor:
        """Sum of this rank's losses on one window of every lane, fp64: see `all_sum`."""
        ...

    def generate(
        self, prompt: list[int], max_new_tokens: int, temperature: float, seed: int
    ) -> list[int]:
        """Continues one prompt of at most a segment; the new tokens, the same on all ranks."""
        ...

    def written(self) -> Tensor:
        """What each layer wrote in the last step: mass and zeros of all lanes, [layers, 2]."""
        ...

    def describe_memory(self) -> tuple[np.ndarray, dict[int, float]]:
        """Gates of all layers [layers, heads], and the mean norm of each layer's memories."""
        ...

    def own_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """This rank's parameters, by their names in InfiniTransformer. Needs no other rank."""
        ...

    def save(self, directory: Path, step: int) -> None:
        """Writes weights, optimizer states and memories into the directory of a checkpoint."""
        ...

    def load(self, directory: Path, load_from: Path, state: dict[str, Any]) -> None:
        """Takes them from there: the memories from the checkpoint, the rest from `load_from`.

        Args:
            load_from: the checkpoint itself, or its universal form.
            state: what its state.json says.
        """
        ...

    def all_sum(self, values: Tensor) -> Tensor:
        """Sums a small tensor over all ranks, in place."""
        ...
