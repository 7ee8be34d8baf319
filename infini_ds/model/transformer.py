"""The Infini-Transformer on one device."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from infini_ds.config import ModelConfig
from infini_ds.layout import IGNORE_INDEX, Layout
from infini_ds.memory import MemoryState
from infini_ds.model.block import Checkpointing, read_blocks
from infini_ds.model.decoding import extend
from infini_ds.model.generation import generate
from infini_ds.model.head import token_losses
from infini_ds.model.layers import initialize, layer_list
from infini_ds.model.memory import Memory
from infini_ds.model.reading import WINDOW_SEGMENTS
from infini_ds.model.write_gate import WriteStats, write_penalty


class Output(NamedTuple):
    """The result of a call of the model."""

    logits: Tensor
    """[batch, length, vocab_size]"""
    memory: Memory
    """The memory of everything read so far, for the next call."""


class InfiniTransformer(nn.Module):
    """A causal language model with unbounded context and bounded memory.

    Example:
        model = InfiniTransformer(ModelConfig(vocab_size=256, hidden_size=512, num_layers=8,
                                              num_heads=8, head_dim=128, segment_length=512))
        out = model(tokens)
        out = model(next_tokens, memory=out.memory)  # continues the document
        loss = model.loss(tokens)

    Raises:
        ValueError: config.vocab_size is not set.
    """

    def __init__(
        self, config: ModelConfig, seed: int = 0, activation_checkpointing: Checkpointing = "none"
    ):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError(f"vocab_size ({config.vocab_size}) must be at least 1")
        self.config = config
        self.layers = nn.ModuleList()
        for index, layer in enumerate(layer_list(config, activation_checkpointing)):
            module = layer.module(*layer.args)
            initialize(module, index, config, seed)
            self.layers.append(module)

    @property
    def blocks(self) -> nn.ModuleList:
        """The model's Transformer blocks, in order."""
        return self.layers[1 : 1 + self.config.num_layers]  # type: ignore[return-value]

    def forward(self, tokens: Tensor, memory: Memory | None = None) -> Output:
        """Reads tokens [batch, any length] that continue the documents in `memory`.

        Logits and memory are the same whether a text is read in one call or cut at any token.

        Raises:
            ValueError: the memory does not fit the model or the batch.
        """
        hidden, memory = self.read(tokens, memory)
        return Output(self.logits(hidden), memory)

    def read(self, tokens: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Works like `forward`, but returns the hidden states after the final norm,
        [batch, length, hidden_size], in place of logits."""
        hidden, memory, _ = self._read(tokens, memory)
        return hidden, memory

    def _read(self, tokens: Tensor, memory: Memory | None) -> tuple[Tensor, Memory, Tensor]:
        """Returns what `read` does, and the sum of all write weights, 0 without write gates."""
        memory = self._memory(tokens, memory)
        n = self.config.segment_length
        parts = []
        mass = torch.zeros((), device=tokens.device)
        while tokens.shape[1]:
            longest = max(memory.lengths)
            segments = min(tokens.shape[1] // n, WINDOW_SEGMENTS) if longest == 0 else 0
            take = segments * n or min(n - longest, tokens.shape[1])
            piece, tokens = tokens[:, :take], tokens[:, take:]
            if segments:
                layout = full_layout(piece.shape[0], segments, n, piece.device)
                hidden, layers, writes = self.read_window(piece, layout, memory.layers())
                memory = memory.with_layers(layers)
            else:
                hidden, memory, writes = extend(self.blocks, self.layers[0](piece), memory)  # type: ignore[arg-type]
                hidden = self._final_norm(hidden)
            parts.append(hidden)
            for stats in writes:
                mass = mass + stats.mass
        if not parts:
            raise ValueError("tokens must have at least one column")
        return torch.cat(parts, dim=1), memory, mass

    def read_window(
        self, tokens: Tensor, layout: Layout, memory: list[MemoryState]
    ) -> tuple[Tensor, list[MemoryState], list[WriteStats]]:
        """Reads a window of whole segments, as in training.

        Args:
            tokens: [batch, segments x n].
            layout: document starts and valid lengths.
            memory: each layer's memory before the window.

        Returns:
            Hidden states after the final norm, the memory of each layer after the window, and
            statistics of what each layer wrote, empty without write gates.
        """
        hidden, after, writes = read_blocks(self.blocks, self.layers[0](tokens), layout, memory)  # type: ignore[arg-type]
        return self._final_norm(hidden), after, writes

    def logits(self, hidden: Tensor) -> Tensor:
        """Projects hidden states to the vocabulary."""
        return torch.nn.functional.linear(hidden, *self.head())

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Returns the weight and the bias of the output head."""
        if self.config.tie_embeddings:
            return self.layers[0].weight, None  # type: ignore[return-value]
        return self.layers[-1].weight, self.layers[-1].bias  # type: ignore[return-value]

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        chunk_tokens: int = 0,
        memory: Memory | None = None,
    ) -> Tensor:
        """Computes the mean next-token loss of whole documents.

        Its gradient flows through all of their memory. If memory.write_penalty is set, the loss
        includes the penalty times the sum over layers of the mean write weight.

        Args:
            tokens: [batch, length].
            labels: [batch, length - 1], the successor of each token but the last, tokens[:, 1:] by
                default; IGNORE_INDEX (-100) where no loss is wanted.
            chunk_tokens: number of tokens whose logits exist at the same time; 0 chooses what suits
                the device.
            memory: the memory of documents that the tokens continue.

        Raises:
            ValueError: the shapes do not fit each other.
        """
        labels = _labels(tokens, labels)
        hidden, _, mass = self._read(tokens[:, :-1], memory)
        loss = self._loss_sum(hidden, labels, chunk_tokens) / (labels != IGNORE_INDEX).sum()
        return loss + self._penalty(mass, labels.numel())

    def backward(
        self,
        tokens: Tensor,
        window_segments: int,
        labels: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """Accumulates gradients of documents of any length, in bounded memory.

        Documents are read window by window, and each window is backpropagated on its own. The
        compressive memory passes from one window to the next without a gradient. Gradients are
        those of the mean loss.

        Args:
            tokens: [batch, length].
            window_segments: length of a window, across which gradients flow through the memory.
            labels, memory: as in `loss`; the memory gets no gradient.

        Returns:
            The same loss as `loss`, detached.

        Raises:
            ValueError: the shapes do not fit each other, or window_segments is below 1.
        """
        if window_segments < 1:
            raise ValueError(f"window_segments ({window_segments}) must be at least 1")
        labels = _labels(tokens, labels)
        memory = memory and memory.detach()
        count = (labels != IGNORE_INDEX).sum()
        total = torch.zeros((), device=tokens.device)
        width = window_segments * self.config.segment_length
        for piece, targets in zip(
            tokens[:, :-1].split(width, 1), labels.split(width, 1), strict=True
        ):
            hidden, memory, mass = self._read(piece, memory)
            loss = self._loss_sum(hidden, targets, 0) / count
            loss = loss + self._penalty(mass, labels.numel())
            loss.backward()
            total += loss.detach()
            memory = memory.detach()
        return total

    generate = generate

    def _loss_sum(self, hidden: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
        return token_losses(hidden, *self.head(), labels, chunk_tokens).sum()

    def _penalty(self, mass: Tensor, tokens: int) -> Tensor:
        """Computes the write penalty from `mass`, the sum of write weights over layers, heads and
        some or all of the step's tokens."""
        return write_penalty(self.config.memory, mass, tokens * self.config.kv_heads)

    def _final_norm(self, hidden: Tensor) -> Tensor:
        return self.layers[1 + self.config.num_layers](hidden)

    def _memory(self, tokens: Tensor, memory: Memory | None) -> Memory:
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be [batch, length], have shape {tuple(tokens.shape)}")
        weight = self.layers[0].weight
        if memory is None:
            return Memory.empty(self.config, tokens.shape[0], weight.device, weight.dtype)  # type: ignore[arg-type]
        memory.check(self.config, tokens.shape[0])
        return memory.to(dtype=weight.dtype)  # type: ignore[arg-type]


def _labels(tokens: Tensor, labels: Tensor | None) -> Tensor:
    """Returns the label of each token but the last, by default the token that follows it."""
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens must be [batch, length] of at least 2, have shape {tuple(tokens.shape)}"
        )
    wanted = tokens[:, 1:]
    if labels is not None and labels.shape != wanted.shape:
        raise ValueError(
            f"labels must be [batch, length - 1] = {list(wanted.shape)}, what follows each token "
            f"but the last, have shape {list(labels.shape)}"
        )
    return wanted if labels is None else labels


def full_layout(batch: int, segments: int, n: int, device: torch.device) -> Layout:
    """Makes the layout of segments without padding in which no document starts."""
    return Layout(
        torch.zeros(batch, segments, dtype=torch.bool, device=device),
        torch.full((batch, segments), n, dtype=torch.int32, device=device),
    )
