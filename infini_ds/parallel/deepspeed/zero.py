"""DeepSpeed's own engine for ZeRO-2 and ZeRO-3; only this file knows its private members."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed import zero
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from safetensors.torch import save_file
from torch import Tensor, nn

from infini_ds.parallel.deepspeed.engine import limit_waits
from infini_ds.parallel.deepspeed.states import States
from infini_ds.parallel.deepspeed.universal import UniversalStates
from infini_ds.runs.shards import KINDS, Fragment, Shards, file_of_shard, shard_file
from infini_ds.runs.weights import CheckpointWeights

# DeepSpeed calls them by the names that they had before torch 2.13.
warnings.filterwarnings("ignore", r".*(all_gather_into|reduce_scatter)_tensor. is deprecated")


class ZeroStates(DeepSpeedEngine, States):
    """Uses DeepSpeed's optimizers of ZeRO-2 and ZeRO-3, but files of our own."""

    stage_id, num_stages = 0, 1

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, tree: dict, timeout: float
    ):
        super().__init__(
            args=None,
            model=module,
            optimizer=optimizer,
            config=tree,
            config_class=DeepSpeedConfig(tree),
        )
        self.micro_batches = self.gradient_accumulation_steps()
        self._weights_too = self.zero_optimization_stage() == 3
        self.optimizer.check_grad_overflow = True  # DeepSpeed's default for bf16 alone
        limit_waits(timeout)

    @property
    def replica(self) -> int:
        """See `States`."""
        return self.global_rank

    def ranks_along(self, axis: str) -> list[list[int]]:
        """See `States`."""
        ranks = range(dist.get_world_size())
        return [[rank] for rank in ranks] if axis == "pipe" else [[*ranks]]

    @contextlib.contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """See `States`."""
        with zero.GatheredParameters(list(module.parameters()), enabled=self._weights_too):
            yield

    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """See `Engine`."""
        flat = value.to(self.device).flatten()
        self._fill(parameter, KINDS[:1], lambda kind, start, stop: flat[start:stop])

    @property
    def gradient_norm(self) -> float:
        """See `States`."""
        return float(self.get_global_grad_norm())

    def accumulate(self, tensors: list[Tensor], gradients: list[Tensor], last: bool) -> None:
        """See `States`.

        DeepSpeed counts forward passes to know whether a gradient is the first of a step, and would
        take several backward passes in a row for one.
        """
        total = torch.zeros((), device=self.device)
        for own, gradient in zip(tensors, gradients, strict=True):
            total = total + (own * gradient).sum()
        self.set_gradient_accumulation_boundary(last)
        self.optimizer.clear_backward_seen_flag()
        self.backward(total, scale_wrt_gas=False)

    def gradients_are_finite(self) -> bool:
        """See `States`; DeepSpeed skips steps whose gradient is not finite."""
        return True

    def reduce_gradients(self) -> None:
        """See `States`; every backward pass does it."""

    def step_optimizer(self) -> bool:
        """See `States`."""
        self._take_model_step({})
        return not self.optimizer.overflow

    def drop_gradients(self) -> None:
        """See `States`; DeepSpeed clears its sums where a norm is infinite or numbers overflow."""
        infinite = torch.tensor(float("inf"), device=self.device)
        name, answer = (
            ("_get_norm_groups", [infinite]) if self._weights_too else ("has_overflow", True)
        )
        usual = getattr(self.optimizer, name)
        setattr(self.optimizer, name, lambda *args, **settings: answer)
        try:
            self._take_model_step({})
        finally:
            setattr(self.optimizer, name, usual)
        self._global_grad_norm = float("inf")

    def count_skipped(self) -> None:
        """See `States`."""
        self.skipped_steps += 1
        self.global_steps += 1

    def save_states(self, directory: Path, step: int) -> None:
        """See `States`; writes the weights of each layer, and this rank's shard."""
        for file in self._files(directory):
            file.write()

    def keep_states(self, directory: Path, step: int) -> Callable[[], list[str]]:
        """See `States`."""
        files = [file.copied() for file in self._files(directory)]

        def write() -> list[str]:
            for file in files:
                file.write()
            return [str(file.path) for file in files]

        return write

    def load_states(
        self, load_from: Path, checkpoint: Path, frozen: dict[str, nn.Parameter]
    ) -> None:
        """See `States`."""
        universal = load_from != checkpoint
        saved = UniversalStates(load_from) if universal else Shards(checkpoint)
        weights = CheckpointWeights(checkpoint) if frozen else None
        for name, parameter in self.module.own_parameters():
            if weights and name in frozen:
                self.set_weight(parameter, weights.read(name))
            else:
                self._fill(parameter, KINDS, partial(saved.read, name))
        for state in self.optimizer.optimizer.state.values():
            step = state["step"]
            state["step"] = step.fill_(saved.step) if isinstance(step, Tensor) else saved.step

    def _files(self, directory: Path) -> Iterator["_StateFile"]:
        """Yields what this rank writes of a checkpoint, while its tensors are there."""
        ranks = dist.get_world_size()
        for place, layer in enumerate(self.module.layers):
            with self.whole(layer):
                if place % ranks == self.global_rank:
                    weights = {name: p.detach() for name, p in layer.named_parameters()}
                    yield _StateFile(directory / f"layer_{place:02d}-model_states.pt", weights)
        fragments, shapes = {}, {}
        for name, parameter in self.module.own_parameters():
            if not parameter.requires_grad:
                continue
            shapes[name] = getattr(parameter, "ds_shape", parameter.shape)
            if place := self._place_of(parameter):
                fragments[name] = Fragment(place.start, self._held(place))
        states = self.optimizer.optimizer.state.values()
        step = next((int(state["step"]) for state in states), 0)
        yield _StateFile(
            shard_file(directory, self.global_rank), *file_of_shard(fragments, shapes, step)
        )

    @torch.no_grad()
    def _fill(
        self,
        parameter: nn.Parameter,
        kinds: Sequence[str],
        read: Callable[[str, int, int], Tensor],
    ) -> None:
        """Fills what this rank holds of a parameter.

        Args:
            kinds: those of KINDS to fill where the parameter is trained.
            read: returns some numbers of the flattened parameter by their kind, start and stop.
        """
        if place := self._place_of(parameter):
            for kind in kinds:
                self._held(place)[kind].copy_(read(kind, place.start, place.start + place.count))
        if not self._weights_too:
            parameter.copy_(read("fp32", 0, parameter.numel()).view(parameter.shape))
            return
        start, count = self._share_of(parameter)
        if count > 0:
            own = self._held(place)["fp32"] if place else read("fp32", start, start + count)
            with _in_memory(parameter) as share:
                share.narrow(0, 0, count).copy_(own)

    def _place_of(self, parameter: nn.Parameter) -> "_Place | None":
        """Returns where this rank holds a parameter's fp32 weights, or None if it does not."""
        if not parameter.requires_grad:
            return None
        if self._weights_too:
            group, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            start, count = self._share_of(parameter)
            flat = self.optimizer.fp32_partitioned_groups_flat[group]
            return _Place(flat, offset, start, count) if count > 0 else None
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        offset, count = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        return _Place(flat, offset, mapping.lp_fragment_address.start, count)

    def _share_of(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Returns where this rank's share of a parameter of ZeRO-3 starts, and its size."""
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]  # of all ranks alike
        start = size * self.global_rank
        return start, min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]

    def _held(self, place: "_Place") -> dict[str, Tensor]:
        """Returns views of the states of some numbers, by KINDS.

        Optimizers make a group's states in their first step; here they are made as these do.
        """
        state = self.optimizer.optimizer.state[place.flat]
        if not state:
            on_cpu = self.zero_cpu_offload()
            state["step"] = 0 if on_cpu else torch.zeros((), device=place.flat.device)
            for kind in KINDS[1:]:
                state[kind] = torch.zeros_like(place.flat)
        whole = {"fp32": place.flat.detach(), **{kind: state[kind] for kind in KINDS[1:]}}
        return {kind: x.narrow(0, place.offset, place.count) for kind, x in whole.items()}

    # Methods that DeepSpeed calls

    def _do_optimizer_sanity_check(self, basic_optimizer):
        if type(basic_optimizer) not in ZERO_SUPPORTED_OPTIMIZERS:  # it would warn at every start
            ZERO_SUPPORTED_OPTIMIZERS.append(type(basic_optimizer))
        return super()._do_optimizer_sanity_check(basic_optimizer)


@contextlib.contextmanager
def _in_memory(parameter: Any) -> Iterator[Tensor]:
    """Lends this rank's share of a parameter of ZeRO-3, which may be on a disk, to change it."""
    away = parameter.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE
    if away:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    yield parameter.ds_tensor
    if away:
        parameter.nvme_swapper.swap_out_and_release([parameter])


class _Place(NamedTuple):
    """Some numbers of a parameter in a group's flat tensor."""

    flat: Tensor
    offset: int
    start: int
    """Index of the first of them in the flattened parameter."""
    count: int


class _StateFile(NamedTuple):
    """A file of a checkpoint: a layer's weights, or with metadata this rank's shard."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] | None = None

    def copied(self) -> "_StateFile":
        """Returns the file with copies of its tensors in host memory."""
        copies = {name: x.to("cpu", copy=True) for name, x in self.tensors.items()}
        return self._replace(tensors=copies)

    def write(self) -> None:
        """Writes the file."""
        if self.metadata is not None:
            save_file(
                {k: x.contiguous() for k, x in self.tensors.items()}, self.path, self.metadata
            )
        else:
            torch.save({name: x.cpu().clone() for name, x in self.tensors.items()}, self.path)
