"""Keeps in host memory what DeepSpeed would write, so that training goes on while it is written."""

import copy
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import Tensor


class KeptFiles(TorchCheckpointEngine):
    """Stands in for DeepSpeed's checkpoint engine: `save` copies, and `write` writes later.

    It holds on to the memory of its copies, because the next ones take a fraction of the time where
    the system need not hand out new pages.
    """

    def __init__(self, other: TorchCheckpointEngine):
        self.name, self.zipfile_serialization = other.name, other.zipfile_serialization
        self._files: list[tuple[str, Any]] = []
        self._used: list[Tensor] = []
        self._spare: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def save(self, state_dict: Any, path: str) -> None:
        """Keeps a copy of what a file is to hold."""
        self._files.append((path, self._copied(state_dict)))

    def preserves_storage_sharing(self) -> bool:
        """Tells DeepSpeed not to copy tensors first, because copies share nothing."""
        return False

    def write(self) -> list[str]:
        """Writes all files and returns their paths; may run in another thread than `save`."""
        for path, state in self._files:
            super().save(state, path)
        written = [path for path, _ in self._files]
        self._files.clear()
        for tensor in self._used:
            self._spare.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
        self._used.clear()
        return written

    def _copied(self, value: Any) -> Any:
        """Copies nested dicts, lists and tuples with their tensors into host memory."""
        if isinstance(value, Tensor):
            spare = self._spare.get((value.shape, value.dtype))
            room = spare.pop() if spare else torch.empty(value.shape, dtype=value.dtype)
            self._used.append(room)
            room.requires_grad_(False).copy_(value.detach())
            return room.requires_grad_(value.requires_grad)
        if isinstance(value, dict):
            pairs = {key: self._copied(inner) for key, inner in value.items()}
            return pairs if type(value) is dict else type(value)(pairs)
        if isinstance(value, list):
            return [self._copied(inner) for inner in value]
        if type(value) is tuple:
            return tuple(map(self._copied, value))
        return copy.deepcopy(value)
