"""Which stage, blocks, lanes and segments a rank holds."""

from dataclasses import dataclass

import torch

from infini_ds.config import ModelConfig
from infini_ds.model.layer_state import told_numbers


@dataclass(frozen=True)
class Part:
    """One rank's part of the work."""

    stage: int
    """Index of the stage in its pipeline."""
    replica: int
    """Index among the data-parallel ranks."""
    micro_batches: int
    """Micro-batches of a step on each data-parallel rank."""
    micro_batch_size: int
    """Number of lanes in a micro-batch."""
    bounds: tuple[int, ...]
    """First block of each stage, followed by the number of blocks."""
    context: int = 1
    """Number of neighbouring data-parallel ranks that share the windows of their lanes."""

    @property
    def place(self) -> int:
        """Which part of the segments of each chunk this rank reads, among those that share it."""
        return self.replica % self.context

    @property
    def is_first(self) -> bool:
        """Whether this stage has the embedding and reads tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage has the head and reads labels."""
        return self.stage == len(self.bounds) - 2

    @property
    def is_alone(self) -> bool:
        """Whether the pipeline has only this stage."""
        return len(self.bounds) == 2

    @property
    def blocks(self) -> range:
        """The blocks of this stage."""
        return range(self.bounds[self.stage], self.bounds[self.stage + 1])

    @property
    def all_blocks(self) -> range:
        """The blocks of all stages."""
        return range(self.bounds[-1])

    @property
    def lanes(self) -> range:
        """The global lanes that this rank reads, alone or with the ranks that share its windows."""
        count = self.micro_batches * self.micro_batch_size
        group = self.replica // self.context
        return range(group * count, (group + 1) * count)

    def lanes_of(self, micro_batch: int) -> range:
        """Returns the global lanes that this rank reads in a micro-batch."""
        first = self.lanes.start + micro_batch * self.micro_batch_size
        return range(first, first + self.micro_batch_size)

    def exchange_bytes(self, model: ModelConfig) -> int:
        """Returns the bytes that a layer sends to the ranks that share a chunk, in each direction.

        They do not depend on the number of tokens.

        Args:
            model: the config of the layer, see `ModelConfig.of_layer`.
        """
        lanes = (self.context - 1) * self.micro_batch_size
        return lanes * told_numbers(model) * torch.float32.itemsize

    def step_exchange_bytes(self, model: ModelConfig, chunks: int) -> int:
        """Returns the bytes that this rank sends for `exchange_bytes` in a training step.

        Args:
            chunks: number of chunks in a window.
        """
        layers = sum(self.exchange_bytes(model.of_layer(block)) for block in self.blocks)
        return 2 * self.micro_batches * chunks * layers
