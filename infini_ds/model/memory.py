"""A document's memory across calls: compressive memories, and the segment still open."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from infini_ds.config import ModelConfig
from infini_ds.errors import UserError
from infini_ds.kernels.infini_attention import LayerMemory

FORMAT = "infini_ds.memory.1"


@dataclass(frozen=True)
class Memory:
    """What a model keeps of the documents it has read so far, a fixed size whatever their length.

    Reading goes on exactly where it stopped, at any token: whole segments are compressed into
    `kv` and `norm`, and the keys and values of the segment that is not full yet are kept as
    they are, never more than one segment of them.
    """

    kv: Tensor
    """[layers, batch, kv_heads, d, d] fp32: the compressive memories."""
    norm: Tensor
    """[layers, batch, kv_heads, d] fp32: their normalisers."""
    keys: Tensor
    """[layers, batch, segment_length, kv_heads, d]: keys of the open segment, before rotary."""
    values: Tensor
    """[layers, batch, segment_length, kv_heads, d]: values of the open segment."""
    lengths: tuple[int, ...]
    """Tokens in the open segment of each row."""

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "Memory":
        """The memory of documents of which nothing was read yet."""
        shape = (config.num_layers, batch, config.segment_length, config.kv_heads, config.head_dim)
        layers = [
            LayerMemory.empty(batch, config.kv_heads, config.head_dim, device)
            for _ in range(config.num_layers)
        ]
        return cls(
            torch.stack([layer.kv for layer in layers]),
            torch.stack([layer.norm for layer in layers]),
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
            (0,) * batch,
        )

    @property
    def batch(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def layers(self) -> list[LayerMemory]:
        """The compressive memory of each layer."""
        return [LayerMemory(kv, norm) for kv, norm in zip(self.kv, self.norm, strict=True)]

    def with_layers(self, layers: list[LayerMemory]) -> "Memory":
        """The same open segment with other compressive memories."""
        return replace(
            self,
            kv=torch.stack([layer.kv for layer in layers]),
            norm=torch.stack([layer.norm for layer in layers]),
        )

    def detach(self) -> "Memory":
        """Cuts the gradient."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> "Memory":
        """Moves every tensor."""
        return self._map(lambda tensor: tensor.to(device))

    @classmethod
    def concatenate(cls, memories: list["Memory"]) -> "Memory":
        """One memory whose batch is that of all of them, in order."""
        tensors = {
            name: torch.cat([getattr(memory, name) for memory in memories], dim=1)
            for name in ("kv", "norm", "keys", "values")
        }
        lengths = tuple(length for memory in memories for length in memory.lengths)
        return cls(**tensors, lengths=lengths)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file; only the used part of the open segment is stored."""
        longest = max(self.lengths)
        tensors = {
            "kv": self.kv,
            "norm": self.norm,
            "keys": self.keys[:, :, :longest],
            "values": self.values[:, :, :longest],
        }
        metadata = {
            "format": FORMAT,
            "lengths": json.dumps(self.lengths),
            "segment_length": str(self.keys.shape[2]),
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path, metadata)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Memory":
        """Reads what `save` wrote.

        Raises:
            UserError: the file is missing or is not a memory.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise UserError(f"memory {path}: not a memory file written by Memory.save")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise UserError(f"memory {path}: no such file") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"memory {path}: cannot be read ({error})") from None
        segment_length = int(metadata["segment_length"])
        for name in ("keys", "values"):
            used = tensors[name]
            whole = used.new_zeros(*used.shape[:2], segment_length, *used.shape[3:])
            whole[:, :, : used.shape[2]] = used
            tensors[name] = whole
        return cls(**tensors, lengths=tuple(json.loads(metadata["lengths"])))

    def check(self, config: ModelConfig, batch: int) -> None:
        """Raises ValueError if this memory does not fit the model or the batch."""
        kv_shape = (config.num_layers, batch, config.kv_heads, config.head_dim, config.head_dim)
        if tuple(self.kv.shape) != kv_shape or self.keys.shape[2] != config.segment_length:
            raise ValueError(
                f"memory of shape {tuple(self.kv.shape)} and segment {self.keys.shape[2]} does not "
                f"fit this model and batch: {kv_shape} and segment {config.segment_length}"
            )

    def _map(self, function) -> "Memory":
        names = ("kv", "norm", "keys", "values")
        return replace(self, **{name: function(getattr(self, name)) for name in names})
