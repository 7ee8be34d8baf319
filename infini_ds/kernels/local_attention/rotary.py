"""Rotary positions as one operation that keeps only its tables for the backward pass."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """Applies rotary positions to two halves of each head.

    Args:
        x: [..., n, heads, d].
        cos, sin: [..., n, d / 2], or [n, d / 2] if there are positions.
        positions: [..., n], the row of the tables for each token; None if rows and tokens agree.
    """
    return _Rotate.apply(x, cos, sin, positions)  # type: ignore[return-value]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Works like `rotate`, but without a gradient.

    cos and sin are [..., n, heads or 1, d / 2], in x's type.
    """
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
