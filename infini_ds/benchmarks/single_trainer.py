"""Trains a model on one device in fp32, as the benchmarks do that compare trained models."""

import math

import torch
from torch import Tensor

from infini_ds.config import RunConfig
from infini_ds.model.muon import make_optimizer
from infini_ds.model.optimizer import (
    learning_rate_factor,
    parameter_groups,
    set_learning_rate,
    write_penalty_factor,
)
from infini_ds.model.trained import is_trained
from infini_ds.model.transformer import InfiniTransformer
from infini_ds.model.write_gate import WriteStats, write_penalty


class SingleTrainer:
    """A model with its initial weights, and the optimizer that changes them.

    Args:
        config: settings of the model, the optimizer and train.steps, with the seed of the weights.
    """

    def __init__(self, config: RunConfig):
        self._config = config
        self.model = InfiniTransformer(
            config.model, config.seed, config.train.activation_checkpointing
        )
        named = list(self.model.named_parameters())
        for name, parameter in named:
            parameter.requires_grad_(is_trained(name, config.optimizer.train))
        groups = parameter_groups(named, config.optimizer)
        self._optimizer = make_optimizer(groups, config, named)
        self._step = 0
        self.skipped = 0
        """Steps that changed nothing, since their gradient was not finite."""

    def step(self, loss: Tensor, writes: list[WriteStats], tokens: int) -> bool:
        """Makes a step down the gradient of a loss and the write penalty.

        Args:
            writes: statistics of what each layer wrote, see `InfiniTransformer.read_window`.
            tokens: number of valid tokens of the step.

        Returns:
            Whether the gradient was finite; otherwise the weights stay as they are.
        """
        config = self._config
        factor = learning_rate_factor(self._step, config.train.steps, config.optimizer)
        set_learning_rate(self._optimizer, factor)
        factor = write_penalty_factor(self._step, config.optimizer)
        self._step += 1
        mass = sum((stats.mass for stats in writes), start=torch.zeros(()))
        penalty = write_penalty(config.model.memory, mass, tokens * config.model.kv_heads)
        self._optimizer.zero_grad()
        (loss + factor * penalty).backward()
        limit = config.optimizer.gradient_clipping or math.inf
        finite = bool(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).isfinite())
        if finite:
            self._optimizer.step()
        else:
            self.skipped += 1
        return finite
