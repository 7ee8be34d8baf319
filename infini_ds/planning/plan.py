"""Plans a run's layout: what each device holds, what is sent, and how much of the time computes.

The bytes include weights, gradients, optimizer states, memories, activations and the largest
temporary tensors, but not libraries, their buffers and fragmentation. Time is counted in FLOPs, as
if messages, reductions and the optimizer step took none.
"""

from itertools import pairwise, product
from typing import NamedTuple, get_args

import torch

from infini_ds.config import ModelConfig, RunConfig
from infini_ds.errors import UserError
from infini_ds.model.block import Checkpointing
from infini_ds.model.flops import forward_flops_per_token, training_flops_per_token
from infini_ds.model.head import loss_chunk
from infini_ds.parallel.part import Part
from infini_ds.parallel.pipeline.balance import balance
from infini_ds.parallel.pipeline.payload import Wire
from infini_ds.parallel.pipeline.transport import TRANSPORTS
from infini_ds.planning.activations import Unit, block_bytes
from infini_ds.planning.estimate import StageNeeds, layer_parameters, stage_needs
from infini_ds.planning.schedule_time import most_units, step_time
from infini_ds.system.compute_type import DTYPES

LOGIT_BYTES = 16
"""Bytes of one logit and its gradient in the loss: as computed, in fp32, log-softmax, and back."""


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

    @property
    def efficiency(self) -> float:
        """Share of the devices' time that goes into the model itself."""
        return 1 - self.waiting - self.again

    @property
    def most(self) -> int:
        """Bytes on the fullest device."""
        return max(stage.device for stage in self.stages)


def plan(config: RunConfig, processes: int) -> Plan:
    """Plans a run whose model.vocab_size and train.dtype are known.

    Raises:
        UserError: the number of processes does not fit the config.
    """
    data = config.data_parallel_size(processes)
    model, train = config.model, config.train
    stages, chunks = processes // data, train.chunks
    context = config.parallel.context_parallel
    micro_batches = config.lanes_of_a_rank(data) // train.micro_batch_size
    segments = train.window_segments // chunks // context
    unit = Unit(train.micro_batch_size, segments, DTYPES[train.dtype])
    tokens = unit.batch * segments * model.segment_length
    bounds = balance(model, stages)
    forward, again = _costs(config, bounds, tokens)
    backward = [2 * own + more for own, more in zip(forward, again, strict=True)]
    time = step_time(forward, backward, micro_batches, chunks)
    whole = time.step * stages
    transport = TRANSPORTS[config.parallel.memory_transport](tuple(bounds))
    wire = Wire(model, unit.batch, segments, unit.dtype, torch.device("cpu"), config.packed)
    kept = block_bytes(model, unit, train.activation_checkpointing)
    made_again = block_bytes(model, unit, "none") - kept
    hidden = tokens * model.hidden_size * unit.dtype.itemsize
    made = []
    for stage, needs in enumerate(stage_needs(config, processes)):
        first, end = bounds[stage], bounds[stage + 1]
        units = most_units(stage, stages, micro_batches, chunks)
        # Each block's count includes its input; the last block's output comes on top.
        unit_bytes = (end - first) * kept + hidden
        if stage == 0 and train.activation_checkpointing == "block":
            unit_bytes += tokens * torch.int64.itemsize - hidden  # see `Block.forward`
        activations = units * unit_bytes
        temporary = made_again + 3 * tokens * model.mlp_size * unit.dtype.itemsize
        if stage == stages - 1:
            logits = min(tokens, _loss_chunk(config)) * model.vocab_size * LOGIT_BYTES
            temporary = max(temporary, logits)
        part = Part(stage, 0, micro_batches, unit.batch, tuple(bounds), context)
        sent = transport.step_bytes(wire, stage, micro_batches, chunks)
        sent += part.step_exchange_bytes(model, chunks)
        waiting = 1 - time.busy[stage] / time.step
        made.append(StagePlan(first, end - 1, needs, units, activations, temporary, sent, waiting))
    return Plan(
        data,
        micro_batches,
        chunks,
        train.activation_checkpointing,
        sum(layer_parameters(model)),
        made,
        config.step_tokens,
        config.step_tokens * training_flops_per_token(model),
        time.bubble,
        micro_batches * chunks * sum(again) / whole,
    )


def alternatives(config: RunConfig, processes: int) -> list[Plan]:
    """Returns the best plans of the run with other stages, chunks and checkpointing.

    They are the plans that no other beats in both memory and efficiency, most efficient first.
    """
    train = config.train
    degrees = [n for n in range(1, processes + 1) if processes % n == 0]
    cuts = [n for n in range(1, train.window_segments + 1) if train.window_segments % n == 0]
    plans = []
    for stages, chunks, checkpointing in product(degrees, cuts, get_args(Checkpointing)):
        if stages == 1 and chunks > 1:
            continue  # one stage has no bubble to shorten
        if train.window_segments // chunks % config.parallel.context_parallel:
            continue  # the ranks that share a window do not fit the segments of a chunk
        choice = {"chunks": chunks, "activation_checkpointing": checkpointing}
        parallel = config.parallel.model_copy(update={"pipeline_stages": stages})
        changes = {"parallel": parallel, "train": train.model_copy(update=choice)}
        try:
            plans.append(plan(config.model_copy(update=changes), processes))
        except UserError:
            continue  # the stages do not fit the layers, or the ranks do not fit the lanes
    plans.sort(key=lambda each: (-each.efficiency, each.most))
    best: list[Plan] = []
    for each in plans:
        if not best or each.most < best[-1].most:
            best.append(each)
    return best


def _costs(config: RunConfig, bounds: list[int], tokens: int) -> tuple[list[float], list[float]]:
    """Returns the FLOPs of a unit by stage: forward, and recomputation in its backward pass."""
    model, train = config.model, config.train
    _, block, *_, head = forward_flops_per_token(model)
    block_again = {"none": 0, "attention": block - _feed_forward(model), "block": block}
    again = block_again[train.activation_checkpointing]
    forward, more = [], []
    for first, end in pairwise(bounds):
        forward.append(float(tokens * (end - first) * block))
        more.append(float(tokens * (end - first) * again))
    forward[-1] += tokens * head
    if tokens > _loss_chunk(config):
        more[-1] += tokens * head
    return forward, more


def _loss_chunk(config: RunConfig) -> int:
    return loss_chunk(config.train.loss_chunk_tokens, config.model.vocab_size, "cuda")


def _feed_forward(model: ModelConfig) -> int:
    return 2 * 3 * model.hidden_size * model.mlp_size
