"""Plans a run's layout: what each device holds, what is sent, and how much of the time computes.

The bytes include weights, gradients, optimizer states, memories, activations and the largest
temporary tensors, but not libraries, their buffers and fragmentation. Time is counted in FLOPs, as
if messages, reductions and the optimizer step took none.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from typing import NamedTuple, get_args

import torch

from infini_ds.config import ModelConfig, RunConfig
from infini_ds.errors import UserError
from infini_ds.kernels.backend import TRITON_HEAD_DIMS
from infini_ds.model.block import Checkpointing
from infini_ds.model.flops import (
    forward_flops_per_token,
    sharing_flops,
    training_flops_per_token,
)
from infini_ds.model.head import loss_chunk
from infini_ds.parallel.part import Part
from infini_ds.parallel.pipeline.balance import balance
from infini_ds.parallel.pipeline.payload import Wire
from infini_ds.parallel.pipeline.transport import TRANSPORTS
from infini_ds.planning.activations import Unit, block_bytes
from infini_ds.planning.estimate import StageNeeds, layer_parameters, stage_needs, weight_bytes
from infini_ds.planning.schedule_time import StepTime, least_time, most_units, step_time
from infini_ds.system.compute_type import DTYPES

LOGIT_BYTES = 16
"""Bytes of one logit and its gradient in the loss: as computed, in fp32, log-softmax, and back."""

LIVE_WEIGHTS = 10**9
"""Number of weights that DeepSpeed's ZeRO-3 has at hand at the same time at most."""

WORTHWHILE = 0.2
"""The share of a device's memory that twice as many ranks to a window must save, to be suggested.
The messages that they cost are not in the time."""


class StagePlan(NamedTuple):
    """The plan of each rank of a stage; sizes in bytes."""

    first_block: int
    last_block: int
    needs: StageNeeds
    units: int
    """Maximum number of chunks whose activations are kept at one time."""
    activations: int
    temporary: int
    sent: int
    """Bytes sent in a step to other stages, and to ranks that share windows."""
    exchanged: int
    """How many of them go to ranks that share windows."""
    reduced: int
    """Bytes sent in a step to data-parallel ranks, see `_reduced_bytes`."""
    waiting: float
    """Share of its time that it waits for other stages."""

    @property
    def device(self) -> int:
        """Total bytes on the device."""
        return self.needs.device + self.activations + self.temporary


class Plan(NamedTuple):
    """The plan of a run on a given number of processes."""

    data: int
    """Number of data-parallel ranks of each stage."""
    context: int
    """How many of them share a window."""
    micro_batches: int
    chunks: int
    checkpointing: Checkpointing
    parameters: int
    stages: list[StagePlan]
    tokens: int
    """Tokens read in a step if no segment were padded."""
    flops: int
    """FLOPs of the model in a step, not counting recomputation."""
    waiting: float
    """Share of the devices' time lost to the pipeline's bubble and to uneven stages."""
    again: float
    """Share of the devices' time spent on recomputing activations."""
    exchange: float
    """Share of the devices' time spent on computing what ranks that share windows tell each other,
    and what follows from it; see `sharing_flops`. Its backward pass counts twice, as elsewhere."""

    @property
    def efficiency(self) -> float:
        """Share of the devices' time that goes into the model itself."""
        return 1 - self.waiting - self.again - self.exchange

    @property
    def most(self) -> int:
        """Bytes on the fullest device."""
        return max(stage.device for stage in self.stages)


def plan(config: RunConfig, processes: int) -> Plan:
    """Plans a run whose model.vocab_size and train.dtype are known.

    Raises:
        UserError: the number of processes does not fit the config.
    """
    return _plan(config, processes, step_time)


def _plan(config: RunConfig, processes: int, timed: Callable[..., StepTime]) -> Plan:
    """Plans a run by the time that `timed` returns, `step_time` or what works like it."""
    data = config.data_parallel_size(processes)
    model, train = config.model, config.train
    stages, chunks = processes // data, train.chunks
    context = config.parallel.context_parallel
    micro_batches = config.lanes_of_a_rank(data) // train.micro_batch_size
    segments = train.window_segments // chunks // context
    unit = Unit(train.micro_batch_size, segments, DTYPES[train.dtype], context)
    tokens = unit.batch * segments * model.segment_length
    bounds = balance(model, stages)
    forward, again, shared = _costs(config, bounds, unit)
    backward = [2 * own + more for own, more in zip(forward, again, strict=True)]
    time = timed(forward, backward, micro_batches, chunks)
    whole = time.step * stages
    transport = TRANSPORTS[config.parallel.memory_transport](tuple(bounds))
    wire = Wire(model, unit.batch, segments, unit.dtype, torch.device("cpu"), config.packed)
    layers = [model.of_layer(layer) for layer in range(model.num_layers)]
    kept = [block_bytes(layer, unit, train.activation_checkpointing) for layer in layers]
    made_again = [
        block_bytes(layer, unit, "none") - own for layer, own in zip(layers, kept, strict=True)
    ]
    hidden = tokens * model.hidden_size * unit.dtype.itemsize
    stage_plans = []
    for stage, needs in enumerate(stage_needs(config, processes)):
        first, end = bounds[stage], bounds[stage + 1]
        units = most_units(stage, stages, micro_batches, chunks)
        # Each block's count includes its input; the last block's output comes on top.
        unit_bytes = sum(kept[first:end]) + hidden
        if stage == 0 and train.activation_checkpointing == "block":
            unit_bytes += tokens * torch.int64.itemsize - hidden  # see `Block.forward`
        activations = units * unit_bytes
        temporary = max(made_again[first:end]) + 3 * tokens * model.mlp_size * unit.dtype.itemsize
        if stage == stages - 1:
            logits = min(tokens, _loss_chunk(config)) * model.vocab_size * LOGIT_BYTES
            temporary = max(temporary, logits)
        if config.parallel.zero_stage == 3:
            one_layer = max(layer_parameters(model))
            live = one_layer if config.parallel.nvme_path else LIVE_WEIGHTS
            temporary += min(needs.parameters, live) * weight_bytes(config)
        part = Part(stage, 0, micro_batches, unit.batch, tuple(bounds), context)
        exchanged = part.step_exchange_bytes(model, chunks)
        sent = transport.step_bytes(wire, stage, micro_batches, chunks) + exchanged
        waiting = 1 - time.busy[stage] / time.step
        reduced = _reduced_bytes(config, needs.parameters, data, micro_batches * chunks)
        stage_plans.append(
            StagePlan(
                first, end - 1, needs, units, activations, temporary, sent, exchanged, reduced,
                waiting,
            )
        )  # fmt: skip
    return Plan(
        data,
        context,
        micro_batches,
        chunks,
        train.activation_checkpointing,
        sum(layer_parameters(model)),
        stage_plans,
        config.step_tokens,
        config.step_tokens * training_flops_per_token(model),
        time.bubble,
        micro_batches * chunks * sum(again) / whole,
        micro_batches * chunks * 3 * sum(shared) / whole,
    )


def _reduced_bytes(config: RunConfig, parameters: int, data: int, units: int) -> int:
    """Returns the bytes that a rank sends in a step for gradients and weights, by rings.

    Gradients are summed up in fp32: once a step, or with ZeRO-2 and 3 after each unit, and then
    scattered. ZeRO-1 and 2 gather the new weights, ZeRO-3 all weights in each pass of each unit.
    """
    zero, weight = config.parallel.zero_stage, weight_bytes(config)
    gradients = 4 * units if zero >= 2 else 2 * 4
    weights = {0: 0, 3: 2 * units * weight}.get(zero, weight)
    return parameters * (gradients + weights) * (data - 1) // data


class Engine(NamedTuple):
    """A plan of the same run with another engine."""

    zero_stage: int
    plan: Plan


def engines(config: RunConfig, processes: int, limit: float = math.inf) -> list[Engine]:
    """Returns plans of the same run with a pipeline and without one, by ZeRO stage.

    They are those that the processes and the lanes allow: the longest pipeline, and one stage with
    ZeRO 1, 2 and 3, which reads windows as wholes because it has no bubble to shorten.

    Args:
        limit: bytes of a device. Activations are computed again if that keeps below it.
    """
    sharded = (2, 3) if config.optimizer.name == "adamw" else ()
    found: dict[tuple[int, int], Engine] = {}
    for stages, zero in (("auto", 1), (1, 1), *((1, zero) for zero in sharded)):
        parallel: dict = {"pipeline_stages": stages, "zero_stage": zero}
        if zero != 3:
            parallel |= {"offload_weights": False, "nvme_path": ""}
        plans, own = [], config.train.activation_checkpointing
        for kind in dict.fromkeys((own, *get_args(Checkpointing))):
            chunks = config.train.chunks if stages == "auto" else 1
            train = {"chunks": chunks, "activation_checkpointing": kind}
            changed = config.model_copy(
                update={
                    "parallel": config.parallel.model_copy(update=parallel),
                    "train": config.train.model_copy(update=train),
                }
            )
            try:
                plans.append(plan(changed, processes))
            except UserError:
                break  # the ranks do not fit the lanes
        if plans:
            best = next((each for each in plans if each.most <= limit), plans[-1])
            found.setdefault((len(best.stages), zero), Engine(zero, best))
    return list(found.values())


def alternatives(config: RunConfig, processes: int, limit: float = math.inf) -> list[Plan]:
    """Returns the best plans of the run with other stages, chunks, checkpointing, and numbers of
    ranks that share windows.

    They are the plans that no other beats in both memory and efficiency, most efficient first.
    Sharing windows among more ranks has to be WORTHWHILE.

    Args:
        limit: bytes of a device, which none may exceed.
    """
    # Playing a schedule takes long, and most plans are beaten even if they took the least time.
    bounds = [each for each in _bounds(config, processes) if each[0].most <= limit]
    bounds.sort(key=lambda each: (-each[0].efficiency, _weighed(each[0])))
    plans: list[Plan] = []
    for bound, choice in bounds:
        if not any(
            other.efficiency >= bound.efficiency and _weighed(other) <= _weighed(bound)
            for other in plans
        ):
            plans.append(plan(choice, processes))
    plans.sort(key=lambda each: (-each.efficiency, _weighed(each)))
    best: list[Plan] = []
    for each in plans:
        if all(each.most < other.most and _weighed(each) < _weighed(other) for other in best):
            best.append(each)
    return best


def _weighed(plan: Plan) -> float:
    """Returns the bytes of the fullest device, and more the more ranks share a window."""
    return plan.most / (1 - WORTHWHILE) ** math.log2(plan.context)


def least_memory(config: RunConfig, processes: int) -> int:
    """Returns the bytes of the fullest device in the layout that needs the least."""
    return min(bound.most for bound, _ in _bounds(config, processes))


def _bounds(config: RunConfig, processes: int) -> Iterator[tuple[Plan, RunConfig]]:
    """Yields plans in the least time that they could take, each with its config."""
    for choice in _choices(config, processes):
        try:
            yield _plan(choice, processes, least_time), choice
        except UserError:
            continue  # the stages do not fit the layers, or the ranks do not fit the lanes


def with_context(config: RunConfig, context: int, stages: int | None = None) -> RunConfig:
    """Returns the config with another number of ranks that share windows, and of stages if given.

    The number must divide the segments of a chunk.
    """
    changes: dict[str, int] = {"context_parallel": context}
    if stages is not None:
        changes["pipeline_stages"] = stages
    parallel = config.parallel.model_copy(update=changes)
    return config.model_copy(update={"parallel": parallel})


def divisors(number: int) -> list[int]:
    """Returns what divides a number, in ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _choices(config: RunConfig, processes: int) -> Iterator[RunConfig]:
    """Yields the config with all stages, chunks, checkpointing and sharing ranks to be tried."""
    train = config.train
    cuts, kinds = divisors(train.window_segments), get_args(Checkpointing)
    pipelines = [1] if config.parallel.shards_gradients else divisors(processes)
    for stages, chunks, kind in product(pipelines, cuts, kinds):
        if stages == 1 and chunks > 1:
            continue  # one stage has no bubble to shorten
        choice = {"chunks": chunks, "activation_checkpointing": kind}
        changed = config.model_copy(update={"train": train.model_copy(update=choice)})
        for context in divisors(train.window_segments // chunks):
            if processes // stages % context == 0:
                yield with_context(changed, context, stages)


def _costs(
    config: RunConfig, bounds: list[int], unit: Unit
) -> tuple[list[float], list[float], list[float]]:
    """Returns the FLOPs of a unit by stage: forward, recomputation in its backward pass, and what
    of forward is there only because ranks share windows."""
    model, train = config.model, config.train
    tokens = unit.batch * unit.segments * model.segment_length
    *blocks, _, head = forward_flops_per_token(model)[1:]
    sharing = [0] * len(blocks)
    if unit.ranks > 1:
        triton = train.dtype == "bf16" and model.head_dim in TRITON_HEAD_DIMS
        triton = triton and model.has_kernels
        layers = (model.of_layer(layer) for layer in range(model.num_layers))
        each = (sharing_flops(layer, unit.segments, unit.ranks, triton) for layer in layers)
        sharing = [unit.batch * flops for flops in each]
    less = {"block": 0, "attention": _feed_forward(model)}.get(train.activation_checkpointing)
    forward, more, shared = [], [], []
    for first, end in pairwise(bounds):
        own, told = sum(blocks[first:end]), sum(sharing[first:end])
        shared.append(float(told))
        forward.append(float(tokens * own + told))
        again = 0 if less is None else tokens * (own - (end - first) * less) + told
        more.append(float(again))
    forward[-1] += tokens * head
    if tokens > _loss_chunk(config):
        more[-1] += tokens * head
    return forward, more, shared


def _loss_chunk(config: RunConfig) -> int:
    return loss_chunk(config.train.loss_chunk_tokens, config.model.vocab_size, "cuda")


def _feed_forward(model: ModelConfig) -> int:
    return 2 * 3 * model.hidden_size * model.mlp_size
