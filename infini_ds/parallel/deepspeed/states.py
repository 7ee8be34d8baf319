"""What both engines need of DeepSpeed, which alone differs between them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class States(ABC):
    """Weights, gradients and optimizer states in DeepSpeed's hands.

    Args:
        module: this rank's part of the model.
        tree: DeepSpeed's config; see `deepspeed_config`.
        timeout: how long a rank waits for others in DeepSpeed's collective calls, in seconds.
    """

    module: Any
    optimizer: Any
    device: torch.device
    global_rank: int
    dp_world_size: int
    micro_batches: int
    """Micro-batches of a step on each data-parallel rank."""
    stage_id: int
    num_stages: int
    skipped_steps: int
    """Number of steps so far that changed no weight."""

    def __init__(self, module: Any, optimizer: torch.optim.Optimizer, tree: dict, timeout: float):
        raise NotImplementedError

    @property
    @abstractmethod
    def replica(self) -> int:
        """This rank's index among the data-parallel ranks of its stage."""

    @abstractmethod
    def ranks_along(self, axis: str) -> list[list[int]]:
        """Returns all groups of ranks that differ along an axis, `pipe` or `data`, alone."""

    @abstractmethod
    def whole(self, module: nn.Module) -> AbstractContextManager:
        """Lends this rank the whole weights of a layer; all ranks must enter it together."""

    @abstractmethod
    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """See `Engine`."""

    @property
    @abstractmethod
    def gradient_norm(self) -> float:
        """Norm of the whole gradient of the last step, before clipping."""

    @abstractmethod
    def accumulate(self, tensors: list[Tensor], gradients: list[Tensor], last: bool) -> None:
        """Runs one backward pass over all outputs of a unit and adds the gradients to the sums.

        Args:
            last: whether no other unit of the step follows.
        """

    @abstractmethod
    def gradients_are_finite(self) -> bool:
        """Returns whether this rank's gradients are finite; true if `step_optimizer` tells."""

    @abstractmethod
    def reduce_gradients(self) -> None:
        """Reduces gradients over ranks, unless that is done already."""

    @abstractmethod
    def step_optimizer(self) -> bool:
        """Updates the weights; returns whether they changed."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Ends a step that changes no weight."""

    @abstractmethod
    def count_skipped(self) -> None:
        """Counts a step that changed no weight."""

    @abstractmethod
    def save_states(self, directory: Path, step: int) -> None:
        """Writes weights and optimizer states into a checkpoint's directory."""

    @abstractmethod
    def keep_states(self, directory: Path, step: int) -> Callable[[], list[str]]:
        """Copies what `save_states` would write; the returned function writes it, and returns the
        paths of its files."""

    @abstractmethod
    def load_states(
        self, load_from: Path, checkpoint: Path, frozen: dict[str, nn.Parameter]
    ) -> None:
        """Loads weights and optimizer states.

        Groups keep their settings, such as learning rates, as the config has them.

        Args:
            load_from: the checkpoint, or its universal form.
            checkpoint: the checkpoint itself.
            frozen: parameters that are not trained, by their names in InfiniTransformer.

        Raises:
            RunError: they could not be loaded.
        """
