"""A document's memory between calls: its compressive memories and its open segment."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from infini_ds.config import ModelConfig
from infini_ds.errors import UserError
from infini_ds.memory import RULES, MemoryState
from infini_ds.model.layer_state import tail_shape, window_shape
from infini_ds.system.ranges import check_finite, narrowed
from infini_ds.system.whole_file import whole_file

FORMAT = "infini_ds.memory.2"


class OpenSegment(NamedTuple):
    """The part of a `Memory` in which one layer keeps the segment that is not full yet."""

    keys: Tensor
    """[batch, segment_length, kv_heads, d]"""
    values: Tensor
    """[batch, segment_length, kv_heads, d]"""
    weights: Tensor
    """[batch, segment_length, kv_heads or 0] fp32"""
    tail: Tensor
    """[batch, memory.short_conv, heads + 2 kv_heads, d]"""


@dataclass(frozen=True, repr=False)
class Memory:
    """The state of a model after the documents it has read, of one size whatever their length.

    Reading can stop at any token and continue exactly there. Full segments are compressed into
    `kv` and `norm`, and the keys and values of the open segment, which is not full yet, are kept
    as they are. Tensors of options that are off are empty.
    """

    kv: Tensor
    """[layers with a memory, batch, kv_heads, f, d] fp32, the compressive memories."""
    norm: Tensor
    """[layers with a memory, batch, kv_heads, f] fp32, their normalisers; the last size is 0 by
    memory rules that do not divide reads."""
    keys: Tensor
    """[layers, batch, segment_length, kv_heads, d], keys of the open segment, before rotary."""
    values: Tensor
    """[layers, batch, segment_length, kv_heads, d], values of the open segment."""
    weights: Tensor
    """[layers, batch, segment_length, kv_heads] fp32, the weights with which the open segment's
    tokens will be written; the last size is 0 without memory.write_gate."""
    tail: Tensor
    """[layers, batch, memory.short_conv, heads + 2 kv_heads, d], queries, keys and values of the
    last tokens before the convolution."""
    window: Tensor
    """[layers, batch, segment_length or 0, 2 kv_heads, d], keys and values of the last full
    segment, to which the open one attends with model.use_sliding_window."""
    lengths: tuple[int, ...]
    """Number of tokens in the open segment of each row."""
    rule: str | None = None
    """Name of the memory rule; None if it comes from a file that does not tell."""
    memory_layers: tuple[int, ...] | None = None
    """The layers that have a memory, counted from 0; None: all."""

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "Memory":
        """Makes the memory of documents of which nothing has been read yet."""
        tensors = {
            name: torch.zeros(
                shape, device=device, dtype=dtype if name in _COMPUTED else torch.float32
            )
            for name, shape in _shapes(config, batch).items()
        }
        layers = config.memory.layers
        return cls(**tensors, lengths=(0,) * batch, rule=config.memory_rule, memory_layers=layers)

    @property
    def batch(self) -> int:
        """The number of documents."""
        return len(self.lengths)

    def layers(self) -> list[MemoryState]:
        """Returns what each layer passes on to the next segment."""
        tail = self.tail.float() if self.tail.shape[2] else None
        window = self.window if self.window.shape[2] else None
        kv, norm = (self._by_layer(states) for states in (self.kv, self.norm))
        tails, windows = ([None] * len(kv) if x is None else x for x in (tail, window))
        return [MemoryState(*states) for states in zip(kv, norm, tails, windows, strict=True)]

    def _by_layer(self, states: Tensor) -> list[Tensor]:
        """Returns the states of each layer, without features where it has no memory."""
        if self.memory_layers is None:
            return list(states)
        none = states.new_zeros(*states.shape[1:3], 0, *states.shape[4:])
        found = dict(zip(self.memory_layers, states, strict=True))
        return [found.get(layer, none) for layer in range(len(self.keys))]

    def with_layers(self, layers: list[MemoryState]) -> "Memory":
        """Returns a copy with what `layers` returns replaced, and the same open segments."""
        known = range(len(layers)) if self.memory_layers is None else self.memory_layers
        changes = {}
        for name in layers[0].named():
            of = known if name in ("kv", "norm") else range(len(layers))
            if of:
                states = torch.stack([getattr(layers[layer], name) for layer in of])
                changes[name] = states.to(getattr(self, name).dtype)
        return replace(self, **changes)

    def segments(self) -> list[OpenSegment]:
        """Returns the open segment of each layer."""
        parts = (self.keys, self.values, self.weights, self.tail)
        return [OpenSegment(*tensors) for tensors in zip(*parts, strict=True)]

    def with_segments(self, segments: list[OpenSegment], lengths: tuple[int, ...]) -> "Memory":
        """Returns a copy with other open segments and the same compressive memories."""
        keys, values, weights, tail = map(torch.stack, zip(*segments, strict=True))
        return replace(self, keys=keys, values=values, weights=weights, tail=tail, lengths=lengths)

    def detach(self) -> "Memory":
        """Returns a copy through which no gradient flows."""
        return self._map(Tensor.detach)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Memory":
        """Moves every tensor to a device, and the open segment's computed tensors to `dtype`.

        The compressive memories and the write weights stay in fp32.

        Raises:
            UserError: a number is beyond the range of `dtype`.
        """
        tensors = {name: getattr(self, name).to(device) for name in _TENSORS}
        for name, tensor in tensors.items():
            wanted = (dtype or tensor.dtype) if name in _COMPUTED else torch.float32
            tensors[name] = narrowed(tensor, wanted, f"memory: {name}")
        return replace(self, **tensors)

    @classmethod
    def concatenate(cls, memories: list["Memory"]) -> "Memory":
        """Concatenates memories along the batch, in order.

        Raises:
            ValueError: they are of different memory rules.
        """
        rules = {memory.rule for memory in memories} - {None}
        if len(rules) > 1:
            raise ValueError(f"memories of different rules ({', '.join(sorted(map(str, rules)))})")
        first = memories[0].memory_layers
        if any(memory.memory_layers != first for memory in memories):
            raise ValueError("memories of different layers")
        tensors = {
            name: torch.cat([getattr(memory, name) for memory in memories], dim=1)
            for name in _TENSORS
        }
        lengths = tuple(length for memory in memories for length in memory.lengths)
        return cls(**tensors, lengths=lengths, rule=next(iter(rules), None), memory_layers=first)

    def save(self, path: str | Path, fingerprint: str | None = None) -> None:
        """Writes one safetensors file, which appears whole or not at all.

        Only the used part of the open segments is stored.

        Args:
            path: the file to write.
            fingerprint: fingerprint of the model that read the documents, see `model.fingerprint`.

        Raises:
            UserError: the file cannot be written.
        """
        longest = max(self.lengths)
        tensors = {name: getattr(self, name) for name in _TENSORS}
        tensors |= {name: tensors[name][:, :, :longest] for name in _BY_TOKEN}
        metadata = {
            "format": FORMAT,
            "lengths": json.dumps(self.lengths),
            "segment_length": str(self.keys.shape[2]),
        }
        if self.rule is not None:
            metadata["memory_rule"] = self.rule
        if self.memory_layers is not None:
            metadata["memory_layers"] = json.dumps(self.memory_layers)
        if fingerprint is not None:
            metadata["fingerprint"] = fingerprint
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with whole_file(path, "memory") as file:
            file.write_bytes(save(tensors, metadata))

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        fingerprint: str | None = None,
    ) -> "Memory":
        """Reads a file that `save` wrote.

        Args:
            path: the file to read.
            device: where the tensors are put.
            fingerprint: fingerprint of the model that will use the memory; a file saved without
                a fingerprint is accepted.

        Raises:
            UserError: the file is missing, is not a memory, is another model's, or holds numbers
                that are not finite.
        """
        if Path(path).is_dir():
            raise UserError(f"memory {path}: cannot be read (it is a directory)")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise UserError(f"memory {path}: not a memory file written by Memory.save")
                saved = metadata.get("fingerprint")
                if fingerprint is not None and saved not in (None, fingerprint):
                    raise UserError(
                        f"memory {path}: is of another model (fingerprint {saved[:12]}, "
                        f"this one has {fingerprint[:12]}); read the document with this one"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise UserError(f"memory {path}: no such file") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"memory {path}: cannot be read ({error})") from None
        try:
            if "window" not in tensors:  # earlier versions had none
                layers, batch, _, kv_heads, d = tensors["keys"].shape
                empty = (layers, batch, 0, 2 * kv_heads, d)
                tensors["window"] = tensors["keys"].new_empty(empty)
            memory_layers = _saved_layers(tensors, metadata)
            lengths = _saved_lengths(tensors, metadata)
            for name in _BY_TOKEN:
                used = tensors[name]
                segment_length = int(metadata["segment_length"])
                whole = used.new_zeros(*used.shape[:2], segment_length, *used.shape[3:])
                whole[:, :, : used.shape[2]] = used
                tensors[name] = whole
        except (
            KeyError,
            RuntimeError,
            TypeError,
            ValueError,
        ):  # RuntimeError also if so long a segment cannot be allocated
            raise UserError(f"memory {path}: is damaged; read the document again") from None
        for name, tensor in tensors.items():
            check_finite(tensor, f"memory {path}: {name}")
        rule = metadata.get("memory_rule")
        return cls(**tensors, lengths=lengths, rule=rule, memory_layers=memory_layers)

    def check(self, config: ModelConfig, batch: int) -> None:
        """Raises ValueError if this memory does not fit the model or the batch."""
        if self.rule not in (None, config.memory_rule):
            raise ValueError(
                f"memory of rule {self.rule} does not fit this model, whose memory_rule is "
                f"{config.memory_rule}"
            )
        if self.memory_layers != config.memory.layers:
            raise ValueError(
                f"memory of layers {_told(self.memory_layers)} does not fit this model, whose "
                f"memory.layers is {_told(config.memory.layers)}"
            )
        shapes = _shapes(config, batch)
        kv_shape = shapes["kv"]
        if tuple(self.kv.shape) != kv_shape or self.keys.shape[2] != config.segment_length:
            raise ValueError(
                f"memory of shape {tuple(self.kv.shape)} and segment {self.keys.shape[2]} does not "
                f"fit this model and batch: {kv_shape} and segment {config.segment_length}"
            )
        for name, option, value in (
            ("weights", "memory.write_gate", config.memory.write_gate),
            ("tail", "memory.short_conv", config.memory.short_conv),
            ("window", "use_sliding_window", config.use_sliding_window),
        ):
            if tuple(getattr(self, name).shape) != shapes[name]:
                raise ValueError(
                    f"memory with {name} of shape {tuple(getattr(self, name).shape)} does not fit "
                    f"this model, whose {option} is {value}: {shapes[name]}"
                )
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(
                    f"memory with {name} of shape {tuple(getattr(self, name).shape)} does not fit "
                    f"this model and batch: {shape}"
                )
        fits = all(0 <= length < config.segment_length for length in self.lengths)
        if len(self.lengths) != batch or not fits:
            raise ValueError(
                f"memory with lengths {self.lengths}: must be {batch}, each less than a segment's "
                f"{config.segment_length} tokens"
            )

    def __repr__(self) -> str:
        layers, batch, _, kv_heads, d = self.keys.shape
        return (
            f"Memory({layers} layers, {batch} documents, {kv_heads} key-value heads of {d}, open "
            f"segments of {list(self.lengths)} tokens, {self.keys.dtype}, {self.kv.device})"
        )

    def _map(self, function) -> "Memory":
        return replace(self, **{name: function(getattr(self, name)) for name in _TENSORS})


_TENSORS = ("kv", "norm", "keys", "values", "weights", "tail", "window")
_BY_TOKEN = ("keys", "values", "weights")  # only the open segment's tokens are used
_COMPUTED = ("keys", "values", "tail", "window")  # stored in the compute dtype


def _told(layers: tuple[int, ...] | None) -> str:
    return "null, all" if layers is None else str(list(layers))


def _saved_layers(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[int, ...] | None:
    """Returns which layers of a file have a memory, after checking that there are so many.

    Raises:
        KeyError, TypeError, ValueError: `save` cannot have written it.
    """
    if "memory_layers" not in metadata:
        layers = None
        known = range(len(tensors["keys"]))
    else:
        layers = known = tuple(json.loads(metadata["memory_layers"]))
    if list(known) != sorted(set(known) & set(range(len(tensors["keys"])))):
        raise ValueError
    if not len(known) == len(tensors["kv"]) == len(tensors["norm"]):
        raise ValueError
    return layers


def _saved_lengths(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[int, ...]:
    """Returns the lengths stored in a file, after checking that `save` could have written it.

    Raises:
        KeyError, TypeError, ValueError: `save` cannot have written it.
    """
    lengths = json.loads(metadata["lengths"])
    if set(tensors) != set(_TENSORS) or not all(type(length) is int for length in lengths):
        raise ValueError
    layers, batch, _, kv_heads, d = tensors["keys"].shape
    known = len(tensors["kv"])
    longest, own = max(lengths), metadata.get("memory_rule")
    segment_length = int(metadata["segment_length"])
    specs = [  # of the file's rule, or of all if it does not tell one that we know
        rule.specs(kv_heads, d) for name, rule in RULES.items() if own == name or own not in RULES
    ]
    states = {tuple((known, batch, *shape) for shape in each.values()) for each in specs}
    used, shapes = (layers, batch, longest), {name: tensors[name].shape for name in _TENSORS}
    if not (
        len(lengths) == batch
        and 0 <= min(lengths) <= longest < segment_length
        and (tuple(shapes["kv"]), tuple(shapes["norm"])) in states
        and shapes["keys"] == shapes["values"] == (*used, kv_heads, d)
        and shapes["weights"] in ((*used, kv_heads), (*used, 0))
        and len(shapes["tail"]) == 5
        and shapes["window"] in {(layers, batch, x, 2 * kv_heads, d) for x in (0, segment_length)}
        and all(tensors[name].dtype == torch.float32 for name in ("kv", "norm", "weights"))
        and all(tensors[name].is_floating_point() for name in _COMPUTED)
        and all(tensors[name].itemsize > 1 for name in _COMPUTED)
    ):
        raise ValueError
    return tuple(lengths)


def _shapes(config: ModelConfig, batch: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a memory's tensors by name."""
    layers, n, d = config.num_layers, config.segment_length, config.head_dim
    kv_heads = config.kv_heads
    states = RULES[config.memory_rule].specs(kv_heads, d)
    return {
        **{name: (len(config.memory_layers), batch, *shape) for name, shape in states.items()},
        "keys": (layers, batch, n, kv_heads, d),
        "values": (layers, batch, n, kv_heads, d),
        "weights": (layers, batch, n, kv_heads if config.memory.write_gate else 0),
        "tail": (layers, batch, *tail_shape(config)),
        "window": (layers, batch, *window_shape(config)),
    }
