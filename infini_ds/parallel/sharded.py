"""The whole model as one stage, whose weights ZeRO-3 may share out over all ranks."""

from collections.abc import Callable, Iterator

import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from torch.nn import functional as F

from infini_ds.config import ModelConfig
from infini_ds.layout import Layout
from infini_ds.memory import MemoryState
from infini_ds.memory.hand_on import Exchange
from infini_ds.model.block import Block, Checkpointing, read_blocks
from infini_ds.model.head import token_losses
from infini_ds.model.layers import initialize, layer_list
from infini_ds.model.trained import is_trained
from infini_ds.model.write_gate import WriteStats
from infini_ds.parallel.pipeline.stage import Wanted


class _Output(nn.Module):
    """The final norm and the head, which may be the embedding."""

    def __init__(self, norm: nn.Module, head: nn.Module):
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, hidden: Tensor, wanted: Wanted | None) -> Tensor:
        """Returns the loss of each token, or logits if there are no labels."""
        weight, bias = self.head.weight, getattr(self.head, "bias", None)
        if wanted is None:
            return F.linear(self.norm(hidden), weight, bias)  # type: ignore[arg-type]
        return token_losses(hidden, weight, bias, *wanted, self.norm)  # type: ignore[arg-type]


class ShardedModel(nn.Module):
    """All layers of InfiniTransformer as a pipeline's only stage; see `Stage`.

    DeepSpeed fetches the weights of a module before it is called, and forgets them afterwards. It
    does so for a block and for what is behind the last block as a whole.

    Args:
        share_out: called with each layer once it has its weights, before the next one is made.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        checkpointing: Checkpointing,
        share_out: Callable[[nn.Module], None],
    ):
        super().__init__()
        self.config, self.bounds = config, [0, config.num_layers]
        self.layers = nn.ModuleList()
        for index, layer in enumerate(layer_list(config, checkpointing)):
            module = layer.module(*layer.args)
            initialize(module, index, config, seed)
            share_out(module)
            self.layers.append(module)
        self.frozen: dict[str, nn.Parameter] = {}
        norm = self.layers[1 + config.num_layers]
        head = self.layers[0] if config.tie_embeddings else self.layers[-1]
        self.output = _Output(norm, head)
        set_z3_leaf_modules(self, [Block, _Output])

    @property
    def blocks(self) -> list[Block]:
        """See `Stage`."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def choose_trained(self, patterns: list[str]) -> None:
        """Makes parameters that are not to be trained keep their values; see `model.trained`."""
        for name, parameter in self.own_parameters():
            if not is_trained(name, patterns):
                parameter.requires_grad_(False)
                self.frozen[name] = parameter

    def forward(
        self,
        inputs: Tensor,
        layout: Layout,
        memory: list[MemoryState],
        exchange: Exchange | None = None,
        wanted: Wanted | None = None,
    ) -> tuple[Tensor, list[MemoryState], list[WriteStats]]:
        """See `Stage`."""
        hidden = self.layers[0](inputs)
        if torch.is_grad_enabled() and not hidden.requires_grad:
            # A block's weights are forgotten when the gradients of its inputs are there, and
            # before its backward pass if there are none.
            hidden.requires_grad_()
        hidden, after, writes = read_blocks(self.blocks, hidden, layout, memory, exchange)
        if wanted is not None:
            hidden = self.output(hidden, wanted)
        return hidden, after, writes

    def embed(self, tokens: Tensor) -> Tensor:
        """See `Stage`."""
        return self.layers[0](tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Stage`."""
        return self.output(hidden, None)

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See `Stage`."""
        return self.named_parameters()
