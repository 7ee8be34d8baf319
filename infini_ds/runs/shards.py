"""Optimizer states by the names of their parameters, as ranks with ZeRO-2 or ZeRO-3 save them.

Each rank writes one file, RANK_optim_states.safetensors, with what it holds: of a parameter a
flat piece each of its fp32 weights and of both moments. Any number of ranks can read them.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from infini_ds.errors import RunError

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
"""What is kept of a parameter: its weights and the moments of AdamW."""
_FILE = re.compile(r"rank_(\d+)_optim_states\.safetensors")


def shard_file(checkpoint: Path, rank: int) -> Path:
    """Returns the file of a rank."""
    return checkpoint / f"rank_{rank:05d}_optim_states.safetensors"


def has_shards(checkpoint: Path) -> bool:
    """Returns whether a checkpoint has states of this form."""
    return shard_file(checkpoint, 0).is_file()


def shard_files(checkpoint: Path) -> list[Path]:
    """Returns the files of all ranks, in their order."""
    return sorted(path for path in checkpoint.iterdir() if _FILE.fullmatch(path.name))


class Fragment(NamedTuple):
    """What a rank holds of a parameter."""

    start: int
    """Index of its first number in the flattened parameter."""
    states: Mapping[str, Tensor]
    """By KINDS, flat and of one length."""


def file_of_shard(
    fragments: Mapping[str, Fragment], shapes: Mapping[str, torch.Size], step: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a rank's file, and its metadata.

    Args:
        fragments: by the names of their parameters in InfiniTransformer.
        shapes: the shapes of all parameters that are trained.
        step: number of updates of the weights so far.
    """
    tensors = {
        f"{name}/{kind}": tensor
        for name, fragment in fragments.items()
        for kind, tensor in fragment.states.items()
    }
    starts = {name: fragment.start for name, fragment in fragments.items()}
    content = {"starts": starts, "shapes": {name: [*x] for name, x in shapes.items()}, "step": step}
    return tensors, {"shard": json.dumps(content)}


class _Piece(NamedTuple):
    start: int
    stop: int
    file: Path


class Shards:
    """The states of a checkpoint, put together from the files of all ranks.

    Raises:
        RunError: they do not hold all numbers of a parameter.
    """

    def __init__(self, checkpoint: Path):
        self._pieces: dict[str, list[_Piece]] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.step = 0
        """Number of updates of the weights so far."""
        for path in shard_files(checkpoint):
            with safe_open(path, framework="pt") as file:
                content = json.loads(file.metadata()["shard"])
                for name, start in content["starts"].items():
                    (count,) = file.get_slice(f"{name}/fp32").get_shape()
                    piece = _Piece(start, start + count, path)
                    self._pieces.setdefault(name, []).append(piece)
            self.shapes = {name: torch.Size(x) for name, x in content["shapes"].items()}
            self.step = max(self.step, content["step"])
        for name, shape in self.shapes.items():
            held = sum(piece.stop - piece.start for piece in self._pieces.get(name, ()))
            if held != (wanted := math.prod(shape)):
                raise RunError(
                    f"checkpoint {checkpoint}: shards have {held} of {wanted} numbers of {name}"
                )

    def read(self, name: str, kind: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Reads some numbers of a flattened parameter, by default all of them."""
        stop = math.prod(self.shapes[name]) if stop is None else stop
        parts = []
        for piece in sorted(self._pieces[name]):
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                with safe_open(piece.file, framework="pt") as file:
                    own = file.get_slice(f"{name}/{kind}")
                    parts.append(own[low - piece.start : high - piece.start])
        return torch.cat(parts) if parts else torch.empty(0)
