"""Where tensors are read from, one at a time: each reader maps them from its files when asked."""

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
    """What they are read from, for messages."""
    metas: dict[str, Tensor]
    """Shapes and dtypes, as meta tensors."""

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from its file or made: hold few of them at a time."""
        ...


class SafetensorsWeights:
    """A file of safetensors, or a directory of them named as Hugging Face does.

    Raises:
        UserError: there is none, or it cannot be read.
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
                    # A slice would do for the shape, but its dtype is a word of the format's own.
                    self.metas[name] = content.get_tensor(name).to("meta")
                    self._file_of[name] = file

    def read(self, name: str) -> Tensor:
        """See Weights."""
        # What was mapped goes with the tensor only if the file is not kept open.
        with _open(self._file_of[name]) as content:
            return content.get_tensor(name)


class CheckpointWeights:
    """The weights of a run's checkpoint as it computes with them, from its files of layers."""

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
    """A state_dict that torch.save wrote; nothing but tensors is unpickled.

    Raises:
        UserError: it is not one.
    """

    def __init__(self, path: Path):
        self.origin = str(path)
        try:
            self._state = _load(path)
        except Exception as error:  # whatever a file that is no such thing makes the unpickler say
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
    """Weights whose names all have a prefix, without it."""

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
    """What makes it no plain numbers, nothing if it is."""
    for kind in ("quantized", "meta", "nested"):
        if getattr(tensor, f"is_{kind}"):
            return kind
    dense = tensor.layout == torch.strided
    return "" if dense else str(tensor.layout).removeprefix("torch.")


def _files(path: Path) -> dict[Path, set[str]]:
    """Files and the tensors to take from each; none named: all that it has."""
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
    """A tensor may be in other files as well, such as an older one's: the index decides."""
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
