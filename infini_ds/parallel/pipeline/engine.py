"""Our DeepSpeed engine: the schedule, what a message is, and the backward pass of a unit.

Everything else (ZeRO, the optimizer's step, reductions, checkpoints, launcher) is DeepSpeed's.
A unit is one chunk of one micro-batch on one stage.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.constants import BFLOAT16
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.utils import get_global_norm_of_tensors
from deepspeed.utils.timer import NoopTimer
from torch import Tensor

from infini_ds.config import ModelConfig, TrainConfig
from infini_ds.data.windows import Windows, answers_right
from infini_ds.layout import Layout
from infini_ds.memory import MemoryState
from infini_ds.model.write_gate import WriteStats
from infini_ds.parallel.deepspeed.gradient_sums import gradient_of, sum_in_fp32
from infini_ds.parallel.lane_memory import LaneMemory
from infini_ds.parallel.pipeline.channel import Channel, settle
from infini_ds.parallel.pipeline.module import InfiniPipeline
from infini_ds.parallel.pipeline.payload import Payload, Wire
from infini_ds.parallel.pipeline.schedule import (
    Backward,
    Forward,
    evaluation_schedule,
    train_schedule,
)
from infini_ds.parallel.pipeline.transport import TRANSPORTS

Reader = Callable[[int], Windows]
"""Gives this data-parallel rank's windows of a micro-batch; asked on the first and last stage.

Of lanes whose tokens are corrupt it gives any tokens, and marks them in the engine's `bad_lanes`.
"""

NOT_FINITE = "the loss or the gradient was not finite"
CORRUPT = "the store held tokens that its tokenizer does not have"


class StepSize(NamedTuple):
    """Of the whole global batch of a step: what its sums are divided by."""

    loss_weight: float
    """Sum of the weights of all losses: the number of valid tokens if each weighs 1."""
    tokens: int
    """Valid tokens."""


@dataclass
class Unit:
    """What a unit's backward needs."""

    inputs: Tensor
    """Tokens, or hidden states that get a gradient."""
    memory_in: list[Tensor]
    """kv and norm of each block before the chunk, flat; they get gradients within a window."""
    output: Tensor
    """Hidden states, or the summed loss on the last stage."""
    memory_out: list[Tensor]
    """kv and norm of each block after the chunk, flat."""
    mass: Tensor | None
    """Sum of this stage's write weights, if it has write gates."""


class Scale(NamedTuple):
    """Gradients of a step's outputs."""

    loss: float
    """Of the summed losses."""
    mass: float
    """Of the summed write weights: what the write penalty adds to the loss for each."""


class InfiniEngine(PipelineEngine):
    """Trains an InfiniPipeline on windows whose memories go on from step to step."""

    module: InfiniPipeline

    def setup(self, train: TrainConfig, transport: str) -> None:
        """Opens the channels between stages. To be called once, on all ranks together."""
        self._train = train
        self._model: ModelConfig = self.module.config
        self._transport = TRANSPORTS[transport](tuple(self.module.bounds))
        self._wire = Wire(
            self._model,
            train.micro_batch_size,
            train.window_segments // train.chunks,
            torch.bfloat16 if train.dtype == "bf16" else torch.float32,
            self.device,
        )
        if isinstance(self.optimizer, BF16_Optimizer):
            sum_in_fp32(self.optimizer)
        self._open_channels()
        self.memories = self.empty_memories()
        self.seconds = {"pipeline": 0.0, "reduce": 0.0, "optimizer": 0.0}
        self.skipped_in_a_row = 0
        self.fault = ""
        """Why the last training step changed nothing; empty if it did. The same on all ranks."""
        self.bad_lanes = torch.zeros(train.batch_size, dtype=torch.float64, device=self.device)
        """Above 0 for lanes of the last training step whose tokens were corrupt."""
        self.on_progress: Callable[[str], None] = lambda done: None
        """Told of each piece of work that is done."""
        self.write_totals = torch.zeros(
            self._model.num_layers, 2, dtype=torch.float64, device=self.device
        )
        """Of the last training step: mass and zeros (see `WriteStats`) of every layer, summed over
        this rank's lanes, 0 for layers of other stages and without write gates: see `all_sum`."""

    def empty_memories(self) -> LaneMemory:
        """For lanes that have read nothing: what this stage holds between windows."""
        held = self._transport.held(self.stage_id)
        lanes = self._train.micro_batch_size
        return LaneMemory(self._model, self.micro_batches, lanes, held, self.device)

    def lanes_of(self, micro_batch: int) -> range:
        """The global lanes that this data-parallel rank reads in a micro-batch."""
        lanes = self._train.micro_batch_size
        first = (self.grid.get_data_parallel_id() * self.micro_batches + micro_batch) * lanes
        return range(first, first + lanes)

    def train_step(self, read: Reader, size: StepSize) -> Tensor:
        """Forward, backward and optimizer step on one window of every lane.

        Args:
            read: windows of each micro-batch.
            size: of the step; the loss is the weighted sum over all valid tokens divided by
                its weight.

        Returns:
            The weighted sum of this rank's losses, fp64, 0 except on the last stage: see `all_sum`.
        """
        begin = time.perf_counter()
        self.module.train()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.write_totals.zero_()
        self.bad_lanes.zero_()
        self.answers = torch.zeros(2, dtype=torch.float64, device=self.device)
        """Of the last training step with a curriculum: right answers and all answers."""
        # Reductions average over data-parallel ranks.
        scale = Scale(
            self.dp_world_size / size.loss_weight,
            self._model.memory.write_penalty
            * self.dp_world_size
            / (size.tokens * self._model.kv_heads),
        )
        schedule = train_schedule(
            self.stage_id, self.num_stages, self.micro_batches, self._train.chunks
        )
        self._run(schedule, read, self.memories, scale)
        reduced = self._clock("pipeline", begin)
        self.fault = self._find_fault()
        if not self.fault:
            self._reduce()
        stepped = self._clock("reduce", reduced)
        self._step()
        self._clock("optimizer", stepped)
        return self._loss_sum

    def skip_window(self, starts: Tensor) -> None:
        """A step that reads nothing and changes no weight.

        Args:
            starts: bool [lanes of the global batch], where a document began in the window; its
                memory would be that of the lane's earlier document.
        """
        self._count_skipped()
        self._clear_lanes(starts)

    @torch.no_grad()
    def evaluate_window(self, read: Reader, memories: LaneMemory) -> Tensor:
        """Sum of this rank's losses on one window of every lane, 0 except on the last stage."""
        self.module.eval()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        schedule = evaluation_schedule(self.micro_batches, self._train.chunks)
        self._run(schedule, read, memories, None)
        return self._loss_sum

    def send_hidden(self, hidden: Tensor) -> None:
        """Sends bare hidden states to the next stage, outside of a schedule."""
        self._next.send(hidden.contiguous().view(-1).view(torch.uint8))

    def receive_hidden(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Receives what the previous stage sent with `send_hidden`."""
        message = self._previous.receive(math.prod(shape) * dtype.itemsize)
        return message.view(dtype).view(shape)

    def all_sum(self, values: Tensor) -> Tensor:
        """Sums a small tensor over all ranks."""
        dist.all_reduce(values)
        return values

    @property
    def gradient_norm(self) -> float:
        """Norm of the whole gradient of the last step, before clipping."""
        return float(self.get_global_grad_norm())

    @property
    def waiting_seconds(self) -> float:
        """Time this rank has waited for other stages so far."""
        return sum(channel.seconds for channel in self._channels)

    @property
    def sent_bytes(self) -> int:
        """What this rank has sent to other stages so far."""
        return sum(channel.sent_bytes for channel in self._channels)

    @property
    def waiting_for(self) -> str:
        """What this rank is waiting for at this moment, and from whom; empty if nothing."""
        return next((channel.describe() for channel in self._channels if channel.waiting), "")

    def step_bytes(self) -> int:
        """What this rank sends in a training step, by the formula."""
        chunks = self._train.chunks
        return self._transport.step_bytes(self._wire, self.stage_id, self.micro_batches, chunks)

    # The schedule

    def _run(
        self,
        schedule: Iterable[Forward | Backward],
        read: Reader,
        memories: LaneMemory,
        scale: Scale | None,
    ) -> None:
        self._units: dict[tuple[int, int], Unit] = {}
        self._windows: dict[int, Windows] = {}
        self._passing: dict[int, dict[int, MemoryState]] = {}
        self._returning: dict[int, Tensor] = {}
        for unit in schedule:
            if isinstance(unit, Forward):
                self._forward(unit, read, memories, scale is not None)
                if scale is None and unit.chunk == self._train.chunks - 1:
                    self._flush()  # no gradient keeps this stage from running far ahead
            else:
                assert scale is not None
                if unit.chunk == self._train.chunks - 1:
                    self._take_back(unit.micro_batch, memories)
                self._backward(unit, scale)
            kind = type(unit).__name__.lower()
            self.on_progress(f"{kind} of micro-batch {unit.micro_batch}, chunk {unit.chunk}")
        if scale is None:
            for micro_batch in range(self.micro_batches):
                self._hand_back(micro_batch)
                self._take_back(micro_batch, memories)
        self._flush()

    def _flush(self) -> None:
        """Waits until everything that was sent has left."""
        for channel in self._channels:
            channel.flush()

    def _forward(self, unit: Forward, read: Reader, memories: LaneMemory, training: bool) -> None:
        micro_batch, chunk = unit
        first, last = chunk == 0, chunk == self._train.chunks - 1
        if first:
            self._passing[micro_batch] = memories.get(micro_batch)
            if self.is_first_stage() or self.is_last_stage():
                windows = read(micro_batch)
                self._windows[micro_batch] = _to_device(windows, self.device)
        passing = self._passing[micro_batch]
        if self.is_first_stage():
            cut = self._cut(self._windows[micro_batch], chunk)
            inputs, layout = cut.tokens, cut.layout
        else:
            payload = self._receive_payload(chunk)
            inputs, layout = payload.hidden.requires_grad_(training), payload.layout
            passing.update(payload.memories)

        own = self.module.block_range
        memory = [passing[block] for block in own]
        if not first and training:
            # Within a window gradients flow back through the memory, one unit at a time.
            memory = [
                layer.map(lambda tensor: tensor.detach().requires_grad_()) for layer in memory
            ]
        output, after, writes = self.module(inputs, layout, memory)
        passing.update(zip(own, after, strict=True))
        if self.is_last_stage():
            cut = self._cut(self._windows[micro_batch], chunk)
            losses = self.module.losses(output, cut.labels, self._train.loss_chunk_tokens)
            if training:
                if self._train.curriculum:
                    self.answers += answers_right(losses.detach(), cut.weights, layout)
                losses = losses * cut.weights
            output = losses.sum()
            self._loss_sum += output.detach()
        else:
            riding = self._riding(self.stage_id, chunk)
            detached = {block: passing[block].map(Tensor.detach) for block in riding}
            self._next.send(self._wire.pack(Payload(output, layout, detached)))
        if training:
            flat_in = [tensor for layer in memory for tensor in layer]
            flat_out = [tensor for layer in after for tensor in layer]
            mass = self._add_writes(writes) if writes else None
            self._units[unit] = Unit(inputs, flat_in, output, flat_out, mass)
        if last:
            self._finish_window(micro_batch, memories)
            if training:
                self._hand_back(micro_batch)

    def _backward(self, unit: Backward, scale: Scale) -> None:
        micro_batch, chunk = unit
        done = self._units.pop((micro_batch, chunk))
        if self.is_last_stage():
            tensors, gradients = [done.output], [torch.full_like(done.output, scale.loss)]
        else:
            message = self._next_gradient.receive(self._wire.gradient_bytes())
            gradient = message.view(self._wire.dtype)[: done.output.numel()]
            tensors, gradients = [done.output], [gradient.view_as(done.output)]
        if done.mass is not None:
            tensors.append(done.mass)
            gradients.append(torch.full_like(done.mass, scale.mass))
        if chunk < self._train.chunks - 1:
            # The next chunk has left the gradients of the memory that this one handed on.
            for tensor, gradient in zip(done.memory_out, self._memory_gradients, strict=True):
                if gradient is not None:
                    tensors.append(tensor)
                    gradients.append(gradient)
        self._accumulate(tensors, gradients)
        self._memory_gradients = [tensor.grad for tensor in done.memory_in]
        if not self.is_first_stage():
            assert done.inputs.grad is not None
            gradient = done.inputs.grad.contiguous().view(-1).view(torch.uint8)
            padding = self._wire.gradient_bytes() - gradient.numel()
            self._previous_gradient.send(torch.nn.functional.pad(gradient, (0, padding)))

    def _add_writes(self, writes: list[WriteStats]) -> Tensor:
        """Notes what this stage's blocks wrote; the sum of their masses, with gradient."""
        table = torch.stack([torch.stack(stats) for stats in writes])  # [blocks, 2]
        own = self.module.block_range
        self.write_totals[own.start : own.stop] += table.detach()
        return table[:, 0].sum()

    def _accumulate(self, tensors: list[Tensor], gradients: list[Tensor]) -> None:
        """One backward pass over all outputs of a unit, added to the sums."""
        self._running_engine_backward = True  # DeepSpeed's hooks refuse backward passes otherwise
        try:
            torch.autograd.backward(tensors, gradients)
        finally:
            self._running_engine_backward = False

    def _finish_window(self, micro_batch: int, memories: LaneMemory) -> None:
        """Memories are data from here on: kept here, or to be sent back to the first stage."""
        passing = self._passing.pop(micro_batch)
        self._windows.pop(micro_batch, None)
        if not (self._transport.returns and self.is_pipe_parallel):
            memories.put(micro_batch, passing)
        elif self.is_last_stage():
            everything = {block: passing[block].map(Tensor.detach) for block in sorted(passing)}
            self._returning[micro_batch] = self._wire.pack_memories(everything)

    def _hand_back(self, micro_batch: int) -> None:
        """On the last stage: sends a window's memories to the first, if they are returned at all.

        NCCL keeps the sender's GPU busy until a message is asked for, and what waits for the whole
        GPU, such as freeing memory, then waits for the receiver. So it goes out when the first
        stage will ask for it without waiting for anything else from here: in training before the
        window's first gradient, in evaluation after the last window.
        """
        if micro_batch in self._returning:
            self._return.send(self._returning.pop(micro_batch))

    def _take_back(self, micro_batch: int, memories: LaneMemory) -> None:
        """On the first stage: what the last one has handed back, if anything."""
        if self._transport.returns and self.is_pipe_parallel and self.is_first_stage():
            message = self._return.receive(self._wire.memories_bytes(self._model.num_layers))
            blocks = list(range(self._model.num_layers))
            memories.put(micro_batch, self._wire.unpack_memories(message, blocks))

    def _cut(self, windows: Windows, chunk: int) -> Windows:
        tokens, labels, weights, *layout = (
            part.chunk(self._train.chunks, dim=1)[chunk]
            for part in (windows.tokens, windows.labels, windows.weights, *windows.layout)
        )
        return Windows(tokens, labels, Layout(*layout), weights)

    # Messages

    def _open_channels(self) -> None:
        """Every rank takes part in making all groups, and connects its own one after another."""
        topology = self.module.topology()
        pipelines = topology.get_axis_comm_lists("pipe") if self.num_stages > 1 else []
        self._channels: list[Channel] = []
        for ranks in pipelines:
            hops = list(pairwise(range(len(ranks))))
            for here, there in hops:
                self._open("activations", ranks, ("_next", here), ("_previous", there))
            for here, there in hops:
                gradient = ("_previous_gradient", there), ("_next_gradient", here)
                self._open("gradients", ranks, *gradient)
            last = len(ranks) - 1
            self._open("returned memories", ranks, ("_return", last), ("_return", 0))

    def _open(
        self, what: str, ranks: list[int], sender: tuple[str, int], receiver: tuple[str, int]
    ) -> None:
        """A channel between two stages of a pipeline, each with the name that it has there."""
        ends = {ranks[stage]: (name, stage) for name, stage in (sender, receiver)}
        # Later than a channel's own limit, which says more.
        limit = timedelta(seconds=2 * self._train.timeout)
        group = dist.new_group(list(ends), timeout=limit)
        if self.global_rank not in ends:
            return
        assert isinstance(group, dist.ProcessGroup)
        name, stage = ends[self.global_rank]
        sends = (name, stage) == sender
        _, other = receiver if sends else sender
        channel = Channel(f"{what} of stage {other}", ranks[other], group, self._train.timeout)
        channel.connect(sends)
        self._channels.append(channel)
        setattr(self, name, channel)

    def _receive_payload(self, chunk: int) -> Payload:
        riding = self._riding(self.stage_id - 1, chunk)
        message = self._previous.receive(self._wire.payload_bytes(len(riding)))
        return self._wire.unpack(message, riding)

    def _riding(self, stage: int, chunk: int) -> list[int]:
        return self._transport.riding(stage, chunk == 0, chunk == self._train.chunks - 1)

    # The step

    def _find_fault(self) -> str:
        """Whether tokens were corrupt, or the loss or a gradient of any rank is not finite.

        DeepSpeed's bf16 optimizer checks the norm itself and skips the step; in fp32 nothing does.
        """
        broken = ~self._loss_sum.isfinite()
        if not isinstance(self.optimizer, BF16_Optimizer):
            norms = torch.stack([gradient_of(p).norm() for p in self.module.parameters()])
            broken |= (~norms.isfinite()).any()
        sums = self.all_sum(torch.cat((broken.double().view(1), self.bad_lanes)))
        self.bad_lanes.copy_(sums[1:])
        not_finite, corrupt = sums[0], self.bad_lanes.sum()
        return CORRUPT if corrupt > 0 else NOT_FINITE if not_finite > 0 else ""

    def _step(self) -> None:
        if self.fault:
            self.optimizer.zero_grad()
            self.zero_grad()
            self._global_grad_norm = float("inf")
            self._count_skipped()
        else:
            before = self.skipped_steps
            self._exec_optimizer_step()
            if self.skipped_steps == before:
                self.skipped_in_a_row = 0
                return
            self.fault = NOT_FINITE
            self.skipped_in_a_row += 1
        self.memories.clear_broken()
        self._clear_lanes(self.bad_lanes > 0)

    def _count_skipped(self) -> None:
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        self.global_steps += 1

    def _clear_lanes(self, lanes: Tensor) -> None:
        """Empties the memories of marked lanes, bool [lanes of the global batch]."""
        for micro_batch in range(self.micro_batches):
            own = self.lanes_of(micro_batch)
            self.memories.clear(micro_batch, lanes[own.start : own.stop].to(self.device))

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

    def _reduce(self) -> None:
        """Over data-parallel ranks, and a tied weight's gradients over its two stages."""
        if isinstance(self.optimizer, BF16_Optimizer):
            # A sum of two is the same on both, one of many need not be in two groups: last, so
            # that the two copies of the weight stay equal.
            self._exec_reduce_grads()
            self._exec_reduce_tied_grads()
        else:  # of ZeRO in fp32 a rank keeps its own part alone
            self._exec_reduce_tied_grads()
            self._exec_reduce_grads()

    def _exec_reduce_tied_grads(self) -> None:
        """DeepSpeed's own looks for gradients only where two of its three optimizers keep them."""
        for weight, group in self.module.get_tied_weights_and_groups():
            dist.all_reduce(gradient_of(weight), group=group)

    def _take_model_step(self, lr_kwargs) -> None:
        if not self.gradient_clipping() and not self.zero_optimization():
            self.clip_fp32_gradients()
        super()._take_model_step(lr_kwargs)

    def clip_fp32_gradients(self) -> None:
        """fp32 without ZeRO: DeepSpeed's own counts tied weights twice, and keeps no norm."""
        parameters = list(self.module.parameters())
        owned = [p.grad for p in parameters if not p.ds_pipe_replicated]
        self._global_grad_norm = get_global_norm_of_tensors(owned, mpu=self.mpu)
        limit = self.gradient_clipping()
        if limit and self._global_grad_norm > limit:
            for parameter in parameters:
                gradient_of(parameter).mul_(limit / self._global_grad_norm)

    def _clock(self, phase: str, begin: float) -> float:
        settle(self.device)
        now = time.perf_counter()
        self.seconds[phase] += now - begin
        return now


def _to_device(windows: Windows, device: torch.device) -> Windows:
    def move(part: Tensor) -> Tensor:
        # From pageable memory the copy would wait for all that the device has been given to do.
        part = part.pin_memory() if device.type == "cuda" else part
        return part.to(device, non_blocking=True)

    tokens, labels, layout, weights = windows
    return Windows(move(tokens), move(labels), Layout(*map(move, layout)), move(weights))
