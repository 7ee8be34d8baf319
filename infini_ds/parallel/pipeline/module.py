"""The model as a DeepSpeed PipelineModule that holds the layers of one stage."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn

from infini_ds.config import ModelConfig, OptimizerConfig
from infini_ds.layout import Layout
from infini_ds.memory import MemoryState
from infini_ds.memory.hand_on import Exchange
from infini_ds.model.block import Block, Checkpointing, read_blocks
from infini_ds.model.head import token_losses
from infini_ds.model.layers import Embedding, initialize, layer_list
from infini_ds.model.optimizer import group_of
from infini_ds.model.trained import is_trained, trained_groups
from infini_ds.model.write_gate import WriteStats
from infini_ds.parallel.deepspeed.module import TIED_KEY, StageModule, single_process_name
from infini_ds.parallel.pipeline.balance import balance
from infini_ds.parallel.pipeline.stage import Wanted


def layer_specs(config: ModelConfig, checkpointing: Checkpointing) -> list[LayerSpec]:
    """Returns the model's ordered layers as DeepSpeed specs; a tied head is the embedding again."""
    layers = layer_list(config, checkpointing)
    specs: list[LayerSpec] = [LayerSpec(layer.module, *layer.args) for layer in layers]
    if config.tie_embeddings:
        specs[0] = TiedLayerSpec(TIED_KEY, Embedding, config)
        specs.append(TiedLayerSpec(TIED_KEY, Embedding, config, forward_fn=_project))
    return specs


class InfiniPipeline(StageModule):
    """One stage's layers, with the initial values of InfiniTransformer; see `Stage`."""

    def __init__(self, config: ModelConfig, stages: int, seed: int, checkpointing: Checkpointing):
        super().__init__(layer_specs(config, checkpointing), balance(config, stages))
        self.config = config
        self.frozen: dict[str, nn.Parameter] = {}
        """Parameters that keep their values, by their names in InfiniTransformer."""
        for place, layer in self.placed_layers():
            initialize(layer, place, config, seed)
        for layer in self.tied_modules.values():
            initialize(layer, 0, config, seed)

    @property
    def blocks(self) -> list[Block]:
        """The blocks of this stage, in order."""
        return [layer for layer in self.forward_funcs if isinstance(layer, Block)]

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields this stage's parameters by their names in InfiniTransformer."""
        for name, parameter in self.named_parameters():
            yield single_process_name(name), parameter

    def choose_trained(self, optimizer: OptimizerConfig) -> None:
        """Makes parameters that are not to be trained keep their values.

        All stages must have the same groups of the optimizer, or DeepSpeed waits forever for the
        gradient's norm of one that others lack. A stage with nothing to train in a group puts one
        parameter there that receives a gradient of zero. It is in the stage's last block, so that
        the first stage computes little for it.

        Args:
            optimizer: its `train` has the patterns, see `model.trained`.
        """
        lacking = trained_groups(self.config, optimizer)
        for name, parameter in self.own_parameters():
            if is_trained(name, optimizer.train):
                lacking.discard(group_of(name, parameter, optimizer.name))
            else:
                parameter.requires_grad_(False)
                self.frozen[name] = parameter
        last = self.blocks[-1]
        stand_ins = {
            "weights": last.mlp.down_proj.weight,
            "no_decay": last.post_attention_layernorm.weight,
            "gates": last.self_attn.beta,
        }
        for group in lacking:
            stand_ins[group].requires_grad_().register_hook(torch.zeros_like)

    def forward(
        self,
        inputs: Tensor,
        layout: Layout,
        memory: list[MemoryState],
        exchange: Exchange | None = None,
        wanted: Wanted | None = None,
    ) -> tuple[Tensor, list[MemoryState], list[WriteStats]]:
        """See `Stage`."""
        embedding = self.forward_funcs[0] if self.stage_id == 0 else None
        hidden, after, writes = read_blocks(
            self.blocks, inputs, layout, memory, exchange, embedding
        )
        if wanted is not None:
            norm = self.forward_funcs[-2]
            hidden = token_losses(hidden, *self._head(), *wanted, norm)
        return hidden, after, writes

    def embed(self, tokens: Tensor) -> Tensor:
        """See `Stage`."""
        tied = TIED_KEY in self.tied_modules
        layer = self.tied_modules[TIED_KEY] if tied else self.forward_funcs[0]
        return F.embedding(tokens, layer.weight)  # type: ignore[arg-type]

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Stage`."""
        return F.linear(self.forward_funcs[-2](hidden), *self._head())

    def _head(self) -> tuple[Tensor, Tensor | None]:
        if self.config.tie_embeddings:
            return self.tied_modules[TIED_KEY].weight, None  # type: ignore[return-value]
        return self.forward_funcs[-1].weight, self.forward_funcs[-1].bias


def _project(embedding: Embedding, hidden: Tensor) -> Tensor:
    return F.linear(hidden, embedding.weight)
