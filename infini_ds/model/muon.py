"""Muon for the matrices of blocks, with AdamW for everything else."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from infini_ds.config import ModelConfig, OptimizerConfig, RunConfig
from infini_ds.model.optimizer import adamw


class Shard(NamedTuple):
    """One of the equal parts of a group's weights, laid end to end, that others hold the rest of.

    ZeRO cuts them so, and a matrix may begin in one part and end in another.
    """

    index: int
    """Number of the part, from 0."""
    sum_up: Callable[[Tensor], Any]
    """Sums up a tensor over the holders of all parts, in place; they call it together."""


def make_optimizer(
    groups: list[dict],
    config: RunConfig,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    shard: Shard | None = None,
) -> torch.optim.AdamW:
    """Makes the optimizer that the config names.

    Args:
        groups: see `parameter_groups`.
        named_parameters: at least all of the groups.
        shard: the part of each group that the optimizer will be given, if not all of it.
    """
    if config.optimizer.name == "adamw":
        return adamw(groups, config.optimizer)
    names = {parameter: name for name, parameter in named_parameters}
    for group in groups:
        if group["name"] == "weights":
            group["matrices"] = [
                matrix
                for weight in group["params"]
                for matrix in matrices_of(names[weight], weight, config.model)
            ]
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    return MuonAndAdamW(groups, config.optimizer, dtype, shard)


def matrices_of(name: str, weight: Tensor, model: ModelConfig) -> list[tuple[int, int]]:
    """Returns the shapes of the matrices that are one below the other in a projection's weight.

    Queries, keys and values are matrices of their own, and so are a feed-forward layer's gate and
    up projections: a Transformer trains better if Muon takes them apart (Jordan et al. 2024).
    """
    rows, columns = weight.shape
    parts = [rows]
    if name.endswith("qkv_proj.weight"):
        keys = model.kv_heads * model.head_dim
        parts = [rows - 2 * keys, keys, keys]
    elif name.endswith("gate_up_proj.weight"):
        parts = [rows // 2] * 2
    return [(part, columns) for part in parts]


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """Returns about U V^T of a matrix U S V^T, by Newton-Schulz steps (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    rows, columns = matrix.shape
    is_tall = rows > columns
    wide = matrix.T if is_tall else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if is_tall else wide


class MuonAndAdamW(torch.optim.AdamW):
    """Steps groups that have `matrices` with Muon (Jordan et al. 2024), and others with AdamW.

    Muon makes the momentum of each matrix orthogonal. Its update is scaled to the root mean square
    of AdamW's, so that both take the same learning rate and decay (Liu et al. 2025, arXiv
    2502.16982). It is torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but that always rounds
    to bf16: in fp32, layouts that sum gradients in another order would no longer agree to 1e-5.

    Holders of parts of a matrix sum up what is to be made orthogonal, where each has zeros in place
    of what others hold. Each then computes the whole matrix, as a single process does, and steps
    its part.

    Args:
        groups: `matrices` are the shapes [rows, columns] of what the group's weights hold, in
            order.
        dtype: type in which matrices are made orthogonal.
        shard: the part of each group that `step` finds, in one flat weight, if not all of it.
    """

    def __init__(
        self,
        groups: list[dict],
        config: OptimizerConfig,
        dtype: torch.dtype,
        shard: Shard | None = None,
    ):
        betas = config.beta1, config.beta2
        super().__init__(groups, betas=betas, eps=config.eps, fused=True)
        self._config, self._dtype, self._shard = config, dtype, shard

    def __setstate__(self, state: dict) -> None:
        """Leaves out what AdamW does for files of old versions, which expects a step in each
        state."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        """Makes one step. Weights that Muon steps must have gradients, which it overwrites."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if "matrices" not in group]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if "matrices" in group:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict) -> None:
        weights: list[Tensor] = group["params"]
        sizes = [weight.numel() for weight in weights]
        total = sum(sizes)
        first = self._shard.index * total if self._shard else 0
        starts = list(accumulate(sizes, initial=first))
        updates = [self._advance(weight, group) for weight in weights]
        end = 0
        for rows, columns in group["matrices"]:
            begin, end = end, end + rows * columns
            # There are several whole weights, or one that is a part of all.
            place = max(0, bisect_right(starts, begin, hi=len(weights)) - 1)
            low = max(begin, starts[place])
            high = max(low, min(end, starts[place + 1]))
            in_weight = slice(low - starts[place], high - starts[place])
            in_matrix = slice(low - begin, high - begin)
            update = updates[place][in_weight]
            if begin // total != (end - 1) // total:
                assert self._shard
                whole = update.new_zeros(rows * columns)
                whole[in_matrix] = update
                self._shard.sum_up(whole)
                update = whole
            if low < high:
                matrix = update.view(rows, columns).to(self._dtype)
                update = orthogonal(matrix, self._config.ns_steps).reshape(-1)[in_matrix]
                rate = group["lr"] * 0.2 * math.sqrt(max(rows, columns))
                weights[place].view(-1)[in_weight].add_(update, alpha=-rate)

    def _advance(self, weight: Tensor, group: dict) -> Tensor:
        """Advances a weight's momentum and lets the weight decay.

        The momentum has the name of AdamW's first moment, since the universal form of a checkpoint
        keeps no others.

        Returns:
            The momentum looked ahead (Nesterov's), flat, in the memory of the gradient.
        """
        state, beta = self.state[weight], self._config.momentum
        if not state:
            state["exp_avg"] = torch.zeros_like(weight)
        assert weight.grad is not None
        momentum = state["exp_avg"].lerp_(weight.grad, 1 - beta)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        return weight.grad.lerp_(momentum, beta).view(-1)
