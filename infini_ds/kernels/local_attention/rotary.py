"""Rotary positions as one operation that keeps only its tables for the backward pass."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """Rotary positions in two halves.

    Args:
        x: [..., n, heads, d].
        cos, sin: [..., n, d / 2], or [n, d / 2] if there are positions.
        positions: [..., n], which row of the tables is each token's; None: its own.
    """
    return _Rotate.apply(x, cos, sin, positions)  # type: ignore[return-value]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same without a gradient; cos and sin [..., n, heads or 1, d / 2], of x's type."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, positions):
        cos, sin = (table.to(x.dtype).unsqueeze(-2) for table in (cos, sin))
        ctx.save_for_backward(cos, sin, positions)
        return rotated(x, *_placed(cos, sin, positions))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        cos, sin = _placed(*ctx.saved_tensors)
        return rotated(gradient, cos, -sin), None, None, None


def _placed(cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    return (cos, sin) if positions is None else (cos[positions], sin[positions])
