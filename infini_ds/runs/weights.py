"""Readers of weights, each of which maps single tensors from files on demand."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infini_ds.errors import UserError
from infini_ds.runs.checkpoint import layer_files

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Weights(Protocol):
    """Named tensors on disk."""

    origin: str
    """Where the tensors come from, for messages."""
    metas: dict[str, Tensor]
    """Shapes and dtypes of all tensors, as meta tensors."""

    def read(self, name: str) -> Tensor:
        """Returns a tensor, mapped from its file or computed; hold only a few of them at a time."""
        ...


class SafetensorsWeights:
    """Weights in a safetensors file, or in a directory of them with Hugging Face's names.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """

    def __init__(self, path: Path):
        self.origin = str(path)
        self.metas: dict[str, Tensor] = {}
        self.metadata: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
        for file, wanted in _files(path).items():
            with _open(file) as content:
                self.metadata |= content.metadata() or {}
                found = set(content.keys())
                if wanted and (lost := wanted - found):
                    raise UserError(f"{file}: has no tensor {min(lost)}, which {INDEX} lists")
                for name in sorted(wanted or found):
                    # A slice would give the shape, but the dtype only under the format's name.
                    self.metas[name] = content.get_tensor(name).to("meta")
                    self._file_of[name] = file

    def read(self, name: str) -> Tensor:
        """See Weights."""
        # The mapped memory is freed with the tensor only if the file is not kept open.
        with _open(self._file_of[name]) as content:
            return content.get_tensor(name)


class CheckpointWeights:
    """The weights a run computes with, read from the layer files of its checkpoint."""

    def __init__(self, checkpoint: Path):
        self.origin = f"checkpoint {checkpoint}"
        self.metas: dict[str, Tensor] = {}
        self._place: dict[str, tuple[Path, str]] = {}
        for file in layer_files(checkpoint):
            index = int(file.name.split("-")[0].removeprefix("layer_"))
            for inner, tensor in _load(file).items():
                self.metas[f"layers.{index}.{inner}"] = tensor.to("meta")
                self._place[f"layers.{index}.{inner}"] = (file, inner)

    def read(self, name: str) -> Tensor:
        """See Weights."""
        file, inner = self._place[name]
        return _load(file)[inner]


class PickledWeights:
    """A state_dict written by torch.save; nothing but tensors is unpickled.

    Raises:
        UserError: the file is not such a state_dict.
    """

    def __init__(self, path: Path):
        self.origin = str(path)
        try:
            self._state = _load(path)
        except Exception as error:  # the unpickler may raise anything on a foreign file
            reason = (str(error).split("\n")[0] or type(error).__name__)[:200]
            raise UserError(f"{path}: cannot be read as a state_dict ({reason})") from None
        tensors = isinstance(self._state, dict) and all(
            isinstance(name, str) and isinstance(value, Tensor)
            for name, value in self._state.items()
        )
        if not tensors:
            raise UserError(
                f"{path}: must be a state_dict, names and tensors; save `model.state_dict()` alone"
            )
        for name, tensor in self._state.items():
            if kind := _peculiarity(tensor):
                raise UserError(f"{path}: tensor {name} must be plain numbers, not {kind}")
        self.metas = {name: tensor.to("meta") for name, tensor in self._state.items()}

    def read(self, name: str) -> Tensor:
        """See Weights."""
        return self._state[name].detach()


@dataclass
class Renamed:
    """Weights whose names share a prefix, which it removes."""

    weights: Weights
    prefix: str

    def __post_init__(self):
        self.origin = self.weights.origin
        self.metas = {
            name.removeprefix(self.prefix): meta for name, meta in self.weights.metas.items()
        }

    def read(self, name: str) -> Tensor:
        """See Weights."""
        return self.weights.read(self.prefix + name)


def _load(file: Path) -> dict[str, Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _peculiarity(tensor: Tensor) -> str:
    """Names what makes a tensor more than plain dense numbers; empty if nothing does."""
    for kind in ("quantized", "meta", "nested"):
        if getattr(tensor, f"is_{kind}"):
            return kind
    dense = tensor.layout == torch.strided
    return "" if dense else str(tensor.layout).removeprefix("torch.")


def _files(path: Path) -> dict[Path, set[str]]:
    """Maps each file to the tensors to take from it; an empty set means all."""
    if path.is_file():
        return {path: set()}
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory")
    if (path / INDEX).is_file():
        return _indexed(path)
    if (path / SINGLE).is_file():
        return {path / SINGLE: set()}
    if any(path.glob("*.bin")):
        raise UserError(
            f"{path}: its weights are pickled (.bin), which is not safe to read; convert them to "
            "safetensors, as `save_pretrained` of transformers writes"
        )
    raise UserError(f"{path}: has neither {SINGLE} nor {INDEX}")


def _indexed(path: Path) -> dict[Path, set[str]]:
    """Maps files to tensors by the index, since other files may hold stale copies of a tensor."""
    index = path / INDEX
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        placed = list(weight_map.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: cannot be read ({error})") from None
    files: dict[Path, set[str]] = {}
    for tensor, name in placed:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{index}: {name!r} must be the name of a file beside it")
        if not (path / name).is_file():
            raise UserError(f"{path}: {name} is missing, which {INDEX} lists")
        files.setdefault(path / name, set()).add(tensor)
    return files


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error})") from None
