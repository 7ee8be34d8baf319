"""The memories of a stage's lanes between windows."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from infini_ds.config import ModelConfig
from infini_ds.memory import MemoryState
from infini_ds.model.layer_state import empty_state, state_shapes
from infini_ds.parallel.part import Part


class LaneMemory:
    """The memories that one stage holds, by micro-batch and block: data without gradients.

    They are not module state: a buffer would be saved once for all data-parallel ranks, but each
    rank has lanes of its own.
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
        self._config = config
        self.by_micro_batch: list[dict[int, MemoryState]] = [
            {block: empty_state(config.of_layer(block), lanes, device) for block in blocks}
            for _ in range(micro_batches)
        ]

    def get(self, micro_batch: int) -> dict[int, MemoryState]:
        """Returns the memories of the held blocks before the micro-batch's next window."""
        return dict(self.by_micro_batch[micro_batch])

    def put(self, micro_batch: int, memories: dict[int, MemoryState]) -> None:
        """Keeps the memories of the held blocks after a window."""
        self.by_micro_batch[micro_batch] = {
            block: memories[block].map(torch.Tensor.detach) for block in self.blocks
        }

    def clear_broken(self) -> None:
        """Empties memories that are not finite, since they would spoil the rest of a document."""
        for held in self.by_micro_batch:
            for block, memory in held.items():
                held[block] = memory.cleared_where_broken()

    def clear(self, micro_batch: int, lanes: torch.Tensor) -> None:
        """Empties a micro-batch's memories in the marked lanes, bool [lanes]."""
        held = self.by_micro_batch[micro_batch]
        for block, memory in held.items():
            held[block] = memory.cleared(lanes)

    def stacked(self, block: int) -> MemoryState:
        """Returns one block's memories of all this rank's lanes, in the order of lanes."""
        return MemoryState.cat([held[block] for held in self.by_micro_batch])

    def load(self, block: int, memory: MemoryState) -> None:
        """Sets one block's memories of all this rank's lanes; the inverse of `stacked`."""
        pieces = memory.chunk(len(self.by_micro_batch))
        for held, piece in zip(self.by_micro_batch, pieces, strict=True):
            held[block] = piece.map(lambda tensor: tensor.to(self._device).clone())

    def files(self, directory: Path, part: Part) -> dict[Path, dict[str, torch.Tensor]]:
        """Returns what this rank writes of a checkpoint: for each block a file, which is named
        after it and the first of the rank's lanes, with copies of its memories in host memory."""
        if part.place > 0:  # ranks that share windows have the same memories
            return {}
        first = part.lanes.start
        return {
            directory / f"block_{block:03d}.lanes_{first:05d}.safetensors": {
                name: tensor.to("cpu", copy=True)
                for name, tensor in self.stacked(block).named().items()
            }
            for block in self.blocks
        }

    def _part(self, file: Any, block: int, low: int, high: int) -> MemoryState:
        """Reads some lanes of a block's open file, in which earlier versions kept no tail."""
        kept = file.keys()
        return MemoryState(
            **{
                name: file.get_slice(name)[low:high]
                if name in kept
                else torch.zeros(high - low, *shape)
                for name, shape in state_shapes(self._config.of_layer(block)).items()
            }
        )

    def read(self, directory: Path, lanes: range) -> None:
        """Reads this stage's blocks and lanes from all ranks' files, whatever layout wrote them.

        Args:
            lanes: the global lanes of this rank.
        """
        for block in self.blocks:
            pieces = []
            for path in sorted(directory.glob(f"block_{block:03d}.lanes_*.safetensors")):
                first = int(path.stem.rpartition("_")[2])
                with safe_open(path, framework="pt") as file:
                    count = file.get_slice("norm").get_shape()[0]
                    low, high = max(lanes.start - first, 0), min(lanes.stop - first, count)
                    if low < high:
                        pieces.append(self._part(file, block, low, high))
            memory = MemoryState.cat(pieces)
            assert len(memory.norm) == len(lanes)
            self.load(block, memory)


def write_memories(files: dict[Path, dict[str, torch.Tensor]]) -> list[str]:
    """Writes the files of `LaneMemory.files` and returns their paths."""
    for path, tensors in files.items():
        save_file(tensors, path)
    return [str(path) for path in files]
