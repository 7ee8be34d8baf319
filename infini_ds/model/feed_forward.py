"""The gated feed-forward: SwiGLU or GEGLU (Shazeer 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infini_ds.config import ModelConfig
from infini_ds.kernels.fused import fused


class FeedForward(nn.Module):
    """down(act(gate(x)) * up(x)); gate and up are one product."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.mlp_size
        self.hidden_act = config.hidden_act
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, length, hidden_size] to the same."""
        return self.down_proj(gated(self.gate_up_proj(hidden), self.hidden_act))


class _Gated(torch.autograd.Function):
    """`gated`, keeping only its input: act(gate) is computed again in the backward pass."""

    @staticmethod
    def forward(ctx, gate_up, hidden_act):
        ctx.save_for_backward(gate_up)
        ctx.hidden_act = hidden_act
        gate, up = gate_up.chunk(2, dim=-1)
        return _ACTIVATIONS[hidden_act](gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        torch.mul(gradient, _ACTIVATIONS[ctx.hidden_act](gate), out=d_up)
        _DERIVATIVES[ctx.hidden_act](gradient * up, gate, grad_input=d_gate)
        return d_gate_up, None


_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}
_DERIVATIVES = {
    "silu": torch.ops.aten.silu_backward.grad_input,
    "gelu": torch.ops.aten.gelu_backward.grad_input,
}


def _gated(gate_up: Tensor, hidden_act: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return _ACTIVATIONS[hidden_act](gate) * up


gated = fused(_gated, elsewhere=_Gated.apply)
"""act(gate) * up, of gate and up side by side [..., 2 size] and the activation's name."""
