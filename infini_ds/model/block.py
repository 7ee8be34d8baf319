"""One Transformer block, a pure function of hidden states, layout and memory."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infini_ds.config import ModelConfig
from infini_ds.layout import Layout
from infini_ds.memory import MemoryState
from infini_ds.memory.hand_on import Exchange, Kept
from infini_ds.model.attention import InfiniAttention
from infini_ds.model.compiled import compiled_in_training
from infini_ds.model.feed_forward import FeedForward
from infini_ds.model.memory import OpenSegment
from infini_ds.model.norm import RMSNorm
from infini_ds.model.write_gate import WriteStats

Checkpointing = Literal["none", "attention", "block"]


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    A block keeps no state between calls, so that recomputing it gives the same result. A memory
    stored in the layer would already have moved on by then, and would be written twice.
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: Checkpointing = "none"):
        super().__init__()
        if activation_checkpointing not in get_args(Checkpointing):
            raise ValueError(
                f"activation_checkpointing ({activation_checkpointing}) must be one of "
                f"{', '.join(get_args(Checkpointing))}"
            )
        self.activation_checkpointing = activation_checkpointing
        self.compiled = False
        """Whether training compiles what is around the attention."""
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = InfiniAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self,
        hidden: Tensor,
        layout: Layout,
        memory: MemoryState,
        exchange: Exchange | None = None,
        embedding: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, MemoryState, WriteStats | None]:
        """Maps [batch, segments x n, hidden_size] to the same shape.

        Args:
            hidden: with `embedding`, tokens [batch, segments x n].
            layout, memory, exchange: see `InfiniAttention`.
            embedding: if given, makes the hidden states of the tokens, and makes them again where
                the block is computed again, so that only the tokens have to be kept.

        Returns:
            Hidden states, the memory after the last segment, and statistics of what was written,
            None if the model has no write gates.
        """

        def forward(inputs: Tensor, *others: Any):
            hidden = inputs if embedding is None else embedding(inputs)
            return self._forward(hidden, *others)

        if self.activation_checkpointing == "block" and self.training:
            return _checkpoint(forward, hidden, layout, memory, exchange)
        return forward(hidden, layout, memory, exchange)

    def extend(
        self,
        hidden: Tensor,
        memory: MemoryState,
        segment: OpenSegment,
        positions: Tensor,
        used: int,
    ) -> tuple[Tensor, OpenSegment, WriteStats | None]:
        """Adds a few tokens to an open segment, see `InfiniAttention.extend`."""
        attended, segment, stats = self.self_attn.extend(
            self.input_layernorm(hidden), memory, segment, positions, used
        )
        return self.feed_forward(hidden, attended), segment, stats

    @compiled_in_training
    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """The part before the attention: the norm and `InfiniAttention.project`."""
        return self.self_attn.project(self.input_layernorm(hidden))

    @compiled_in_training
    def feed_forward(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The part behind the attention, whose output is added first; all in one shape."""
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def _forward(
        self, hidden: Tensor, layout: Layout, memory: MemoryState, exchange: Exchange | None
    ):
        if self.activation_checkpointing == "attention" and self.training:
            attended, memory, stats = _checkpoint(self._attend, hidden, layout, memory, exchange)
        else:
            attended, memory, stats = self._attend(hidden, layout, memory, exchange)
        return self.feed_forward(hidden, attended), memory, stats

    def _attend(
        self, hidden: Tensor, layout: Layout, memory: MemoryState, exchange: Exchange | None
    ):
        return self.self_attn(*self.project(hidden), layout, memory, exchange)


def read_blocks(
    blocks: Iterable[Block],
    hidden: Tensor,
    layout: Layout,
    memory: Iterable[MemoryState],
    exchange: Exchange | None = None,
    embedding: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, list[MemoryState], list[WriteStats]]:
    """Reads a chunk with consecutive blocks, the first of which gets the embedding, if any.

    Args:
        memory: the memory of each block before the chunk; for the others see `Block`.

    Returns:
        Hidden states, the memory of each block after the chunk, and statistics of what each block
        wrote, empty without write gates.
    """
    after, writes = [], []
    for block, block_memory in zip(blocks, memory, strict=True):
        hidden, block_memory, stats = block(hidden, layout, block_memory, exchange, embedding)
        embedding = None  # the first block alone reads tokens
        after.append(block_memory)
        if stats is not None:
            writes.append(stats)
    return hidden, after, writes


def _checkpoint(
    function: Callable,
    hidden: Tensor,
    layout: Layout,
    memory: MemoryState,
    exchange: Exchange | None,
):
    """Calls a function that will be called again in the backward pass, and keeps what it gathers
    from other ranks, since these do not answer twice."""
    kept = None if exchange is None else Kept(exchange)

    def call(hidden: Tensor, layout: Layout, memory: MemoryState):
        if kept is not None:
            kept.rewind()
        return function(hidden, layout, memory, kept)

    # No layer draws random numbers, so the generator's state need not be kept.
    return checkpoint(call, hidden, layout, memory, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def memory_ablated(blocks: Iterable[nn.Module], ablated: bool = True) -> Iterator[None]:
    """Keeps blocks from their memories: all tokens attend locally alone, as far as a sliding window
    and the convolution let them see.

    Args:
        ablated: if False, nothing changes.
    """
    parts = (part for block in blocks for part in block.modules())
    layers = [part for part in parts if isinstance(part, InfiniAttention)]
    for layer in layers:
        layer.ablated = ablated
    try:
        yield
    finally:
        for layer in layers:
            layer.ablated = False
