"""Which stage, blocks and lanes a rank holds."""

from dataclasses import dataclass


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
        """The global lanes that this rank reads."""
        count = self.micro_batches * self.micro_batch_size
        return range(self.replica * count, (self.replica + 1) * count)

    def lanes_of(self, micro_batch: int) -> range:
        """Returns the global lanes that this rank reads in a micro-batch."""
        first = self.lanes.start + micro_batch * self.micro_batch_size
        return range(first, first + self.micro_batch_size)
