"""The pipeline's engine: it plays the schedule and runs each unit's forward and backward pass.

DeepSpeed does everything else (ZeRO, the optimizer step, reductions, checkpoints, launching). A
unit is one chunk of one micro-batch on one stage.
"""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from infini_ds.config import ModelConfig, RunConfig
from infini_ds.data.windows import Windows, answers_right
from infini_ds.memory import MemoryState
from infini_ds.model.block import memory_ablated
from infini_ds.model.optimizer import set_learning_rate
from infini_ds.model.write_gate import WriteStats, write_penalty
from infini_ds.parallel.contact import settle
from infini_ds.parallel.context import open_context
from infini_ds.parallel.deepspeed.states import States
from infini_ds.parallel.engine import (
    CORRUPT,
    NOT_FINITE,
    EngineLayout,
    StepResult,
    StepSize,
    WindowsOf,
)
from infini_ds.parallel.lane_memory import LaneMemory, write_memories
from infini_ds.parallel.part import Part
from infini_ds.parallel.pipeline.balance import describe
from infini_ds.parallel.pipeline.generation import generate
from infini_ds.parallel.pipeline.hand_over import HandOver
from infini_ds.parallel.pipeline.hops import open_hops
from infini_ds.parallel.pipeline.payload import Payload, Wire
from infini_ds.parallel.pipeline.schedule import (
    Backward,
    Forward,
    evaluation_schedule,
    train_schedule,
)
from infini_ds.parallel.pipeline.stage import Stage, Wanted
from infini_ds.parallel.pipeline.transport import TRANSPORTS
from infini_ds.parallel.pipeline.unit import Scale, Unit, traced
from infini_ds.parallel.ranks import gathered
from infini_ds.system.resources import give_back_freed_memory


class InfiniEngine(States):
    """An `Engine` that trains a stage on windows whose memories pass from step to step.

    Must be constructed on all ranks together. Classes for use are this one and a way to keep
    `States`: `PipelinedEngine` and `ShardedEngine`.

    Args:
        tree: DeepSpeed's config; see `deepspeed_config`.
        on_progress: called with a description of each piece of work when it is done.
    """

    module: Stage

    def __init__(
        self,
        module: Stage,
        optimizer: torch.optim.Optimizer,
        tree: dict,
        config: RunConfig,
        on_progress: Callable[[str], None],
    ):
        train, parallel = config.train, config.parallel
        super().__init__(module, optimizer, tree, train.timeout)
        self._train = train
        self._model: ModelConfig = module.config
        self._saves_memory = train.activation_checkpointing != "none" and self.device.type == "cpu"
        self._on_progress = on_progress
        self.part = Part(
            self.stage_id,
            self.replica,
            self.micro_batches,
            train.micro_batch_size,
            tuple(module.bounds),
            parallel.context_parallel,
        )
        segments = train.window_segments // (train.chunks * self.part.context)
        dtype = torch.bfloat16 if train.dtype == "bf16" else torch.float32
        wire = Wire(
            self._model, train.micro_batch_size, segments, dtype, self.device, config.packed
        )
        axes, rank = self.ranks_along, self.global_rank
        self._hops = open_hops(axes("pipe"), rank, train.timeout)
        self._context = open_context(axes("data"), self.part.context, rank, train.timeout)
        policy = TRANSPORTS[parallel.memory_transport](self.part.bounds)
        self._hand_over = HandOver(policy, wire, self._hops, self.part, train.chunks)
        self.memories = self.empty_memories()
        self._seconds = {"pipeline": 0.0, "reduce": 0.0, "optimizer": 0.0}
        self._skipped_in_a_row = 0
        self._bad_lanes = torch.zeros(train.batch_size, dtype=torch.float64, device=self.device)
        blocks = self._model.num_layers
        self._writes = torch.zeros(blocks, 2, dtype=torch.float64, device=self.device)
        """Mass and zeros (see `WriteStats`) of every layer in the last training step, summed over
        this rank's lanes; 0 for layers of other stages and for layers without write gates."""

    @property
    def layout(self) -> EngineLayout:
        """How the work is divided."""
        sizes = self.num_stages, self.dp_world_size, self.micro_batches
        return EngineLayout(*sizes, describe(self._model, self.module.bounds))

    @property
    def skipped_in_a_row(self) -> int:
        """Number of steps since the last one that changed the weights."""
        return self._skipped_in_a_row

    @property
    def counts_labels(self) -> bool:
        """See `Engine`."""
        return self.part.is_last and self.part.place == 0

    def empty_memories(self) -> LaneMemory:
        """Returns what this stage holds between windows, for lanes that have read nothing."""
        held = self._hand_over.held()
        lanes = self._train.micro_batch_size
        return LaneMemory(self._model, self.micro_batches, lanes, held, self.device)

    def lanes_of(self, micro_batch: int) -> range:
        """See `Engine`."""
        return self.part.lanes_of(micro_batch)

    def train_step(
        self,
        read: WindowsOf,
        size: StepSize,
        rate_factor: float,
        penalty_factor: float = 1.0,
        stop: bool = False,
    ) -> StepResult:
        """See `Engine`."""
        begin = time.perf_counter()
        waited, seconds = self._waited(), dict(self._seconds)
        set_learning_rate(self.optimizer, rate_factor)
        self.module.train()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._writes.zero_()
        self._bad_lanes.zero_()
        self._answers = torch.zeros(2, dtype=torch.float64, device=self.device)
        # Reductions average over data-parallel ranks, so the sums are scaled up by their number.
        weights = size.tokens * self._model.kv_heads
        penalty = write_penalty(self._model.memory, self.dp_world_size, weights)
        scale = Scale(self.dp_world_size / size.loss_weight, penalty_factor * penalty)
        schedule = train_schedule(
            self.part.stage, self.num_stages, self.micro_batches, self._train.chunks
        )
        self._run(schedule, read, self.memories, scale)
        reduced = self._clock("pipeline", begin)
        fault = self._find_fault()
        if not fault:
            with traced("sum of gradients"):
                self.reduce_gradients()
        stepped = self._clock("reduce", reduced)
        with traced("optimizer"):
            fault = self._update(fault)
        self._clock("optimizer", stepped)
        asked = torch.tensor(float(stop), dtype=torch.float64, device=self.device)
        sums = self.all_sum(torch.stack((self._loss_sum, asked, *self._answers)))
        loss_sum, asked, right, answers = sums.tolist()
        spent = {phase: total - seconds[phase] for phase, total in self._seconds.items()}
        return StepResult(
            loss_sum,
            fault,
            self._bad_lanes.clone(),
            right,
            answers,
            asked > 0,
            self.gradient_norm,
            {group["name"]: group["lr"] for group in self.optimizer.param_groups},
            {**spent, **{name: now - waited[name] for name, now in self._waited().items()}},
        )

    def skip_window(self, starts: Tensor) -> None:
        """See `Engine`."""
        self.count_skipped()
        self._skipped_in_a_row += 1
        self._clear_lanes(starts)

    @torch.no_grad()
    def evaluate_window(
        self, read: WindowsOf, memories: LaneMemory, ablated: bool = False
    ) -> Tensor:
        """See `Engine`; the sum is 0 before the last stage."""
        self.module.eval()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        schedule = evaluation_schedule(self.micro_batches, self._train.chunks)
        with memory_ablated(self.module.blocks, ablated):
            self._run(schedule, read, memories, None)
        return self._loss_sum

    def generate(
        self, prompt: list[int], max_new_tokens: int, temperature: float, seed: int
    ) -> list[int]:
        """See `Engine`."""
        return generate(self, prompt, max_new_tokens, temperature, seed)

    def written(self) -> Tensor:
        """See `Engine`."""
        return self.all_sum(self._writes.clone())

    def describe_memory(self) -> tuple[np.ndarray, dict[int, float]]:
        """See `Engine`."""
        gates = {}
        for block, layer in zip(self.part.blocks, self.module.blocks, strict=True):
            with self.whole(layer):
                gates[block] = layer.self_attn.beta.detach().float().sigmoid().tolist()
        norms = {block: self.memories.stacked(block).mean_norm() for block in self.memories.blocks}
        all_gates, all_norms = {}, {}
        for rank_gates, rank_norms in gathered((gates, norms)):
            all_gates |= rank_gates
            for block, norm in rank_norms.items():
                all_norms.setdefault(block, []).append(norm)
        table = np.array([all_gates[block] for block in sorted(all_gates)])
        return table, {block: float(np.mean(all_norms[block])) for block in sorted(all_norms)}

    def own_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """See `Engine`."""
        return self.module.own_parameters()

    def save(self, directory: Path, step: int) -> None:
        """See `Engine`."""
        self.save_states(directory, step)
        self._on_progress("saving weights and optimizer states")
        write_memories(self.memories.files(directory / "memory", self.part))
        self._on_progress("saving memories")

    def keep(self, directory: Path, step: int) -> Callable[[], list[str]]:
        """See `Engine`."""
        write = self.keep_states(directory, step)
        memories = self.memories.files(directory / "memory", self.part)
        return lambda: [*write(), *write_memories(memories)]

    def load(self, directory: Path, load_from: Path, state: dict[str, Any]) -> None:
        """See `Engine`."""
        self.load_states(load_from, directory, self.module.frozen)
        self.memories.read(directory / "memory", self.part.lanes)
        self.skipped_steps, self._skipped_in_a_row = state["skipped_steps"], 0

    def send_hidden(self, hidden: Tensor) -> None:
        """Sends bare hidden states to the next stage, outside of a schedule."""
        self._hops.to_next.send(hidden.contiguous().view(-1).view(torch.uint8))

    def receive_hidden(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Receives what the previous stage sent with `send_hidden`."""
        message = self._hops.from_previous.receive(math.prod(shape) * dtype.itemsize)
        return message.view(dtype).view(shape)

    def from_last(self, value: Tensor) -> Tensor:
        """Copies the last stage's tensor, in place, to the other stages of its pipeline."""
        return value

    def all_sum(self, values: Tensor) -> Tensor:
        """Sums a small tensor over all ranks."""
        dist.all_reduce(values)
        return values

    @property
    def sent_bytes(self) -> int:
        """Bytes this rank has sent to other stages and to ranks that share its windows so far."""
        return self._hops.sent_bytes + self.exchanged_bytes

    @property
    def exchanged_bytes(self) -> int:
        """Bytes this rank has sent to ranks that share its windows so far."""
        return self._context.sent_bytes if self._context else 0

    @property
    def waiting_for(self) -> str:
        """See `Engine`."""
        if self._context and self._context.waiting:
            return self._context.describe()
        return self._hops.waiting_for

    def step_bytes(self) -> int:
        """Returns the bytes that this rank sends in a training step, by the formula."""
        exchanged = self.part.step_exchange_bytes(self._model, self._train.chunks)
        return self._hand_over.step_bytes() + exchanged

    # The schedule

    def _run(
        self,
        schedule: Iterable[Forward | Backward],
        read: WindowsOf,
        memories: LaneMemory,
        scale: Scale | None,
    ) -> None:
        self._units: dict[tuple[int, int], Unit] = {}
        self._windows: dict[int, Windows] = {}
        self._passing: dict[int, dict[int, MemoryState]] = {}
        for unit in schedule:
            kind = type(unit).__name__.lower()
            name = f"{kind} of micro-batch {unit.micro_batch}, chunk {unit.chunk}"
            with traced(f"stage {self.part.stage}: {name}"):
                if isinstance(unit, Forward):
                    self._forward(unit, read, memories, scale is not None)
                    if scale is None and unit.chunk == self._train.chunks - 1:
                        self._hops.flush()  # without gradients, nothing else limits its lead
                else:
                    assert scale is not None
                    if unit.chunk == self._train.chunks - 1:
                        self._hand_over.take_back(unit.micro_batch, memories)
                    self._backward(unit, scale)
            if self._saves_memory:
                give_back_freed_memory()
            self._on_progress(name)
        if scale is None:
            for micro_batch in range(self.micro_batches):
                self._hand_over.hand_back(micro_batch)
                self._hand_over.take_back(micro_batch, memories)
        self._hops.flush()

    def _forward(
        self, unit: Forward, read: WindowsOf, memories: LaneMemory, training: bool
    ) -> None:
        micro_batch, chunk = unit
        first, last = chunk == 0, chunk == self._train.chunks - 1
        if first:
            self._passing[micro_batch] = memories.get(micro_batch)
            if self.part.is_first or self.part.is_last:
                windows = read(micro_batch)
                if training and windows.corrupt is not None:
                    self._note_corrupt(micro_batch, windows.corrupt)
                self._windows[micro_batch] = windows.to(self.device)
        passing = self._passing[micro_batch]
        if self.part.is_first:
            cut = self._cut(micro_batch, chunk)
            inputs, layout = cut.tokens, cut.layout
        else:
            payload = self._hand_over.receive(chunk, training)
            inputs, layout = payload.hidden.requires_grad_(training), payload.layout
            passing.update(payload.memories)

        own = self.part.blocks
        memory = [passing[block] for block in own]
        if not first and training:
            # Within a window, gradients flow back through the memory one unit at a time.
            memory = [
                layer.map(lambda tensor: tensor.detach().requires_grad_()) for layer in memory
            ]
        cut = self._cut(micro_batch, chunk) if self.part.is_last else None
        wanted = None if cut is None else Wanted(cut.labels, self._train.loss_chunk_tokens)
        output, after, writes = self.module(inputs, layout, memory, self._context, wanted)
        passing.update(zip(own, after, strict=True))
        if cut is not None:
            if training:
                if self._train.curriculum:
                    self._answers += answers_right(output.detach(), cut.weights, layout)
                output = output * cut.weights
            output = output.sum()
            self._loss_sum += output.detach()
        else:
            self._hand_over.send(Payload(output, layout, passing), chunk, training)
        if training:
            flat_in = [tensor for layer in memory for tensor in layer]
            flat_out = [tensor for layer in after for tensor in layer]
            mass = self._add_writes(writes) if writes else None
            self._units[unit] = Unit(inputs, flat_in, output, flat_out, mass)
        if last:
            self._hand_over.finish(micro_batch, self._passing.pop(micro_batch), memories)
            self._windows.pop(micro_batch, None)
            if training:
                self._hand_over.hand_back(micro_batch)

    def _cut(self, micro_batch: int, chunk: int) -> Windows:
        """Returns this rank's part of a chunk."""
        parts = self.part.context
        windows = self._windows[micro_batch]
        return windows.chunk(self._train.chunks * parts, chunk * parts + self.part.place)

    def _backward(self, unit: Backward, scale: Scale) -> None:
        done = self._units.pop((unit.micro_batch, unit.chunk))
        if self.part.is_last:
            gradient = torch.full_like(done.output, scale.loss)
        else:
            gradient = self._hand_over.receive_gradient(done.output)
        last = unit.chunk == self._train.chunks - 1
        # The next chunk left the gradients of the memory that this one handed on.
        of_memory = [] if last else self._memory_gradients
        outputs = done.outputs(gradient, scale.mass, of_memory)
        self.accumulate(*outputs, last=unit == (self.micro_batches - 1, 0))
        self._memory_gradients = [tensor.grad for tensor in done.memory_in]
        if not self.part.is_first:
            assert done.inputs.grad is not None
            self._hand_over.send_gradient(done.inputs.grad)

    def _note_corrupt(self, micro_batch: int, corrupt: Tensor) -> None:
        lanes = self.lanes_of(micro_batch)
        self._bad_lanes[lanes.start : lanes.stop] += corrupt.to(self.device)

    def _add_writes(self, writes: list[WriteStats]) -> Tensor:
        """Records what this stage's blocks wrote and returns their total mass, with gradient."""
        table = torch.stack([torch.stack(stats) for stats in writes])  # [blocks, 2]
        own = self.part.blocks
        self._writes[own.start : own.stop] += table.detach()
        return table[:, 0].sum()

    # The step

    def _find_fault(self) -> str:
        """Checks whether tokens were corrupt, or any rank's loss or gradient is not finite."""
        broken = ~self._loss_sum.isfinite()
        if not self.gradients_are_finite():
            broken = torch.ones_like(broken)
        sums = self.all_sum(torch.cat((broken.double().view(1), self._bad_lanes)))
        self._bad_lanes.copy_(sums[1:])
        return CORRUPT if self._bad_lanes.sum() > 0 else NOT_FINITE if sums[0] > 0 else ""

    def _update(self, fault: str) -> str:
        """Updates the weights unless there is a fault; returns why they did not change, or ""."""
        if fault:
            self.drop_gradients()
        elif self.step_optimizer():
            self._skipped_in_a_row = 0
            return ""
        self._skipped_in_a_row += 1
        self.memories.clear_broken()
        self._clear_lanes(self._bad_lanes > 0)
        return fault or NOT_FINITE

    def _clear_lanes(self, lanes: Tensor) -> None:
        """Empties the memories of marked lanes, bool [lanes of the global batch]."""
        for micro_batch in range(self.micro_batches):
            own = self.lanes_of(micro_batch)
            self.memories.clear(micro_batch, lanes[own.start : own.stop].to(self.device))

    def _waited(self) -> dict[str, float]:
        """Returns for how long this rank has waited for others so far."""
        waited = {"waiting_for_stages": self._hops.seconds}
        if self._context:
            waited["waiting_for_context"] = self._context.seconds
        return waited

    def _clock(self, phase: str, begin: float) -> float:
        settle(self.device)
        now = time.perf_counter()
        self._seconds[phase] += now - begin
        return now
