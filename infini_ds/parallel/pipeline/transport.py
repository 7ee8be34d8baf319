"""Where compressive memories are: policies at the edges of a stage, unknown to the layers.

Both give the same numbers. `Carried`: the memories of all layers ride with the activations and
return from the last stage to the first for the lane's next window, so that only the first stage
holds any between steps. `Resident`: each stage keeps those of its own layers.
"""

from dataclasses import dataclass

from infini_ds.parallel.pipeline.payload import Wire


@dataclass(frozen=True)
class MemoryTransport:
    """What crosses the hop from one stage to the next, and what a stage keeps between windows."""

    bounds: tuple[int, ...]
    """First block of each stage, and the number of blocks."""

    returns = False
    """Whether the last stage sends the memories of all layers back to the first."""

    def held(self, stage: int) -> range:
        """Blocks whose memories this stage keeps from one window of a lane to the next."""
        raise NotImplementedError

    def riding(self, stage: int, first_chunk: bool, last_chunk: bool) -> list[int]:
        """Blocks whose memories go from this stage to the next with a chunk of a window."""
        raise NotImplementedError

    def step_bytes(self, wire: Wire, stage: int, micro_batches: int, chunks: int) -> int:
        """What a rank of a stage sends to other stages in a training step, see `Wire`."""
        last, total = len(self.bounds) - 2, 0
        if stage != last:
            riding = [
                len(self.riding(stage, chunk == 0, chunk == chunks - 1)) for chunk in range(chunks)
            ]
            total += sum(wire.payload_bytes(memories) for memories in riding)
        if stage != 0:
            total += chunks * wire.gradient_bytes()
            if stage == last and self.returns:
                total += wire.memories_bytes(self.bounds[-1])
        return micro_batches * total


class Carried(MemoryTransport):
    """Memories ride with the activations.

    With a window's first chunk go the memories that later stages have yet to read, with its last
    chunk those that this and earlier stages have written: each layer's crosses each hop once.
    """

    returns = True

    def held(self, stage: int) -> range:
        return range(self.bounds[-1]) if stage == 0 else range(0)

    def riding(self, stage: int, first_chunk: bool, last_chunk: bool) -> list[int]:
        end = self.bounds[stage + 1]
        written = range(end) if last_chunk else range(0)
        unread = range(end, self.bounds[-1]) if first_chunk else range(0)
        return [*written, *unread]


class Resident(MemoryTransport):
    """Memories stay with their layers; only activations cross."""

    def held(self, stage: int) -> range:
        return range(self.bounds[stage], self.bounds[stage + 1])

    def riding(self, stage: int, first_chunk: bool, last_chunk: bool) -> list[int]:
        return []


TRANSPORTS = {"carried": Carried, "resident": Resident}
