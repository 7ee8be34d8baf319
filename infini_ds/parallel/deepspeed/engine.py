"""DeepSpeed's pipeline engine with corrections; only this file knows its private members."""

import contextlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.constants import BFLOAT16
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.utils import get_global_norm_of_tensors
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from deepspeed.utils import safe_set_full_fp32_param
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from infini_ds.errors import RunError
from infini_ds.parallel.deepspeed.gradient_sums import gradient_of, sum_in_fp32
from infini_ds.parallel.deepspeed.kept_files import KeptFiles
from infini_ds.parallel.deepspeed.module import StageModule
from infini_ds.parallel.deepspeed.states import States
from infini_ds.parallel.deepspeed.universal import (
    UNIVERSAL_INFO,
    load_by_groups,
    plain_path,
)
from infini_ds.runs.weights import CheckpointWeights


class CorrectedEngine(PipelineEngine, States):
    """Uses DeepSpeed's optimizer, ZeRO, reductions and files, but not its schedule or messages."""

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
        self._kept_files: KeptFiles | None = None
        limit_waits(timeout)
        if isinstance(self.optimizer, BF16_Optimizer):
            sum_in_fp32(self.optimizer)

    @property
    def replica(self) -> int:
        """See `States`."""
        return self.grid.get_data_parallel_id()

    def ranks_along(self, axis: str) -> list[list[int]]:
        """See `States`."""
        return self.module.topology().get_axis_comm_lists(axis)

    def whole(self, module: nn.Module) -> contextlib.AbstractContextManager:
        """See `States`; they are whole already."""
        return contextlib.nullcontext()

    @torch.no_grad()
    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """See `Engine`."""
        value = value.to(parameter.device)
        parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value)

    @property
    def gradient_norm(self) -> float:
        """See `States`."""
        return float(self.get_global_grad_norm())

    def trained_parameters(self) -> list[nn.Parameter]:
        """Returns this rank's parameters that receive gradients."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def accumulate(self, tensors: list[Tensor], gradients: list[Tensor], last: bool) -> None:
        """See `States`; DeepSpeed itself would run one backward pass for each output."""
        self._running_engine_backward = True  # DeepSpeed's hooks refuse backward passes otherwise
        try:
            torch.autograd.backward(tensors, gradients)
        finally:
            self._running_engine_backward = False

    def gradients_are_finite(self) -> bool:
        """See `States`; in bf16 DeepSpeed's optimizer checks the norm and skips the step itself."""
        if isinstance(self.optimizer, BF16_Optimizer):
            return True
        norms = torch.stack([gradient_of(p).norm() for p in self.trained_parameters()])
        return bool(norms.isfinite().all())

    def reduce_gradients(self) -> None:
        """Reduces gradients over data-parallel ranks, and a tied weight's over its two stages."""
        if isinstance(self.optimizer, BF16_Optimizer):
            # A sum of two numbers is the same on both ranks, but a sum of many may differ between
            # two groups. So tied gradients come last: the two copies of the weight then stay equal.
            self._exec_reduce_grads()
            self._exec_reduce_tied_grads()
        else:  # ZeRO in fp32 leaves each rank only its own part, so tied weights come first
            self._exec_reduce_tied_grads()
            self._exec_reduce_grads()

    def step_optimizer(self) -> bool:
        """See `States`."""
        before = self.skipped_steps
        self._exec_optimizer_step()
        return self.skipped_steps == before

    def drop_gradients(self) -> None:
        """See `States`."""
        self.optimizer.zero_grad()
        self.zero_grad()
        self._global_grad_norm = float("inf")
        self.count_skipped()

    def count_skipped(self) -> None:
        """See `States`."""
        self.skipped_steps += 1
        self.global_steps += 1

    def save_states(self, directory: Path, step: int) -> None:
        """See `States`; writes DeepSpeed's own files."""
        with contextlib.redirect_stdout(None):
            self.save_checkpoint(
                str(directory.parent),
                tag=directory.name,
                client_state={**UNIVERSAL_INFO, "iteration": step},
                save_latest=False,
            )
        if dist.get_rank() == 0:  # these scripts do not work for a pipeline's checkpoints
            for name in ("zero_to_fp32.py", "zero_to_torch.py"):
                (directory.parent / name).unlink(missing_ok=True)

    def keep_states(self, directory: Path, step: int) -> Callable[[], list[str]]:
        """See `States`."""
        usual = self.checkpoint_engine
        self._kept_files = self._kept_files or KeptFiles(usual)
        self.checkpoint_engine = self._kept_files
        try:
            self.save_states(directory, step)
        finally:
            self.checkpoint_engine = usual
        return self._kept_files.write

    def load_states(
        self, load_from: Path, checkpoint: Path, frozen: dict[str, nn.Parameter]
    ) -> None:
        """See `States`; loads DeepSpeed's own files."""
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        universal = load_from != checkpoint
        # When a run rolls back, this can differ from when the engine was built.
        self._config.load_universal_checkpoint = universal
        if universal:
            load_by_groups(self.optimizer, frozen.values())
        with contextlib.redirect_stdout(None), plain_path(load_from.parent) as folder:
            path, _ = self.load_checkpoint(folder, tag=load_from.name)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            for name in group.keys() - own.keys() - {"params"}:  # of another group
                del group[name]
            group.update(own)
        if path is None:
            raise RunError(f"checkpoint {load_from}: DeepSpeed could not load it")
        if universal and frozen:  # which the universal form leaves out
            weights = CheckpointWeights(checkpoint)
            for name, parameter in frozen.items():
                self.set_weight(parameter, weights.read(name).float())

    def clip_fp32_gradients(self) -> None:
        """Clips in fp32 without ZeRO; DeepSpeed would count tied weights twice and keep no norm."""
        parameters = self.trained_parameters()
        owned = [p.grad for p in parameters if not p.ds_pipe_replicated]  # type: ignore[attr-defined]
        self._global_grad_norm = get_global_norm_of_tensors(owned, mpu=self.mpu)
        limit = self.gradient_clipping()
        if limit and self._global_grad_norm > limit:
            for parameter in parameters:
                gradient_of(parameter).mul_(limit / self._global_grad_norm)

    # Methods that DeepSpeed calls

    def _do_optimizer_sanity_check(self, basic_optimizer):
        if self.bfloat16_enabled() and not self.zero_optimization():
            return BFLOAT16  # DeepSpeed refuses fp32 sums of bf16 gradients without ZeRO
        if type(basic_optimizer) not in ZERO_SUPPORTED_OPTIMIZERS:  # it would warn at every start
            ZERO_SUPPORTED_OPTIMIZERS.append(type(basic_optimizer))
        return super()._do_optimizer_sanity_check(basic_optimizer)

    def _configure_bf16_optimizer(self, optimizer):
        """Gives each rank its own group, since without ZeRO each keeps all optimizer states."""
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
        """Replaces a method that finds the gradients of only two of the three optimizers."""
        for weight, group in self.module.get_tied_weights_and_groups():
            if weight.requires_grad:
                dist.all_reduce(gradient_of(weight), group=group)

    def _take_model_step(self, lr_kwargs) -> None:
        if not self.gradient_clipping() and not self.zero_optimization():
            self.clip_fp32_gradients()
        super()._take_model_step(lr_kwargs)


def limit_waits(timeout: float) -> None:
    """Sets our time limit on DeepSpeed's groups; PyTorch's default is ten minutes or more."""
    for group in distributed_c10d._world.pg_map:
        if not distributed_c10d._rank_not_in_group(group):
            distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)
