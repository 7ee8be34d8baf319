"""The two engines: pipelines of any length with ZeRO 0 or 1, and one stage with ZeRO-2 or 3."""

from collections.abc import Callable
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import comm
from torch import Tensor, nn

from infini_ds.config import RunConfig
from infini_ds.model.muon import Shard, make_optimizer
from infini_ds.model.optimizer import adamw, parameter_groups
from infini_ds.parallel.deepspeed.engine import CorrectedEngine
from infini_ds.parallel.deepspeed.operators import CpuAdam
from infini_ds.parallel.deepspeed.zero import ZeroStates
from infini_ds.parallel.pipeline.engine import InfiniEngine
from infini_ds.parallel.pipeline.module import InfiniPipeline
from infini_ds.parallel.sharded import ShardedModel
from infini_ds.system.compute_type import DTYPES


class PipelinedEngine(InfiniEngine, CorrectedEngine):
    """Trains an InfiniPipeline."""

    def from_last(self, value: Tensor) -> Tensor:
        """See `InfiniEngine`."""
        if not self.part.is_alone:
            last = self.grid.stage_to_global(self.num_stages - 1)
            dist.broadcast(value, last, group=self.grid.get_pipe_parallel_group())
        return value


class ShardedEngine(InfiniEngine, ZeroStates):
    """Trains a ShardedModel."""


def pipelined(
    config: RunConfig, stages: int, tree: dict, on_progress: Callable[[str], None]
) -> PipelinedEngine:
    module = InfiniPipeline(
        config.model, stages, config.seed, config.train.activation_checkpointing
    )
    module.choose_trained(config.optimizer)
    for block in module.blocks:
        block.compiled = config.train.compile
    groups = parameter_groups(module.own_parameters(), config.optimizer, module.frozen)
    if config.parallel.offload_optimizer:
        optimizer = _cpu_adam(groups, config)
    else:
        shard = None
        if config.parallel.zero_stage:
            sharing = module.mpu().get_data_parallel_group()
            shard = Shard(comm.get_rank(sharing), partial(comm.all_reduce, group=sharing))
        optimizer = make_optimizer(groups, config, module.own_parameters(), shard)
    return PipelinedEngine(module, optimizer, tree, config, on_progress)


def sharded(config: RunConfig, tree: dict, on_progress: Callable[[str], None]) -> ShardedEngine:
    dtype = DTYPES[config.train.dtype]  # type: ignore[index]  # the start has chosen one
    first: list[nn.Parameter] = []

    def share_out(layer: nn.Module) -> None:
        if config.parallel.zero_stage != 3:
            return
        if first:  # all weights on a disk must have the same buffers
            share = first[0].convert_to_zero_parameters  # type: ignore[attr-defined]
            share(param_list=list(layer.to(dtype).parameters()))
        else:
            deepspeed.zero.Init(layer.to(dtype), config_dict_or_path=tree)
            first.extend(layer.parameters())

    module = ShardedModel(
        config.model, config.seed, config.train.activation_checkpointing, share_out
    )
    module.choose_trained(config.optimizer.train)
    for block in module.blocks:
        block.compiled = config.train.compile
    groups = parameter_groups(module.own_parameters(), config.optimizer)
    offloaded = config.parallel.offload_optimizer
    optimizer = _cpu_adam(groups, config) if offloaded else adamw(groups, config.optimizer)
    return ShardedEngine(module, optimizer, tree, config, on_progress)


def _cpu_adam(groups: list[dict], config: RunConfig) -> torch.optim.Optimizer:
    betas = config.optimizer.beta1, config.optimizer.beta2
    return CpuAdam(groups, betas=betas, eps=config.optimizer.eps)
