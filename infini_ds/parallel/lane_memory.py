"""What a stage keeps of its lanes' memories between windows."""

import torch

from infini_ds.config import ModelConfig
from infini_ds.memory import MemoryState


class LaneMemory:
    """The memories that one stage holds, by micro-batch and block: data, without gradients.

    Not module state: a buffer would be saved once for all data-parallel ranks, and each has
    lanes of its own.
    """

    def __init__(
        self,
        config: ModelConfig,
        micro_batches: int,
        lanes: int,
        blocks: range,
        device: torch.device,
    ):
        self.blocks = blocks
        self._device = device
        self.by_micro_batch: list[dict[int, MemoryState]] = [
            {
                block: MemoryState.empty(lanes, config.kv_heads, config.head_dim, device)
                for block in blocks
            }
            for _ in range(micro_batches)
        ]

    def get(self, micro_batch: int) -> dict[int, MemoryState]:
        """Memories of the held blocks before the micro-batch's next window."""
        return dict(self.by_micro_batch[micro_batch])

    def put(self, micro_batch: int, memories: dict[int, MemoryState]) -> None:
        """Keeps those of the held blocks after a window."""
        self.by_micro_batch[micro_batch] = {
            block: memories[block].map(torch.Tensor.detach) for block in self.blocks
        }

    def clear_broken(self) -> None:
        """Empties the memories that are not finite; they would spoil the rest of a document."""
        for held in self.by_micro_batch:
            for block, memory in held.items():
                held[block] = memory.cleared_where_broken()

    def clear(self, micro_batch: int, lanes: torch.Tensor) -> None:
        """Empties the memories of the lanes, bool [lanes], of a micro-batch that are marked."""
        held = self.by_micro_batch[micro_batch]
        for block, memory in held.items():
            held[block] = memory.cleared(lanes)

    def stacked(self, block: int) -> MemoryState:
        """One block's memories of all this rank's lanes, in the order of lanes."""
        return MemoryState.cat([held[block] for held in self.by_micro_batch])

    def load(self, block: int, memory: MemoryState) -> None:
        """The inverse of `stacked`."""
        pieces = memory.chunk(len(self.by_micro_batch))
        for held, piece in zip(self.by_micro_batch, pieces, strict=True):
            held[block] = piece.map(lambda tensor: tensor.to(self._device).clone())
