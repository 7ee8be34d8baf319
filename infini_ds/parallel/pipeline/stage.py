"""What the engine needs of a stage's layers, whichever way DeepSpeed holds their weights."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from infini_ds.config import ModelConfig
from infini_ds.layout import Layout
from infini_ds.memory import MemoryState
from infini_ds.memory.hand_on import Exchange
from infini_ds.model.block import Block
from infini_ds.model.write_gate import WriteStats


class Wanted(NamedTuple):
    """What the losses of a chunk are computed from, beside its hidden states."""

    labels: Tensor
    """[batch, length]"""
    chunk_tokens: int
    """See `token_losses`."""


class Stage(Protocol):
    """The layers of one stage, with the parameter names of InfiniTransformer."""

    config: ModelConfig
    bounds: list[int]
    """First block of each stage, followed by the number of blocks."""
    frozen: dict[str, nn.Parameter]
    """Parameters that keep their values, by their names in InfiniTransformer."""

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks of this stage, in order."""
        ...

    def __call__(
        self,
        inputs: Tensor,
        layout: Layout,
        memory: list[MemoryState],
        exchange: Exchange | None = None,
        wanted: Wanted | None = None,
    ) -> tuple[Tensor, list[MemoryState], list[WriteStats]]:
        """Runs this stage on a chunk; a pure function, like each of its layers.

        Args:
            inputs: tokens [batch, length] on the first stage, hidden states on the others.
            layout: the chunk's layout.
            memory: the memory of each of this stage's blocks before the chunk.
            exchange: if other ranks have the other parts of the same chunk, the way to them.
            wanted: on the last stage, the labels.

        Returns:
            Hidden states, or with labels the loss of each token, [batch, length]; the memories
            after the chunk; and statistics of what each block wrote, empty without write gates.
        """
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Maps tokens to the first block's input, on the first stage."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Maps the last block's output to logits over the vocabulary, on the last stage."""
        ...

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields this stage's parameters by their names in InfiniTransformer."""
        ...

    def train(self, mode: bool = True) -> Any:
        """See `torch.nn.Module`."""
        ...

    def eval(self) -> Any:
        """See `torch.nn.Module`."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """See `torch.nn.Module`."""
        ...
