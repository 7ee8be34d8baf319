"""Writes safetensors files of any size with only one tensor in memory at a time.

A file is a header of names, dtypes, shapes and offsets, followed by the numbers. The header is
therefore planned from meta tensors, and each tensor is written to its place once it is made.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from infini_ds.conversion.pairs import Move
from infini_ds.runs.weights import INDEX, SINGLE, Weights
from infini_ds.system.ranges import check_finite

# Names of dtypes in the file format.
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}  # fmt: skip


@dataclass
class _Shard:
    metas: dict[str, Tensor] = field(default_factory=dict)
    size: int = 0


class Plan:
    """Assigns tensors to files.

    Args:
        moves: what is to be written, in order.
        weights: the tensors that the moves read.
        shard_bytes: a file takes no further tensor that would exceed this; 0 makes one file.
    """

    def __init__(self, moves: list[Move], weights: Weights, shard_bytes: int = 0):
        self._moves = moves
        self._weights = weights
        shards = [_Shard()]
        for move in moves:
            made = move.make([weights.metas[name] for name in move.reads])
            for name, meta in zip(move.writes, made, strict=True):
                size = meta.numel() * meta.itemsize
                if shard_bytes and shards[-1].size and shards[-1].size + size > shard_bytes:
                    shards.append(_Shard())
                shards[-1].metas[name] = meta
                shards[-1].size += size
        self._shards = shards

    @property
    def bytes(self) -> int:
        """Total size of all tensors in bytes."""
        return sum(shard.size for shard in self._shards)

    @property
    def files(self) -> int:
        """Number of files to write."""
        return len(self._shards)

    @property
    def parameters(self) -> int:
        """Number of elements in all tensors."""
        return sum(meta.numel() for shard in self._shards for meta in shard.metas.values())

    def write_file(
        self, file: Path, metadata: dict[str, str], progress: Callable[[int], None]
    ) -> None:
        """Writes the single file of a plan without shards; `progress` receives bytes written."""
        self._write([file], metadata, progress)

    def write_directory(self, directory: Path, progress: Callable[[int], None]) -> None:
        """Writes model.safetensors, or shards and their index under Hugging Face's names."""
        count = len(self._shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            names = [SINGLE]
        self._write([directory / name for name in names], {}, progress)
        if count > 1:
            placed = zip(names, self._shards, strict=True)
            weight_map = {tensor: name for name, shard in placed for tensor in shard.metas}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _write(
        self, files: list[Path], metadata: dict[str, str], progress: Callable[[int], None]
    ) -> None:
        produced = self._produce()
        for path, shard in zip(files, self._shards, strict=True):
            with open(path, "wb") as file:
                places = _write_header(file, shard.metas, metadata)
                for _ in shard.metas:
                    name, tensor = next(produced)
                    file.seek(places[name])
                    raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
                    file.write(raw.data)
                    progress(tensor.numel() * tensor.itemsize)
                    del tensor, raw
                file.flush()
                os.fsync(file.fileno())

    def _produce(self):
        for move in self._moves:
            made = list(move.make([self._read(name) for name in move.reads]))
            for name in move.writes:
                yield name, made.pop(0)

    def _read(self, name: str) -> Tensor:
        tensor = self._weights.read(name)
        check_finite(tensor, f"{self._weights.origin}: tensor {name}")
        return tensor


def _write_header(
    file: BinaryIO, metas: dict[str, Tensor], metadata: dict[str, str]
) -> dict[str, int]:
    """Writes the header; returns the offset in the file at which each tensor begins."""
    header: dict = {"__metadata__": {"format": "pt", **metadata}}
    offsets, end = {}, 0
    # Wide dtypes come first, so that all are aligned.
    for name, meta in sorted(metas.items(), key=lambda item: -item[1].itemsize):
        begin, end = end, end + meta.numel() * meta.itemsize
        shape = list(meta.shape)
        header[name] = {"dtype": _DTYPES[meta.dtype], "shape": shape, "data_offsets": [begin, end]}
        offsets[name] = begin
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: 8 + len(text) + offset for name, offset in offsets.items()}
