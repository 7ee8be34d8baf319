"""The gated feed-forward layer, SwiGLU or GEGLU (Shazeer 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from infini_ds.config import ModelConfig
from infini_ds.kernels.fused import fused


class FeedForward(nn.Module):
    """Computes down(act(gate(x)) * up(x)), with gate and up as one matrix product.

    Between the products only gate and up are kept for the backward pass, because the rest is cheap
    to recompute.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        size = config.mlp_size
        self.hidden_act = config.hidden_act
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps [batch, length, hidden_size] to the same shape."""
        gate_up = self.gate_up_proj(hidden)
        weight, bias = self.down_proj.weight, self.down_proj.bias
        weight = weight.to(gate_up.dtype)  # differs under autocast
        bias = None if bias is None else bias.to(gate_up.dtype)
        arguments = gate_up, weight, bias, self.hidden_act
        if torch.compiler.is_compiling():  # the compiler itself would keep the product as well
            return checkpoint(_down, *arguments, use_reentrant=False, preserve_rng_state=False)
        return _Down.apply(*arguments)  # type: ignore[return-value]


def _down(gate_up: Tensor, weight: Tensor, bias: Tensor | None, hidden_act: str) -> Tensor:
    return F.linear(gated(gate_up, hidden_act), weight, bias)


class _Down(torch.autograd.Function):
    """Computes F.linear(gated(gate_up), weight, bias), and keeps only gate_up and weight."""

    @staticmethod
    def forward(ctx, gate_up, weight, bias, hidden_act):
        ctx.save_for_backward(gate_up, weight)
        ctx.hidden_act = hidden_act
        return _down(gate_up, weight, bias, hidden_act)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gate_up, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        d_weight = d_bias = None
        if ctx.needs_input_grad[1]:
            d_weight = rows.T @ gated(gate_up, ctx.hidden_act).flatten(0, -2)
        if ctx.needs_input_grad[2]:
            d_bias = rows.sum(dim=0)
        return gated_gradient(gradient @ weight, gate_up, ctx.hidden_act), d_weight, d_bias, None


@fused
def gated(gate_up: Tensor, hidden_act: str) -> Tensor:
    """Computes act(gate) * up, where gate_up [..., 2 size] holds gate and up side by side."""
    gate, up = gate_up.chunk(2, dim=-1)
    return _ACTIVATIONS[hidden_act](gate).mul_(up)


def _gated_gradient(gradient: Tensor, gate_up: Tensor, hidden_act: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate = _DERIVATIVES[hidden_act](gradient * up, gate)
    return torch.cat((d_gate, gradient * _ACTIVATIONS[hidden_act](gate)), dim=-1)


def _gated_gradient_in_place(gradient: Tensor, gate_up: Tensor, hidden_act: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate_up = torch.empty_like(gate_up)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    torch.mul(gradient, _ACTIVATIONS[hidden_act](gate), out=d_up)
    _DERIVATIVES[hidden_act].grad_input(gradient * up, gate, grad_input=d_gate)
    return d_gate_up


gated_gradient = fused(_gated_gradient, elsewhere=_gated_gradient_in_place)
"""Computes the gradient of gate_up from the gradient of the result of `gated`, [..., size]."""

_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}
_DERIVATIVES = {"silu": torch.ops.aten.silu_backward, "gelu": torch.ops.aten.gelu_backward}
