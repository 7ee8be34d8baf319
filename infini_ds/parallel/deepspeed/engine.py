"""DeepSpeed's pipeline engine, put right: the only file that knows the private parts of it."""

import contextlib
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.constants import BFLOAT16
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.utils import get_global_norm_of_tensors
from deepspeed.utils.timer import NoopTimer
from torch import Tensor
from torch.distributed import distributed_c10d

from infini_ds.errors import RunError
from infini_ds.parallel.deepspeed.gradient_sums import gradient_of, sum_in_fp32
from infini_ds.parallel.deepspeed.module import StageModule
from infini_ds.parallel.deepspeed.universal import (
    UNIVERSAL_INFO,
    allow_empty_shards,
    plain_path,
)


class CorrectedEngine(PipelineEngine):
    """Optimizer, ZeRO, reductions and files of DeepSpeed; without its schedule and its messages.

    Args:
        tree: DeepSpeed's config, see `deepspeed_config`.
        timeout: seconds that a rank waits for others in what DeepSpeed has them do together.
    """

    def __init__(
        self, module: StageModule, optimizer: torch.optim.Optimizer, tree: dict, timeout: float
    ):
        super().__init__(
            args=None,
            model=module,
            optimizer=optimizer,
            mpu=module.mpu(),
            config=tree,
            config_class=DeepSpeedConfig(tree, module.mpu()),
        )
        _limit_waits(timeout)
        if isinstance(self.optimizer, BF16_Optimizer):
            sum_in_fp32(self.optimizer)

    @property
    def gradient_norm(self) -> float:
        """Norm of the whole gradient of the last step, before clipping."""
        return float(self.get_global_grad_norm())

    def accumulate(self, tensors: list[Tensor], gradients: list[Tensor]) -> None:
        """One backward pass over all outputs of a unit, added to the sums.

        DeepSpeed's own goes backward once for each of them.
        """
        self._running_engine_backward = True  # DeepSpeed's hooks refuse backward passes otherwise
        try:
            torch.autograd.backward(tensors, gradients)
        finally:
            self._running_engine_backward = False

    def checks_gradients(self) -> bool:
        """Whether DeepSpeed skips a step by itself whose gradient is not finite."""
        return isinstance(self.optimizer, BF16_Optimizer)

    def reduce_gradients(self) -> None:
        """Over data-parallel ranks, and a tied weight's gradients over its two stages."""
        if isinstance(self.optimizer, BF16_Optimizer):
            # A sum of two is the same on both, one of many need not be in two groups: last, so
            # that the two copies of the weight stay equal.
            self._exec_reduce_grads()
            self._exec_reduce_tied_grads()
        else:  # of ZeRO in fp32 a rank keeps its own part alone
            self._exec_reduce_tied_grads()
            self._exec_reduce_grads()

    def step_optimizer(self) -> bool:
        """Whether the weights have changed: DeepSpeed skips steps that are not finite, in bf16."""
        before = self.skipped_steps
        self._exec_optimizer_step()
        return self.skipped_steps == before

    def drop_gradients(self) -> None:
        """Ends a step that changes no weight."""
        self.optimizer.zero_grad()
        self.zero_grad()
        self._global_grad_norm = float("inf")
        self.count_skipped()

    def count_skipped(self) -> None:
        """Counts a step that has changed no weight."""
        self.skipped_steps += 1
        self.global_steps += 1

    def save_states(self, directory: Path, step: int) -> None:
        """Writes DeepSpeed's own files of a checkpoint."""
        with contextlib.redirect_stdout(None):
            self.save_checkpoint(
                str(directory.parent),
                tag=directory.name,
                client_state={**UNIVERSAL_INFO, "iteration": step},
                save_latest=False,
            )
        if dist.get_rank() == 0:  # they do not work for a pipeline's checkpoints
            for name in ("zero_to_fp32.py", "zero_to_torch.py"):
                (directory.parent / name).unlink(missing_ok=True)

    def load_states(self, load_from: Path, universal: bool) -> None:
        """Takes weights and optimizer states from DeepSpeed's own files.

        The learning rates and weight decays stay those of the config.

        Args:
            universal: whether they are in the universal form.

        Raises:
            RunError: DeepSpeed could not load them.
        """
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        # In a run that goes back it is not as when the engine was built.
        self._config.load_universal_checkpoint = universal
        if universal:
            allow_empty_shards(self.optimizer)
        with contextlib.redirect_stdout(None), plain_path(load_from.parent) as folder:
            path, _ = self.load_checkpoint(folder, tag=load_from.name)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        if path is None:
            raise RunError(f"checkpoint {load_from}: DeepSpeed could not load it")

    def clip_fp32_gradients(self) -> None:
        """fp32 without ZeRO: DeepSpeed's own counts tied weights twice, and keeps no norm."""
        parameters = list(self.module.parameters())
        owned = [p.grad for p in parameters if not p.ds_pipe_replicated]
        self._global_grad_norm = get_global_norm_of_tensors(owned, mpu=self.mpu)
        limit = self.gradient_clipping()
        if limit and self._global_grad_norm > limit:
            for parameter in parameters:
                gradient_of(parameter).mul_(limit / self._global_grad_norm)

    # What DeepSpeed calls

    def _do_optimizer_sanity_check(self, basic_optimizer):
        if self.bfloat16_enabled() and not self.zero_optimization():
            return BFLOAT16  # DeepSpeed refuses fp32 sums of bf16 gradients without ZeRO
        return super()._do_optimizer_sanity_check(basic_optimizer)

    def _configure_bf16_optimizer(self, optimizer):
        """Without ZeRO every rank keeps all of the optimizer's states: it is a group of its own."""
        if self.zero_optimization():
            return super()._configure_bf16_optimizer(optimizer)
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        return BF16_Optimizer(
            optimizer,
            self.param_names,
            bfloat16_config=self._config.bfloat16_config,
            mpu=self.mpu,
            clip_grad=self.gradient_clipping(),
            dp_process_group=alone[dist.get_rank()],
            timers=NoopTimer(),
            grad_acc_dtype=torch.float32,
        )

    def _exec_reduce_tied_grads(self) -> None:
        """DeepSpeed's own looks for gradients only where two of its three optimizers keep them."""
        for weight, group in self.module.get_tied_weights_and_groups():
            dist.all_reduce(gradient_of(weight), group=group)

    def _take_model_step(self, lr_kwargs) -> None:
        if not self.gradient_clipping() and not self.zero_optimization():
            self.clip_fp32_gradients()
        super()._take_model_step(lr_kwargs)


def _limit_waits(timeout: float) -> None:
    """DeepSpeed makes its groups with PyTorch's limits, of ten minutes and more."""
    for group in distributed_c10d._world.pg_map:
        if not distributed_c10d._rank_not_in_group(group):
            distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)
