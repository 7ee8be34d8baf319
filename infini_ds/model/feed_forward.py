"""The gated feed-forward: SwiGLU or GEGLU (Shazeer 2020)."""

import torch.nn.functional as F
from torch import Tensor, nn

from infini_ds.config import ModelConfig


class FeedForward(nn.Module):
    """down(act(gate(x)) * up(x)); gate and up are one product."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.mlp_size
        self.activation = {"silu": F.silu, "gelu": F.gelu}[config.hidden_act]
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, length, hidden_size] to the same."""
        gate, up = self.gate_up_proj(hidden).chunk(2, dim=-1)
        return self.down_proj(self.activation(gate) * up)
