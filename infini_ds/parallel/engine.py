"""The contract of an engine: everything that trainer, evaluation and checkpoints know about it."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from infini_ds.data.windows import Windows
from infini_ds.parallel.lane_memory import LaneMemory

WindowsOf = Callable[[int], Windows]
"""Returns this rank's windows of a micro-batch; called where tokens or labels are needed."""

NOT_FINITE = "the loss or the gradient was not finite"
CORRUPT = "the store held tokens that its tokenizer does not have"


class StepSize(NamedTuple):
    """The divisors of a step's sums, taken over its whole global batch."""

    loss_weight: float
    """Sum of the weights of all losses: the number of valid tokens if each weighs 1."""
    tokens: int
    """Number of valid tokens."""


class StepResult(NamedTuple):
    """The outcome of a training step; the same on all ranks except for `seconds`."""

    loss_sum: float
    """Weighted sum of the losses of all lanes."""
    fault: str
    """Why the step changed no weight; empty if it did."""
    bad_lanes: Tensor
    """[lanes of the global batch] fp64: above 0 where tokens were corrupt."""
    right: float
    """Number of correct answers, if there is a curriculum."""
    answers: float
    """Number of all answers, if there is a curriculum."""
    stop: bool
    """Whether any rank was asked to stop."""
    gradient_norm: float
    """Norm of the whole gradient before clipping."""
    learning_rates: dict[str, float]
    """Learning rates by the names of this rank's parameter groups."""
    seconds: dict[str, float]
    """Time by phase: pipeline, reduce and optimizer; waiting_for_stages and, if ranks share
    windows, waiting_for_context are parts of the first."""


class EngineLayout(NamedTuple):
    """How an engine has divided the work."""

    pipeline: int
    """Number of stages."""
    data: int
    """Number of data-parallel ranks."""
    micro_batches: int
    """Micro-batches of a step on each data-parallel rank."""
    stages: str
    """One line that says what each stage holds."""


class Engine(Protocol):
    """Trains a model on windows whose memories are handed on from step to step.

    All ranks call the same members in the same order, except members documented as local.
    """

    device: torch.device

    @property
    def layout(self) -> EngineLayout:
        """How the work is divided. Local."""
        ...

    @property
    def skipped_steps(self) -> int:
        """Number of steps so far that changed no weight. Local."""
        ...

    @property
    def skipped_in_a_row(self) -> int:
        """Number of steps since the last one that changed the weights. Local."""
        ...

    @property
    def waiting_for(self) -> str:
        """The message this rank is waiting for at the moment, and its sender; empty if none."""
        ...

    @property
    def counts_labels(self) -> bool:
        """Whether it is this rank, of all that read a lane, that counts its labels. Local."""
        ...

    def lanes_of(self, micro_batch: int) -> range:
        """Returns the global lanes that this rank reads in a micro-batch, alone or with the ranks
        that share their windows. Local."""
        ...

    def train_step(
        self,
        read: WindowsOf,
        size: StepSize,
        rate_factor: float,
        penalty_factor: float = 1.0,
        stop: bool = False,
    ) -> StepResult:
        """Runs forward, backward and the optimizer step on one window of every lane.

        Args:
            read: returns the windows of each micro-batch.
            size: divisors of the step; the loss is the weighted sum over all valid tokens divided
                by their total weight.
            rate_factor: factor applied to all learning rates.
            penalty_factor: factor applied to the write penalty.
            stop: whether this rank was asked to stop.
        """
        ...

    def skip_window(self, starts: Tensor) -> None:
        """Counts a step that reads nothing and changes no weight.

        Args:
            starts: bool [lanes of the global batch], true where a document began in the window; the
                lane's memory is cleared there, since it belongs to an earlier document.
        """
        ...

    def empty_memories(self) -> LaneMemory:
        """Returns the memories of lanes that have read nothing, for `evaluate_window`."""
        ...

    def evaluate_window(
        self, read: WindowsOf, memories: LaneMemory, ablated: bool = False
    ) -> Tensor:
        """Sums this rank's losses on one window of every lane, in fp64; see `all_sum`.

        Args:
            ablated: whether no token reads the memory, see `block.memory_ablated`.
        """
        ...

    def generate(
        self, prompt: list[int], max_new_tokens: int, temperature: float, seed: int
    ) -> list[int]:
        """Continues one prompt of at most a segment; returns the same new tokens on all ranks."""
        ...

    def written(self) -> Tensor:
        """Mass and zeros that each layer wrote in the last step, over all lanes: [layers, 2]."""
        ...

    def describe_memory(self) -> tuple[np.ndarray, dict[int, float]]:
        """Returns the gates [layers, heads], and the mean norm of each layer's memories."""
        ...

    def own_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Yields this rank's parameters by their names in InfiniTransformer. Local."""
        ...

    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets a parameter, and the fp32 copy that the optimizer keeps of it. Local.

        Args:
            parameter: one of `own_parameters`.
            value: the whole weight in fp32, also if this rank holds a part of it.
        """
        ...

    def save(self, directory: Path, step: int) -> None:
        """Writes weights, optimizer states and memories into a checkpoint's directory."""
        ...

    def keep(self, directory: Path, step: int) -> Callable[[], list[str]]:
        """Copies what `save` would write into host memory. The returned function, which may run in
        another thread, writes this rank's part and returns the paths of its files."""
        ...

    def load(self, directory: Path, load_from: Path, state: dict[str, Any]) -> None:
        """Loads the memories from `directory` and everything else from `load_from`.

        Args:
            load_from: the checkpoint itself, or its universal form.
            state: the contents of its state.json.
        """
        ...

    def all_sum(self, values: Tensor) -> Tensor:
        """Sums a small tensor over all ranks, in place."""
        ...
