"""Policies that decide at a stage's edges where memories are kept; layers know nothing of them.

Both policies give the same numbers. With `Carried`, the memories of all layers travel with the
activations and return from the last stage to the first for the lane's next window, so that only the
first stage holds memories between steps. With `Resident`, each stage keeps those of its own layers.
"""

from dataclasses import dataclass

from infini_ds.parallel.pipeline.payload import Wire


@dataclass(frozen=True)
class MemoryTransport:
    """Decides what crosses from one stage to the next, and what a stage keeps between windows."""

    bounds: tuple[int, ...]
    """First block of each stage, followed by the number of blocks."""

    returns = False
    """Whether the last stage sends the memories of all layers back to the first."""

    def held(self, stage: int) -> range:
        """Returns the blocks whose memories this stage keeps between a lane's windows."""
        raise NotImplementedError

    def riding(self, stage: int, first_chunk: bool, last_chunk: bool) -> list[int]:
        """Returns the blocks whose memories go to the next stage with a window's chunk."""
        raise NotImplementedError

    def step_bytes(self, wire: Wire, stage: int, micro_batches: int, chunks: int) -> int:
        """Returns the bytes that one rank of a stage sends in a training step; see `Wire`."""
        last, total = len(self.bounds) - 2, 0
        if stage != last:
            riding = [
                self.riding(stage, chunk == 0, chunk == chunks - 1) for chunk in range(chunks)
            ]
            total += sum(map(wire.payload_bytes, riding))
        if stage != 0:
            total += chunks * wire.gradient_bytes()
            if stage == last and self.returns:
                total += wire.memories_bytes(range(self.bounds[-1]))
        return micro_batches * total


class Carried(MemoryTransport):
    """Memories travel with the activations.

    A window's first chunk carries the memories that later stages have yet to read, and its last
    chunk those that this and earlier stages have written, so each layer's memory crosses each hop
    once.
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
