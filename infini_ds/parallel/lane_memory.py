"""What a stage keeps of its lanes' memories between windows."""

import torch

from infini_ds.config import ModelConfig
from infini_ds.kernels.infini_attention import LayerMemory


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
        self.by_micro_batch: list[dict[int, LayerMemory]] = [
            {
                block: LayerMemory.empty(lanes, config.kv_heads, config.head_dim, device)
                for block in blocks
            }
            for _ in range(micro_batches)
        ]

    def get(self, micro_batch: int) -> dict[int, LayerMemory]:
        """Memories of the held blocks before the micro-batch's next window."""
        return dict(self.by_micro_batch[micro_batch])

    def put(self, micro_batch: int, memories: dict[int, LayerMemory]) -> None:
        """Keeps those of the held blocks after a window."""
        self.by_micro_batch[micro_batch] = {
            block: LayerMemory(*(tensor.detach() for tensor in memories[block]))
            for block in self.blocks
        }

    def clear_broken(self) -> None:
        """Empties the memories that are not finite; they would spoil the rest of a document."""
        for held in self.by_micro_batch:
            for block, (kv, norm) in held.items():
                fine = kv.isfinite().all((-2, -1)) & norm.isfinite().all(-1)  # [lanes, kv_heads]
                held[block] = LayerMemory(
                    kv.masked_fill(~fine[..., None, None], 0), norm.masked_fill(~fine[..., None], 0)
                )

    def clear(self, micro_batch: int, lanes: torch.Tensor) -> None:
        """Empties the memories of the lanes, bool [lanes], of a micro-batch that are marked."""
        held = self.by_micro_batch[micro_batch]
        for block, (kv, norm) in held.items():
            held[block] = LayerMemory(
                kv.masked_fill(lanes[:, None, None, None], 0),
                norm.masked_fill(lanes[:, None, None], 0),
            )

    def stacked(self, block: int) -> LayerMemory:
        """One block's memories of all this rank's lanes, in the order of lanes."""
        memories = [held[block] for held in self.by_micro_batch]
        return LayerMemory(
            torch.cat([memory.kv for memory in memories]),
            torch.cat([memory.norm for memory in memories]),
        )

    def load(self, block: int, memory: LayerMemory) -> None:
        """The inverse of `stacked`."""
        count = len(self.by_micro_batch)
        pieces = zip(memory.kv.chunk(count), memory.norm.chunk(count), strict=True)
        for held, (kv, norm) in zip(self.by_micro_batch, pieces, strict=True):
            device = held[block].kv.device
            held[block] = LayerMemory(kv.to(device).clone(), norm.to(device).clone())
