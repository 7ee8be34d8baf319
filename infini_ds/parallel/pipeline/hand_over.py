"""Passes chunks, gradients and memories from one stage to another."""

from dataclasses import replace

import torch
from torch import Tensor

from infini_ds.memory import MemoryState
from infini_ds.parallel.lane_memory import LaneMemory
from infini_ds.parallel.part import Part
from infini_ds.parallel.pipeline.hops import Hops
from infini_ds.parallel.pipeline.payload import Payload, Wire
from infini_ds.parallel.pipeline.transport import MemoryTransport


class HandOver:
    """One stage's messages: chosen by a transport, packed in a wire format, sent over its hops.

    Args:
        wire: the format of training. Windows of an evaluation are never packed, so the messages of
            an evaluation have none of what belongs to packing.
        chunks: number of chunks in a window.
    """

    def __init__(self, transport: MemoryTransport, wire: Wire, hops: Hops, part: Part, chunks: int):
        self._transport, self._wire, self._hops = transport, wire, hops
        self._evaluation_wire = replace(wire, packed=False)
        self._part, self._chunks = part, chunks
        self._returns = transport.returns and not part.is_alone
        self._returning: dict[int, Tensor] = {}

    def held(self) -> range:
        """Returns the blocks whose memories this stage keeps between a lane's windows."""
        return self._transport.held(self._part.stage)

    def step_bytes(self) -> int:
        """Returns the bytes that this rank sends in a training step, by the formula."""
        part = self._part
        return self._transport.step_bytes(self._wire, part.stage, part.micro_batches, self._chunks)

    def send(self, payload: Payload, chunk: int, training: bool) -> None:
        """Sends a chunk to the next stage, with the memories that travel with it."""
        riding = self._riding(self._part.stage, chunk)
        memories = {block: payload.memories[block].map(Tensor.detach) for block in riding}
        wire = self._wire_of(training)
        self._hops.to_next.send(wire.pack(payload._replace(memories=memories)))

    def receive(self, chunk: int, training: bool) -> Payload:
        """Receives what the previous stage sent with `send`."""
        riding = self._riding(self._part.stage - 1, chunk)
        wire = self._wire_of(training)
        message = self._hops.from_previous.receive(wire.payload_bytes(riding))
        return wire.unpack(message, riding)

    def send_gradient(self, gradient: Tensor) -> None:
        """Sends the gradient of what was received back to the previous stage."""
        message = gradient.contiguous().view(-1).view(torch.uint8)
        padding = self._wire.gradient_bytes() - message.numel()
        self._hops.gradient_to_previous.send(torch.nn.functional.pad(message, (0, padding)))

    def receive_gradient(self, output: Tensor) -> Tensor:
        """Receives the gradient of what was sent to the next stage."""
        message = self._hops.gradient_from_next.receive(self._wire.gradient_bytes())
        return message.view(self._wire.dtype)[: output.numel()].view_as(output)

    def finish(
        self, micro_batch: int, passing: dict[int, MemoryState], memories: LaneMemory
    ) -> None:
        """Detaches a window's memories, to keep them here or to return them to the first stage."""
        if not self._returns:
            memories.put(micro_batch, passing)
        elif self._part.is_last:
            everything = {block: passing[block].map(Tensor.detach) for block in sorted(passing)}
            self._returning[micro_batch] = self._wire.pack_memories(everything)

    def hand_back(self, micro_batch: int) -> None:
        """Sends a window's memories from the last stage to the first, if they return at all.

        NCCL keeps the sender's GPU busy until the receive is posted, and whatever needs the whole
        GPU to be idle, such as freeing memory, then waits for the receiver. So the message is sent
        when the first stage will ask for it without waiting for anything else from here: in
        training before the window's first gradient, in evaluation after the last window.
        """
        if micro_batch in self._returning:
            self._hops.returned.send(self._returning.pop(micro_batch))

    def take_back(self, micro_batch: int, memories: LaneMemory) -> None:
        """Keeps on the first stage what the last one has handed back, if anything."""
        if self._returns and self._part.is_first:
            blocks = list(self._part.all_blocks)
            message = self._hops.returned.receive(self._wire.memories_bytes(blocks))
            memories.put(micro_batch, self._wire.unpack_memories(message, blocks))

    def _wire_of(self, training: bool) -> Wire:
        return self._wire if training else self._evaluation_wire

    def _riding(self, stage: int, chunk: int) -> list[int]:
        return self._transport.riding(stage, chunk == 0, chunk == self._chunks - 1)
