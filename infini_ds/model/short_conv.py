"""A causal convolution over the preceding tokens, with one filter for each channel."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infini_ds.layout import made_once


class ShortConv(nn.Module):
    """Computes x_t + sum over i of c_i x_(t - i), with filters c_i for each channel.

    All c_i are 0 initially, so that the layer starts as the identity.

    Args:
        channels: number of channels.
        taps: number of earlier tokens that each token sees.
    """

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, taps))

    @property
    def taps(self) -> int:
        """Number of earlier tokens that each token sees."""
        return self.weight.shape[1]

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Convolves consecutive tokens of one segment.

        Args:
            x: [..., t, heads, d], heads x d channels.
            before: [..., taps, heads, d], the preceding tokens, zeros where there are none.

        Returns:
            The output in the shape of x, and the last `taps` input tokens, which are `before` for
            the tokens that follow.
        """
        seen = torch.cat((before, x), dim=-3)
        taps = self.weight.mT.unflatten(1, x.shape[-2:])  # [taps, heads, d]
        out = x
        for back, tap in enumerate(taps, start=1):
            out = torch.addcmul(out, tap, seen.narrow(-3, len(taps) - back, x.shape[-3]))
        return out, seen.narrow(-3, x.shape[-3], len(taps))

    def packed(self, x: Tensor, begins: Tensor, before: Tensor) -> Tensor:
        """Whole segments of several documents, none of which sees tokens of another.

        Args:
            x: [batch, segments, n, heads, d].
            begins: as in Layout, [batch, segments, n].
            before: [batch, segments, taps, heads, d], the tokens before the first document's.

        Returns:
            The same shape as x.
        """
        taps = self.weight.mT.unflatten(1, x.shape[-2:])  # [taps, heads, d]
        out: Tensor = _Packed.apply(x, taps, _first_rows(begins, self.taps))  # type: ignore
        first = begins[:, :, : self.taps, None, None] == 0
        seen = self(torch.zeros_like(before), before)[0]  # what is seen of them alone
        return torch.cat((out[:, :, : self.taps] + seen * first, out[:, :, self.taps :]), dim=2)


def _first_rows(begins: Tensor, taps: int) -> list[Tensor]:
    """Rows, of lanes and segments flattened, of the documents behind each segment's first: the
    first rows of all of them, the second rows, and so on, `taps` of them."""

    def make() -> list[Tensor]:
        n = begins.shape[-1]
        place = torch.arange(n, device=begins.device) - begins
        place = place.masked_fill((begins == 0) | (begins == n), -1).flatten()
        return [(place == row).nonzero()[:, 0] for row in range(taps)]

    return made_once(begins, ("first rows", taps), make)


class _Packed(torch.autograd.Function):
    """The convolution by rows: those of a document that have too few before them are left out."""

    @staticmethod
    def forward(ctx, x, taps, first_rows):
        ctx.save_for_backward(x, taps)
        ctx.first_rows = first_rows
        out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, taps.dtype), device=x.device)
        out.copy_(x)
        rows = out.flatten(0, 2)
        for back, tap in _within(taps, x.shape[2]):
            outside = torch.cat(first_rows[:back])
            kept = rows[outside]
            out[:, :, back:].addcmul_(tap, x[:, :, :-back])
            rows[outside] = kept
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, taps = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(gradient)
        d_taps = torch.zeros_like(taps)
        inside = gradient.clone(memory_format=torch.contiguous_format)
        rows = inside.flatten(0, 2)
        for back, tap in _within(taps, x.shape[2]):
            rows[ctx.first_rows[back - 1]] = 0
            later = inside[:, :, back:]
            dx[:, :, :-back].addcmul_(tap, later)
            d_taps[back - 1] = (later * x[:, :, :-back]).sum(dim=(0, 1, 2))
        return dx, d_taps, None


def _within(taps: Tensor, n: int) -> list[tuple[int, Tensor]]:
    """How far back each tap reaches, of those that reach a token of the same segment."""
    return list(enumerate(taps[: n - 1], start=1))
